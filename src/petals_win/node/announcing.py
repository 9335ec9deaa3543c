"""Telling the swarm what this node serves, again and again as long as it lives, whatever fails meanwhile.

Knows the DHT's records, periods and the log. Does not know how blocks are served.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from hivemind import get_dht_time
from petals.data_structures import ModelInfo, ServerInfo, ServerState
from petals.utils.dht import declare_active_modules, get_remote_module_infos
from petals.utils.ping import PingAggregator

from petals_win.swarm.naming import split_names

logger = logging.getLogger(__name__)

_MOST_PINGED = 5  # of the servers that a request may go on to, and of those at the end
_MODELS = "_petals.models"  # where upstream lists the models of a swarm


class Announcer(threading.Thread):
    """Announces the blocks `start_block` to `end_block` of `info`, and how far away the servers behind them are.

    :param prefix: the model's names in the swarm
    :param tokens_left: tells how many tokens there is room for, as upstream's clients count them
    """

    def __init__(
        self,
        dht: Any,
        prefix: str,
        info: ServerInfo,
        model: ModelInfo,
        tokens_left: Callable[[], int],
        *,
        period: float,
        expiration: float,
    ):
        super().__init__(name="announce", daemon=True)
        self.info = info
        self._dht, self._model, self._tokens_left = dht, model, tokens_left
        self._period, self._expiration = period, expiration
        self._name = split_names(prefix)[0]
        start, end = info.start_block or 0, info.end_block or 0
        self._uids = [f"{prefix}.{block}" for block in range(start, end)]
        self._behind = [f"{self._name}.{block}" for block in range(start + 1, end + 1)]
        self._pings = PingAggregator(dht)
        self._trigger = threading.Event()

    def run(self) -> None:
        repeat(self._announce, "announce its blocks", self._period, self._trigger, self._leaving)

    def announce(self, state: ServerState) -> None:
        """Tell the swarm now. With OFFLINE, wait until it is told; it is the last time."""
        self.info.state = state
        self._trigger.set()
        if state == ServerState.OFFLINE:
            self.join()

    def _leaving(self) -> bool:
        return self.info.state == ServerState.OFFLINE

    def _announce(self) -> None:
        leaving = self._leaving()
        self.info.cache_tokens_left = max(0, self._tokens_left())
        self.info.next_pings = None if leaving else self._seconds_to_the_next()
        ends = get_dht_time() + self._expiration
        declare_active_modules(self._dht, self._uids, self.info, expiration_time=ends)
        if not leaving and not self._name.startswith("_"):  # that is how a private model's name begins
            self._dht.store(_MODELS, self._model.to_dict(), ends, subkey=self._name)

    def _seconds_to_the_next(self) -> dict[str, float]:
        """By peer id, of servers that may go on with a request: those of the block after the last one first of all."""
        *within, last = get_remote_module_infos(self._dht, self._behind, latest=True)
        others = {peer for found in within for peer in found.servers} - {self._dht.peer_id}
        self._pings.ping(list({*_some(others), *_some(last.servers)}))
        return {peer.to_base58(): seconds for peer, seconds in self._pings.to_dict().items()}


def _some(peers: Any) -> list[Any]:
    return random.sample(list(peers), min(_MOST_PINGED, len(peers)))


def repeat(
    once: Callable[[], object], what: str, period: float, trigger: threading.Event, leaving: Callable[[], bool]
) -> None:
    """Call `once` every `period` seconds, or sooner when `trigger` is set, and a last time when `leaving` has become true.

    What `once` raises is logged, and the next period waited for.

    :param what: completes "This node could not …"
    """
    last = False
    while not last:
        began = time.monotonic()
        trigger.clear()
        last = leaving()
        try:
            once()
        except Exception as e:
            logger.warning("This node could not %s: %s", what, str(e) or type(e).__name__)
            logger.debug("It failed here:", exc_info=True)
        if not last:
            trigger.wait(max(0.0, period - (time.monotonic() - began)))
