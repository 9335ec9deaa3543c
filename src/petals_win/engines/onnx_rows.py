"""Keys and values of several sequences in arrays that a graph takes as one batch.

Knows arrays. Does not know graphs or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(eq=False)
class Row:
    """The place of one sequence: room for so many tokens, of which the first `length` are there."""

    room: int
    length: int = 0


@dataclass(eq=False)
class CacheRow(Row):
    """Row `number` of `caches`."""

    caches: RowCaches = field(kw_only=True)
    number: int = field(kw_only=True)


class RowCaches:
    """Rows with the same room. The arrays [rows, heads, room, size] have no gaps: the rows in use are the first ones."""

    def __init__(self, room: int, shapes: Sequence[tuple[int, int]], dtype: type) -> None:
        """`shapes` are heads and size of each array."""
        self.room = room
        self.rows: list[CacheRow] = []
        self.arrays = [np.empty((0, heads, room, size), dtype) for heads, size in shapes]
        self._row_bytes = sum(heads * size for heads, size in shapes) * room * np.dtype(dtype).itemsize

    @property
    def _places(self) -> int:
        return len(self.arrays[0])

    @property
    def nbytes(self) -> int:
        return self._places * self._row_bytes

    @property
    def nbytes_for_one_more(self) -> int:
        """What `add` would take, beside what is there."""
        return 0 if len(self.rows) < self._places else max(self._places, 1) * self._row_bytes

    def add(self) -> CacheRow:
        if len(self.rows) == self._places:
            self._resize(max(2 * self._places, 1))
        row = CacheRow(self.room, caches=self, number=len(self.rows))
        self.rows.append(row)
        return row

    def remove(self, row: CacheRow) -> None:
        """The last row takes its place."""
        last = self.rows.pop()
        if last is not row:
            self.rows[row.number] = last
            self._move(last, row.number)
        if 4 * len(self.rows) <= self._places:
            self._resize(self._places // 2 if self.rows else 0)

    def put_first(self, rows: Sequence[CacheRow]) -> None:
        """Change the order so that `rows` come first, in their order here, which is the one that they have."""
        for number, row in enumerate(rows):
            other = self.rows[number]
            if other is row:
                continue
            kept = [array[number, :, : other.length].copy() for array in self.arrays]
            self.rows[number], self.rows[row.number] = row, other
            place, row_length = row.number, row.length
            for array, one in zip(self.arrays, kept, strict=True):
                array[number, :, :row_length] = array[place, :, :row_length]
                array[place, :, : other.length] = one
            row.number, other.number = number, place

    def copy(self, row: CacheRow, source: CacheRow) -> None:
        """Put what `source`, of other caches, has into `row`."""
        for array, other in zip(self.arrays, source.caches.arrays, strict=True):
            array[row.number, :, : source.length] = other[source.number, :, : source.length]
        row.length = source.length

    def _move(self, row: CacheRow, number: int) -> None:
        for array in self.arrays:
            array[number, :, : row.length] = array[row.number, :, : row.length]
        row.number = number

    def _resize(self, places: int) -> None:
        """One array after the other, so that little is there twice."""
        for index, array in enumerate(self.arrays):
            resized = np.empty((places, *array.shape[1:]), array.dtype)
            for row in self.rows[:places]:
                resized[row.number, :, : row.length] = array[row.number, :, : row.length]
            self.arrays[index] = resized
