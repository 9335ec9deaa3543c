"""Checks, then all tests, with pytest's own summary at the end. Run by scripts/test, in .venv; arguments go to pytest."""

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
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
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
        checked = subprocess.run([sys.executable, str(ROOT / "scripts" / "check.py")]).returncode
        if checked != 0:
            return checked
        return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
