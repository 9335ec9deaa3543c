"""The two names of a model, and who is found by which."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest

from petals_win.swarm.naming import chain_for, join_names, keys_of, names_of, servers_of, split_names
from petals_win.swarm.protocol import PROTOCOL, mismatch

CONTENT, OTHER = "llama-0123456789abcdef", "llama-fedcba9876543210"
PREFIX = join_names("Tiny-hf", CONTENT)
UIDS = [f"{PREFIX}.{block}" for block in range(3)]


@dataclass
class Info:
    content_id: str | None = None
    protocol: int | None = None
    start_block: int | None = 0
    end_block: int | None = 2


@pytest.mark.parametrize("name", ["Tiny-hf", "a@b", f"a@{OTHER}", ""])
def test_names_are_told_apart(name):
    assert split_names(join_names(name, CONTENT)) == (name, CONTENT)
    assert split_names(f"{join_names(name, CONTENT)}.7") == (name, CONTENT)


@pytest.mark.parametrize("prefix", ["Tiny-hf", "Tiny@hf", "Tiny@llama-0123", "Tiny@Llama-0123456789abcdef"])
def test_a_prefix_of_upstream_has_no_content(prefix):
    assert split_names(prefix) == (prefix, None)
    assert keys_of([f"{prefix}.0", f"{prefix}.1"]) == names_of(f"{prefix}.0") + names_of(f"{prefix}.1")


def test_blocks_are_announced_as_upstream_does_and_nodes_by_their_content():
    assert keys_of(UIDS) == ["Tiny-hf.0", "Tiny-hf.1", "Tiny-hf.2", CONTENT]
    assert keys_of([]) == []


def test_requests_name_blocks_as_the_server_knows_them():
    assert chain_for(Info())(UIDS[:2]) == "Tiny-hf.0 Tiny-hf.1"
    assert chain_for(Info(CONTENT))(UIDS[1:]) == f"{CONTENT}.1 {CONTENT}.2"
    assert chain_for(Info(CONTENT))(["Tiny-hf.0"]) == "Tiny-hf.0", "a client that was given upstream's prefix"


def test_servers_are_found_by_both_names():
    before, same, renamed = Info(), Info(CONTENT, PROTOCOL), Info(CONTENT, PROTOCOL, 1, 3)
    by_name = {"before": before, "same": same}
    found = [by_name, by_name, {}, {"same": same, "renamed": renamed}]
    assert servers_of(UIDS, found) == [by_name, {**by_name, "renamed": renamed}, {"renamed": renamed}]
    assert servers_of(UIDS[2:], [{}, {"renamed": renamed, "same": same}]) == [{"renamed": renamed}]


def test_another_revision_and_another_protocol_are_left_out_and_that_is_told_once(caplog):
    caplog.set_level(logging.WARNING)
    revision, future = Info(OTHER, PROTOCOL), Info(CONTENT, PROTOCOL + 1)
    strange = Info(OTHER, PROTOCOL, 0, 3)
    found = [{"QmRevision": revision, "QmFuture": future}, {}, {}, {"QmFuture": future, "QmStrange": strange}]
    for _ in range(2):
        assert servers_of(UIDS, found) == [{}, {}, {}]
    revision_line, protocol_line = [record.getMessage() for record in caplog.records]
    assert "evision" in revision_line and OTHER in revision_line and CONTENT in revision_line
    assert f"the protocol {PROTOCOL + 1}, this PC {PROTOCOL}" in protocol_line and "Update" in protocol_line


@pytest.mark.parametrize(
    "protocol, fits", [(None, True), (PROTOCOL, True), (PROTOCOL + 1, False), (0, False), ("1", False)]
)
def test_protocols_that_are_understood(protocol, fits):
    assert (mismatch(protocol, "It") is None) == fits
