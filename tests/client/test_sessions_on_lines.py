"""Sessions whose short steps share a line, over scripted nodes: what goes there, and what happens when it fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest
import torch
from scripted_swarm import BLOCKS, Node, Swarm, blocks_of
from test_session import check_steps, eventually, opened, run, tokens, two
from test_session import quickly as quickly  # a fixture

from petals_win.client import server_session
from petals_win.client.session import RemoteSession, SwarmBlocks
from petals_win.swarm import lines


async def with_lines(session: RemoteSession, *nodes: Node) -> None:
    """Returns when the lines to these nodes are open."""
    servers = [server for server in session._servers if server.peer_id in [node.peer_id for node in nodes]]
    await eventually(lambda: all(server._way is not None and server._way.line is not None for server in servers))


async def converse(session: RemoteSession, *nodes: Node, lengths: Sequence[int] = (1, 1, 1, 1), seed: int = 0) -> None:
    """Steps of these lengths, on the lines to `nodes` from the second one on, get what one process computes."""
    expected = blocks_of(0, BLOCKS)
    for number, length in enumerate(lengths):
        hidden = tokens(length, 1, 10 * seed + number)
        torch.testing.assert_close(await session.step(hidden), expected(hidden), rtol=1e-5, atol=1e-5)
        if not number:
            await with_lines(session, *nodes)
    await session.close()


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True), (False, False)])
def test_short_steps_go_on_a_line_where_a_node_has_lines(first, second):
    nodes = two()
    nodes[0].lines, nodes[1].lines = first, second
    swarm = Swarm(*nodes)
    # The first step opens the session, and one of nine tokens goes in chunks: both take the session's own stream.
    run(converse(opened(swarm), *(node for node in nodes if node.lines), lengths=(30, 1, 1, 9, 1)))
    assert [node.on_line for node in nodes] == [3 * node.lines for node in nodes]
    assert swarm.failures == []


def test_what_is_too_long_for_a_line_goes_singly(monkeypatch):
    monkeypatch.setattr(lines, "MOST_BYTES", 100)
    swarm = Swarm(*two())
    run(check_steps(swarm))
    assert swarm.failures == [] and [node.on_line for node in swarm.nodes] == [0, 0]


def test_a_node_without_lines_is_not_asked_at_each_step(monkeypatch):
    swarm, asked = Swarm(*two(takes_back=100, lines=False)), []
    monkeypatch.setattr(swarm, "call_binary_stream_handler", lambda *what: asked.append(what) or _refuse())
    run(check_steps(swarm, (1, 1, 1, 1)))
    assert len(asked) == 2 and swarm.failures == []


async def _refuse():
    raise ConnectionError("no such protocol")


@pytest.mark.parametrize("how", ["ends", "says that it has no such session", "answers nonsense"])
def test_a_line_that_fails_in_the_middle_of_steps_has_them_replayed_elsewhere(how, monkeypatch):
    monkeypatch.setattr(server_session, "SILENT_SECONDS", 30.0)  # it is not found out by asking
    first, second = two()

    async def script(request):
        if request.number != 2:
            return
        for line in first.open_lines.values():
            if how == "ends":
                line.close()
            else:
                line.send(request.metadata["session_id"], b"" if how.startswith("says") else b"\xff")
        await asyncio.Event().wait()

    first.script = script
    swarm = Swarm(first, second, Node("c", 0, 2))
    run(converse(opened(swarm), first, second, lengths=(5, 1, 1, 1)))
    assert swarm.failures == ["a"] and first.on_line == 2


def test_an_answer_to_what_was_pushed_can_be_lost_with_its_line(monkeypatch):
    """Before the client sends the step itself, which the node takes for one that it has answered."""
    monkeypatch.setattr(server_session, "SILENT_SECONDS", 30.0)
    first, second = two()
    swarm = Swarm(first, second, Node("c", 2, BLOCKS), request_timeout=100.0)
    session = opened(swarm)
    late: list[asyncio.Task[None]] = []

    async def answer_late(request):
        if request.number != 2:
            return
        (line,) = first.open_lines.values()
        send, way = line.send, session._servers[1]._way

        async def once_the_other_line_is_lost(answer):
            await eventually(lambda: way._line is None)
            assert send(*answer)

        monkeypatch.setattr(
            line, "send", lambda *answer: late.append(asyncio.create_task(once_the_other_line_is_lost(answer))) or True
        )

    async def answer_in_vain(request):
        if request.number == 2:
            assert request.pushed
            (line,) = second.open_lines.values()
            asyncio.get_running_loop().call_soon(line.close)  # what is sent in this turn is not written any more

    first.script, second.script = answer_late, answer_in_vain
    run(converse(session, first, second, lengths=(5, 1, 1)))
    assert len(late) == 1 and swarm.failures == ["b"]


def test_all_sessions_of_a_line_survive_its_end():
    first, second = two()
    waiting = []

    async def script(request):
        if len(waiting) < 4 and request.number >= 8:
            waiting.append(request)
            if len(waiting) == 4:
                for line in list(first.open_lines.values()):
                    line.close()
            await asyncio.Event().wait()

    first.script = script
    swarm = Swarm(first, second, Node("c", 0, 2), max_retries=9)
    blocks = SwarmBlocks(swarm)

    async def ask():
        await asyncio.gather(*(converse(blocks.open(100), first, second, seed=seed) for seed in range(4)))
        await eventually(lambda: all(node.streams == 0 for node in swarm.nodes))

    run(ask())
    assert len(waiting) == 4 and "b" not in swarm.failures


def test_a_line_that_ends_between_two_steps_costs_no_session_anything():
    swarm = Swarm(*two())

    async def ask():
        session, expected, ended = opened(swarm), blocks_of(0, BLOCKS), []
        for number in range(5):
            hidden = tokens(1, 1, number)
            torch.testing.assert_close(await session.step(hidden), expected(hidden), rtol=1e-5, atol=1e-5)
            await with_lines(session, *swarm.nodes)
            if number == 2:
                ended = [line for node in swarm.nodes for line in node.open_lines.values()]
                for line in ended:
                    line.close()
                while any(line in node.open_lines.values() for node in swarm.nodes for line in ended):
                    await asyncio.sleep(0.005)
        assert len(ended) == 2
        await session.close()

    run(ask())
    assert swarm.failures == [] and all(len(node.requests) == 5 for node in swarm.nodes)


def test_a_session_that_is_slow_or_cancelled_does_not_hold_up_others_on_its_line(monkeypatch):
    monkeypatch.setattr(server_session, "SILENT_SECONDS", 60.0)
    first, second = two()
    slow: list[str] = []

    async def script(request):
        if request.metadata["session_id"] in slow:
            await asyncio.Event().wait()

    first.script = script
    swarm = Swarm(first, second)
    blocks = SwarmBlocks(swarm)

    async def ask():
        one, other = blocks.open(100), blocks.open(100)
        for session in (one, other):
            await session.step(tokens(1))
            await with_lines(session, first, second)
        slow.append(one._servers[0].session_id)
        held = asyncio.create_task(one.step(tokens(1)))
        await eventually(lambda: first.on_line == 1)
        for number in range(3):
            await asyncio.wait_for(other.step(tokens(1, 1, number)), 20)
        assert not held.done()
        held.cancel()
        cancelled = time.monotonic()
        await asyncio.wait({held})
        await eventually(lambda: first.streams == 1)  # its stream has ended, and with it the session at the node
        assert time.monotonic() - cancelled < 20
        await other.step(tokens(1, 1, 9))
        (line,) = first.open_lines.values()  # the same one
        line.send(slow[0], b"late")  # nobody minds
        await other.step(tokens(1, 1, 10))
        await other.close()

    run(ask())
    assert swarm.failures == []


def test_after_a_node_was_silent_its_sessions_take_a_new_line():
    """The old one may lead through a connection that is no more, which nobody tells."""
    node, other = Node("a", 0, BLOCKS), Node("b", 0, BLOCKS)
    hangs = []

    async def script(request):
        if request.tokens == 1 and len(hangs) < 1:
            hangs.append(request)
            await asyncio.Event().wait()

    node.script = script
    swarm = Swarm(node, other)
    blocks = SwarmBlocks(swarm)

    async def ask():
        first = blocks.open(100)
        await first.step(tokens(2))
        await with_lines(first, node)
        before = list(node.open_lines.values())
        node.alive = False
        await first.step(tokens(1))
        assert swarm.failures == ["a"] and hangs
        swarm.avoided.clear()
        blocks.routes.succeeded(node.peer_id)
        node.alive = True
        second = blocks.open(100)
        await second.step(tokens(2))
        await with_lines(second, node)
        await second.step(tokens(2))
        assert second.route[0][0] == node.peer_id
        assert node.open_lines and not set(node.open_lines.values()) & set(before)
        for session in (first, second):
            await session.close()

    run(ask())
