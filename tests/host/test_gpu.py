"""What nvidia-smi prints, read: written down from real cards, since there is none here."""

import sys

import pytest

from petals_win.host import gpu
from petals_win.host.gpu import NvidiaGpu, find_nvidia, read_answers

OVERVIEW = """
Mon Mar  3 12:00:00 2025
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 566.36                 Driver Version: 566.36         CUDA Version: 12.7     |
|-----------------------------------------+------------------------+----------------------+
"""
CARDS = "566.36, 12288, 11037, NVIDIA GeForce RTX 3060\n566.36, 24576, 24000, NVIDIA GeForce RTX 4090, special\n"


def test_cards_driver_and_cuda():
    driver = read_answers(OVERVIEW, CARDS)
    assert (driver.version, driver.cuda) == ("566.36", (12, 7))
    assert driver.gpus == (
        NvidiaGpu("NVIDIA GeForce RTX 3060", 12288 * 2**20, 11037 * 2**20),
        NvidiaGpu("NVIDIA GeForce RTX 4090, special", 24576 * 2**20, 24000 * 2**20),
    )


def test_a_driver_without_cards_is_none():
    assert read_answers(OVERVIEW, "No devices were found\n") is None


def test_an_unknown_cuda_is_no_cuda():
    assert read_answers("| CUDA Version: N/A |", CARDS).cuda == (0, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="a script cannot stand in for nvidia-smi.exe")
def test_the_program_is_asked(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nimport sys\nprint({CARDS!r} if sys.argv[1:] else {OVERVIEW!r})\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_nvidia().gpus[0].total_bytes == 12 * 2**30
    program.write_text(
        f"#!{sys.executable}\nprint('Failed to initialize NVML: Driver mismatch')\nraise SystemExit(18)\n"
    )
    with pytest.raises(OSError, match="Failed to initialize NVML"):
        find_nvidia()
    program.write_text(f"#!{sys.executable}\nimport time; time.sleep(60)\n")
    monkeypatch.setattr(gpu, "_SECONDS", 0.5)
    with pytest.raises(OSError, match="did not answer"):
        find_nvidia()
    program.unlink()
    assert find_nvidia() is None
