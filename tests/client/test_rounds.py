"""Answers wait for each other where that gives more tokens a second, and never longer than a step takes."""

from __future__ import annotations

import pytest

from petals_win.client import rounds as module
from petals_win.client.rounds import Rounds


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rounds(clock) -> Rounds:
    return Rounds(clock)


def step(rounds: Rounds, clock: Clock, answers: str, seconds: float) -> None:
    """One step of all of them, after which they are here."""
    for answer in answers:
        rounds.leaves(answer, 1)
    clock.now += seconds
    for answer in answers:
        rounds.came(answer)


def test_the_first_one_waits_for_the_others_but_no_longer_than_a_step(rounds, clock):
    step(rounds, clock, "abc", 0.2)
    for answer in "abc":
        assert rounds.leaves(answer, 1) == 0
    clock.now += 0.1
    rounds.came("a")
    first = rounds.wait()
    assert 0.1 < first <= 0.2
    clock.now += 0.05
    rounds.came("b")
    assert rounds.wait() == pytest.approx(first - 0.05, abs=0.03), "from the first one on"
    clock.now += 0.2
    assert rounds.wait() == 0
    rounds.came("c")
    assert rounds.wait() == 0, "all are here"


def test_who_is_alone_has_ended_or_reads_a_prompt_is_not_waited_for(rounds, clock):
    step(rounds, clock, "a", 0.2)
    assert rounds.wait() == 0
    rounds.leaves("a", 1)
    assert rounds.leaves("prompt", 200) == 0
    rounds.came("a")
    assert rounds.wait() == 0
    rounds.leaves("gone", 1)
    assert rounds.wait() > 0
    rounds.ended("gone")
    assert rounds.wait() == 0
    rounds.came("prompt")
    rounds.ended("prompt")
    rounds.ended("prompt")
    rounds.ended("a")
    assert rounds.wait() == 0


def steps_until(rounds: Rounds, clock: Clock, together: bool, seconds: dict[bool, float], most: int = 40) -> int:
    for count in range(most):
        if rounds._together == together:
            return count
        step(rounds, clock, "abcd", seconds[rounds._together])
    raise AssertionError(f"still {rounds._together} after {most} steps")


@pytest.mark.parametrize(("together_s", "apart_s", "stays"), [(0.1, 0.2, True), (0.2, 0.1, False), (0.1, 0.099, True)])
def test_both_ways_are_measured_and_the_faster_one_is_kept(rounds, clock, together_s, apart_s, stays):
    seconds = {True: together_s, False: apart_s}
    assert rounds._together
    tried = steps_until(rounds, clock, False, seconds)
    assert tried <= module._SETTLING + module._MEASURED + 2
    for _ in range(module._SETTLING + module._MEASURED + 2):
        step(rounds, clock, "abcd", seconds[rounds._together])
    changes = 0
    for _ in range(100):
        step(rounds, clock, "abcd", seconds[rounds._together])
        changes += rounds._together != stays
    assert changes == 0
    steps_until(rounds, clock, not stays, seconds, module._KEPT + 50)  # the other one is tried again


def test_those_who_part_are_held_back_once_every_second_one(rounds, clock):
    seconds = {True: 0.2, False: 0.2}
    steps_until(rounds, clock, False, seconds)
    held = []
    for _ in range(3):
        for answer in "abcd":
            held.append(rounds.leaves(answer, 1))
        clock.now += 0.2
        for answer in "abcd":
            rounds.came(answer)
    assert sum(each > 0 for each in held) == 2 and max(held) == pytest.approx(0.1, rel=0.2)
    assert not any(held[4:])


def test_what_is_known_holds_for_its_number_of_answers(rounds, clock):
    """Another number is measured anew, and what was found out is not found out again."""
    seconds = {True: 0.2, False: 0.1}
    steps_until(rounds, clock, False, seconds)
    for _ in range(module._SETTLING + module._MEASURED + 2):
        step(rounds, clock, "abcd", seconds[rounds._together])
    assert not rounds._together
    rounds.ended("d")
    for _ in range(3):
        step(rounds, clock, "abc", 0.2)
        assert rounds._together
    for _ in range(3):
        step(rounds, clock, "abcd", 0.1)
    assert not rounds._together


def test_one_answer_alone_goes_one_way(rounds, clock):
    for _ in range(3 * module._KEPT):
        step(rounds, clock, "a", 0.1)
        assert rounds._together
