"""From Linux: the tests of this project under Windows Python, and a swarm of both systems. See scripts/windows_bench.py."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from greedy import TEXT, Client

from petals_win.span.source import DEFAULT_MODEL
from petals_win.swarm.local import LocalSwarm

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "windows-bench"
OTHER_TESTS = ["host", "daemon", "cli", "engines/test_base.py", "engines/test_stopping.py", "hivemind", "swarm"]
OTHER_TESTS += ["e2e/test_exactness.py", "e2e/test_by_hand.py"]
WHEELS = ROOT / "build" / "windows-wheel"
SETUP_SECONDS, UNIT_SECONDS, SWARM_SECONDS = 1500, 2000, 600


def why_not() -> str | None:
    """What the bench lacks here, None if nothing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the bench runs on Linux on x86_64"
    if os.geteuid() != 0:
        return "the bench needs root"
    if shutil.which("debootstrap") is None and shutil.which("apt-get") is None:
        return "the bench needs Debian's debootstrap"
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode != 0:
        return "the bench needs name spaces of its own"
    return None


@pytest.fixture(scope="module", autouse=True)
def bench() -> None:
    lacking = why_not()
    if lacking is not None:
        pytest.skip(lacking)
    done = subprocess.run([BENCH, "--setup"], capture_output=True, text=True, timeout=SETUP_SECONDS)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def wheel() -> str:
    """What a Windows user installs, by its Windows path: it holds the p2pd.exe that is shipped."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    command = [sys.executable, ROOT / "scripts/build.py", "--output", WHEELS, "windows/amd64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SETUP_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = WHEELS.glob("*.whl")
    return "Z:/win/checkout/" + built.relative_to(ROOT).as_posix()


@pytest.mark.timeout(SETUP_SECONDS + UNIT_SECONDS)
def test_the_tests_under_windows_python(wheel, request, capsys):
    folders = [f"tests/{name}" for name in ("windows", *OTHER_TESTS)]
    # Left out: what fetches Go and a hundred modules anew, to build what is built and tested here and runs there, and
    # what takes minutes there to show once more what the test beside it shows.
    options = ["-q", "-rs", "-s", "-p", "no:cacheprovider"]
    options += ["-k", "not test_build_writes_the_file_asked_for and not test_wheel_holds and not family and not gated"]
    done = subprocess.run(
        [BENCH, "python", "-m", "pytest", *options, *folders],
        env={**os.environ, "PETALS_WIN_WHEEL": wheel},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=UNIT_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    skipped = re.findall(r"^SKIPPED \[(\d+)\] (\S+?):\d+: (.*)$", done.stdout, re.MULTILINE)
    not_here = [
        item.nodeid
        for item in request.session.items
        if any(m.args[:1] == (True,) for m in item.iter_markers("skipif"))
    ]
    with capsys.disabled():
        print("\nUnder Windows Python:", done.stdout.strip().splitlines()[-1])
        print(
            *re.findall(
                r"^.*(?:up --check: \d|pip installed|two nodes \d|p2pd.exe was gone).*$", done.stdout, re.MULTILINE
            ),
            sep="\n",
        )
        print(f"Only on Linux: {sum(int(count) for count, *_ in skipped)}, only elsewhere: {len(not_here)}")
        for count, file, reason in skipped:
            print(f"    {count} of {file}: {reason}")


@pytest.mark.timeout(SETUP_SECONDS + SWARM_SECONDS)
def test_p2pd_exe_and_upstream_s_daemon_in_one_swarm():
    """Statement 64 of the daemon's conformance checklist."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "windows",
        "tests/p2pd/test_swarm.py",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PETALS_WIN_WINDOWS_P2PD": f"{BENCH} Z:/win/checkout/bin/p2pd.exe"},
        capture_output=True,
        text=True,
        timeout=SWARM_SECONDS,
    )
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


@pytest.mark.timeout(SETUP_SECONDS + SWARM_SECONDS)
def test_a_swarm_of_both_systems_survives_the_loss_of_its_windows_node(capsys):
    with LocalSwarm(DEFAULT_MODEL, ["0:15"]) as swarm:
        swarm.wait_until_serving()
        command = [BENCH, "python", "tests/windows/other_half.py", swarm.peers[0]]
        with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace") as windows:
            watchdog = threading.Timer(SWARM_SECONDS, windows.terminate)
            watchdog.start()
            try:
                lines = windows.stdout
                assert lines is not None
                ready = next(lines, None)
                assert ready is not None, "it ended before its node served"
                said = json.loads(ready)
                assert said["text"] == TEXT
                client = Client(swarm.peers)
                try:
                    assert client.text() == TEXT  # from both systems, since the second half is nowhere else yet

                    def at_the_tenth_token(count: int) -> None:
                        if count == 10:
                            swarm.add_node("15:30")
                            swarm.wait_until_serving()
                            socket.create_connection(("127.0.0.1", said["ended_by"])).close()
                            ends.append(json.loads(next(lines)))

                    ends: list[dict] = []
                    assert client.text(at_the_tenth_token) == TEXT
                finally:
                    client.close()
                assert ends[0]["seconds"] < 5
                assert windows.wait(60) == 0
            finally:
                watchdog.cancel()
                windows.terminate()
    with capsys.disabled():
        print(
            f"\nTerminateProcess of the Windows node: p2pd.exe gone after {ends[0]['seconds']:.2f} s, the text went on"
        )
