"""A full disk, as each system reports it, is told in a sentence."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys

import pytest

from petals_win.host import logs
from petals_win.host.disk import explain_full_disk


def windows_error(number: int) -> OSError:
    error = OSError(errno.EIO, "There is not enough space on the disk", "D:\\models\\part")
    error.winerror = number  # which other systems' OSError does not set by itself
    return error


def wrapped(cause: BaseException) -> RuntimeError:
    try:
        raise RuntimeError("the file could not be written") from cause
    except RuntimeError as e:
        return e


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "error", [FULL, OSError(errno.EDQUOT, "Quota"), windows_error(112), windows_error(39), wrapped(FULL)]
)
def test_a_full_disk(error):
    assert "is full" in (explain_full_disk(error) or "")


def test_it_names_the_file():
    assert "/data/model" in (explain_full_disk(OSError(errno.ENOSPC, "No space", "/data/model")) or "")


@pytest.mark.parametrize("error", [None, ValueError("x"), OSError(errno.EACCES, "Denied"), wrapped(ValueError("x"))])
def test_anything_else_is_none(error):
    assert explain_full_disk(error) is None


def test_a_log_file_that_cannot_be_written_is_given_up_with_one_line(tmp_path, caplog, capsys):
    handler = logs._File(tmp_path / "x.log")
    handler.stream.close()
    handler.stream = open(os.devnull)  # noqa: SIM115  (writing to it raises OSError)
    log = logging.getLogger("petals_win.test")
    log.addHandler(handler)
    try:
        with caplog.at_level(logging.WARNING, "petals_win"):
            log.warning("one")
            log.warning("two")
    finally:
        log.removeHandler(handler)
        handler.close()
    assert sum("cannot be written" in message for message in caplog.messages) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("unshare"), reason="mounts a file system"
)
@pytest.mark.parametrize(
    "command", [["up", "--check"], ["serve", "--model", "SmolLM2-135M-Instruct", "--blocks", "0:1"]]
)
@pytest.mark.parametrize("variable", ["HOME", "PETALS_WIN_HOME"])
def test_a_full_home(tmp_path, command, variable):
    full = f'mount -t tmpfs -o size=64k tmpfs "{tmp_path}" && head -c 1M /dev/zero > "{tmp_path}/fill"; exec "$@"'
    home = {"HOME": str(tmp_path), variable: str(tmp_path)}
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PETALS_WIN_HOME", "XDG_CACHE_HOME")
    }
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", full, "sh", sys.executable, "-m", "petals_win.cli.main", *command],
        env=environment | home,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    assert done.returncode == 1, done.stderr
    assert "petals-win: The disk" in done.stderr and "is full" in done.stderr and "Traceback" not in done.stderr
