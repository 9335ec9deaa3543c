"""How the next token is chosen: what a request asks for, in the words of transformers' generate().

Knows transformers' settings and logits processors, and what the API's numbers mean. Does not know text, sessions or swarms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from petals_win.client.choosing import Guide, Sampler, processors_of_generate
from petals_win.engines.base import GenerationRequest
from petals_win.errors import UserError

# Below it the most likely token is all but certain, and dividing by less would make logits infinite at some point.
_GREEDY_BELOW = 1e-5


def sampler(
    request: GenerationRequest,
    model: PreTrainedModel,
    prompt: Sequence[int],
    max_tokens: int,
    guide: Guide | None = None,
) -> Sampler:
    """What chooses the tokens of the answer to `prompt`, at most `max_tokens`, of those that `guide` leaves.

    What the request leaves open is as the generation_config of `model` says, of which nothing is computed here.
    """
    default: GenerationConfig = model.generation_config  # pyright: ignore[reportAssignmentType]
    # Of what this file does not decide: several texts at once, and a second pass of the model for each token.
    arguments: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "guidance_scale": None}
    arguments |= {"max_new_tokens": max_tokens, **_choice(request, default)}
    if request.repetition_penalty is not None:
        arguments["repetition_penalty"] = float(request.repetition_penalty)
    if request.logit_bias:
        arguments["sequence_bias"] = {(token,): float(bias) for token, bias in request.logit_bias.items()}
    # As long as a turn must not end, its end tokens are no choice; but a constrained answer ends where it is complete.
    if guide is None and (shortest := max_tokens if request.ignore_eos else min(request.min_tokens, max_tokens)):
        arguments["min_new_tokens"] = shortest
    if request.frequency_penalty or request.presence_penalty:
        penalties = _Penalties(request.frequency_penalty, request.presence_penalty, len(prompt))
        arguments["logits_processor"] = LogitsProcessorList([penalties])
    processors = processors_of_generate(model, torch.tensor([prompt]), **arguments)
    generator = _generator(request.seed) if arguments["do_sample"] else None
    return Sampler(processors, generator, logprobs=request.logprobs, guide=guide)


def check_settings(model: PreTrainedModel) -> None:
    """Raises UserError if no token can be chosen as the generation_config of `model` says, which would fail in every answer."""
    config: Any = model.config
    try:
        choose = sampler(GenerationRequest(model="", prompt=""), model, [0], 2)
        choose(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, config.get_text_config(decoder=True).vocab_size))
    except Exception as e:  # transformers checks its settings in many places, and not all of them
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(
            f"The model's generation_config.json cannot be followed: {reason} Correct what it says, or delete that file."
        ) from e


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def check_token_ids(bias: Mapping[int, float], vocabulary: int) -> None:
    """Raises UserError for a token that a model with the tokens 0 to `vocabulary` - 1 does not have."""
    for token in bias:
        if not 0 <= token < vocabulary:
            raise UserError(f"logit_bias: the model has the tokens 0 to {vocabulary - 1}, but not {token}.")


def _choice(request: GenerationRequest, default: GenerationConfig) -> dict[str, Any]:
    """Whether a token is drawn, and from which; without drawing the most likely one is taken."""

    def chosen(name: str) -> Any:
        value = getattr(request, name)
        return getattr(default, name) if value is None and default.do_sample else value

    temperature, top_k, top_p, min_p = (chosen(name) for name in ("temperature", "top_k", "top_p", "min_p"))
    # A value that limits nothing does not make a model draw that is greedy by its makers' will.
    drawn = default.do_sample or temperature is not None or top_k or min_p or (top_p is not None and top_p < 1)
    # top_p 0 leaves the most likely token alone, as OpenAI's servers and llama.cpp understand it.
    if not drawn or (temperature is not None and temperature < _GREEDY_BELOW) or top_p == 0:
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "min_p": None}
    return {
        "do_sample": True,
        "temperature": None if temperature is None else float(temperature),
        "top_k": top_k or None,
        "top_p": None if top_p is None else float(top_p),
        "min_p": min_p or None,
    }


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
