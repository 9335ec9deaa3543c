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
from collections.abc import Iterator
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
LEFT_OUT = [  # for their time; what they test is tested on Linux
    "api/test_litellm_client.py",  # it and llm bring 270 MB along, and say nothing about Windows
    "api/test_llm_client.py",
    "api/test_fuzz.py",
    "bench/test_short_bench.py::test_everything_is_measured_in_one_run",  # starts three more Pythons with torch
    "cli/test_convert.py::test_what_the_builder",
    "e2e/test_bad_input.py::test_port_in_use[api]",  # up has the same server
    "e2e/test_by_hand.py::test_a_gated_model_without_a_token",  # doctor's test has the same sentence
    "e2e/test_exactness.py::test_family",  # the default model's stays
    "e2e/test_first_pc.py",
    "e2e/test_networks_of_nodes.py",
    "e2e/test_promises.py::test_lora_adapters_are_served",
    "e2e/test_promises.py::test_prompt_tuning_lowers_the_loss[ptune]",  # deep_ptune's prompts go to the nodes, too
    "e2e/test_seventy_b.py",
    "e2e/test_up.py::test_check_answers_paris",  # the installed wheel does
    "e2e/test_versions.py",
    "engines/test_contract.py::TestCommand",  # the compiled runtime keeps the same contract, in both dialects
    "engines/test_lost_states.py",
    "engines/test_onnx.py::test_int4_of_another_family",
    "engines/test_petals.py::test_a_node_is_missing",
    "jobs/test_workers_as_engine.py::TestInAChildOver",  # a process for each test; in one process it is run
    "p2pd/test_hard.py::test_two_thousand_stores_and_gets",
    "models/test_damaged.py",
    "models/test_gguf_types.py",  # bytes and numbers alone, as further files below
    "models/test_loading.py::test_memory_while_loading",  # what Wine counts falls when Linux takes pages of libraries back; two more below
    "models/test_packed.py",
    # Each is an environment of its own, and of each kind one stays.
    "scripts/test_bootstrap.py::test_what_an_installation_is_made_from_is_watched[external",
    "scripts/test_bootstrap.py::test_what_an_installation_is_made_from_is_watched[pyproject",
    "scripts/test_bootstrap.py::test_what_an_installation_is_made_from_is_watched[src",
    "scripts/test_bootstrap.py::test_what_stops_the_build_is_explained[OSError",
    "scripts/test_build.py",
    "scripts/test_many_chats.py::test_chats_are_answered_and_a_long_prompt_survives_its_nodes",  # starts six more Pythons with torch
    "scripts/test_families_table.py",
    "scripts/test_gpu_check.py",
    "scripts/test_resolve.py",
    "scripts/test_workflows.py",
    "span/test_equal_logits.py",
    "span/test_families.py",
    "span/test_hybrids.py",
    "span/test_packed_linear.py::test_packing_frees_the_plain_weights_on_the_way",  # test_stored.py measures a load, too
    "span/test_needs.py::test_a_loaded_span_takes_what_the_plan_says",
    "span/test_scheduler_families.py",
    "span/test_scheduler_random.py",
    "span/test_stored.py::test_memory_is_as_planned_and_little_more_while_loading",
    "span/test_true_shapes.py",
    "span/test_wide_rows.py",
    "windows/test_speed.py",  # test_speed runs it by itself
]
# What computes, counts, or makes one text of another, and meets the system nowhere: the same code on each.
ALIKE = [
    "api/test_anthropic_client.py",  # over the same HTTP as openai's and ollama's; to import the client is 3,152 modules
    "bench/test_figures.py",
    "bench/test_tiny_model.py",
    "client/test_choosing.py",
    "client/test_decode.py::test_drafts_change_no_token",
    "client/test_decode.py::test_greedy_answers_at_once_are_those_of_generate",
    "client/test_decode.py::test_what_generate_applies_is_applied",
    "client/test_drafts.py",
    "client/test_generation.py",
    "client/test_head.py",
    "client/test_heads.py",
    "client/test_hollow.py",
    "client/test_messages.py",
    "client/test_rooms.py",
    "client/test_rounds.py",
    "e2e/test_bad_input.py::test_a_swarm_without_peers",
    "e2e/test_bad_input.py::test_an_engine_that_there_is_not",
    "e2e/test_bad_input.py::test_blocks_out_of_range",
    "e2e/test_bad_input.py::test_blocks_that_are_no_range",
    "e2e/test_bad_input.py::test_too_little_memory",
    "e2e/test_bad_input.py::test_truncated_gguf",
    "e2e/test_bad_input.py::test_truncated_safetensors",
    "e2e/test_bad_input.py::test_wrong_peers_address",
    "e2e/test_choice_of_blocks.py",
    "e2e/test_kept_prompts.py",  # a node dies in test_promises.py, too
    "engines/test_answers.py",
    "engines/test_base.py",
    "engines/test_chosen.py",
    "engines/test_constrained_answers.py",
    "engines/test_constraints.py",
    "engines/test_embeddings.py",
    "engines/test_formats.py",
    "engines/test_json_bounds.py",
    "engines/test_prompts.py",
    "engines/test_registry.py::test_the_local_engine_needs_no_swarm",
    "engines/test_sampling.py",
    "engines/test_stopping.py",
    "engines/test_table.py",
    "engines/test_typed.py",
    "jobs/test_job_model.py",
    "models/test_cuts.py",
    "models/test_four_bits.py",
    "models/test_gguf.py::test_a_file_computes_as_its_original",
    "models/test_gguf.py::test_what_cannot_be_computed_is_refused_by_name",
    "models/test_gguf_text.py",
    "models/test_loading.py::test_the_footprint_is_what_is_loaded",
    "models/test_quantized_checkpoints.py",
    "models/test_refusals.py",
    "models/test_rows.py",
    "models/test_texts.py",
    "models/test_transformers_internals.py",
    "node/test_placement.py",
    "scripts/test_api_table.py",
    "scripts/test_plan_table.py",
    "span/test_adapters.py",
    "span/test_choices.py",
    "span/test_distributed.py",
    "span/test_int4.py::test_a_span_computes_nearly_the_same_in_the_bytes_that_were_planned",
    "span/test_int4.py::test_a_span_on_a_card_computes_what_one_on_the_cpu_does",
    "span/test_lean.py",
    "span/test_native.py::test_which_families_take_it",  # the compiled kernels themselves are run
    "span/test_pace.py",
    "span/test_passes.py",
    "span/test_peak.py",
    "span/test_rotary.py",
    "span/test_scheduler.py",
    "span/test_scheduler_turns.py",
    "span/test_sessions.py",
    "span/test_shortage.py",
    "span/test_states.py",
    "span/test_stored.py::test_experts_that_the_file_has_in_six_bits_take_eight",
    "span/test_stored.py::test_it_computes_with_the_levels_of_the_file",
    "span/test_stored.py::test_the_default_model_is_as_good_as_its_own_weights",
    "span/test_windows.py",
    "swarm/test_naming.py",
    "swarm/test_planner.py",
    "swarm/test_speeds.py",
    "upstream/test_refusals.py",
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


def not_run(said: str) -> Iterator[str]:
    """Which tests were not run there, and why; but for those of LEFT_OUT and ALIKE."""
    skipped: Counter[tuple[str, str]] = Counter()
    for count, file, reason in re.findall(r"^SKIPPED \[(\d+)\] (\S+?):\d+: (.*)$", said, re.MULTILINE):
        skipped[file, reason] += int(count)
    yield f"Only on Linux: {skipped.total()}"
    for (file, reason), count in skipped.items():
        yield f"    {count} of {file}: {reason}"
    for count, file, what in re.findall(r"^LACKING \[(\d+)\] (\S+): (.*)$", said, re.MULTILINE):
        yield f"    {count} of {file}, on Windows PCs only: Wine lacks {what}"


def everything_in(folders: set[str]) -> list[str]:
    # By what is ignored: named together, folders would get each other's conftest.
    others = [path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name not in folders]
    return [
        "tests",
        "-m",
        "not wine_lacks and not alone",  # what measures needs the PC for itself
        *(f"--ignore=tests/{name}" for name in others),
        *(f"--{'ignore' if name.endswith('.py') else 'deselect'}=tests/{name}" for name in (*LEFT_OUT, *ALIKE)),
    ]


@pytest.mark.timeout(SETUP_SECONDS + UNIT_SECONDS)
def test_units_under_windows_python(wheel, capsys):
    said = pytest_in_the_bench(*everything_in(WITH_THE_WHEEL), PETALS_WIN_WHEEL=wheel)
    with capsys.disabled():
        print("", summary(said), *not_run(said), sep="\n")


@pytest.mark.timeout(SETUP_SECONDS + UNIT_SECONDS)
def test_programs_under_windows_python(runtime, capsys):
    programs = {"PETALS_WIN_TESTED_P2PD": P2PD, "PETALS_WIN_TESTED_RUNTIME": runtime}
    said = pytest_in_the_bench(*everything_in(WITH_THE_DAEMON), **programs)
    with capsys.disabled():
        print("", summary(said), *not_run(said), sep="\n")
        print("    left out for their time:", *LEFT_OUT, *ALIKE)


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
