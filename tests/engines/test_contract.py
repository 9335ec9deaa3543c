"""The suite that every engine passes, on each that there is."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from api.fake_engine import FakeEngine
from api.serving import serving
from contract import EngineContract, Subject, started
from nodes_here import NodeHere, nodes_here
from tiny_chat import tiny_chat_model
from words_runtime import described, described_once

from petals_win.engines import local_blocks, onnx_turns
from petals_win.engines.command import CommandEngine
from petals_win.engines.command_cli import CliEngine
from petals_win.engines.local import LocalEngine
from petals_win.engines.onnx import OnnxEngine
from petals_win.engines.onnx_steps import BatchedSteps
from petals_win.engines.openai import OpenAIEngine
from petals_win.engines.registry import EngineSettings, find_engine
from petals_win.engines.text import TextEngine
from petals_win.models.onnx_conversion import convert_to_onnx
from petals_win.node.budget import CacheBudget, Share

CONTEXT = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("chat") / "tiny", context=CONTEXT, ends=0)


@pytest.fixture(scope="module")
def nodes(folder):
    with nodes_here(folder, ["0:2", "2:4"]) as nodes:
        yield nodes


class TestFake(EngineContract):
    """The engine of the API's tests: what they show is worth something only if it does as the others do."""

    def goes_on_with(self, ids: list[int], halves: list[tuple[int, ...]]) -> None:
        """It answers a script, from its beginning."""
        assert list(halves[0]) == ids[:8]

    @contextlib.asynccontextmanager
    async def subject(self) -> AsyncIterator[Subject]:
        engine = FakeEngine()

        @contextlib.asynccontextmanager
        async def full() -> AsyncIterator[None]:
            engine.full = True
            yield
            engine.full = False

        async with started(engine):
            yield Subject(engine, lambda: engine.running, full)


class TestLocal(EngineContract):
    @pytest.fixture(autouse=True)
    def _prepared(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch

    @contextlib.asynccontextmanager
    async def subject(self) -> AsyncIterator[Subject]:
        opened = await asyncio.to_thread(find_engine("local"), EngineSettings(str(self.folder)))
        assert isinstance(opened, TextEngine) and isinstance(opened.tokens, LocalEngine)
        budget, blocks = opened.tokens._blocks._budget, opened.tokens._blocks

        @contextlib.asynccontextmanager
        async def full() -> AsyncIterator[None]:
            with self.monkeypatch.context() as within:
                within.setattr(local_blocks, "_PATIENCE_S", 0.5)
                everything = await _take_all(budget)
                yield
                everything.release()

        async with started(opened):
            yield Subject(opened, lambda: budget.total_bytes - budget.bytes_left + len(blocks._open), full)


class OfPrograms(EngineContract):
    """What a program computes that an engine started. `path` is its description, `at_once` how many answers it has room for."""

    path: str
    at_once = 4

    @contextlib.asynccontextmanager
    async def subject(self) -> AsyncIterator[Subject]:
        opened = await asyncio.to_thread(find_engine("command"), EngineSettings(self.path))
        assert isinstance(opened, CommandEngine | CliEngine)
        places = opened._places

        @contextlib.asynccontextmanager
        async def full() -> AsyncIterator[None]:
            async with contextlib.AsyncExitStack() as taken:
                for _ in range(self.at_once):
                    await taken.enter_async_context(places.one())
                places.patience_s = 0.2
                yield
            places.patience_s = 30

        async with started(opened):
            yield Subject(opened, lambda: opened.running, full, self.filling)

    def filling(self, length: int) -> str:
        return "w" * length


class TestCommand(OfPrograms):
    lacks = frozenset({"tools", "logprobs", "token ids", "embeddings"})

    @pytest.fixture(autouse=True)
    def _prepared(self, tmp_path):
        self.path = described(tmp_path)

    def filling(self, length: int) -> str:
        return "word " * length


class TestCommandForEachQuestion(OfPrograms):
    """The dialect "cli"."""

    lacks = frozenset({"tools", "logprobs", "token ids", "embeddings", "counts along"})

    @pytest.fixture(autouse=True)
    def _prepared(self, folder, tmp_path):
        self.path = described_once(
            tmp_path, model=f"tokenizer = {json.dumps(str(folder))}", limits=f"at_once = {self.at_once}"
        )


class TestOpenAI(EngineContract):
    """In front of another petals-win, whose answers are scripted."""

    lacks = frozenset({"told ids"})

    def goes_on_with(self, ids: list[int], halves: list[tuple[int, ...]]) -> None:
        assert list(halves[0]) == ids[:8]

    @contextlib.asynccontextmanager
    async def subject(self) -> AsyncIterator[Subject]:
        fake = FakeEngine()
        with serving(fake, max_running=64) as served:
            settings = EngineSettings("", base_url=f"{served.url}/v1")
            opened = await asyncio.to_thread(find_engine("openai"), settings)
            assert isinstance(opened, OpenAIEngine)

            @contextlib.asynccontextmanager
            async def full() -> AsyncIterator[None]:
                fake.full = True
                yield
                fake.full = False

            async with started(opened):
                yield Subject(opened, lambda: opened.running + fake.running, full)


@pytest.fixture(scope="module")
def onnx_folder(folder, tmp_path_factory) -> Path:
    return convert_to_onnx(str(folder), tmp_path_factory.mktemp("onnx") / "tiny", precision="fp32", device="cpu")


class TestOnnx(EngineContract):
    """By batches, and by a Generator for each answer, as on cards. What was converted gives logits, and no hidden states."""

    lacks = frozenset({"embeddings"})

    @pytest.fixture(autouse=True, params=["batches", "one by one"])
    def _prepared(self, request, onnx_folder, monkeypatch):
        self.folder, self.monkeypatch = onnx_folder, monkeypatch
        if request.param == "one by one":
            monkeypatch.setattr(BatchedSteps, "of", lambda *_: None)

    @contextlib.asynccontextmanager
    async def subject(self) -> AsyncIterator[Subject]:
        opened = await asyncio.to_thread(find_engine("onnx"), EngineSettings(str(self.folder)))
        assert isinstance(opened, TextEngine) and isinstance(opened.tokens, OnnxEngine)
        engine, steps = opened.tokens, opened.tokens.steps

        @contextlib.asynccontextmanager
        async def full() -> AsyncIterator[None]:
            with self.monkeypatch.context() as within:
                within.setattr(onnx_turns, "PATIENCE_S", 0.5)
                within.setattr(steps, "budget", 0)
                yield

        async with started(opened):
            yield Subject(opened, lambda: engine.held, full)


class TestPetals(EngineContract):
    @pytest.fixture(autouse=True)
    def _prepared(self, folder, nodes, monkeypatch):
        self.folder, self.nodes, self.monkeypatch = folder, nodes, monkeypatch
        for node in nodes:
            node.make_room_for(64 * CONTEXT)

    @contextlib.asynccontextmanager
    async def subject(self) -> AsyncIterator[Subject]:
        nodes: list[NodeHere] = self.nodes
        settings = EngineSettings(str(self.folder), (nodes[0].peer,))
        opened = await asyncio.to_thread(find_engine("petals"), settings)

        @contextlib.asynccontextmanager
        async def full() -> AsyncIterator[None]:
            with self.monkeypatch.context() as within:
                within.setattr("petals_win.client.session.PATIENCE_SECONDS", 1.0)
                everything = nodes[1].server.dht.run_coroutine(lambda *_: _take_all(nodes[1].budget))
                yield
                nodes[1].server.dht.run_coroutine(lambda *_: _release(everything))

        async with started(opened):
            yield Subject(opened, lambda: sum(n.budget.total_bytes - n.budget.bytes_left for n in nodes), full)


async def _take_all(budget: CacheBudget) -> Share:
    """On the budget's event loop, as a long chat would."""
    return await budget.admit(budget.total_bytes, budget.total_bytes, budget.total_bytes, 5)


async def _release(share: Share) -> None:
    share.release()
