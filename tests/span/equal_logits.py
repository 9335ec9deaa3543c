"""A checkpoint served in spans, from token ids to logits, beside transformers' own model of it in one process.

The client's ends and the nodes' spans are those of the product; what is between them in a swarm, the network, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from petals_win.client.ends import Ends
from petals_win.client.hollow import hollow_model
from petals_win.models.cuts import Cuts
from petals_win.models.source import ModelSource, open_model
from petals_win.span.session import Session
from petals_win.span.span import Span

PROMPT, DECODED, CHUNK = 29, 4, 5  # tokens; the prompt is longer than any window or table of the small models
BOUND = 1e-4  # of the difference of a logit, in 32 bits
BATCHED = (PROMPT, 3, 17)  # tokens of prompts that are computed together


def equal(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """But for the order of sums, which on some processors depends on where in memory the numbers lie."""
    return torch.allclose(got, expected, atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class Differences:
    """The largest ones between our logits and those of one process, over all tokens compared."""

    prefill: float
    decode: float
    chunked: float
    batched: float

    @property
    def largest(self) -> float:
        return max(self.prefill, self.decode, self.chunked, self.batched)


def cut_of(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """Three spans where there may be, of which the second and the third begin in the middle of most patterns of layers."""
    cuts = Cuts.of(config)
    places = sorted({0, cuts.after(1), cuts.before(cuts.num_blocks - 1), cuts.num_blocks})
    return list(zip(places, places[1:], strict=False))


def whole_model(folder: Path) -> PreTrainedModel:
    """Of a checkpoint, as transformers computes it."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except ValueError:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


class Served:
    """A model's two ends and its spans."""

    def __init__(self, source: ModelSource) -> None:
        self.ends = Ends(hollow_model(source, torch.nn.Identity()))
        self.spans = [Span.load(source, start, end) for start, end in cut_of(source.config)]

    def open(self, tokens: int) -> list[Session]:
        """A session at each span."""
        return [span.open(1, tokens) for span in self.spans]

    def step(self, sessions: list[Session], ids: torch.Tensor) -> torch.Tensor:
        """Logits [tokens, vocabulary] of the next tokens of one text."""
        return self.together([(sessions, ids)])[0]

    def together(self, steps: list[tuple[list[Session], torch.Tensor]]) -> list[torch.Tensor]:
        """The same for several texts, in one pass wherever the model allows it."""
        hidden = []
        for sessions, ids in steps:
            first = sessions[0].position
            hidden.append(self.ends.embed(ids, torch.arange(first, first + len(ids)))[None])
        for number, span in enumerate(self.spans):
            begun = [span.begin(sessions[number], states) for (sessions, _), states in zip(steps, hidden, strict=True)]
            groups: dict[object, list] = {}
            for step in begun:
                groups.setdefault(span.companions(step) or step, []).append(step)
            for group in groups.values():
                span.advance([(step, step.left) for step in group])
            hidden = [step.output() for step in begun]
        return [self.ends.logits(states[0]) for states in hidden]


@torch.inference_mode()
def differences(folder: Path, vocabulary: int) -> Differences:
    """Between the spans of this checkpoint and one process. Raises what loading it raises."""
    served, whole = Served(open_model(str(folder))), whole_model(folder)
    chance = torch.Generator().manual_seed(1)
    length = PROMPT + DECODED
    texts = [torch.randint(3, vocabulary, (length,), generator=chance) for _ in BATCHED]
    right = [whole(input_ids=ids[None], use_cache=False).logits[0].float() for ids in texts]

    def largest(got: list[torch.Tensor], text: int, first: int = 0) -> float:
        logits = torch.cat(got)
        assert torch.isfinite(logits).all()
        return float((logits - right[text][first : first + len(logits)]).abs().max())

    sessions = served.open(length)
    prefill = largest([served.step(sessions, texts[0][:PROMPT])], 0)
    decoded = [served.step(sessions, texts[0][position : position + 1]) for position in range(PROMPT, length)]
    pieces = served.open(length)
    chunks = [served.step(pieces, chunk) for chunk in texts[0][:PROMPT].split(CHUNK)]
    mixed, batched = [served.open(length) for _ in BATCHED], 0.0
    done = [0 for _ in BATCHED]
    for tokens in (BATCHED, *[(1,) * len(BATCHED)] * DECODED):
        steps = [
            (each, text[first : first + count])
            for each, text, first, count in zip(mixed, texts, done, tokens, strict=True)
        ]
        for text, logits in enumerate(served.together(steps)):
            batched = max(batched, largest([logits], text, done[text]))
            done[text] += tokens[text]
    return Differences(prefill, largest(decoded, 0, PROMPT), largest(chunks, 0), batched)
