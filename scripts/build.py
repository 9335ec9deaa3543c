"""Builds the sdist and the wheels of a release, each wheel with its p2pd and its kernels. Run by scripts/build, in .venv.

The same source gives the same bytes. Usage: build [--output FOLDER] [TARGET …], such as windows/amd64; all without one.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from petals_win.daemon.build import program_name, wheel_tag
from petals_win.kernels.build import library_names

ROOT = Path(__file__).resolve().parents[1]
# Where torch has wheels: none for Macs with Intel's processors any more, and for Windows on ARM not all that we need.
TARGETS = ("windows/amd64", "linux/amd64", "linux/arm64", "darwin/arm64")


def hatch(kind: str, folder: Path, target: str = "") -> Path:
    """Build an sdist or a wheel into `folder`."""
    before = set(folder.iterdir())
    environment = {**os.environ, "PETALS_WIN_TARGET": target}
    # Dates in archives are hatchling's own fixed one, whatever this says.
    environment.pop("SOURCE_DATE_EPOCH", None)
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )
    if done.returncode != 0:
        sys.exit(f"The {kind} could not be built:\n{done.stdout[-3000:]}")
    (built,) = set(folder.iterdir()) - before
    return built


def check_wheel(wheel: Path, target: str) -> None:
    """It is tagged for its system, and holds the programs of that system and no other."""
    with zipfile.ZipFile(wheel) as archive:
        programs = [
            name
            for name in archive.namelist()
            if name.startswith(("petals_win/daemon/bin/", "petals_win/kernels/bin/"))
        ]
    wanted = [
        f"petals_win/daemon/bin/{program_name(target)}",
        *(f"petals_win/kernels/bin/{name}" for name in library_names(target)),
    ]
    if not wheel.name.endswith(f"-{wheel_tag(target)}.whl") or sorted(programs) != wanted:
        sys.exit(f"{wheel} is no wheel for {target}: it holds {programs}.")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="build", description="Build the sdist and the wheels of a release.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)}; all of them by default")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder to build into; dist by default")
    options = parser.parse_args(arguments)
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"{folder} is not empty. Empty it, or choose another folder with --output.")
    for target in ("", *(options.targets or TARGETS)):
        began = time.monotonic()
        built = hatch("wheel" if target else "sdist", folder, target)
        if target:
            check_wheel(built, target)
        print(f"{built.name}: {built.stat().st_size / 1e6:.1f} MB, {time.monotonic() - began:.0f} s", flush=True)
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(sums), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
