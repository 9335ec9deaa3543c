"""Which p2pd is found, and what the user reads when there is none."""

import sys
from pathlib import Path

import pytest

from petals_win.daemon import binary
from petals_win.daemon.binary import NAME, find_p2pd
from petals_win.errors import UserError


@pytest.fixture
def places(monkeypatch, tmp_path):
    """The four places that are looked at, empty."""
    monkeypatch.delenv("PETALS_WIN_P2PD", raising=False)
    monkeypatch.setattr(binary.importlib.resources, "files", lambda package: tmp_path / "package")
    monkeypatch.setattr(binary.petals_win, "__file__", str(tmp_path / "checkout/src/petals_win/__init__.py"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    return {"package": tmp_path / "package/bin", "checkout": tmp_path / "checkout/bin", "PATH": tmp_path / "path"}


def put(folder: Path, mode=0o755) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    path.write_bytes(b"")
    path.chmod(mode)
    return path


def test_the_order(places, monkeypatch, tmp_path):
    for place in ("PATH", "checkout", "package"):  # from the last to the first
        path = put(places[place])
        found = find_p2pd()
        assert found.path == path and place in found.why
    chosen = put(tmp_path / "chosen")
    monkeypatch.setenv("PETALS_WIN_P2PD", str(chosen))
    assert find_p2pd().path == chosen and "PETALS_WIN_P2PD" in find_p2pd().why


def test_nothing_anywhere(places):
    with pytest.raises(UserError) as missing:
        find_p2pd()
    for words in (str(places["package"]), str(places["checkout"]), "PATH", "PETALS_WIN_P2PD"):
        assert words in str(missing.value)


def test_a_variable_that_names_nothing_is_not_passed_over(places, monkeypatch, tmp_path):
    put(places["package"])
    monkeypatch.setenv("PETALS_WIN_P2PD", str(tmp_path / "typo"))
    with pytest.raises(UserError, match="typo"):
        find_p2pd()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no permission to execute")
def test_a_file_that_may_not_be_run(places):
    path = put(places["checkout"], mode=0o644)
    with pytest.raises(UserError, match=f"chmod \\+x {path}"):
        find_p2pd()


def test_this_installation_has_one():
    assert find_p2pd().path.is_file()
