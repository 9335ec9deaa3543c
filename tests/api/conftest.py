from collections.abc import Iterator

import pytest

from api.serving import Served, serving


@pytest.fixture
def served() -> Iterator[Served]:
    """A server without keys in front of a fake engine."""
    with serving() as running:
        yield running
