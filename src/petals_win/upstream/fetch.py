"""Upstream's wheels from the package index into a cache keyed by their hashes. Knows pip; not what is inside a wheel."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from petals_win.errors import UserError
from petals_win.host import folders
from petals_win.upstream.lock import Pin

logger = logging.getLogger(__name__)

_DEADLINE_S = 900


def cache_folder() -> Path:
    """Where wheels stay between builds, for all checkouts of this user."""
    return folders.cache_folder() / "upstream"


def fetch(pin: Pin, cache: Path) -> Path:
    """The verified wheel in `cache`; asks the network only if it is not there. Raises UserError if it cannot be had."""
    folder = cache / pin.sha256
    wheel = folder / pin.filename
    if wheel.is_file() and _sha256(wheel) == pin.sha256:
        return wheel
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("Fetching %s %s (%.1f MB)", pin.name, pin.version, pin.bytes / 1e6)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        _download(pin, Path(temporary), wheel)
        got = Path(temporary) / pin.filename
        if not got.is_file() or _sha256(got) != pin.sha256:
            raise UserError(
                f"What pip downloaded for {pin.name} {pin.version} is not the pinned file {pin.filename}. "
                "Check the package index that pip is set to use."
            )
        os.replace(got, wheel)  # a build that runs at the same time puts the same bytes there
    return wheel


def _download(pin: Pin, folder: Path, wheel: Path) -> None:
    """Let pip choose the pinned wheel, whatever system and Python this is: only its platform-neutral part is used."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{sys.executable} has no pip, which fetches {pin.name}. Run: {sys.executable} -m ensurepip --upgrade"
        )
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{pin.name}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--no-deps",
    ]
    command += [
        "--only-binary",
        ":all:",
        "--platform",
        "manylinux2014_x86_64",
        "--implementation",
        "py",
        "--abi",
        "none",
    ]
    command += ["--require-hashes", "--dest", str(folder), "--requirement", str(requirement)]
    advice = f"Check the network and pip's settings, or put the file {pin.filename} into {wheel.parent} yourself."
    try:
        pip = subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=_DEADLINE_S
        )
    except subprocess.TimeoutExpired as e:
        raise UserError(f"pip did not fetch {pin.name} {pin.version} within {_DEADLINE_S} s. {advice}") from e
    if pip.returncode:
        errors = [line.strip() for line in pip.stderr.splitlines() if line.startswith("ERROR")] or [pip.stderr.strip()]
        raise UserError(f"pip could not fetch {pin.name} {pin.version}: {errors[0]}. {advice}")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
