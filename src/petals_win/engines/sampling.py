"""How the next token is chosen: what a request asks for, as arguments of transformers' generate().

Knows transformers' logits processors and the order in which they apply. Does not know text, sessions or swarms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from petals_win.client.choosing import Sampler, processors_of_generate
from petals_win.engines.base import GenerationRequest
from petals_win.errors import UserError

# Below it the most likely token is all but certain, and dividing by less would make logits infinite at some point.
_GREEDY_BELOW = 1e-5


def generate_arguments(
    request: GenerationRequest, default: GenerationConfig, *, prompt_tokens: int, max_tokens: int
) -> dict[str, Any]:
    """Arguments of generate() for what the request asks; what it leaves open is the model's own default.

    Sampling is done by our last logits processor, which leaves one token to choose, so generate() itself is greedy.
    `prompt_tokens` is the length of the prompt, `max_tokens` the longest answer.
    """
    arguments: dict[str, Any] = {
        "do_sample": False,
        "temperature": None,
        "top_k": None,
        "top_p": None,
        "min_p": None,
        "max_new_tokens": max_tokens,
    }
    if request.repetition_penalty is not None:
        arguments["repetition_penalty"] = float(request.repetition_penalty)
    if request.logit_bias:
        arguments["sequence_bias"] = {(token,): float(bias) for token, bias in request.logit_bias.items()}
    # As long as a turn must not end, its end tokens are no choice.
    if shortest := max_tokens if request.ignore_eos else min(request.min_tokens, max_tokens):
        arguments["min_new_tokens"] = shortest
    processors = LogitsProcessorList()
    if request.frequency_penalty or request.presence_penalty:
        processors.append(_Penalties(request.frequency_penalty, request.presence_penalty, prompt_tokens))
    processors.extend(_choice(request, default))
    if processors:
        arguments["logits_processor"] = processors
    return arguments


def sampler(request: GenerationRequest, model: PreTrainedModel, prompt: Sequence[int], max_tokens: int) -> Sampler:
    """What chooses the tokens of the answer to `prompt`, at most `max_tokens`, as generate() of `model` would."""
    arguments = generate_arguments(
        request, model.generation_config, prompt_tokens=len(prompt), max_tokens=max_tokens  # pyright: ignore
    )
    return Sampler(processors_of_generate(model, torch.tensor([prompt]), **arguments))


def check_token_ids(bias: Mapping[int, float], vocabulary: int) -> None:
    """Raises UserError for a token that a model with the tokens 0 to `vocabulary` - 1 does not have."""
    for token in bias:
        if not 0 <= token < vocabulary:
            raise UserError(f"logit_bias: the model has the tokens 0 to {vocabulary - 1}, but not {token}.")


def _choice(request: GenerationRequest, default: GenerationConfig) -> list[LogitsProcessor]:
    """What draws a token; nothing where the most likely one is taken."""

    def chosen(name: str) -> Any:
        value = getattr(request, name)
        return getattr(default, name) if value is None and default.do_sample else value

    temperature, top_k, top_p, min_p = (chosen(name) for name in ("temperature", "top_k", "top_p", "min_p"))
    # A value that limits nothing does not make a model draw that is greedy by its makers' will.
    drawn = default.do_sample or temperature is not None or top_k or min_p or (top_p is not None and top_p < 1)
    if not drawn:
        return []
    # top_p 0 leaves the most likely token alone, as OpenAI's servers and llama.cpp understand it.
    if (temperature is not None and temperature < _GREEDY_BELOW) or top_p == 0:
        return []
    warpers: list[LogitsProcessor] = []
    if temperature is not None and temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))
    if min_p:
        warpers.append(MinPLogitsWarper(float(min_p)))
    return [*warpers, _SeededChoice(request.seed)]


class _Penalties(LogitsProcessor):
    """OpenAI's two penalties, which transformers lacks, over the generated text alone and not the prompt.

    logit -= frequency * (times the token was generated) + presence * (1 if it was, else 0)
    """

    def __init__(self, frequency: float, presence: float, prompt_tokens: int):
        self._frequency, self._presence, self._prompt_tokens = frequency, presence, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`input_ids` [batch, prompt and answer so far], `scores` and the result [batch, vocabulary]."""
        generated = input_ids[:, self._prompt_tokens :]
        times = torch.zeros_like(scores).scatter_add(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self._frequency * times - self._presence * (times > 0)


class _SeededChoice(LogitsProcessor):
    """Draws the next token with a generator of its own and leaves only that one to choose.

    torch's global generator is shared by all requests of the process, so a seed there would not repeat an answer.
    """

    def __init__(self, seed: int | None):
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        choice = torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator)
        return torch.full_like(scores, float("-inf")).scatter(1, choice, 0.0)
