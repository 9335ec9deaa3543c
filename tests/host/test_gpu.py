"""What nvidia-smi prints, read. There is no NVIDIA card here: made up after what drivers of several years print."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from petals_win.host import gpu
from petals_win.host.gpu import GpuError, NvidiaGpu, find_nvidia, find_nvidia_smi, read_answers

OVERVIEW = """
+---------------------------------------------------------------------------+
| NVIDIA-SMI 566.36       Driver Version: 566.36       CUDA Version: 12.7   |
+---------------------------------------------------------------------------+
"""
OVERVIEW_2026 = "| NVIDIA-SMI 610.57       KMD Version: 610.57       CUDA UMD Version: 13.3     |"
CARDS = (
    "566.36, 12288, 11037, 8.6, NVIDIA GeForce RTX 3060\n566.36, 24576, 24000, 8.9, NVIDIA GeForce RTX 4090, special\n"
)
OLD_CARDS = "470.10, 6144, 5120, GeForce GTX 1060\n"
MIB = 2**20


def test_cards_driver_and_cuda():
    driver = read_answers(OVERVIEW, CARDS)
    assert (driver.version, driver.cuda) == ("566.36", (12, 7))
    assert driver.gpus == (
        NvidiaGpu("NVIDIA GeForce RTX 3060", 12288 * MIB, 11037 * MIB, (8, 6)),
        NvidiaGpu("NVIDIA GeForce RTX 4090, special", 24576 * MIB, 24000 * MIB, (8, 9)),
    )


@pytest.mark.parametrize(
    ("line", "cuda"),
    [
        (OVERVIEW, (12, 7)),
        (OVERVIEW_2026, (13, 3)),
        ("CUDA Version                              : 13.0", (13, 0)),
        ("| CUDA Version: N/A |", (0, 0)),
        ("", (0, 0)),
    ],
)
def test_the_cuda_of_a_driver(line, cuda):
    assert read_answers(line, CARDS).cuda == cuda


def test_a_driver_without_cards_is_none():
    assert read_answers(OVERVIEW, "No devices were found\n") is None


def test_an_integrated_board_has_no_memory_of_its_own():
    (board,) = read_answers(OVERVIEW_2026, "[N/A], [N/A], [N/A], 12.1, NVIDIA GB10").gpus
    assert board == NvidiaGpu("NVIDIA GB10", None, None, (12, 1))
    assert read_answers(OVERVIEW_2026, "[N/A], [N/A], [N/A], 12.1, NVIDIA GB10").version == "610.57"


@pytest.mark.parametrize(
    "noise",
    [
        "WARNING: infoROM is corrupted at gpu 0000:01:00.0",
        "  MIG 1g.10gb     Device  0: (UUID: MIG-made-up)",
        "[GPU is lost], [GPU is lost], [GPU is lost], [GPU is lost], [GPU is lost]",
        "Hinweis: Gr\ufffd\ufffde, Takt, Spannung, Leistung, unbekannt",
        "",
    ],
)
def test_what_is_no_card_is_passed_over(noise):
    assert read_answers(OVERVIEW, f"{noise}\n{CARDS}{noise}\n") == read_answers(OVERVIEW, CARDS)


class Driver:
    """Puts a program on the PATH that answers as nvidia-smi."""

    def __init__(self, folder: Path):
        self.program = folder / "nvidia-smi"

    def answers(self, overview: str = OVERVIEW, cards: str = CARDS, status: int = 0, code: str = "") -> None:
        lines = [f"#!{sys.executable}", "import sys, time", code]
        lines.append(
            f"sys.stdout.buffer.write(({cards!r} if sys.argv[1:] else {overview!r}).encode('latin-1', 'replace'))"
        )
        self.program.write_text("\n".join([*lines, f"sys.exit({status})\n"]))
        self.program.chmod(0o755)


@pytest.fixture
def driver(tmp_path, monkeypatch) -> Driver:
    if sys.platform == "win32":
        pytest.skip("a script cannot stand in for nvidia-smi.exe")
    monkeypatch.setenv("PATH", str(tmp_path))
    return Driver(tmp_path)


def test_the_program_is_asked(driver):
    driver.answers()
    assert find_nvidia() == read_answers(OVERVIEW, CARDS)
    driver.program.unlink()
    assert find_nvidia() is None


def test_a_warning_is_no_failure(driver):
    driver.answers(cards=f"{CARDS}WARNING: infoROM is corrupted\n", status=14)
    assert len(find_nvidia().gpus) == 2


def test_an_old_driver_does_not_know_compute_capabilities(driver):
    unknown = (
        "if 'compute_cap' in ' '.join(sys.argv): sys.exit('Field \"compute_cap\" is not a valid field to query.')"
    )
    driver.answers(OVERVIEW.replace("12.7", "11.4"), OLD_CARDS, code=unknown)
    found = find_nvidia()
    assert found.cuda == (11, 4) and found.version == "470.10"
    assert found.gpus == (NvidiaGpu("GeForce GTX 1060", 6144 * MIB, 5120 * MIB, None),)


@pytest.mark.parametrize(
    ("said", "meaning", "advice"),
    [
        (
            "Failed to initialize NVML: Driver/library version mismatch",
            "updated while it was in use",
            "Restart the PC.",
        ),
        ("NVIDIA-SMI has failed because it couldn't communicate with the driver.", "does not run", "newest driver"),
        ("No devices were found", "finds no card: it is switched off", "Switch it on"),
        ("Unable to determine the device handle for GPU 0000:01:00.0: GPU is lost.", "stopped answering", "Restart"),
        ("Failed to initialize NVML: Insufficient Permissions", "does not tell this user", "administers"),
        ("Zugriff verweigert \xfc\xe4", "it says: Zugriff verweigert", "newest driver"),
        ("", "it says: nothing", "newest driver"),
    ],
)
def test_a_driver_that_is_out_of_order(driver, said, meaning, advice):
    driver.answers(said, said, status=9)
    with pytest.raises(GpuError) as raised:
        find_nvidia()
    assert meaning in str(raised.value) and advice in str(raised.value) and "\n" not in str(raised.value)


def test_a_driver_that_hangs(driver, monkeypatch):
    driver.answers(code="time.sleep(60)")
    monkeypatch.setattr(gpu, "_SECONDS", 0.5)
    with pytest.raises(GpuError, match="did not answer within 0.5 s: the NVIDIA driver hangs. Restart the PC"):
        find_nvidia()


def test_a_program_that_cannot_be_started(driver):
    driver.program.write_bytes(b"\0\1 no program")
    driver.program.chmod(0o755)
    with pytest.raises(GpuError, match="nvidia-smi cannot be started"):
        find_nvidia()


@pytest.mark.parametrize("folder", ["Windows/System32", "Programs/NVIDIA Corporation/NVSMI"])
def test_nvidia_smi_off_the_path_on_windows(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    monkeypatch.setenv("SYSTEMROOT", str(tmp_path / "Windows"))
    monkeypatch.setenv("PROGRAMW6432", str(tmp_path / "Programs"))
    assert find_nvidia_smi() is None
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "nvidia-smi.exe").touch()
    assert find_nvidia_smi() == str(tmp_path / folder / "nvidia-smi.exe")
