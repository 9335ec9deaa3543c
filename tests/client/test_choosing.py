"""Top-p among the likeliest tokens is what transformers' own one keeps; log probabilities are those of its raw logits."""

from __future__ import annotations

import pytest
import torch
from span.families import VOCABULARY, random_model
from transformers import MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor, TopPLogitsWarper

from petals_win.client import choosing
from petals_win.client.choosing import Sampler, WeighedToken, drawn, processors_of_generate


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


@pytest.mark.parametrize("length", [1, 4, 5, 6, 9])
def test_no_end_before_a_least_length(length):
    ends, ids = torch.tensor([3, VOCABULARY - 1, VOCABULARY + 7]), torch.ones(1, length, dtype=torch.int64)
    scores = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(length))
    for theirs in (MinLengthLogitsProcessor(6, ends), MinNewTokensLengthLogitsProcessor(2, 4, ends)):
        mine = choosing._faster(theirs)
        assert type(mine) is not type(theirs)
        assert torch.equal(mine(ids, scores), theirs(ids, scores))


def test_it_takes_the_place_of_the_other_one(monkeypatch):
    model, ids = random_model("llama"), torch.tensor([[5, 6, 7]])
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 100, "top_p": 0.8, "max_new_tokens": 1}
    processors = processors_of_generate(model, ids, **settings)
    assert [type(each).__name__ for each in processors][-2:] == ["TopKLogitsWarper", "_TopP"]
    torch.manual_seed(3)
    theirs = model.generate(ids, **settings)[0, -1]
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
    monkeypatch.setattr(choosing, "drawn", as_transformers_draws)
    assert Sampler(processors, torch.Generator().manual_seed(3))(ids, logits) == theirs


def as_transformers_draws(probabilities: torch.Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(probabilities, 1, generator=generator))


def test_tokens_are_drawn_as_often_as_they_are_likely():
    generator = torch.Generator().manual_seed(5)
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.25, 0.05, 0.0])
    count = 20_000
    found = torch.bincount(torch.tensor([drawn(probabilities, generator) for _ in range(count)]), minlength=7)
    assert not found[probabilities == 0].any()
    deviations = (found - count * probabilities) / (count * probabilities * (1 - probabilities)).clamp(min=1).sqrt()
    assert deviations.abs().max() < 4
    for only in (0, 3, 6):
        assert drawn(torch.eye(7)[only], generator) == only


@pytest.mark.parametrize("told", [0, 4, VOCABULARY + 5])
def test_log_probabilities_are_those_before_anything_is_done_to_logits(told):
    model, ids = random_model("llama"), torch.tensor([[5, 6, 7]])
    settings = {"do_sample": True, "temperature": 0.2, "top_k": 3, "repetition_penalty": 1.5, "max_new_tokens": 1}
    made = model.generate(ids, return_dict_in_generate=True, output_logits=True, **settings)
    expected = made.logits[0][0].double().log_softmax(dim=-1)
    sampler = Sampler(processors_of_generate(model, ids, **settings), torch.Generator().manual_seed(3), logprobs=told)
    token = sampler(ids, made.logits[0])
    weighed = sampler.weighed(token, made.logits[0])
    assert isinstance(weighed, WeighedToken) and weighed == token
    assert weighed.logprob == pytest.approx(float(expected[token]), abs=1e-5)
    assert [each for each, _ in weighed.likeliest] == expected.argsort(descending=True)[:told].tolist()
    assert [logprob for _, logprob in weighed.likeliest] == pytest.approx(
        expected.sort(descending=True).values[:told].tolist(), abs=1e-5
    )


def test_a_token_is_a_plain_one_if_nobody_asks():
    sampler = Sampler(processors_of_generate(random_model("llama"), torch.tensor([[5]]), max_new_tokens=1))
    assert type(sampler.weighed(7, torch.zeros(1, VOCABULARY))) is int
