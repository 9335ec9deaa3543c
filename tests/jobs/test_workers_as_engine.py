"""The suite that every engine passes, through a worker: in this process and in another, over each transport."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
from engines.contract import EngineContract, Subject, started
from jobs.conftest import Here, routed

from petals_win.jobs import links
from petals_win.jobs.keys import shared_key
from petals_win.jobs.router import RoutedEngine


class _Scripted(EngineContract):
    def goes_on_with(self, ids: list[int], halves: list[tuple[int, ...]]) -> None:
        """A scripted engine answers from the beginning of its script."""
        assert list(halves[0]) == ids[:8]


class _Here(_Scripted):
    scheme = ""

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.folder = tmp_path / "worker"

    @contextlib.asynccontextmanager
    async def subject(self) -> AsyncIterator[Subject]:
        worker = Here(self.folder, self.scheme)

        @contextlib.asynccontextmanager
        async def full() -> AsyncIterator[None]:
            worker.engine.full = True
            yield
            worker.engine.full = False

        async with routed(worker) as engine:
            yield Subject(engine, lambda: worker.engine.running + worker.worker.load.running, full)


class TestOverGrpc(_Here):
    scheme = "grpc"


class TestOverZmq(_Here):
    scheme = "zmq"


class _InAChild(_Scripted):
    scheme = ""

    @pytest.fixture(autouse=True)
    def _child(self, child):
        self.child = child(self.scheme)

    @contextlib.asynccontextmanager
    async def subject(self) -> AsyncIterator[Subject]:
        key = shared_key(None, make=False)
        engine = RoutedEngine([self.child.address], lambda address: links.connect(address, key))
        (worker,) = engine.workers

        def held() -> int:
            """What the worker says; after its end nothing."""
            return worker.running + (worker.state.running + worker.state.waiting if worker.state else 0)

        @contextlib.asynccontextmanager
        async def full() -> AsyncIterator[None]:
            self.child.order("full 1")
            yield
            self.child.order("full 0")

        async with started(engine):
            yield Subject(engine, held, full)


class TestInAChildOverGrpc(_InAChild):
    scheme = "grpc"


class TestInAChildOverZmq(_InAChild):
    scheme = "zmq"
