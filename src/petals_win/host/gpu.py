"""NVIDIA GPUs of this PC and what their driver can do, told by nvidia-smi, which comes with the driver.

Needs the standard library alone, and no slow part of it: scripts/bootstrap.py asks before anything is installed, and at each
start whether there is a driver. Does not know torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

from petals_win.errors import UserError

_SECONDS = 20  # for each question; a card that has been asleep takes a few
_FIELDS = ("driver_version", "memory.total", "memory.free", "compute_cap", "name")  # the name last: it may have commas
_FIELDS_OF_OLD_DRIVERS = tuple(field for field in _FIELDS if field != "compute_cap")
_NEWEST_DRIVER = "Install the newest driver from NVIDIA, then restart the PC."

# What nvidia-smi says, what that means, and what to do.
_TROUBLES = (
    (
        r"version mismatch",
        "The NVIDIA driver was updated while it was in use, and its parts do not fit together until the next start of the PC",
        "Restart the PC.",
    ),
    (
        r"GPU is lost|fallen off the bus|device handle|requires reset|unknown error",
        "An NVIDIA card has stopped answering its driver",
        "Restart the PC; if that does not help, look at the card's power and seat.",
    ),
    (
        r"no devices were found",
        "The NVIDIA driver is installed, but finds no card: it is switched off, as laptops do to save power, or not plugged in",
        "Switch it on in the settings of the PC's maker or in the BIOS, then restart the PC.",
    ),
    (
        r"has failed|couldn't communicate|driver is not loaded|not running",
        "The NVIDIA driver does not run: it is damaged, or the card is switched off, as laptops do to save power",
        f"Switch the card on, if it is off. {_NEWEST_DRIVER}",
    ),
    (
        r"insufficient permissions",
        "The NVIDIA driver does not tell this user about its cards",
        "Ask whoever administers this PC.",
    ),
)


# Where an NVIDIA driver for Windows is told not to lend RAM to a program that finds no memory left on the card.
_SPILLING = '"CUDA - Sysmem Fallback Policy"'
NO_SPILLING = f'In the NVIDIA Control Panel, under "Manage 3D settings", set {_SPILLING} to "Prefer No Sysmem Fallback", then start petals-win again.'


class GpuError(UserError):
    """There is an NVIDIA driver, but it does not tell what it has: why, and what to do."""


class NvidiaGpu(NamedTuple):
    """One card; bytes of its memory, None where it has none of its own or does not tell.

    `capability` is the compute capability, such as (8, 6), None if the driver is too old to tell.
    """

    name: str
    total_bytes: int | None
    free_bytes: int | None
    capability: tuple[int, int] | None = None


class NvidiaDriver(NamedTuple):
    """The driver, the newest CUDA that it can run ((0, 0) if it does not tell), and its cards, of which there is at least one."""

    version: str
    cuda: tuple[int, int]
    gpus: tuple[NvidiaGpu, ...]


def may_spill() -> bool:
    """Whether a driver of this system lends RAM, many times slower, when a card has no memory left, instead of saying so."""
    return sys.platform == "win32"


def about_spilling() -> str:
    """What to do if a card has become slow."""
    if not may_spill():
        return "Look what else uses the card, and whether it is too hot."
    return f"The card's memory may be full, so that the driver uses RAM: close other programs. {NO_SPILLING}"


def find_nvidia_smi() -> str | None:
    """Path of nvidia-smi, None where there is no NVIDIA driver. Starts no program."""
    return shutil.which("nvidia-smi") or next(filter(os.path.isfile, _places(sys.platform)), None)


def has_nvidia() -> bool:
    """Whether there is an NVIDIA driver, whatever its state."""
    return find_nvidia_smi() is not None or os.path.exists("/proc/driver/nvidia")


def find_nvidia() -> NvidiaDriver | None:
    """The driver with its cards, None where there is none. Raises GpuError if there is one that does not answer as it should."""
    program = find_nvidia_smi()
    if program is None:
        return None
    overview = _ask(program)
    fields = _FIELDS
    cards = _query(program, fields)
    if "not a valid field" in cards.lower():
        fields = _FIELDS_OF_OLD_DRIVERS
        cards = _query(program, fields)
    # Its exit status does not matter: with a warning it is not 0 either.
    driver = read_answers(overview, cards, fields)
    if driver is None:
        raise GpuError(_explain(f"{cards}\n{overview}"))
    return driver


def read_answers(overview: str, cards: str, fields: tuple[str, ...] = _FIELDS) -> NvidiaDriver | None:
    """Read what nvidia-smi prints: without arguments, and the query for `fields`, memory in MiB. None if it tells of no card."""
    rows = [row for line in cards.splitlines() if (row := _row(line, fields)) is not None]
    if not rows:
        return None
    version = next(filter(None, (_found(r"[\d.]+", row["driver_version"]) for row in rows)), None)
    if version is None:  # "KMD" is the part in the system's kernel
        shown = re.search(r"(?:Driver|KMD) Version\s*:\s*([\d.]+)", overview)
        version = shown[1] if shown else "of unknown version"
    # "CUDA Version", since drivers of 2026 "CUDA UMD Version".
    cuda = re.search(r"CUDA(?: \w+)* Version\s*:\s*(\d+)\.(\d+)", overview)
    return NvidiaDriver(version, (int(cuda[1]), int(cuda[2])) if cuda else (0, 0), tuple(map(_gpu, rows)))


def _places(platform: str) -> Iterator[str]:
    """Where nvidia-smi may lie off the PATH."""
    if platform == "win32":
        yield os.path.join(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32", "nvidia-smi.exe")
        programs = os.environ.get("PROGRAMW6432") or os.environ.get("PROGRAMFILES", r"C:\Program Files")
        yield os.path.join(programs, "NVIDIA Corporation", "NVSMI", "nvidia-smi.exe")  # older drivers
    elif platform == "linux":
        yield "/usr/lib/wsl/lib/nvidia-smi"


def _row(line: str, fields: tuple[str, ...]) -> dict[str, str] | None:
    """A card by the names of its fields; None for a line that is about something else, or a card that is lost."""
    values = [value.strip() for value in line.split(",", len(fields) - 1)]
    if len(values) < len(fields):
        return None
    row = dict(zip(fields, values, strict=True))
    plain = all(re.fullmatch(r"[\d.]+|\[.+\]|N/A", value) for field, value in row.items() if field != "name")
    return row if plain and re.fullmatch(r"[^\[].*", row["name"]) else None


def _gpu(row: dict[str, str]) -> NvidiaGpu:
    total, free = (_found(r"\d+", row[f"memory.{which}"]) for which in ("total", "free"))
    capability = _found(r"\d+\.\d+", row.get("compute_cap", ""))
    major, _, minor = (capability or "").partition(".")
    return NvidiaGpu(
        row["name"],
        int(total) * 2**20 if total else None,
        int(free) * 2**20 if free else None,
        (int(major), int(minor)) if capability else None,
    )


def _found(pattern: str, value: str) -> str | None:
    return value if re.fullmatch(pattern, value) else None


def _explain(said: str) -> str:
    """What is wrong and what to do, from what nvidia-smi printed instead of cards."""
    for pattern, meaning, advice in _TROUBLES:
        if re.search(pattern, said, re.IGNORECASE):
            return f"{meaning}. {advice}"
    first = next((line.strip()[:200].rstrip(".") for line in said.splitlines() if line.strip()), "nothing")
    return f"nvidia-smi does not tell which cards there are; it says: {first}. {_NEWEST_DRIVER}"


def _query(program: str, fields: tuple[str, ...]) -> str:
    return _ask(program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")


def _ask(program: str, *arguments: str) -> str:
    try:
        process = subprocess.Popen(
            [program, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as e:
        raise GpuError(f"{program} cannot be started: {e.strerror or e}. {_NEWEST_DRIVER}") from e
    try:
        return process.communicate(timeout=_SECONDS)[0].decode("utf-8", "replace")
    except subprocess.TimeoutExpired as e:
        process.kill()  # and not waited for: what hangs in a driver does not end even so
        raise GpuError(
            f"nvidia-smi did not answer within {_SECONDS} s: the NVIDIA driver hangs. Restart the PC; if that does not help, "
            "install the newest driver from NVIDIA."
        ) from e
