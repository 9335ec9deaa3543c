"""The remote session over scripted nodes: what it computes, and what it does when one of them fails, hangs, is full or refuses."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from types import SimpleNamespace

import pytest
import scripted_swarm
import torch
from hivemind.p2p import P2PHandlerError
from scripted_swarm import BLOCKS, HIDDEN, NONE, Node, Swarm, blocks_of

from petals_win.client import pieces, server_session
from petals_win.client import routes as routes_room
from petals_win.client import session as remote_session
from petals_win.client.blocking import InferenceSession, SessionCancelled
from petals_win.client.looking import LookUpFailed
from petals_win.client.routes import BlocksLost, NodeFailure
from petals_win.client.server_session import NodeLost
from petals_win.client.session import RemoteSession, SwarmBlocks
from petals_win.errors import NodeFull, NodeRefused
from petals_win.swarm import lines
from petals_win.swarm.protocol import START

# The first comparison imports for seconds, which no test has time for.
torch.testing.assert_close(torch.zeros(1), torch.zeros(1))

FULL = P2PHandlerError("failed: [petals-win:full] No room, says the node.")


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(server_session, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(server_session, "PING_SECONDS", 0.1)
    monkeypatch.setattr(lines, "_IDLE_SECONDS", 0.5)
    monkeypatch.setattr(pieces, "_PIPELINED", 8)
    monkeypatch.setattr(pieces, "_ALONE", 16)


def tokens(count: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def run(action, seconds: float = 60):
    return asyncio.run(asyncio.wait_for(action, seconds))


def opened(swarm: Swarm, max_length: int = 1000) -> RemoteSession:
    return SwarmBlocks(swarm).open(max_length)


def two(**more) -> tuple[Node, Node]:
    return Node("a", 0, 2, **more), Node("b", 2, BLOCKS, **more)


async def eventually(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def check_steps(swarm: Swarm, lengths=(30, 1, 1, 9, 1), rows: int = 1) -> None:
    """A conversation of such steps gets what one process computes, and leaves nothing open."""
    expected, session = blocks_of(0, BLOCKS), opened(swarm)
    for number, length in enumerate(lengths):
        hidden = tokens(length, rows, number)
        torch.testing.assert_close(await session.step(hidden), expected(hidden), rtol=1e-5, atol=1e-5)
    assert session.position == sum(lengths)
    await session.close()
    await session.close()
    await eventually(lambda: all(node.streams == 0 for node in swarm.nodes))


def failing_at(number: int, error: Exception | None = None, again: bool = False):
    """A script that fails at one request, or hangs there if there is no error."""

    async def script(request):
        if request.number == number or again and request.number > number:
            if error is None:
                await asyncio.Event().wait()
            raise error

    return script


@pytest.mark.parametrize("rows", [1, 3])
def test_steps_of_any_length(rows):
    run(check_steps(Swarm(*two()), rows=rows))
    run(check_steps(Swarm(Node("whole", 0, BLOCKS)), rows=rows))


def test_every_token_goes_once_to_each_node_in_chunks_of_the_route_s_size():
    swarm = Swarm(*two())
    run(check_steps(swarm, (20, 1)))
    for node in swarm.nodes:
        assert [request.tokens for request in node.requests] == [8, 8, 4, 1]
    alone = Swarm(Node("whole", 0, BLOCKS))
    run(check_steps(alone, (20, 1)))
    assert [request.tokens for request in alone.nodes[0].requests] == [16, 4, 1]


def test_chunks_follow_each_other_through_the_nodes():
    """The first node finishes its third chunk only when the second one works on its second: without a pipeline it never would."""
    reached = asyncio.Event()
    first, second = two()

    async def at_the_first(request):
        if request.number == 2:
            await asyncio.wait_for(reached.wait(), 30)

    async def at_the_second(request):
        if request.number == 1:
            reached.set()

    first.script, second.script = at_the_first, at_the_second
    swarm = Swarm(first, second)
    run(check_steps(swarm, (40, 1)))
    assert swarm.failures == []
    for name in ("a", "b"):
        begun = [int(where) for what, node, where in swarm.log if (what, node) == ("begin", name)]
        assert begun == sorted(begun)
    assert swarm.log.index(("begin", "b", "8")) < swarm.log.index(("end", "a", "16"))


def test_no_more_than_two_chunks_wait_at_a_node():
    first, second = two()
    most = 0
    held = asyncio.Event()

    async def hold(request):
        nonlocal most
        if request.number == 0:
            await eventually(lambda: waiting() == 2)
            await asyncio.sleep(0.05)  # for a third one
            most = waiting()
            held.set()

    def waiting() -> int:
        return sum(len(server._in_flight) for server in session._servers if server.start == 0)

    async def ask():
        nonlocal session
        session = opened(swarm)
        await session.step(tokens(80))
        assert held.is_set() and most == 2
        await session.close()

    first.script, session = hold, None
    swarm = Swarm(first, second)
    run(ask())


def test_one_token_is_pushed_to_the_next_node_and_counted_once():
    swarm = Swarm(*two())
    run(check_steps(swarm, (5, 1, 1, 30, 1)))
    second = swarm.nodes[1]
    pushed = [request.metadata["step_id"].split("/")[1] for request in second.requests if request.pushed]
    assert pushed == [
        "5",
        "6",
        "37",
    ], "the first step has nobody to push to yet, and chunks in a pipeline might overtake"


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("at", [0, 2, 4, 5, 7])
def test_a_node_that_fails_is_replaced(victim, at):
    first, second = two()
    nodes = [first, second]
    nodes[victim].script = failing_at(at, RuntimeError("the cable is loose"))
    swarm = Swarm(*nodes, Node("c", 0, 2), Node("d", 2, BLOCKS))
    run(check_steps(swarm))
    assert swarm.failures == [nodes[victim].name]


def test_several_nodes_take_the_place_of_one():
    swarm = Swarm(Node("whole", 0, BLOCKS, failing_at(3, RuntimeError("gone"))), Node("a", 0, 1), Node("b", 1, 4))
    run(check_steps(swarm))
    assert swarm.failures == ["whole"]


def test_nothing_of_the_past_is_pushed():
    """The replayed past ends with a chunk as long as the step in work."""
    first, second = two()
    second_to_fail = Node("a", 0, 2, failing_at(3, RuntimeError("gone")))
    swarm = Swarm(second_to_fail, second, Node("c", 0, 2))
    run(check_steps(swarm, (16, 1, 1, 1, 1)))
    assert swarm.failures == ["a"]
    assert [request.tokens for request in second.requests] == [8, 8, 1, 1, 1, 1]


def test_beams_are_replayed_as_they_are_now():
    async def ask(swarm):
        expected, session = blocks_of(0, BLOCKS), opened(swarm)
        for number, order in enumerate([None, [2, 0, 0], None, [1, 1, 2], [0, 2, 1]]):
            hidden = tokens(12 if number == 0 else 1, 3, number)
            hypo_ids = None if order is None else torch.tensor(order)
            output = await session.step(hidden, hypo_ids=hypo_ids)
            torch.testing.assert_close(output, expected(hidden, None, hypo_ids), rtol=1e-5, atol=1e-5)
        await session.close()

    for victim, at in ((0, 4), (1, 4), (0, 7), (1, 8)):
        nodes = two()
        nodes[victim].script = failing_at(at, RuntimeError("gone"))
        swarm = Swarm(*nodes, Node("c", 0, 2), Node("d", 2, BLOCKS))
        run(ask(swarm))
        assert len(swarm.failures) == 1


@pytest.mark.parametrize("at", [None, 0, 1, 3])
def test_deep_prompts_are_added_once_by_each_block_and_replayed(at):
    """They are longer than a chunk, and lie within the first one."""
    nodes = two()
    if at is not None:
        nodes[1].script = failing_at(at, RuntimeError("gone"))
    swarm = Swarm(*nodes, Node("d", 2, BLOCKS))

    async def ask():
        expected, session = blocks_of(0, BLOCKS), opened(swarm)
        prompts = torch.randn(BLOCKS, 1, 11, HIDDEN, generator=torch.Generator().manual_seed(5))
        for number, length in enumerate((30, 1, 1)):
            hidden, deep = tokens(length, 1, number), prompts if number == 0 else None
            output = await session.step(hidden, prompts=deep)
            torch.testing.assert_close(output, expected(hidden, deep), rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="first step"):
            await session.step(tokens(11), prompts=prompts)
        await session.close()

    run(ask())
    assert nodes[0].requests[0].tokens == 11


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("at", [0, 2, 4, 6])
def test_a_node_that_hangs_is_replaced(victim, at):
    nodes = two()
    nodes[victim].script = failing_at(at)

    async def freeze(request, script=nodes[victim].script):
        nodes[victim].alive = request.number < at
        await script(request)

    nodes[victim].script = freeze
    swarm = Swarm(*nodes, Node("c", 0, 2), Node("d", 2, BLOCKS), request_timeout=60)
    began = time.monotonic()
    run(check_steps(swarm))
    assert swarm.failures == [nodes[victim].name]
    assert time.monotonic() - began < 20


async def check_taking_back(swarm: Swarm, rows: int = 1) -> None:
    """Steps of a few tokens of which some are taken back, as one process would."""
    expected, session = blocks_of(0, BLOCKS), opened(swarm)
    for number, (start, length) in enumerate([(0, 30), (30, 5), (32, 1), (33, 9), (40, 1), (3, 12), (14, 5), (15, 1)]):
        if start < session.position:
            session.truncate(start)
        assert session.position == start
        hidden = tokens(length, rows, number)
        output, right = await session.step(hidden), expected(hidden, start=start if number else None)
        torch.testing.assert_close(output, right, rtol=1e-5, atol=1e-5)
    for wrong in (0, -1, session.position + 1):
        with pytest.raises(ValueError, match="cannot be kept"):
            session.truncate(wrong)
    await session.close()


def test_tokens_are_taken_back_without_sending_the_past_again():
    swarm = Swarm(*two(takes_back=1000))
    run(check_taking_back(swarm))
    for node in swarm.nodes:
        assert sum(request.tokens for request in node.requests) == 64
    assert any(request.pushed for request in swarm.nodes[1].requests), "steps that take back are pushed, too"
    run(check_taking_back(Swarm(*two(takes_back=1000)), rows=3))


@pytest.mark.parametrize("ours", [0, 1, None])
def test_a_node_that_takes_nothing_back_gets_the_past_anew(ours):
    """Upstream's ignores the request without a word: it must not be asked."""
    nodes = two()
    if ours is not None:
        nodes[ours].takes_back = 20  # at once; the test takes back more, too
    swarm = Swarm(*nodes)
    run(check_taking_back(swarm))
    assert swarm.failures == []
    for number, node in enumerate(nodes):
        assert (START in {key for request in node.requests for key in request.metadata}) == (number == ours)
        assert (sum(request.tokens for request in node.requests) < 150) == (number == ours)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("at", [5, 7, 10])
def test_what_was_taken_back_is_not_replayed(victim, at):
    nodes = two(takes_back=1000)
    nodes[victim].script = failing_at(at, RuntimeError("gone"))
    swarm = Swarm(*nodes, Node("c", 0, 2), Node("d", 2, BLOCKS))
    run(check_taking_back(swarm))
    assert len(swarm.failures) == 1


@pytest.mark.parametrize("about", [b"\xc1", b"\x01"])
def test_what_a_node_says_of_a_session_may_be_nonsense(about, monkeypatch):
    swarm = Swarm(*two(), Node("c", 0, 2), Node("d", 2, BLOCKS))
    answered, response = [], scripted_swarm.ExpertResponse

    def answer(**fields):
        answered.append(fields)
        return response(**{**fields, "metadata": about if len(answered) == 1 else b""})

    monkeypatch.setattr(scripted_swarm, "ExpertResponse", answer)
    run(check_steps(swarm))
    assert len(swarm.failures) == 1


def test_a_node_that_lives_is_waited_for():
    async def slow(request):
        await asyncio.sleep(0.5 if request.number in (1, 5) else 0)

    nodes = two(script=slow)
    swarm = Swarm(*nodes)
    run(check_steps(swarm))
    assert swarm.failures == [] and nodes[0].pings > 3


def test_a_node_that_lives_and_never_ends_is_given_up():
    nodes = two()
    nodes[1].script = failing_at(4)
    swarm = Swarm(*nodes, Node("d", 2, BLOCKS), request_timeout=0.5)
    run(check_steps(swarm))
    assert swarm.failures == ["b"] and nodes[1].pings > 1


def test_the_only_node_of_its_blocks_may_be_silent_for_longer():
    """There is nobody to go to; a PC that is very busy is waited for, one that is frozen is named."""
    first, second = two()

    async def silent_for_a_while(request):
        second.alive = request.number != 1
        if request.number == 1:
            await asyncio.sleep(0.25)  # longer than another one's 0.2, and shorter than its own 0.4

    second.script = silent_for_a_while
    swarm = Swarm(first, second)
    run(check_steps(swarm, (8, 1, 1)))
    assert swarm.failures == []

    second.alive, second.script = False, failing_at(len(second.requests))
    swarm = Swarm(first, second, max_retries=None, request_timeout=60)
    swarm.state.rpc_info, swarm.returns = {"inference_schema": ((SimpleNamespace(compression=NONE),),)}, True

    async def ask():
        session = opened(swarm)
        with pytest.raises(BlocksLost, match="blocks 2 to 3"):
            await session.step(tokens(3))
        await session.close()

    run(ask(), 20)
    assert swarm.failures == ["b"]


def test_a_frozen_node_does_not_stall_the_first_question_of_all(monkeypatch):
    monkeypatch.setattr("petals_win.client.routes._INFO_SECONDS", 0.2)
    swarm = Swarm(Node("a", 0, 2, alive=False), Node("b", 2, BLOCKS), Node("c", 0, 2), request_timeout=60)
    run(check_steps(swarm), 20)
    assert swarm.failures == ["a"]


@pytest.mark.parametrize("wrong", [lambda hidden: hidden[:, :-1], lambda hidden: hidden.to(torch.int64)])
def test_a_node_that_answers_nonsense_is_replaced(wrong):
    nodes = two()
    nodes[0].answer_shape = wrong
    swarm = Swarm(*nodes, Node("c", 0, 2))
    run(check_steps(swarm))
    assert swarm.failures == ["a"]


def test_a_node_that_answers_without_end_is_replaced():
    class Talker(Swarm):
        said = 0

        async def _serve(self, node, requests):
            async for answer in super()._serve(node, requests):
                yield answer
                while node.name == "a":
                    await asyncio.sleep(0)
                    self.said += 1
                    yield answer

    swarm = Talker(*two(), Node("c", 0, 2))

    async def ask():
        expected, session = blocks_of(0, BLOCKS), opened(swarm)
        for number, length in enumerate((3, 1, 1)):
            hidden = tokens(length, 1, number)
            torch.testing.assert_close(await session.step(hidden), expected(hidden), rtol=1e-5, atol=1e-5)
            await eventually(lambda: swarm.nodes[0].streams == 0)
        await session.close()

    run(ask())
    assert swarm.failures == ["a"] and swarm.said < 30


def test_who_finds_no_room_gives_all_places_back_and_begins_anew():
    nodes = two()
    seen = []

    async def full_twice(request):
        seen.append(sum(node.streams for node in nodes))
        if len(seen) in (3, 4):
            raise FULL

    nodes[1].script = full_twice
    swarm = Swarm(*nodes)
    run(check_steps(swarm, (16, 1, 1)))
    assert swarm.failures == [] and len(seen) > 4
    assert max(seen) == 2, "the places of the last try were still taken"


def test_who_never_finds_room_is_told_so_in_the_node_s_words(monkeypatch):
    monkeypatch.setattr(remote_session, "PATIENCE_SECONDS", 1.5)
    nodes = two()
    nodes[1].script = failing_at(0, FULL, again=True)
    swarm = Swarm(*nodes)

    async def ask():
        session = opened(swarm)
        with pytest.raises(NodeFull, match="No room, says the node"):
            await session.step(tokens(3))
        assert all(node.streams == 0 for node in nodes) and swarm.failures == []
        assert len(nodes[1].requests) == 2
        assert 0 < nodes[1].requests[0].metadata["alloc_timeout"] <= 1.5

    run(ask())


def test_a_refusal_is_raised_at_once_and_another_step_may_follow():
    nodes = two()
    nodes[1].script = failing_at(1, P2PHandlerError("failed: [petals-win:refused] Not that one."))
    swarm = Swarm(*nodes)

    async def ask():
        expected, session = blocks_of(0, BLOCKS), opened(swarm)
        first, second = tokens(3), tokens(2, seed=1)
        await session.step(first)
        expected(first)
        with pytest.raises(NodeRefused, match="Not that one"):
            await session.step(tokens(5, seed=9))
        assert session.position == 3 and swarm.failures == []
        torch.testing.assert_close(await session.step(second), expected(second))
        await session.close()

    run(ask())


def test_it_gives_up_after_so_many_failures_in_a_row():
    def ask(swarm, words):
        async def within():
            session = opened(swarm)
            with pytest.raises(Exception, match=words):
                await session.step(tokens(20))
            assert all(node.streams == 0 for node in swarm.nodes)

        run(within())

    broken = [Node(name, 0, BLOCKS, failing_at(0, RuntimeError("loose"), again=True)) for name in "abcde"]
    swarm = Swarm(*broken, max_retries=3)
    ask(swarm, "loose")
    assert swarm.failures == ["a", "b", "c"]
    # That nobody is left says less than what the last node said.
    broken = Node("a", 0, BLOCKS, failing_at(0, P2PHandlerError("failed: its cable is loose"), again=True))
    swarm = Swarm(broken, max_retries=3)
    ask(swarm, "its cable is loose")
    assert swarm.failures == ["a", None, None]
    ask(Swarm(Node("a", 0, 2)), "Nobody holds the block 2")
    nodes = [Node("a", 0, 2), *(Node(name, 2, BLOCKS, failing_at(0, again=True), alive=False) for name in "bc")]
    ask(Swarm(*nodes, max_retries=2), "No PC that serves the blocks 2 to 3 can be reached")


def test_failures_are_counted_anew_where_the_step_got_further():
    """Each node answers one chunk and fails at the next; of six chunks none fails twice."""

    nodes = [Node(name, 0, 2) for name in "abcdef"]
    for at, node in enumerate(nodes[:5], 1):
        node.script = failing_at(at, RuntimeError("gone"))
    swarm = Swarm(*nodes, Node("z", 2, BLOCKS), max_retries=2)
    run(check_steps(swarm, (48, 1)))
    assert swarm.failures == list("abcde")


def test_a_look_up_that_fails_ends_the_question():
    def look_up():
        raise LookUpFailed(OSError("no network"))

    swarm = Swarm(*two(), max_retries=None)
    swarm.look_up = look_up

    async def ask():
        with pytest.raises(LookUpFailed, match="no network"):
            await opened(swarm).step(tokens(3))

    run(ask(), 20)


@pytest.mark.parametrize("how", ["cancel", "close"])
@pytest.mark.parametrize("where", ["compute", "pipeline", "full"])
def test_whoever_goes_is_gone_at_once(monkeypatch, how, where):
    monkeypatch.setattr(server_session, "SILENT_SECONDS", 60)  # nothing else ends the waiting
    monkeypatch.setattr(server_session, "_CLOSE_SECONDS", 60)  # nobody waits for a node's last word

    async def seconds_to_go() -> float:
        nodes = two()
        nodes[1].script = failing_at(1, FULL if where == "full" else None, again=where == "full")
        swarm = Swarm(*nodes)
        session = opened(swarm)
        await session.step(tokens(3))
        step = asyncio.create_task(session.step(tokens(60 if where == "pipeline" else 1)))
        await eventually(lambda: len(nodes[1].requests) == 2)
        await asyncio.sleep(0.02)
        began = time.monotonic()
        if how == "cancel":
            step.cancel()
        else:
            await session.close()
        with pytest.raises(asyncio.CancelledError):
            await step
        await eventually(lambda: all(node.streams == 0 for node in nodes))
        seconds = time.monotonic() - began
        with pytest.raises(RuntimeError, match="closed"):
            await session.step(tokens(1))
        await session.close()
        assert swarm.failures == []
        return seconds

    assert run(seconds_to_go()) < 20


def test_a_session_that_is_forgotten_ends_at_its_nodes():
    swarm = Swarm(*two())

    async def ask():
        session = opened(swarm)
        await session.step(tokens(3))
        assert [node.streams for node in swarm.nodes] == [1, 1]
        del session
        await eventually(lambda: gc.collect() >= 0 and all(node.streams == 0 for node in swarm.nodes))

    run(ask())


def test_what_cannot_be_a_step():
    swarm, over = Swarm(*two()), threading.Event()

    async def wait(_request):
        while not over.is_set():
            await asyncio.sleep(0.01)

    async def ask():
        session = opened(swarm, max_length=20)
        for wrong, words in (
            ({"hidden": tokens(21)}, "holds 20 tokens"),
            ({"hidden": tokens(0)}, "must be"),
            ({"hidden": tokens(3)[0]}, "must be"),
            ({"hidden": tokens(3, 2), "hypo_ids": torch.tensor([0, 2])}, "rows from 0 to 1"),
            ({"hidden": tokens(3, 2), "hypo_ids": torch.tensor([0])}, "2 int64 values"),
            ({"hidden": tokens(3), "prompts": torch.zeros(BLOCKS, 1, 4, HIDDEN)}, "do not fit"),
            ({"hidden": tokens(3), "prompts": torch.zeros(2, 1, 2, HIDDEN)}, "do not fit"),
        ):
            with pytest.raises(ValueError, match=words):
                await session.step(**wrong)
        assert all(node.requests == [] for node in swarm.nodes)
        swarm.nodes[0].script = wait
        first = asyncio.create_task(session.step(tokens(3)))
        await eventually(lambda: swarm.nodes[0].requests)
        with pytest.raises(RuntimeError, match="another step"):
            await session.step(tokens(3))
        over.set()
        await first
        await session.close()

    run(ask())


def test_many_sessions_and_no_thread_for_each():
    swarm = Swarm(*two())

    async def ask():
        await asyncio.gather(*(check_steps(swarm, (20, 1, 1)) for _ in range(3)))
        before = threading.active_count()
        await asyncio.gather(*(check_steps_alone() for _ in range(40)))
        assert threading.active_count() <= before + 8  # the pool in which routes are looked for

    async def check_steps_alone():
        session = opened(swarm)
        for _ in range(3):
            await session.step(tokens(1))
        await session.close()

    run(ask())


def test_petals_own_session_for_programs_without_a_loop():
    swarm = Swarm(*two())
    expected = blocks_of(0, BLOCKS)
    with torch.no_grad(), InferenceSession(swarm, max_length=50) as session:
        for number, length in enumerate((9, 1, 1)):
            hidden = tokens(length, 1, number)
            output = session.step(hidden, torch.empty(0), torch.empty(0, dtype=torch.int64))
            torch.testing.assert_close(output, expected(hidden), rtol=1e-5, atol=1e-5)
        assert session.position == 11 and session.num_blocks == BLOCKS
        assert session.last_token_id is None
        session.output_ids = torch.tensor([[3, 4]])
        session.last_token_id = torch.tensor([[7]])
        assert session.output_ids.tolist() == [[3, 7]] and session.last_token_id.tolist() == [[7]]
    session.close()
    assert all(node.streams == 0 for node in swarm.nodes)
    with pytest.raises(RuntimeError, match="closed"):
        session.step(tokens(1))


def test_cancel_from_another_thread():
    nodes = two()
    nodes[1].script = failing_at(1)
    with torch.no_grad(), InferenceSession(Swarm(*nodes), max_length=50) as session:
        session.step(tokens(3))
        threading.Timer(0.05, session.cancel).start()
        began = time.monotonic()
        with pytest.raises(SessionCancelled):
            session.step(tokens(1))
        assert time.monotonic() - began < 20
        with pytest.raises(SessionCancelled):
            session.step(tokens(1))


def freezing(node: Node) -> Node:
    """It computes nothing while it is not alive."""

    async def wait_while_frozen(_request) -> None:
        if not node.alive:
            await asyncio.Event().wait()

    node.script = wait_while_frozen
    return node


def test_whoever_was_silent_is_not_asked_again_while_another_one_lives():
    """Also where all nodes are avoided, and the manager therefore offers all of them."""
    first, frozen, other = Node("a", 0, 2), freezing(Node("frozen", 2, BLOCKS)), Node("other", 2, BLOCKS)
    swarm = Swarm(first, frozen, other)
    swarm.returns = True

    async def converse():
        session = opened(swarm)
        await session.step(tokens(4))
        swarm.avoided.add(other.peer_id)  # it failed in some other session
        frozen.alive = False
        await session.step(tokens(1))
        used = [peer_id for peer_id, _, _ in session.route]
        await session.close()
        return used

    assert run(converse()) == [first.peer_id, other.peer_id]
    assert swarm.failures == ["frozen", "frozen"], "the second time without having been asked"


def test_a_node_that_lets_no_session_in_is_waited_for_as_long_as_a_silent_one():
    """Unless no other one has its blocks."""
    mute = Node("mute", 2, BLOCKS, opens=False)
    swarm = Swarm(Node("a", 0, 2), mute, Node("other", 2, BLOCKS))
    swarm.config.connect_timeout = 20

    async def seconds(swarm: Swarm) -> float:
        session, began = opened(swarm), time.monotonic()
        await session.step(tokens(4))
        took = time.monotonic() - began
        await session.close()
        return took

    assert run(seconds(swarm)) < 10 < swarm.config.connect_timeout
    assert swarm.failures == ["mute"]

    async def let_in_late():
        asking = asyncio.create_task(seconds(Swarm(Node("a", 0, 2), mute)))
        await asyncio.sleep(0.4)
        assert not asking.done()
        asking.cancel()

    run(let_in_late())


def test_a_second_silent_node_is_not_waited_for_as_the_only_one():
    nodes = Node("a", 0, 2), freezing(Node("b", 2, BLOCKS)), freezing(Node("c", 2, BLOCKS))
    swarm = Swarm(*nodes)
    swarm.returns = True

    async def converse():
        session = opened(swarm)
        await session.step(tokens(4))
        nodes[1].alive = nodes[2].alive = False
        with pytest.raises(BlocksLost) as caught:
            await session.step(tokens(1))
        await session.close()
        return caught.value.block_indices

    assert run(converse()) == list(range(2, BLOCKS))
    pings = [node.pings for node in nodes[1:]]
    assert max(pings) < server_session._PINGS_ALONE, f"asked as an only one is: {pings}"


def test_a_node_that_cannot_be_reached_is_not_tried_while_another_one_lives(monkeypatch):
    """Also when its time of being avoided is over, as its announcement outlives it. With no other one it is called."""
    monkeypatch.setattr(routes_room, "_PING_SECONDS", 0.1)
    dead = freezing(Node("dead", 2, BLOCKS, alive=False))
    others = freezing(Node("x", 2, BLOCKS)), freezing(Node("y", 2, BLOCKS))
    swarm = Swarm(Node("a", 0, 2), dead, *others)
    routes = SwarmBlocks(swarm).routes
    routes.failed(NodeFailure(dead.peer_id, (2, BLOCKS), NodeLost("gone")))

    async def step(session: RemoteSession) -> None:
        swarm.avoided.discard(dead.peer_id)
        await session.step(tokens(1))
        assert dead.streams == 0

    async def converse():
        session = RemoteSession(routes, 100)
        await step(session)
        others[0].alive = False
        await step(session)
        assert session.route[-1][0] == others[1].peer_id
        others[1].alive, pings = False, dead.pings
        with pytest.raises(BlocksLost):
            await step(session)
        assert dead.streams == 0 and dead.pings > pings
        await session.close()

    run(converse())


def test_a_node_that_is_back_is_used_again_at_once(monkeypatch):
    """As soon as it answers, while one that answered nonsense is avoided for its time."""
    monkeypatch.setattr(routes_room, "_PING_SECONDS", 0.1)
    back, nonsense, new = Node("back", 2, BLOCKS), Node("nonsense", 2, BLOCKS), Node("new", 0, BLOCKS)
    swarm = Swarm(back, nonsense, new)
    routes = SwarmBlocks(swarm).routes
    for node, cause in ((back, NodeLost("gone")), (nonsense, P2PHandlerError("nonsense"))):
        routes.failed(NodeFailure(node.peer_id, (2, BLOCKS), cause))

    async def learn():
        back.alive = False
        await routes.learn([node.peer_id for node in swarm.nodes])
        assert swarm.avoided == {back.peer_id, nonsense.peer_id}
        back.alive = True
        await routes.learn([node.peer_id for node in swarm.nodes])

    run(learn())
    assert swarm.avoided == {nonsense.peer_id}
