"""Memory for what sessions keep, which goes back to the system when it is freed.

Knows the operating system's pages. Does not know what is kept.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence

import torch

_OWN_PAGES = 2**16  # bytes from which a tensor gets pages of its own


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of whatever values, whose memory goes back to the system with it. Raises RuntimeError if there is none left.

    C's allocator keeps most of what sessions of different lengths free, in gaps between what others still use.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < _OWN_PAGES:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    try:
        pages = (
            mmap.mmap(-1, nbytes)
            if sys.platform == "win32"
            else mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        )
    except OSError as e:
        raise RuntimeError(f"The system has no {nbytes} bytes of memory left") from e
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))
