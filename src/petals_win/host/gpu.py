"""NVIDIA GPUs of this PC and what their driver can do, told without torch.

Knows nvidia-smi, which comes with the driver. Does not know which torch is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

_SECONDS = 20


@dataclass(frozen=True)
class NvidiaGpu:
    """One card; bytes of its memory."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class NvidiaDriver:
    """The driver, the newest CUDA that it can run, and the cards."""

    version: str
    cuda: tuple[int, int]
    gpus: tuple[NvidiaGpu, ...]


def find_nvidia() -> NvidiaDriver | None:
    """The driver with its cards, None where there is none. Raises OSError when the driver is there but does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None and sys.platform == "win32":
        beside_the_system = os.path.join(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32", "nvidia-smi.exe")
        program = beside_the_system if os.path.isfile(beside_the_system) else None
    if program is None:
        return None
    cards = _ask(program, "--query-gpu=driver_version,memory.total,memory.free,name", "--format=csv,noheader,nounits")
    return read_answers(_ask(program), cards)


def read_answers(overview: str, cards: str) -> NvidiaDriver | None:
    """Read what nvidia-smi prints: without arguments, and the query for driver_version, memory.total, memory.free, name in MiB."""
    gpus, version = [], ""
    for line in cards.splitlines():
        if found := re.match(r"\s*([\d.]+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(.+?)\s*$", line):
            version = found[1]
            gpus.append(NvidiaGpu(found[4], int(found[2]) * 2**20, int(found[3]) * 2**20))
    if not gpus:
        return None
    cuda = re.search(r"CUDA(?: UMD)? Version:\s*(\d+)\.(\d+)", overview)
    return NvidiaDriver(version, (int(cuda[1]), int(cuda[2])) if cuda else (0, 0), tuple(gpus))


def _ask(program: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired as e:
        raise OSError(f"nvidia-smi did not answer within {_SECONDS} s") from e
    said = done.stdout.decode("utf-8", "replace")
    if done.returncode != 0:
        raise OSError((said + done.stderr.decode("utf-8", "replace")).strip().splitlines()[0][:200])
    return said
