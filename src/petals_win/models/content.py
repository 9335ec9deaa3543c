"""What tells one model's content from another's, whatever its folder is called: a digest of its configuration and weights.

Knows JSON and files. Does not know swarms. Of files that every PC has as a whole, samples of the data count, too; of a sharded
checkpoint no PC needs to have all shards, so its index has to do.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_DIGITS = 16  # 64 bits: no two models of one swarm will share them by chance
_SAMPLES, _SAMPLE_BYTES = 16, 4096
# What says who wrote a configuration, and not what the model is.
_ABOUT_THE_WRITER = ("_name_or_path", "transformers_version")


def content_id(model_type: str, *parts: bytes) -> str:
    """A name for what `parts` describe, such as "llama-0123456789abcdef"; without dots, spaces and capitals."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return f"{re.sub(r'[^a-z0-9]+', '_', model_type.lower())}-{digest.hexdigest()[:_DIGITS]}"


def canonical(value: Any) -> bytes:
    """JSON, the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def canonical_config(file: Path) -> bytes:
    """A config.json without what does not change the model."""
    described = json.loads(file.read_text(encoding="utf-8"))
    return canonical({name: value for name, value in described.items() if name not in _ABOUT_THE_WRITER})


def safetensors_file(path: Path) -> Iterator[bytes]:
    """The names, types and shapes of a file's tensors, and samples of their values. The file is known to be a sound one."""
    with path.open("rb") as file:
        start = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start))
    header.pop("__metadata__", None)
    yield canonical({name: [tensor["dtype"], tensor["shape"]] for name, tensor in header.items()})
    yield samples(path, 8 + start)


def gguf_file(path: Path, data: int) -> Iterator[bytes]:
    """All that a file tells before its tensors, which begin at `data`, and samples of their values."""
    with path.open("rb") as file:
        yield file.read(data)
    yield samples(path, data)


def samples(path: Path, start: int) -> bytes:
    """Pieces from all over a file, from `start` on: training changes every weight, so a few show it."""
    size = path.stat().st_size - start
    pieces = [size.to_bytes(8, "big")]
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek(start + max(size - _SAMPLE_BYTES, 0) * number // (_SAMPLES - 1))
            pieces.append(file.read(_SAMPLE_BYTES))
    return b"".join(pieces)
