"""A disk that is full. Knows what each system calls it. Does not know who wanted to write."""

from __future__ import annotations

import errno
import os

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FULL_ON_WINDOWS = {39, 112}  # ERROR_HANDLE_DISK_FULL, ERROR_DISK_FULL


def explain_full_disk(error: BaseException | None) -> str | None:
    """A sentence for the user if a full disk is the error, or the cause of it; else None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and (
            error.errno in _FULL or getattr(error, "winerror", None) in _FULL_ON_WINDOWS
        ):
            where = f"holds {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
            where = (
                where or "petals-win's files are on (the one of your home folder, unless PETALS_WIN_HOME says another)"
            )
            return (
                f"The disk that {where} is full, or your share of it is used up. Make room there, or set PETALS_WIN_HOME "
                "(and HF_HOME for downloaded models) to a folder on another disk."
            )
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None
