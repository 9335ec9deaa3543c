"""What to do when a device has no memory left for what was tried: to know it, and to give back what the attempt held.

Knows torch's errors, and that an error keeps what its frames hold. Does not know what was tried.
"""

from __future__ import annotations

import re
import traceback

import torch

from petals_win.host.memory import give_back_memory

# In other words for each device, and by the libraries that torch calls on a card.
_SAID = re.compile(r"out of memory|not enough memory|allocate memory|memory left|ALLOC_FAILED", re.IGNORECASE)


def is_shortage(error: BaseException | None) -> bool:
    """Whether it was memory that lacked."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None
    )


def give_back(error: BaseException) -> None:
    """After a shortage: free what the attempt holds still, and hand the system all that torch keeps for later. Else nothing.

    An error on its way to whoever asked keeps the frames that it has passed, and with them inputs, results and masks.
    """
    if not is_shortage(error):
        return
    held: BaseException | None = error
    while held is not None:
        traceback.clear_frames(held.__traceback__)
        held = held.__context__
    give_back_memory()
