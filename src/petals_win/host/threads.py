"""How many threads compute, and how they wait.

Knows the settings of OpenMP, torch and the interpreter. Does not know what is computed.
"""

import os
import sys

_SPIN_COUNT = "20000"
_SWITCH_INTERVAL_S = 0.0005


def apply_thread_settings(threads: int) -> dict[str, str]:
    """Let torch compute with `threads` threads in this process; returns what is set, for a report.

    Call it before torch is imported: OpenMP reads its settings once, and only the number of threads can be changed
    afterwards. Variables that the user has set stay, except the number of threads.
    """
    applied = {"threads": str(threads)}
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    torch = sys.modules.get("torch")
    if torch is None:
        # Between two steps of a token the threads pause for less than it takes to wake them; long spins, the
        # default, take the cores from the event loop.
        applied["GOMP_SPINCOUNT"] = os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    else:
        torch.set_num_threads(threads)
        applied["GOMP_SPINCOUNT"] = "as torch found it"
    # Event loop and compute thread hand over on every token; the default 5 ms is a token's time.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    applied["switch interval"] = f"{_SWITCH_INTERVAL_S * 1000:g} ms"
    return applied
