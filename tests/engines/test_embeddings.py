"""Texts as vectors, against transformers: the mean of the last hidden states, after the model's final norm."""

from __future__ import annotations

import asyncio

import pytest
import torch
from contract import started
from tiny_chat import tiny_chat_model
from transformers import AutoModelForCausalLM

from petals_win.client import decode
from petals_win.engines.registry import EngineSettings, find_engine


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_the_vectors_are_those_of_transformers(tmp_path, monkeypatch, family):
    monkeypatch.setattr(decode, "_EMBEDDED_AT_ONCE", 7)  # so that the longest text goes in several pieces
    folder = tiny_chat_model(tmp_path / "tiny", family, context=128, ends=0)
    texts = [[1, *range(20, 20 + length)] for length in (1, 6, 40)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    right = []
    with torch.inference_mode():
        for tokens in texts:
            states = model.get_decoder()(input_ids=torch.tensor([tokens])).last_hidden_state
            right.append(torch.nn.functional.normalize(states[0].mean(dim=0), dim=0).tolist())

    async def embedded() -> list[list[float]]:
        engine = await asyncio.to_thread(find_engine("local"), EngineSettings(str(folder), dtype="float32"))
        async with started(engine):
            return await asyncio.gather(*(engine.embed("tiny", tokens) for tokens in texts))

    for one, other in zip(asyncio.run(embedded()), right, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
