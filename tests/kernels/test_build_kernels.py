"""Building the kernels: from the same source the same bytes, again only if something changed, and what goes wrong in one sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from petals_win.daemon import build as daemon_build
from petals_win.daemon.build import TARGETS, this_target
from petals_win.errors import UserError
from petals_win.kernels import build

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.wine_lacks("the compiler's own processes")


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """A checkout with nothing built, and an installed compiler."""
    shutil.copytree(ROOT / "src" / "kernels", tmp_path / "src" / "kernels")
    (tmp_path / "bin").mkdir()
    compiler = build.find_zig(ROOT)
    monkeypatch.setattr(build, "checkout", lambda: tmp_path)
    monkeypatch.setattr(build, "find_zig", lambda root: compiler)
    return tmp_path


def test_every_system_has_its_libraries():
    assert set(build._SYSTEMS) == set(TARGETS)
    assert build.library_names("windows/amd64") == ["blocks-avx2.dll", "blocks-avx512.dll"]


def test_the_same_again_is_not_built_and_the_same_bytes_if_it_is(checkout):
    first = build.build_if_changed(this_target())
    bytes_of = [library.read_bytes() for library in first]
    at = [library.stat().st_mtime_ns for library in first]
    assert [library.stat().st_mtime_ns for library in build.build_if_changed(this_target())] == at
    first[0].write_bytes(b"not what was built")
    assert [library.read_bytes() for library in build.build_if_changed(this_target())] == bytes_of
    build.put_into_bin()
    assert sorted(path.name for path in (checkout / "bin").iterdir()) == sorted(build.library_names(this_target()))


def test_an_error_of_the_compiler_is_shown_and_nothing_is_left(checkout):
    source = checkout / "src" / "kernels" / "blocks.c"
    source.write_text(source.read_text("utf-8") + "\nint broken = ;\n", "utf-8")
    with pytest.raises(UserError, match="could not be built. The compiler says: (?s:.*)expected expression"):
        build.build_if_changed(this_target())
    assert [path.name for path in (checkout / "build" / "kernels").rglob("*") if path.is_file()] == []


def test_a_compiler_that_cannot_be_fetched_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="pip could not fetch the package ziglang (?s:.*) Check the network"):
        build.find_zig(tmp_path)
    assert list((tmp_path / "build").iterdir()) == []


@pytest.mark.parametrize(("before", "after"), [("in use", "in use"), (None, "fetched")])
def test_who_fetches_later_leaves_what_the_first_is_using(monkeypatch, tmp_path, before, after):
    """Two processes that find no compiler fetch one each. What has no compiler in it is broken, and made anew."""
    folder = tmp_path / "build" / "zig"

    def pip(command, *_):
        fetched = Path(command[command.index("--target") + 1], "ziglang")
        fetched.mkdir()
        (fetched / "zig").write_text("fetched", "utf-8")
        (folder / "ziglang").mkdir(parents=True)  # by the other one, meanwhile
        (folder / "ziglang" / "header").touch()
        if before:
            (folder / "ziglang" / "zig").write_text(before, "utf-8")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(daemon_build, "run", pip)
    daemon_build.fetch_package("ziglang", "1", folder, ["ziglang/zig"], "")
    assert (folder / "ziglang" / "zig").read_text("utf-8") == after
    assert (folder / "ziglang" / "header").exists() == (before is not None)
    assert [path.name for path in folder.parent.iterdir()] == ["zig"]
    if sys.platform != "win32" and after == "fetched":
        assert os.access(folder / "ziglang" / "zig", os.X_OK)


def test_an_installed_compiler_of_another_version_is_not_taken(monkeypatch, tmp_path):
    other = tmp_path / "zig"
    other.write_text(f"#!{sys.executable}\nprint('0.1.0')\n", "utf-8")
    other.chmod(0o755)
    monkeypatch.setattr(build.shutil, "which", lambda name: str(other))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="pip could not fetch"):
        build.find_zig(tmp_path / "empty")
