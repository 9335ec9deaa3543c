"""How fast this PC computes blocks, measured on a loaded span and remembered for the next start.

Knows spans and a small file in the cache folder. Does not know networks.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from petals_win.host.folders import cache_folder
from petals_win.host.threads import most_threads
from petals_win.models.architecture import text_config
from petals_win.span.kv_int8 import KvCacheDtype
from petals_win.span.quantized_linear import Quant
from petals_win.span.span import Span

logger = logging.getLogger(__name__)

_SECONDS = 1.5  # for each of the two measurements; a slow device does at least two rounds
_FILE = "speed.json"


@dataclass(frozen=True)
class SpanSpeed:
    """Tokens per second of one block: one token at a time with a cache, and many at a time without."""

    inference_rps: float
    forward_rps: float


# For a PC that has measured nothing yet. Nodes compare with one another, so only a measured figure matters for long.
_UNKNOWN = SpanSpeed(inference_rps=300.0, forward_rps=3000.0)


def known_speed(
    config: Any, device: torch.device, dtype: torch.dtype, quant: Quant, kv_cache: KvCacheDtype = "auto"
) -> SpanSpeed:
    """The speed measured at an earlier start for blocks of this shape, or a guess."""
    return _read().get(_key(config, device, dtype, quant, kv_cache), _UNKNOWN)


def measure_speed(span: Span) -> SpanSpeed:
    """Measure in the calling thread, which must be the span's own; at once if an earlier start measured this shape."""
    key = _key(span.config, span.device, span.dtype, span.quant, span.kv_cache)
    known = _read()
    if key not in known:
        known[key] = SpanSpeed(inference_rps=_decode_rps(span), forward_rps=_forward_rps(span))
        path = cache_folder() / _FILE
        path.write_text(json.dumps({name: asdict(speed) for name, speed in known.items()}), encoding="utf-8")
    speed = known[key]
    logger.info(
        "One block computes %.0f tokens/s one at a time, %.0f tokens/s in a batch",
        speed.inference_rps,
        speed.forward_rps,
    )
    return speed


def _decode_rps(span: Span) -> float:
    session = span.open(batch_size=1, max_length=256)
    hidden = torch.zeros(1, 1, span.row.width, dtype=span.dtype)
    try:
        rounds, seconds = _rounds(lambda: span.step(session, hidden), at_most=255)
    finally:
        session.close()
    return rounds * span.num_blocks / seconds


def _forward_rps(span: Span) -> float:
    tokens = 128
    hidden = torch.zeros(1, tokens, span.row.width, dtype=span.dtype)
    rounds, seconds = _rounds(lambda: span.forward(hidden, span.start, span.end), at_most=100)
    return rounds * tokens * span.num_blocks / seconds


def _rounds(call: Callable[[], torch.Tensor], at_most: int) -> tuple[int, float]:
    call().cpu()  # the first call allocates; copying to the CPU waits for a GPU to finish
    start = time.perf_counter()
    for rounds in range(1, at_most):
        call().cpu()
        seconds = time.perf_counter() - start
        if seconds > _SECONDS and rounds >= 2:
            break
    return rounds, max(seconds, 1e-6)


def _key(
    config: Any, device: torch.device | str, dtype: torch.dtype, quant: Quant, kv_cache: KvCacheDtype = "auto"
) -> str:
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} x{most_threads()}"
    decoder = text_config(config)
    cache = "" if kv_cache == "auto" else f" {kv_cache} cache"
    return f"{decoder.model_type} {decoder.hidden_size} {dtype} {quant}{cache} {name}"


def _read() -> dict[str, SpanSpeed]:
    path = cache_folder() / _FILE
    try:
        return {name: SpanSpeed(**speed) for name, speed in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as e:
        logger.warning("The measured speeds in %s cannot be read (%s); measuring again", path, e)
        return {}
