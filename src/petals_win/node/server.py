"""A member of a swarm that serves blocks of one model, and moves to others when the swarm needs those more.

Knows the swarm, this PC's memory and Petals' rule of placement. Does not know signals or the command line.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hivemind import DHT
from petals.constants import PUBLIC_INITIAL_PEERS
from petals.data_structures import ModelInfo, ServerInfo, ServerState
from petals.server.reachability import ReachabilityProtocol, check_direct_reachability
from petals.utils.dht import get_remote_module_infos

from petals_win.dht.joining import patiently
from petals_win.errors import UserError
from petals_win.models.cuts import Cuts
from petals_win.models.source import ModelSource, open_model
from petals_win.node import placement
from petals_win.node.container import Container, throughput_info
from petals_win.node.settings import ServerSettings
from petals_win.span.choices import choose_dtype, choose_quant
from petals_win.span.needs import choose_num_blocks, needs_of
from petals_win.span.quantized_linear import Quant
from petals_win.span.speed import known_speed
from petals_win.swarm.protocol import PETALS

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_END_SECONDS = 60.0  # for the blocks to leave the swarm after `shutdown`


class Server:
    """In the swarm from its making until `shutdown`; `run` serves until `stop` is set.

    Raises UserError for what cannot be served here. `of_the_dht` are options of hivemind's DHT and its daemon.
    """

    def __init__(self, settings: ServerSettings, *, stop: threading.Event | None = None, **of_the_dht: Any):
        self._settings, self.stop = settings, stop or threading.Event()
        model = settings.converted_model_name_or_path
        where = {"revision": settings.revision, "token": settings.token, "cache_dir": settings.cache_dir}
        self._source = source = open_model(model, **where)
        self._prefix = settings.dht_prefix or source.dht_prefix
        if "." in self._prefix or " " in self._prefix:
            raise UserError(f"The prefix {self._prefix!r} of the blocks has a dot or a space. Choose another one.")
        self._device = _device(settings.device)
        self._dtype = _dtype(settings.torch_dtype, source, self._device)
        self._quant: Quant = settings.quant_type or choose_quant(None, self._device, bool(settings.adapters), source)
        self._block_range = _range(settings.block_indices, source.num_blocks)
        self._cuts = Cuts.of(source.config)
        if self._block_range is not None:
            self._cuts.check(self._block_range.start, self._block_range.stop)
            self._num_blocks = len(self._block_range)
        elif settings.num_blocks is not None:
            self._num_blocks = min(settings.num_blocks, source.num_blocks)
            if self._num_blocks < (fewest := self._cuts.fewest_together):
                raise UserError(
                    f"{settings.num_blocks} blocks are too few: at least {fewest} of this model have to stay together."
                )
        else:
            in_few_bits = source.in_few_bits_on(self._device.type)
            needs = needs_of(source.config, self._dtype, self._quant, in_few_bits, settings.kv_cache_dtype)
            self._num_blocks = choose_num_blocks(needs, self._device)
        self._model_info = ModelInfo(num_blocks=source.num_blocks)
        if not os.path.exists(model):
            self._model_info.repository = f"https://huggingface.co/{model}"
        self.container: Container | None = None
        self._ended = threading.Event()
        self._ended.set()

        peers = list(settings.initial_peers)
        relayed = settings.reachable_via_relay
        if relayed is None:
            # Whoever cannot find out is taken for reachable.
            relayed = check_direct_reachability(initial_peers=peers, use_relay=False, **of_the_dht) is False
            logger.info("This node is reached %s", "by relays" if relayed else "directly")
        self._info = self._known_before_loading(relayed)
        self._public = peers == PUBLIC_INITIAL_PEERS and not settings.skip_reachability_check
        self.dht = patiently(
            partial(
                DHT,
                initial_peers=peers,
                start=True,
                num_workers=source.num_blocks,
                use_relay=settings.use_relay,
                use_auto_relay=settings.use_auto_relay,
                client_mode=relayed,
                **of_the_dht,
            )
        )
        self._reachability = None if relayed else ReachabilityProtocol.attach_to_dht(self.dht)
        logger.info("Running a server on %s", [str(maddr) for maddr in self.dht.get_visible_maddrs()])

    def _known_before_loading(self, relayed: bool) -> ServerInfo:
        """With the speed that was measured at an earlier start, or a modest guess."""
        settings, config = self._settings, self._source.config
        speed = known_speed(config, self._device, self._dtype, self._quant, settings.kv_cache_dtype)
        figures: dict[str, Any] = throughput_info(speed, config, self._num_blocks, relayed)
        if isinstance(settings.throughput, float):
            figures = {"throughput": settings.throughput}
        return ServerInfo(
            state=ServerState.JOINING,
            public_name=settings.public_name,
            version=PETALS,
            adapters=tuple(settings.adapters),
            torch_dtype=str(self._dtype).removeprefix("torch."),
            quant_type=self._quant,
            using_relay=relayed,
            **figures,
        )

    def run(self, on_serving: Callable[[str], None] | None = None) -> None:
        """Serve until `stop` is set; `on_serving` is called with the range of blocks whenever they are loaded."""
        self._ended.clear()
        try:
            while not self.stop.is_set():
                start, end = self._choose_blocks()
                self.container = self._load(start, end)
                try:
                    if on_serving is not None:
                        on_serving(self.container.blocks)
                    self._wait_until_others_are_better()
                finally:
                    self.container.shutdown()
                    self.container = None
                if not self.stop.is_set():
                    self._free_memory()
        finally:
            self._ended.set()

    def _load(self, start: int, end: int) -> Container:
        return Container.load(
            self.dht,
            self._source,
            self._prefix,
            start,
            end,
            self._info,
            self._model_info,
            self._settings,
            device=self._device,
            dtype=self._dtype,
            quant=self._quant,
            validate=self._public,
        )

    def _wait_until_others_are_better(self) -> None:
        """Or until `stop` is set, or these blocks are served no longer."""
        while not self.stop.wait(random.uniform(0, 2) * self._settings.mean_balance_check_period):
            if self.container is None or not self.container.is_healthy():
                logger.warning("A thread that serves the blocks has ended: they are loaded anew")
                return
            if self._block_range is None and self._others_are_better():
                logger.info("The swarm needs other blocks more than these: they are loaded now")
                return

    def _others_are_better(self) -> bool:
        infos, own = self._module_infos(), self.dht.peer_id
        # As long as this node's own announcement is not found it may be late.
        known = any(own in info.servers for info in infos)
        quality = self._settings.balance_quality
        return known and placement.others_are_better(own, self._cuts, self._num_blocks, infos, quality)

    def _choose_blocks(self) -> tuple[int, int]:
        if self._block_range is None:
            # Of nodes that start at the same time each shall see what the one before it has chosen.
            self.stop.wait(random.uniform(0, 2) * self._settings.mean_block_selection_delay)
            return placement.choose_blocks(self._cuts, self._num_blocks, self._module_infos())
        return self._block_range.start, self._block_range.stop

    def _module_infos(self) -> Any:
        uids = [f"{self._prefix}.{block}" for block in range(self._source.num_blocks)]
        return get_remote_module_infos(self.dht, uids, latest=True)

    def _free_memory(self) -> None:
        """All that the blocks took, before others are loaded."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        elif self._device.type == "mps":
            torch.mps.empty_cache()

    def shutdown(self) -> None:
        """Let `run` end, and leave the swarm."""
        self.stop.set()
        if not self._ended.wait(_END_SECONDS):
            logger.warning("The blocks did not leave the swarm within %.0f s", _END_SECONDS)
        if self._reachability is not None:
            self._reachability.shutdown()
        self.dht.shutdown()
        self.dht.join()


def _device(asked: torch.device | str | None) -> torch.device:
    """The device asked for, or the best that this PC has."""
    if asked is None:
        asked = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(asked)
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


def _dtype(name: str, source: ModelSource, device: torch.device) -> torch.dtype:
    dtype = choose_dtype(None, source, device) if name == "auto" else _DTYPES[name]
    if dtype is torch.float16 and device.type == "cpu":
        raise UserError("A CPU does not compute in float16. Use bfloat16 or float32.")
    if dtype is torch.bfloat16 and device.type == "mps":
        logger.warning("This GPU does not compute in bfloat16: the blocks are served in float16")
        return torch.float16
    return dtype


def _range(blocks: str | None, num_blocks: int) -> range | None:
    if blocks is None:
        return None
    start, colon, end = blocks.partition(":")
    if not (colon and start.strip().isdecimal() and end.strip().isdecimal()):
        raise UserError(f"{blocks!r} is not a range of blocks. Write it as START:END, e.g. 0:{num_blocks}.")
    chosen = range(int(start), int(end))
    if not chosen or chosen.stop > num_blocks:
        raise UserError(f"The blocks {blocks} are out of range: the model has the blocks 0:{num_blocks}.")
    return chosen
