"""The repository's hatch_build.py in a made-up project, by the real hatchling."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from petals_win import __version__
from petals_win.daemon.build import find_go, program_name, this_target, wheel_tag
from petals_win.kernels.build import find_zig, library_names

pytestmark = pytest.mark.wine_lacks("what pip asks of the certificate store, so that Go cannot be fetched")

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
MAIN_GO = """package main

var version, commit = "", ""

func main() { println(version, commit) }
"""


@pytest.fixture
def make(project):
    """Let hatchling make "wheel", "editable" or "sdist" and return the file."""
    project.patch("alpha/one.py", 'add_import("alpha", "import os")\n')
    (project.root / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (project.root / ".gitignore").write_text("/external/alpha-main/\n/external/beta/\n/build/\n/cache/\n*.whl\n")
    shutil.copy(ROOT / "hatch_build.py", project.root)
    for name in (
        "__init__.py",
        "errors.py",
        "host/__init__.py",
        "host/folders.py",
        "daemon/__init__.py",
        "daemon/build.py",
        "kernels/__init__.py",
        "kernels/build.py",
    ):
        target = project.root / "src" / "petals_win" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "src" / "petals_win" / name, target)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(
        ROOT / "src" / "petals_win" / "upstream", project.root / "src" / "petals_win" / "upstream", ignore=ignore
    )
    daemon = project.root / "src" / "p2pd"
    daemon.mkdir()
    (daemon / "go.mod").write_text("module made-up/p2pd\n\ngo 1.26\n", encoding="utf-8")
    (daemon / "main.go").write_text(MAIN_GO, encoding="utf-8")
    shutil.copytree(ROOT / "src" / "kernels", project.root / "src" / "kernels")
    home = project.root / "home"
    (home / "cache").mkdir(parents=True)
    shutil.copytree(project.root / "cache", home / "cache" / "upstream")

    compilers = os.pathsep.join(str(Path(compiler).parent) for compiler in (find_go(ROOT), find_zig(ROOT)))

    def make(kind: str, **more: str) -> Path:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"PETALS_WIN_HOME": str(home), "PIP_NO_INDEX": "1"}
        environment |= {"PATH": f"{compilers}{os.pathsep}{os.environ['PATH']}", **more}
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
    assert not [name for name in names if "tools/daemon" in name or name.endswith(".pyc") or "external" in name]


@pytest.mark.parametrize("target", [None, "windows/amd64", "darwin/arm64", "linux/arm64"])
def test_wheel_holds_the_program_of_its_system(make, target):
    path = make("wheel", **({"PETALS_WIN_TARGET": target} if target else {}))
    target = target or this_target()
    assert path.name == f"made_up-1.0-{wheel_tag(target)}.whl"
    name = f"petals_win/daemon/bin/{program_name(target)}"
    with zipfile.ZipFile(path) as wheel:
        assert [n for n in wheel.namelist() if "daemon/bin" in n] == [name]
        libraries = [n for n in wheel.namelist() if "kernels/bin" in n]
        assert libraries == [f"petals_win/kernels/bin/{library}" for library in library_names(target)]
        magic = {"windows": b"MZ", "darwin": b"\xcf\xfa\xed\xfe", "linux": b"\x7fELF"}[target.split("/")[0]]
        assert all(wheel.read(file).startswith(magic) for file in (name, *libraries))
        if sys.platform != "win32":
            assert wheel.getinfo(name).external_attr >> 16 & 0o777 == 0o755
        [tags] = [n for n in wheel.namelist() if n.endswith(".dist-info/WHEEL")]
        assert "Root-Is-Purelib: false" in wheel.read(tags).decode()


def test_a_system_that_go_does_not_know_here_ends_the_build(make):
    with pytest.raises(
        RuntimeError, match="petals-win: p2pd cannot be built for windows/386. Choose one of windows/amd64"
    ):
        make("wheel", PETALS_WIN_TARGET="windows/386")


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


def test_editable_puts_p2pd_into_bin(make, project):
    make("editable")
    program = project.root / "bin" / program_name(this_target())
    said = subprocess.run([program], capture_output=True, text=True, timeout=10).stderr
    assert said.split() == [__version__, "unknown"]
    made = program.stat().st_mtime_ns, program.stat().st_ino
    make("editable")
    assert (program.stat().st_mtime_ns, program.stat().st_ino) == made  # not built again
    source = project.root / "src" / "p2pd" / "main.go"
    source.write_text(source.read_text().replace("version, commit)", '"changed")'))
    program.write_bytes(b"not what was built")
    make("editable")
    assert subprocess.run([program], capture_output=True, text=True, timeout=10).stderr.strip() == "changed"


def test_sdist_holds_lock_and_patches_instead(make, project):
    with tarfile.open(make("sdist")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"hatch_build.py", "external/upstream.lock", "patches/series", "patches/alpha/one.py"} <= names
    assert {"src/p2pd/go.mod", "src/p2pd/main.go"} <= names
    assert not [name for name in names if name.startswith(("external/alpha", "external/beta"))]


def test_a_refused_patch_ends_the_build_with_its_sentence(make, project):
    project.patch("alpha/two.py", 'add_import("alpha", "x")\n', fill=False)
    with pytest.raises(RuntimeError, match="petals-win: alpha/two.py: alpha: 'x' is no import statement") as error:
        make("wheel")
    assert "Traceback" not in str(error.value)
