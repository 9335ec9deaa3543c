"""The repository's hatch_build.py in a made-up project, by the real hatchling."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "made-up"
version = "1.0"
[tool.hatch.build]
dev-mode-dirs = ["src", "external/alpha-main", "external/beta"]
[tool.hatch.build.targets.wheel]
packages = ["src/petals_win"]
[tool.hatch.build.targets.wheel.hooks.custom]
"""


@pytest.fixture
def make(project):
    """Let hatchling make "wheel", "editable" or "sdist" and return the file."""
    project.patch("alpha/one.py", 'add_import("alpha", "import os")\n')
    (project.root / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (project.root / ".gitignore").write_text("/external/alpha-main/\n/external/beta/\n/build/\n/cache/\n*.whl\n")
    shutil.copy(ROOT / "hatch_build.py", project.root)
    for name in ("__init__.py", "errors.py", "host/__init__.py", "host/folders.py"):
        target = project.root / "src" / "petals_win" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "src" / "petals_win" / name, target)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(
        ROOT / "src" / "petals_win" / "upstream", project.root / "src" / "petals_win" / "upstream", ignore=ignore
    )
    home = project.root / "home"
    (home / "cache").mkdir(parents=True)
    shutil.copytree(project.root / "cache", home / "cache" / "upstream")

    def make(kind: str) -> Path:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"PETALS_WIN_HOME": str(home), "PIP_NO_INDEX": "1"}
        code = f"import hatchling.build as b; print(b.build_{kind}({str(project.root / 'dist')!r}))"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=project.root, env=environment, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        return project.root / "dist" / done.stdout.split()[-1]

    (project.root / "dist").mkdir()
    return make


def test_wheel_holds_the_patched_packages(make, project):
    make("wheel")
    left_by_python = project.root / "external" / "beta" / "beta" / "__pycache__" / "x.pyc"
    left_by_python.parent.mkdir(exist_ok=True)
    left_by_python.write_bytes(b"x")
    with zipfile.ZipFile(make("wheel")) as wheel:
        names = wheel.namelist()
        assert wheel.read("alpha/__init__.py") == b"import os\n"
        assert wheel.read("beta/__init__.py") == b"BETA = 1\n"
        assert wheel.read("petals_win/licences/alpha.txt") == b"the licence of alpha\n"
        assert wheel.read("petals_win/licences/beta.txt") == b"the licence of beta\n"
    assert "petals_win/upstream/build.py" in names
    assert not [name for name in names if "daemon" in name or name.endswith(".pyc") or "external" in name]


def test_editable_points_to_the_generated_trees(make, project):
    with zipfile.ZipFile(make("editable")) as wheel:
        [pth] = [name for name in wheel.namelist() if name.endswith(".pth")]
        folders = wheel.read(pth).decode().split("\n")
    assert set(map(Path, filter(None, folders))) == {
        project.root / "src",
        project.root / "external" / "alpha-main",
        project.root / "external" / "beta",
    }
    assert (project.root / "external" / "alpha-main" / "alpha" / "__init__.py").read_bytes() == b"import os\n"


def test_sdist_holds_lock_and_patches_instead(make, project):
    with tarfile.open(make("sdist")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"hatch_build.py", "external/upstream.lock", "patches/series", "patches/alpha/one.py"} <= names
    assert not [name for name in names if name.startswith(("external/alpha", "external/beta"))]


def test_a_refused_patch_ends_the_build_with_its_sentence(make, project):
    project.patch("alpha/two.py", 'add_import("alpha", "x")\n', fill=False)
    with pytest.raises(RuntimeError, match="petals-win: alpha/two.py: alpha: 'x' is no import statement") as error:
        make("wheel")
    assert "Traceback" not in str(error.value)
