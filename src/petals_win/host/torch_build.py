"""Which of PyTorch's builds suits this PC: what the driver can run, and for which cards a build has kernels.

Needs the standard library alone, as scripts/bootstrap.py does. Does not know which build is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from petals_win.host.gpu import GpuError, NvidiaDriver, NvidiaGpu, find_nvidia, has_nvidia

Version = tuple[int, int]


@dataclass(frozen=True)
class TorchBuild:
    """A build for one CUDA, and the compute capabilities, from the oldest to the newest, that it has kernels for."""

    cuda: Version
    oldest: Version
    newest: Version

    @property
    def name(self) -> str:
        """Of its folder at PyTorch's own index."""
        return f"cu{self.cuda[0]}{self.cuda[1]}"

    def suits(self, gpu: NvidiaGpu) -> bool:
        """A card that does not tell its capability has a driver too old for most builds; it gets the benefit of the doubt."""
        return gpu.capability is None or self.oldest <= gpu.capability <= self.newest


_LATER = "After that, 'petals-win doctor' tells how to use the GPU."
_ANY_NEWER = (99, 0)
# For Windows and Linux on x86-64, the newest first, by "PyTorch CUDA Support Matrix" in PyTorch's RELEASE.md. 12.6 has
# Maxwell (5.0) to Hopper (9.0); the others have Turing (7.5) to Blackwell (12.0). 12.8, which had the same as they, ended with
# torch 2.11, and 12.6 ends with 2.14, which stays at the index.
BUILDS = (
    TorchBuild((13, 2), (7, 5), _ANY_NEWER),
    TorchBuild((13, 0), (7, 5), _ANY_NEWER),
    TorchBuild((12, 6), (5, 0), (9, 0)),
)
_OLDEST_CARD = min(build.oldest for build in BUILDS)


@dataclass(frozen=True)
class TorchChoice:
    """Names of builds at PyTorch's own index, the best first; none: take what the package index has. `why` is a sentence."""

    builds: tuple[str, ...]
    why: str


def choose_torch(platform: str = sys.platform) -> TorchChoice:
    """The builds that suit this PC, and why. Never raises: where the driver is out of order the sentence says so."""
    if platform not in ("win32", "linux"):
        return TorchChoice((), "torch: the package index's own build, the only one for this system.")
    if not has_nvidia():
        cpu = ("cpu",) if platform == "linux" else ()
        return TorchChoice(cpu, "torch: the build for CPUs, for there is no NVIDIA driver here (no nvidia-smi).")
    trouble, driver = "", None
    try:
        driver = find_nvidia()
    except GpuError as e:
        trouble = f" {e} {_LATER}"
    if platform == "linux":
        newest = BUILDS[0].cuda[0]
        if driver is not None and not any(build.cuda[0] == newest for build in builds_for(driver)):
            trouble = f" It needs CUDA {newest} and a newer card or driver than this PC has. {_LATER}"
        why = "torch: the package index's own build, which has CUDA, for there is an NVIDIA driver."
        return TorchChoice((), why + trouble)
    if driver is None:
        return TorchChoice((), f"torch: the build for CPUs.{trouble}")
    suiting = builds_for(driver)
    if not suiting:
        return TorchChoice((), f"torch: the build for CPUs. {why_none(driver)}")
    first = suiting[0]
    names = ", ".join(gpu.name for gpu in driver.gpus if first.suits(gpu))
    left_out = ", ".join(gpu.name for gpu in driver.gpus if not first.suits(gpu))
    why = (
        f"torch: the build for CUDA {shown(first.cuda)}, for {names} with a driver that runs CUDA {shown(driver.cuda)}"
    )
    return TorchChoice(
        tuple(build.name for build in suiting), why + (f"; it cannot use {left_out}." if left_out else ".")
    )


def builds_for(driver: NvidiaDriver) -> list[TorchBuild]:
    """The builds that this driver runs for its cards, the best first: for the most memory of cards, then the newest CUDA."""
    running = [build for build in BUILDS if build.cuda <= driver.cuda and any(map(build.suits, driver.gpus))]

    def reach(build: TorchBuild) -> tuple[int, int]:
        suited = [gpu for gpu in driver.gpus if build.suits(gpu)]
        return sum(gpu.total_bytes or 0 for gpu in suited), len(suited)

    return sorted(running, key=reach, reverse=True)


def why_none(driver: NvidiaDriver) -> str:
    """Why `builds_for` finds none, and what to do."""
    names = ", ".join(gpu.name for gpu in driver.gpus)
    if all(gpu.capability is not None and gpu.capability < _OLDEST_CARD for gpu in driver.gpus):
        oldest = shown(_OLDEST_CARD)
        return f"{names} is too old for it: torch needs a compute capability of {oldest} or more. Serve with the CPU."
    needed = min(build.cuda for build in BUILDS if any(map(build.suits, driver.gpus)))
    runs = f"runs CUDA {shown(driver.cuda)}" if driver.cuda > (0, 0) else "does not tell which CUDA it runs"
    return (
        f"The driver {driver.version} of {names} {runs}, but torch needs {shown(needed)} or newer there. "
        f"Install the newest driver from NVIDIA, then restart the PC. {_LATER}"
    )


def shown(version: Sequence[int]) -> str:
    """12.6 for (12, 6)."""
    return ".".join(map(str, version))
