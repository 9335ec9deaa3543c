"""This PC without its network: Python, torch and the GPU, bitsandbytes, memory, disk, long paths.

Knows what petals-win needs of each. Does not know models.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from petals_win.doctor.findings import Asked, Finding, finding_of
from petals_win.host.folders import cache_folder
from petals_win.host.gpu import NO_SPILLING, GpuError, NvidiaDriver, find_nvidia, may_spill
from petals_win.host.torch_build import BUILDS, builds_for, shown, why_none

_GIB = 2**30
_PYTHONS = ((3, 11), (3, 13))
_LITTLE_RAM, _LITTLE_DISK, _NO_DISK = 4 * _GIB, 20 * _GIB, 2 * _GIB
_LITTLE_OF_A_CARD = 0.5
_TORCH_INDEX = "https://download.pytorch.org/whl"
_DRIVER_FIX = "Install the newest driver from NVIDIA, then restart the PC."


def check_python(_asked: Asked) -> Iterator[Finding]:
    text = f"Python {sys.version.split()[0]}, {64 if sys.maxsize > 2**32 else 32} bits"
    right = _PYTHONS[0] <= sys.version_info[:2] <= _PYTHONS[1] and sys.maxsize > 2**32
    yield (
        Finding("ok", text)
        if right
        else Finding(
            "error", text, "Install a 64-bit Python 3.11 to 3.13 from python.org, then install petals-win again."
        )
    )


def check_torch(_asked: Asked) -> Iterator[Finding]:
    """Whether torch computes on this PC, and on its GPUs if it has some."""
    import torch

    version = torch.__version__
    driver, trouble = None, None
    try:
        driver = find_nvidia()
    except GpuError as e:
        trouble = finding_of(e, "warning")
        yield trouble
    computing = 0
    for number in range(torch.cuda.device_count()):
        try:
            torch.zeros(1, device=f"cuda:{number}").add_(1).item()
            computing += 1
        except RuntimeError as e:
            text = f"torch {version} cannot compute on cuda:{number}: {str(e).strip().splitlines()[0]}"
            yield Finding("error", text, f"{_other_torch(driver)} Until then, serve with --device cpu.")
    if computing or not torch.cuda.is_available():
        yield (
            Finding("ok", f"torch {version} computes on the CPU until then")
            if trouble and not computing
            else judge_torch(version, torch.version.cuda, computing > 0, driver)
        )


def judge_torch(version: str, cuda: str | None, computes: bool, driver: NvidiaDriver | None) -> Finding:
    """What a build of torch (for CUDA `cuda`, None: for CPUs) means on a PC with this driver."""
    if computes:
        cards = ", ".join(gpu.name for gpu in driver.gpus) if driver else "a GPU"
        return Finding("ok", f"torch {version} computes on {cards}")
    if driver is None:
        return Finding("ok", f"torch {version} computes on the CPU: no NVIDIA GPU was found")
    names = " and the ".join(gpu.name for gpu in driver.gpus)
    if cuda is None:
        text = f"torch {version} is built for CPUs only: the {names} would idle"
        return Finding("warning", text, _other_torch(driver))
    runs = f"does {shown(driver.cuda)}" if driver.cuda > (0, 0) else "does not tell what it does"
    text = f"torch {version} does not find the {names}: it wants CUDA {cuda}, the driver {driver.version} {runs}"
    major, minor = map(int, cuda.split(".")[:2])
    if (major, minor) <= driver.cuda:
        return Finding("warning", text, f"Look whether CUDA_VISIBLE_DEVICES hides it. Else: {_DRIVER_FIX}")
    would_do = any(build.cuda == (major, minor) and any(map(build.suits, driver.gpus)) for build in BUILDS)
    return Finding("warning", text, _DRIVER_FIX if would_do else _other_torch(driver))


def _other_torch(driver: NvidiaDriver | None) -> str:
    """How to get a torch that uses the cards of this driver."""
    if driver is None:
        return _DRIVER_FIX
    suiting = builds_for(driver)
    if not suiting:
        return why_none(driver)
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    return f"Type: {python} -m pip install --force-reinstall torch --index-url {_TORCH_INDEX}/{suiting[0].name}"


def check_gpu_memory(_asked: Asked) -> Iterator[Finding]:
    """What is free on each card, and what its driver does when nothing is; nothing to say where there is none."""
    import torch

    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        text = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB are free on cuda:{number}"
        yield (
            Finding("warning", text, "Close other programs that use the card before you serve.")
            if free < _LITTLE_OF_A_CARD * total
            else Finding("ok", text)
        )
    if torch.cuda.device_count() and may_spill():
        yield Finding("ok", f"if steps become many times slower, the driver uses RAM for the card. {NO_SPILLING}")


def check_kernels(_asked: Asked) -> Iterator[Finding]:
    """Whether there are kernels of ours for this processor."""
    from petals_win.kernels.library import kernels, variant  # it imports torch

    name = variant()
    if name is None:
        yield Finding("ok", "there are no kernels for this processor: torch computes alone")
    elif kernels() is None:
        text = f"the kernels for {name} cannot be loaded: torch computes alone, which takes longer"
        yield Finding("warning", text, "Reinstall petals-win; the log says why.")
    else:
        yield Finding("ok", f"kernels for {name}")


def check_bitsandbytes(_asked: Asked) -> Iterator[Finding]:
    """Whether weights can be kept in nf4 and int8; the newer cards have int4 without it."""
    try:
        version = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        import torch

        from petals_win.span.choices import lacks_bitsandbytes

        cards = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
        text = "bitsandbytes is not installed: there is no --quant nf4 or int8"
        yield (
            Finding("warning", text, "For twice as many blocks on this card type: python -m pip install bitsandbytes")
            if any(lacks_bitsandbytes(card) for card in cards)
            else Finding("ok", text)
        )
        return
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]
    except Exception as e:  # it loads a library that was made for one CUDA, and fails in many ways
        text = f"bitsandbytes {version} cannot be loaded: {(str(e).strip() or type(e).__name__).splitlines()[0]}"
        yield Finding(
            "warning", text, "Type: python -m pip install --upgrade bitsandbytes, or serve with --quant none."
        )
        return
    yield Finding("ok", f"bitsandbytes {version}")


def check_memory(_asked: Asked) -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    text = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB of RAM are free"
    yield (
        Finding("warning", text, "Close other programs before you serve.")
        if memory.available < _LITTLE_RAM
        else Finding("ok", text)
    )


def check_disk(_asked: Asked) -> Iterator[Finding]:
    """Room for models, in the Hugging Face cache and in our own."""
    from huggingface_hub import constants

    folders = {"Hugging Face models": Path(constants.HF_HUB_CACHE), "petals-win's cache": cache_folder()}
    for what, folder in folders.items():
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        text = f"{free / _GIB:.0f} GiB are free for {what} in {folder}"
        variable = "HF_HOME" if what.startswith("Hugging") else "PETALS_WIN_HOME"
        fix = f"Make room there, or set {variable} to a folder on another disk."
        yield (
            Finding("error", text, fix)
            if free < _NO_DISK
            else (Finding("warning", text, fix) if free < _LITTLE_DISK else Finding("ok", text))
        )


def check_long_paths(_asked: Asked) -> Iterator[Finding]:
    """Windows cuts paths at 260 characters unless told otherwise; names in the Hugging Face cache are long."""
    if sys.platform != "win32":
        return
    import winreg

    path = r"SYSTEM\CurrentControlSet\Control\FileSystem"
    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path) as key:
            enabled = winreg.QueryValueEx(key, "LongPathsEnabled")[0] == 1
    except OSError:
        enabled = False
    if enabled:
        yield Finding("ok", "Paths may be longer than 260 characters")
    else:
        yield Finding(
            "warning",
            "Paths longer than 260 characters are not allowed: a model's files may not fit below a long folder name",
            f"In PowerShell (Admin) type: Set-ItemProperty HKLM:\\{path} LongPathsEnabled 1",
        )
