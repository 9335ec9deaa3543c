"""Sessions that come and go at random, in models of every family: what shares passes and chunks is what each text gives alone and at once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from petals_win.models.cuts import Cuts
from petals_win.models.source import open_model
from petals_win.span import cache
from petals_win.span import scheduler as scheduler_module
from petals_win.span import span as span_module
from petals_win.span.compute import ComputeThread
from petals_win.span.scheduler import Scheduler
from petals_win.span.span import Span
from span.families import FAMILIES
from span.hybrids import HYBRIDS
from span.test_adapters import adapter
from span.test_scheduler import Gate
from span.test_scheduler_families import ONE_BY_ONE

ROUNDS, MOST_SESSIONS, LONGEST = 10, 6, 64
CHUNK = 7  # tokens of a prompt in one turn
CLOSE = 3e-5  # of the largest number


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Prompts of several chunks, and windows of 8 tokens whose past is moved every few tokens."""
    monkeypatch.setattr(scheduler_module.Chunks, "tokens", lambda *_: CHUNK)
    for module in (cache, span_module):
        monkeypatch.setattr(module, "BEYOND_WINDOW", 4)
        monkeypatch.setattr(module, "ROOM_BEYOND", 6)


class Text:
    """A session, and all that went into it: [rows, tokens, width]."""

    def __init__(self, span: Span, blocks: tuple[int, int], adapter: str, rows: int):
        self._span, self._blocks, self._adapter = span, blocks, adapter
        self.rows = rows
        self._furthest = 0  # tokens that it has ever had: so much further back than them none is sure to be kept
        self.session = span.open(rows, LONGEST, *blocks, adapter)
        self._all = torch.empty(rows, 0, span.row.width)

    def next(self, chance: random.Random) -> tuple[dict, torch.Tensor]:
        """What a step is asked for, and what has to come: of the whole text, without a cache, the last tokens."""
        length, how = self._all.shape[1], {}
        if length and self.rows > 1 and chance.random() < 0.4:
            how["hypo_ids"] = torch.tensor([chance.randrange(self.rows) for _ in range(self.rows)])
            self._all = self._all[how["hypo_ids"]]
        elif chance.random() < 0.3 and (least := max(self._furthest - min(self._takes_back(), 4), 1)) < length:
            how["start"] = chance.randrange(least, length)
            self._all = self._all[:, : how["start"]]
        tokens = min(chance.choice([1, 1, 1, 2, 5, 20]), LONGEST - self._all.shape[1])
        generator = torch.Generator().manual_seed(chance.randrange(10**6))
        hidden = torch.randn(self.rows, tokens, self._span.row.width, generator=generator)
        self._all = torch.cat([self._all, hidden], dim=1)
        self._furthest = max(self._furthest, self._all.shape[1])
        expected = self._span.forward(self._all, *self._blocks, adapter=self._adapter)[:, -tokens:]
        return {"hidden": hidden, **how}, expected

    def _takes_back(self) -> int:
        return self._span.takes_back(LONGEST, *self._blocks)

    @property
    def is_full(self) -> bool:
        return self._all.shape[1] == LONGEST


def come_and_go(span: Span, compute: ComputeThread, adapters: tuple[str, ...], seed: int = 0) -> int:
    """Returns how many sessions had a pass together at most."""
    scheduler, chance = Scheduler(span, compute), random.Random(seed)
    whole, part = (span.start, span.end), (span.cuts.after(span.start + 1), span.end)
    advance, together = span.advance, []

    def counting(pieces):
        together.append(len(pieces))
        advance(pieces)

    span.advance = counting  # type: ignore[method-assign]
    texts: list[Text] = []
    for number in range(ROUNDS):
        gate = Gate(compute)
        while len(texts) < MOST_SESSIONS and (number == 0 or chance.random() < 0.5):
            where = part if part[0] < part[1] and chance.random() < 0.25 else whole
            texts.append(Text(span, where, chance.choice(adapters), chance.choice([1, 1, 1, 2, 3])))
        asked = [(text, *text.next(chance)) for text in texts if not text.is_full and chance.random() < 0.85]
        behind = len(asked) - chance.randrange(3)  # those come when the others' turns have begun
        futures = [scheduler.step(text.session, **step) for text, step, _ in asked[:behind]]
        gate.open()
        futures += [scheduler.step(text.session, **step) for text, step, _ in asked[behind:]]
        for (text, _, expected), future in list(zip(asked, futures, strict=True)):
            if chance.random() < 0.1:  # its step may be anywhere
                future.cancel()
                compute.submit(text.session.close).result(30)
                texts.remove(text)
            else:
                size = max(1.0, float(expected.abs().max()))
                torch.testing.assert_close(future.result(30), expected, atol=CLOSE * size, rtol=CLOSE)
        for text in [text for text in texts if text.is_full]:
            compute.submit(text.session.close).result(30)
            texts.remove(text)
    return max(together)


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_joining_and_leaving(checkpoint, compute, family):
    source = open_model(str(checkpoint(family)))
    span = compute.submit(Span.load, source, 0, Cuts.of(source.config).after(4)).result(60)
    together = come_and_go(span, compute, ("",))
    assert together == 1 if family in {*ONE_BY_ONE, *HYBRIDS} else together > 2


def test_joining_and_leaving_with_adapters(checkpoint, compute, tmp_path):
    names: tuple[str, ...] = tuple(str(tmp_path / name) for name in ("one", "two"))
    for seed, name in enumerate(names):
        adapter(checkpoint, Path(name), seed=seed)
    how = {"adapters": names}
    span = compute.submit(Span.load, open_model(str(checkpoint("llama"))), 0, 4, **how).result(60)
    assert come_and_go(span, compute, ("", *names)) > 1
