"""The two names of a model in a swarm, and what nodes announce under each.

One is upstream's, made of the model's name, which a renamed folder changes: older versions and upstream's nodes know no other. The
other is made of the model's content (petals_win.models.content). Within a process both travel as one prefix, "NAME@CONTENT";
without a content it is upstream's alone. A node announces its blocks one by one under NAME.BLOCK, as upstream does, and itself
once under CONTENT. Requests name a block NAME.BLOCK where the server announces no content, else CONTENT.BLOCK.

Knows texts. Does not know petals or a network.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from petals_win.swarm.protocol import mismatch

logger = logging.getLogger(__name__)

MODELS = "_petals_win.models"  # the key below which all models of a swarm are listed, by both names
_PREFIX = re.compile(r"(?P<name>.*)@(?P<content>[a-z0-9_]+-[0-9a-f]{16})", re.DOTALL)


class Named(Protocol):
    """Tells whether a node announces a content."""

    @property
    def content_id(self) -> str | None: ...


class Info(Protocol):
    """What is read of a node's announcement."""

    protocol: int | None
    content_id: str | None
    start_block: int | None
    end_block: int | None


P = TypeVar("P")
I = TypeVar("I", bound=Info)  # noqa: E741
_told: set[tuple[str, str]] = set()


def join_names(name: str, content: str) -> str:
    """The prefix of both names."""
    return f"{name}@{content}"


def split_names(prefix: str) -> tuple[str, str | None]:
    """NAME and CONTENT of a prefix, or of the uid of a block; None where it has no content."""
    match = _PREFIX.fullmatch(prefix.partition(".")[0])
    return (match["name"], match["content"]) if match else (prefix.partition(".")[0], None)


def block_of(uid: str) -> int:
    return int(uid.rpartition(".")[2])


def names_of(uid: str) -> list[str]:
    """What requests may call a block: NAME.BLOCK, and CONTENT.BLOCK if there is a content."""
    name, content = split_names(uid)
    return [f"{known}.{block_of(uid)}" for known in (name, content) if known is not None]


def keys_of(uids: Sequence[str]) -> list[str]:
    """Where the servers of these blocks are found: the key of each block, then, if there is a content, that of all its nodes."""
    content = split_names(uids[0])[1] if uids else None
    return [names_of(uid)[0] for uid in uids] + ([] if content is None else [content])


def chain_for(info: Named) -> Callable[[Iterable[str]], str]:
    """Makes of the uids of successive blocks what a request to the server that announces `info` calls them."""
    return lambda uids: " ".join(names_of(uid)[-1 if info.content_id is not None else 0] for uid in uids)


def servers_of(uids: Sequence[str], found: Sequence[Mapping[P, I]]) -> list[dict[P, I]]:
    """Of what was found below `keys_of(uids)`, the servers of each block that this PC understands and that have its content."""
    content = split_names(uids[0])[1] if uids else None

    servers = [
        {peer: info for peer, info in some.items() if _fits(peer, info, content)} for some in found[: len(uids)]
    ]
    for peer, info in found[len(uids)].items() if content is not None else ():
        blocks = range(info.start_block or 0, info.end_block or 0) if info.content_id == content else range(0)
        for uid, known in zip(uids, servers, strict=True):
            if block_of(uid) in blocks and _fits(peer, info, content):
                known[peer] = info
    return servers


def _fits(peer: object, info: Info, content: str | None) -> bool:
    """Whether requests may go to a peer; if not, the reason is told once."""
    reason = mismatch(info.protocol, "It")
    if content is not None and info.content_id not in (None, content):
        reason = f"It has {info.content_id} under the same name, this PC {content}: another revision or another file format."
    if reason is not None and (key := (str(peer), reason)) not in _told:
        _told.add(key)
        logger.warning("The peer …%s is left out. %s", str(peer)[-6:], reason)
    return reason is None
