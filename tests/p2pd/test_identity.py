"""Statements 21 and 22 of the conformance checklist: identity files."""

from __future__ import annotations

from pathlib import Path

import p2pd_wire as wire
import pytest
from conftest import Start
from p2pd_client import Program


def test_21_a_file_of_hivemind(program: Program, start: Start, tmp_path: Path) -> None:
    from hivemind.p2p import P2P, PeerID

    path = tmp_path / "identity"
    P2P.generate_identity(str(path))
    daemon = start(program, f"-id={path}")
    assert wire.base58(daemon.peer_id) == PeerID.from_identity(path.read_bytes()).to_base58()


def test_21_a_key_of_ours(program: Program, start: Start, tmp_path: Path) -> None:
    from petals_win.swarm.identity import new_key

    path = tmp_path / "identity"
    path.write_bytes(new_key())
    ids = {start(program, f"-id={path}").peer_id for _ in range(2)}
    assert [peer_id[-32:] for peer_id in ids] == [path.read_bytes()[-32:]]


def test_22_a_new_identity_at_each_start(program: Program, start: Start) -> None:
    ids = {start(program).peer_id for _ in range(2)}
    assert len(ids) == 2
    assert all(peer_id.startswith(bytes.fromhex("0024080112 20")) for peer_id in ids)


@pytest.mark.parametrize(
    "content", [None, b"", b"no key", b"\x08\x01\x12\x02ab"], ids=["missing", "empty", "text", "short"]
)
def test_21_a_bad_file_is_named(our: Program, start: Start, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "identity"
    if content is not None:
        path.write_bytes(content)
    daemon = start(our, f"-id={path}", ready=False)
    assert daemon.wait(20) == 1
    assert str(path) in daemon.output()[-1]
