"""Who a node is from one start to the next: its private key, its port, and the nodes that it was with.

Kept in this user's data folder by the model's name and locked while a node runs, so that the same command has the same address
again. A second node of the same model on this PC has an identity of its own; the one that a command had before is the first that it
is given again. Knows files, locks and ports. Does not know hivemind.

    data folder / nodes / MODEL [-this-pc] / NUMBER / key         a libp2p private key, as p2pd reads it
                                                    / node.json    the port, and what the node was asked for
                                                    / members.json addresses of the swarm's other nodes, by peer ids
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from petals_win.errors import UserError
from petals_win.host.folders import data_folder, private_folder, write_private
from petals_win.host.locks import hold_lock
from petals_win.host.ports import check_port_free

logger = logging.getLogger(__name__)

# Below the ports that Windows and Linux hand out to whoever asks, so that no other program gets a node's port by chance.
_FIRST_PORT, _LAST_PORT = 31000, 32699
_TRIES = 100
_RELEASE_SECONDS = 5.0  # the p2pd of a node that was killed takes a moment to end
_CHOICE_SECONDS = 30.0
_LOOPBACK = ("127.", "::1", "localhost")


@dataclass(frozen=True)
class Identity:
    """A node's identity while it runs: the file of its key, and the TCP port to listen on."""

    key: Path
    port: int

    @property
    def public_key(self) -> bytes:
        """What its peer id is made of; of any use only if the file is sound, which p2pd checks."""
        return self.key.read_bytes()[-32:]

    @property
    def _members(self) -> Path:
        return self.key.with_name("members.json")

    def members(self) -> Any:
        """What was remembered at last, unchecked; an empty dictionary if nothing was."""
        return _read_json(self._members)

    def remember(self, members: Mapping[str, list[str]]) -> None:
        """Keep addresses of the swarm's other nodes. While there are none, those of before stay."""
        if members and members != self.members():
            write_private(self._members, json.dumps(members).encode())


@contextmanager
def hold_identity(model: str, asked: Mapping[str, object], *, host: str, port: int = 0) -> Iterator[Identity]:
    """The identity of a node of `model` for the length of a with block.

    :param model: the model's name, in any case
    :param asked: what tells this node from others of the same model on this PC: its blocks, its device
    :param port: to use and keep; 0 takes the kept one, or finds one
    Raises UserError if the port given is in use, or the data folder cannot be written to.
    """
    with ExitStack() as held:
        try:
            identity = _choose(private_folder(data_folder() / "nodes"), model, dict(asked), host, port, held)
        except OSError as e:
            raise UserError(
                f"The identity of this node cannot be kept in {e.filename or data_folder()}: {e.strerror}. Make room there, set "
                "PETALS_WIN_HOME to a folder that you can write to, or use --fresh."
            ) from e
        yield identity


def new_key() -> bytes:
    """A private key as libp2p stores it: a protobuf of type (1: Ed25519) and data (seed and public key, 64 bytes)."""
    key = Ed25519PrivateKey.generate()
    raw = serialization.Encoding.Raw
    seed = key.private_bytes(raw, serialization.PrivateFormat.Raw, serialization.NoEncryption())
    data = seed + key.public_key().public_bytes(raw, serialization.PublicFormat.Raw)
    return bytes([0x08, 1, 0x12, len(data)]) + data


def _choose(nodes: Path, model: str, asked: dict[str, object], host: str, port: int, held: ExitStack) -> Identity:
    with hold_lock(nodes / "choice.lock", "the choice of a node's identity", _CHOICE_SECONDS):
        folder = _take(private_folder(_folder_of(nodes, model, host)), asked, held)
        kept = _read_json(folder / "node.json").get("port")
        own, listening = _choose_port(nodes, folder, kept, host, port)
        write_private(folder / "node.json", json.dumps({**asked, "port": own}).encode())
        if not (folder / "key").exists():
            write_private(folder / "key", new_key())
    return Identity(folder / "key", listening)


def _folder_of(nodes: Path, model: str, host: str) -> Path:
    """Where nodes of this model that others can reach are kept, or those for this PC alone: they are in different swarms."""
    name = re.sub(r"[^\w-]", "_", model.casefold())
    return nodes / (f"{name}-this-pc" if host.startswith(_LOOPBACK) else name)


def _take(model: Path, asked: dict[str, object], held: ExitStack) -> Path:
    """Lock the identity of a node that was asked for the same, else any that no node uses now, else a new one."""
    known = {folder: _read_json(folder / "node.json") for folder in sorted(model.glob("[0-9]*"), key=_number)}
    same = [folder for folder, kept in known.items() if {**kept, "port": None} == {**asked, "port": None}]
    unused = (model / str(number) for number in itertools.count() if model / str(number) not in known)
    for folder in itertools.chain(same, (folder for folder in known if folder not in same), unused):
        private_folder(folder)
        with suppress(UserError):
            held.enter_context(hold_lock(folder / "in-use.lock", "a node of this model"))
            return folder
    raise AssertionError("the numbers do not end")


def _number(folder: Path) -> int:
    return int(folder.name) if folder.name.isdecimal() else 0


def _choose_port(nodes: Path, folder: Path, kept: object, host: str, asked: int) -> tuple[int, int]:
    """The port to keep and the one to listen on now: they differ while another program uses the kept one."""
    if asked:
        check_port_free(host, asked)
        return asked, asked
    if not isinstance(kept, int) or not 0 < kept < 65536:
        found = _find_port(nodes, host)
        return found, found
    deadline = time.monotonic() + _RELEASE_SECONDS
    while True:
        try:
            check_port_free(host, kept)
            return kept, kept
        except UserError as e:
            if time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            logger.warning(
                "%s This node takes another port for now; lines that name port %d hold again once it is free.",
                str(e).partition(". ")[0] + ".",
                kept,
            )
            return kept, _find_port(nodes, host)


def _find_port(nodes: Path, host: str) -> int:
    """A free port that no node on this PC keeps, whatever its model; 0, by which the system chooses, if there is none left."""
    kept = {_read_json(file).get("port") for file in nodes.glob("*/*/node.json")}
    ports = random.sample(range(_FIRST_PORT, _LAST_PORT + 1), _TRIES)  # two that look at once do not find the same
    return next((port for port in ports if port not in kept and _free(host, port)), 0)


def _free(host: str, port: int) -> bool:
    try:
        check_port_free(host, port)
    except UserError:
        return False
    return True


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        content = None
    if isinstance(content, dict):
        return content
    logger.warning("%s is damaged and is made anew", file)
    return {}
