"""The steps of all sessions of a span, computed together: each turn of the compute thread takes what waits.

A turn is one call of the compute thread, so that other calls (opening, forward and backward passes) go between turns. It computes
every waiting step of few tokens (decodes), and of the long ones (prefills) as many tokens as one chunk has. What arrives while a turn is
in work makes up the next one. Knows spans and the compute thread. Does not know networks or budgets.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from petals_win.host.crossing import together
from petals_win.host.futures import AwaitableFuture
from petals_win.span.chunks import Chunks, Decodes
from petals_win.span.company import Company
from petals_win.span.compute import ComputeThread
from petals_win.span.decoder import Prompts
from petals_win.span.pace import Pace
from petals_win.span.session import Session, Step
from petals_win.span.shortage import give_back
from petals_win.span.span import CHUNK_TOKENS, FEW_TOKENS, Span

logger = logging.getLogger(__name__)

_PAUSE_S = 1.0  # after which decodes are not expected to come again


class _Waiting:
    """A step that was asked for and is not through."""

    def __init__(
        self,
        session: Session,
        hidden: torch.Tensor,
        prompts: Prompts | None,
        hypo_ids: torch.Tensor | None,
        start: int | None,
        priority: float,
    ) -> None:
        self.future: AwaitableFuture[torch.Tensor] = AwaitableFuture()
        self.session, self.hidden, self.prompts, self.hypo_ids = session, hidden, prompts, hypo_ids
        self.start, self.priority = start, priority
        self.rows, self._length = hidden.shape[:2] if hidden.ndim == 3 else (1, 1)
        # Few tokens are computed at once; longer steps share a chunk in each turn.
        self.is_prefill = self.rows * self._length > FEW_TOKENS
        self.step: Step | None = None  # once it has had a turn
        self.last_turn = 0

    @property
    def left(self) -> int:
        """Tokens of each row."""
        return self._length if self.step is None else self.step.left


class Scheduler:
    """Computes the steps of the sessions of `span` on its compute thread, as many at once as there are."""

    def __init__(self, span: Span, compute: ComputeThread, pace: Pace | None = None) -> None:
        self._span = span
        self._pace = pace
        self._compute = compute
        self._lock = threading.Lock()
        self._arrived: list[_Waiting] = []  # under the lock, as is:
        self._asked: float | None = None  # the priority of the turn that is on its way
        self._waiting: list[_Waiting] = []  # the oldest first; on the compute thread only, as is:
        self._turns = 0
        self._decoded = -_PAUSE_S  # when the last turn with decodes ended
        self._prompted = False  # whether anything of a prompt was computed since then
        self._chunks = Chunks(CHUNK_TOKENS)
        self._company = Company()

    def step(
        self,
        session: Session,
        hidden: torch.Tensor,
        *,
        prompts: Prompts | None = None,
        hypo_ids: torch.Tensor | None = None,
        start: int | None = None,
        priority: float = 0.0,
    ) -> AwaitableFuture[torch.Tensor]:
        """As Span.step, with the result [batch, tokens, hidden] on the CPU.

        Steps of one session are made in the order of the calls. A step that fails, or that is cancelled before its last tokens
        are in work, leaves its session as Span.step does, and all others as if it had not been. `priority` is that of a call of
        the compute thread; once that has been stopped, a step fails by RuntimeError.
        """
        waiting = _Waiting(session, hidden, prompts, hypo_ids, start, priority)
        self._company.came(session, time.perf_counter())
        with self._lock:
            self._arrived.append(waiting)
        self._ask_for_a_turn(priority)
        return waiting.future

    def _ask_for_a_turn(self, priority: float) -> None:
        with self._lock:
            if self._asked is not None and self._asked <= priority:
                return
            self._asked = priority
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._submit_turn(priority)
        else:
            # Behind everything that is ready now, since that may be steps, too.
            loop.call_soon(self._submit_turn, priority)

    def _submit_turn(self, priority: float) -> None:
        try:
            turn = self._compute.submit(self._turn, priority=priority)
        except RuntimeError as e:  # the thread was told to stop
            self._give_up(e)
        else:
            turn.add_done_callback(self._turned)

    def _turned(self, turn: Future[None]) -> None:
        """Nobody is left waiting for turns that will not come."""
        if turn.cancelled():
            self._give_up()
        elif (error := turn.exception()) is not None:
            self._give_up(error)

    def _give_up(self, error: BaseException | None = None) -> None:
        """End all that wait, by an error that is no step's own, or else as cancelled."""
        with self._lock:
            arrived, self._arrived, self._asked = self._arrived, [], None
        left, self._waiting = [*self._waiting, *arrived], []
        for waiting in left:
            if error is None:
                waiting.future.cancel()
            elif not waiting.future.done() and (
                waiting.future.running() or waiting.future.set_running_or_notify_cancel()
            ):
                waiting.future.set_exception(error)

    def _turn(self) -> None:
        with self._lock:
            self._waiting += self._arrived
            self._arrived = []
            self._asked = None
        for waiting in [each for each in self._waiting if each.future.cancelled()]:
            self._drop(waiting)
        if not self._waiting:
            return
        decodes, prefills = self._candidates()
        began = time.perf_counter()
        wait = self._company.wait({each.session for each in decodes}, began)
        if not decodes:
            wait = max(wait, self._decoded + self._chunks.rest_s - began)
        if wait <= 0:
            self._compute_turn(decodes, prefills, began)
        if not self._waiting:
            return
        priority = min(each.priority for each in self._waiting)
        if wait > 0:
            self._compute.submit_later(wait, self._turn, priority=priority).add_done_callback(self._turned)
        else:
            self._ask_for_a_turn(priority)

    def _candidates(self) -> tuple[list[_Waiting], list[_Waiting]]:
        """Of each session the oldest step: decodes, and prefills with those first whose last turn is longest ago."""
        oldest: dict[int, _Waiting] = {}
        for waiting in self._waiting:
            oldest.setdefault(id(waiting.session), waiting)
        decodes = [each for each in oldest.values() if not each.is_prefill]
        prefills = [each for each in oldest.values() if each.is_prefill]
        return decodes, sorted(prefills, key=lambda each: each.last_turn)

    def _compute_turn(self, decodes: Sequence[_Waiting], prefills: Sequence[_Waiting], began: float) -> None:
        self._turns += 1
        chosen = [(each, each.left) for each in decodes]
        recently = began - self._decoded < _PAUSE_S
        where = Decodes.HERE if decodes else Decodes.ELSEWHERE if recently else Decodes.NOWHERE
        room = self._span.room_beside(sum(each.rows * each.left for each in decodes))
        whole = left = self._chunks.tokens(where, room)
        for prefill in prefills:
            if left < prefill.rows and left < whole:
                break
            tokens = min(max(1, left // prefill.rows), prefill.left, self._span.piece_tokens)
            chosen.append((prefill, tokens))
            left -= prefill.rows * tokens
        groups: dict[object, list[tuple[_Waiting, Step, int]]] = {}
        for waiting, tokens in chosen:
            if (step := self._ready(waiting, tokens)) is not None:
                fewer = step.at_once(tokens)
                left += waiting.rows * (tokens - fewer) if waiting.is_prefill else 0
                tokens = fewer
                groups.setdefault(self._span.companions(step) or waiting, []).append((waiting, step, tokens))
        for group in groups.values():
            self._compute_group(group)
        ended = time.perf_counter()
        self._chunks.took(where, whole - left, ended - began, self._company.away_s)
        if decodes:
            self._decoded = ended
        if self._pace is not None and decodes and not prefills:
            self._pace.took(
                ended - began, [each.session.position for each in decodes if each.session.cache is not None]
            )
        again = self._company.turned((each.session for each in decodes), began, ended)
        self._prompted |= whole > left
        if decodes:
            if again is not None:
                self._chunks.came_again(again, self._prompted)
            self._prompted = bool(prefills)

    def _ready(self, waiting: _Waiting, tokens: int) -> Step | None:
        """The step, begun now at the latest and not to be cancelled from its last tokens on; None if it is over."""
        waiting.last_turn = self._turns
        future = waiting.future
        if tokens >= waiting.left and not (future.running() or future.set_running_or_notify_cancel()):
            self._drop(waiting)
            return None
        if waiting.step is None:
            try:
                waiting.step = self._span.begin(
                    waiting.session,
                    waiting.hidden,
                    prompts=waiting.prompts,
                    hypo_ids=waiting.hypo_ids,
                    start=waiting.start,
                )
            except Exception as e:
                give_back(e)
                self._fail(waiting, e)
        return waiting.step

    def _compute_group(self, group: Sequence[tuple[_Waiting, Step, int]]) -> None:
        if self._advanced(group):
            with together():
                for waiting, step, _ in group:
                    if not step.left:
                        self._waiting.remove(waiting)
                        waiting.future.set_result(step.output())
        elif len(group) > 1:
            # Which of them it was, or whether all together took too much memory, shows when each is alone.
            for single in group:
                self._compute_group([single])

    def _advanced(self, group: Sequence[tuple[_Waiting, Step, int]]) -> bool:
        try:
            self._span.advance([(step, tokens) for _, step, tokens in group])
        except Exception as e:
            give_back(e)
            if len(group) == 1:
                self._fail(group[0][0], e)
            else:
                logger.debug("%d steps cannot be computed together; each is tried alone", len(group), exc_info=True)
            return False
        return True

    def _drop(self, waiting: _Waiting) -> None:
        self._waiting.remove(waiting)
        if waiting.step is not None:
            waiting.step.undo()

    def _fail(self, waiting: _Waiting, error: Exception) -> None:
        self._drop(waiting)
        if not waiting.future.cancelled():
            waiting.future.set_exception(error)
