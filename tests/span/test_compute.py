"""The compute thread: order, priorities, cancellation, errors, and its end."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from concurrent.futures import CancelledError

import pytest

from petals_win.span.compute import ComputeThread


class Gate:
    """Keeps the thread busy until it is opened, so that calls queue up behind it."""

    def __init__(self, compute: ComputeThread):
        self._opened, begun = threading.Event(), threading.Event()
        self.future = compute.submit(lambda: (begun.set(), self._opened.wait(60)))
        assert begun.wait(60)

    def open(self) -> None:
        self._opened.set()


def open_at_the_stop(gate: Gate, compute: ComputeThread, monkeypatch) -> None:
    """Open the gate once the stop is asked for, before anybody waits for the thread's end."""
    join = compute.join
    monkeypatch.setattr(compute, "join", lambda timeout: (gate.open(), join(timeout)))


def test_all_calls_run_in_the_one_thread(compute):
    threads = {compute.submit(threading.current_thread).result(60) for _ in range(5)}
    assert threads == {compute}


def test_arguments_and_results(compute):
    assert compute.submit(divmod, 17, 5).result(60) == (3, 2)
    assert compute.submit(int, "ff", base=16).result(60) == 255


def test_the_most_urgent_first_and_equals_in_order(compute):
    gate, done = Gate(compute), []
    futures = [
        compute.submit(done.append, name, priority=priority)
        for name, priority in (("late", 2.0), ("first", 1.0), ("second", 1.0), ("urgent", -1.0), ("third", 1.0))
    ]
    gate.open()
    for future in futures:
        future.result(60)
    assert done == ["urgent", "first", "second", "third", "late"]


def test_a_call_that_is_cancelled_in_time_is_skipped(compute):
    gate, done = Gate(compute), []
    cancelled = compute.submit(done.append, "cancelled")
    kept = compute.submit(done.append, "kept")
    assert cancelled.cancel()
    gate.open()
    kept.result(60)
    assert done == ["kept"]
    with pytest.raises(CancelledError):
        cancelled.result(60)


def test_a_call_in_work_cannot_be_cancelled(compute):
    gate = Gate(compute)
    assert not gate.future.cancel()
    gate.open()
    gate.future.result(60)


@pytest.mark.parametrize("error", [ValueError("wrong shape"), KeyboardInterrupt(), SystemExit(3)], ids=type)
def test_an_error_goes_to_who_waits_and_the_thread_goes_on(compute, error):
    def fail():
        raise error

    with pytest.raises(type(error)):
        compute.submit(fail).result(60)
    assert compute.submit(lambda: "goes on").result(60) == "goes on"


def test_awaited_on_an_event_loop(compute):
    async def several():
        return await asyncio.gather(*(compute.submit(pow, 2, n) for n in range(10)))

    assert asyncio.run(several()) == [2**n for n in range(10)]


def test_a_task_that_is_cancelled_takes_its_call_along(compute):
    gate, done = Gate(compute), []

    async def give_up():
        task = asyncio.ensure_future(compute.submit(done.append, "given up"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    gate.open()
    compute.submit(done.append, "next").result(60)
    assert done == ["next"]


def test_stop_finishes_the_call_in_work_and_cancels_the_rest(monkeypatch):
    compute = ComputeThread()
    compute.start()
    gate = Gate(compute)
    waiting = [compute.submit(lambda: None, priority=p) for p in (-5.0, 0.0)]
    open_at_the_stop(gate, compute, monkeypatch)
    compute.stop()
    assert not compute.is_alive()
    gate.future.result(0)
    for future in waiting:
        with pytest.raises(CancelledError):
            future.result(60)
    with pytest.raises(RuntimeError, match="shutting down"):
        compute.submit(lambda: None)
    compute.stop()  # a second time


def test_stop_from_inside():
    compute = ComputeThread()
    compute.start()
    compute.submit(compute.stop).result(60)
    compute.join(60)
    assert not compute.is_alive()


def test_stop_of_a_thread_that_never_ran():
    ComputeThread().stop()


def test_calls_racing_with_stop_never_hang():
    for _ in range(20):
        compute = ComputeThread()
        compute.start()
        futures = []

        def submit(compute=compute, futures=futures):
            try:
                for _ in range(200):
                    futures.append(compute.submit(lambda: None))
            except RuntimeError:
                pass

        racing = threading.Thread(target=submit)
        racing.start()
        compute.stop()
        racing.join(60)
        for future in futures:
            try:
                future.result(60)
            except CancelledError:
                pass


def test_nothing_of_a_finished_call_is_kept(compute):
    """Else the last step's tensors would stay in a GPU's memory for as long as nobody asks."""

    class Tensor:
        pass

    tensor = Tensor()
    gone = weakref.ref(tensor)
    future = compute.submit(lambda given: given, tensor)
    assert future.result(60) is tensor
    del tensor, future
    compute.submit(lambda: None).result(60)
    gc.collect()
    assert gone() is None
