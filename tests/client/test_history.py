"""What is kept of a session at a boundary between blocks, and how long steps are cut."""

from __future__ import annotations

import pytest
import torch

from petals_win.client import history
from petals_win.client.history import Track
from petals_win.client.on_disk import TensorFile
from petals_win.client.pieces import chunk_end, chunk_tokens, may_be_pushed


def states(count: int, rows: int = 2) -> torch.Tensor:
    """[rows, count, 3], all different."""
    return torch.arange(rows * count * 3, dtype=torch.float32).view(rows, count, 3)


def filled(whole: torch.Tensor, lengths, begin: int = 0) -> Track:
    track = Track(begin)
    for length in lengths:
        track.add(track.length, whole[:, track.length - begin : track.length - begin + length])
    return track


@pytest.mark.parametrize("lengths", [[1] * 200, [200], [70, 70, 60], [3, 64, 1, 1, 1, 130]])
def test_any_part_is_found_however_it_came(lengths):
    whole = states(200)
    track = filled(whole, lengths)
    assert track.length == 200 and len(track._parts) <= 12
    for start in range(0, 200, 7):
        for end in {start + 1, start + 5, min(start + 66, 200), 200}:
            if end <= 200:
                assert torch.equal(track.between(start, end), whole[:, start:end])


def test_what_is_known_is_not_taken_again():
    whole = states(20)
    track = filled(whole, [10])
    track.add(0, -whole[:, :10])
    track.add(4, torch.cat([-whole[:, 4:10], whole[:, 10:]], dim=1))
    assert torch.equal(track.between(0, 20), whole)
    with pytest.raises(ValueError, match="token 21"):
        track.add(21, whole)
    for start, end in ((0, 21), (5, 5), (-1, 3)):
        with pytest.raises(ValueError, match="asked for"):
            track.between(start, end)


def test_beams_and_copies():
    whole = states(9, 3)
    track = filled(whole, [4, 1])
    before = track.copy()
    track.reorder(torch.tensor([2, 0, 0]))
    track.add(5, whole[:, 5:])
    assert torch.equal(track.between(0, 5), whole[[2, 0, 0], :5])
    assert torch.equal(track.between(5, 9), whole[:, 5:])
    assert before.length == 5 and torch.equal(before.between(0, 5), whole[:, :5])
    empty = Track()
    empty.reorder(torch.tensor([0]))
    assert empty.length == 0


def test_a_track_of_one_step():
    track = filled(states(6), [2, 4], begin=100)
    assert track.length == 106 and torch.equal(track.between(101, 104), states(6)[:, 1:4])
    with pytest.raises(ValueError, match="asked for"):
        track.between(99, 101)


@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (1, 8192), (16, 576), (4000, 64), (1, 2**21)])
@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_chunks_are_small_and_never_empty(rows, hidden, nodes):
    tokens = chunk_tokens(torch.empty(rows, 7, hidden, device="meta"), nodes)
    assert tokens >= 1
    assert tokens == 1 or tokens * rows <= 1024 and tokens * rows * hidden * 4 <= 4 * 2**20
    assert tokens <= chunk_tokens(torch.empty(rows, 7, hidden, device="meta"), 1)


def test_chunks_of_a_step_begin_at_the_same_tokens_on_every_node():
    def cuts(sent: int) -> list[int]:
        ends = []
        while sent < 50:
            sent = chunk_end(sent, 21, 50, 8)
            ends.append(sent)
        return ends

    assert cuts(21) == [29, 37, 45, 50]
    assert cuts(0) == [8, 16, 21, 29, 37, 45, 50]
    assert cuts(5) == [13, 21, 29, 37, 45, 50]
    assert chunk_end(0, 0, 50, 8, at_least=11) == 11
    assert chunk_end(11, 0, 50, 8, at_least=11) == 19
    assert chunk_end(0, 0, 5, 8) == 5


def test_what_a_message_of_its_own_cannot_hold_is_not_pushed():
    assert may_be_pushed(torch.empty(1, 1, 8192, device="meta"))
    assert not may_be_pushed(torch.empty(1, 1024, 8192, device="meta"))


@pytest.mark.parametrize("begin", [0, 5])
def test_taking_back(begin):
    whole = states(200)
    for length in (begin, begin + 1, 63, 64, 130, 199, 200):
        track = filled(whole, [70, 60, 1, 1, 68], begin)
        kept = track.copy()
        track.truncate(length)
        assert (track.begin, track.length) == (begin, length)
        track.add(length, -whole[:, length - begin :])
        if length < track.length:
            new = torch.cat([whole[:, : length - begin], -whole[:, length - begin :]], dim=1)
            assert torch.equal(track.between(begin, track.length), new)
        assert torch.equal(kept.between(begin, kept.length), whole)


@pytest.fixture
def small_memory(monkeypatch) -> None:
    """40 tokens of `states` fit."""
    monkeypatch.setattr(history, "_IN_MEMORY", states(40).nbytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[1] * 200, [200], [70, 70, 60], [3, 64, 1, 1, 1, 130]])
def test_most_of_a_long_track_is_on_disk(small_memory, lengths, dtype):
    whole = states(200).to(dtype)
    track = filled(whole, lengths)
    assert sum(part.nbytes for part in track._parts if isinstance(part, torch.Tensor)) <= states(40).nbytes
    for start, end in [(0, 200), (0, 1), (199, 200), (30, 120), (150, 199)]:
        assert torch.equal(track.between(start, end), whole[:, start:end])
    other = track.copy()
    other.truncate(75)
    other.add(75, -whole[:, 75:])
    track.reorder(torch.tensor([1, 1]))
    assert torch.equal(other.between(0, 200), torch.cat([whole[:, :75], -whole[:, 75:]], dim=1))
    assert torch.equal(track.between(0, 200), whole[[1, 1]])


def test_the_file_is_closed_with_the_last_track(small_memory):
    track = filled(states(100), [50, 50])
    assert track._file is not None
    file, other = track._file._file, track.copy()
    del track
    assert not file.closed
    del other
    assert file.closed


@pytest.mark.parametrize("failing", ["TemporaryFile", "write"])
def test_where_nothing_can_be_written_it_stays_in_memory(small_memory, monkeypatch, caplog, failing):
    if failing == "write":
        monkeypatch.setattr(TensorFile, "add", full_disk)
    else:
        monkeypatch.setattr("tempfile.TemporaryFile", full_disk)
    track = filled(states(200), [1] * 200)
    assert torch.equal(track.between(0, 200), states(200))
    assert "stays in memory: no space left" in caplog.text and len(caplog.records) < 6


def full_disk(*_args, **_settings):
    raise OSError("no space left")
