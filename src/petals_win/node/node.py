"""One node: checks what it was asked for, then runs a Server until a signal ends it.

Knows servers, models and this PC's memory. Does not know the command line.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from hivemind.dht.routing import DHTID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonLost
from petals.server.reachability import check_direct_reachability

from petals_win.daemon.process import DaemonLost
from petals_win.dht.joining import CANNOT_BE_REACHED
from petals_win.errors import UserError
from petals_win.host.addresses import is_loopback, listen_maddr, most_useful
from petals_win.host.ports import check_port_free
from petals_win.host.signals import stop_event
from petals_win.models.source import ModelSource, open_model
from petals_win.node.server import Server
from petals_win.node.settings import ServerSettings
from petals_win.span.choices import choose_device, choose_dtype, choose_quant
from petals_win.span.kv_int8 import parse_kv_cache_dtype
from petals_win.span.needs import check_fits, needs_of
from petals_win.swarm.identity import Identity, hold_identity
from petals_win.swarm.members import checked_members, noting_members, rejoin
from petals_win.swarm.revision import check_content

logger = logging.getLogger(__name__)

_END_OF_DAEMON_S = 5.0  # from its last word until the system has reported that it is gone
# Upstream's servers end a session after 30 minutes, and after 5 without a step. A long prompt takes a slow PC longer than that, and a node
# waits for as long when the one behind it is lost, whose past is then computed anew. Who has gone is noticed without a deadline.
_SESSION_SECONDS, _STEP_SECONDS = 24 * 3600.0, 1800.0
_UPDATE_SECONDS = 20  # how often blocks are announced; a node that dies is forgotten after three times as long


@dataclass(frozen=True)
class NodeSettings:
    """What the user asked of this node; None is "choose for me"."""

    model: str
    peers: tuple[str, ...] = ()
    blocks: str | None = None
    host: str = "0.0.0.0"
    port: int = 0
    device: str | None = None
    dtype: str | None = None
    quant: str | None = None
    kv_cache_dtype: str = "auto"
    adapters: tuple[str, ...] = ()
    name: str | None = None
    token: str | None = field(default=None, repr=False)
    internet: bool = False  # open a port on the router, use relays and be one
    fresh: bool = False  # another address than last time, and a swarm of its own if there are no peers


class Node:
    """Joins the swarm when entered, serves in `run`, leaves when exited. Raises UserError for what the user can mend."""

    def __init__(self, settings: NodeSettings):
        self._settings = settings
        self._stop = stop_event()
        self._held = ExitStack()

    def __enter__(self) -> Node:
        try:
            self._join()
        except BaseException:
            self._held.close()
            raise
        return self

    def _join(self) -> None:
        settings = self._settings
        source = open_model(settings.model, token=settings.token)
        device = choose_device(settings.device)
        dtype = choose_dtype(settings.dtype, source, device)
        quant = choose_quant(settings.quant, device, bool(settings.adapters), source)
        kv_cache = parse_kv_cache_dtype(settings.kv_cache_dtype)
        if settings.blocks is not None:
            start, end = parse_blocks(settings.blocks, source.num_blocks)
            needs = needs_of(source.config, dtype, quant, source.in_few_bits_on(device.type), kv_cache)
            needs.cuts.check(start, end)
            check_fits(source.name, start, end, needs, device)
        on_this_pc = is_loopback(listen_maddr(settings.host, settings.port))
        if settings.internet and on_this_pc:
            raise UserError(
                f"--internet and --host {settings.host}, which keeps the node on this PC, exclude each other."
            )
        port, identity = settings.port, self._hold_identity(source)
        if identity is not None:
            port = identity.port
        elif port:
            check_port_free(settings.host, port)
        listen = [listen_maddr(settings.host, port)]
        if settings.peers and not on_this_pc and not settings.internet:
            check_reachable(settings.peers, listen)
        asked = ServerSettings(
            initial_peers=settings.peers,
            dht_prefix=source.swarm_name,
            converted_model_name_or_path=settings.model,
            public_name=settings.name,
            block_indices=settings.blocks,
            torch_dtype=str(dtype).removeprefix("torch."),
            device=device,
            quant_type=quant,
            kv_cache_dtype=kv_cache,
            token=settings.token,
            adapters=settings.adapters,
            update_period=_UPDATE_SECONDS,
            expiration=3 * _UPDATE_SECONDS,
            session_timeout=_SESSION_SECONDS,
            step_timeout=_STEP_SECONDS,
            inference_max_length=source.context_length,
            # A peer behind a NAT is found out by asking the others to dial it; the first one has nobody to ask.
            reachable_via_relay=None if settings.internet and settings.peers else False,
            use_relay=not on_this_pc,
            use_auto_relay=settings.internet,
        )
        self._server = Server(
            asked,
            stop=self._stop,
            host_maddrs=listen,
            startup_timeout=60,
            nat_port_map=settings.internet,
            **identity_arguments(identity),
        )
        self._held.callback(self._server.shutdown)
        self._find_swarm(identity, source)

    def _hold_identity(self, source: ModelSource) -> Identity | None:
        """The same as last time, for as long as this node runs; None: p2pd makes a new one."""
        settings = self._settings
        if settings.fresh:
            return None
        asked = {"blocks": settings.blocks, "device": settings.device}
        holding = hold_identity(source.dht_prefix, asked, host=settings.host, port=settings.port)
        return self._held.enter_context(holding)

    def _find_swarm(self, identity: Identity | None, source: ModelSource) -> None:
        """Look for the nodes that were with this one before, and note from now on which are."""
        dht = self._server.dht
        if identity is not None and not self._settings.peers:
            if found := rejoin(dht, checked_members(identity.members())):
                logger.info("Found %d of the nodes again that were in the swarm before", found)
        check_content(dht, source.swarm_name)
        if identity is not None:
            self._held.enter_context(noting_members(dht, source.content_id, identity.remember))

    @property
    def addresses(self) -> list[str]:
        """Multiaddrs at which other PCs can join, the most useful first."""
        return most_useful([str(maddr) for maddr in self._server.dht.get_visible_maddrs(latest=True)])

    @property
    def join_command(self) -> str:
        """What to type on the next PC."""
        model = f'"{self._settings.model}"' if " " in self._settings.model else self._settings.model
        line = f"petals-win serve --model {model} --peers {self.addresses[0]}"
        return f"{line} --internet" if self._settings.internet else line

    def run(self, on_serving: Callable[[str], None] | None = None) -> None:
        """Serve until the stop event is set; `on_serving` is called with the range of blocks whenever they are loaded.

        Raises DaemonLost at the end if the node's daemon has ended meanwhile.
        """
        lost = self._server.dht.lost
        try:
            self._server.run(on_serving)
        except (P2PDaemonLost, ConnectionError, EOFError):
            # A broken connection to the daemon is seen before its end is.
            try:
                lost.result(_END_OF_DAEMON_S)
            except TimeoutError:
                pass  # the daemon lives: it was something else
            if not lost.done():
                raise
        if lost.done():
            raise DaemonLost(lost.result())

    def on_lost(self, tell: Callable[[str], None]) -> None:
        """Call `tell` with a sentence, on another thread, if the node's daemon ends; the node is of no use from then on."""
        self._server.dht.lost.add_done_callback(lambda lost: tell(lost.result()))

    def __exit__(self, *_exception: object) -> None:
        self._held.close()


def identity_arguments(identity: Identity | None) -> dict[str, Any]:
    """How hivemind is told an identity."""
    if identity is None:
        return {}
    # Its lock tells on this PC whether the identity is in use, without a second daemon that asks the swarm. The place in the DHT
    # stays the same, too, so that routing tables that still have this node are right.
    return dict(
        identity_path=str(identity.key), check_if_identity_free=False, node_id=DHTID.generate(identity.public_key)
    )


def check_reachable(peers: Sequence[str], listen: Sequence[str]) -> None:
    """Raise UserError if the peers cannot connect to where this node is going to listen; they dial it to find out."""
    where = {"initial_peers": list(peers), "host_maddrs": list(listen), "startup_timeout": 60}
    if check_direct_reachability(use_relay=False, **where) is False:
        raise UserError(CANNOT_BE_REACHED)


def parse_blocks(text: str, num_blocks: int) -> tuple[int, int]:
    """A range like "0:15" as (0, 15). Raises UserError if it is none, or not within the model."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match is None:
        raise UserError(
            f"{text!r} is not a range of blocks. Write it as START:END, e.g. --blocks 0:{num_blocks // 2}."
        )
    start, end = int(match[1]), int(match[2])
    if not start < end <= num_blocks:
        raise UserError(f"The blocks {text} are out of range: the model has the blocks 0:{num_blocks}.")
    return start, end
