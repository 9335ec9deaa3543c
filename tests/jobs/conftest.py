"""What tests of workers share: workers in this process and in others, and the engine over them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from api.fake_engine import FakeEngine
from free_ports import free_port

from petals_win.jobs import links
from petals_win.jobs.keys import OwnSecrets
from petals_win.jobs.router import RoutedEngine
from petals_win.jobs.worker import Worker

KEY = "the-key-of-these-tests"
SCHEMES = ("grpc", "zmq")
TESTS = Path(__file__).resolve().parents[1]


class Here:
    """A worker in this process, over a scripted engine."""

    def __init__(
        self, folder: Path, scheme: str, slots: int = 32, most_waiting: int | None = None, pace: float = 0.001
    ):
        self.engine = FakeEngine(pace=pace)
        self.worker = Worker(self.engine, f"{scheme}-worker", slots=slots, most_waiting=most_waiting)
        self._folder, self._scheme, self._door, self.address = folder, scheme, None, None

    async def open(self, port: int = 0) -> links.Address:
        self._door = links.new_door(self._scheme, OwnSecrets(KEY, self._folder))
        bound = await self._door.open("127.0.0.1", port or free_port(), self.worker.answer)
        self.address = links.Address(self._scheme, "127.0.0.1", bound, self._door.pin)
        return self.address

    async def close(self) -> None:
        if self._door is not None:
            await self._door.close()
        await self.engine.close()


@contextlib.asynccontextmanager
async def routed(*workers: Here, key: str = KEY) -> AsyncIterator[RoutedEngine]:
    """The engine over workers of this process, started."""
    addresses = [await worker.open() for worker in workers]
    engine = RoutedEngine(addresses, lambda address: links.connect(address, key))
    try:
        await engine.start(lambda why: None)
        yield engine
    finally:
        await engine.close()
        for worker in workers:
            await worker.close()


class Child:
    """A worker in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "it ended before it told its address"
        self.address = links.parse_address(line)

    def order(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        assert self.process.stdout is not None and self.process.stdout.readline() == "done\n"


@pytest.fixture
def child(home: Path) -> Iterator[Callable[..., Child]]:
    """Starts workers with a scripted engine, each in a process; they end with the test."""
    children: list[Child] = []

    def start(scheme: str, port: int = 0) -> Child:
        command = [sys.executable, str(TESTS / "jobs" / "worker_process.py"), scheme, str(port or free_port())]
        pipe = subprocess.PIPE
        started = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, encoding="utf-8", env=os.environ)
        children.append(Child(started))
        return children[-1]

    yield start
    for each in children:
        each.process.kill()
        each.process.communicate()
