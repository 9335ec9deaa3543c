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
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
VENV_PYTHON = ROOT / ".venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
# Programs that tests run, and their Debian packages: a browser for the web page, address translation for networks, and what
# OpenAI's client for JavaScript needs.
PROGRAMS = {
    "chromium": "chromium",
    "chromedriver": "chromium-driver",
    "nft": "nftables",
    "node": "nodejs",
    "npm": "npm",
}

# Folders of tests that are run in one go, what takes longest first; folders that none names follow together. The first start daemons,
# nodes and browsers, and take as long as the other three.
PARTS = {
    "programs": {"e2e", "p2pd", "web"},
    "engines": {"api", "engines"},
    "tools": {"bench", "cli", "client", "jobs", "scripts", "upstream"},
}
AT_ONCE = 3  # parts of the tests


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


def without(names: Iterable[str]) -> list[str]:
    # By what is ignored: named together, folders would get each other's conftest.
    return [f"--ignore=tests/{name}" for name in sorted(names)]


def unlike_those_alone(everything: set[str]) -> set[str]:
    """The folders, and the files of other folders, without a test that has to be alone."""
    files = {path: "pytest.mark.alone" in path.read_text("utf-8") for path in TESTS.glob("*/test_*.py")}
    folders = {path.parent.name for path, alone in files.items() if alone}
    others = {f"{path.parent.name}/{path.name}" for path, alone in files.items() if not alone}
    return everything - folders | {name for name in others if name.split("/")[0] in folders}


def side_by_side(environment: dict[str, str]) -> int:
    """Run all tests, three parts of them at a time, since each mostly waits; then by itself what measures."""
    everything = {path.name for path in TESTS.iterdir() if path.is_dir() or path.match("test_*.py")}
    units = ["-m", "not bench and not alone"]
    # Named by their file, since to collect all tests takes as long as hundreds of them.
    bench = [str(TESTS / "windows" / "test_in_the_bench.py"), "-m", "bench and not alone"]
    parts = {
        "windows": [*bench, "-k", "not programs_under"],
        "programs on windows": [*bench, "-k", "programs_under"],
        **{name: [*units, *without(everything - folders)] for name, folders in PARTS.items()},
        "all else": [*units, *without(set.union(*PARTS.values()))],
    }
    waiting, statuses = list(parts), list[int]()
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                name = waiting.pop(0)
                print(f"Tests of {name} begin, and write to {log_of(name)}", flush=True)
                with log_of(name).open("wb") as output:
                    command = pytest(*parts[name], "-p", "no:cacheprovider")
                    running[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
            time.sleep(0.5)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                statuses.append(running.pop(name).returncode)
                print(log_of(name).read_text("utf-8", "replace"), flush=True)
    finally:
        for name, process in running.items():
            process.send_signal(signal.SIGINT)  # pytest ends what its tests have started
            process.wait()
            print(log_of(name).read_text("utf-8", "replace"), flush=True)
    alone = pytest("-m", "alone", *without(unlike_those_alone(everything)))
    statuses.append(subprocess.run(alone, cwd=ROOT, env=environment).returncode)
    return next(filter(None, statuses), 0)


def log_of(part: str) -> Path:
    return ROOT / "build" / f"tests-of-{part.replace(' ', '-')}.log"


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
