"""What a node does again and again as long as it lives, whatever fails meanwhile.

Knows periods and the log. Does not know what is done.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


def repeat(
    once: Callable[[], object], what: str, period: float, trigger: threading.Event, leaving: Callable[[], bool]
) -> None:
    """Call `once` every `period` seconds, or sooner when `trigger` is set, and a last time when `leaving` has become true.

    What `once` raises is logged, and the next period waited for.

    :param what: completes "This node could not …"
    """
    last = False
    while not last:
        began = time.monotonic()
        trigger.clear()
        last = leaving()
        try:
            once()
        except Exception as e:
            logger.warning("This node could not %s: %s", what, e or type(e).__name__)
            logger.debug("It failed here:", exc_info=True)
        if not last:
            trigger.wait(max(0.0, period - (time.monotonic() - began)))
