"""Memory that is free now, on the PC and on its accelerators.

Knows how to ask the system and, if it is loaded already, torch; importing torch only to ask would take seconds. Does
not know what the memory is wanted for.
"""

import sys

import psutil


def free_memory_bytes(device: str = "cpu") -> int:
    """Bytes that can be allocated now on a torch device such as "cpu", "cuda:1" or "mps".

    Raises RuntimeError for any device but "cpu" as long as torch has not been imported.
    """
    kind = device.partition(":")[0]
    if kind == "cpu":
        return psutil.virtual_memory().available
    torch = sys.modules.get("torch")
    if torch is None:
        raise RuntimeError(f"Import torch before asking for the free memory of {device}")
    if kind == "mps":
        # Unified memory: what Metal recommends at most, and what the rest of the system leaves of it.
        unused = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return min(unused, psutil.virtual_memory().available)
    return getattr(torch, kind).mem_get_info(device)[0]
