"""Chats by HTTP and the memory of processes, as scripts/chats sees them, on a scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys

import psutil
import pytest
from api.fake_engine import FakeEngine
from api.serving import serving

from petals_win.bench.chats import Chat, Chats
from petals_win.bench.watching import MemoryWatch

CONTEXT = 2000  # of the engine


def ask(texts: list[str], **settings) -> list[Chat]:
    async def together(url: str) -> list[Chat]:
        async with Chats(url, 30) as chats:
            assert chats.context == CONTEXT
            return (await chats.at_once(texts, **settings))[0]

    with serving(FakeEngine(0.0)) as served:
        return asyncio.run(together(served.url))


def test_what_counts_as_an_answer():
    by_itself, to_the_end, broken = ask(["count 5", "count 3000", "break"])
    assert by_itself.is_whole(CONTEXT) and by_itself.reason == "stop"
    assert to_the_end.is_whole(CONTEXT) and to_the_end.length == CONTEXT
    assert not to_the_end.is_whole(CONTEXT + 1), "one that ends before the context does"
    assert not broken.is_whole(CONTEXT) and broken.error.startswith("status 503")
    (cut,) = ask(["count 5"], max_tokens=3)
    assert cut.is_whole(CONTEXT, 3) and not cut.is_whole(CONTEXT) and cut.tokens == 3


def test_in_a_row_with_a_look_after_each():
    async def one_by_one(url: str) -> list[int]:
        seen: list[int] = []
        async with Chats(url, 30) as chats:
            row = await chats.in_a_row(["say a", "say b c"], lambda: seen.append(engine.completed))
        assert [chat.reason for chat in row] == ["stop", "stop"]
        return seen

    with serving(engine := FakeEngine(0.0)) as served:
        assert asyncio.run(one_by_one(served.url)) == [1, 2]


def test_an_api_that_has_gone_is_no_answer():
    async def alone(api: contextlib.ExitStack) -> Chat:
        async with Chats(api.enter_context(serving(FakeEngine(0.0))).url, 30) as chats:
            await asyncio.to_thread(api.close)
            return await chats.ask("say a")

    with contextlib.ExitStack() as api:
        chat = asyncio.run(alone(api))
    assert chat.reason == "error" and chat.error.startswith("ConnectError")


def test_the_most_memory_is_kept_of_a_process_that_has_ended():
    program = "import sys; held = bytearray(60_000_000); sys.stdin.readline(); del held; print(1, flush=True); sys.stdin.readline()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", program], **pipes)
    try:
        with MemoryWatch({"it": process.pid}) as watch:
            assert process.stdin is not None and process.stdout is not None
            while watch.look()["it"] < 60_000_000:
                assert process.poll() is None
            process.stdin.write("\n")
            process.stdin.flush()
            process.stdout.readline()
            assert watch.look()["it"] < 60_000_000 <= watch.most["it"]
            process.kill()
            process.wait()
            assert watch.look() == {} and watch.most["it"] >= 60_000_000
    finally:
        process.kill()
        process.wait()
    with pytest.raises(psutil.NoSuchProcess):
        MemoryWatch({"it": process.pid})
