"""The engine "petals" where nodes have little room: chats share it, wait for it, and are told the truth about it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from nodes_here import NodeHere, nodes_here
from tiny_chat import tiny_chat_model

from petals_win.client import session as remote_session
from petals_win.client.routes import Routes
from petals_win.engines.base import (
    ContextTooLong,
    GenerationRequest,
    SwarmFailed,
    SwarmFull,
    SwarmRefused,
    Token,
    Usage,
)
from petals_win.engines.petals import PetalsEngine
from petals_win.engines.text import TextEngine
from petals_win.node import served

CONTEXT = 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("chat") / "tiny", context=CONTEXT, ends=0)


@pytest.fixture(scope="module")
def swarm(folder):
    with nodes_here(folder, ["0:2", "2:4"]) as nodes:
        yield nodes


@pytest.fixture
def nodes(swarm) -> list[NodeHere]:
    for node in swarm:
        node.make_room_for(CONTEXT)
    return swarm


def use(folder: Path, nodes: list[NodeHere], action: Callable[[TextEngine], Awaitable], seconds: float = 100):
    """Run a coroutine function on an engine that follows the swarm; afterwards no node holds anything."""

    async def within():
        engine = TextEngine(await asyncio.to_thread(PetalsEngine.connect, str(folder), [nodes[0].peer]))
        try:
            await engine.start(lambda why: pytest.fail(str(why)))
            result = await asyncio.wait_for(action(engine), seconds)
            assert await soon(lambda: all(taken(node) == 0 for node in nodes)), "memory did not come back"
            return result
        finally:
            await engine.close()

    return asyncio.run(within())


async def soon(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


def taken(node: NodeHere) -> int:
    return node.budget.total_bytes - node.budget.bytes_left


def chat(text: str = "Hello", **settings) -> GenerationRequest:
    return GenerationRequest(model="tiny", messages=({"role": "user", "content": text},), **settings)


async def answer(engine: TextEngine, asked: GenerationRequest) -> tuple[str, int]:
    """Text and number of tokens."""
    text, count = "", 0
    async for event in engine.generate(asked):
        match event:
            case Token(piece):
                text += piece
            case Usage():
                count = event.completion_tokens
    return text, count


def banned(engine: TextEngine) -> list[object]:
    manager = engine.tokens._nodes
    return [peer for node in engine.status().peers if (peer := node.peer_id) in manager.state.banned_peers]


def routes(engine: TextEngine) -> list[int]:
    """How many servers each block has in the client's view."""
    return [len(block.servers) for block in engine.tokens._nodes.state.sequence_info.block_infos]


def test_four_chats_without_a_limit_and_then_a_fifth(folder, nodes):
    """Each may become as long as the context, and the nodes have room for one of that length."""

    async def ask(engine):
        chats = [engine.generate(chat(f"Number {n}")) for n in range(4)]
        firsts = await asyncio.gather(*(anext(generation) for generation in chats))
        assert all(isinstance(first, Token) for first in firsts)
        fifth = await answer(engine, chat(max_tokens=5))
        assert fifth[1] == 5
        for generation in chats:
            await generation.aclose()
        assert banned(engine) == [] and min(routes(engine)) == 1

    use(folder, nodes, ask)


def test_chats_that_grow_beyond_what_there_is_are_all_answered(folder, nodes, monkeypatch):
    """Two are let in, and both come to want more than is left. Who starts over goes on with the same text."""
    monkeypatch.setattr(served, "PIECE_TOKENS", 32)
    for node in nodes:
        node.make_room_for(170)
    make, routes_made = Routes.open, []

    async def counted(routes, *where):
        routes_made.append(where)
        return await make(routes, *where)

    async def ask(engine):
        asked = [chat(f"Number {n}", max_tokens=130, temperature=0) for n in range(2)]
        monkeypatch.setattr(Routes, "open", counted)
        at_once = await asyncio.gather(*(answer(engine, each) for each in asked))
        assert len(routes_made) > 2, "nobody had to start over, so the test shows nothing"
        assert [count for _, count in at_once] == [130] * 2
        assert banned(engine) == []
        assert at_once == [await answer(engine, each) for each in asked]

    use(folder, nodes, ask)


def test_a_chat_waits_until_another_has_ended_and_whoever_leaves_the_line_frees_it(folder, nodes):
    async def ask(engine):
        long = engine.generate(chat("x" * 3000))
        await anext(long)
        left = asyncio.create_task(answer(engine, chat("y" * 100, max_tokens=5)))
        behind = asyncio.create_task(answer(engine, chat("z" * 100, max_tokens=5)))
        assert await soon(lambda: len(nodes[0].budget._line) == 2)
        left.cancel()
        assert await soon(left.done), "whoever goes need not wait"
        assert await soon(lambda: len(nodes[0].budget._line) == 1)
        await long.aclose()
        assert (await behind)[1] == 5
        assert banned(engine) == []

    use(folder, nodes, ask)


def test_the_node_s_own_sentence_comes_when_the_wait_was_in_vain(folder, nodes, monkeypatch):
    monkeypatch.setattr(remote_session, "PATIENCE_SECONDS", 1.0)

    async def ask(engine):
        long = engine.generate(chat("x" * 3000))
        await anext(long)
        with pytest.raises(SwarmFull, match="sets aside for conversations are taken by 1 of them, and none ended"):
            await answer(engine, chat("y" * 100, max_tokens=5))
        assert isinstance(await anext(long), Token), "the one that is in goes on"
        await long.aclose()
        assert banned(engine) == [] and min(routes(engine)) == 1

    use(folder, nodes, ask)


def test_what_the_nodes_hold_is_the_context_that_is_offered(folder, nodes):
    nodes[0].make_room_for(700)
    nodes[1].make_room_for(900)

    async def ask(engine):
        assert engine.models()[0].context_length == 700
        with pytest.raises(ContextTooLong) as refused:
            await answer(engine, chat("x" * 700))
        assert refused.value.context_length == 700
        assert engine.tokens._nodes.state.rpc_info is None, "nothing was computed"
        assert (await answer(engine, chat("x" * 600, temperature=0)))[1] == 700 - 604

    use(folder, nodes, ask)


def test_a_refusal_is_told_at_once_and_bans_nobody(folder, nodes, monkeypatch):
    """The node holds less than the client was told."""

    async def ask(engine):
        nodes[1].budget.total_bytes = 300 * nodes[1].service.span.cache_bytes_per_token
        with pytest.raises(SwarmRefused, match="at most 300 tokens of one conversation, but 504 came"):
            await answer(engine, chat("x" * 500, max_tokens=5))
        assert banned(engine) == [] and min(routes(engine)) == 1
        assert (await answer(engine, chat(max_tokens=5)))[1] == 5

    use(folder, nodes, ask)


def test_a_failure_is_called_a_failure(folder, nodes, monkeypatch):
    def broken(*_args, **_more):
        raise RuntimeError("the\x1b[31m cable \x00is loose")

    async def ask(engine):
        engine.tokens._nodes.config.max_retries = 2
        with monkeypatch.context() as within:
            within.setattr(nodes[0].service.span, "advance", broken)
            with pytest.raises(SwarmFailed, match=r"the \[31m cable is loose"):
                await answer(engine, chat(max_tokens=5))

    use(folder, nodes, ask)


@pytest.mark.parametrize(
    ("family", "context", "changes"),
    [("qwen3", 256, {"head_dim": 18}), ("gpt_neox", 32_768, {}), ("deepseek_v3", 131_072, {})],
    ids=["odd heads", "no grouped heads", "keys and values of different sizes"],
)
def test_three_chats_at_once_with_any_context_and_any_heads(tmp_path, family, context, changes):
    folder = tiny_chat_model(tmp_path / "tiny", family, context=context, ends=8, **changes)
    with nodes_here(folder, ["0:3", "3:4"]) as nodes:

        async def ask(engine):
            assert engine.models()[0].context_length == context
            counts = await asyncio.gather(*(answer(engine, chat(f"Number {n}")) for n in range(3)))
            assert all(count > 0 for _, count in counts) and banned(engine) == []

        use(folder, nodes, ask)


def test_a_prompt_of_several_thousand_tokens_without_grouped_heads(tmp_path):
    """Upstream's limits for such models are 2,048 tokens for a session and for a request."""
    folder = tiny_chat_model(tmp_path / "tiny", context=131_072, ends=0, num_key_value_heads=4)
    with nodes_here(folder, ["0:4"]) as nodes:

        async def ask(engine):
            assert engine.models()[0].context_length == 131_072
            assert (await answer(engine, chat("word " * 1200, max_tokens=20)))[1] == 20

        use(folder, nodes, ask)


def test_memory_that_runs_out_on_the_device_is_no_failure(folder, nodes, monkeypatch):
    monkeypatch.setattr(remote_session, "PATIENCE_SECONDS", 1.5)

    def no_memory(*_args, **_more):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    async def ask(engine):
        with monkeypatch.context() as within:
            within.setattr(nodes[0].service.span, "open", no_memory)
            with pytest.raises(SwarmFull, match="no memory left"):
                await answer(engine, chat(max_tokens=5))
        assert banned(engine) == []

    use(folder, nodes, ask)
