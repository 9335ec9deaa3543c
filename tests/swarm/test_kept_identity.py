"""What a node keeps from one start to the next."""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from contextlib import ExitStack

import pytest
from free_ports import free_port

from petals_win.errors import UserError
from petals_win.host import folders
from petals_win.swarm import identity
from petals_win.swarm.identity import Identity, hold_identity

FIRST, SECOND = {"blocks": "0:2", "device": None}, {"blocks": "2:4", "device": None}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PETALS_WIN_HOME", str(tmp_path))
    monkeypatch.setattr(identity, "_RELEASE_SECONDS", 0)
    return tmp_path


def once(model: str = "Tiny", asked: dict = FIRST, host: str = "127.0.0.1", port: int = 0) -> tuple[bytes, int]:
    with hold_identity(model, asked, host=host, port=port) as held:
        return held.key.read_bytes(), held.port


def test_it_is_the_same_at_the_next_start():
    assert once() == once() == once("TINY")


def test_models_and_kinds_of_host_have_their_own():
    held = [once(), once("Other"), once(host="0.0.0.0")]
    assert len({key for key, _ in held}) == len({port for _, port in held}) == 3


def test_two_nodes_at_once_have_one_each_and_get_it_again_in_any_order():
    def at_once(*asked: dict) -> list[tuple[bytes, int]]:
        with ExitStack() as stack:
            held = [stack.enter_context(hold_identity("Tiny", one, host="127.0.0.1")) for one in asked]
            return [(one.key.read_bytes(), one.port) for one in held]

    first, second = at_once(FIRST, SECOND)
    assert first[0] != second[0] and first[1] != second[1]
    assert at_once(SECOND, FIRST) == [second, first]
    assert once(asked=SECOND) == second
    *both, twin = at_once(FIRST, SECOND, FIRST)
    assert both == [first, second] and twin not in both
    assert at_once(SECOND, FIRST, FIRST) == [second, first, twin]


def test_a_lone_node_keeps_it_when_it_is_asked_for_other_blocks():
    assert (
        once(asked=FIRST)
        == once(asked={"blocks": "0:3", "device": None})
        == once(asked={"blocks": None, "device": None})
    )


def test_a_given_port_is_kept():
    port = free_port()
    key, _ = once()
    assert once(port=port) == (key, port)
    assert once() == (key, port)


def test_a_given_port_in_use_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(UserError, match="in use"):
        once(port=server.getsockname()[1])


def test_while_the_kept_port_is_in_use_another_is_taken_and_said(caplog):
    key, port = once()
    with socket.create_server(("127.0.0.1", port)):
        same, other = once()
        assert same == key and other not in (0, port)
    (record,) = caplog.records
    assert f"Port {port} is in use by" in record.getMessage() and "once it is free" in record.getMessage()
    assert once() == (key, port)


def test_members_are_remembered():
    with hold_identity("Tiny", FIRST, host="127.0.0.1") as held:
        assert held.members() == {}
        held.remember({"QmA": ["/ip4/1.2.3.4/tcp/5/p2p/QmA"]})
        held.remember({})
    with hold_identity("Tiny", FIRST, host="127.0.0.1") as held:
        assert held.members() == {"QmA": ["/ip4/1.2.3.4/tcp/5/p2p/QmA"]}


def test_a_damaged_note_is_made_anew_and_the_key_stays(home, caplog):
    key, _ = once()
    (note,) = home.glob("data/nodes/*/0/node.json")
    note.write_bytes(b"\x00\xff{")
    assert once()[0] == key
    assert str(note) in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="there a folder in the user's profile is this user's alone")
def test_nobody_else_can_read_it(home):
    once()
    (key,) = home.glob("data/nodes/*/0/key")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in list(key.parents)[:3]} == {0o700}


def test_a_full_disk_is_a_sentence(monkeypatch):
    def full(source, destination):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source)

    monkeypatch.setattr(folders.os, "replace", full)
    with pytest.raises(UserError, match="No space left.*PETALS_WIN_HOME"):
        once()
    monkeypatch.undo()


def test_an_error_of_the_node_is_not_taken_for_one_of_the_folder():
    with pytest.raises(ConnectionResetError), hold_identity("Tiny", FIRST, host="127.0.0.1") as held:
        assert isinstance(held, Identity)
        raise ConnectionResetError
