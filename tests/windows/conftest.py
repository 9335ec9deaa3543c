"""What the tests of the bench tell of all others."""

from __future__ import annotations

import pytest

_collected = pytest.StashKey[list[pytest.Item]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[_collected] = list(items)


@pytest.fixture
def every_test(pytestconfig: pytest.Config) -> list[pytest.Item]:
    """All tests that were collected, those too that -m has left out."""
    return pytestconfig.stash[_collected]
