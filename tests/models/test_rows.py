"""What passes between blocks: rows that hold more than one hidden state lose nothing on their way."""

from __future__ import annotations

import pytest
import torch
from span.families import config_of

from petals_win.models.rows import Row


@pytest.mark.parametrize(
    ("family", "width", "told"),
    [
        ("llama", 64, "64"),
        ("gemma4_unified_text", 64, "64"),
        ("gemma4_text", 64 + 8 * 10, "144 (1 x 64, and 10 for each of 8 blocks)"),
        ("gemma3n_text", 3 * 64 + 8 * 10, "272 (3 x 64, and 10 for each of 8 blocks)"),
    ],
)
def test_how_wide_it_is(family, width, told):
    row = Row.of(config_of(family))
    assert row.width == width and str(row) == told and row.is_hidden_state == (width == 64)


@pytest.mark.parametrize("streams", [1, 3])
def test_there_and_back(streams):
    row = Row(hidden=5, streams=streams, own=2, blocks=4)
    shape = (2, 7, 5) if streams == 1 else (3, 2, 7, 5)
    hidden, own = torch.randn(shape), torch.randn(2, 7, 8)
    rows = row.pack(hidden, own)
    assert rows.shape == (2, 7, row.width)
    found, some = row.all_own(rows), row.own_of(rows, 1, 3)
    assert found is not None and some is not None
    assert torch.equal(row.hidden_of(rows), hidden) and torch.equal(found, own)
    assert torch.equal(some, own.view(2, 7, 4, 2)[:, :, 1:3])
    # A token of a sequence is a row by itself, so that chunks and beams are parts of the whole.
    assert torch.equal(row.hidden_of(rows[1:, 3:4]), hidden[..., 1:, 3:4, :])


def test_a_hidden_state_is_taken_as_it_is():
    rows = torch.randn(1, 2, 5)
    row = Row(hidden=5)
    assert row.hidden_of(rows) is rows and row.pack(rows, None) is rows and row.own_of(rows, 0, 1) is None
