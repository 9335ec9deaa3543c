"""Folders of this user."""

import os
import sys

import pytest

from petals_win.errors import UserError
from petals_win.host import folders

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="folders of a Windows profile are private by default")


def test_one_variable_moves_all_of_them(monkeypatch, tmp_path):
    monkeypatch.setenv("PETALS_WIN_HOME", str(tmp_path / "home"))
    made = [folders.cache_folder(), folders.data_folder(), folders.logs_folder(), folders.run_folder()]
    assert all(folder.is_dir() and folder.parent == tmp_path / "home" for folder in made)
    assert len(set(made)) == 4


def test_a_folder_that_cannot_be_made_is_named(monkeypatch, tmp_path):
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("PETALS_WIN_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match="PETALS_WIN_HOME"):
        folders.cache_folder()


@posix_only
def test_the_run_folder_is_private(monkeypatch, tmp_path):
    monkeypatch.delenv("PETALS_WIN_HOME", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "petals-win").mkdir(mode=0o755)
    assert folders.run_folder() == tmp_path / "petals-win"
    assert folders.run_folder().stat().st_mode & 0o777 == 0o700


@posix_only
def test_without_a_runtime_folder_the_temporary_one_is_used(monkeypatch, tmp_path):
    monkeypatch.delenv("PETALS_WIN_HOME", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert folders.run_folder() == tmp_path / f"petals-win-{os.getuid()}"


@posix_only
def test_a_run_folder_prepared_by_somebody_else_is_refused(monkeypatch, tmp_path):
    monkeypatch.delenv("PETALS_WIN_HOME", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "petals-win").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="not a folder of this user"):
        folders.run_folder()
