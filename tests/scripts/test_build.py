"""A release: built twice in two places from the same source, the same bytes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from petals_win.daemon.build import this_target, wheel_tag
from petals_win.kernels.build import find_zig

ROOT = Path(__file__).resolve().parents[2]
MADE = {".git", ".venv", "build", "dist", "external/petals-main", "external/hivemind", "bin", "tests"}


def copy(folder: Path) -> Path:
    """This checkout without what is made in it, and without its history."""

    def left_out(parent: str, names: list[str]) -> set[str]:
        inside = Path(parent).relative_to(ROOT)
        return {name for name in names if (inside / name).as_posix() in MADE or name == "__pycache__"}

    return Path(shutil.copytree(ROOT, folder, ignore=left_out))


def build(source: Path, output: Path) -> str:
    """Build the sdist and this PC's wheel; what SHA256SUMS says of them."""
    command = [sys.executable, "scripts/build.py", "--output", str(output), this_target()]
    done = subprocess.run(
        command, cwd=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout
    return (output / "SHA256SUMS").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_two_builds_in_two_places_are_equal(tmp_path, monkeypatch):
    # Not fetched anew for each place.
    monkeypatch.setenv("PATH", f"{find_zig(ROOT).parent}{os.pathsep}{os.environ['PATH']}")
    first, second = copy(tmp_path / "here"), copy(tmp_path / "over there")
    sums = build(first, tmp_path / "first")
    assert build(second, tmp_path / "second") == sums
    assert len(re.findall(r"^[0-9a-f]{64}  petals_win-", sums, re.MULTILINE)) == 2
    (sdist,) = (tmp_path / "first").glob("*.tar.gz")
    (wheel,) = (tmp_path / "first").glob("*.whl")
    assert wheel.name.endswith(f"-{wheel_tag(this_target())}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {
        "petals/__init__.py",
        "hivemind/__init__.py",
        "petals_win/cli/main.py",
        "petals_win/web/index.html",
    } <= names
    assert {"petals_win/licences/petals.txt", "petals_win/licences/hivemind.txt"} <= names
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "src/p2pd/go.mod",
        "src/p2pd/main.go",
        "src/kernels/blocks.c",
        "patches/series",
        "external/upstream.lock",
        "hatch_build.py",
    } <= names
    assert not [name for name in names if name.startswith(("external/petals-main", "external/hivemind", "tests"))]
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path / "third")]
    subprocess.run(command, cwd=unpacked, check=True, timeout=900)
    assert (
        tmp_path / "third" / wheel.name
    ).read_bytes() == wheel.read_bytes(), "a wheel made from the sdist is the same"


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    command = [sys.executable, str(ROOT / "scripts" / "build.py"), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
