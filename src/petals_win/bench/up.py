"""`petals-win up` of any checkout, or another command with an API, as a program of its own, for scripts that measure it.

Knows its command line; not what is asked.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from petals_win.host.memory import own_bytes

_START_SECONDS, _STOP_SECONDS = 300, 60
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Up:
    """One that answers: the address of its API, and its process, whose children are the nodes and daemons."""

    url: str
    process: psutil.Process

    def memory_bytes(self) -> int:
        """What all of its processes have in memory."""
        taken = 0
        for process in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                taken += own_bytes(process.pid)
        return taken


@contextlib.contextmanager
def up(python: Path, options: Sequence[str] = (), command: str = "up") -> Iterator[Up]:
    """`petals-win up` of the checkout that this Python belongs to, or its `command` with an API, once it answers; ends this program if it
    does not."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        program = [python, "-m", "petals_win.cli.main", command, "--port", str(port), *options]
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}
        process = subprocess.Popen(program, stdout=output, stderr=output, env=environment, stdin=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + _START_SECONDS
            url = f"http://127.0.0.1:{port}"
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    sys.exit(f"petals-win {command} of {python} does not answer. It says:\n{output.read()[-3000:]}")
                time.sleep(0.5)
            yield Up(url, psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(_STOP_SECONDS)


def _is_ready(url: str) -> bool:
    try:
        with DIRECT.open(f"{url}/ready", timeout=5):
            return True
    except OSError:
        return False
