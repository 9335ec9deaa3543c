"""Which blocks a node takes, by what the swarm has: Petals' rule, and one like it for models that cannot be cut everywhere.

Knows announcements and cuts. Does not know how they came, nor how blocks are loaded.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from petals.data_structures import ServerState
from petals.server import block_selection
from petals.utils.dht import compute_spans

from petals_win.models.cuts import Cuts

_LEAST = 1e-3  # of a throughput: what is less is none


def choose_blocks(cuts: Cuts, most: int, infos: Any) -> tuple[int, int]:
    """The blocks [start, end), at most `most`, that the swarm lacks most.

    :param infos: what nodes announce of each block (petals' RemoteModuleInfo)
    """
    if cuts.anywhere:
        chosen = block_selection.choose_best_blocks(most, infos)
        return chosen[0], chosen[-1] + 1
    return _slowest(cuts, most, _throughputs(_spans(infos), len(infos)))


def others_are_better(own: Any, cuts: Cuts, most: int, infos: Any, quality: float) -> bool:
    """Whether the node `own`, which is among them, should serve other blocks.

    :param quality: the part of what the swarm could do by that, below which it is worth it
    """
    if cuts.anywhere:
        return block_selection.should_choose_other_blocks(own, infos, quality)
    if quality > 1:  # as in Petals: at each look
        return True
    spans = _spans(infos)
    now = _throughputs(spans, len(infos)).min()
    left = _throughputs({peer: span for peer, span in spans.items() if peer != own}, len(infos))
    if now > _LEAST and left.min() <= _LEAST:  # without it the swarm could not answer
        return False
    start, end = _slowest(cuts, most, left)
    left[start:end] += spans[own].throughput
    return bool(left.min() > _LEAST and now < (quality - _LEAST) * left.min())


def _spans(infos: Any) -> Any:
    return compute_spans(infos, min_state=ServerState.JOINING)


def _throughputs(spans: Any, num_blocks: int) -> np.ndarray:
    return block_selection.compute_throughputs(spans, total_blocks=num_blocks)


def _slowest(cuts: Cuts, most: int, throughputs: np.ndarray) -> tuple[int, int]:
    """Of runs that are equally slow as far as the shorter one goes, the longer one."""
    runs = [(start, cuts.run_from(start, most)) for start in cuts.places]

    def key(run: tuple[int, int]) -> tuple[list[float], int]:
        start, end = run
        return sorted(throughputs[start:end].tolist()) + [math.inf] * (most - (end - start)), start

    return min((run for run in runs if run[0] < run[1]), key=key)
