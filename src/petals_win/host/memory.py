"""Memory: what is free on the PC and on its accelerators, and what this process has.

Knows how to ask the system and torch. Does not know what the memory is wanted for.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

# Of a card: what is left to the desktop, which takes more when windows are opened.
DESKTOP_BYTES = 2**28


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes that can be allocated now on a device of torch.

    Of an NVIDIA card, without what is left to the desktop, and with what torch keeps there of what it has freed. Raises RuntimeError
    for any device but the CPU as long as torch has not been imported: doing it here would cost seconds.
    """
    kind = str(device).partition(":")[0]
    if kind == "cpu":
        return psutil.virtual_memory().available
    torch = sys.modules.get("torch")
    if torch is None:
        raise RuntimeError(f"Import torch before asking for the free memory of {device}")
    if kind == "mps":
        # Unified memory: what Metal recommends at most, and what the rest of the system leaves of it.
        unused = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return min(unused, psutil.virtual_memory().available)
    free = getattr(torch, kind).mem_get_info(device)[0]
    if kind != "cuda":
        return free
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(free - DESKTOP_BYTES, 0) + kept


def keep_within_card(device: torch.device) -> None:
    """From now on torch has no memory left where `available_bytes` says so now. Only for NVIDIA cards; for others nothing is done.

    A driver for Windows does not fail then but lends the PC's RAM, which is many times slower, and takes it from the desktop, too.
    """
    if device.type != "cuda":
        return
    import torch

    total = torch.cuda.mem_get_info(device)[1]
    most = torch.cuda.memory_allocated(device) + available_bytes(device)
    torch.cuda.set_per_process_memory_fraction(min(most / total, 1.0), device)


def own_bytes(pid: int | None = None) -> int:
    """Bytes of memory that a process, this one unless another is named, keeps resident for itself alone.

    On Linux without what is in files, too, such as its libraries: that the system takes back, and reads again, as it likes. Raises
    psutil.NoSuchProcess.
    """
    memory = psutil.Process(pid).memory_info()
    return memory.rss - getattr(memory, "shared", 0)


def give_back_memory() -> None:
    """Hand to the system what nothing refers to any more: garbage in cycles, what torch keeps of a GPU, what C's allocator keeps."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch is not None and torch.backends.mps.is_available():
        torch.mps.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Hand to the system what C's allocator keeps of what was freed, where it keeps any: between tensors of megabytes, as much as they took."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the GNU C library
        if trim is not None:
            trim(0)
