"""How tokens are chosen from the logits of a tiny random model, by what requests ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from petals_win.client import choosing
from petals_win.engines.base import GenerationRequest
from petals_win.engines.sampling import check_token_ids, sampler
from petals_win.errors import UserError

PROMPT = [3, 5, 7]
END = 2


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=END,
        pad_token_id=0,
    )
    made = LlamaForCausalLM(config).eval()
    made.lm_head.weight.data *= 40  # so that one token is far more likely than another, as in a model that has learnt
    return made


def answer(model: LlamaForCausalLM, length: int = 12, **asked: Any) -> list[int]:
    request = GenerationRequest(model="M", prompt=tuple(PROMPT), **asked)
    choose, tokens = sampler(request, model, PROMPT, length), list(PROMPT)
    while len(tokens) < len(PROMPT) + length and tokens[-1] != END:
        tokens.append(choose(torch.tensor([tokens]), logits(model, tokens)[None]))
    return tokens[len(PROMPT) :]


def logits(model: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        found = model(torch.tensor([tokens])).logits[0, -1].float()
    return found.clone()


@pytest.fixture(scope="module")
def greedy(model: LlamaForCausalLM) -> list[int]:
    return answer(model)


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0},
        {"temperature": 1e-38},
        {"temperature": 1e-45},
        {"temperature": 1e-6},
        {"temperature": 1, "top_p": 0},
        {"temperature": 2, "top_k": 1},
        {"temperature": 2, "min_p": 1},
        {"temperature": 1, "top_p": 1e-45},
        # What limits nothing does not make a greedy model draw.
        {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1},
    ],
)
def test_greedy(model, greedy, asked):
    assert answer(model, seed=1, **asked) == greedy


def test_a_temperature_just_above_greedy_is_finite(model, greedy):
    assert answer(model, temperature=1.1e-5, seed=1) == greedy
    assert len(answer(model, temperature=1.1e-5, repetition_penalty=0.01, logit_bias={9: 100}, seed=1)) > 0


def test_penalties_count_what_was_generated_and_not_the_prompt(model):
    """Step by step as the definition says, computed here without a logits processor."""
    frequency, presence = 1.3, 0.7
    tokens = list(PROMPT)
    for _ in range(12):
        scores = logits(model, tokens)
        for token in set(tokens[len(PROMPT) :]):
            scores[token] -= frequency * tokens[len(PROMPT) :].count(token) + presence
        tokens.append(int(scores.argmax()))
        if tokens[-1] == END:
            break
    assert answer(model, frequency_penalty=frequency, presence_penalty=presence) == tokens[len(PROMPT) :]


def test_a_penalty_forbids_repetition(model):
    repeated = answer(model, logit_bias={9: 100, END: -100})
    assert repeated == [9] * 12
    assert answer(model, logit_bias={9: 100, END: -100}, frequency_penalty=2)[:5] == [9] * 5, "of 100, 2 each time"
    varied = answer(model, logit_bias={9: 5, END: -100}, presence_penalty=2, frequency_penalty=2)
    assert len(set(varied)) > 3


def test_logit_bias(model, greedy):
    assert greedy[0] not in answer(model, logit_bias={greedy[0]: -100}, length=1)
    assert answer(model, logit_bias={9: 100}, length=2) == [9, 9]


def test_logit_bias_beyond_the_vocabulary():
    check_token_ids({0: 1.0, 63: -1.0}, 64)
    with pytest.raises(UserError, match="logit_bias: the model has the tokens 0 to 63, but not 64"):
        check_token_ids({64: 1.0}, 64)


def test_a_turn_that_may_not_end(model):
    at_once = {"logit_bias": {END: 100.0}}
    assert answer(model, **at_once) == [END]
    longer = answer(model, min_tokens=5, **at_once)
    assert len(longer) == 6 and longer[-1] == END
    assert len(answer(model, min_tokens=500, **at_once)) == 12, "no longer than there is room"
    endless = answer(model, ignore_eos=True, **at_once)
    assert len(endless) == 12 and END not in endless


def test_what_is_left_out_is_the_models_own(model, monkeypatch):
    def chosen(default: GenerationConfig, **asked: Any) -> list[str]:
        monkeypatch.setattr(model, "generation_config", default)
        choose = sampler(GenerationRequest(model="M", prompt="x", **asked), model, [3], 1)
        drawn = [] if choose._generator is None else ["drawn"]
        return [type(processor).__name__ for processor in choose._processors] + drawn

    own = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.9, min_p=0.1)
    limits = ["TemperatureLogitsWarper", "TopKLogitsWarper", "_TopP", "MinPLogitsWarper"]
    assert chosen(own) == [*limits, "drawn"]
    assert chosen(own, top_k=0, top_p=1, min_p=0, temperature=1) == ["drawn"]
    assert chosen(own, temperature=0) == []
    assert chosen(GenerationConfig(do_sample=False)) == []
    assert chosen(GenerationConfig(do_sample=False), min_p=0.1) == ["MinPLogitsWarper", "drawn"]
    assert chosen(GenerationConfig(do_sample=True, num_beams=4, guidance_scale=3.0), top_k=2) == [
        "TopKLogitsWarper",
        "drawn",
    ]


def test_a_seed_draws_what_generate_draws(model, monkeypatch):
    """From the same logits with the same settings, by transformers' own sampling and torch's generator of all.

    But for the last step: how a random number becomes a token, where generate() takes many of them.
    """
    assert answer(model, temperature=1.7, seed=11) == answer(model, temperature=1.7, seed=11)
    monkeypatch.setattr(
        choosing, "drawn", lambda chances, chance: int(torch.multinomial(chances, 1, generator=chance))
    )
    settings = {"temperature": 1.7, "top_k": 30, "top_p": 0.95}
    torch.manual_seed(11)
    made = model.generate(torch.tensor([PROMPT]), do_sample=True, max_new_tokens=12, **settings)
    assert answer(model, seed=11, **settings) == made[0, len(PROMPT) :].tolist()
    assert answer(model, seed=12, **settings) != answer(model, seed=11, **settings)


def test_the_models_own_penalty_can_be_turned_off(model):
    model.generation_config.repetition_penalty = 5.0
    try:
        penalized = answer(model)
        assert answer(model, repetition_penalty=1) != penalized
    finally:
        model.generation_config.repetition_penalty = 1.0
