"""The event loop of this system, and the thread that runs one: hand-over, errors, deadlines and an orderly end."""

import asyncio
import gc
import logging
import sys
import threading
import time

import pytest

from petals_win.host.futures import AwaitableFuture
from petals_win.host.loop import LoopThread, new_event_loop


@pytest.fixture
def thread():
    thread = LoopThread("test")
    thread.start()
    yield thread
    thread.stop()


async def answer(value, after_s=0.0):
    await asyncio.sleep(after_s)
    return value


def test_the_loop_starts_child_processes():
    loop = new_event_loop()

    async def version():
        process = await asyncio.create_subprocess_exec(sys.executable, "--version", stdout=asyncio.subprocess.PIPE)
        output, _ = await process.communicate()
        return output

    try:
        assert loop.run_until_complete(version()).startswith(b"Python 3.")
    finally:
        loop.close()


def test_without_the_faster_loops_asyncio_has_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvloop", None)
    monkeypatch.setitem(sys.modules, "winloop", None)
    loop = new_event_loop()
    assert type(loop).__module__.startswith("asyncio.")
    assert loop.run_until_complete(answer(1)) == 1
    loop.close()


def test_submit_and_call(thread):
    future = thread.submit(answer("a"))
    assert isinstance(future, AwaitableFuture) and future.result(30) == "a"
    assert thread.call(answer("b"), timeout=30) == "b"


def test_errors_reach_the_caller(thread):
    async def fail():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        thread.call(fail(), timeout=30)


def test_a_deadline_cancels_the_coroutine(thread):
    cancelled = threading.Event()

    async def wait():
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    with pytest.raises(TimeoutError, match="0.1 s"):
        thread.call(wait(), timeout=0.1)
    assert cancelled.wait(30)


def test_a_timeout_inside_the_coroutine_is_its_own(thread):
    async def time_out():
        await asyncio.wait_for(asyncio.sleep(60), 0.01)

    began = time.monotonic()
    with pytest.raises((TimeoutError, asyncio.TimeoutError)):
        thread.call(time_out(), timeout=60)
    assert time.monotonic() - began < 30


def test_call_from_its_own_thread_is_refused(thread):
    async def nested():
        return thread.call(answer(1))

    with pytest.raises(RuntimeError, match="wait for ever"):
        thread.call(nested(), timeout=30)


def test_a_submitted_future_can_be_awaited_on_another_loop(thread):
    async def main():
        return await thread.submit(answer("across", 0.02))

    assert asyncio.run(main()) == "across"


def test_stop_cancels_tasks_closes_generators_and_can_be_repeated():
    thread = LoopThread("test")
    thread.start()
    ended = []

    async def generator():
        try:
            yield 1
        finally:
            ended.append("generator")

    kept = generator()

    async def wait():
        await kept.__anext__()
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)  # cleaning up may take a moment
            ended.append("task")

    started = threading.Event()
    future = thread.submit(wait())
    assert started.wait(30)
    thread.stop()
    thread.stop()
    assert future.cancelled() and ended == ["task", "generator"]
    assert not thread.is_alive() and thread.loop.is_closed()
    with pytest.raises(RuntimeError, match="takes no more work"):
        thread.submit(answer(1))


def test_work_handed_over_just_before_the_end_is_not_forgotten():
    for _ in range(20):
        thread = LoopThread("test")
        thread.start()
        futures = [thread.submit(answer(i, 60)) for i in range(10)]
        thread.stop()
        assert all(future.cancelled() for future in futures)


def test_stop_before_start_does_nothing():
    LoopThread("test").stop()


def test_a_task_that_ignores_its_end_is_named(caplog):
    thread = LoopThread("test")
    thread.start()

    async def stubborn():
        started.set()
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass

    started = threading.Event()
    thread.submit(stubborn())
    assert started.wait(30)
    began = time.monotonic()
    with caplog.at_level(logging.ERROR):
        thread.stop(timeout=0.3)
    assert time.monotonic() - began < 20
    assert "stubborn" in caplog.text


def test_errors_that_nobody_awaits_are_logged(thread, caplog):
    async def start_and_forget():
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await asyncio.sleep(0.05)

    with caplog.at_level(logging.ERROR, logger="asyncio"):
        thread.call(start_and_forget(), timeout=30)
    assert "ZeroDivisionError" in caplog.text


def test_no_warning_about_coroutines_that_were_refused(thread, recwarn):
    thread.stop()
    with pytest.raises(RuntimeError):
        thread.submit(answer(1))
    gc.collect()
    assert not [warning for warning in recwarn if "never awaited" in str(warning.message)]


def test_a_task_lives_although_nobody_keeps_its_future(thread):
    """Only what it waits for refers to it, and only it refers to that."""
    done = threading.Event()

    async def wait_for_itself() -> None:
        waiter = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.2, collect)
        try:
            await waiter
        finally:
            done.set()

    def collect() -> None:
        gc.collect()

    thread.submit(wait_for_itself())
    assert not done.wait(0.5), "it was collected"
    thread.stop()
    assert done.is_set()
