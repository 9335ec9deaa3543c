from collections.abc import Iterator

import pytest

from api.serving import Served, eventually, serving


@pytest.fixture(scope="session")
def _running() -> Iterator[Served]:
    with serving() as running:
        yield running


@pytest.fixture
def served(_running: Served) -> Iterator[Served]:
    """A server without keys in front of a fake engine that has answered nothing yet."""
    _running.engine.__init__()
    yield _running
    assert eventually(lambda: _running.engine.running == 0), "the test left a generation running"
