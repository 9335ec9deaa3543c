"""How many threads compute, and how they wait.

Knows the settings of OpenMP, torch and the interpreter, and how busy the PC is. Does not know what is computed.

The threads of one computation wait for one another hundreds of times a token. They wait awake, since being woken takes longer than
most of these waits; so all of them must be running at once. Where another program takes one of the cores that they count on, each wait
lasts until the system has run that program, too, and an answer takes several times as long. So threads are as many as the
PC's other programs, other nodes among them, leave cores free: with one thread there is nobody to wait for.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import psutil

T = TypeVar("T")

# For how long a thread that has nothing to compute waits awake: turns for GNU's OpenMP, ms for LLVM's and Intel's, which
# torch has on macOS and Windows. Less than the threads pause between two layers would cost a waking for each; LLVM's own
# 200 ms would take the cores from the event loop and from other nodes on this PC.
_SPINNING = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
_SWITCH_INTERVAL_S = 0.0005
_WINDOW_S = 0.2  # of computing, between two decisions; the system counts a core's time in ticks of 10 to 16 ms
_PAUSE_S = 1.0  # after so long others may have begun or ended, and
_FIRST_WINDOW_S = 0.1  # is enough for the next decision
_MOSTLY = 0.9  # of the time; who computes for so much of it makes no pauses worth mentioning
_BUSY = ("user", "nice", "system", "irq", "softirq")  # of the times that a system tells, those in which a core works


class FreeCores:
    """Counts, while this process computes, the cores that others keep busy, and tells how many threads that leaves.

    :param most: threads to compute with on a PC that does nothing else
    """

    def __init__(self, most: int):
        self._most = self._threads = most
        self._cores = os.cpu_count() or most
        self._lock = threading.Lock()
        self._running = 0  # computations of this process at this moment
        self._began = self._ended = _now()
        # Looking at what others have had takes long for a token. So it is looked at once in a while, pauses included, and at each
        # beginning and end only where pauses make a difference.
        self._exact = False
        self._looked, self._had = self._began, _had_by_others()
        self._window = _FIRST_WINDOW_S
        self._seconds = self._taken = 0.0  # of computing, and core seconds that others had meanwhile

    @contextmanager
    def computing(self) -> Iterator[int]:
        """Around one computation; yields the number of threads for it, at least one."""
        with self._lock:
            if self._running == 0:
                self._begin(_now())
            self._running += 1
            threads = max(1, self._threads // self._running)
        try:
            yield threads
        finally:
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    self._end(_now())

    def look(self) -> int | None:
        """In the middle of a computation: the number of threads for the rest of it; None: there is no news."""
        if _now() - self._began < _FIRST_WINDOW_S:
            return None
        with self._lock:
            now = _now()
            self._end(now)
            self._began = now
            return max(1, self._threads // max(1, self._running))

    def _begin(self, now: float) -> None:
        if now - self._ended >= _PAUSE_S:
            # What others did before may be over, as what they did in the pause. Too many threads for the first window
            # cost less than too few for a while after each answer of somebody else's.
            seconds = now - self._looked
            self._decide(seconds, self._look(now), at_least=self._threads)
            self._window = _FIRST_WINDOW_S
        elif self._exact:
            self._look(now)
        self._began = now

    def _end(self, now: float) -> None:
        self._ended = now
        self._seconds += now - self._began
        if self._exact:
            self._taken += self._look(now)
            if self._seconds >= self._window:
                self._decide(self._seconds, self._taken)
        elif (seconds := now - self._looked) >= self._window:
            taken = self._look(now)
            if self._seconds >= _MOSTLY * seconds or self._left(seconds, taken) >= self._most:
                self._decide(seconds, taken)
            else:  # others may have had it in the pauses
                self._exact, self._seconds, self._window = True, 0.0, _FIRST_WINDOW_S

    def _look(self, now: float) -> float:
        """Core seconds that others have had since the last look."""
        before, self._looked, self._had = self._had, now, _had_by_others()
        return self._had - before

    def _left(self, seconds: float, taken: float) -> int:
        """Cores that were free, if others have had `taken` core seconds in so many seconds."""
        return int(self._cores - taken / seconds + 0.5)

    def _decide(self, seconds: float, taken: float, at_least: int = 1) -> None:
        self._threads = min(max(self._left(seconds, taken), at_least), self._most)
        self._exact, self._seconds, self._taken, self._window = False, 0.0, 0.0, _WINDOW_S


def _now() -> float:
    """Seconds, of which only differences say something."""
    return time.perf_counter()


def _had_by_others() -> float:
    """Core seconds that all other processes of the PC have had."""
    times = psutil.cpu_times()
    return sum(getattr(times, kind, 0.0) for kind in _BUSY) - time.process_time()


_this_thread = threading.local()  # `computes`: whether it is inside of a computation
_free_cores: FreeCores | None = None
_most: int | None = None


def apply_thread_settings(threads: int | None) -> dict[str, str]:
    """Let torch compute with `threads` threads in this process; returns what is set.

    None: as many as OMP_NUM_THREADS says, or else one for each core that other programs leave free, time and again. What the user has
    set of OpenMP's waiting (OMP_WAIT_POLICY, GOMP_SPINCOUNT, KMP_BLOCKTIME) stays. Call it before torch is imported:
    OpenMP reads its settings once, and only the number of threads can be changed later.
    """
    global _free_cores, _most
    given = threads or _threads_of_the_user()
    _most = given or psutil.cpu_count(logical=False) or os.cpu_count() or 1
    _free_cores = None if given else FreeCores(_most)
    if given:  # not otherwise: nodes that this process starts would take it for the user's wish
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(given)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(_most)
        spinning = dict.fromkeys(_SPINNING, "as torch found it")
    elif "OMP_WAIT_POLICY" in os.environ:
        spinning = {"OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"]}
    else:
        spinning = {name: os.environ.setdefault(name, value) for name, value in _SPINNING.items()}
    # Event loop and compute thread hand over on every token; the default of 5 ms is as long as a token.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    return {
        "threads": str(given) if given else f"up to {_most}",
        **spinning,
        "switch_interval": f"{_SWITCH_INTERVAL_S * 1000:g} ms",
    }


def most_threads() -> int:
    """With how many threads this process computes at most. Torch must have been imported."""
    return _most or sys.modules["torch"].get_num_threads()


@contextmanager
def computing() -> Iterator[None]:
    """Around one computation by torch in the calling thread, which has as many threads as there are free cores.

    Without effect where the number of threads was given, or `apply_thread_settings` was not called in this process; or inside of
    another one in the same thread, beside which it does not run.
    """
    if _free_cores is None or getattr(_this_thread, "computes", False):
        yield
        return
    before = sys.modules["torch"].get_num_threads()  # of this thread: OpenMP keeps a number for each
    with _free_cores.computing() as threads:
        _set_threads(threads)
        _this_thread.computes = True
        try:
            yield
        finally:
            _this_thread.computes = False
            _set_threads(before)


def share_out(work: Callable[[T], None], pieces: Iterable[T]) -> None:
    """Do `work` for all pieces, in any order, by as many threads as torch has for the calling one. It has to release Python's lock.

    Within it torch has one thread, and records no gradients' graphs. Of errors the first is raised, and what has not begun is left.
    """
    torch = sys.modules["torch"]
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def alone(piece: T) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # each thread has such modes of its own
            work(piece)

    if threads == 1:
        for piece in pieces:
            alone(piece)
        return
    pool = ThreadPoolExecutor(threads, "pieces", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for _ in pool.map(alone, pieces):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what threads to come begin with is what was said last, in whichever thread


def look_around() -> None:
    """Between two parts of a computation of this thread that may be long: go on with as many threads as there are free cores by now."""
    if _free_cores is not None and getattr(_this_thread, "computes", False):
        if (threads := _free_cores.look()) is not None:
            _set_threads(threads)


def _set_threads(threads: int) -> None:
    torch = sys.modules["torch"]
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _threads_of_the_user() -> int | None:
    """OMP_NUM_THREADS, of which the first number counts, as a list has one for each level of nesting."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None
