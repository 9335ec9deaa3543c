"""Addresses of other nodes, as they come from others or from a file."""

from __future__ import annotations

import pytest

from petals_win.swarm.members import MOST_MEMBERS, addresses_to_announce, checked_members

PEER = "12D3KooWFta2AE7oiK1ioqjVAKajUJauZWfeM7R413K7ARtHRDAu"
GOOD = f"/ip4/192.168.1.5/tcp/31330/p2p/{PEER}"


def test_others_are_told_no_address_of_this_pc_alone():
    assert addresses_to_announce(["/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.5/tcp/1"]) == ("/ip4/192.168.1.5/tcp/1",)
    assert addresses_to_announce(["/ip4/127.0.0.1/tcp/1"]) == ("/ip4/127.0.0.1/tcp/1",)
    assert len(addresses_to_announce(f"/ip4/192.168.1.5/tcp/{port}" for port in range(1, 100))) == 8


@pytest.mark.parametrize(
    "bad", [5, "", f"/p2p/{PEER}x", f"/ip4/1.2.3/tcp/1/p2p/{PEER}", f"/ip4/1.2.3.4/tcp/1/p2p/{PEER[:-1]}", "/" * 9000]
)
def test_what_is_no_address_of_the_peer_is_left_out(bad):
    assert checked_members({PEER: [bad, GOOD]}) == {PEER: [GOOD]}
    assert checked_members({PEER: [bad]}) == {}


@pytest.mark.parametrize("found", [None, [], "x", {PEER: None}, {PEER: {GOOD: 1}}, {7: [GOOD]}])
def test_what_is_no_table_is_empty(found):
    assert checked_members(found) == {}


def test_few_are_enough():
    peers = [PEER[:-2] + f"{a}{b}" for a in "123456789" for b in "123456789"]
    many = {peer: [f"/ip4/192.168.1.5/tcp/1/p2p/{peer}"] * 20 for peer in peers}
    checked = checked_members(many)
    assert len(checked) == MOST_MEMBERS and all(len(addresses) == 8 for addresses in checked.values())
