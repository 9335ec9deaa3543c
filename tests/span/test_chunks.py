"""How long chunks get: by the time that turns take, and by how long decodes may be held up."""

from __future__ import annotations

import pytest

from petals_win.span.chunks import Chunks, Decodes

TOKEN_S = 0.002  # of a prefill
DECODES_S = 0.05


def settled(chunks: Chunks, decodes: Decodes, others_s: float, token_s: float = TOKEN_S, away_s: float = 0.0) -> int:
    for _ in range(30):
        tokens = chunks.tokens(decodes)
        chunks.took(decodes, tokens, others_s + tokens * token_s, away_s)
    return chunks.tokens(decodes)


@pytest.fixture
def chunks() -> Chunks:
    chunks = Chunks(1024)
    for _ in range(10):
        chunks.took(Decodes.HERE, 0, DECODES_S, 0.0)
    return chunks


def test_alone_a_turn_lasts_long(chunks):
    assert 0.3 < settled(chunks, Decodes.NOWHERE, 0.0) * TOKEN_S < 0.5


def test_decodes_are_held_up_for_no_longer_than_they_take(chunks):
    assert 0.5 * DECODES_S < settled(chunks, Decodes.HERE, DECODES_S) * TOKEN_S < 1.5 * DECODES_S


@pytest.mark.parametrize(("away_s", "expected"), [(0.0, DECODES_S / 2), (0.15, 0.15), (5.0, 0.4)])
def test_a_chunk_fits_into_the_time_that_decodes_are_away(chunks, away_s, expected):
    assert settled(chunks, Decodes.ELSEWHERE, 0.0, away_s=away_s) * TOKEN_S == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("decodes", list(Decodes))
def test_there_is_a_least_and_a_most(chunks, decodes):
    assert 0 < settled(chunks, decodes, 0.0, token_s=10.0) <= 16
    assert settled(chunks, decodes, 0.0, token_s=1e-9) == 1024


def test_one_slow_turn_changes_little(chunks):
    before = chunks.tokens(Decodes.NOWHERE)
    chunks.took(Decodes.NOWHERE, before, 60.0, 0.0)
    assert chunks.tokens(Decodes.NOWHERE) >= before // 2


def test_before_any_decode_was_measured_beside_stays_small():
    assert settled(Chunks(1024), Decodes.HERE, 1.0) == Chunks(1024).tokens(Decodes.HERE) <= 32
