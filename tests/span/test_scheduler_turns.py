"""What makes up a turn: how large a chunk is, and for whom a turn waits. By times that are told, not measured."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from petals_win.span.cache import KvShape, SessionCache
from petals_win.span.chunks import Chunks, Decodes
from petals_win.span.company import Company
from petals_win.span.session import Session

SHAPE = KvShape(1, 2, 1, 2, None, torch.float32)


def session() -> Session:
    return Session(1, 10, 10, 10, 0, 1, "", SessionCache([SHAPE], 0, 1, 10, torch.device("cpu")))


def settled(chunks: Chunks, decodes: Decodes, others_s: float, token_s: float, away_s: float = 0.0) -> int:
    """The size after many turns of others' time and so much for each token."""
    for _ in range(30):
        tokens = chunks.tokens(decodes)
        chunks.took(decodes, tokens, others_s + tokens * token_s, away_s)
    return chunks.tokens(decodes)


@pytest.mark.parametrize("pass_s, token_s", [(0.05, 0.003), (0.02, 0.00001), (0.5, 0.05)], ids=["CPU", "GPU", "slow"])
def test_a_chunk_beside_decodes_lets_them_take_less_than_twice_as_long(pass_s, token_s):
    chunks = Chunks(1024)
    for _ in range(5):
        chunks.took(Decodes.HERE, 0, pass_s, 0.0)
    tokens = settled(chunks, Decodes.HERE, pass_s, token_s)
    assert pass_s + tokens * token_s <= (1.8 if tokens == 8 else 1.7) * pass_s
    assert tokens in (8, 1024) or pass_s + (tokens + 2) * token_s >= 1.55 * pass_s, "and uses what they leave"


@pytest.mark.parametrize("token_s", [0.00001, 0.003, 0.03])
def test_a_chunk_without_decodes_is_as_long_as_a_decode_may_wait(token_s):
    tokens = settled(Chunks(1024), Decodes.NOWHERE, 0.02, token_s)
    assert tokens == 1024 or 0.3 < 0.02 + tokens * token_s < 0.45


@pytest.mark.parametrize(("away_s", "expected"), [(0.0, 0.015), (0.15, 0.15), (5.0, 0.4)])
def test_a_chunk_between_two_turns_of_decodes_fits_into_the_time_that_they_are_away(away_s, expected):
    chunks = Chunks(1024)
    for _ in range(5):
        chunks.took(Decodes.HERE, 0, 0.05, 0.0)
    assert settled(chunks, Decodes.ELSEWHERE, 0.0, 0.001, away_s) * 0.001 == pytest.approx(expected, rel=0.3)


def chunks_after(periods: Sequence[float], alone_s: float = 0.05) -> Chunks:
    """Of decodes that take 20 ms, are away for 30 ms, and came again after so many seconds each while there was a prompt."""
    chunks = Chunks(1024)
    for _ in range(20):
        chunks.took(Decodes.HERE, 0, 0.02, 0.03)
        chunks.came_again(alone_s, beside_a_prompt=False)
    for period in periods:
        chunks.took(Decodes.HERE, tokens := chunks.tokens(Decodes.HERE), 0.02 + 0.0002 * tokens, 0.03)
        chunks.took(Decodes.ELSEWHERE, tokens := chunks.tokens(Decodes.ELSEWHERE), 0.0002 * tokens, 0.03)
        chunks.came_again(period, beside_a_prompt=True)
    return chunks


def test_as_long_as_decodes_come_again_soon_all_the_time_that_they_leave_is_used():
    chunks = chunks_after([0.06] * 50)
    assert chunks.rest_s == 0
    assert 0.8 * 0.6 * 0.02 < 0.0002 * chunks.tokens(Decodes.HERE) <= 0.6 * 0.02
    assert 0.8 * 0.03 < 0.0002 * chunks.tokens(Decodes.ELSEWHERE) < 1.1 * 0.03


def test_decodes_that_a_prompt_makes_late_get_more_of_the_time_and_give_it_back():
    """First nothing is computed between their turns, then less beside them; whoever has to wait is not forgotten."""
    late = [0.06] * 50 + [0.15] * 4
    chunks = chunks_after(late)
    assert chunks.rest_s == pytest.approx(2 * 0.05, rel=0.1) and chunks.tokens(Decodes.HERE) > 30
    late += [0.15] * 40
    chunks = chunks_after(late)
    assert chunks.rest_s > 0 and 8 <= chunks.tokens(Decodes.HERE) < 20
    assert chunks_after([*late, *[0.06] * 60]).rest_s == 0


def test_what_another_node_s_prompt_does_to_decodes_is_hardly_taken_for_usual():
    chunks = Chunks(1024)
    for period in [0.05] * 20 + [0.1] * 5:
        chunks.came_again(period, beside_a_prompt=False)
    for _ in range(20):
        chunks.came_again(0.12, beside_a_prompt=True)
    assert 2 * 0.05 < chunks.rest_s < 2 * 0.06


def test_a_prompt_beside_which_all_decodes_began_is_computed():
    chunks = Chunks(1024)
    for _ in range(20):
        chunks.took(Decodes.HERE, 8, 0.05, 0.03)
        chunks.came_again(0.5, beside_a_prompt=True)
    assert chunks.rest_s == 0


def test_after_how_long_sessions_come_again():
    company, one, other = Company(), session(), session()
    assert company.turned([one], 10.0, 10.05) is None
    assert company.turned([one, other], 10.1, 10.15) == pytest.approx(0.1)
    assert company.turned([one, other], 10.2, 10.25) == pytest.approx(0.1)
    assert company.turned([one], 15.0, 15.05) is None, "it was a user who let it wait"


def test_how_long_decodes_are_away_is_not_what_chunks_elsewhere_have_made_of_it():
    company, one, now = Company(), session(), 100.0
    for away in [0.02] * 30 + [0.2] * 60:
        company.turned([one], now, now + 0.05)
        now += 0.05 + away
        company.came(one, now)
        now += 0.001
    assert 0.018 < company.away_s < 0.05
    for _ in range(3000):
        company.turned([one], now, now + 0.05)
        now += 0.25
        company.came(one, now)
    assert company.away_s == pytest.approx(0.2, rel=0.1), "they come from farther away by now"


def test_prompts_that_come_in_short_parts_do_not_hide_that_a_chunk_is_too_long():
    chunks = Chunks(1024)
    chunks.took(Decodes.HERE, 0, 0.02, 0.0)
    settled(chunks, Decodes.ELSEWHERE, 0.0, 0.0001, 0.1)
    assert chunks.tokens(Decodes.ELSEWHERE) > 600
    for _ in range(30):
        tokens = min(chunks.tokens(Decodes.ELSEWHERE), 256)
        chunks.took(Decodes.ELSEWHERE, tokens, 0.001 * tokens, 0.02)
    assert chunks.tokens(Decodes.ELSEWHERE) < 30
    for _ in range(30):
        chunks.took(Decodes.NOWHERE, 100, 0.01, 0.0)
    assert chunks.tokens(Decodes.NOWHERE) == 256, "a short part that is fast tells nothing of longer ones"


def test_before_any_decode_was_measured_a_chunk_beside_it_stays_small():
    assert settled(Chunks(1024), Decodes.HERE, 1.0, 0.001) == Chunks(1024).tokens(Decodes.HERE) <= 32


def test_a_chunk_that_hardly_costs_anything_is_taken_and_says_nothing_about_larger_ones():
    chunks = Chunks(1024)
    for _ in range(50):
        chunks.took(Decodes.HERE, 0, 0.02, 0.0)
        chunks.took(Decodes.HERE, chunks.tokens(Decodes.HERE, room=12), 0.022, 0.0)
    assert chunks.tokens(Decodes.HERE, room=12) == 12 and chunks.tokens(Decodes.HERE, room=2) == 16
    assert chunks.tokens(Decodes.NOWHERE, room=12) == 256
    for _ in range(50):
        chunks.took(Decodes.HERE, chunks.tokens(Decodes.HERE, room=12), 0.1, 0.0)
    assert chunks.tokens(Decodes.HERE, room=12) == 8


def test_a_turn_shorter_than_the_clock_can_tell():
    chunks = Chunks(1024)
    for decodes in Decodes:
        for tokens in (0, 256):
            chunks.took(decodes, tokens, 0.0, 0.0)
        assert chunks.tokens(decodes) <= 1024


def test_one_turn_that_was_held_up_does_not_decide():
    chunks = Chunks(1024)
    before = chunks.tokens(Decodes.NOWHERE)
    chunks.took(Decodes.NOWHERE, before, 60.0, 0.0)
    assert before * 0.5 < chunks.tokens(Decodes.NOWHERE) < before


def test_those_who_were_answered_together_are_waited_for_a_moment():
    company, (one, two, three) = Company(), (session() for _ in range(3))
    assert company.wait({one}, 100.0) == 0, "nobody is expected"
    company.turned([one, two, three], 100.0, 100.1)
    company.came(one, 100.102)
    assert 0 < company.wait({one}, 100.102) < 0.015
    company.came(two, 100.103)
    company.came(three, 100.103)
    assert company.wait({one, two, three}, 100.103) == 0
    assert company.wait({one}, 100.12) <= 0, "not for long"


def test_who_has_left_is_not_waited_for():
    company, one, two = Company(), session(), session()
    company.turned([one, two], 100.0, 100.1)
    two.close()
    assert company.wait({one}, 100.1) == 0


def test_who_takes_long_to_come_again_is_not_waited_for():
    company, one, two = Company(), session(), session()
    for turn in range(20):
        company.turned([one, two], turn, turn + 0.1)
        for each in (one, two):
            company.came(each, turn + 0.16)
    company.turned([one, two], 100.0, 100.1)
    assert company.wait({one}, 100.1) == 0
    company.turned([one, two], 100.0, 101.0)
    assert company.wait(set(), 101.0) > 0, "but a long turn may be"


def test_a_pause_is_no_return():
    company, one, two = Company(), session(), session()
    company.turned([one, two], 100.0, 100.1)
    company.came(one, 130.0)
    company.turned([one, two], 130.0, 130.1)
    assert company.wait({one}, 130.1) > 0


def test_those_who_come_one_after_the_other_go_together():
    """With a way around that is longer than any wait: their client sends all steps at once, but each is a message."""
    company, sessions = Company(), [session() for _ in range(4)]
    for turn in range(20):
        company.turned(sessions, turn, turn + 0.05)
        for each in sessions:
            company.came(each, turn + 0.25)
    company.turned(sessions, 100.0, 100.05)
    now = 100.25
    for count, each in enumerate(sessions[:3], 1):
        company.came(each, now)
        assert 0.001 < company.wait(set(sessions[:count]), now) <= 0.005
        now += 0.002
    assert company.wait(set(sessions[:3]), now + 0.005) <= 0, "the last one does not come"
    company.came(sessions[3], now)
    assert company.wait(set(sessions), now) <= 0


def test_a_stream_of_steps_does_not_hold_a_turn_up_for_long():
    company, sessions = Company(), [session() for _ in range(50)]
    company.turned(sessions, 100.0, 100.05)
    for count in range(1, 20):
        company.came(sessions[count], 100.2 + 0.001 * count)
    assert company.wait(set(sessions[1:20]), 100.2195) <= 0


def test_who_was_last_seen_long_ago_is_not_waited_for():
    company, one, two = Company(), session(), session()
    company.turned([one, two], 100.0, 100.05)
    company.turned([one], 102.0, 102.05)
    company.came(one, 102.2)
    assert company.wait({one}, 102.2) <= 0
