"""Sockets of ZeroMQ on loops that watch sockets and on such as do not: everything arrives, and nothing is left behind."""

from __future__ import annotations

import asyncio
import threading

import pytest
import zmq

from petals_win.jobs.zmq_pump import Frames, Pump, new_socket

MESSAGES = 500


class WatchesNothing(asyncio.SelectorEventLoop):
    """As the loop of Windows."""

    def add_reader(self, fd, callback, *args):
        raise NotImplementedError


@pytest.mark.parametrize("loop", [asyncio.SelectorEventLoop, WatchesNothing])
def test_all_arrives_in_both_directions(loop):
    before = set(threading.enumerate())

    async def there_and_back() -> tuple[list[Frames], list[Frames]]:
        context = zmq.Context(), zmq.Context()
        router, dealer = new_socket(context[0], zmq.ROUTER), new_socket(context[1], zmq.DEALER)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        came: tuple[list[Frames], list[Frames]] = [], []
        complete = asyncio.Event()

        def answer(batch: list[tuple[Frames, str]]) -> None:
            for (name, *frames), _ in batch:
                came[0].append(frames)
                here.send([name, *frames])

        def note(batch: list[tuple[Frames, str]]) -> None:
            came[1].extend(frames for frames, _ in batch)
            if len(came[1]) == MESSAGES:
                complete.set()

        def lost(frame: bytes) -> None:
            raise AssertionError(f"{frame} was not sent")

        here = Pump(context[0], router, answer, lost, {})
        there = Pump(context[1], dealer, note, lost, {})
        dealer.connect(f"tcp://127.0.0.1:{port}")
        for number in range(MESSAGES):
            there.send([b"M", number.to_bytes(4, "big")])
            if number % 50 == 0:  # some alone, some while others are read
                await asyncio.sleep(0.01)
        await asyncio.wait_for(complete.wait(), 30)
        await asyncio.gather(here.stop(), there.stop(), there.stop())
        there.send([b"M", b"late"])
        return came

    with asyncio.Runner(loop_factory=loop) as runner:
        came = runner.run(there_and_back())
    expected = [[b"M", number.to_bytes(4, "big")] for number in range(MESSAGES)]
    assert came == (expected, expected)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("loop", [asyncio.SelectorEventLoop, WatchesNothing])
def test_what_cannot_be_sent_is_told(loop):
    async def to_nobody() -> bytes:
        context = zmq.Context()
        socket = new_socket(context, zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.bind_to_random_port("tcp://127.0.0.1")
        told: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        pump = Pump(context, socket, lambda batch: None, told.set_result, {})
        pump.send([b"nobody", b"M"])
        try:
            return await asyncio.wait_for(told, 30)
        finally:
            await pump.stop()

    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(to_nobody()) == b"nobody"
