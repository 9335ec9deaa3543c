"""Where this user's files belong on this system.

Knows the four kinds of folder, makes them on demand, and writes files that nobody else may read. Does not know what is put
into them. PETALS_WIN_HOME, if set, holds all four.
"""

import os
import stat
import sys
import tempfile
from pathlib import Path

import platformdirs

from petals_win.errors import UserError

_DIRS = platformdirs.PlatformDirs("petals-win", appauthor=False)


def cache_folder() -> Path:
    """What can be fetched or computed again: wheels, models, measurements."""
    return _made(_home("cache") or _DIRS.user_cache_path)


def data_folder() -> Path:
    """What must not be lost: identities, keys."""
    return _made(_home("data") or _DIRS.user_data_path)


def logs_folder() -> Path:
    """Logs of nodes and of the API."""
    return _made(_home("logs") or _DIRS.user_log_path)


def run_folder() -> Path:
    """Locks and local sockets of running processes; nobody but this user can look inside.

    Raises UserError when somebody else made the folder first.
    """
    home = _home("run")
    if home is not None:
        return private_folder(home)
    if sys.platform == "win32":
        return _made(_DIRS.user_runtime_path)
    # Not platformdirs' fall-back, whose parent in the temporary folder could belong to somebody else.
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nonexistent")
    if runtime.is_dir() and runtime.stat().st_uid == os.getuid():
        return private_folder(runtime / "petals-win")
    return private_folder(Path(tempfile.gettempdir()) / f"petals-win-{os.getuid()}")


def private_folder(folder: Path) -> Path:
    """Make a folder that is this user's alone. On Windows that is the default inside the user's profile."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if sys.platform != "win32":
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise UserError(
                f"{folder} is not a folder of this user, so sockets in it could be read by somebody else. "
                "Delete it, or set PETALS_WIN_HOME to a folder of your own."
            )
        if stat.S_IMODE(found.st_mode) != 0o700:
            folder.chmod(0o700)
    return folder


def write_private(file: Path, content: bytes) -> None:
    """Write a file that this user alone can read, as a whole or not at all. Raises OSError."""
    unfinished = file.with_name(file.name + ".part")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    with os.fdopen(descriptor, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(unfinished, file)


def _home(kind: str) -> Path | None:
    home = os.environ.get("PETALS_WIN_HOME")
    return Path(home).expanduser().absolute() / kind if home else None


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"The folder {folder} cannot be made: {e.strerror}. Set PETALS_WIN_HOME to a folder that you can write to."
        ) from e
    return folder
