"""A thread that computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from petals_win.span.compute import ComputeThread


@pytest.fixture
def compute() -> Iterator[ComputeThread]:
    thread = ComputeThread()
    thread.start()
    yield thread
    thread.stop()
