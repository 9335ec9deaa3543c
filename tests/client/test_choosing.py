"""Top-p among the likeliest tokens is what transformers' own one keeps."""

from __future__ import annotations

import pytest
import torch
from span.families import VOCABULARY, random_model
from transformers import TopPLogitsWarper

from petals_win.client import choosing
from petals_win.client.choosing import Sampler, processors_of_generate


@pytest.mark.parametrize("likeliest", [VOCABULARY + 1, 40, 1])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.99])
def test_top_p(monkeypatch, likeliest, top_p):
    monkeypatch.setattr(choosing, "_LIKELIEST", likeliest)
    mine, theirs = choosing._TopP(TopPLogitsWarper(top_p)), TopPLogitsWarper(top_p)
    ids, generator = torch.tensor([[1]]), torch.Generator().manual_seed(1)
    for spread in (0.01, 1, 10, 100):
        scores = spread * torch.randn(1, VOCABULARY, generator=generator)
        assert torch.equal(mine(ids, scores), theirs(ids, scores))
        scores[:, 7:] = float("-inf")  # as top-k leaves them
        assert torch.equal(mine(ids, scores), theirs(ids, scores))


def test_it_takes_the_place_of_the_other_one():
    model, ids = random_model("llama"), torch.tensor([[5, 6, 7]])
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 100, "top_p": 0.8, "max_new_tokens": 1}
    processors = processors_of_generate(model, ids, **settings)
    assert [type(each).__name__ for each in processors][-2:] == ["TopKLogitsWarper", "_TopP"]
    torch.manual_seed(3)
    theirs = model.generate(ids, **settings)[0, -1]
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
    assert Sampler(processors, torch.Generator().manual_seed(3))(ids, logits) == theirs
