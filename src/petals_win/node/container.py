"""The blocks that a node serves now: loaded, measured, announced, answering, and gone again.

Knows spans, the service, its RPCs and its announcements. Does not know which blocks to choose.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import torch
from hivemind import MAX_DHT_TIME_DISCREPANCY_SECONDS
from petals.data_structures import ModelInfo, ServerInfo, ServerState
from petals.server.reachability import validate_reachability
from transformers import PreTrainedConfig

from petals_win.host.memory import available_bytes, give_back_memory, keep_within_card
from petals_win.models.architecture import queries_of_a_key, text_config
from petals_win.models.rows import Row
from petals_win.models.source import ModelSource
from petals_win.node.announcing import Announcer
from petals_win.node.budget import CacheBudget
from petals_win.node.petals_rpc import Deadlines, Served, TransformerConnectionHandler
from petals_win.node.service import BlockService
from petals_win.node.settings import ServerSettings
from petals_win.span.compute import ComputeThread
from petals_win.span.needs import least_cache_tokens, session_budget
from petals_win.span.pace import Pace
from petals_win.span.peak import bytes_of_a_pass
from petals_win.span.quantized_linear import Quant
from petals_win.span.span import Span
from petals_win.span.speed import SpanSpeed, measure_speed
from petals_win.swarm.members import addresses_to_announce
from petals_win.swarm.naming import split_names
from petals_win.swarm.protocol import PROTOCOL

logger = logging.getLogger(__name__)

NETWORK_BITS_PER_SECOND = 100e6  # a home network; only the ratio between nodes matters to the swarm's balance
RELAY_PENALTY = 0.2  # upstream's figure: a relayed node passes on a fifth of what it could


class Container:
    """Made by `load`. `service` is what is served, `blocks` a text such as "0:15"."""

    def __init__(
        self,
        dht: Any,
        compute: ComputeThread,
        announcer: Announcer,
        service: BlockService,
        rpc: TransformerConnectionHandler,
    ):
        self.service, self.blocks = service, f"{service.span.start}:{service.span.end}"
        self._dht, self._compute, self._announcer, self._rpc = dht, compute, announcer, rpc

    @classmethod
    def load(
        cls,
        dht: Any,
        source: ModelSource,
        prefix: str,
        start: int,
        end: int,
        info: ServerInfo,
        model: ModelInfo,
        settings: ServerSettings,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quant: Quant,
        validate: bool,
    ) -> Container:
        """Announce the blocks as joining, load them, announce them as online. Nothing is left behind if that fails.

        :param prefix: the model's names in the swarm
        :param info: as far as it is known before loading; it is completed here
        :param validate: whether a node of the public swarm has to be reachable for strangers before it serves
        """
        name, content = split_names(prefix)
        info.protocol, info.content_id, info.state = PROTOCOL, content, ServerState.JOINING
        info.addresses = addresses_to_announce(dht.get_visible_maddrs(latest=True))
        info.start_block, info.end_block = start, end
        expiration = settings.expiration or max(2 * settings.update_period, MAX_DHT_TIME_DISCREPANCY_SECONDS)
        budget, value_bytes = CacheBudget(0, settings.max_alloc_timeout), 1
        announcer = Announcer(
            dht,
            prefix,
            info,
            model,
            lambda: budget.bytes_left // value_bytes,
            period=settings.update_period,
            expiration=expiration,
        )
        announcer.start()
        logger.info("Blocks %d:%d are joining the swarm", start, end)
        compute = ComputeThread()
        compute.start()
        try:
            compute.submit(keep_within_card, device).result()
            how = {"dtype": dtype, "device": device, "quant": quant, "adapters": settings.adapters}
            how |= {"kv_cache": settings.kv_cache_dtype}
            span = compute.submit(Span.load, source, start, end, **how).result()
            speed = compute.submit(measure_speed, span).result()
            # Of weights that were quantized C's allocator keeps nearly as much as they took before.
            compute.submit(give_back_memory).result()
            token_bytes = span.cache_bytes_per_token
            least = max(settings.attn_cache_tokens or 0, least_cache_tokens(source.config)) * token_bytes
            free = available_bytes(device) - compute.submit(bytes_of_a_pass, span, source.context_length).result()
            budget.total_bytes = session_budget(free, least, token_bytes, device)
            # Upstream's clients count keys and values apart, in each block.
            value_bytes = max(token_bytes // (2 * span.num_blocks), 1)
            for field, value in throughput_info(speed, source.config, end - start, bool(info.using_relay)).items():
                setattr(info, field, value)
            usual = default_length(source.config)
            service = BlockService(
                span,
                compute,
                budget,
                context_length=settings.inference_max_length or usual,
                request_tokens=settings.max_batch_size or usual,
                adapters=tuple(settings.adapters),
                # Other programs slow a CPU down as they come and go.
                pace=Pace(span.num_blocks / speed.inference_rps) if device.type == "cuda" else None,
            )
            rpc = TransformerConnectionHandler(
                service,
                Served(name, content, info.version or "", start, end, settings.compression),
                Deadlines(settings.request_timeout, settings.session_timeout, settings.step_timeout),
            )
            rpc.start(dht)
            if validate:
                validate_reachability(dht.peer_id)
        except BaseException:
            announcer.announce(ServerState.OFFLINE)
            compute.stop()
            raise
        announcer.announce(ServerState.ONLINE)
        logger.info(
            "Serving blocks %d:%d in %.0f MiB of %s memory, with %.0f MiB for conversations of up to %d tokens",
            start,
            end,
            span.weight_bytes / 2**20,
            span.device,
            budget.total_bytes / 2**20,
            service.info().session_tokens,
        )
        return cls(dht, compute, announcer, service, rpc)

    def is_healthy(self) -> bool:
        """Whether all threads that serve these blocks are alive."""
        return self._dht.is_alive() and self._compute.is_alive() and self._announcer.is_alive()

    def shutdown(self) -> None:
        """Tell the swarm that these blocks leave, stop answering, free the memory."""
        self._announcer.announce(ServerState.OFFLINE)
        self._rpc.stop()
        self._compute.stop()
        self._rpc.wait_for_sessions()
        logger.info("Blocks %s have left the swarm", self.blocks)


def default_length(config: PreTrainedConfig) -> int:
    """Tokens of a session or a request where nobody says: upstream's figures, for models with and without grouped heads."""
    return 8192 if queries_of_a_key(text_config(config)) > 1 else 2048


def throughput_info(speed: SpanSpeed, config: PreTrainedConfig, num_blocks: int, relayed: bool) -> dict[str, Any]:
    """The fields of ServerInfo that tell speed, in tokens per second of one block.

    A request uses (num_blocks + 1) / 2 of a node's blocks on average, if its first block is equally likely to be any.
    """
    network_rps = (
        NETWORK_BITS_PER_SECOND / (16 * Row.of(text_config(config)).width) * (RELAY_PENALTY if relayed else 1)
    )
    throughput = min(speed.forward_rps / ((num_blocks + 1) / 2), network_rps)
    return {"throughput": throughput, "network_rps": network_rps, **asdict(speed)}
