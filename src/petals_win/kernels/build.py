"""Building the kernels from src/kernels for any system.

Knows the compiler, where to get it, and which variants a system has. Does not know what kernels compute. Uses the standard library alone,
so that building a wheel needs no installation.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

from petals_win.daemon.build import checkout, fetch_package, file_digest, run, this_target
from petals_win.errors import UserError

logger = logging.getLogger(__name__)

# Zig's C compiler, which is clang with the C libraries of all systems: one compiler on every PC, for every PC.
_ZIG = "0.17.1"
_BUILD_S = 600

# The processors that have a library of their own, by clang's names; then each system's, and what its libraries are linked with. On Windows
# that is not the C library, which the compiler would have to build first. Clang parts vectors of 512 bits unless it is told not to.
_AMD64 = {"avx2": "-mcpu=x86_64_v3", "avx512": "-mcpu=x86_64_v4 -mprefer-vector-width=512"}
_ARM64 = {"arm64": "-mcpu=generic"}
_SYSTEMS = {
    "windows/amd64": ("x86_64-windows-gnu", _AMD64, ".dll", "-nostdlib -lkernel32"),
    "windows/arm64": ("aarch64-windows-gnu", _ARM64, ".dll", "-nostdlib -lkernel32"),
    "linux/amd64": ("x86_64-linux-gnu.2.17", _AMD64, ".so", "-lpthread"),
    "linux/arm64": ("aarch64-linux-gnu.2.17", _ARM64, ".so", "-lpthread"),
    "darwin/amd64": ("x86_64-macos.12.0", _AMD64, ".dylib", ""),
    "darwin/arm64": ("aarch64-macos.12.0", _ARM64, ".dylib", ""),
}
# Sums may be formed in any order that the source leaves open, but nothing else may be assumed of numbers.
_FLAGS = "-O3 -std=c11 -ffp-contract=fast -fno-math-errno -fno-sanitize=all -fvisibility=hidden -shared -s -Wall -Wextra -Werror"


def library_names(target: str) -> list[str]:
    """The files that a system's kernels consist of, one for each kind of processor."""
    _, variants, ending, _ = _SYSTEMS[target]
    return [f"blocks-{variant}{ending}" for variant in variants]


def build_if_changed(target: str) -> list[Path]:
    """The libraries for `target`, one of daemon.build.TARGETS, in build/kernels; built now unless that was done from the same source.

    Raises UserError when the compiler cannot be fetched, or reports errors.
    """
    root = checkout()
    folder = root / "build" / "kernels" / target.replace("/", "-")
    source = root / "src" / "kernels" / "blocks.c"
    stamp, libraries = folder / "built-from", [folder / name for name in library_names(target)]
    made_of = hashlib.sha256(source.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    if not _is_built(libraries, stamp, made_of):
        folder.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        zig = find_zig(root)
        triple, variants, _, linked_with = _SYSTEMS[target]
        logger.info("Building the kernels for %s", target)
        with tempfile.TemporaryDirectory(dir=folder) as fresh:  # since another process may be at the same point
            for library, processor in zip(libraries, variants.values(), strict=True):
                output = Path(fresh, library.name)
                command = [zig, "cc", "-target", triple, *processor.split(), *_FLAGS.split(), source, "-o", output]
                cache = str(root / "build" / f"zig-{_ZIG}-cache")
                caches = {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
                done = run([*map(str, command), *linked_with.split()], caches, folder, _BUILD_S)
                if done.returncode:
                    raise UserError(
                        f"The kernels could not be built. The compiler says: {done.stderr.strip()[-1500:]}"
                    )
            for library in libraries:
                os.replace(Path(fresh, library.name), library)
        stamp.write_text(json.dumps([made_of, *map(file_digest, libraries)]), "utf-8")
    return libraries


def put_into_bin(target: str | None = None) -> None:
    """Put the libraries for a system, by default this one, into the bin folder of this checkout, where library.py finds them."""
    place = checkout() / "bin"
    for library in build_if_changed(target or this_target()):
        old = place / library.name
        if old.is_file() and file_digest(old) == file_digest(library):
            continue
        with tempfile.TemporaryDirectory(dir=place) as folder:
            try:
                os.replace(shutil.copy2(library, folder), old)
            except PermissionError as e:
                raise UserError(
                    f"{old} cannot be replaced ({e.strerror}). End every running petals-win, then try again."
                ) from e


def find_zig(root: Path) -> Path:
    """An installed Zig of the same version, or else the one that the package index has, kept in build/: complete or not at all."""
    installed = shutil.which("zig")
    if installed and run([installed, "version"], {}, root, 60).stdout.strip() == _ZIG:
        return Path(installed)
    folder = root / "build" / f"zig-{_ZIG}"
    zig = folder / "ziglang" / ("zig.exe" if sys.platform == "win32" else "zig")
    if not zig.is_file():
        logger.info("Fetching the compiler Zig %s (100 MB)", _ZIG)
        advice = "It compiles the kernels. Check the network, then try again."
        fetch_package("ziglang", _ZIG, folder, [f"ziglang/{zig.name}"], advice)
    return zig


def _is_built(libraries: list[Path], stamp: Path, made_of: str) -> bool:
    try:
        return json.loads(stamp.read_text("utf-8")) == [made_of, *map(file_digest, libraries)]
    except (OSError, ValueError):
        return False
