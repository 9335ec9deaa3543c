"""Wheels by hash: from the cache without a network, else by the real pip, here from a folder instead of an index."""

import dataclasses
import importlib.util
import subprocess

import pytest

from petals_win.errors import UserError
from petals_win.upstream.fetch import fetch


@pytest.fixture
def pin(project, monkeypatch):
    """Of a package that pip finds in a folder and not in the cache, on a machine without network."""
    project.pack()
    pin = project.checkout.pins()[0]
    (project.root / "cache" / pin.sha256 / pin.filename).unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(project.root))
    monkeypatch.setenv("PIP_CONFIG_FILE", str(project.root / "none"))
    return pin


def test_fetched_once(project, pin, monkeypatch):
    cache = project.root / "cache"
    wheel = fetch(pin, cache)
    assert wheel == cache / pin.sha256 / pin.filename
    assert wheel.stat().st_size == pin.bytes
    assert list(wheel.parent.iterdir()) == [wheel]

    def no_pip(*_args, **_options):
        raise AssertionError("the network must not be asked")

    monkeypatch.setattr(subprocess, "run", no_pip)
    assert fetch(pin, cache) == wheel


def test_a_damaged_file_in_the_cache_is_fetched_again(project, pin):
    cached = project.root / "cache" / pin.sha256 / pin.filename
    cached.write_bytes(b"half of a wh")
    assert fetch(pin, project.root / "cache").stat().st_size == pin.bytes


def test_another_file_of_that_name_is_refused(project, pin):
    wrong = dataclasses.replace(pin, sha256="0" * 64)
    with pytest.raises(UserError, match="pip could not fetch alpha 1.0: ERROR: .*HASH") as error:
        fetch(wrong, project.root / "cache")
    assert not (project.root / "cache" / wrong.sha256 / wrong.filename).exists()
    assert "put the file alpha-1.0-py3-none-any.whl into" in str(error.value)


def test_not_to_be_had(project, pin):
    (project.root / pin.filename).unlink()
    with pytest.raises(UserError, match="pip could not fetch alpha 1.0: .* Check the network and pip's settings"):
        fetch(pin, project.root / "cache")


def test_pip_takes_too_long(project, pin, monkeypatch):
    monkeypatch.setattr("petals_win.upstream.fetch._DEADLINE_S", 0.01)
    with pytest.raises(UserError, match="pip did not fetch alpha 1.0 within 0.01 s"):
        fetch(pin, project.root / "cache")


def test_without_pip(project, pin, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="has no pip, which fetches alpha. Run: .* -m ensurepip"):
        fetch(pin, project.root / "cache")
