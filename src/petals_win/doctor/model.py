"""The model asked for: whether it may be read, and how much of it this PC can serve.

Knows the hub's answers and sizes. Loads no weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from petals_win.doctor.findings import Asked, Finding, finding_of
from petals_win.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from petals_win.models.source import ModelSource

_GIB = 2**30


def check_model(asked: Asked) -> Iterator[Finding]:
    from huggingface_hub import get_token

    from petals_win.models.source import open_model
    from petals_win.swarm.known_models import find_known_model

    has_token = bool(asked.token or get_token())
    if asked.model is None:
        yield Finding("ok", f"A Hugging Face token is {'' if has_token else 'not '}saved here; gated models need one")
        return
    source = None
    try:
        source = open_model(asked.model, token=asked.token)
        config = source.config
    except UserError as e:
        yield finding_of(e)
        known = find_known_model(asked.model)
        if known is None:
            return
        config = known.config()
    else:
        yield Finding("ok", f"{asked.model} can be read {'with' if has_token else 'without'} a Hugging Face token")
    yield from _check_room(asked.model, config, source)


def _check_room(name: str, config: PreTrainedConfig, source: ModelSource | None) -> Iterator[Finding]:
    """How many blocks fit into the memory that is free now, and whether the disk has room for their files."""
    import torch
    from huggingface_hub import constants

    from petals_win.host.memory import available_bytes
    from petals_win.span.choices import choose_device, choose_quant
    from petals_win.span.needs import blocks_that_fit, needs_of

    device = choose_device(None)
    quant = choose_quant(None, device, source=source)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    plain = needs_of(config, dtype)
    needs = needs_of(config, dtype, quant, source.in_few_bits_on(device.type) if source else {})
    free = available_bytes(device)
    fitting = blocks_that_fit(free, needs)
    where = f"into {free / _GIB:.1f} GiB free on {device}" + ("" if quant == "none" else f", stored as {quant}")
    if fitting == 0:
        block = needs.served_block_bytes / _GIB
        text = f"Not one block of {name} ({block:.2f} GiB with its caches) fits {where}"
        yield Finding(
            "error", text, "Close other programs, or serve a smaller model: petals-win plan shows what some take."
        )
        return
    rest = "" if fitting == needs.num_blocks else "; other PCs must serve the rest, and petals-win plan tells how many"
    yield Finding("ok", f"{fitting} of {needs.num_blocks} blocks fit {where}{rest}")
    if Path(name).expanduser().exists():
        return
    cache = Path(constants.HF_HUB_CACHE)
    room = shutil.disk_usage(next(parent for parent in (cache, *cache.parents) if parent.exists())).free
    files = sum(plain.block_bytes[:fitting])
    if files > room:
        yield Finding(
            "error",
            f"The files of {fitting} blocks take {files / _GIB:.0f} GiB, but {room / _GIB:.0f} GiB are free in {cache}",
            "Make room there, set HF_HOME to a folder on another disk, or serve fewer with --blocks.",
        )
