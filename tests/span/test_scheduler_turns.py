"""What makes up a turn: how large a chunk is, and for whom a turn waits. By times that are told, not measured."""

from __future__ import annotations

import pytest
import torch

from petals_win.span.cache import SessionCache
from petals_win.span.chunks import Chunks
from petals_win.span.company import Company
from petals_win.span.session import Session


def session() -> Session:
    return Session(1, 10, 10, 0, 1, "", SessionCache([], 0, 1, 10, torch.device("cpu")))


@pytest.mark.parametrize("pass_s, token_s", [(0.05, 0.003), (0.02, 0.00001), (0.5, 0.05)], ids=["CPU", "GPU", "slow"])
def test_a_chunk_beside_decodes_lets_them_take_less_than_twice_as_long(pass_s, token_s):
    chunks = Chunks(1024)
    for _ in range(5):
        chunks.took(True, 0, pass_s)
    for _ in range(30):
        tokens = chunks.tokens(decodes=True)
        chunks.took(True, tokens, pass_s + tokens * token_s)
    tokens = chunks.tokens(decodes=True)
    assert pass_s + tokens * token_s <= 1.8 * pass_s
    assert tokens == 1024 or pass_s + (tokens + 2) * token_s >= 1.6 * pass_s, "and uses what they leave"


@pytest.mark.parametrize("token_s", [0.00001, 0.003, 0.03])
def test_a_chunk_without_decodes_is_as_long_as_a_decode_may_wait(token_s):
    chunks = Chunks(1024)
    for _ in range(30):
        tokens = chunks.tokens(decodes=False)
        chunks.took(False, tokens, 0.02 + tokens * token_s)
    tokens = chunks.tokens(decodes=False)
    assert tokens == 1024 or 0.3 < 0.02 + tokens * token_s < 0.45


def test_a_turn_shorter_than_the_clock_can_tell():
    chunks = Chunks(1024)
    for decodes in (False, True):
        for tokens in (0, 256):
            chunks.took(decodes, tokens, 0.0)
        assert chunks.tokens(decodes) <= 1024


def test_one_turn_that_was_held_up_does_not_decide():
    chunks = Chunks(1024)
    before = chunks.tokens(decodes=False)
    chunks.took(False, before, 60.0)
    assert before * 0.5 < chunks.tokens(decodes=False) < before


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
