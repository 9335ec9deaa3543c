"""Installs what is missing, checks, then runs all tests, with pytest's own summary at the end; arguments go to pytest.

Run by scripts/test, with any Python: what late tests need is made while the installation waits for its downloads.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV_PYTHON = ROOT / ".venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
BROWSER = {"chromium": "chromium", "chromedriver": "chromium-driver"}  # programs and their Debian packages


def provide_browser() -> None:
    """The tests of the web page drive a real browser. On Debian as root it is installed, elsewhere asked for."""
    missing = [package for program, package in BROWSER.items() if shutil.which(program) is None]
    if sys.platform != "linux" or not missing:
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        print(
            f"The tests of the web page need a browser. Type: sudo apt install {' '.join(BROWSER.values())}",
            flush=True,
        )
        return
    print(f"Installing {' '.join(missing)}", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", "--quiet", *command], env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"apt-get {' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


@contextlib.contextmanager
def working_ahead() -> Iterator[None]:
    """Run scripts/ahead.py meanwhile, and end it with all that it started."""
    command = [sys.executable, ROOT / "scripts" / "ahead.py"]
    # Not in a session of its own: to Linux each has the same right to the processor, however low a priority is in it.
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def main(arguments: list[str]) -> int:
    provide_browser()
    everything = all(argument.startswith("-") for argument in arguments)
    with working_ahead() if everything and sys.platform == "linux" else contextlib.nullcontext():
        check = [sys.executable, "-I", "-S", ROOT / "scripts" / "bootstrap.py", "check"]  # installs what is missing
        checked = subprocess.run(check).returncode
        if checked != 0:
            return checked
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        return subprocess.run([VENV_PYTHON, "-m", "pytest", *arguments], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that nothing is left behind
    sys.exit(main(sys.argv[1:]))
