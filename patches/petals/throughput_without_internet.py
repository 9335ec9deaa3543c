"""Estimate a node's throughput from its own blocks, without a speed test over the internet.

Why: petals.server.throughput imports fcntl ("ModuleNotFoundError: No module named 'fcntl'") and speedtest-cli, forks a process
    to run a speed test against a stranger's server for up to a minute, and measures on a random block before loading.
Status: windows-only
Upstream-issue: none
Drop-when: upstream measures without fcntl and without the internet.
"""

from petals_win.upstream.declare import replace_module

replace_module("petals.server.throughput", digest="dc8d560bbe8cf4e5")

from typing import Dict, Sequence, Union

import torch
from hivemind.utils.logging import get_logger
from transformers import PretrainedConfig

from petals.utils.convert_block import QuantType
from petals_win.span.speed import SpanSpeed, known_speed

logger = get_logger(__name__)

NETWORK_BITS_PER_SECOND = 100e6  # a home network; only the ratio between nodes matters to the swarm's balance
RELAY_PENALTY = 0.2  # upstream's figure: a relayed node passes on a fifth of what it could


def get_server_throughput(
    _model, config, device, dtype, *, num_blocks, quant_type, reachable_via_relay, **_settings_of_processes
) -> Dict[str, float]:
    """What the node announces while it joins: the speed measured at an earlier start, or a modest guess."""
    speed = known_speed(config, device, dtype, quant_type.name.lower())
    return throughput_info(speed, config, num_blocks, reachable_via_relay)


def throughput_info(
    speed: SpanSpeed, config: PretrainedConfig, num_blocks: int, reachable_via_relay: bool
) -> Dict[str, float]:
    """The fields of ServerInfo that tell speed, in tokens per second of one block.

    A request uses (num_blocks + 1) / 2 of a node's blocks on average, if its first block is equally likely to be any.
    """
    network_rps = NETWORK_BITS_PER_SECOND / (16 * config.hidden_size) * (RELAY_PENALTY if reachable_via_relay else 1.0)
    return {
        "throughput": min(speed.forward_rps / ((num_blocks + 1) / 2), network_rps),
        "network_rps": network_rps,
        "forward_rps": speed.forward_rps,
        "inference_rps": speed.inference_rps,
    }


def get_dtype_name(dtype: torch.dtype, quant_type: QuantType) -> str:
    """For log lines, e.g. "bfloat16"."""
    name = str(dtype).removeprefix("torch.")
    return name if quant_type is QuantType.NONE else f"{name}, quantized to {quant_type.name.lower()}"
