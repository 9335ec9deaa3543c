"""The generated trees: what is in them, that they are the same every time, and that they appear complete or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from petals_win.errors import UserError
from petals_win.upstream.build import Checkout, build, extract_daemon, read_trees, this_checkout

ROOT = Path(__file__).parents[2]
IMPORT = 'add_import("alpha", "import os")\n'


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def patched(project):
    project.patch("alpha/one.py", IMPORT)
    return project


def test_trees_hold_packages_and_licences_but_no_daemon(patched):
    assert build(patched.checkout)
    external = tree(patched.root / "external")
    assert external["alpha-main/alpha/__init__.py"] == b"import os\n"
    assert external["beta/beta/__init__.py"] == b"BETA = 1\n"
    assert external["alpha-main/LICENSE"] == b"the licence of alpha\n"
    assert external["beta/LICENSE"] == b"the licence of beta\n"
    assert not [path for path in external if "daemon" in path or "dist-info" in path]
    assert list((patched.root / "build").iterdir()) == []


def test_a_second_build_does_nothing(patched):
    assert build(patched.checkout)
    marker = patched.root / "external" / "beta" / "beta" / "__init__.py"
    before = marker.stat().st_mtime_ns, marker.stat().st_ino
    assert not build(patched.checkout)
    assert (marker.stat().st_mtime_ns, marker.stat().st_ino) == before
    assert build(patched.checkout, force=True)


def test_a_change_of_patch_series_or_lock_builds_anew(patched):
    build(patched.checkout)
    patched.patch("alpha/two.py", 'add_import("alpha", "import sys")\n')
    assert build(patched.checkout)
    assert tree(patched.root / "external")["alpha-main/alpha/__init__.py"] == b"import os\nimport sys\n"
    patched.series.reverse()
    patched.write_series()
    assert build(patched.checkout)
    assert tree(patched.root / "external")["alpha-main/alpha/__init__.py"] == b"import sys\nimport os\n"
    patched.files["beta/new.py"] = b""
    patched.pack()
    assert build(patched.checkout)
    assert "beta/beta/new.py" in tree(patched.root / "external")


def test_builds_in_different_processes_are_identical(patched):
    patched.upstream("alpha/core.py", "import a, b, c\n\n\nclass C:\n    def m(self): pass\n    def n(self): pass\n")
    body = "".join(f'remove_import("alpha.core", "{name}")\n' for name in "ac")
    patched.patch(
        "alpha/two.py", body + 'remove("alpha.core:C.m", digest="?")\nremove("alpha.core:C.n", digest="?")\n'
    )
    code = "import sys, pathlib; from petals_win.upstream.build import *; r = pathlib.Path(sys.argv[1])\n"
    code += "build(Checkout(r, r / 'cache'), force=True)"
    trees = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "src")}
        subprocess.run([sys.executable, "-c", code, str(patched.root)], env=environment, check=True, timeout=60)
        trees.append(read_trees(patched.checkout, patched.checkout.external))
    assert trees[0] == trees[1]
    assert b"import b\n" in trees[0]["alpha-main/alpha/core.py"]


def test_a_refused_patch_leaves_the_old_trees(patched):
    build(patched.checkout)
    before = tree(patched.root / "external")
    patched.patch("alpha/two.py", 'remove("alpha:missing", digest="0000000000000000")\n', fill=False)
    with pytest.raises(UserError, match="missing"):
        build(patched.checkout)
    assert tree(patched.root / "external") == before
    assert list((patched.root / "build").iterdir()) == []


def test_a_tree_that_cannot_be_moved_leaves_both_old_ones(patched, monkeypatch):
    build(patched.checkout)
    before = tree(patched.root / "external")
    patched.patch("alpha/two.py", 'add_import("alpha", "import sys")\n')
    before["upstream.lock"] = (patched.root / "external" / "upstream.lock").read_bytes()
    replace = os.replace

    def busy(source, target):
        # Stands for a Windows program that runs from the second tree.
        if Path(source) == patched.root / "external" / "beta":
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(UserError, match=r"external cannot be changed \(Access is denied\). Stop what runs from there"):
        build(patched.checkout)
    assert tree(patched.root / "external") == before
    monkeypatch.undo()
    assert build(patched.checkout)


def test_files_that_python_leaves_are_not_part_of_a_tree(patched):
    build(patched.checkout)
    before = read_trees(patched.checkout, patched.checkout.external)
    cached = patched.root / "external" / "beta" / "beta" / "__pycache__" / "x.cpython-311.pyc"
    cached.parent.mkdir(exist_ok=True)
    cached.write_bytes(b"x")
    assert read_trees(patched.checkout, patched.checkout.external) == before


def test_upstreams_daemon_can_be_extracted(patched):
    program = patched.root / "reference"
    extract_daemon(patched.checkout, program)
    assert program.read_bytes() == patched.daemon
    if sys.platform != "win32":
        assert program.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("content", ["{", '{"upstream": [{"name": "alpha"}]}', "[]"])
def test_damaged_lock(patched, content):
    (patched.root / "external" / "upstream.lock").write_text(content)
    with pytest.raises(UserError, match="upstream.lock is damaged .* Restore it"):
        build(patched.checkout)


def test_missing_lock(tmp_path):
    with pytest.raises(UserError, match="upstream.lock cannot be read"):
        build(Checkout(tmp_path))


def test_this_checkout_is_the_repository():
    assert this_checkout().root == ROOT


def test_command_line_without_typer():
    """The repository itself: what the install scripts call. It is up to date, or this builds it."""
    code = "import sys, runpy; sys.modules['typer'] = None; sys.argv = ['x', 'build']\n"
    code += "runpy.run_module('petals_win.upstream', run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (ROOT / "external" / "hivemind" / "hivemind" / "__init__.py").is_file()
