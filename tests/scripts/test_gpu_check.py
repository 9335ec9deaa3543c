"""scripts/gpu-check: its half without a GPU, whole, and what it makes of checks that hang, crash or find something wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from argparse import Namespace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("llama", "qwen3", "gemma3_text", "mixtral", "gpt_oss", "qwen3_next")
COMMAND = [sys.executable, str(ROOT / "scripts" / "gpu_check.py")]


def test_the_half_without_a_gpu(tmp_path):
    report = tmp_path / "report.json"
    done = subprocess.run(
        [*COMMAND, "--device", "cpu", "--seconds", "280", "--json", str(report)],
        capture_output=True,
        encoding="utf-8",
        timeout=295,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = {result["what"]: result for result in json.loads(report.read_text("utf-8"))["results"]}
    assert {what for what, result in results.items() if result["level"] == "skipped"} == {
        "logits on the card",
        "memory on the card",
        "tokens/s on the card",
        "CUDA graphs",
        "smollm2",
    }
    assert all(result["figures"]["why"] for result in results.values() if result["level"] == "skipped")
    for what in (*(f"{family}, float32" for family in FAMILIES), "llama, nf4", "llama, int4"):
        assert float(results[what]["figures"]["error"]) <= float(results[what]["figures"]["allowed"])
    assert float(results["weights in int4"]["figures"]["values off"]) == 0
    assert results["tokens/s of 4 blocks, int4"]["figures"]["decode ratio"] > 0
    assert results["a node without memory"]["figures"]["next one"] == "the same"
    assert results["an answer by the API"]["figures"]["text"] == "that of one process"
    assert results["tokens/s, float32, cpu"]["figures"]["swarm"] > 0
    assert "ok       an answer by the API" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this PC has what the test is without")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([*COMMAND, "--only", "device"], capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 1
    assert "failed   device" in done.stdout and "finds no GPU" in done.stdout and "--device cpu" in done.stdout


def test_a_model_that_is_not_there():
    done = subprocess.run([*COMMAND, "--model", "nowhere.gguf"], capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 2 and "there is no file nowhere.gguf" in done.stderr


@pytest.mark.parametrize(
    ("torch_version", "transformers_version", "said"),
    [
        ("2.10.0+cu128", "5.24.0", "has torch 2.10.0+cu128. Start gpu_check.py with a Python that has 2.11 or newer."),
        ("2.11.0", "5.24.3", ""),
        ("2.15.0+cu132", "4.57.1", "transformers>=5.24,<5.25 is needed, and it is 4.57.1."),
        ("2.15.0", "5.25.0", "transformers>=5.24,<5.25 is needed, and it is 5.25.0."),
        ("2.15.0", None, "transformers>=5.24,<5.25 is needed, and it is not here."),
    ],
)
def test_what_it_can_be_run_with(runner, monkeypatch, torch_version, transformers_version, said):
    def version(package: str) -> str:
        found = {"torch": torch_version, "transformers": transformers_version}[package]
        if found is None:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(runner.importlib.metadata, "version", version)
    assert said in runner.unfit() and bool(runner.unfit()) == bool(said)


def test_without_torch_it_ends_with_a_sentence(runner, monkeypatch, capsys):
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda _name: None)
    assert runner.main([]) == 1
    assert "has no torch. Start gpu_check.py with a Python that has 2.11 or newer." in capsys.readouterr().err


# -- what the runner makes of its checks

PROGRAM = """
    import json, os, sys, time

    def say(event, **facts):
        print(json.dumps({"event": event, **facts}), flush=True)

    for name in sys.argv[4:]:
        say("begin", name=name)
        say("result", level="failed" if name in ("device", "smollm2") else "ok", what=name, figures={})
        if name == "families":
            time.sleep(100)
        if name == "memory":
            os._exit(3)
        over = name in ("device", "smollm2")
        say("end", name=name, over=over)
        if over:
            break
"""


@pytest.fixture
def runner(tmp_path, monkeypatch) -> ModuleType:
    """gpu_check, with a program in the place of the checks: one fails and ends itself, one hangs, one crashes."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_check

    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM), "utf-8")
    monkeypatch.setattr(gpu_check, "PROGRAM", program)
    return gpu_check


def run(runner: ModuleType, folder: Path, names: list[str], seconds: float = 60) -> list[tuple[str, str, str]]:
    options = Namespace(device="cpu", model=None, seconds=seconds)
    results = runner.run_checks(names, options, folder / "log")
    return [(result["level"], result["what"], result["figures"].get("why", "")) for result in results]


def test_a_check_that_hangs_or_crashes_stops_no_other(runner, tmp_path, monkeypatch):
    monkeypatch.setitem(runner.CHECKS, "families", 1)
    assert run(runner, tmp_path, ["smollm2", "families", "memory", "swarm"]) == [
        ("failed", "smollm2", ""),
        ("ok", "families", ""),
        ("failed", "families", "it did not end within 1 s"),
        ("ok", "memory", ""),
        ("failed", "memory", "its process ended with status 3; the log tells more"),
        ("ok", "swarm", ""),
    ]


def test_without_a_device_nothing_else_is_tried(runner, tmp_path):
    failed, skipped = run(runner, tmp_path, ["device", "swarm"])
    assert failed == ("failed", "device", "") and skipped == ("skipped", "swarm", "there is no device to check")


def test_all_checks_together_have_their_time(runner, tmp_path):
    *_, late, left = run(runner, tmp_path, ["families", "swarm"], seconds=3)
    assert late == ("failed", "families", "it was not done when all checks had had 3 s")
    assert left == ("skipped", "swarm", "no time is left of 3 s")


def test_the_time_of_all_checks_is_less_than_eight_minutes(runner):
    assert sum(runner.CHECKS.values()) <= runner.TOTAL_SECONDS < 480


# -- what the checks make of what they find


@pytest.fixture
def checks(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_checks

    return gpu_checks


@pytest.mark.parametrize(("storage", "noise"), [("float32", 1e-3), ("bfloat16", 0.3)])
def test_a_device_that_computes_wrongly_is_found(checks, tmp_path, monkeypatch, storage, noise):
    """Steps that are off by as much as TF32 would be, or by more than 16 bits explain."""
    from petals_win.span.span import Span

    step = Span.step

    def noisy(self, session, hidden):
        output = step(self, session, hidden)
        return output + noise * output.float().std() * torch.randn_like(output)

    folder = checks.make_model(tmp_path / "llama", "llama")
    tokens = torch.arange(3, 30).unsqueeze(0)
    asked = checks.Asked(torch.device("cpu"), "", tmp_path)
    assert [result.level for result in checks._logits(asked, "llama", str(folder), tokens, [storage])] == ["ok"]
    monkeypatch.setattr(Span, "step", noisy)
    assert [result.level for result in checks._logits(asked, "llama", str(folder), tokens, [storage])] == ["failed"]


def test_what_is_not_installed_is_skipped_with_the_reason(checks, tmp_path, monkeypatch):
    def needs(package: str):
        def check(_asked):
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            yield

        return check

    asked = checks.Asked(torch.device("cpu"), "", tmp_path)
    monkeypatch.setattr(checks, "CHECKS", {"a": needs("uvicorn"), "b": needs("petals.client")})
    (skipped,) = checks._carry_out("a", asked)
    assert (skipped.level, skipped.figures["why"]) == ("skipped", "uvicorn is not installed")
    (failed,) = checks._carry_out("b", asked)
    assert failed.level == "failed" and "external/ is not built" in failed.figures["why"]


# -- what they do on a card, done on a CPU


@pytest.fixture
def as_a_card(checks, tmp_path, monkeypatch):
    """Goes through a check in all ways, in small sizes."""
    for name in ("LARGE", "WIDE"):
        monkeypatch.setattr(checks, name, {})
    monkeypatch.setattr(checks, "INT4_LARGE", (256, 128))
    torch.set_num_threads(1)
    asked = checks.Asked(torch.device("cpu"), "", tmp_path)
    return lambda check: {result.what: result for result in checks.CHECKS[check](asked)}


def test_all_storages_against_those_of_the_cpu(checks, as_a_card, monkeypatch):
    monkeypatch.setattr(checks, "FAMILIES", {"gpt_oss": checks.FAMILIES["gpt_oss"]})
    found = as_a_card("families")
    assert {what: result.level for what, result in found.items()} == {
        f"gpt_oss, {each}": "ok" for each in checks.STORAGES
    }
    assert found["gpt_oss, nf4"].figures["on the CPU"] == found["gpt_oss, nf4"].figures["error"]
    assert float(found["gpt_oss, int4"].figures["from the CPU's"]) == 0


@pytest.mark.parametrize("check", ["int4", "memory", "speed", "full", "too_large"])
def test_a_check_as_on_a_card(as_a_card, check):
    found = as_a_card(check)
    assert {what for what, result in found.items() if result.level != "ok"} <= {"CUDA graphs"}, found
    if check == "int4":
        assert found["int4 256 x 128, 512 rows"].figures["us"] > 0
    if check == "speed":
        assert {"tokens/s of 4 blocks, bfloat16", "tokens/s of 4 blocks, nf4", "tokens/s of 4 blocks, int4"} < set(
            found
        )
    if check == "full":
        assert "no memory left" in found["a node without memory"].figures["said"]


def test_weights_that_a_kernel_reads_wrongly_are_found(checks, as_a_card, monkeypatch):
    from petals_win.span.int4 import Int4Weight

    multiply = Int4Weight.multiply
    monkeypatch.setattr(Int4Weight, "multiply", lambda self, inputs: multiply(self, inputs.flip(-1)))
    assert as_a_card("int4")["weights in int4"].level == "failed"


def test_a_node_that_says_something_else_than_full_is_found(checks, as_a_card, monkeypatch):
    from petals_win.node import served

    monkeypatch.setattr(served, "is_shortage", lambda _error: False)
    found = as_a_card("full")["a node without memory"]
    assert found.level == "failed" and found.figures["said"].startswith("OutOfMemoryError for a session")


def test_a_node_that_takes_more_than_planned_is_found(checks):
    needs = Namespace(block_bytes=(100 * 2**20,) * 4, cache_bytes=2**20, num_blocks=4)
    levels = [checks._memory_of_a_node(mib * 2**20, needs).level for mib in (190, 210, 700, 1300)]
    assert levels == ["failed", "ok", "ok", "failed"]
