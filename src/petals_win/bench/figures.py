"""What measurements add up to: the values of all rounds, their medians, and ratios within rounds. Knows numbers alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


class Rounds:
    """Values by name, one of each name in every round."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def has(self, name: str) -> bool:
        return name in self.values

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])

    def ratio(self, name: str, over: str) -> float:
        """Median of the ratios within each round, which whatever else the PC does in some of them leaves alone."""
        return statistics.median(a / b for a, b in zip(self.values[name], self.values[over], strict=True))


def time_per_token(arrivals: Sequence[float], begin: float, end: float) -> float:
    """Seconds per token of one answer from `begin` on, up to its first token at or after `end`.

    So a window in which no token came counts as long as the next one made its reader wait. An answer that was over before
    `end` counts up to its last token. Raises ValueError if no token came after `begin`.
    """
    inside = [at for at in arrivals if begin < at < end]
    after = [at for at in arrivals if at > begin and at >= end]
    counted = inside + after[:1]
    if not counted:
        raise ValueError("no token came in the window")
    return (counted[-1] - begin) / len(counted)


def swarm_figures(rounds: Rounds, sessions: Sequence[int]) -> dict[str, float]:
    """The figures of `petals-win bench` by their names in its JSON object, of what was measured."""
    one = speed_of(1)
    found = {
        "local_tokens_per_s": rounds.median("local_tokens_per_s"),
        "swarm_tokens_per_s": rounds.median(one),
        "ratio": rounds.ratio(one, "local_tokens_per_s"),
        "ratio_busy": rounds.ratio(busy_speed_of(1), one),
    }
    for count in sessions:
        if count > 1:
            found[speed_of(count)] = rounds.median(speed_of(count))
            found[f"sessions_{count}_over_1"] = rounds.ratio(speed_of(count), one)
            found[f"sessions_{count}_busy_over_idle"] = rounds.ratio(busy_speed_of(count), speed_of(count))
            found[batch_of(count)] = rounds.median(batch_of(count))
            found[f"sessions_{count}_over_batch"] = rounds.ratio(speed_of(count), batch_of(count))
    if rounds.has("prefill_s"):
        found["prefill_s"] = rounds.median("prefill_s")
        found["prefill_ratio"] = rounds.ratio("local_prefill_s", "prefill_s")
        found["cached_prefill_speedup"] = rounds.ratio("prefill_s", "prefill_again_s")
        found["prefill_disturbance"] = rounds.ratio("token_beside_prefill_s", "token_s")
    return found


def speed_of(sessions: int) -> str:
    """Under which name the tokens/s of so many answers at once are kept."""
    return f"sessions_{sessions}_tokens_per_s"


def busy_speed_of(sessions: int) -> str:
    """Under which name the same beside a busy program is kept."""
    return f"sessions_{sessions}_busy_tokens_per_s"


def batch_of(sessions: int) -> str:
    """Under which name the tokens/s of one process with a batch of so many are kept."""
    return f"local_batch_{sessions}_tokens_per_s"
