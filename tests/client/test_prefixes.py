"""What nodes have kept of a prompt is not sent again: over scripted nodes, which fail, know less than others, or are upstream's."""

from __future__ import annotations

import asyncio

import pytest
import torch
from hivemind.p2p import P2PHandlerError
from scripted_swarm import BLOCKS, HIDDEN, Node, Swarm, blocks_of

from petals_win.client import pages as pages_module
from petals_win.client import pieces
from petals_win.client.pages import LeftPages, page_hashes
from petals_win.client.session import SwarmBlocks

PROMPT = [n * 7 % 50 for n in range(200)]


def embedded(tokens: list[int]) -> torch.Tensor:
    table = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(1))
    return table[torch.tensor(tokens)][None]


def two(**more) -> tuple[Node, Node]:
    return Node("a", 0, 2, **more), Node("b", 2, BLOCKS, **more)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(pieces, "_PIPELINED", 48)


class Client:
    """One process that asks, and remembers what it has left at the nodes."""

    def __init__(self, *nodes: Node):
        self.swarm = Swarm(*nodes)
        self.blocks = SwarmBlocks(self.swarm)

    async def ask(self, prompt=PROMPT, answer=range(10), before=None, prompts=None) -> int:
        """A chat gets what one process computes; returns how many tokens of the prompt were not computed."""
        expected, session = blocks_of(0, BLOCKS), self.blocks.open(1000, prompt)
        output = await session.step(embedded(prompt), prompts=prompts)
        assert output.shape[1] == len(prompt) - session.cached_tokens
        right = expected(embedded(prompt), prompts)
        torch.testing.assert_close(output, right[:, session.cached_tokens :], rtol=1e-4, atol=1e-4)
        for token in answer:
            if before is not None:
                await before(token, session)
            output, right = await session.step(embedded([token])), expected(embedded([token]))
            torch.testing.assert_close(output, right, rtol=1e-4, atol=1e-4)
        assert session.position == len(prompt) + len(answer)
        await session.close([*prompt, *answer])
        return session.cached_tokens


def run(action, seconds: float = 30):
    return asyncio.run(asyncio.wait_for(action, seconds))


def sent(node: Node) -> int:
    """Tokens since the last look."""
    count = sum(request.tokens for request in node.requests)
    node.requests.clear()
    return count


def test_only_the_rest_is_sent():
    client = Client(*two(takes_back=1000))

    async def several():
        assert await client.ask() == 0
        assert [sent(node) for node in client.swarm.nodes] == [210, 210]
        assert await client.ask() == 192
        assert [sent(node) for node in client.swarm.nodes] == [18, 18]
        assert await client.ask(PROMPT[:192]) == 128, "the last token is always computed"
        assert await client.ask([*PROMPT[:140], *PROMPT]) == 128
        assert await client.ask([*PROMPT, *range(10), *range(60)]) == 192
        assert await client.ask([*PROMPT, *range(10), *range(60)], answer=range(60)) == 256
        assert await client.ask(PROMPT[1:]) == 0
        assert await client.ask(PROMPT[:60]) == 0
        assert client.swarm.failures == []

    run(several())


@pytest.mark.parametrize("poorer", [0, 1])
def test_every_node_of_the_route_must_have_it(poorer):
    client = Client(*two(takes_back=1000))

    async def several():
        await client.ask()
        kept = client.swarm.nodes[poorer].kept
        for page in [page for page, (number, _) in kept.items() if number > 2]:
            del kept[page]
        assert await client.ask() == 128
        kept.clear()
        assert await client.ask() == 0
        assert await client.ask() == 192
        assert client.swarm.failures == []

    run(several())


def test_a_node_that_cannot_go_back_to_where_the_others_begin():
    """As with windows, whose tokens are let go: the prompt is computed, and nobody is avoided for it."""
    client = Client(*two(takes_back=10))

    async def several():
        await client.ask()
        kept = client.swarm.nodes[1].kept
        for page in [page for page, (number, _) in kept.items() if number > 2]:
            del kept[page]
        assert await client.ask() == 0
        assert await client.ask() == 192
        assert client.swarm.failures == []

    run(several())


@pytest.mark.parametrize("upstream", [0, 1])
def test_upstream_s_nodes_are_asked_for_nothing(upstream):
    nodes = two(takes_back=1000)
    nodes[upstream].takes_back, nodes[upstream].lines = None, False
    client = Client(*nodes)
    for _ in range(2):
        assert run(client.ask()) == 0
        for node in nodes:
            assert all("pages" not in request.metadata and request.tokens for request in node.requests)
    assert nodes[upstream].kept == {}


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("when", ["in the prefill", "in the answer"])
def test_a_node_that_is_lost_after_a_hit(victim, when):
    """Nobody has the hidden states between the nodes: all blocks compute the whole prompt again."""
    nodes = two(takes_back=1000)
    client = Client(*nodes, Node("c", 0, 2, takes_back=1000), Node("d", 2, BLOCKS, takes_back=1000))

    async def before(token, _session):
        if token == 4:
            dying.append(token)

    async def die(request):
        if request.tokens and (dying or when == "in the prefill"):
            raise RuntimeError("gone")

    async def several():
        await client.ask()
        for node in nodes:
            node.requests.clear()
        nodes[victim].script = die
        return await client.ask(before=before)

    dying: list[int] = []
    cached = run(several())
    assert client.swarm.failures == [nodes[victim].name]
    assert cached == (192 if when == "in the answer" or victim == 0 else 0)
    if victim == 1:
        assert sent(nodes[0]) > 200, "the other one, too, starts over"


@pytest.mark.parametrize("takes_back", [1000, 0])
def test_a_node_that_is_lost_as_it_is_asked_what_it_has(takes_back):
    """The one before it has agreed to go on from there, and begins anew with the other."""
    client = Client(*two(takes_back=takes_back), Node("d", 2, BLOCKS, takes_back=takes_back))

    async def die(request):
        if request.tokens == 0:
            raise RuntimeError("gone")

    async def several():
        await client.ask()
        client.swarm.nodes[1].script = die
        return await client.ask()

    assert run(several()) == 0
    assert client.swarm.failures == ["b"]


def test_tokens_are_taken_back_within_what_was_kept():
    client = Client(*two(takes_back=1000))

    async def several():
        await client.ask()
        session = client.blocks.open(1000, PROMPT)
        await session.step(embedded(PROMPT))
        assert session.cached_tokens == 192
        expected = blocks_of(0, BLOCKS)
        expected(embedded(PROMPT[:100]))
        session.truncate(100)
        output = await session.step(embedded([3, 4]))
        torch.testing.assert_close(output, expected(embedded([3, 4])), rtol=1e-4, atol=1e-4)
        await session.close()

    run(several())


def test_a_node_without_room_for_what_it_has_is_waited_for():
    client = Client(*two(takes_back=1000))
    full = []

    async def refuse_once(request):
        if request.tokens == 0 and not full:
            full.append(request)
            raise P2PHandlerError("failed: [petals-win:full] No room, says the node.")

    async def several():
        await client.ask()
        client.swarm.nodes[1].script = refuse_once
        assert await client.ask() == 192 and full and client.swarm.failures == []

    run(several())


def test_deep_prompts_are_never_found_nor_left():
    client = Client(*two(takes_back=1000))
    deep = torch.randn(BLOCKS, 1, 5, HIDDEN, generator=torch.Generator().manual_seed(5))

    async def several():
        for _ in range(2):
            assert await client.ask(prompts=deep) == 0
        assert await client.ask() == 0
        assert await client.ask(prompts=deep) == 0
        assert await client.ask() == 192

    run(several())


@pytest.mark.parametrize("says", [4, -1, True, "3", 10**9])
def test_a_node_that_says_nonsense_of_pages(says):
    client = Client(*two(takes_back=1000), Node("c", 0, 2), Node("d", 2, BLOCKS))

    async def several():
        await client.ask()
        client.swarm.nodes[0].says_of_pages = says
        return await client.ask()

    assert run(several()) == 0
    assert client.swarm.failures == (["a"] if type(says) is int else [])


def test_a_new_prompt_costs_no_message_more():
    client = Client(*two(takes_back=1000))

    async def messages(prompt: list[int]) -> list[int]:
        before = [len(node.requests) for node in client.swarm.nodes]
        await client.ask(prompt)
        return [len(node.requests) - count for node, count in zip(client.swarm.nodes, before, strict=True)]

    async def several():
        first = await messages(PROMPT)
        assert await messages([60, *PROMPT[1:]]) == first
        assert await messages([*PROMPT[:150], *range(50)]) == [first[0] - 2, first[1] - 2]

    run(several())


def test_what_is_known_to_be_left_is_bounded(monkeypatch):
    monkeypatch.setattr(pages_module, "_MOST_LEFT", 5)
    left = LeftPages()
    pages = [[bytes([chat, page]) for page in range(2)] for chat in range(3)]
    for chat in (0, 1, 0, 2):
        left.add(pages[chat])
    assert len(left._pages) == 5
    assert [left.among(each) for each in pages] == [
        pages[0],
        [],
        pages[2],
    ], "the oldest page of the oldest chat is gone"
    assert left.among([pages[0][0], b"another", pages[0][1]]) == pages[0][:1]


def test_hashes_cover_all_tokens_before_and_what_else_matters(monkeypatch):
    hashes = page_hashes(PROMPT, "model")
    assert len(hashes) == 3 and len(set(hashes)) == 3
    assert page_hashes(PROMPT[:130], "model") == hashes[:2] and page_hashes(PROMPT[:63], "model") == []
    other = page_hashes([51, *PROMPT[1:]], "model")
    assert not set(other) & set(hashes) and not set(page_hashes(PROMPT, "other")) & set(hashes)
    monkeypatch.setattr(pages_module, "_SALT", bytes(32))
    assert not set(page_hashes(PROMPT, "model")) & set(hashes)
