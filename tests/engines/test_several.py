"""Several engines as one: what is loaded when, who waits for it, and who goes."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
from api.fake_engine import FakeEngine
from contract import EngineContract, Subject, soon, started, whole

from petals_win.engines import member, room, several
from petals_win.engines.base import (
    EngineClosed,
    Finished,
    Full,
    GenerationRequest,
    Loads,
    ModelCard,
    ModelNotFound,
    Token,
)
from petals_win.engines.member import NotLoaded
from petals_win.engines.offers import Offer
from petals_win.engines.several import SeveralEngines
from petals_win.errors import UserError

GB = 10**9


class Disk:
    """Models that can be loaded into a PC that has so much memory: a name and its size in GB each.

    load: what is waited for within a load. loads: how often each was loaded. open: those that are in memory.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, memory: float = 100, **models: float):
        self.models, self.memory = models, memory
        self.loads: dict[str, int] = dict.fromkeys(models, 0)
        self.open: dict[str, FakeEngine] = {}
        self.begun, self.load = threading.Event(), threading.Event()
        self.load.set()
        self.failing: BaseException | None = None
        self.promises: dict[str, float] = {}
        self._lock = threading.Lock()
        monkeypatch.setattr(room, "available_bytes", lambda _device: self.free)
        monkeypatch.setattr(room, "SPARE", 0)

    @property
    def free(self) -> float:
        return (self.memory - sum(self.models[name] for name in self.open)) * GB

    def offer(self, name: str) -> Offer:
        disk = self

        class Loaded(FakeEngine):
            async def close(self) -> None:
                await super().close()
                disk.open.pop(name, None)

        def load() -> FakeEngine:
            with self._lock:
                self.loads[name] += 1
            self.begun.set()
            assert self.load.wait(30)
            if self.failing is not None:
                raise self.failing
            assert self.models[name] * GB <= self.free, f"{name} was loaded where it does not fit"
            self.open[name] = Loaded(model=name)
            return self.open[name]

        cards = (ModelCard(name, 1_700_000_000, 4000),)
        takes = {"cpu": int(self.models[name] * GB)}
        return Offer(
            "local", cards, load, True, takes, promised=lambda _: {"cpu": int(self.promises.get(name, 0) * GB)}
        )

    def engine(self, keep_alive: float = math.inf) -> SeveralEngines:
        return SeveralEngines([self.offer(name) for name in self.models], keep_alive)


@pytest.fixture
def disk(monkeypatch) -> Callable[..., Disk]:
    return lambda **models: Disk(monkeypatch, **models)


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """Nothing lingers for long."""
    for module in (member, several):
        monkeypatch.setattr(module, "LINGER_S", 0.05)


def use(engine: SeveralEngines, action: Callable[[], Awaitable[object]], seconds: float = 60) -> None:
    async def within() -> None:
        async with started(engine):
            await asyncio.wait_for(action(), seconds)

    asyncio.run(within())


def ask(engine: SeveralEngines, model: str, text: str = "count 3") -> Awaitable[object]:
    return whole(engine, GenerationRequest(model=model, messages=({"role": "user", "content": text},)))


def states(engine: SeveralEngines) -> dict[str, str]:
    return {each.models[0]: each.state for each in engine.status().engines}


def offered(**engines: FakeEngine) -> list[Offer]:
    """Engines that are there from the beginning, and stay."""
    return [Offer(name, tuple(engine.models()), lambda: FakeEngine()) for name, engine in engines.items()]


class TestSeveral(EngineContract):
    """Of one engine that is loaded when the first question comes."""

    def goes_on_with(self, ids: list[int], halves: list[tuple[int, ...]]) -> None:
        assert list(halves[0]) == ids[:8]

    @contextlib.asynccontextmanager
    async def subject(self) -> AsyncIterator[Subject]:
        fake = FakeEngine()
        engine = SeveralEngines([Offer("local", tuple(fake.models()), lambda: fake, True)], math.inf)

        @contextlib.asynccontextmanager
        async def full() -> AsyncIterator[None]:
            fake.full = True
            yield
            fake.full = False

        def held() -> int:
            lives = [each.life for each in engine._members if each.life is not None]
            return fake.running + sum(life.users for life in lives) + sum(each.waiting for each in engine._members)

        async with started(engine):
            yield Subject(engine, held, full)


def test_all_models_are_listed_and_each_question_goes_to_its_engine(disk):
    files = disk(a=1, b=2)
    engine = files.engine()

    async def go() -> None:
        assert [card.id for card in engine.models()] == ["a", "b"]
        assert engine.models()[0].context_length == 4000, "as it was offered"
        assert states(engine) == {"a": "unloaded", "b": "unloaded"} and engine.status().ready
        await ask(engine, "b")
        assert files.loads == {"a": 0, "b": 1} and len(files.open["b"].requests) == 1
        assert states(engine) == {"a": "unloaded", "b": "loaded"}
        assert engine.models()[1].context_length == 2000, "as its engine says"
        assert engine.models()[1].created == 1_700_000_000
        with pytest.raises(ModelNotFound, match="Ask for one of: a, b"):
            await ask(engine, "c")
        tokens = await engine.tokenize(GenerationRequest(model="a", prompt="some words"))
        assert await engine.detokenize("a", tokens) == "some words"
        assert len(await engine.embed("b", [100_000])) == 3
        assert files.loads == {"a": 1, "b": 1}

    use(engine, go)
    assert isinstance(engine, Loads) and files.open == {}, "all are closed"


def test_a_flood_loads_a_model_once(disk):
    files = disk(a=1)
    files.load.clear()
    engine = files.engine()

    async def go() -> None:
        asked = [asyncio.ensure_future(ask(engine, "a")) for _ in range(8)]
        assert await soon(files.begun.is_set)
        [told] = engine.status().engines
        assert (told.state, told.waiting, told.running, told.detail) == ("loading", 8, 0, "a is being loaded.")
        files.load.set()
        assert len({str(answer) for answer in await asyncio.gather(*asked)}) == 1
        assert files.loads == {"a": 1}

    use(engine, go)


def test_who_leaves_does_not_stop_a_load_that_others_wait_for(disk):
    files = disk(a=1)
    files.load.clear()
    engine = files.engine()

    async def go() -> None:
        leaving, staying = (asyncio.ensure_future(ask(engine, "a")) for _ in range(2))
        assert await soon(files.begun.is_set)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        files.load.set()
        await staying
        assert files.loads == {"a": 1}

    use(engine, go)


def test_a_load_that_nobody_waits_for_any_more_is_of_use_to_the_next(disk):
    files = disk(a=1)
    files.load.clear()
    engine = files.engine()

    async def go() -> None:
        leaving = asyncio.ensure_future(ask(engine, "a"))
        assert await soon(files.begun.is_set)
        leaving.cancel()
        await asyncio.wait({leaving})
        files.load.set()
        assert await soon(lambda: states(engine) == {"a": "loaded"})
        await ask(engine, "a")
        assert files.loads == {"a": 1}

    use(engine, go)


@pytest.mark.parametrize(
    "failing, said", [(UserError("The file is damaged."), "damaged"), (OSError("oops"), "its log")]
)
def test_a_load_that_fails_is_told_to_all_who_wait_and_tried_again_later(disk, monkeypatch, failing, said, caplog):
    files = disk(a=1, b=1)
    files.load.clear()
    files.failing = failing
    engine = files.engine()

    async def go() -> None:
        asked = [asyncio.ensure_future(ask(engine, "a")) for _ in range(3)]
        assert await soon(files.begun.is_set)
        files.load.set()
        errors = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(error, NotLoaded) and said in str(error) for error in errors), errors
        assert len(set(map(id, errors))) == 3, "each has its own"
        assert files.loads["a"] == 1
        status = engine.status()
        assert status.ready and [each.state for each in status.engines] == ["failed", "unloaded"]
        assert said in status.engines[0].detail and not status.engines[0].ready
        with pytest.raises(NotLoaded, match="a could not be loaded"):
            await ask(engine, "a")
        assert files.loads["a"] == 1, "not again at once"
        files.failing = None
        await ask(engine, "b")
        monkeypatch.setattr(several, "PAUSE_S", 0.0)  # which has passed
        await ask(engine, "a")
        assert files.loads["a"] == 2 and states(engine)["a"] == "loaded"

    use(engine, go)
    assert ("oops" in caplog.text) == isinstance(failing, OSError)


def test_the_one_that_was_not_used_for_longest_makes_room(disk):
    files = disk(memory=10, a=4, b=4, c=4)
    engine = files.engine()

    async def go() -> None:
        for model in ("a", "b", "a", "c"):
            await ask(engine, model)
            await asyncio.sleep(0.06)
        assert sorted(files.open) == ["a", "c"]
        await ask(engine, "b")
        assert sorted(files.open) == ["b", "c"] and files.loads == {"a": 1, "b": 2, "c": 1}

    use(engine, go)


def test_what_answers_of_others_may_still_take_counts(disk):
    files = disk(memory=10, a=4, b=4)
    files.promises["a"] = 3
    engine = files.engine()

    async def go() -> None:
        await ask(engine, "a")
        await ask(engine, "b")
        assert sorted(files.open) == ["b"]

    use(engine, go)


def test_no_more_go_than_have_to(disk):
    files = disk(memory=10, small=1, large=8, other=9)
    engine = files.engine()

    async def go() -> None:
        for model in ("small", "large", "other"):
            await ask(engine, model)
        assert sorted(files.open) == ["other", "small"]

    use(engine, go)


def test_one_at_a_time_on_a_card_whose_memory_nobody_can_tell(disk):
    files = disk(a=1, b=1, c=1)
    offers = [files.offer(name) for name in "abc"]
    cards = [Offer("onnx", each.cards, each.open, True, alone_on="dml") for each in offers[:2]]
    engine = SeveralEngines([*cards, offers[2]], math.inf)

    async def go() -> None:
        for model in ("c", "a", "b"):
            await ask(engine, model)
        assert sorted(files.open) == ["b", "c"]

    use(engine, go)


def test_what_never_fits_unloads_nobody(disk):
    files = disk(memory=10, a=4, b=12)
    engine = files.engine()

    async def go() -> None:
        await ask(engine, "a")
        with pytest.raises(Full, match="b does not fit into this PC now: it takes 11,444 MiB"):
            await ask(engine, "b")
        assert list(files.open) == ["a"] and files.loads["b"] == 0

    use(engine, go)


def test_a_model_in_use_is_not_unloaded_but_takes_its_turn(disk):
    """Others ask for it without a pause, and the other model is loaded all the same, as soon as those before have their answers."""
    files = disk(memory=10, a=6, b=6)
    engine = files.engine()

    async def go() -> None:
        begun: list[asyncio.Future[object]] = []

        async def flood() -> None:
            while True:
                begun.append(asyncio.ensure_future(ask(engine, "a", "count 200")))
                await asyncio.sleep(0.05)

        flooding = asyncio.create_task(flood())
        assert await soon(lambda: len(begun) > 3)
        first = files.open["a"]
        await ask(engine, "b")
        assert files.loads["b"] == 1 and first.closed == 1
        flooding.cancel()
        await asyncio.gather(*begun)
        assert first.cancelled == 0 and files.loads["a"] == 2, "all have got whole answers"

    use(engine, go)


def test_who_waits_for_room_waits_no_longer_than_told(disk, monkeypatch):
    monkeypatch.setattr(several, "PATIENCE_S", 0.4)
    files = disk(memory=10, a=6, b=6)
    engine = files.engine()

    async def go() -> None:
        reading = engine.generate(GenerationRequest(model="a", messages=({"role": "user", "content": "count 50"},)))
        await anext(reading)
        with pytest.raises(Full, match="b is not in memory, and was not loaded within"):
            await ask(engine, "b")
        assert await soon(lambda: states(engine)["b"] == "unloaded"), "nobody wants it any more"
        rest = [event async for event in reading]
        assert isinstance(rest[-2], Finished) and files.loads == {"a": 1, "b": 0}
        await ask(engine, "a")

    use(engine, go)


@pytest.mark.parametrize("keep_alive", [0.0, 0.3])
def test_an_idle_model_is_unloaded_in_time_and_loaded_again(disk, keep_alive):
    files = disk(a=1)
    engine = files.engine(keep_alive)

    async def go() -> None:
        reading = engine.generate(GenerationRequest(model="a", messages=({"role": "user", "content": "count 400"},)))
        async for event in reading:
            assert not isinstance(event, Token) or files.open, "it was unloaded while it answered"
        ended = time.monotonic()
        assert engine.expires()["a"] <= max(keep_alive, member.LINGER_S)
        assert await soon(lambda: not files.open)
        assert time.monotonic() - ended >= keep_alive - 0.05
        assert states(engine) == {"a": "unloaded"} and engine.expires() == {}
        await ask(engine, "a")
        assert files.loads == {"a": 2}

    use(engine, go)


def test_how_long_one_is_kept_may_be_said_for_each(disk):
    files = disk(a=1, b=1, c=1)
    engine = files.engine(keep_alive=60)

    async def go() -> None:
        for model in "abc":
            await ask(engine, model)
        engine.keep("a", 0)
        engine.keep("b", math.inf)
        assert await soon(lambda: sorted(files.open) == ["b", "c"])
        left = engine.expires()
        assert left["b"] == math.inf and 50 < left["c"] <= 60
        await ask(engine, "a")
        assert 50 < engine.expires()["a"] <= 60, "what was said is forgotten with the model"

    use(engine, go)


def test_what_stays_is_never_unloaded(disk):
    fake = FakeEngine(model="x")
    engine = SeveralEngines([*offered(petals=fake), disk(a=1).offer("a")], 0.1, [fake])

    async def go() -> None:
        await ask(engine, "x")
        engine.keep("x", 0)
        await ask(engine, "a")
        assert await soon(lambda: states(engine)["a"] == "unloaded")
        assert states(engine)["x"] == "loaded" and fake.closed == 0
        assert engine.expires() == {"x": math.inf}
        status = engine.status()
        assert status.num_blocks == 30 and [peer.name for peer in status.peers] == ["gaming-pc"]
        assert status.detail == "2 of 2 engines can answer; in memory: x."

    use(engine, go)


def test_ending_while_a_model_is_loaded(disk):
    files = disk(a=1)
    files.load.clear()
    engine = files.engine()

    async def go() -> None:
        asked = [asyncio.ensure_future(ask(engine, "a")) for _ in range(2)]
        assert await soon(files.begun.is_set)
        began = time.monotonic()
        await engine.close()
        errors = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(error, EngineClosed) for error in errors), errors
        assert time.monotonic() - began < 20, "it waited for the load"
        files.load.set()
        assert await soon(lambda: files.loads["a"] == 1 and not files.open), "what came too late is closed"

    use(engine, go)


class Lost(FakeEngine):
    """One that can be lost."""

    async def start(self, on_lost: Callable[[UserError], None]) -> None:
        self.lose = lambda: threading.Thread(target=on_lost, args=(UserError("p2pd has ended."),)).start()


def test_one_alone_that_is_lost_is_the_end():
    fake, lost = Lost(), []

    async def go() -> None:
        engine = SeveralEngines(offered(petals=fake), math.inf, [fake])
        await engine.start(lost.append)
        fake.lose()
        assert await soon(lambda: len(lost) == 1)
        await engine.close()

    asyncio.run(go())
    assert "p2pd has ended" in str(lost[0])


def test_of_several_the_others_go_on_and_the_lost_one_is_opened_anew(disk, monkeypatch):
    fakes = [Lost(model="x"), Lost(model="x")]
    offer = Offer("petals", tuple(fakes[0].models()), lambda: fakes[1])
    engine = SeveralEngines([offer, disk(a=1).offer("a")], math.inf, [fakes[0]])

    async def go() -> None:
        answering = asyncio.ensure_future(ask(engine, "x", "count 300"))
        assert await soon(lambda: fakes[0].running > 0)
        fakes[0].lose()
        assert await soon(lambda: states(engine)["x"] == "failed")
        with pytest.raises(NotLoaded, match="p2pd has ended"):
            await ask(engine, "x")
        assert fakes[0].closed == 0, "who is being answered may hear of it from the engine itself"
        await answering
        assert await soon(lambda: fakes[0].closed == 1)
        await ask(engine, "a")
        monkeypatch.setattr(several, "PAUSE_S", 0.0)  # which has passed
        await ask(engine, "x")
        assert states(engine)["x"] == "loaded" and fakes[1].completed == 1

    use(engine, go)


def test_the_promise_of_order(disk):
    """Two models that do not fit together, and questions for both without end: all are answered."""
    files = disk(memory=10, a=6, b=6)
    engine = files.engine()

    async def go() -> None:
        questions: Sequence[str] = "abbabaabbbaa" * 2
        await asyncio.gather(*(ask(engine, model, f"count {5 + n}") for n, model in enumerate(questions)))

    use(engine, go)
    assert files.loads["a"] + files.loads["b"] <= 8, files.loads
