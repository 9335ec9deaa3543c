"""generate() of a model with remote blocks: what it sends, sizes and returns, with a made-up generate() of transformers."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from petals_win.client.generation import RemoteGenerationMixin


class Transformers:
    """Answers by one 7 after the inputs, or after nothing."""

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        self.asked = {"inputs": inputs, **kwargs}
        said: Any = torch.zeros(1, 0, dtype=torch.int64) if inputs is None else inputs
        sequences: Any = torch.cat([said, torch.full((len(said), 1), 7)], dim=1)
        return GenerateDecoderOnlyOutput(sequences=sequences) if kwargs.get("return_dict_in_generate") else sequences


class Blocks:
    active_session: Any = None

    @contextlib.contextmanager
    def use_session(self, session: Any):
        yield session

    @contextlib.contextmanager
    def inference_session(self, *, max_length: int):
        yield SimpleNamespace(output_ids=None, position=0, max_length=max_length)


class Model(RemoteGenerationMixin, Transformers):
    def __init__(self, prefix: int = 0) -> None:
        self.blocks = Blocks()
        self.config = SimpleNamespace(pre_seq_len=prefix)
        self.opened: list[int] = []

    def inference_session(self, *, max_length: int):
        self.opened.append(max_length)
        return super().inference_session(max_length=max_length)


IDS = torch.tensor([[3, 4, 5]])


def test_a_session_is_as_long_as_what_it_will_hold():
    model = Model(prefix=2)
    assert model.generate(IDS, max_new_tokens=4).tolist() == [[3, 4, 5, 7]]
    model.generate(input_ids=IDS, max_length=9)
    model.generate(max_new_tokens=4, max_length=None)
    assert model.opened == [2 + 3 + 4, 2 + 9, 2 + 4]
    bad: list[dict[str, Any]] = [{}, {"max_length": 9, "max_new_tokens": 4}]
    for settings in bad:
        with pytest.raises(ValueError, match="either max_length or max_new_tokens"):
            model.generate(IDS, **settings)


def test_a_session_goes_on():
    session: Any = SimpleNamespace(output_ids=None, position=5)
    model = Model(prefix=2)
    assert model.generate(IDS, session=session).tolist() == [[3, 4, 5, 7]]
    assert model.asked["cache"].get_seq_length() == 3, "tokens of the prefix have no ids"
    mask = torch.tensor([[1, 1]])
    assert model.generate(torch.tensor([[8, 9]]), session=session, attention_mask=mask).tolist() == [[8, 9, 7]]
    assert model.asked["inputs"].tolist() == [[3, 4, 5, 7, 8, 9]]
    assert model.asked["attention_mask"].tolist() == [[1] * 6]
    more = model.generate(session=session, return_dict_in_generate=True, do_sample=0)
    assert more.sequences.tolist() == [[7]] and model.asked["do_sample"] is False
    assert session.output_ids.tolist() == [[3, 4, 5, 7, 8, 9, 7, 7]]
    assert model.opened == []


def test_one_session_is_not_opened_in_another():
    model = Model()
    model.blocks.active_session = SimpleNamespace(output_ids=IDS, position=3)
    assert model.generate().tolist() == [[7]]
    assert model.opened == []
