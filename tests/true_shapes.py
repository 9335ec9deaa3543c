"""Checkpoints of any size, of which only some tensors take room: the others are holes in their files, which read as zeros.

So a folder looks as the hub's of a model with 70 billion parameters does, on a disk of a few GB.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import PreTrainedConfig

from petals_win.models.architecture import empty_model, find_blocks

Shape = Sequence[int]
Drawn = Callable[[str, Shape], torch.Tensor]  # a tensor in bfloat16 by its name
_SPARSE = 0x000900C4  # FSCTL_SET_SPARSE


def write_checkpoint(
    folder: Path, config: PreTrainedConfig, blocks: Collection[int] = (), drawn: Drawn | None = None
) -> None:
    """A shard in bfloat16 for each block, and one for the rest. Written are `blocks` and the rest; without `drawn`, nothing is."""
    config.save_pretrained(folder)
    model = empty_model(config, torch.bfloat16)
    prefix = find_blocks(model).prefix
    shards: dict[str, dict[str, Shape]] = {}
    for name, parameter in model.state_dict().items():
        block = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else "rest"
        shards.setdefault(block, {})[name] = parameter.shape
    weight_map: dict[str, str] = {}
    for block, shapes in shards.items():
        file = f"{block}.safetensors"
        is_written = block == "rest" or int(block) in blocks
        _write(folder / file, shapes, drawn if is_written else None)
        weight_map.update(dict.fromkeys(shapes, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def repeating(seed: int) -> Drawn:
    """Random weights of the size that keeps hidden states theirs; norms of ones.

    The rows of a tensor repeat after 1024, in another order of columns, for drawing all numbers takes a minute.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, shape: Shape) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(*shape, dtype=torch.bfloat16)
        rows, columns = shape
        scale = 1.0 if "embed_tokens" in name else columns**-0.5
        some = (torch.randn(min(rows, 1024), columns, generator=generator) * scale).bfloat16()
        whole = torch.empty(rows, columns, dtype=torch.bfloat16)
        for start in range(0, rows, len(some)):
            part = whole[start : start + len(some)]
            part.copy_(some.roll(97 * start // len(some), dims=1)[: len(part)])
        return whole

    return drawn


def _write(path: Path, shapes: Mapping[str, Shape], drawn: Drawn | None) -> None:
    header: dict[str, Any] = {}
    size = 0
    for name, shape in shapes.items():
        end = size + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        _leave_holes(file)
        file.write(len(text).to_bytes(8, "little") + text)
        if drawn is None:
            file.seek(size - 1, os.SEEK_CUR)
            file.write(b"\0")
            return
        for name, shape in shapes.items():
            file.write(drawn(name, shape).contiguous().view(torch.int16).numpy())


def _leave_holes(file: BinaryIO) -> None:
    """Windows fills what is left out with zeros, unless it is told before."""
    if sys.platform == "win32":
        import ctypes
        import msvcrt

        handle, returned = ctypes.c_void_p(msvcrt.get_osfhandle(file.fileno())), ctypes.c_ulong()
        if not ctypes.windll.kernel32.DeviceIoControl(handle, _SPARSE, None, 0, None, 0, ctypes.byref(returned), None):
            raise ctypes.WinError()
