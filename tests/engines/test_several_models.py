"""Real models, small and random, that are loaded, unloaded and loaded again: their memory is given back."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from typing import cast

import pytest
from contract import soon, started, whole
from tiny_chat import tiny_chat_model

from petals_win.engines import member, several
from petals_win.engines.base import GenerationRequest
from petals_win.engines.offers import look
from petals_win.engines.registry import EngineSettings
from petals_win.engines.several import SeveralEngines
from petals_win.engines.text import TextEngine
from petals_win.errors import UserError
from petals_win.host.memory import give_back_memory, own_bytes
from petals_win.models.onnx_conversion import convert_to_onnx

MIB = 2**20


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    for module in (member, several):
        monkeypatch.setattr(module, "LINGER_S", 0.05)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model for each engine, of another name each."""
    folder = tmp_path_factory.mktemp("models")
    local = tiny_chat_model(folder / "large", context=256, ends=0, hidden_size=512, intermediate_size=8192)
    plain = tiny_chat_model(folder / "small", context=256, ends=0)
    return {"local": local, "onnx": convert_to_onnx(str(plain), folder / "small-onnx", precision="fp32", device="cpu")}


def asked(name: str) -> GenerationRequest:
    return GenerationRequest(
        model=name, messages=({"role": "user", "content": "count"},), max_tokens=20, temperature=0
    )


@pytest.mark.parametrize("engine", ["local", "onnx"])
def test_what_is_told_before_it_is_loaded_is_so(folders, engine):
    offer = look(engine, EngineSettings(str(folders[engine])))
    [card] = offer.cards
    opened = offer.open()
    try:
        [loaded] = opened.models()
        assert (loaded.id, loaded.context_length) == (card.id, card.context_length)
        promised = offer.promised(opened)
        assert offer.unloads and offer.takes.keys() == promised.keys() == {"cpu"}
        weights = sum(file.stat().st_size for file in folders[engine].glob("*model*"))
        assert weights < offer.takes["cpu"] < weights + 64 * MIB
        assert promised["cpu"] > 0
    finally:
        asyncio.run(opened.close())


def test_what_cannot_be_loaded_is_told_before(folders):
    with pytest.raises(UserError, match="no model for ONNX Runtime"):
        look("onnx", EngineSettings(str(folders["local"])))
    with pytest.raises(UserError, match="no file or folder"):
        look("local", EngineSettings("./nothing"))


def test_both_answer_the_same_after_they_were_unloaded(folders):
    """Also while the other one is asked, and nothing is left of what was unloaded."""
    offers = [look(name, EngineSettings(str(folder))) for name, folder in folders.items()]
    names = [offer.cards[0].id for offer in offers]
    engine = SeveralEngines(offers, 600)

    async def go() -> None:
        async with started(engine):
            first = await asyncio.gather(*(whole(engine, asked(name)) for name in names))
            assert first[0].text != first[1].text
            lives = [weakref.ref(each.life.engine) for each in engine._members if each.life is not None]
            tokens = [weakref.ref(cast(TextEngine, life()).tokens) for life in lives]
            assert len(lives) == len(tokens) == 2
            for name in names:
                engine.keep(name, 0)
            assert await soon(lambda: not engine.expires(), 20)
            assert await soon(lambda: not engine._letting_go, 20)
            gc.collect()
            assert [ref() for ref in (*lives, *tokens)] == [None] * 4, "somebody holds an engine that was closed"
            again = await asyncio.gather(*(whole(engine, asked(name)) for name in names))
            assert again == first

    asyncio.run(go())


def test_memory_is_given_back(folders):
    """As often as a model is loaded: the process is as large as before, by less than half of the model."""
    offer = look("local", EngineSettings(str(folders["local"])))
    weights = sum(file.stat().st_size for file in folders["local"].glob("*.safetensors"))
    assert weights > 100 * MIB
    engine = SeveralEngines([offer], 0)
    sizes: list[int] = []

    async def go() -> None:
        async with started(engine):
            for _ in range(4):
                await whole(engine, asked("large"))
                in_memory = own_bytes()
                assert await soon(lambda: not engine.expires(), 20)
                assert await soon(lambda: not engine._letting_go, 20)
                give_back_memory()
                sizes.append(own_bytes())
                # In a process that has freed much before, not all of it was new memory.
                assert in_memory - sizes[-1] > 0.6 * weights, "what was unloaded is still there"

    asyncio.run(go())
    assert sizes[-1] - sizes[0] < weights / 2, [size // MIB for size in sizes]
