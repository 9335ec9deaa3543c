"""How tokens are chosen: transformers' own generate() on a tiny random model, with what requests ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from petals_win.engines.base import GenerationRequest
from petals_win.engines.sampling import check_token_ids, generate_arguments
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
    arguments = generate_arguments(request, model.generation_config, prompt_tokens=len(PROMPT), max_tokens=length)
    return model.generate(torch.tensor([PROMPT]), **arguments)[0, len(PROMPT) :].tolist()


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


def test_what_is_left_out_is_the_models_own(model):
    def chosen(default: GenerationConfig, **asked: Any) -> list[str]:
        request = GenerationRequest(model="M", prompt="x", **asked)
        arguments = generate_arguments(request, default, prompt_tokens=1, max_tokens=1)
        return [type(processor).__name__ for processor in arguments.get("logits_processor", [])]

    own = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.9, min_p=0.1)
    limits = ["TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"]
    assert chosen(own) == [*limits, "_SeededChoice"]
    assert chosen(own, top_k=0, top_p=1, min_p=0, temperature=1) == ["_SeededChoice"]
    assert chosen(own, temperature=0) == []
    assert chosen(GenerationConfig(do_sample=False)) == []
    assert chosen(GenerationConfig(do_sample=False), min_p=0.1) == ["MinPLogitsWarper", "_SeededChoice"]


def test_the_models_own_penalty_can_be_turned_off(model):
    model.generation_config.repetition_penalty = 5.0
    try:
        penalized = answer(model)
        assert answer(model, repetition_penalty=1) != penalized
    finally:
        model.generation_config.repetition_penalty = 1.0
