"""The engine "onnx": the tokens of "local", little memory for many answers, and folders that are not what they say."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from contract import soon, started, whole
from tiny_chat import tiny_chat_model

from petals_win.engines import onnx_steps
from petals_win.engines.base import GenerationRequest
from petals_win.engines.choosing import choose_engine
from petals_win.engines.onnx import OnnxEngine
from petals_win.engines.onnx_steps import BatchedSteps, OneByOneSteps
from petals_win.engines.registry import EngineSettings, find_engine
from petals_win.engines.text import TextEngine
from petals_win.errors import UserError
from petals_win.models import onnx_devices
from petals_win.models.onnx_conversion import convert_to_onnx

CONTEXT = 2048


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("chat") / "tiny", context=CONTEXT, ends=0)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    return convert_to_onnx(str(model), tmp_path_factory.mktemp("onnx") / "made", precision="fp32", device="cpu")


@pytest.fixture
def damaged(folder, tmp_path) -> Callable[..., str]:
    """A copy of the folder with one file changed, or without it."""

    def make(name: str, change: Callable[[dict], object] | bytes | None) -> str:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        if change is None:
            (copy / name).unlink()
        elif isinstance(change, bytes):
            (copy / name).write_bytes(change)
        else:
            described = json.loads((copy / name).read_text(encoding="utf-8"))
            change(described)
            (copy / name).write_text(json.dumps(described), encoding="utf-8")
        return str(copy)

    return make


def use(folder: Path, action: Callable[[TextEngine, OnnxEngine], Awaitable], *, room: int | None = None):
    """Run a coroutine function on an engine that has memory for `room` tokens; afterwards none of it is taken."""

    async def within():
        engine = await asyncio.to_thread(find_engine("onnx"), EngineSettings(str(folder)))
        assert isinstance(engine, TextEngine) and isinstance(engine.tokens, OnnxEngine)
        steps, held = engine.tokens.steps, lambda: engine.tokens.held  # pyright: ignore
        if room is not None:
            steps.budget = room * steps.token_bytes
        async with started(engine):
            result = await asyncio.wait_for(action(engine, engine.tokens), 100)
            assert await soon(lambda: held() == 0), "memory did not come back"
            return result

    return asyncio.run(within())


def chat(text: str = "Hello", **settings) -> GenerationRequest:
    messages = ({"role": "user", "content": text},)
    return GenerationRequest(**{"model": "tiny", "messages": messages, "temperature": 0, **settings})


def test_the_tokens_are_those_of_local(model, folder):
    """Prompts that are read in one piece and in several, at once and drawn."""
    asked = [chat("x" * length, max_tokens=30) for length in (1, 40, 300)]
    asked += [chat("y", max_tokens=30, temperature=0.8, seed=3, top_p=0.9, repetition_penalty=1.1, logprobs=2)]

    async def ask(engine: TextEngine, _tokens: object):
        return await asyncio.gather(*(whole(engine, each) for each in asked))

    async def by_local():
        engine = await asyncio.to_thread(find_engine("local"), EngineSettings(str(model)))
        async with started(engine):
            return await ask(engine, None)

    assert use(folder, ask) == asyncio.run(by_local())


@pytest.mark.parametrize("steps", [BatchedSteps, OneByOneSteps])
def test_answers_that_grow_beyond_what_there_is_are_all_given(folder, monkeypatch, steps):
    """All are let in, and come to want more than is left. Who starts over goes on with the same text."""
    if steps is OneByOneSteps:
        monkeypatch.setattr(BatchedSteps, "of", lambda *_: None)
    monkeypatch.setattr(onnx_steps, "_SMALLEST", 32)
    opened: list[int] = []

    async def ask(engine: TextEngine, tokens: OnnxEngine):
        assert isinstance(tokens.steps, steps)
        open_row = tokens.steps.open
        monkeypatch.setattr(tokens.steps, "open", lambda length: opened.append(length) or open_row(length))
        drawn = dict(temperature=1.0, min_tokens=100, repetition_penalty=1.1)
        asked = [chat(f"Number {n}", max_tokens=90, **(drawn | {"seed": n} if n % 2 else {})) for n in range(4)]
        at_once = await asyncio.gather(*(whole(engine, each) for each in asked))
        assert sum(length > 60 for length in opened) > 0, "nobody had to start over, so the test shows nothing"
        return at_once, [await whole(engine, each) for each in asked]

    at_once, alone = use(folder, ask, room=256)
    assert at_once == alone
    assert [answer.usage.completion_tokens for answer in at_once] == [90] * 4


def test_little_is_held_for_a_short_answer(folder):
    """However long it may become: the context is not taken at once."""

    async def ask(engine: TextEngine, tokens: OnnxEngine):
        answer = engine.generate(chat("x"))
        await anext(answer)
        held, usage = tokens.steps.held, engine.status().cache_usage
        await answer.aclose()
        return held / tokens.steps.token_bytes, usage, engine.status().cache_usage

    tokens, during, after = use(folder, ask)
    assert tokens == 256 and during is not None and 0 < during <= 1 and after == 0


def test_int4_of_another_family(tmp_path):
    """Its name is the model's, not the folder's."""
    model = tiny_chat_model(tmp_path / "tiny", "qwen3", context=256, ends=0)
    made = convert_to_onnx(str(model), tmp_path / "made", precision="int4", device="cpu")

    async def ask(engine: TextEngine, tokens: OnnxEngine):
        assert isinstance(tokens.steps, BatchedSteps)
        asked = [chat(f"{n}", max_tokens=20) for n in range(3)]
        alone = [await whole(engine, each) for each in asked]
        return engine.models()[0].id, alone, await asyncio.gather(*(whole(engine, each) for each in asked))

    name, alone, at_once = use(made, ask)
    assert name == "tiny" and at_once == alone


def test_settings_that_it_can_do_nothing_with(model, folder):
    with pytest.raises(UserError, match=r"no model for ONNX Runtime.*petals-win convert .*tiny --to onnx"):
        find_engine("onnx")(EngineSettings(str(model)))
    with pytest.raises(UserError, match="--peers are of no use"):
        find_engine("onnx")(EngineSettings(str(folder), ("/ip4/127.0.0.1/tcp/1/p2p/x",)))
    for wish in ({"device": "cpu"}, {"dtype": "float32"}, {"quant": "none"}):
        with pytest.raises(UserError, match="Leave out --device, --dtype and --quant"):
            find_engine("onnx")(EngineSettings(str(folder), **wish))


def test_such_a_folder_chooses_it(folder):
    assert choose_engine("auto", EngineSettings(str(folder))).name == "onnx"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("genai_config.json", b"{", "genai_config.json is damaged"),
        ("genai_config.json", lambda all: all["model"].pop("decoder"), "damaged: decoder is missing"),
        ("genai_config.json", lambda all: all["model"].update(vocab_size=-1), "damaged: vocab_size is -1"),
        ("genai_config.json", lambda all: all["model"]["decoder"].update(filename="../x"), "damaged: filename"),
        ("genai_config.json", lambda all: all["model"]["decoder"]["session_options"].update(custom_ops_library="x.so"), "program code"),
        ("genai_config.json", lambda all: all["model"]["decoder"]["session_options"].update(provider_options=[{"dml": {}}]), "made for dml"),
        ("genai_config.json", lambda all: all["model"]["decoder"]["session_options"].update(provider_options=[{"x": {}}]), "made for x"),
        ("model.onnx", None, "lacks the file model.onnx"),
        ("model.onnx", b"no graph", "cannot load the model"),
        ("model.onnx.data", None, "cannot load the model"),
        ("model.onnx.data", b"", "cannot load the model"),
        ("tokenizer.json", None, "tokenizer"),
        ("generation_config.json", b"[", "generation_config.json is damaged"),
    ],
)  # fmt: skip
def test_a_folder_that_is_damaged(damaged, name, change, said):
    with pytest.raises(UserError, match=said):
        find_engine("onnx")(EngineSettings(damaged(name, change)))


def test_a_graph_that_computes_batches_otherwise_is_not_computed_so(folder, monkeypatch):
    monkeypatch.setattr(onnx_steps, "_SAME", -1.0)

    async def ask(engine: TextEngine, tokens: OnnxEngine):
        assert isinstance(tokens.steps, OneByOneSteps)
        return (await whole(engine, chat(max_tokens=3))).usage.completion_tokens

    assert use(folder, ask) == 3


def test_without_the_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install petals-win\[onnx\]"):
        find_engine("onnx")(EngineSettings(str(folder)))
    assert onnx_devices.available_devices() == []
