"""What pip would install on Windows: for each Python a wheel of everything, so that nobody needs a compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("uv", reason="uv, which resolves for another system than this one, is not installed")

ROOT = Path(__file__).resolve().parents[2]
# What exists as a source only, of pure Python: pip makes a wheel of it without a compiler, see below.
SOURCES = ("python-baseconv", "varint")


def resolve(minor: int) -> str:
    """Every package with its version, one a line."""
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        str(ROOT / "pyproject.toml"),
        "--no-annotate",
        "--no-header",
    ]
    command += [
        "--python-platform",
        "x86_64-pc-windows-msvc",
        "--python-version",
        f"3.{minor}",
        "--only-binary",
        ":all:",
    ]
    command += [word for name in SOURCES for word in ("--no-binary", name)]
    command += [word for extra in ("jobs", "quant", "speed", "test") for word in ("--extra", extra)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("minor", [11, 12, 13])
def test_windows_needs_no_compiler(minor):
    packages = resolve(minor)
    names = re.findall(r"^([\w.-]+)==", packages, re.MULTILINE)
    assert {"torch", "transformers", "bitsandbytes", "winloop"} <= set(names)
    assert "uvloop" not in names, "it was resolved for Windows, not for this system"
    assert set(SOURCES) <= set(names), "a package that is not needed any more leaves SOURCES"


@pytest.mark.parametrize("name", SOURCES)
def test_sources_are_pure_python(name, tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-binary", name]
    subprocess.run([*command, "--no-cache-dir", "--wheel-dir", str(tmp_path), name], check=True, timeout=120)
    (wheel,) = tmp_path.iterdir()
    assert wheel.name.endswith("-none-any.whl")
