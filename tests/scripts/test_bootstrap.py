"""The launcher and scripts/bootstrap.py on a tiny project: its package index is never asked, nothing big is installed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
WINDOWS = sys.platform == "win32"
VENV_PYTHON = "Scripts/python.exe" if WINDOWS else "bin/python"

PYPROJECT = """
    [build-system]
    requires = []
    build-backend = "backend"
    backend-path = ["."]

    [project]
    name = "petals-win"
    version = "1.0"
    dependencies = []

    [project.optional-dependencies]
    speed = []
    test = []
"""
# Builds a wheel that points to src and a p2pd, and says so in builds.log. The file "sabotage", if there is one, is run first.
BACKEND = """
    import pathlib, sys, zipfile

    ROOT = pathlib.Path(__file__).parent

    def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
        if (ROOT / "sabotage").exists():
            exec((ROOT / "sabotage").read_text())
        name = "petals_win-1.0-py3-none-any.whl"
        metadata = "Metadata-Version: 2.1\\nName: petals-win\\nVersion: 1.0\\nProvides-Extra: speed\\nProvides-Extra: test\\n"
        for requirement in (ROOT / "requirements").read_text().split():
            metadata += f"Requires-Dist: {requirement}\\n"
        with zipfile.ZipFile(pathlib.Path(wheel_directory) / name, "w") as wheel:
            wheel.writestr("_petals_win.pth", str(ROOT / "src"))
            wheel.writestr("petals_win-1.0.dist-info/METADATA", metadata)
            wheel.writestr("petals_win-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
            wheel.writestr("petals_win-1.0.dist-info/RECORD", "")
        (ROOT / "bin" / ("p2pd.exe" if sys.platform == "win32" else "p2pd")).touch()
        with open(ROOT / "builds.log", "a") as log:
            log.write("built\\n")
        return name
"""
MAIN = """
    import json, os, sys
    if __name__ == "__main__":
        print(json.dumps({"arguments": sys.argv[1:], "python": sys.executable, "pid": os.getpid(), "cwd": os.getcwd()}))
        sys.exit(int(os.environ.get("STATUS", 0)))
"""


@pytest.fixture(scope="session")
def made_venv(tmp_path_factory) -> Path:
    """A working environment to copy, since pip takes seconds to get into one."""
    folder = tmp_path_factory.mktemp("made") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    return folder


def checkout(root: Path) -> Path:
    """A tiny petals-win with nothing installed."""
    files = {
        "pyproject.toml": PYPROJECT,
        "backend.py": BACKEND,
        "requirements": "",
        "src/petals_win/__init__.py": "",
        "src/petals_win/cli/__init__.py": "",
        "src/petals_win/cli/main.py": MAIN,
        "src/petals_win/upstream/apply.py": "",
        "patches/petals/a.py": "",
        "external/upstream.lock": "",
        "external/petals-main/petals/__init__.py": "",
        "external/hivemind/hivemind/__init__.py": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text), "utf-8")
    shutil.copytree(ROOT / "src/petals_win/host", root / "src/petals_win/host")
    shutil.copy2(ROOT / "src/petals_win/errors.py", root / "src/petals_win/errors.py")
    shutil.copytree(ROOT / "bin", root / "bin", ignore=shutil.ignore_patterns("p2pd*"))
    (root / "scripts").mkdir()
    for name in ("bootstrap.py", "with-python", "with-python.cmd", "install", "install.cmd"):
        shutil.copy2(ROOT / "scripts" / name, root / "scripts" / name)
    return root


@pytest.fixture
def bare(tmp_path) -> Path:
    """A fresh checkout of a tiny petals-win, in a folder with a space and an umlaut in its name."""
    return checkout(tmp_path / "petals wïn")


@pytest.fixture(scope="session")
def once_installed(tmp_path_factory, made_venv) -> Path:
    """A checkout after its first start."""
    root = checkout(tmp_path_factory.mktemp("installed") / "petals wïn")
    shutil.copytree(made_venv, root / ".venv", symlinks=True)
    done = start(root)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def installed(tmp_path, once_installed) -> Path:
    """The same in a folder of this test's own, since pip takes seconds to install a project."""
    root = Path(shutil.copytree(once_installed, tmp_path / "petals wïn", symlinks=True))
    (site_packages(root) / "_petals_win.pth").write_text(f"import sys; sys.path += {[str(root / 'src')]!a}\n", "ascii")
    return root


def site_packages(root: Path) -> Path:
    return next((root / ".venv").glob("Lib/site-packages" if WINDOWS else "lib/python3.*/site-packages"))


@pytest.fixture
def project(bare, made_venv) -> Path:
    """The same with an environment in which petals-win is not installed yet."""
    shutil.copytree(made_venv, bare / ".venv", symlinks=True)
    return bare


def command(root: Path, *arguments: str) -> list[str]:
    return [str(root / "bin" / ("petals-win.cmd" if WINDOWS else "petals-win")), *arguments]


def environment(**variables: str) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON", "PETALS_WIN_"))
    }
    # The index refuses every connection at once: whoever asks it fails the test.
    return {**kept, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1", **variables}


def start(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(root, *arguments), env=environment(**variables), capture_output=True, encoding="utf-8", timeout=120
    )


def builds(root: Path) -> int:
    log = root / "builds.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_from_nothing(bare):
    done = start(bare, "up", "--model", "a b", "")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["arguments"] == ["up", "--model", "a b", ""]
    assert Path(found["python"]) == bare / ".venv" / VENV_PYTHON
    assert "Making .venv" in done.stderr and "Installing petals-win" in done.stderr
    assert builds(bare) == 1


def test_the_second_start_does_nothing_and_takes_no_time(installed):
    enough, times = 1.5 if WINDOWS else 0.3, list[
        float
    ]()  # Windows starts processes slowly, and a launcher for that of .venv
    while min(times, default=enough) >= enough and len(times) < 15:
        began = time.perf_counter()
        done = start(installed)
        times.append(time.perf_counter() - began)
        assert done.returncode == 0 and done.stderr == ""
    assert builds(installed) == 1
    assert min(times) < enough, times


def test_the_users_folder_and_the_exit_status_are_kept(installed, tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    done = subprocess.run(
        command(installed),
        cwd=tmp_path,
        env=environment(STATUS="7"),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 7, done.stderr
    assert json.loads(done.stdout)["cwd"] == str(tmp_path)


@pytest.mark.skipif(WINDOWS, reason="there a process cannot become another")
def test_the_program_takes_the_launchers_place(installed):
    with subprocess.Popen(command(installed), env=environment(), stdout=subprocess.PIPE) as process:
        output, _ = process.communicate(timeout=60)
    assert json.loads(output)["pid"] == process.pid


@pytest.mark.skipif(WINDOWS, reason="links need a privilege there")
def test_the_launcher_can_be_linked_to(installed, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links/one").symlink_to(installed / "bin/petals-win")
    (tmp_path / "links/two").symlink_to("one")
    done = subprocess.run([tmp_path / "links/two"], env=environment(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "changed", ["pyproject.toml", "external/upstream.lock", "patches/petals/a.py", "src/petals_win/upstream/apply.py"]
)
def test_what_an_installation_is_made_from_is_watched(installed, changed):
    with (installed / changed).open("a") as file:
        file.write("\n# changed\n")
    assert start(installed).returncode == 0
    assert builds(installed) == 2


def test_our_own_code_is_not_installed_again(installed):
    with (installed / "src/petals_win/cli/main.py").open("a") as file:
        file.write("\n# changed\n")
    assert start(installed).returncode == 0
    assert builds(installed) == 1


def test_trees_that_were_deleted_are_made_again(installed):
    shutil.rmtree(installed / "external/hivemind")
    start(installed)
    assert builds(installed) == 2


def test_scripts_install_only_installs(project):
    script = project / "scripts" / ("install.cmd" if WINDOWS else "install")
    done = subprocess.run([str(script)], env=environment(), capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0 and done.stdout == "" and "petals-win up" in done.stderr
    start(project)
    assert builds(project) == 1


def test_a_broken_environment_is_made_anew(bare):
    (bare / ".venv/bin").mkdir(parents=True)
    (bare / ".venv/bin/python").write_text("half")
    assert start(bare).returncode == 0
    assert builds(bare) == 1


def test_a_package_that_is_half_there_is_installed_again(project):
    site = site_packages(project)
    (site / "petals_win-1.0.dist-info").mkdir()
    (site / "petals_win-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: petals-win\nVersion: 1.0\n")
    done = start(project)
    assert done.returncode == 0, done.stderr


def test_two_starts_at_once_install_once(project):
    (project / "sabotage").write_text("import time; time.sleep(1.5)")
    processes = [
        subprocess.Popen(
            command(project), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    output = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    assert builds(project) == 1
    assert sum("waiting for it" in stderr for _, stderr in output) == 1


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(WINDOWS, reason="there is no signal to send there but the end by force")
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_an_interrupted_installation_is_finished_later(project, how):
    # A shell's background jobs ignore SIGINT and so do their children, unless somebody handles it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (project / "sabotage").write_text("open(ROOT / 'begun', 'w').close(); import time; time.sleep(3)")
    process = subprocess.Popen(command(project), env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for((project / "begun").exists)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(getattr(signal, how))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    if how != "SIGKILL":
        assert "goes on where this one has ended" in stderr
    (project / "sabotage").unlink()
    assert start(project).returncode == 0
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def assert_explained(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for word in ("petals-win: ", "bootstrap.log", *words):
        assert word in done.stderr, done.stderr


def test_no_network_to_the_package_index(project):
    (project / "requirements").write_text("surely-not-cached-here")
    assert_explained(start(project), "package index cannot be reached")


@pytest.mark.parametrize(
    "error, words",
    [
        ("OSError(28, 'No space left on device')", "The disk is full"),
        ("PermissionError(13, 'Permission denied')", "cannot be written"),
        ("OSError('a reason of its own')", "a reason of its own"),
    ],
)
def test_what_stops_the_build_is_explained(project, error, words):
    """The build raises what a full disk or a foreign file would: a real one cannot be made here."""
    (project / "sabotage").write_text(f"raise {error}")
    assert_explained(start(project), words)


def test_no_suitable_python(bare, tmp_path):
    if WINDOWS:
        pytest.skip("py.exe stands in the Windows folder, which cannot be taken off the PATH")
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("dirname", "readlink", "sh"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n")  # as Python 3.9 answers
    (tools / "python3").chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", str(bare / "bin/petals-win")],
        env={"PATH": str(tools)},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 1 and "Python 3.11 to 3.13" in done.stderr and "python.org" in done.stderr


# The package index of PyTorch, as far as a start asks it: stands in for the network, and says what it was asked for.
INDEX = """
    import runpy, sys, urllib.request

    def refuse(request, timeout=None):
        raise OSError("refused")

    urllib.request.urlopen = refuse
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def wanting_torch(project: Path) -> Path:
    """The project wants torch, which is nowhere to be had: so that the choice of its build is made and nothing is installed."""
    file = project / "pyproject.toml"
    file.write_text(file.read_text("utf-8").replace("dependencies = []", 'dependencies = ["torch>=2.13"]'), "utf-8")
    (project / "offline.py").write_text(textwrap.dedent(INDEX), "utf-8")
    return project


def install_offline(project: Path, tools: Path) -> subprocess.CompletedProcess[str]:
    bootstrap = [sys.executable, "-I", str(project / "offline.py"), str(project / "scripts/bootstrap.py"), "install"]
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        bootstrap, env=environment(PATH=path), capture_output=True, encoding="utf-8", errors="replace", timeout=120
    )


def test_the_choice_of_torch_is_told_with_its_reason(project, tmp_path):
    """Where the network does not give the build that suits, the start says so, and what it takes instead."""
    done = install_offline(wanting_torch(project), tmp_path)
    told = [line for line in done.stderr.splitlines() if line.startswith("torch: ")]
    assert told[0].startswith("torch: the build for CPUs, for there is no NVIDIA driver here"), done.stderr
    if sys.platform == "linux":
        assert "package index's own build instead, since" in told[1] and "does not give cpu" in told[1]


@pytest.mark.skipif(
    WINDOWS, reason="a script cannot stand in for nvidia-smi.exe; tests/host/test_torch_build.py judges its words"
)
def test_a_driver_that_is_out_of_order_is_told(project, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    program.chmod(0o755)
    file = project / "pyproject.toml"
    file.write_text(file.read_text("utf-8").replace("speed = []", "speed = []\n    quant = []"), "utf-8")
    done = install_offline(wanting_torch(project), tmp_path)
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("torch: ")]
    assert "has CUDA" in told and "Restart the PC." in told and "Traceback" not in done.stderr


def test_bootstrap_needs_the_standard_library_alone():
    """It asks the NVIDIA driver before anything is installed: what it imports of ours must import nothing else."""
    imports = "import sys; sys.path.insert(0, sys.argv[1]); import bootstrap, petals_win.host.torch_build; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", imports, str(ROOT / "scripts")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    foreign = {name for name in done.stdout.split() if name not in sys.stdlib_module_names} - {"__main__", "bootstrap"}
    assert foreign == {"petals_win"}
