"""Which p2pd runs.

Knows where to look for the program, in which order, and how to ask for its version. Does not start it as a daemon.
"""

import importlib.resources
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import petals_win
from petals_win.errors import UserError

NAME = "p2pd.exe" if sys.platform == "win32" else "p2pd"


@dataclass(frozen=True)
class Found:
    """A p2pd, and why it is this one."""

    path: Path
    why: str


def find_p2pd() -> Found:
    """The first of: PETALS_WIN_P2PD, the installed package's own, the checkout's bin folder, the PATH.

    Raises UserError when there is none, or when PETALS_WIN_P2PD names something that cannot be run.
    """
    chosen = os.environ.get("PETALS_WIN_P2PD")
    if chosen:
        path = Path(chosen).expanduser().absolute()
        if not _runs(path):
            raise UserError(
                f"PETALS_WIN_P2PD names {path}, which is not a program that can be run. "
                "Correct the variable, or unset it to use the p2pd of this distribution."
            )
        return Found(path, "PETALS_WIN_P2PD names it")
    # Installed packages are unpacked files here: torch alone rules a zipped installation out.
    packaged = Path(str(importlib.resources.files("petals_win.daemon"))) / "bin" / NAME
    if _runs(packaged):
        return Found(packaged, "it is part of the installed package")
    built = _checkout_folder() / NAME
    if _runs(built):
        return Found(built, "it is in the bin folder of this checkout")
    on_path = shutil.which(NAME)
    if on_path is not None:
        return Found(Path(on_path), "it is the first on the PATH")
    unmarked = [str(path) for path in (packaged, built) if path.is_file()]
    if unmarked:
        raise UserError(f"{unmarked[0]} is there but may not be run. Type: chmod +x {unmarked[0]}")
    raise UserError(
        f"The peer-to-peer daemon {NAME} is missing: it is neither in {packaged.parent}, nor in {built.parent}, nor on the "
        "PATH. Reinstall petals-win, or set PETALS_WIN_P2PD to the file."
    )


def version_of(path: Path) -> str:
    """What p2pd says of itself: its version, the commit of its source, its Go. Raises UserError if it cannot be run."""
    try:
        done = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=10
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise UserError(f"{path} cannot be run: {e}. Reinstall petals-win.") from e
    if done.returncode != 0:
        raise UserError(f"{path} does not tell its version, as upstream's p2pd does not.")
    return done.stdout.strip()


def _checkout_folder() -> Path:
    return Path(petals_win.__file__).resolve().parents[2] / "bin"


def _runs(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
