"""From Linux: the tests of this project under Windows Python, and a swarm of both systems. See scripts/windows_bench.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from engines.native_runtime import build_runtime
from greedy import TEXT, Client

from petals_win.models.source import DEFAULT_MODEL
from petals_win.swarm.local import LocalSwarm

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "windows-bench"
pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif(sys.platform == "win32", reason="on Windows the tests need no bench"),
]

WITH_THE_WHEEL = {
    "bench",
    "cli",
    "client",
    "daemon",
    "dht",
    "hivemind",
    "host",
    "jobs",
    "kernels",
    "models",
    "node",
    "scripts",
    "span",
    "swarm",
    "upstream",
    "windows",
}
WITH_THE_DAEMON = {"api", "e2e", "engines", "p2pd", "web"}
LEFT_OUT = [  # for their time
    "api/test_litellm_client.py",  # it and llm bring 270 MB along, and say nothing about Windows
    "api/test_llm_client.py",
    "api/test_fuzz.py",
    "bench/test_short_bench.py::test_everything_is_measured_in_one_run",  # starts three more Pythons with torch
    "cli/test_convert.py::test_what_the_builder",
    "client/test_decode.py::test_greedy_answers_at_once_are_those_of_generate[dots3_note_text]",
    "e2e/test_by_hand.py::test_a_gated_model_without_a_token",  # doctor's test has the same sentence
    "e2e/test_exactness.py::test_family",  # the default model's stays
    "e2e/test_first_pc.py",
    "e2e/test_networks_of_nodes.py",
    "e2e/test_promises.py::test_lora_adapters_are_served",
    "e2e/test_seventy_b.py",
    "e2e/test_up.py::test_check_answers_paris",  # the installed wheel does
    "e2e/test_versions.py",
    "engines/test_lost_states.py",
    "engines/test_onnx.py::test_int4_of_another_family",
    "engines/test_petals.py::test_a_node_is_missing",
    "jobs/test_workers_as_engine.py::TestInAChildOver",  # a process for each test; in one process it is run
    "p2pd/test_hard.py::test_two_thousand_stores_and_gets",
    "models/test_damaged.py",
    "models/test_gguf_types.py",  # bytes and numbers alone, as further files below
    "models/test_packed.py",
    "scripts/test_build.py",
    "scripts/test_many_chats.py::test_chats_are_answered_and_a_long_prompt_survives_its_nodes",  # starts six more Pythons with torch
    "scripts/test_families_table.py",
    "scripts/test_gpu_check.py",
    "scripts/test_resolve.py",
    "scripts/test_workflows.py",
    "span/test_equal_logits.py",
    "span/test_families.py",
    "span/test_hybrids.py",
    "span/test_scheduler_families.py",
    "span/test_scheduler_random.py",
    "span/test_true_shapes.py",
    "span/test_wide_rows.py",
    "windows/test_speed.py",  # test_speed runs it by itself
]
DURATIONS = ["--durations=25", "--durations-min=8"]
CHECKOUT = "Z:/win/checkout/"
P2PD = CHECKOUT + "bin/p2pd.exe"
NOT_HERE = 3  # the bench's status where it cannot be
WHEELS = ROOT / "build" / "windows-wheel"
RUNTIME = ROOT / "build" / "windows-runtime"
SETUP_SECONDS, UNIT_SECONDS, SWARM_SECONDS = 1500, 2700, 600


@pytest.fixture(scope="module", autouse=True)
def bench() -> None:
    done = subprocess.run([BENCH, "--setup"], capture_output=True, text=True, timeout=SETUP_SECONDS)
    if done.returncode == NOT_HERE:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


@pytest.fixture
def runtime() -> str:
    """A native runtime, by its Windows path: the compiler's own processes do not run under Wine."""
    RUNTIME.mkdir(parents=True, exist_ok=True)
    return CHECKOUT + build_runtime(RUNTIME, windows=True).relative_to(ROOT).as_posix()


@pytest.fixture
def wheel() -> str:
    """What a Windows user installs, by its Windows path: it holds the p2pd.exe that is shipped."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    command = [sys.executable, ROOT / "scripts/build.py", "--output", WHEELS, "windows/amd64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SETUP_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = WHEELS.glob("*.whl")
    return CHECKOUT + built.relative_to(ROOT).as_posix()


def pytest_in_the_bench(*arguments: str, **environment: str) -> str:
    """Run tests under Windows Python; what pytest says of them."""
    done = subprocess.run(
        [BENCH, "python", "-m", "pytest", "-q", "-rs", "-s", "-p", "no:cacheprovider", *DURATIONS, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=UNIT_SECONDS,
    )
    if done.returncode != 0:  # pytest's own summary comes last, where it is seen
        pytest.fail(f"{done.stderr[-3000:]}\n{done.stdout[-20000:]}", pytrace=False)
    return done.stdout


def summary(said: str) -> str:
    """What the tests have measured, how long the slowest took, and pytest's last line."""
    measured = r"^.*(?:up --check: \d|pip installed|two nodes \d|p2pd.exe was gone).*$|^\d+\.\d+s (?:call|setup) .*$"
    return "\n".join(
        [*re.findall(measured, said, re.MULTILINE), "Under Windows Python: " + said.strip().splitlines()[-1]]
    )


def not_run(said: str, folders: set[str], every_test: Sequence[pytest.Item]) -> Iterator[str]:
    """Which tests of these folders were not run there, and why."""
    skipped: Counter[tuple[str, str]] = Counter()
    for count, file, reason in re.findall(r"^SKIPPED \[(\d+)\] (\S+?):\d+: (.*)$", said, re.MULTILINE):
        skipped[file, reason] += int(count)
    of_these = [item for item in every_test if item.path.relative_to(ROOT / "tests").parts[0] in folders]
    marks = [(item, mark) for item in of_these for mark in item.iter_markers()]
    lacking = Counter((item.path.name, mark.args[0]) for item, mark in marks if mark.name == "wine_lacks")
    elsewhere = {item.nodeid for item, mark in marks if mark.name == "skipif" and mark.args[:1] == (True,)}
    yield f"Only on Linux: {skipped.total()}, only on other systems: {len(elsewhere)}"
    for (file, reason), count in skipped.items():
        yield f"    {count} of {file}: {reason}"
    for (file, what), count in lacking.items():
        yield f"    {count} of {file}, on Windows PCs only: Wine lacks {what}"


def everything_in(folders: set[str]) -> list[str]:
    # By what is ignored: named together, folders would get each other's conftest.
    others = [path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name not in folders]
    return [
        "tests",
        "-m",
        "not wine_lacks and not alone",  # what measures needs the PC for itself
        *(f"--ignore=tests/{name}" for name in others),
        *(f"--deselect=tests/{name}" for name in LEFT_OUT),
    ]


@pytest.mark.timeout(SETUP_SECONDS + UNIT_SECONDS)
def test_units_under_windows_python(wheel, every_test, capsys):
    said = pytest_in_the_bench(*everything_in(WITH_THE_WHEEL), PETALS_WIN_WHEEL=wheel)
    with capsys.disabled():
        print("", summary(said), *not_run(said, WITH_THE_WHEEL, every_test), sep="\n")


@pytest.mark.timeout(SETUP_SECONDS + UNIT_SECONDS)
def test_programs_under_windows_python(runtime, every_test, capsys):
    programs = {"PETALS_WIN_TESTED_P2PD": P2PD, "PETALS_WIN_TESTED_RUNTIME": runtime}
    said = pytest_in_the_bench(*everything_in(WITH_THE_DAEMON), **programs)
    with capsys.disabled():
        print("", summary(said), *not_run(said, WITH_THE_DAEMON, every_test), sep="\n")
        print("    left out for their time:", *LEFT_OUT)


@pytest.mark.alone
@pytest.mark.timeout(SETUP_SECONDS + SWARM_SECONDS)
def test_speed(capsys):
    said = pytest_in_the_bench("tests/windows/test_speed.py")
    with capsys.disabled():
        print("", summary(said), sep="\n")


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
        env={**os.environ, "PETALS_WIN_WINDOWS_P2PD": f"{BENCH} {P2PD}"},
        capture_output=True,
        text=True,
        timeout=SWARM_SECONDS,
    )
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


@pytest.mark.timeout(SETUP_SECONDS + SWARM_SECONDS)
def test_a_swarm_of_both_systems_survives_the_loss_of_its_windows_node(capsys):
    with LocalSwarm(DEFAULT_MODEL, ["0:15"], options=["--quant", "none"]) as swarm:
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
