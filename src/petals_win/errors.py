"""Errors whose message is written for people, and the kinds of a node's errors that are no failure of the node.

Knows how a kind travels inside of the text of an error, which is all that the network carries. Knows nothing of the rest.
"""

from __future__ import annotations

import re


class UserError(Exception):
    """Something the user can put right. The message is one or two sentences: what happened, why, what to do next.

    The command line prints it without a traceback and exits 1; the HTTP API answers it as a 4xx or 503.
    """


class NodeError(Exception):
    """A healthy node does not do what it was asked for. `str()` is what travels to the client, `sentence` is for people."""

    kind = ""

    def __init__(self, sentence: str):
        super().__init__(sentence)
        self.sentence = sentence

    def __str__(self) -> str:
        return f"[petals-win:{self.kind}] {self.sentence}"


class NodeFull(NodeError):
    """The node has no room for the session now: wait, or ask elsewhere."""

    kind = "full"


class NodeRefused(NodeError):
    """The node will never do this, however often it is asked."""

    kind = "refused"


_MARKED = re.compile(r"\[petals-win:(full|refused)\] (.*)", re.DOTALL)
# What nodes of other versions say: by name of the exception, or by what it is about. The first says that it is for good.
_UNMARKED_REFUSAL = re.compile(r"max cache size|sets aside [0-9]+ in all|cannot allocate KV cache for", re.IGNORECASE)
_UNMARKED_FULL = re.compile(r"AllocationFailed|could not allocate|bytes of KV cache", re.IGNORECASE)
_LONGEST = 300  # characters of a sentence that a stranger wrote


def node_error(text: str) -> NodeError | None:
    """The node's error that the text of an exception carries; None if it has none, so that the node has failed.

    What a node says is not trusted: it is cut to a sentence's length, and only printable characters are left.
    """
    if (marked := _MARKED.search(text)) is not None:
        kind = NodeFull if marked[1] == NodeFull.kind else NodeRefused
        return kind(printable(marked[2]))
    if _UNMARKED_REFUSAL.search(text):
        return NodeRefused(printable(text))
    return NodeFull(printable(text)) if _UNMARKED_FULL.search(text) else None


def printable(text: str) -> str:
    """A stranger's text on one line of bounded length, without control characters."""
    line = "".join(c if c.isprintable() else " " for c in text[: 4 * _LONGEST])
    line = " ".join(line.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1].rstrip() + "…"
