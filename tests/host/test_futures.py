"""A future between threads and event loops."""

import asyncio
import concurrent.futures
import threading
import time

import pytest

from petals_win.host.futures import AwaitableFuture


def later(action, after_s=0.02):
    timer = threading.Timer(after_s, action)
    timer.start()


def test_a_thread_fulfils_what_a_coroutine_awaits():
    async def main():
        future = AwaitableFuture()
        later(lambda: future.set_result(7))
        return await future

    assert asyncio.run(main()) == 7


def test_it_can_be_fulfilled_before_it_is_awaited():
    async def main():
        future = AwaitableFuture()
        future.set_result(7)
        return await future

    assert asyncio.run(main()) == 7


def test_errors_are_raised_where_it_is_awaited():
    async def main():
        future = AwaitableFuture()
        later(lambda: future.set_exception(ValueError("broken")))
        await future

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(main())


def test_several_tasks_on_several_loops_await_one():
    future = AwaitableFuture()
    results = []

    async def two():
        async def one():
            return await future

        results.extend(await asyncio.gather(one(), one()))

    threads = [threading.Thread(target=lambda: asyncio.run(two())) for _ in range(3)]
    for thread in threads:
        thread.start()
    later(lambda: future.set_result("all"))
    for thread in threads:
        thread.join(30)
    assert results == ["all"] * 6


def test_wait_for_cancels_what_has_not_begun():
    future = AwaitableFuture()

    async def main():
        await asyncio.wait_for(future, 0.05)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(main())
    assert future.cancelled()
    assert not future.set_running_or_notify_cancel()  # the worker sees that it need not begin


def test_work_that_has_begun_is_not_cancelled():
    future = AwaitableFuture()
    assert future.set_running_or_notify_cancel()

    async def main():
        await asyncio.wait_for(future, 0.05)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(main())
    future.set_result(1)
    assert future.result(0) == 1


def test_shield_keeps_it():
    future = AwaitableFuture()

    async def main():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(future), 0.05)
        assert not future.cancelled()
        future.set_result(1)

    asyncio.run(main())


def test_a_cancelled_future_cancels_its_coroutine():
    async def main():
        future = AwaitableFuture()
        later(future.cancel)
        with pytest.raises(asyncio.CancelledError):
            await future

    asyncio.run(main())


def test_it_may_be_fulfilled_after_the_loop_has_gone():
    future = AwaitableFuture()
    future.set_running_or_notify_cancel()

    async def main():
        asyncio.ensure_future(future)
        await asyncio.sleep(0.01)

    asyncio.run(main())
    future.set_result(1)
    assert future.result(0) == 1


def test_result_has_a_deadline_and_raises_the_builtin_timeout():
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        AwaitableFuture().result(0.3)
    assert 0.25 < time.monotonic() - began < 20


def test_result_returns_when_it_is_there():
    future = AwaitableFuture()
    later(lambda: future.set_result(3), 0.3)
    assert future.result() == 3


def test_a_timeout_as_the_works_own_error_is_passed_on():
    future = AwaitableFuture()
    future.set_exception(concurrent.futures.TimeoutError("the work's"))
    with pytest.raises(concurrent.futures.TimeoutError, match="the work's"):
        future.result()


def test_handing_over_takes_less_than_a_millisecond():
    """From a thread to the loop and back; about 70 microseconds on two idle cores."""
    requests = concurrent.futures.ThreadPoolExecutor(1)

    async def main():
        times = []
        for _ in range(300):
            future = AwaitableFuture()
            began = time.perf_counter()
            requests.submit(future.set_result, None)
            await future
            times.append(time.perf_counter() - began)
        return sorted(times)[len(times) // 20]  # a busy machine spoils the slower ones

    assert asyncio.run(main()) < 1e-3
    requests.shutdown()
