"""Whose tokens come next: the answers of an ONNX model in turns, and how they share the memory.

Knows answers as token ids, and rows of an engine's Steps. Does not know graphs, text or event loops: a turn is a call on the one
thread that computes.

In a turn each answer that is under way goes on by one token, and one prompt by a piece. Rows grow with their answers. Where one finds
no more memory, the youngest gives back all, waits in the line, and is computed again from its token ids.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from petals_win.client.choosing import Sampler
from petals_win.engines.base import Full
from petals_win.engines.onnx_rows import Row
from petals_win.engines.onnx_steps import Steps

PATIENCE_S = 300.0  # that an answer waits in the line for memory
_FIRST_PIECE, _SMALLEST_PIECE, _LARGEST_PIECE = 32, 8, 512  # tokens of a prompt
_PIECE_S = 0.2  # that a piece may take: others wait for it, and whoever is cancelled


class NoRoom(Full):
    """This PC had no memory for the answer in time."""

    def __init__(self) -> None:
        super().__init__("All memory for conversations on this PC is in use. Try again in a moment.")


@dataclass(eq=False)
class Answer:
    """One answer. Belongs to the thread that computes, from when it is handed over until it has `ended`.

    news: tokens that were chosen since somebody looked. error: what ended it, unless it is complete.
    """

    prompt: list[int]
    choose: Sampler
    limit: int
    ends: frozenset[int]
    began: float = field(default_factory=time.monotonic)
    news: list[int] = field(default_factory=list)
    ended: bool = False
    error: Exception | None = None

    def __post_init__(self) -> None:
        self._ids = torch.tensor([self.prompt], dtype=torch.int64)
        self._length, self._longest = len(self.prompt), len(self.prompt) + self.limit
        self.row: Row | None = None

    @property
    def length(self) -> int:
        """Of prompt and answer so far."""
        return self._length

    @property
    def ids(self) -> torch.Tensor:
        """[1, prompt and answer so far]"""
        return self._ids[:, : self._length]

    def unread(self, most: int) -> list[int]:
        """The first tokens that the row has not seen."""
        seen = 0 if self.row is None else self.row.length
        return self._ids[0, seen : min(self._length, seen + most)].tolist()

    @property
    def left(self) -> int:
        """How many tokens the row has not seen; one, if the answer is under way."""
        return self._length - (0 if self.row is None else self.row.length)

    def take(self, token: int) -> None:
        """The next token is this one."""
        if self._length == self._ids.shape[1]:
            more = min(max(self._length, 64), self._longest - self._length)
            self._ids = torch.cat([self._ids, self._ids.new_zeros(1, more)], dim=1)
        self._ids[0, self._length] = token
        self._length += 1
        self.news.append(token)
        self.ended = self._length == self._longest or token in self.ends


class Turns:
    """All answers of a model. To be used by one thread, but for `held`."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._line: list[Answer] = []  # by when they began
        self._running: list[Answer] = []
        self._piece = _FIRST_PIECE

    @property
    def usage(self) -> float:
        """The share of the memory for answers that is in use."""
        return min(self._steps.held / self._steps.budget, 1.0) if self._steps.budget else 1.0

    @property
    def held(self) -> int:
        """Answers, and the bytes that they hold; 0 if there are none."""
        return len(self._line) + len(self._running) + self._steps.held

    @property
    def computes(self) -> bool:
        """Whether another turn would go on with something."""
        return bool(self._running)

    @property
    def waits(self) -> bool:
        """Whether somebody waits for memory."""
        return bool(self._line)

    @property
    def all(self) -> list[Answer]:
        return [*self._running, *self._line]

    def turn(self, new: list[Answer], leaving: list[Answer]) -> list[Answer]:
        """Take these in, let those go, and go on. Returns all that have news or ended; it has let go of the latter."""
        told = list(leaving)
        for answer in leaving:
            answer.ended = True
        self._let_go()
        self._line = sorted([*self._line, *new], key=lambda answer: answer.began)
        with torch.inference_mode():
            told += self._admit()
            told += self._go_on([answer for answer in self._running if answer.left == 1])
            told += self._read_on([answer for answer in self._running if answer.left > 1])
        self._let_go()
        return list(dict.fromkeys(told))

    def _let_go(self) -> None:
        for answer in [*self._running, *self._line]:
            if answer.ended:
                self._close(answer)
        self._running = [answer for answer in self._running if not answer.ended]
        self._line = [answer for answer in self._line if not answer.ended]

    def _close(self, answer: Answer) -> None:
        if answer.row is not None:
            self._steps.close(answer.row)
            answer.row = None

    def _admit(self) -> list[Answer]:
        """Nobody overtakes. Returns those that have waited too long."""
        while self._line:
            answer = self._line[0]
            answer.row = self._steps.open(answer.length + 1)
            if answer.row is None:
                break
            self._running.append(self._line.pop(0))
        late = [answer for answer in self._line if time.monotonic() - answer.began > PATIENCE_S]
        for answer in late:
            _fail(answer, NoRoom())
        return late

    def _go_on(self, answers: list[Answer]) -> list[Answer]:
        """One token for each, or for as many as can be computed at once."""
        answers = answers[: self._steps.at_once]
        # Behind the others the next time, and those that are not computed at once take turns.
        self._running = [answer for answer in self._running if answer not in answers] + answers
        ready = []
        for answer in sorted(answers, key=lambda answer: answer.began):
            if answer.row is not None and self._make_room(answer):
                ready.append(answer)
        ready = [answer for answer in ready if answer.row is not None]  # a younger one may have had to give way
        rows = [answer.row for answer in ready if answer.row is not None]
        if not rows:
            return []
        try:
            logits = self._steps.next(rows, [answer.unread(1)[0] for answer in ready])
        except Exception as e:  # all of them have lost what they had
            for answer in ready:
                _fail(answer, e)
            return ready
        self._choose(ready, logits)
        return ready

    def _read_on(self, answers: list[Answer]) -> list[Answer]:
        """A piece of one prompt."""
        answers = [answer for answer in answers if answer.row is not None]
        if not answers:
            return []
        answer = answers[0]
        self._running.remove(answer)
        self._running.append(answer)
        began = time.monotonic()
        tokens = answer.unread(self._piece)
        if answer.row is None:
            return []
        try:
            logits = self._steps.read(answer.row, tokens)
        except Exception as e:
            _fail(answer, e)
            return [answer]
        if len(tokens) == self._piece:
            self._fit_piece(time.monotonic() - began)
        if answer.left:
            return []
        self._choose([answer], logits)
        return [answer]

    def _fit_piece(self, seconds: float) -> None:
        if seconds > _PIECE_S:
            self._piece = max(self._piece // 2, _SMALLEST_PIECE)
        elif seconds < _PIECE_S / 3:
            self._piece = min(self._piece * 2, _LARGEST_PIECE)

    def _make_room(self, answer: Answer) -> bool:
        """Room for one token more, whoever has to give way: the youngest first, this one at last."""
        while answer.row is not None:
            row = self._steps.grow(answer.row, answer.length + 1)
            if row is not None:
                answer.row = row
                return True
            youngest = max(self._running, key=lambda each: each.began)
            self._close(youngest)
            self._running.remove(youngest)
            self._line = sorted([youngest, *self._line], key=lambda each: each.began)
        return False

    def _choose(self, answers: list[Answer], logits: torch.Tensor) -> None:
        for number, answer in enumerate(answers):
            here = logits[number : number + 1]
            try:
                answer.take(answer.choose.weighed(answer.choose(answer.ids, here), here))
            except Exception as e:  # one answer's settings are no matter of the others
                _fail(answer, e)


def _fail(answer: Answer, error: Exception) -> None:
    answer.error, answer.ended = error, True
