"""`petals-win bench --engines` in short: which engines are opened, what is left out, and what is printed."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from api.fake_engine import FakeEngine
from api.serving import serving
from tiny_chat import tiny_chat_model
from typer.testing import CliRunner

from petals_win.bench import engines
from petals_win.cli.main import app
from petals_win.errors import UserError


@contextlib.asynccontextmanager
async def scripted(*_asked):
    yield FakeEngine(pace=0)


@contextlib.asynccontextmanager
async def missing(*_asked):
    raise UserError("It is not installed.")
    yield


def test_each_engine_has_its_figures_and_what_cannot_be_opened_is_named(tmp_path, monkeypatch):
    """The engine "local" is measured, and llama-server by the engine "openai"; nodes and onnx have tests of their own."""
    model = tiny_chat_model(tmp_path / "tiny", context=512, ends=0)
    started: list[list[str]] = []

    class Server(subprocess.Popen):
        def __init__(self, command, **how):
            started.append(command)
            super().__init__([sys.executable, "-c", "import time; time.sleep(600)"], **how)

    monkeypatch.setattr(engines, "_two_nodes", scripted)
    monkeypatch.setattr(engines, "_onnx", missing)
    monkeypatch.setattr(engines, "_gguf_file", lambda _model: Path("m.gguf"))
    monkeypatch.setattr(engines.subprocess, "Popen", Server)
    with serving(FakeEngine(pace=0)) as served:
        monkeypatch.setattr(engines, "_free_port", lambda: int(served.url.rpartition(":")[2]))
        report = engines.run_engines_bench(
            str(model), rounds=2, tokens=4, sessions=(2, 1), llama_server=Path("llama-server")
        )
    found = json.loads(json.dumps(report.as_dict()))
    assert found["engines"] == ["local", "petals", "llama_server"] and found["sessions"] == [1, 2]
    assert found["left_out"] == {"onnx_int4": "It is not installed.", "onnx_fp32": "It is not installed."}
    for engine in found["engines"]:
        for count in (1, 2):
            assert found[f"{engine}_{count}_tokens_per_s"] > 0 and len(found["all"][f"{engine}_{count}"]) == 2
    (command,) = started
    assert command[:3] == ["llama-server", "-m", "m.gguf"] and "--parallel" in command


@pytest.mark.parametrize("model", ["tiny", "nowhere.gguf"])
def test_llama_server_takes_gguf_files_only(model):
    with pytest.raises(UserError, match="GGUF files only"):
        engines._gguf_file(model)


def test_a_model_for_onnx_is_converted_once(tmp_path, home, monkeypatch):
    model = tiny_chat_model(tmp_path / "tiny", context=512)
    made: list[str] = []

    def convert(_model, out, *, precision, device):
        made.append(f"{precision} {device}")
        out.mkdir()

    monkeypatch.setattr("petals_win.models.onnx_conversion.convert_to_onnx", convert)
    folders = [engines._converted(str(model), "tiny", each, lambda _line: None) for each in ("int4", "int4", "fp32")]
    assert made == ["int4 cpu", "fp32 cpu"] and folders[0] == folders[1] != folders[2]


@pytest.fixture
def invoke(monkeypatch):
    """Runs the command without measuring; gives its result and what was to be measured."""
    report = engines.EnginesReport(
        "M",
        5,
        32,
        ("local",),
        (1, 8),
        {"onnx_int4": "It is missing."},
        {"local_1": [1.0]},
        {"local_1": 1.0, "local_8": 5.0},
    )

    def run(*arguments: str):
        asked: dict = {}
        monkeypatch.setattr(
            engines, "run_engines_bench", lambda model, **how: asked.update(how, model=model) or report
        )
        monkeypatch.setattr("petals_win.host.threads.apply_thread_settings", lambda threads: {})
        return CliRunner().invoke(app, ["bench", *arguments]), asked

    return run


def test_the_command_line(invoke):
    done, asked = invoke("--engines", "--llama-server", "ls", "--tokens", "8")
    assert done.exit_code == 0, done.output
    assert asked["sessions"] == [1, 8, 16] and asked["llama_server"] == Path("ls") and asked["tokens"] == 8
    assert (
        "onnx int4       not measured: It is missing." in done.stdout
        and "local                  1.0       5.0" in done.stdout
    )
    done, _ = invoke("--engines", "--json", "--sessions", "1")
    assert json.loads(done.stdout)["local_8_tokens_per_s"] == 5.0
    done, asked = invoke("--llama-server", "ls")
    assert done.exit_code == 2 and not asked
