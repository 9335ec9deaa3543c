"""A node started by its command line, as a user's is, of which the tests read the events."""

from __future__ import annotations

import json
import os
import queue
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import psutil

from petals_win.host.children import spawn

SECONDS = 120


class ByItself:
    """`petals-win serve --json --host 127.0.0.1` with more arguments. A context that ends it.

    :param home: PETALS_WIN_HOME, which makes it a PC of its own; None: without identity, as the nodes of `petals-win up`
    :param program: what the environment needs to run another version
    :param debug: let it log all that it does
    """

    def __init__(
        self,
        *arguments: str,
        home: Path | None = None,
        program: Mapping[str, str] | None = None,
        debug: bool = False,
    ):
        command = [sys.executable, "-m", "petals_win.cli.main", *(["--debug"] if debug else []), "serve", "--json"]
        command += ["--host", "127.0.0.1", "--threads", "1"]
        environment = {**os.environ, **(program or {})}
        if home is not None:
            environment["PETALS_WIN_HOME"] = str(home)
        elif program is None:
            command.append("--fresh")
        self.lines: list[str] = []
        self._events: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self.child = spawn([*command, *arguments], env=environment, on_line=self._take)

    def _take(self, line: str) -> None:
        if line.startswith('{"event"'):
            self._events.put(json.loads(line))
        else:
            self.lines.append(line)

    def event(self, name: str) -> dict:
        """The next event, which has to be this one."""
        try:
            found = self._events.get(timeout=SECONDS)
        except queue.Empty:
            raise AssertionError(f"no event {name!r}; it said:\n" + "\n".join(self.lines)) from None
        assert found["event"] == name, found
        return found

    def join(self) -> str:
        """Its address, when it is in the swarm."""
        self.address: str = self.event("joined")["peers"][0]
        return self.address

    def tell(self, address: str) -> None:
        """The address of a peer, for which a node with `--peers -` waits while it starts."""
        self.child.tell(address)

    @property
    def peer_id(self) -> str:
        return self.address.rpartition("/p2p/")[2]

    def kill(self) -> None:
        """End it by force, so that it can tell nobody."""
        process = psutil.Process(self.child.pid)
        process.kill()
        self.child.wait(30)

    def __enter__(self) -> ByItself:
        return self

    def __exit__(self, _type: type | None, _value: BaseException | None, _traceback: TracebackType | None) -> None:
        self.child.stop()
