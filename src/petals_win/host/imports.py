"""Importing thousands of modules at once, as torch and transformers are.

Knows Python's garbage collector. Does not know what is imported.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Around imports that take seconds: the garbage collector rests, and does not look at what they made ever after.

    Modules stay until the process ends, so going through them finds nothing. It was a quarter of the time that a node's imports
    take, and later a pause of 0.3 s at each full collection, in which nothing is computed. Only for imports: garbage in cycles that
    is there at the end stays. Within itself, or where the collector is off anyway, it does nothing.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # before it is enabled, or the next object would set off a look at all of them
        # At the end all are let go: libraries report on standard error what of theirs is not.
        atexit.unregister(gc.unfreeze)
        atexit.register(gc.unfreeze)
        gc.enable()
