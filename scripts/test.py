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
# Programs that tests run, and their Debian packages: a browser for the web page, address translation for networks.
PROGRAMS = {"chromium": "chromium", "chromedriver": "chromium-driver", "nft": "nftables"}


def provide_programs() -> None:
    """On Debian as root, programs that are missing are installed; elsewhere they are asked for."""
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if sys.platform != "linux" or not missing:
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        print(f"Some tests need programs that are not here. Type: sudo apt install {' '.join(missing)}", flush=True)
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


def pytest(*arguments: str) -> list[str | Path]:
    return [VENV_PYTHON, "-m", "pytest", *arguments]


def side_by_side(environment: dict[str, str]) -> int:
    """Run the tests in the bench beside all others, since each waits for half of its time, then by itself what measures."""
    log = ROOT / "build" / "windows-tests.log"
    print(f"Meanwhile, the tests under Windows Python write to {log}", flush=True)
    others = pytest("-m", "not bench and not alone")
    windows = pytest("-m", "bench and not alone", "-p", "no:cacheprovider")
    with log.open("wb") as output:
        process = subprocess.Popen(windows, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            statuses = [subprocess.run(others, cwd=ROOT, env=environment).returncode]
            statuses.append(process.wait())
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # pytest ends what its tests have started
                process.wait()
            print(log.read_text("utf-8", "replace"), flush=True)
    statuses.append(subprocess.run(pytest("-m", "alone"), cwd=ROOT, env=environment).returncode)
    return next(filter(None, statuses), 0)


def main(arguments: list[str]) -> int:
    provide_programs()
    everything = not arguments and sys.platform == "linux"
    with working_ahead() if everything else contextlib.nullcontext():
        check = [sys.executable, "-I", "-S", ROOT / "scripts" / "bootstrap.py", "check"]  # installs what is missing
        checked = subprocess.run(check).returncode
        if checked != 0:
            return checked
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}
        if everything:
            return side_by_side(environment)
        return subprocess.run(pytest(*arguments), cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that nothing is left behind
    sys.exit(main(sys.argv[1:]))
