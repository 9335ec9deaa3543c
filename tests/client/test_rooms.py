"""How long a conversation the nodes of a route have room for."""

from __future__ import annotations

import pytest

from petals_win.client.rooms import Rooms
from petals_win.swarm.state import PeerState, SwarmState


def longest(*nodes: tuple[int, int, int | None], online: bool = True) -> int | None:
    """Of a model of 4 blocks and nodes (start, end, tokens)."""
    rooms = Rooms("M")
    peers = tuple(PeerState(f"peer {n}", start, end, online, 1.0) for n, (start, end, _) in enumerate(nodes))
    rooms._tokens = {(peer.peer_id, peer.start, peer.end): node[2] for peer, node in zip(peers, nodes, strict=True)}
    return rooms.longest(SwarmState(4, peers))


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([(0, 2, 700), (2, 4, 900)], 700),
        ([(0, 2, 700), (0, 2, 800), (2, 4, 900)], 800),
        ([(0, 3, 700), (1, 4, 900)], 700),
        ([(0, 2, None), (2, 4, 900)], 900),
        ([(0, 4, None)], None),
        ([(0, 2, 700)], None),
        ([], None),
    ],
    ids=["the least of a route", "twins", "overlapping", "one does not say", "none says", "a gap", "nobody"],
)
def test_the_longest_conversation(nodes, expected):
    assert longest(*nodes) == expected


def test_nodes_that_are_not_online_do_not_count():
    assert longest((0, 4, 700), online=False) is None
