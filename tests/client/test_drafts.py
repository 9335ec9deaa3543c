"""Looking drafts up, and whether they are made: by times and by how many guesses were right."""

from __future__ import annotations

import pytest
import torch

from petals_win.client.drafts import Drafter, Pace, look_up


@pytest.mark.parametrize(
    ("text", "match", "length", "draft"),
    [
        ([1, 2, 3, 4, 5, 1, 2], 2, 3, [3, 4, 5]),
        ([1, 2, 3, 9, 1, 2, 4, 8, 1, 2], 2, 2, [4, 8]),  # the last place
        ([9, 1, 2, 3, 7, 8, 9, 1, 2, 4, 9, 1, 2], 3, 2, [4, 9]),
        ([1, 2, 3, 1, 2], 2, 5, [3, 1, 2, 3, 1]),  # on and on
        ([6, 6, 6], 2, 4, [6, 6, 6, 6]),
        ([1, 2, 3, 4], 2, 4, []),
        ([1, 2], 2, 4, []),
        ([1], 2, 4, []),
        ([1, 2, 4, 1, 3, 2, 1, 2], 3, 4, []),
    ],
)
def test_look_up(text, match, length, draft):
    assert look_up(torch.tensor(text), match, length) == draft


REPEATING = torch.tensor([1, 2, 3, 4, 5, 6, 7] * 5)
OTHER = torch.arange(50)


def paced(plain: float = 1.0, **times: float) -> Pace:
    """`times` of steps with 3, 5, 9 and 16 tokens are called t3, t5 …"""
    pace = Pace()
    for _ in range(5):
        pace.took(1, plain)
        for name, seconds in times.items():
            pace.took(int(name[1:]), seconds)
    return pace


def drafts(drafter: Drafter, right: float, steps: int) -> list[int]:
    """The lengths of the drafts of so many steps, of whose tokens the share `right` is right."""
    made = []
    for _ in range(steps):
        draft = drafter.draft(REPEATING, 100)
        made.append(len(draft))
        if draft:
            drafter.checked(len(draft), int(right * len(draft)))
    return made


def test_none_before_a_plain_step_is_known():
    pace = Pace()
    drafter = Drafter(pace)
    for _ in range(3):
        assert drafter.draft(REPEATING, 100) == []
        pace.took(1, 1.0)
    assert drafter.draft(REPEATING, 100)[:2] == [1, 2]
    assert drafter.draft(OTHER, 100) == []


def test_text_that_repeats_itself_gets_longer_drafts():
    made = drafts(Drafter(paced(t3=1.1, t5=1.2, t9=1.4, t16=1.6)), 1.0, 10)
    assert made[0] and made[-1] == 15
    assert max(drafts(Drafter(paced(t3=1.1, t5=1.2, t9=9.0, t16=20.0)), 1.0, 10)) == 4


def test_no_longer_than_asked_for():
    drafter = Drafter(paced(t3=1.0))
    assert [len(drafter.draft(REPEATING, most)) for most in (-1, 0, 1, 2, 3)] == [0, 0, 0, 2, 2]


def test_wrong_guesses_end_it_and_right_ones_bring_it_back():
    drafter = Drafter(paced(t3=1.3, t5=1.5, t9=2.0, t16=3.0))
    wrong = drafts(drafter, 0.0, 1000)
    cost = sum({0: 0.0, 2: 0.3, 4: 0.5, 8: 1.0, 15: 2.0}[length] for length in wrong)
    assert wrong[0] and 0 < cost < 0.03 * 1000, "a few per cent of the time"
    made = drafts(drafter, 1.0, 200)
    assert sum(length > 0 for length in made[-50:]) > 45


def test_where_checking_takes_as_long_as_computing():
    """As on a PC that has no time to spare."""
    slow = {"t3": 3.0, "t5": 5.0, "t9": 9.0, "t16": 16.0}
    made = drafts(Drafter(paced(**slow)), 1.0, 1000)
    assert 0 < sum(length > 0 for length in made) <= 10, "tried anew now and then"


def test_the_last_times_count():
    pace = paced(t3=9.0, t5=9.0, t9=9.0, t16=9.0)
    drafter = Drafter(pace)
    assert drafter.draft(REPEATING, 2) == []
    for _ in range(3):
        pace.took(3, 1.1)
    assert len(drafter.draft(REPEATING, 2)) == 2
