"""The number of the protocol that this version speaks, and what its nodes announce beside what upstream's do.

Knows no network. Whoever announces no number is upstream's, or of a version before there was one, and speaks what 1 means.
"""

from __future__ import annotations

from dataclasses import dataclass

# agent.md tells when to raise them.
PROTOCOL = 1
OLDEST_PROTOCOL = 1

# In the metadata of a step: how many tokens of the session are kept before it, as Petals' clients after 2.2.0 say. In that of a
# session's first answer: how many tokens can be taken back so; a node that does not say does not heed the other one.
START, TAKES_BACK = "start_from_position", "takes_back"
# In the metadata of a session's first step, which has no tokens, and of its last message: the hashes of the pages that its tokens begin
# with. In the answer to the first: of how many of them the node has what an earlier session left.
PAGES, CACHED_PAGES = "pages", "cached_pages"
# In the metadata of a step or of a chunk of one: how many of its last outputs the client wants, by the id of the session whose they
# are, since what is pushed brings the same metadata along. A session that is not named, or whose node does not heed it, sends all.
OUTPUTS = "last_outputs"
# In the metadata of a step: the name of the client's lines, on which the answer may come.
LINE = "line"

PETALS = "2.2.0.post1"  # whose RPCs and records these are: nodes announce it as their version


@dataclass(kw_only=True)
class Announced:
    """Of a node, in its records; upstream ignores what it does not know."""

    protocol: int | None = None
    content_id: str | None = None
    addresses: tuple[str, ...] = ()


def mismatch(protocol: object, who: str) -> str | None:
    """Why `who`, which speaks `protocol`, and this version do not understand each other; None if they do."""
    if protocol is None or (isinstance(protocol, int) and OLDEST_PROTOCOL <= protocol <= PROTOCOL):
        return None
    ours = f"{OLDEST_PROTOCOL} to {PROTOCOL}" if OLDEST_PROTOCOL < PROTOCOL else str(PROTOCOL)
    newer = isinstance(protocol, int) and protocol > PROTOCOL
    where = "on this PC" if newer else "there"
    return f"{who} speaks the protocol {protocol!r}, this PC {ours}. Update petals-win {where}."
