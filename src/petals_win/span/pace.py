"""Whether steps take far longer than they did when the blocks were loaded, as where a driver has moved part of a card's memory to RAM.

Knows times. Does not know what is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from petals_win.host.gpu import about_spilling

logger = logging.getLogger(__name__)

_TIMES = 5.0
_IN_A_ROW = 8  # a card that has slept is slow at first, and any PC may be once
_SHORT = 8192  # tokens; of a longer text attention takes long by itself


class Pace:
    """Is told how long turns of decodes take, and warns once. `step_s` is what a step of one token took in the measurement at load."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._slow = 0
        self._has_warned = False

    def took(self, seconds: float, positions: Sequence[int]) -> None:
        """A turn of single steps has taken so long. `positions` are those of its sessions: a turn is no slower than one for each."""
        if self._has_warned or not positions or max(positions) > _SHORT:
            return
        times = seconds / (len(positions) * self._step_s)
        self._slow = self._slow + 1 if times >= _TIMES else 0
        if self._slow == _IN_A_ROW:
            self._has_warned = True
            logger.warning(
                "Steps take %.0f times as long as when the blocks were loaded: %.0f ms, not %.0f. %s",
                times,
                1000 * seconds,
                1000 * len(positions) * self._step_s,
                about_spilling(),
            )
