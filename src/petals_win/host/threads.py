"""How many threads compute, and how they wait.

Knows the settings of OpenMP, torch and the interpreter. Does not know what is computed.
"""

import os
import sys

import psutil

# For how long a thread that has nothing to compute waits awake: turns for GNU's OpenMP, ms for LLVM's and Intel's, which
# torch has on macOS and Windows. Less than the threads pause between two layers would cost a waking for each; LLVM's own
# 200 ms would take the cores from the event loop and from other nodes on this PC.
_SPINNING = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
_SWITCH_INTERVAL_S = 0.0005


def apply_thread_settings(threads: int | None) -> dict[str, str]:
    """Let torch compute with `threads` threads in this process, None: one for each core; returns what is set.

    Call it before torch is imported: OpenMP reads its settings once, and only the number of threads can be changed later.
    """
    if threads is None:
        threads = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
        spinning = dict.fromkeys(_SPINNING, "as torch found it")
    else:
        spinning = {name: os.environ.setdefault(name, value) for name, value in _SPINNING.items()}
    # Event loop and compute thread hand over on every token; the default of 5 ms is as long as a token.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    return {
        "threads": str(threads),
        **spinning,
        "switch_interval": f"{_SWITCH_INTERVAL_S * 1000:g} ms",
    }
