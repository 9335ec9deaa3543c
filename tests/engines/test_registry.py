"""Engines by name, and which of them answers where nobody named one."""

from __future__ import annotations

import asyncio
import importlib.metadata
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from tiny_chat import tiny_chat_model

from petals_win.engines import registry
from petals_win.engines.choosing import choose_engine
from petals_win.engines.local import whole_model_here
from petals_win.engines.registry import GROUP, EngineSettings, check_engine_name, find_engine
from petals_win.errors import UserError

ROOT = Path(__file__).parents[2]
PEER = "/ip4/127.0.0.1/tcp/1/p2p/x"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny_chat_model(tmp_path_factory.mktemp("chat") / "tiny", context=256))


@pytest.fixture
def installed(monkeypatch):
    """Makes it look as if packages with these entry points were installed, and no others."""

    def install(**values: str) -> None:
        points = [EntryPoint(name, value, GROUP) for name, value in values.items()]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == GROUP else [])

    return install


def test_ours_are_there_whatever_is_installed(installed):
    installed()
    for name in ("auto", "command", "local", "onnx", "openai", "petals"):
        check_engine_name(name)
    assert callable(find_engine("local")) and callable(find_engine("petals"))
    with pytest.raises(UserError, match="no engine 'nope'. Use one of: auto, command, local, onnx, openai, petals."):
        check_engine_name("nope")


def test_the_package_declares_the_same():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert declared[GROUP] == registry._OURS


def test_an_engine_of_another_package(installed):
    installed(other="platform:system")
    check_engine_name("other")
    import platform

    assert find_engine("other") is platform.system


def test_another_package_does_not_take_the_name_of_ours(installed, caplog):
    installed(local="platform:system")
    assert find_engine("local").__module__ == "petals_win.engines.local"
    assert "'local' of platform:system is passed over" in caplog.text


@pytest.mark.parametrize("value", ["no_such_module_of_anybody:open", "platform:no_such_function"])
def test_a_package_that_is_broken(installed, value):
    installed(broken=value)
    with pytest.raises(UserError, match=f"'broken' cannot be loaded from {value}"):
        find_engine("broken")


def test_what_is_asked_for_is_not_chosen():
    assert choose_engine("other", EngineSettings("M", (PEER,))).name == "other"


def test_peers_mean_a_swarm():
    choice = choose_engine("auto", EngineSettings("M", (PEER,)))
    assert choice.name == "petals" and "--peers" in choice.why


def test_what_fits_one_pc_is_not_split(model, monkeypatch):
    choice = choose_engine("auto", EngineSettings(model))
    assert choice.name == "local" and "since tiny fits into this PC" in choice.why
    monkeypatch.setattr("petals_win.engines.local.available_bytes", lambda *_: 100_000)
    with pytest.raises(UserError, match="tiny does not fit into this PC alone: it takes .*petals-win serve.*--peers"):
        choose_engine("auto", EngineSettings(model))
    with pytest.raises(UserError, match="tiny does not fit into this PC: it takes"):
        find_engine("local")(EngineSettings(model))


def test_settings_that_an_engine_can_do_nothing_with(model):
    with pytest.raises(UserError, match="--peers are of no use"):
        find_engine("local")(EngineSettings(model, (PEER,)))
    with pytest.raises(UserError, match="Which swarm"):
        find_engine("petals")(EngineSettings(model))
    for wish in ({"device": "cpu"}, {"dtype": "float32"}, {"quant": "none"}):
        with pytest.raises(UserError, match="give --device, --dtype and --quant to 'petals-win serve'"):
            find_engine("petals")(EngineSettings(model, (PEER,), **wish))


def test_the_local_engine_computes_as_it_was_told(model):
    settings = EngineSettings(model, device="cpu", dtype="bfloat16", quant="none")
    assert whole_model_here(settings).dtype is torch.bfloat16
    engine = find_engine("local")(settings)
    try:
        assert engine.tokens._blocks._span.dtype is torch.bfloat16
    finally:
        asyncio.run(engine.close())
    for wish in ({"device": "gpu7"}, {"dtype": "float12"}, {"quant": "q4"}, {"dtype": "float16", "device": "cpu"}):
        with pytest.raises(UserError, match="Use|use"):
            find_engine("local")(EngineSettings(model, **wish))


def test_a_token_is_not_shown():
    assert "secret" not in repr(EngineSettings("M", token="secret"))


def test_the_local_engine_needs_no_swarm(model):
    """Neither the transport nor Petals is imported: what is not there cannot fail, and takes no time to start."""
    code = (
        "import sys; from petals_win.engines.registry import EngineSettings, find_engine; "
        f"find_engine('local')(EngineSettings({model!r})); "
        "print(sorted({'hivemind', 'petals'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
