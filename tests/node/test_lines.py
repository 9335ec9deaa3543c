"""Steps and pushes that come to a node on lines, and what a peer may do there."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import torch
from hivemind import MSGPackSerializer, PeerID, deserialize_torch_tensor
from hivemind.proto import runtime_pb2

from node.test_petals_rpc import PEER, Client, NextServer, freed, run, states, step, tensor_of
from node.test_petals_rpc import rpc as rpc  # a fixture
from node.test_petals_rpc import span as span  # a fixture
from petals_win.node import inbox
from petals_win.node import lines as served_lines
from petals_win.swarm.lines import Line

STRANGER = PeerID(b"a stranger")


@asynccontextmanager
async def line_to(rpc, name: str = "mine", peer: PeerID = PEER):
    """The peer's end of a line to the node, which has said its name already."""
    own, theirs = [await asyncio.open_connection(sock=end) for end in socket.socketpair()]
    serving = asyncio.create_task(rpc._lines.serve(SimpleNamespace(peer_id=peer), *theirs))
    line = Line(*own)
    line.send(name, b"")
    try:
        assert list(await line.read()) == [(name, b"")]
        yield line
    finally:
        line.close()
        await asyncio.wait_for(serving, 30)


@asynccontextmanager
async def session(rpc, session_id: str, owner: PeerID = PEER):
    """One with a first step that was answered: its stream's requests, and the answers of the stream."""
    client = Client(step(states(1, 2, 64, seed=1), session_id=session_id, step_id="1"))
    answers = rpc.rpc_inference(client.__aiter__(), SimpleNamespace(remote_id=owner))
    first = tensor_of(await anext(answers))
    stream: list[torch.Tensor] = []

    async def read() -> None:
        async for answer in answers:
            stream.append(tensor_of(answer))

    reading = asyncio.create_task(read())
    try:
        yield first, client, stream
    finally:
        client.end()
        await asyncio.wait_for(reading, 30)


def lined(number: int, session_id: str = "a", line: str = "mine", **more) -> bytes:
    hidden = states(1, 1, 64, seed=number)
    return step(hidden, session_id=session_id, step_id=f"{number}", line=line, **more).SerializeToString()


async def eventually(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def answers_on(line: Line) -> list[tuple[str, torch.Tensor]]:
    parse = runtime_pb2.ExpertResponse.FromString
    return [(name, tensor_of(parse(message))) for name, message in await line.read()]


def test_steps_on_a_line_are_answered_there(rpc, service, span):
    async def ask():
        async with session(rpc, "a") as (first, _, stream), line_to(rpc) as line:
            line.send("a", lined(2))
            [(name, second)] = await answers_on(line)
            line.send("a", lined(2))  # once more, as from the server of the blocks before
            line.send("a", lined(3))
            [(_, third)] = await answers_on(line)
        await freed(service)
        assert name == "a" and stream == [] and not rpc._lines._lines
        return torch.cat([first, second, third], dim=1)

    hidden = torch.cat([states(1, 2, 64, seed=1), states(1, 1, 64, seed=2), states(1, 1, 64, seed=3)], dim=1)
    torch.testing.assert_close(run(ask()), span.forward(hidden, 0, 4), rtol=1e-4, atol=1e-4)


def test_a_push_is_answered_on_the_owner_s_line_and_on_no_stranger_s(rpc):
    async def ask():
        async with session(rpc, "a") as (_, _, stream):
            async with line_to(rpc, peer=STRANGER) as theirs:
                theirs.send("a", lined(2, pushed=True))  # the node before
                await eventually(lambda: stream)  # the owner has no line
                async with line_to(rpc) as line:
                    theirs.send("a", lined(3, pushed=True))
                    [(name, _)] = await answers_on(line)
                    assert name == "a" and len(stream) == 1
                    line.send("a", lined(4, line="another"))
                    await eventually(lambda: len(stream) == 2)
                theirs.send("nobody", b"")
                assert list(await theirs.read()) == [("nobody", b"")]  # nothing else came here

    run(ask())


def test_the_sessions_of_a_line_do_not_wait_for_each_other(rpc, monkeypatch):
    """One of them takes no requests, since it computes; what is too much for it is refused, and the others go on."""

    async def ask():
        async with session(rpc, "a"), session(rpc, "b"), line_to(rpc) as line:
            held, make_step = asyncio.Event(), rpc._step

            async def slow(served, opening, tensors):
                if opening.metadata["session_id"] == "a":
                    await held.wait()
                return await make_step(served, opening, tensors)

            monkeypatch.setattr(rpc, "_step", slow)
            for number in range(inbox._MOST_AHEAD + 3):
                line.send("a", lined(number + 2))
            line.send("b", lined(2, "b"))
            got = []
            while ("b", True) not in got:
                got += [(name, bool(message)) for name, message in await line.read()]
            assert 0 < got.count(("a", False)) <= 3 and ("a", True) not in got
            held.set()

    run(ask())


@pytest.mark.parametrize(
    "sent", [struct.pack("!I", 2**31), struct.pack("!IBI1s1s", 7, 1, 1, b"a", b"\xff"), struct.pack("!I2s", 2, b"xx")]
)
def test_nonsense_ends_the_line_and_no_session(rpc, sent):
    async def ask():
        async with session(rpc, "a") as (_, client, stream):
            async with line_to(rpc) as line, line_to(rpc, "another") as other:
                line._writer.write(sent)
                with pytest.raises(EOFError):
                    await line.read()
                other.send("a", lined(2, line="another"))
                assert len(await answers_on(other)) == 1
                client.send(runtime_pb2.ExpertRequest.FromString(lined(3)))
                await eventually(lambda: stream)

    run(ask())


def test_a_peer_has_a_few_lines(rpc, monkeypatch):
    monkeypatch.setattr(served_lines, "_MOST_OF_A_PEER", 1)

    async def ask():
        async with line_to(rpc):
            with pytest.raises(EOFError):
                async with line_to(rpc, "another"):
                    pass
            async with line_to(rpc, peer=STRANGER):
                pass
        async with line_to(rpc, "another"):
            pass

    run(ask())


def test_lines_end_when_the_blocks_are_served_no_more(rpc):
    async def ask():
        async with line_to(rpc) as line:
            rpc._lines.close()
            with pytest.raises(EOFError):
                await line.read()

    run(ask())


class LineOnward:
    """In the place of the way to the next server."""

    def __init__(self):
        self.line, self.got, self.takes = self, [], True

    def send(self, session_id: str, message: bytes) -> bool:
        self.got += [(session_id, runtime_pb2.ExpertRequest.FromString(message))] if self.takes else []
        return self.takes


def test_outputs_go_on_by_line_if_the_client_uses_lines_and_the_next_server_has_them(rpc, monkeypatch):
    onward, next_server = LineOnward(), NextServer([0.0] * 9)
    monkeypatch.setattr(rpc, "_stub_of", lambda _peer: next_server)
    monkeypatch.setattr(rpc._onward, "to", lambda _peer: onward)
    after = [(PEER.to_base58(), "b", 4, 6), ("peer of the last", "c", 6, 8)]

    async def ask():
        async with session(rpc, "a") as (_, client, stream):
            made = 0
            for takes, more in ((True, {"line": "mine"}), (False, {"line": "mine"}), (True, {})):
                onward.takes, made = takes, made + 1
                request = step(states(1, 1, 64), session_id="a", step_id=f"push {made}", next_servers=after, **more)
                client.send(request)
                await eventually(lambda made=made: len(stream) == made)
            await eventually(lambda: len(next_server.got) == 2)
            return stream[0]

    output = run(ask())
    [(session_id, pushed)] = onward.got
    about = MSGPackSerializer.loads(pushed.metadata)
    assert session_id == about["session_id"] == "b" and pushed.uid == "tiny-hf.4 tiny-hf.5"
    assert about["pushed"] is True and about["line"] == "mine" and about["step_id"] == "push 1"
    assert torch.equal(deserialize_torch_tensor(pushed.tensors[0]), output)
    assert [MSGPackSerializer.loads(each.metadata)["step_id"] for each in next_server.got] == ["push 2", "push 3"]
