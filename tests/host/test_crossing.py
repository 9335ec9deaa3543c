"""Calls from thread to event loop: which of them travel together, and that none is left behind."""

import asyncio
import threading

import pytest

from petals_win.host.crossing import call_soon, set_out, together
from petals_win.host.loop import LoopThread


@pytest.fixture
def there(monkeypatch):
    """A thread with an event loop, and how often it was woken."""
    thread = LoopThread("there")
    thread.start()
    thread.woken = 0
    wake = thread.loop.call_soon_threadsafe

    def counted(*args, **how):
        thread.woken += 1
        return wake(*args, **how)

    monkeypatch.setattr(thread.loop, "call_soon_threadsafe", counted)
    yield thread
    thread.stop()


def all_of(count: int):
    """A list, a function that adds to it, and an event that is set when it has so many."""
    came, complete = [], threading.Event()

    def come(what):
        came.append((what, threading.current_thread().name))
        if len(came) == count:
            complete.set()

    return came, come, complete


def test_what_an_event_loop_calls_in_one_turn_arrives_together_and_in_order(there):
    came, come, complete = all_of(8)

    async def here():
        for number in range(8):
            call_soon(there.loop, come, number)
        assert not came and there.woken == 0
        await asyncio.sleep(0)

    asyncio.run(here())
    assert complete.wait(10) and there.woken == 1
    assert came == [(number, "there") for number in range(8)]


def test_a_thread_without_a_loop_calls_at_once_or_together(there):
    came, come, complete = all_of(5)
    for number in range(2):
        call_soon(there.loop, come, number)
    assert there.woken == 2
    with together():
        for number in range(2, 5):
            call_soon(there.loop, come, number)
    assert complete.wait(10) and there.woken == 3
    assert [number for number, _ in came] == list(range(5))


def test_what_is_gathered_sets_out_before_its_thread_blocks(there):
    """A program in an event loop of its own may call what waits, as notebooks do."""

    async def seven():
        return 7

    async def here():
        return there.submit(seven()).result(10)

    assert asyncio.run(here()) == 7


def test_a_loop_that_has_ended_leaves_nothing_behind(there):
    came, come, complete = all_of(2)
    loop = asyncio.new_event_loop()
    loop.call_soon(call_soon, there.loop, come, "first")
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    assert not came

    async def here():
        call_soon(there.loop, come, "second")
        await asyncio.sleep(0)

    asyncio.run(here())
    assert complete.wait(10)
    assert [what for what, _ in came] == ["first", "second"]


def test_a_closed_loop_calls_nothing(there):
    closed = asyncio.new_event_loop()
    closed.close()
    came, come, complete = all_of(1)
    with together():
        call_soon(closed, come, "nowhere")
        call_soon(there.loop, come, "here")
    assert complete.wait(10) and [what for what, _ in came] == ["here"]
    set_out()


def test_what_was_handed_over_before_the_end_is_begun_and_ended():
    thread = LoopThread("short")
    thread.start()

    async def long():
        await asyncio.sleep(60)

    async def here():
        future = thread.submit(long())
        await asyncio.to_thread(thread.stop)
        with pytest.raises(asyncio.CancelledError):
            await future

    asyncio.run(asyncio.wait_for(here(), 30))
