"""The Go side of p2pd, checked by Go's own tools: vet, the unit tests under the race detector, and the fuzz targets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from petals_win.daemon.build import GO_FLAGS, find_go

pytestmark = pytest.mark.wine_lacks("what pip asks of the certificate store, so that Go cannot be fetched")

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "p2pd"
INPUTS = 50_000  # for each target: a number, since in a time a busy PC tries but few
FUZZ_TARGETS = re.findall(r"^func (Fuzz\w+)\(", (SOURCE / "fuzz_test.go").read_text("utf-8"), re.MULTILINE)


def go(*arguments: str, cgo: bool = False, timeout_s: float = 1500) -> str:
    """Run Go in the module, with exactly what go.mod and go.sum name; fails with all that Go says."""
    fixed = {
        "GOFLAGS": GO_FLAGS,
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
        "CGO_ENABLED": "1" if cgo else "0",
    }
    done = subprocess.run(
        [find_go(ROOT), *arguments],
        cwd=SOURCE,
        env={**os.environ, **fixed},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=timeout_s,
    )
    if done.returncode:
        pytest.fail(f"go {' '.join(arguments)} says:\n{done.stdout[-20000:]}", pytrace=False)
    return done.stdout


@pytest.mark.timeout(900)
def test_vet_and_format_are_clean() -> None:
    go("vet", "./...", timeout_s=800)
    gofmt = Path(find_go(ROOT)).with_name("gofmt.exe" if os.name == "nt" else "gofmt")
    files = [str(file) for file in SOURCE.glob("*.go")]
    found = subprocess.run([str(gofmt), "-l", *files], capture_output=True, text=True, timeout=60, check=True).stdout
    assert found == "", "gofmt would change these files"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_unit_tests_pass_under_the_race_detector() -> None:
    compiler = shutil.which("gcc") or shutil.which("clang")
    race = ["-race"] if compiler else []
    assert "ok" in go("test", *race, "-count=1", "-timeout=600s", "./...", cgo=bool(race), timeout_s=1700)
    if not race:
        pytest.skip("they pass; the race detector was not used: it needs gcc or clang, and neither is on the PATH")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fuzzing_finds_nothing(tmp_path: Path) -> None:
    program = tmp_path / "p2pd.test"
    # What -fuzz adds, to this module alone: it would compile all of libp2p anew, to find its way through that, too.
    go("test", "-c", "-gcflags=-d=libfuzzer", "-o", str(program), ".")

    def fuzz(target: str) -> subprocess.CompletedProcess[str]:
        options = ["-test.run=^$", f"-test.fuzz=^{target}$", f"-test.fuzztime={INPUTS}x", "-test.parallel=1"]
        options.append(f"-test.fuzzcachedir={tmp_path / target}")
        command = [program, *options]
        to_log = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.run(command, cwd=SOURCE, text=True, timeout=300, **to_log)

    with ThreadPoolExecutor() as at_once:
        for target, done in zip(FUZZ_TARGETS, at_once.map(fuzz, FUZZ_TARGETS), strict=True):
            assert done.returncode == 0, f"{target}:\n{done.stdout}"
            rounds = re.findall(r"execs: (\d+)", done.stdout)
            assert rounds and int(rounds[-1]) >= INPUTS, f"less was tried:\n{done.stdout}"
            led = re.findall(r"new interesting: (\d+)", done.stdout)
            assert int(led[-1]) > 0, f"it was not led by what an input reaches:\n{done.stdout}"


def test_the_fuzz_targets_are_found() -> None:
    assert {"FuzzControl", "FuzzPersistent", "FuzzWire"} <= set(FUZZ_TARGETS)
