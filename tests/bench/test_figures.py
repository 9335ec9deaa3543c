"""The arithmetic of measurements: medians, ratios within rounds, time per token in a window, names in the JSON object."""

from __future__ import annotations

import pytest

from petals_win.bench.figures import Rounds, swarm_figures, time_per_token


def rounds_of(**values: list[float]) -> Rounds:
    rounds = Rounds()
    for name, by_round in values.items():
        for value in by_round:
            rounds.add(name, value)
    return rounds


def test_a_round_in_which_the_pc_did_something_else_changes_no_ratio():
    rounds = rounds_of(ours=[20, 2, 22, 20, 24], others=[10, 1, 11, 10, 12])
    assert rounds.median("ours") == 20 and rounds.median("others") == 10
    assert rounds.ratio("ours", "others") == 2


def test_ratios_are_of_values_of_the_same_round():
    with pytest.raises(ValueError):
        rounds_of(ours=[1, 2], others=[1]).ratio("ours", "others")


@pytest.mark.parametrize(
    ("arrivals", "expected"),
    [
        ([0.5, 1, 2, 3, 4, 5], 1),  # one at the begin of the window belongs to the time before it
        ([0.5, 2, 3.5, 6], 5 / 3),  # the one after the end ends what its reader waited for
        ([7], 6),  # none in the window
        ([2, 3], 1),  # over before the end
        ([2, 5, 6, 9], 2),  # one at the end
    ],
)
def test_time_per_token(arrivals, expected):
    assert time_per_token(arrivals, 1, 5) == pytest.approx(expected)


@pytest.mark.parametrize("arrivals", [[], [0.5], [1]])
def test_without_a_token_there_is_no_time_per_token(arrivals):
    with pytest.raises(ValueError, match="no token"):
        time_per_token(arrivals, 1, 5)


def test_figures_by_their_names():
    measured = {
        "local_tokens_per_s": [10, 20, 30],
        "sessions_1_tokens_per_s": [20, 40, 30],
        "sessions_2_tokens_per_s": [30, 60, 60],
        "local_batch_2_tokens_per_s": [40, 40, 60],
        "sessions_1_busy_tokens_per_s": [10, 10, 15],
        "sessions_2_busy_tokens_per_s": [30, 45, 15],
        "local_prefill_s": [3, 4, 3],
        "prefill_s": [2, 2, 3],
        "prefill_again_s": [1, 2, 1],
        "token_s": [0.1, 0.2, 0.1],
        "token_beside_prefill_s": [0.3, 0.2, 0.2],
    }
    short = {name: values for name, values in measured.items() if "prefill" not in name and "token_s" not in name}
    expected = {
        "local_tokens_per_s": 20,
        "swarm_tokens_per_s": 30,
        "ratio": 2,
        "ratio_busy": 0.5,
        "sessions_2_tokens_per_s": 60,
        "sessions_2_over_1": 1.5,
        "sessions_2_busy_over_idle": 0.75,
        "local_batch_2_tokens_per_s": 40,
        "sessions_2_over_batch": 1,
    }
    assert swarm_figures(rounds_of(**short), [1, 2]) == pytest.approx(expected)
    prefill = {"prefill_s": 2, "prefill_ratio": 1.5, "cached_prefill_speedup": 2, "prefill_disturbance": 2}
    assert swarm_figures(rounds_of(**measured), [1, 2]) == pytest.approx({**expected, **prefill})
