"""Of a prompt only the last outputs come back: over scripted nodes that are ours or upstream's, that fail, and that lie."""

from __future__ import annotations

import pytest
import torch
from scripted_swarm import BLOCKS, HIDDEN, Node, Swarm, blocks_of
from test_prefixes import PROMPT, embedded
from test_session import eventually, failing_at, opened, run, tokens, two
from test_session import quickly as quickly  # a fixture
from test_sessions_on_lines import with_lines

from petals_win.client.session import SwarmBlocks
from petals_win.swarm.protocol import OUTPUTS

# Of each step how many tokens it has, and how many outputs are wanted.
STEPS = ((30, 1), (1, 1), (5, 3), (20, 10), (1, None), (9, None), (7, 100))


async def check(swarm: Swarm, rows: int = 1) -> None:
    """Such a conversation gets the last of what one process computes."""
    expected, session = blocks_of(0, BLOCKS), opened(swarm)
    for number, (length, last) in enumerate(STEPS):
        hidden = tokens(length, rows, number)
        order = torch.arange(rows).flip(0) if number == 3 else None
        output, right = await session.step(hidden, hypo_ids=order, last=last), expected(hidden, None, order)
        torch.testing.assert_close(output, right if last is None else right[:, -last:], rtol=1e-5, atol=1e-5)
    assert session.position == sum(length for length, _ in STEPS)
    await session.close()
    await eventually(lambda: all(node.streams == 0 for node in swarm.nodes))


def wanted_of(node: Node) -> list[int]:
    """Of each request of the node, how many outputs its client wants."""
    return [
        request.metadata.get(OUTPUTS, {}).get(request.metadata["session_id"], request.tokens)
        for request in node.requests
    ]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("cuts", [(True, True), (True, False), (False, True), (False, False)])
def test_any_nodes_give_what_is_wanted(cuts, rows):
    nodes = two()
    for node, ours in zip(nodes, cuts, strict=True):
        node.cuts = ours
    swarm = Swarm(*nodes)
    run(check(swarm, rows))
    run(check(Swarm(Node("whole", 0, BLOCKS, cuts=cuts[0])), rows))
    assert swarm.failures == []


def test_only_these_come_from_the_last_node_and_everything_from_the_others():
    swarm = Swarm(*two())
    run(check(swarm))
    first, last = swarm.nodes
    lengths = [request.tokens for request in last.requests]
    assert lengths == [8, 8, 8, 6, 1, 5, 8, 8, 4, 1, 8, 1, 7]
    assert wanted_of(first) == lengths == [request.tokens for request in first.requests]
    assert wanted_of(last) == [0, 0, 0, 1, 1, 3, 0, 6, 4, 1, 8, 1, 7]
    assert not any(
        OUTPUTS in request.metadata for request in first.requests if not request.pushed and request.tokens == 1
    )


def test_a_prompt_costs_the_last_node_the_bytes_of_one_token():
    """And as many bytes as ever where it sends all."""

    def bytes_of(node: Node, **more) -> int:
        async def ask():
            session = opened(Swarm(*nodes))
            await session.step(tokens(200), **more)
            await session.close()

        nodes = [Node("a", 0, 2), node]
        run(ask())
        return sum(node.answered)

    token = HIDDEN * 4
    overhead = bytes_of(Node("b", 2, BLOCKS)) - 200 * token
    assert bytes_of(Node("b", 2, BLOCKS), last=1) <= overhead + token
    assert bytes_of(Node("b", 2, BLOCKS, cuts=False), last=1) == overhead + 200 * token


def test_what_is_pushed_stays_whole_and_brings_the_number_along():
    """A short step goes from node to node, and whichever of both requests is first is answered by the same number of outputs."""
    swarm = Swarm(*two())
    run(check(swarm))
    first, last = swarm.nodes
    pushed = [request for request in last.requests if request.pushed and request.tokens == 5]
    assert [list(request.metadata[OUTPUTS].values()) for request in pushed] == [[3]]
    assert next(iter(pushed[0].metadata[OUTPUTS])) == pushed[0].metadata["session_id"]
    assert [request.metadata["session_id"] in request.metadata.get(OUTPUTS, {}) for request in first.requests] == [
        False
    ] * len(first.requests)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("cuts", [True, False])
def test_a_node_that_is_lost_in_a_prompt_or_after_it(victim, at, cuts):
    nodes = two(cuts=cuts)
    nodes[victim].script = failing_at(at, RuntimeError("the cable is loose"))
    others = Node("c", 0, 2, cuts=not cuts), Node("d", 2, BLOCKS, cuts=not cuts)
    swarm = Swarm(*nodes, *others)
    run(check(swarm))
    assert swarm.failures == [nodes[victim].name]


def test_of_a_past_that_is_replayed_nothing_comes_back_that_is_known():
    nodes = two()
    nodes[0].script = failing_at(9, RuntimeError("gone"))
    swarm = Swarm(*nodes, Node("c", 0, 2))
    run(check(swarm))
    new = swarm.nodes[2]
    assert [request.tokens for request in new.requests][:6] == [8, 8, 8, 8, 8, 8]
    past = sum(length for length, _ in STEPS[:4])
    assert sum(request.tokens for request in new.requests) == sum(length for length, _ in STEPS)
    assert sum(wanted_of(new)) == sum(length for length, _ in STEPS) - past


def test_failures_are_counted_anew_where_the_step_got_further_though_nothing_came_back():
    """Of six chunks each node answers one more than the one before it, and then fails."""
    nodes = [Node(name, 0, BLOCKS) for name in "abcdef"]
    for at, node in enumerate(nodes[:5], 1):
        node.script = failing_at(at, RuntimeError("gone"))
    swarm = Swarm(*nodes, max_retries=2)

    async def ask():
        hidden, session = tokens(96), opened(swarm)
        right = blocks_of(0, BLOCKS)(hidden)
        torch.testing.assert_close(await session.step(hidden, last=1), right[:, -1:], rtol=1e-5, atol=1e-5)
        await session.close()

    run(ask())
    assert swarm.failures == list("abcde")


@pytest.mark.parametrize(
    "wrong", [lambda hidden: hidden[:, :0], lambda hidden: hidden.repeat(1, 40, 1), lambda hidden: hidden[..., 1:]]
)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_node_that_sends_less_or_more_or_something_else_is_replaced(wrong, victim):
    nodes = two()
    nodes[victim].answer_shape = wrong
    swarm = Swarm(*nodes, Node("c", 0, 2), Node("d", 2, BLOCKS))
    run(check(swarm))
    assert swarm.failures == [nodes[victim].name]


@pytest.mark.parametrize("last", [1, 3, 30, 500])
def test_a_prompt_of_which_the_nodes_have_kept_the_beginning(last):
    swarm = Swarm(*two(takes_back=1000))
    blocks = SwarmBlocks(swarm)

    async def ask() -> int:
        expected, session = blocks_of(0, BLOCKS), blocks.open(1000, PROMPT)
        right = expected(embedded(PROMPT))
        output = await session.step(embedded(PROMPT), last=last)
        assert output.shape[1] == min(last, len(PROMPT) - session.cached_tokens)
        torch.testing.assert_close(output, right[:, -output.shape[1] :], rtol=1e-4, atol=1e-4)
        output, right = await session.step(embedded([7]), last=1), expected(embedded([7]))
        torch.testing.assert_close(output, right, rtol=1e-4, atol=1e-4)
        await session.close([*PROMPT, 7])
        return session.cached_tokens

    async def several():
        return [await ask() for _ in range(3)]

    assert run(several()) == [0, 192, 192]
    assert swarm.failures == []


def test_steps_on_a_line():
    swarm = Swarm(*two())

    async def ask():
        expected, session = blocks_of(0, BLOCKS), opened(swarm)
        for number, last in enumerate((1, 2, 1, 5)):
            hidden = tokens(5, 1, number)
            output, right = await session.step(hidden, last=last), expected(hidden)
            torch.testing.assert_close(output, right[:, -last:], rtol=1e-5, atol=1e-5)
            await with_lines(session, *swarm.nodes)
        await session.close()

    run(ask())
    assert swarm.failures == [] and [node.on_line for node in swarm.nodes] == [3, 3]
    assert wanted_of(swarm.nodes[1]) == [1, 2, 1, 5]


@pytest.mark.parametrize("last", [0, -1])
def test_no_outputs_at_all_are_no_step(last):
    async def ask():
        with pytest.raises(ValueError, match="At least one token"):
            await opened(Swarm(*two())).step(tokens(3), last=last)

    run(ask())
