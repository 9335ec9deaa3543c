"""Several --model: which engine each is for, which options go where, and how long what is idle is kept."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from api.fake_engine import FakeEngine
from typer.testing import CliRunner

from petals_win.cli import models
from petals_win.cli.main import app
from petals_win.engines import choosing, offers
from petals_win.engines.base import ModelCard
from petals_win.engines.keep_alive import seconds_of
from petals_win.engines.offers import Offer
from petals_win.engines.registry import EngineSettings
from petals_win.engines.several import KEEP_ALIVE_S, SeveralEngines
from petals_win.errors import UserError

pytestmark = pytest.mark.usefixtures("home")


@pytest.mark.parametrize(
    "text, named",
    [
        ("local:/models/a", ("local", "/models/a")),
        ("onnx:C:\\models\\b", ("onnx", "C:\\models\\b")),
        ("C:\\models\\a", ("petals", "C:\\models\\a")),
        ("meta-llama/Llama-2-70b-hf", ("petals", "meta-llama/Llama-2-70b-hf")),
        ("auto:SmolLM2-135M-Instruct", ("auto", "SmolLM2-135M-Instruct")),
        ("openai:llama3:8b", ("openai", "llama3:8b")),
        ("llama3:8b", ("petals", "llama3:8b")),
        ("openai:", ("openai", "")),
        ("local", ("petals", "local")),
        ("./local:a", ("petals", "./local:a")),
    ],
)
def test_an_engine_before_a_model(text, named):
    assert models.named_models([text], "petals") == [named]


def test_an_engine_that_there_is_not():
    with pytest.raises(UserError, match="There is no engine 'nope'"):
        models.named_models(["a"], "nope")


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("5m", 300),
        ("90s", 90),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("300ms", 0.3),
        ("0", 0),
        ("600", 600),
        ("-1", math.inf),
        ("-1m", math.inf),
        (30, 30),
        (-1, math.inf),
        (0, 0),
    ],
)
def test_how_long_something_is_kept(text, seconds):
    assert seconds_of(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "five", "5 m", "5d", "m", "1e3", "9" * 101, float("nan"), "--1"])
def test_what_is_no_time(text):
    with pytest.raises(UserError, match="Write how long"):
        seconds_of(text)


@pytest.fixture
def engines(monkeypatch) -> dict[str, EngineSettings]:
    """What the engines were opened or looked at with; they open nothing."""
    seen: dict[str, EngineSettings] = {}

    def find(name: str):
        def open_engine(settings: EngineSettings) -> FakeEngine:
            seen[f"{name} opened"] = settings
            return FakeEngine(model=settings.model or name)

        return open_engine

    def look(name: str, settings: EngineSettings) -> Offer:
        seen[f"{name} looked"] = settings
        return Offer(name, (ModelCard(settings.model, 1, 2),), lambda: find(name)(settings), True)

    monkeypatch.setattr(models, "find_engine", find)
    monkeypatch.setattr(offers, "look", look)
    monkeypatch.setattr(choosing, "choose_engine", lambda name, _: choosing.Choice(name, "so"))
    return seen


def opened(*named: tuple[str, str], keep_alive: str | None = None, **common) -> SeveralEngines:
    engine = models.open_models(named, EngineSettings("", **common), keep_alive, lambda line: None)
    assert isinstance(engine, SeveralEngines)
    return engine


def test_one_model_is_loaded_at_once_and_kept(engines):
    engine = opened(("local", "a"), device="cpu", quant="int4")
    assert list(engines) == ["local opened"], "it is not looked at twice"
    assert engines["local opened"] == EngineSettings("a", device="cpu", quant="int4")
    assert engine.expires() == {"a": math.inf}
    engine.keep("a", 0)
    assert engine.expires() == {"a": math.inf}, "nobody who asks can unload it"


def test_one_model_is_loaded_at_once_and_unloaded_if_that_is_wished(engines):
    engine = opened(("local", "a"), keep_alive="1h")
    assert sorted(engines) == ["local looked", "local opened"]
    assert engine.expires()["a"] == pytest.approx(3600, abs=60)


def test_several_are_loaded_when_asked_for_except_those_that_stay(engines):
    engine = opened(
        ("local", "a"),
        ("petals", "b"),
        ("onnx", "c"),
        ("openai", ""),
        peers=("p",),
        device="cpu",
        base_url="http://x/v1",
    )
    assert list(engines) == ["petals opened", "openai opened", "local looked", "onnx looked"], "those that stay first"
    assert engines["local looked"] == EngineSettings("a", device="cpu")
    assert engines["petals opened"] == EngineSettings("b", peers=("p",))
    assert engines["onnx looked"] == EngineSettings("c")
    assert engines["openai opened"] == EngineSettings("", base_url="http://x/v1")
    assert [card.id for card in engine.models()] == ["a", "b", "c", "openai"], "in the order in which they were given"
    assert [each.state for each in engine.status().engines] == ["unloaded", "loaded", "unloaded", "loaded"]
    assert {each.keep_s for each in engine._members} == {KEEP_ALIVE_S}


def test_options_that_are_of_no_use_to_anybody(engines):
    for name, common in {"--peers": {"peers": ("p",)}, "--quant": {"quant": "nf4"}}.items():
        with pytest.raises(UserError, match=f"{name} is of no use to any of the engines command, onnx"):
            opened(("onnx", "a"), ("command", "b"), **common)
    with pytest.raises(UserError, match="--keep-alive is for models of the engines 'local' and 'onnx'"):
        opened(("petals", "a"), keep_alive="5m", peers=("p",))


def test_two_models_of_one_name(engines):
    with pytest.raises(UserError, match="Two of the models have the name a,"):
        opened(("local", "a"), ("onnx", "a"))


def test_a_token_reaches_all(engines):
    opened(("local", "a"), ("petals", "b"), peers=("p",), token="secret")
    assert {replace(each, token=None).token for each in engines.values()} == {None}
    assert {each.token for each in engines.values()} == {"secret"}


@pytest.mark.parametrize(
    "options, said",
    [
        (("--model", "local:a", "--model", "onnx:b", "--any-model"), "--any-model is for one model"),
        (("--model", "local:a", "--base-url", "http://x/v1"), "are for --engine openai"),
        (("--workers", "grpc://pc:1", "--keep-alive", "5m"), "--keep-alive are theirs"),
        (("--model", "petals:a", "--peers", "p", "--keep-alive", "soon"), "Write how long"),
    ],
)
def test_what_must_not_be_said_together(options, said, caplog):
    result = CliRunner().invoke(app, ["api", "--port", "0", *options])
    assert result.exit_code == 1
    assert said in " ".join(f"{result.output} {result.exception}".split())
