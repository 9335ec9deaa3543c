"""A private swarm on this PC: nodes as child processes on loopback.

Knows the command `petals-win serve` and its events. Does not know petals, so that importing it is quick.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from petals_win.errors import UserError
from petals_win.host.children import Child, spawn

_JOIN_SECONDS = 120  # from the start of a node's process to its place in the swarm
_SERVE_SECONDS = 600  # from there until its blocks are loaded
_EVENT, _ERROR = '{"event"', "petals-win: "  # what such lines of `petals-win serve --json` begin with


class NodeFailed(UserError):
    """A node of the local swarm ended, or did not get ready in time. The message has its last lines."""


@dataclass
class LocalNode:
    """One node: its process, its blocks, its addresses, and the bytes of memory that it had before loading."""

    blocks: str
    child: Child
    _events: queue.SimpleQueue[dict]
    _stop: threading.Event
    addresses: list[str] = field(default_factory=list)
    bytes_before_loading: int = 0
    serving: bool = False

    def wait_for(self, event: str, seconds: float) -> dict:
        """The node's next `event`. Raises NodeFailed if the node ends or takes too long, KeyboardInterrupt if stopped."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                found = self._events.get(timeout=0.2)
            except queue.Empty:
                if self._stop.is_set():
                    raise KeyboardInterrupt from None
                if self.child.returncode is not None:
                    self.child.wait(1)  # for its last lines
                    raise NodeFailed(self.failure() or "") from None
                if time.monotonic() > deadline:
                    raise NodeFailed(self._sentence(f"did not report {event!r} within {seconds:.0f} s")) from None
                continue
            if found["event"] == event:
                return found

    def failure(self) -> str | None:
        """Why it ended, in a sentence or two of its own if it said any; None while it runs."""
        status = self.child.returncode
        return None if status is None else self._sentence(f"ended with status {status}")

    def _sentence(self, what: str) -> str:
        lines = [line for line in self.child.output_tail(12) if line.strip() and not line.startswith(_EVENT)]
        for number, line in enumerate(lines):
            if line.startswith(_ERROR):
                return f"The node for the blocks {self.blocks} {what}: " + "\n".join(lines[number:]).removeprefix(
                    _ERROR
                )
        said = "".join(f"\n    {line}" for line in lines[-5:])
        return f"The node for the blocks {self.blocks} {what}." + (f" Its last lines:{said}" if said else "")


class LocalSwarm:
    """Nodes that serve the given spans of one model on 127.0.0.1. A context that ends them all.

    :param spans: e.g. ["0:15", "15:30"]; the same span twice makes a swarm that survives the loss of one
    :param on_line: called with the span and each line that its node prints
    :param stop: set to give up waiting
    """

    def __init__(
        self,
        model: str,
        spans: Sequence[str],
        *,
        options: Sequence[str] = (),
        on_line: Callable[[str, str], None] | None = None,
        stop: threading.Event | None = None,
    ):
        self._model, self._spans, self._options = model, spans, options
        self._on_line, self._stop = on_line, stop or threading.Event()
        self.nodes: list[LocalNode] = []

    @property
    def peers(self) -> list[str]:
        """Addresses by which a client joins."""
        return self.nodes[0].addresses[:1]

    def failures(self) -> set[str]:
        """A sentence for each node that has ended, though nobody stopped it."""
        return {failure for node in self.nodes if (failure := node.failure()) is not None}

    def __enter__(self) -> LocalSwarm:
        try:
            # All start at once, for most of a start is imports; the others then wait for the first one's address.
            for number, span in enumerate(self._spans):
                self._start(span, ["--peers", "-"] if number else [])
            first, *others = self.nodes
            self._wait_until_joined(first)
            for node in others:
                node.child.tell(self.peers[0])
            for node in others:
                self._wait_until_joined(node)
        except NodeFailed as e:
            sentences = {str(e)} | self.failures()  # that another node has ended may be why
            self.stop()
            raise NodeFailed("\n".join(sorted(sentences))) from None
        except BaseException:
            self.stop()
            raise
        return self

    def add_node(self, span: str) -> LocalNode:
        """Start one more node and wait until it has joined the swarm; its blocks may still be loading then."""
        node = self.prepare_node(span)
        self.let_in(node)
        return node

    def prepare_node(self, span: str) -> LocalNode:
        """Start one more node, which waits for `let_in`."""
        return self._start(span, ["--peers", "-"])

    def let_in(self, node: LocalNode) -> None:
        """Wait until a prepared node has joined the swarm; its blocks may still be loading then."""
        node.child.tell(self.peers[0])
        self._wait_until_joined(node)

    def _start(self, span: str, peers: list[str]) -> LocalNode:
        command = [sys.executable, "-m", "petals_win.cli.main", "serve", "--json"]
        command += ["--model", self._model, "--blocks", span, "--host", "127.0.0.1", "--fresh"]
        command += [*self._options, *peers]
        events: queue.SimpleQueue[dict] = queue.SimpleQueue()

        def take(line: str) -> None:
            if line.startswith(_EVENT):
                events.put(json.loads(line))
            elif self._on_line is not None:
                self._on_line(span, line)

        node = LocalNode(span, spawn(command, on_line=take), events, self._stop)
        self.nodes.append(node)
        return node

    def _wait_until_joined(self, node: LocalNode) -> None:
        joined = node.wait_for("joined", _JOIN_SECONDS)
        node.addresses, node.bytes_before_loading = joined["peers"], joined["memory_bytes"]

    def wait_until_serving(self) -> None:
        """Wait until every node has loaded its blocks."""
        for node in self.nodes:
            if node.child.returncode is None and not node.serving:
                node.wait_for("serving", _SERVE_SECONDS)
                node.serving = True

    def stop(self) -> None:
        """End all nodes at the same time. Safe to call twice."""
        for node in self.nodes:
            node.child.ask_to_end()
        while self.nodes:
            self.nodes.pop().child.stop()

    def __exit__(self, _type: type | None, _value: BaseException | None, _traceback: TracebackType | None) -> None:
        self.stop()
