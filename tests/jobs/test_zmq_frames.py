"""Frames of a message in one of ZeroMQ's: back as they were, or nothing."""

from __future__ import annotations

import random

import pytest

from petals_win.jobs.zmq_pump import packed, unpacked


@pytest.mark.parametrize(
    "frames", [[b"P"], [b"C", b"12345678"], [b"Q", b"12345678", b"Generate", b""], [b"", b"x" * 70_000]]
)
def test_frames_come_back(frames):
    assert unpacked(packed(frames)) == frames


def test_what_was_not_packed_is_nothing():
    for junk in (b"x", b"\0\0\0\2x", b"\xff" * 9, packed([b"P"])[:-1], packed([b"P"]) + b"\0", packed([b""] * 6)):
        assert unpacked(junk) == []
    drawn = random.Random(0)
    for length in range(300):
        frames = unpacked(drawn.randbytes(length))
        assert sum(map(len, frames)) <= length
