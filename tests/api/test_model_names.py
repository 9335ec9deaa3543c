"""Names under which the model answers beside its own: aliases, or any."""

from __future__ import annotations

import httpx
import openai
import pytest

from api.fake_engine import MODEL
from api.serving import Served, serving
from petals_win.api.settings import Settings
from petals_win.engines.base import ModelCard, ModelNotFound, find_model
from petals_win.errors import UserError


def answered_by(served: Served, name: str) -> str:
    return served.client().chat.completions.create(model=name, messages=[{"role": "user", "content": "Hi"}]).model


def test_aliases():
    with serving(aliases=("gpt-4o", "somebody/else")) as served:
        for name in ("gpt-4o", "GPT-4o", "somebody/else", MODEL, "fake-model"):
            assert answered_by(served, name) == MODEL
        with pytest.raises(openai.NotFoundError, match=f"Ask for one of: {MODEL}, gpt-4o, somebody/else"):
            answered_by(served, "gpt-4")
        listed = served.client().models.list().data
        assert [(model.id, model.root) for model in listed] == [
            (MODEL, MODEL),
            ("gpt-4o", MODEL),
            ("somebody/else", MODEL),
        ]
        assert served.client().models.retrieve("gpt-4o").id == "gpt-4o"
        assert served.client().models.retrieve("fake-model").id == MODEL


def test_any_name():
    with serving(any_model=True) as served:
        for name in ("gpt-4", "x/y", MODEL):
            assert answered_by(served, name) == MODEL
        assert [model.id for model in served.client().models.list().data] == [MODEL]
        assert served.client().models.retrieve("gpt-4").id == MODEL
        assert httpx.get(f"{served.url}/ready").status_code == 200, "all else is the engine's own"


def test_any_name_is_of_no_use_with_several_models():
    cards = [ModelCard("a", 1, 9), ModelCard("b", 1, 9, aliases=("c",))]
    assert find_model("C", cards).id == "b"
    with pytest.raises(ModelNotFound, match="a, b, c"):
        find_model("d", cards)


@pytest.mark.parametrize("alias", ["", "two words", "x\n", "x" * 201])
def test_aliases_that_are_no_names(alias):
    with pytest.raises(UserError, match="not the name of a model"):
        Settings(aliases=(alias,))
