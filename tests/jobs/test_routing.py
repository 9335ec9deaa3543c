"""Which worker a question goes to, what happens when workers fail, end and return, and who is let in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from api.fake_engine import MODEL
from engines.contract import soon, whole
from jobs.conftest import KEY, SCHEMES, Here, routed

from petals_win.engines.base import EngineClosed, Full, GenerationRequest, Token
from petals_win.errors import UserError
from petals_win.jobs import links, model
from petals_win.jobs.failures import LinkLost, LinkRefused, NoWorker, WorkerFailed
from petals_win.jobs.keys import OwnSecrets, shared_key
from petals_win.jobs.opening import open_workers
from petals_win.jobs.prefixes import Prompt
from petals_win.jobs.router import RoutedEngine

pytestmark = pytest.mark.parametrize("scheme", SCHEMES)


def asked(text: str, **more) -> GenerationRequest:
    return GenerationRequest(model=MODEL, messages=({"role": "user", "content": text},), **more)


def test_questions_are_shared_and_a_conversation_stays(scheme, tmp_path):
    async def run():
        here = [Here(tmp_path / name, scheme, pace=0.005) for name in ("a", "b")]
        async with routed(*here) as engine:
            await asyncio.gather(*(whole(engine, asked(f"count {30 + n}")) for n in range(8)))
            shares = [len(each.engine.requests) for each in here]
            first = asked("a " * 900, max_tokens=3)
            await whole(engine, first)
            told = (*first.messages, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "count 3"})
            before = [len(each.engine.requests) for each in here]
            known = engine._prefixes.known(Prompt(first))
            went = max(known, key=lambda address: known[address])
            await whole(engine, replace(first, messages=told))
            after = [len(each.engine.requests) for each in here]
            names = [worker.address for worker in engine.workers]
            return shares, went, names[[a - b for a, b in zip(after, before, strict=True)].index(1)]

    shares, went, second = asyncio.run(run())
    assert sum(shares) == 8 and max(shares) <= 5, shares
    assert second == went


def test_one_that_is_full_is_passed_over_and_two_that_are_say_so(scheme, tmp_path):
    async def run():
        here = [Here(tmp_path / name, scheme) for name in ("a", "b")]
        async with routed(*here) as engine:
            here[0].engine.full = True
            answers = [await whole(engine, asked("say yes")) for _ in range(3)]
            here[1].engine.full = True
            with pytest.raises(Full):
                await whole(engine, asked("say yes"))
            return answers

    assert [answer.text for answer in asyncio.run(run())] == ["yes"] * 3


def test_what_waits_at_a_worker_is_bounded(scheme, tmp_path):
    async def run():
        here = Here(tmp_path / "a", scheme, slots=1, most_waiting=1)
        async with routed(here) as engine:
            tasks = [asyncio.create_task(whole(engine, asked("wait"))) for _ in range(2)]
            assert await soon(lambda: (here.worker.load.running, here.worker.load.waiting) == (1, 1))
            with pytest.raises(Full, match="1 questions wait"):
                await whole(engine, asked("say yes"))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert await soon(lambda: here.worker.load.running == here.engine.running == 0)
            return await whole(engine, asked("say yes"))

    assert asyncio.run(run()).text == "yes"


def test_a_defect_is_tried_elsewhere_only_before_the_first_word(scheme, tmp_path):
    async def run():
        here = Here(tmp_path / "a", scheme)
        async with routed(here) as engine:
            pieces = []
            with pytest.raises(UserError, match="Its log tells more"):
                async for event in engine.generate(asked("crash")):
                    pieces.append(event)
            return pieces, len(here.engine.requests)

    pieces, requests = asyncio.run(run())
    assert [piece.text for piece in pieces if isinstance(piece, Token)] == ["two", " tokens"] and requests == 1


def test_a_worker_that_ends_is_given_nothing_new_and_ends_its_answers(scheme, tmp_path):
    async def run():
        here = [Here(tmp_path / name, scheme, pace=0.01) for name in ("a", "b")]
        async with routed(*here) as engine:
            running = asyncio.create_task(whole(engine, asked("count 60")))
            assert await soon(lambda: here[0].engine.running + here[1].engine.running == 1)
            ending, other = here if here[0].engine.running else here[::-1]
            ending.worker.drain()
            before = len(ending.engine.requests)
            answers = [await whole(engine, asked("say yes")) for _ in range(3)]
            assert len(ending.engine.requests) == before and len(other.engine.requests) == 3
            assert await ending.worker.drained(30)
            states = {worker.state for worker in engine.status().workers}
            return answers, await running, states

    answers, running, states = asyncio.run(run())
    assert len(answers) == 3 and running.usage.completion_tokens == 60 and states == {"ready", "draining"}


def test_kill_under_eight_answers(scheme, child, home):
    """Those without a word are answered elsewhere, the others end in one clear error; a worker that returns is taken back."""

    async def run():
        key = shared_key(None, make=False)
        engine = RoutedEngine([each.address for each in workers], lambda address: links.connect(address, key))
        await engine.start(lambda why: None)
        try:
            streams = [engine.generate(asked("count 900")) for _ in range(4)]
            for stream in streams:
                assert isinstance(await anext(stream), Token)
            waiting = [asyncio.create_task(whole(engine, asked("wait"))) for _ in range(4)]
            assert await soon(lambda: engine.workers[0].running + engine.workers[1].running == 8)
            on_first = engine.workers[0].running
            assert 0 < on_first < 8
            workers[0].process.kill()
            ends = await asyncio.gather(*(_rest(stream) for stream in streams))
            broken = [end for end in ends if isinstance(end, UserError)]
            assert all(isinstance(end, WorkerFailed) for end in broken), ends
            assert await soon(lambda: engine.workers[0].status().state == "gone")
            assert await soon(lambda: engine.workers[1].running == 4), "the four that wait are at the other one now"
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            child(scheme, workers[0].address.port)
            assert await soon(lambda: engine.workers[0].status().state == "ready", 60)
            return len(broken), (await whole(engine, asked("say yes"))).text
        finally:
            await engine.close()

    workers = [child(scheme), child(scheme)]
    # Two children have one certificate and key, since they have one home.
    broken, text = asyncio.run(run())
    assert 0 < broken < 4 and text == "yes"


async def _rest(stream):
    try:
        return [event async for event in stream]
    except UserError as error:
        return error


def test_a_short_soak_of_kills_and_returns(scheme, tmp_path):
    """Every question gets an answer or an error, however often workers end; see scripts for more of them."""

    async def run():
        here = [Here(tmp_path / name, scheme, pace=0) for name in ("a", "b")]
        ends = []
        async with routed(*here) as engine:
            ports = [each.address.port for each in here]

            async def keep_asking():
                while len(ends) < 1000 and not done.is_set():
                    try:
                        ends.append((await whole(engine, asked("count 20"))).usage.completion_tokens)
                    except (NoWorker, WorkerFailed, EngineClosed, LinkLost) as error:
                        ends.append(error)
                        await asyncio.sleep(0.02)
                    await asyncio.sleep(0.005)

            done = asyncio.Event()
            asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
            for kill in range(6):
                which = kill % 2
                await asyncio.sleep(0.1)
                await here[which]._door.close()
                await here[which].open(ports[which])
                assert await soon(lambda which=which: engine.workers[which].status().state == "ready", 60)
            assert await soon(lambda: ends.count(20) > 20, 60)
            done.set()
            await asyncio.wait_for(asyncio.gather(*asking), 30)
            assert [worker.running for worker in engine.workers] == [0, 0]
        return ends

    assert asyncio.run(run()).count(20) > 20


def test_without_a_worker(scheme, tmp_path):
    async def run():
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        nobody = links.Address(scheme, "127.0.0.1", port, "ab" * 32)
        engine = RoutedEngine([nobody], lambda address: links.connect(address, KEY))
        await engine.start(lambda why: None)
        status = engine.status()
        await engine.close()
        return status

    status = asyncio.run(run())
    assert not status.ready and status.workers[0].state == "gone" and status.detail.startswith("0 of 1 workers")


def test_a_wrong_key_is_refused_and_logged_once(scheme, tmp_path, caplog):
    async def run():
        here = Here(tmp_path / "a", scheme)
        address = await here.open()
        refusals = []
        for key in ("another-key-of-somebody", "another-key-of-somebody", "x" * 40):
            try:
                link = await links.connect(address, key)
                async for _ in link.call("Watch", model.hello(), 10):
                    raise AssertionError("it was let in")
            except LinkRefused as error:
                refusals.append(str(error))
        with pytest.raises(LinkRefused, match="behind the #"):
            await links.connect(replace(address, pin="ab" * 32), KEY)
        await here.close()
        return refusals

    with caplog.at_level(logging.WARNING):
        refusals = asyncio.run(run())
    assert len(refusals) == 3 and all("refuses the key" in refusal for refusal in refusals)
    told = [record.getMessage() for record in caplog.records if "is refused" in record.getMessage()]
    assert len(told) == 1 and told[0].startswith("127.0.0.1 is refused"), told
    assert KEY not in caplog.text and "another-key" not in caplog.text


def test_another_protocol_is_refused_with_a_sentence_for_both(scheme, tmp_path, monkeypatch, caplog):
    async def run():
        here = Here(tmp_path / "a", scheme)
        link = await links.connect(await here.open(), KEY)
        newer = model.Hello(protocol=9, oldest=8, version="9.9").SerializeToString()
        try:
            async for reply in link.call("Watch", newer, 10):
                model.state_in(reply)
        finally:
            await link.close()
            await here.close()

    with pytest.raises(LinkRefused, match="speaks the protocols 8 to 9.*speaks 1 to 1. Update the older one"):
        asyncio.run(run())
    assert "petals-win 9.9" in caplog.text


def test_garbage_at_the_port(scheme, tmp_path):
    """Strangers' bytes, and nonsense of one who has the key: the worker goes on, and holds nothing for them."""

    async def run():
        here = Here(tmp_path / "a", scheme)
        address = await here.open()
        for number in range(60):
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", address.port)
                writer.write(
                    os.urandom(1 + number * 50)
                    if number % 3
                    else b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(200)
                )
                writer.close()
        link = await links.connect(address, KEY)
        for number in range(150):
            method = model.METHODS[number % len(model.METHODS)]
            junk = os.urandom(number) if number % 2 else model.put_question(asked("say yes"))[: -1 - number % 20]
            if method == "Watch":
                junk = b"\xff" + junk  # no message, so that it ends
            replies = [reply async for reply in link.call(method, junk, 10)]
            assert replies, method
        with pytest.raises(UserError):
            async for reply in link.call("Generate", b"\x0a" + b"x" * model.MOST_BYTES, 10):
                model.event_in(reply)
        await link.close()
        link = await links.connect(address, KEY)
        question = model.put_question(asked("say yes"))
        events = [model.event_in(reply) async for reply in link.call("Generate", question, 10)]
        await link.close()
        held = here.worker.load.running + here.engine.running
        await here.close()
        return events[0], held

    first, held = asyncio.run(run())
    assert first == Token("yes") and held == 0


def test_what_the_user_types(scheme, home):
    with pytest.raises(UserError, match="key of the workers is not there"):
        open_workers([f"{scheme}://127.0.0.1:31400"], None)
    shared_key(None, make=True)
    assert shared_key(None, make=True) == shared_key(None, make=False)
    (worker,) = open_workers([f"{scheme}://localhost:31400, "], None).workers
    assert worker.address == f"{scheme}://localhost:31400"
    with pytest.raises(UserError, match="lacks what its worker is known by"):
        open_workers([f"{scheme}://pc1:31400"], None)
    for wrong in ("pc1:31400", f"{scheme}://pc1", f"{scheme}://pc1:99999", f"{scheme}://pc1:1#abc", "http://pc1:1"):
        with pytest.raises(UserError, match="no address of a worker"):
            open_workers([wrong], None)
    assert OwnSecrets.kept("k").pin(scheme) == OwnSecrets.kept("k").pin(scheme)


def test_workers_that_start_together_for_the_first_time_have_the_same_keys(scheme, home):
    with ThreadPoolExecutor(8) as at_once:
        keys = set(at_once.map(lambda _: shared_key(None, make=True), range(8)))
        pins = set(at_once.map(lambda _: OwnSecrets.kept("k").pin(scheme), range(8)))
    assert len(keys) == len(pins) == 1
