"""Nothing of this user's own sockets and daemons is touched by these tests."""

import pytest


@pytest.fixture(autouse=True)
def home_of_its_own(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("PETALS_WIN_HOME", str(tmp_path_factory.mktemp("home")))
