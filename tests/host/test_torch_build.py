"""Which build of torch a PC gets: by made-up drivers and cards, since there is none here."""

from __future__ import annotations

import os
import sys

import pytest

from petals_win.host import torch_build
from petals_win.host.gpu import GpuError, NvidiaDriver, NvidiaGpu
from petals_win.host.torch_build import choose_torch

GIB = 2**30
PASCAL = NvidiaGpu("GTX 1080", 8 * GIB, 7 * GIB, (6, 1))
AMPERE = NvidiaGpu("RTX 3060", 12 * GIB, 11 * GIB, (8, 6))
BLACKWELL = NvidiaGpu("RTX 5090", 32 * GIB, 30 * GIB, (12, 0))
KEPLER = NvidiaGpu("GT 710", 2 * GIB, 2 * GIB, (3, 5))
OLD = NvidiaGpu("GTX 1060", 6 * GIB, 5 * GIB, None)


@pytest.fixture
def pc(monkeypatch):
    """A PC with this driver, or with what finding it raises."""

    def make(found: NvidiaDriver | GpuError | None, platform: str = "win32"):
        def find():
            if isinstance(found, GpuError):
                raise found
            return found

        monkeypatch.setattr(torch_build, "has_nvidia", lambda: found is not None)
        monkeypatch.setattr(torch_build, "find_nvidia", find)
        return choose_torch(platform)

    return make


def driver(cuda: tuple[int, int], *gpus: NvidiaGpu) -> NvidiaDriver:
    return NvidiaDriver("999.99", cuda, gpus)


@pytest.mark.parametrize(
    ("cuda", "gpus", "builds"),
    [
        ((13, 3), [AMPERE], ("cu132", "cu130", "cu126")),
        ((13, 0), [AMPERE], ("cu130", "cu126")),
        ((12, 8), [AMPERE], ("cu126",)),
        ((13, 3), [BLACKWELL], ("cu132", "cu130")),
        ((13, 0), [PASCAL], ("cu126",)),
        ((12, 6), [OLD], ("cu126",)),
        ((13, 2), [PASCAL, AMPERE], ("cu126", "cu132", "cu130")),
        ((13, 2), [PASCAL, BLACKWELL], ("cu132", "cu130", "cu126")),
    ],
)
def test_builds_by_driver_and_cards(pc, cuda, gpus, builds):
    choice = pc(driver(cuda, *gpus))
    assert choice.builds == builds and choice.why.startswith("torch: the build for CUDA ")


@pytest.mark.skipif(sys.platform == "win32", reason="a script cannot stand in for nvidia-smi.exe")
def test_a_driver_of_2026_gets_cuda(tmp_path, monkeypatch):
    """From the program to the choice: its overview has "CUDA UMD Version" where older ones have "CUDA Version"."""
    overview = "| NVIDIA-SMI 610.57  KMD Version: 610.57  CUDA UMD Version: 13.3 |"
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n[ $# = 0 ] && echo '{overview}' || echo '610.57, 24576, 24000, 8.9, RTX 4090'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    choice = choose_torch("win32")
    assert choice.builds[0] == "cu132"
    assert choice.why == "torch: the build for CUDA 13.2, for RTX 4090 with a driver that runs CUDA 13.3."


def test_a_card_that_is_left_out_is_named(pc):
    assert "for RTX 5090 with" in pc(driver((13, 2), PASCAL, BLACKWELL)).why
    assert "it cannot use GTX 1080" in pc(driver((13, 2), PASCAL, BLACKWELL)).why


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, ["no NVIDIA driver here"]),
        (GpuError("The driver hangs. Restart the PC."), ["The driver hangs. Restart the PC.", "doctor"]),
        (driver((11, 4), OLD), ["GTX 1060 runs CUDA 11.4", "12.6 or newer", "newest driver"]),
        (driver((12, 8), BLACKWELL), ["RTX 5090 runs CUDA 12.8", "13.0 or newer", "newest driver"]),
        (driver((11, 4), KEPLER), ["GT 710 is too old", "5.0 or more"]),
        (driver((0, 0), AMPERE), ["does not tell which CUDA", "newest driver"]),
    ],
)
def test_a_build_for_cpus_is_never_silent(pc, found, words):
    choice = pc(found)
    assert choice.builds == () and choice.why.startswith("torch: the build for CPUs")
    assert all(word in choice.why for word in words) and "\n" not in choice.why


def test_linux(pc):
    assert pc(None, "linux").builds == ("cpu",)
    ready = pc(driver((13, 2), AMPERE), "linux")
    assert ready.builds == () and ready.why.endswith("which has CUDA, for there is an NVIDIA driver.")
    assert "doctor" in pc(driver((13, 0), PASCAL), "linux").why
    assert "doctor" in pc(driver((12, 8), AMPERE), "linux").why
    assert "Restart" in pc(GpuError("It hangs. Restart the PC."), "linux").why


def test_macos(pc):
    assert pc(None, "darwin").builds == ()
