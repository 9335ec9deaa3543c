"""Every family of the README's table has the logits of one process: whole, token by token, in chunks, and beside others."""

from __future__ import annotations

import pytest

from span.equal_logits import BOUND, differences
from span.families import FAMILIES, VOCABULARY
from span.hybrids import HYBRIDS


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_logits_of(checkpoint, family):
    found = differences(checkpoint(family), VOCABULARY)
    assert found.largest <= BOUND, found
