"""The decode loop: tokens of all running answers, with embedding, head and choosing of all of them in shared passes.

Knows the ends of a model, sessions in its blocks, and the one thread that computes. Does not know where blocks are, or text.

An answer is a task on the event loop that waits for its session and for its turn on the compute thread. Whatever waits when
that thread gets free is one batch: it costs one wake-up of the thread, and one of the event loop.

Where drafts pay (client/drafts.py), a step has guesses at the tokens after the last one, too. The sampler chooses at each of them
in turn, as it would have without, and what was guessed wrong is taken back.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from petals_win.client.blocks import BeginsAnywhere, BlockSession
from petals_win.client.choosing import Sampler
from petals_win.client.drafts import Drafter, Pace
from petals_win.client.ends import Ends
from petals_win.client.rounds import Rounds
from petals_win.host.futures import AwaitableFuture
from petals_win.host.threads import computing
from petals_win.span.compute import ComputeThread

_GIVEN_UP = "The answer was given up: this process no longer computes"
_EMBEDDED_AT_ONCE = 512  # tokens whose hidden states are in memory together


class DecodeLoop:
    """Decodes by one hollow model, on one event loop and one compute thread, which is the caller's and runs."""

    def __init__(self, model: PreTrainedModel, compute: ComputeThread) -> None:
        """`model` is of client/hollow.py, and this object's alone from now on: its remote layer is replaced.

        A few tokens are computed in the calling thread, to find out how the model can be batched.
        """
        with computing():
            self._ends = Ends(model)
        self._compute = compute
        self._lock = threading.Lock()
        self._waiting: list[_Row] = []
        self._called = False  # whether the compute thread will come for those that wait
        self._rounds = Rounds()  # on the event loop only, as is:
        self._later: asyncio.TimerHandle | None = None  # that call, if others are waited for
        self._running = 0  # answers
        self._pace = Pace()

    async def generate(
        self, session: BlockSession, prompt: Sequence[int], *, choose: Sampler, limit: int, ends: Collection[int]
    ) -> AsyncGenerator[int, None]:
        """Yield the tokens that go on after `prompt`, at most `limit`, the last of them in `ends` if one of those came.

        They are WeighedTokens, if `choose` makes such ones.

        `session` is the caller's to close, and has seen nothing that is not part of the answer. Tokens are computed as fast
        as they can be, not only when they are asked for. Whoever stops reading, by `aclose()` or by being cancelled, ends the
        computation: before `aclose()` returns, the session's step has ended and nothing waits for a turn.

        Raises ValueError for an empty prompt or a limit below one, ConnectionAbortedError if the session was closed meanwhile,
        and what the session raises; errors come after the tokens so far.
        """
        if not prompt or limit < 1:
            raise ValueError(f"A prompt of {len(prompt)} tokens and an answer of at most {limit} are no answer")
        answer = _Answer(session, prompt, choose, limit, frozenset(ends), Drafter(self._pace))
        tokens: asyncio.Queue[int | None] = asyncio.Queue()
        work = asyncio.create_task(self._answer(answer, tokens))
        work.add_done_callback(lambda _: tokens.put_nowait(None))
        try:
            while (token := await tokens.get()) is not None:
                yield token
            await work  # its exception, if it failed
        finally:
            work.cancel()
            await asyncio.wait([work])
            if not work.cancelled():
                work.exception()  # known to the reader, or to nobody who would want it

    async def mean_state(self, session: BlockSession, tokens: Sequence[int]) -> list[float]:
        """The mean of the final hidden states of a text's tokens, at least one, scaled to the length 1; [hidden] numbers.

        `session` is the caller's to close, has seen nothing, and was opened without token ids: states of all tokens are
        needed. Raises what the session raises, and ConnectionAbortedError if it was closed meanwhile.
        """
        total: torch.Tensor | None = None
        for start in range(0, len(tokens), _EMBEDDED_AT_ONCE):
            ids = torch.tensor(tokens[start : start + _EMBEDDED_AT_ONCE], dtype=torch.int64)
            positions = torch.arange(start, start + len(ids))
            hidden = await self._computed(self._ends.embed, ids, positions)
            outputs = await _through(session.step(hidden[None]))
            if outputs.shape != (1, *hidden.shape):
                raise ValueError(f"The blocks returned {list(outputs.shape)} for {[1, *hidden.shape]}")
            part = await self._computed(self._sum_of_final, outputs[0])
            total = part if total is None else total + part
        if total is None:
            raise ValueError("No tokens are no text")
        return (total / total.norm().clamp_min(torch.finfo(total.dtype).tiny)).tolist()

    async def _computed(self, function: Callable[..., torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
        """`function(*args)` by the compute thread. Raises RuntimeError if that has been stopped."""
        try:
            return await self._compute.submit(function, *args)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise RuntimeError(_GIVEN_UP) from None

    def _sum_of_final(self, outputs: torch.Tensor) -> torch.Tensor:
        """On the compute thread: [hidden] of [tokens, hidden]; in float64, so that long texts lose nothing."""
        return self._ends.final(outputs).double().sum(dim=0)

    async def _answer(self, answer: _Answer, tokens: asyncio.Queue[int | None]) -> None:
        """All of one answer. It goes on without waiting for the reader, so that all steps of a batch set out before any text."""
        self._running += 1
        try:
            row = await self._turn(answer, tokens)
            while row.hidden is not None:
                rows, asked, size = row.hidden.shape
                if (held := self._rounds.leaves(answer, asked - answer.drafted)) > 0 and row.begun is None:
                    await asyncio.sleep(held)
                outputs = await _through(row.outputs_of_blocks())
                self._rounds.came(answer)
                if outputs.shape != (rows, 1 + answer.drafted, size):
                    raise ValueError(f"The blocks returned {list(outputs.shape)} for {list(row.hidden.shape)}")
                row = await self._turn(answer, tokens, outputs[0])
        finally:
            self._running -= 1
            self._rounds.ended(answer)
            self._see_whom_to_wait_for()

    async def _turn(
        self, answer: _Answer, tokens: asyncio.Queue[int | None], outputs: torch.Tensor | None = None
    ) -> _Row:
        """Wait for the compute thread, pass on the tokens that it has chosen, and return the row with its results."""
        most_drafts = 0 if outputs is None else answer.session.takes_back
        row = _Row(answer, outputs, most_drafts, asyncio.get_running_loop().create_future())
        with self._lock:
            self._waiting.append(row)
        self._see_whom_to_wait_for()
        try:
            await row.done
        finally:
            if row.done.cancelled():
                row.give_up()
            else:
                for token in row.tokens:
                    tokens.put_nowait(token)
                row.take_back()  # at the end, too, since of what the session has seen others may go on
        return row

    def _see_whom_to_wait_for(self) -> None:
        """Call the compute thread for those that wait, unless others are worth waiting for."""
        loop = asyncio.get_running_loop()
        with self._lock:
            beginning = any(row.outputs is None for row in self._waiting)
            wait = 0.0 if beginning else self._rounds.wait()
            call = bool(self._waiting) and not self._called and wait <= 0
            self._called |= call
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if call:
            # Behind everything that is ready now, since that may wait for a turn, too.
            loop.call_soon(self._call_compute, loop)
        elif wait > 0:
            self._later = loop.call_later(wait, self._see_whom_to_wait_for)

    def _call_compute(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            turn = self._compute.submit(self._compute_turn)
        except RuntimeError as e:
            _deliver(self._take(), e)
        else:
            turn.add_done_callback(lambda turn: self._hand_back(loop, turn))

    def _take(self) -> list[_Row]:
        with self._lock:
            rows, self._waiting, self._called = self._waiting, [], False
        return [row for row in rows if not row.done.done()]

    def _hand_back(self, loop: asyncio.AbstractEventLoop, turn: Future[list[_Row]]) -> None:
        """On the thread that ended the turn."""
        stopped = RuntimeError(_GIVEN_UP) if turn.cancelled() else None
        rows = self._take() if stopped else turn.result()
        if rows and not loop.is_closed():
            loop.call_soon_threadsafe(_deliver, rows, stopped)

    # From here on: on the compute thread.

    def _compute_turn(self) -> list[_Row]:
        """Choose tokens for each answer that has logits to come, and embed what its blocks get next."""
        rows = self._take()
        try:
            with torch.inference_mode():
                self._choose([row for row in rows if row.outputs is not None])
                self._embed([row for row in rows if row.error is None and not row.answer.ended])
            for row in rows:
                row.begin()
        except Exception as e:  # the batch's: all of its answers end by it
            for row in rows:
                row.error = row.error or e
        return rows

    def _choose(self, rows: list[_Row]) -> None:
        if not rows:
            return
        outputs = [row.outputs for row in rows if row.outputs is not None]
        logits = self._ends.logits(torch.cat(outputs)).split([len(some) for some in outputs])
        plain = [number for number, row in enumerate(rows) if row.answer.choose.takes_the_likeliest]
        # max() finds an index three times as fast as argmax().
        together = torch.cat([logits[number] for number in plain]).max(dim=-1).indices.tolist() if plain else []
        likeliest = iter(together)
        for row, some in zip(rows, logits, strict=True):
            known = [next(likeliest) for _ in some] if row.answer.choose.takes_the_likeliest else None
            try:
                row.wrong = row.answer.choose_tokens(some, known, row.tokens)
            except Exception as e:  # one answer's settings are no matter of the others
                row.error = e

    def _embed(self, rows: list[_Row]) -> None:
        if not rows:
            return
        alone = self._running == 1
        for row in rows:
            if row.outputs is not None:
                row.answer.measure(self._pace, alone)
                row.answer.make_draft(row.most_drafts if alone else 0)
        new = [row.answer.unseen() for row in rows]
        hidden = self._ends.embed(torch.cat([ids for ids, _ in new]), torch.cat([positions for _, positions in new]))
        for row, part in zip(rows, hidden.split([len(ids) for ids, _ in new]), strict=True):
            row.hidden = part[None]


class _Answer:
    """What is known of one answer: its tokens, and where it ends. Belongs to the compute thread once it has begun."""

    def __init__(
        self,
        session: BlockSession,
        prompt: Sequence[int],
        choose: Sampler,
        limit: int,
        ends: frozenset[int],
        drafter: Drafter,
    ) -> None:
        self.session, self.choose = session, choose
        self.begins = (
            session if isinstance(session, BeginsAnywhere) else None
        )  # looking takes longer than many a step of a token
        self._ids = torch.tensor([prompt], dtype=torch.int64)
        self._length, self._seen = len(prompt), 0
        self._position = session.position  # of the prompt's first token
        self._last = len(prompt) + limit
        self._ends = ends
        self.ended = False
        self._drafter, self._draft = drafter, list[int]()
        self._began: float | None = None  # when the step in work set out, unless it is the first

    @property
    def ids(self) -> torch.Tensor:
        """[1, prompt and answer so far]"""
        return self._ids[:, : self._length]

    @property
    def drafted(self) -> int:
        """How many tokens of the step in work are guesses, the last ones."""
        return len(self._draft)

    def choose_tokens(self, logits: torch.Tensor, likeliest: list[int] | None, tokens: list[int]) -> int:
        """Add the next tokens, at least one, to the empty `tokens`, and return how many guesses were wrong.

        `logits` are [1 + drafted, vocabulary], for the token before the guesses and for each of these; `likeliest` says the
        token with the largest of each, if that is known.
        """
        draft = self._draft
        for number in range(len(logits)):
            here = logits[number : number + 1]
            token = self.choose.weighed(likeliest[number] if likeliest else self.choose(self.ids, here), here)
            self.append(token)
            tokens.append(token)
            if self.ended or number == len(draft) or token != draft[number]:
                break
        right = sum(token == guess for token, guess in zip(tokens, draft, strict=False))
        self._seen += right
        if draft and not self.ended:
            self._drafter.checked(len(draft), right)
        return len(draft) - right

    def measure(self, pace: Pace, alone: bool) -> None:
        """Between two steps: how long the one before took, with its turn, if no other answer was running."""
        now = time.perf_counter()
        if self._began is not None and alone:
            pace.took(1 + len(self._draft), now - self._began)
        self._began = now if alone else None

    def make_draft(self, most: int) -> None:
        """Guess what may come after the last token, at most `most` tokens."""
        most = min(most, self._last - self._length - 1)  # the step brings one more than it guesses
        self._draft = self._drafter.draft(self.ids[0], most)

    def append(self, token: int) -> None:
        """Take the next token; afterwards `ended` tells whether it is the last."""
        if self._length == self._ids.shape[1]:
            room = min(max(self._length, 64), self._last - self._length)
            self._ids = torch.cat([self._ids, self._ids.new_zeros(1, room)], dim=1)
        self._ids[0, self._length] = token
        self._length += 1
        self.ended = self._length == self._last or token in self._ends

    def unseen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The token ids that the blocks get next, guesses last, and their positions, [tokens] each."""
        start, self._seen = self._seen, self._length
        ids = self._ids[0, start : self._length]
        if self._draft:
            ids = torch.cat([ids, torch.tensor(self._draft, dtype=torch.int64)])
        return ids, torch.arange(start, start + len(ids)) + self._position


@dataclass(eq=False)
class _Row:
    """An answer that waits for its turn: with what the blocks returned for its last token and guesses [1 + guesses, hidden], or at its beginning.

    The turn's results: the tokens that were chosen, how many guesses were wrong, and what the blocks get next
    [1, tokens, hidden], None at the end; or an error.
    """

    answer: _Answer
    outputs: torch.Tensor | None
    most_drafts: int
    done: asyncio.Future[None]
    tokens: list[int] = field(default_factory=list)
    wrong: int = 0
    hidden: torch.Tensor | None = None
    error: Exception | None = None
    begun: AwaitableFuture[torch.Tensor] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _given_up: bool = False

    def begin(self) -> None:
        """On the compute thread: let the step of `hidden` set out, if it can from here.

        Then it does not wait for the event loop, which has the time of that step for text and whoever reads it.
        """
        begins = self.answer.begins
        with self._lock:
            if begins is None or self.hidden is None or self._given_up:
                return
            try:
                self.take_back()
                self.begun = begins.begin(self.hidden)
            except Exception as e:
                self.error = e

    async def outputs_of_blocks(self) -> torch.Tensor:
        """What the blocks make of `hidden`: of its last token and the guesses."""
        assert self.hidden is not None
        last, begins = 1 + self.answer.drafted, self.answer.begins
        if self.begun is not None and begins is not None:
            return (await begins.finish(self.begun))[:, -last:]
        return await self.answer.session.step(self.hidden, last=last)

    def take_back(self) -> None:
        """Let the session forget the guesses that were wrong."""
        if self.wrong:
            self.answer.session.truncate(self.answer.session.position - self.wrong)
            self.wrong = 0

    def give_up(self) -> None:
        """On the event loop: nobody waits any more, and the session is used by nobody else when this returns."""
        with self._lock:
            self._given_up = True
            if self.begun is not None:
                self.begun.cancel()


async def _through(step: Coroutine[Any, Any, torch.Tensor]) -> torch.Tensor:
    """What a step of a session returns."""
    try:
        return await step
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Nobody cancelled the answer, and whoever reads it must not take itself for cancelled.
        raise ConnectionAbortedError("The session was closed in the middle of a step") from None


def _deliver(rows: list[_Row], error: Exception | None = None) -> None:
    """On the event loop."""
    for row in rows:
        if row.done.done():  # given up meanwhile
            continue
        if (failed := error or row.error) is not None:
            row.done.set_exception(failed)
        else:
            row.done.set_result(None)
