"""Which blocks a node takes of a model that cannot be cut everywhere; of others the rule is Petals' own."""

from __future__ import annotations

import pytest
from hivemind import PeerID
from petals.data_structures import RemoteModuleInfo, ServerInfo, ServerState

from petals_win.models.cuts import Cuts
from petals_win.node.placement import choose_blocks, others_are_better

TAIL = Cuts((0, 1, 2, 3, 4, 10))
PEERS = [PeerID(bytes([number]) * 32) for number in range(4)]


def swarm(*spans: tuple[int, int, float]) -> list[RemoteModuleInfo]:
    """Nodes, in the order of PEERS, with their blocks and speeds."""
    found = []
    for block in range(10):
        servers = {
            peer: ServerInfo(ServerState.ONLINE, throughput=speed, start_block=start, end_block=end)
            for peer, (start, end, speed) in zip(PEERS, spans, strict=False)
            if start <= block < end
        }
        found.append(RemoteModuleInfo(uid=f"model.{block}", servers=servers))
    return found


@pytest.mark.parametrize(
    ("most", "there", "chosen"),
    [
        (10, [], (0, 10)),
        (7, [], (3, 10)),
        (5, [], (0, 4)),  # no more before the run that has to stay together
        (5, [(3, 10, 1.0)], (0, 4)),
        (7, [(0, 4, 1.0)], (3, 10)),
        (2, [(0, 2, 1.0), (4, 10, 1.0)], (2, 4)),
        (2, [(2, 4, 1.0), (0, 2, 9.0), (4, 10, 1.0)], (2, 4)),
    ],
)
def test_what_the_swarm_lacks_most(most, there, chosen):
    assert choose_blocks(TAIL, most, swarm(*there)) == chosen


def test_where_it_may_be_cut_anywhere_the_rule_is_petals_own():
    assert choose_blocks(Cuts(tuple(range(11))), 5, swarm((0, 5, 1.0))) == (5, 10)


@pytest.mark.parametrize(
    ("most", "there", "better"),
    [
        (4, [(0, 4, 1.0), (0, 4, 1.0), (4, 10, 1.0)], False),  # it has no room for what would help
        (6, [(0, 4, 1.0), (0, 4, 1.0), (4, 10, 0.5)], True),
        (6, [(0, 4, 1.0), (4, 10, 0.5)], False),  # nobody else has its blocks
        (6, [(0, 4, 1.0)], False),
    ],
)
def test_when_it_moves(most, there, better):
    assert others_are_better(PEERS[0], TAIL, most, swarm(*there), 0.75) is better
    assert others_are_better(PEERS[0], TAIL, most, swarm(*there), 1.5)
