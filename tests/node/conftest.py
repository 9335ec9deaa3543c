"""The service of a test's `span`, without a network."""

from __future__ import annotations

import pytest

from petals_win.node.budget import CacheBudget
from petals_win.node.service import BlockService


@pytest.fixture
def service(span, compute) -> BlockService:
    return BlockService(span, compute, CacheBudget(8 * 2**20), context_length=512, request_tokens=64)
