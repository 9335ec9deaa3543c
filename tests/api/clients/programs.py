"""Client programs that are not made of this project's Python: installed into build/, by lock files that lie here, and run.

LiteLLM and `llm` have an environment of their own, since they bring 270 MB along (boto3 and tokenizers among them) whose versions must
not decide over ours. What is installed once is kept until its lock file changes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
INSTALLED = HERE.parents[2] / "build" / "clients"
SECONDS = 240
NODE = 20  # the oldest version that the packages run on


def node(script: str, url: str, model: str, questions: dict[str, str]) -> dict[str, Any]:
    """What a script of this folder reads of the API, run by Node.js."""
    folder = node_packages()
    shutil.copy(HERE / script, folder)  # a module is looked for beside the script that imports it
    return _read(["node", folder / script, url, model], questions)


def python(script: str, url: str, model: str, questions: dict[str, str]) -> dict[str, Any]:
    """What a script of this folder reads of the API, run where LiteLLM is installed."""
    # LiteLLM would fetch a table of prices from the internet at each start.
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return _read([_python_packages() / "python", "-I", HERE / script, url, model], questions, environment)


def llm(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command `llm`, whose settings are in `folder`."""
    return _run([_python_packages() / "llm", *arguments], {"LLM_USER_PATH": str(folder)})


def _read(command: list[Any], questions: dict[str, str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    done = _run(command, environment or {}, json.dumps(questions))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _run(command: list[Any], environment: dict[str, str], said: str = "") -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment = {**outside, "PYTHONUTF8": "1", **environment}
    return subprocess.run(command, input=said, env=environment, capture_output=True, encoding="utf-8", timeout=SECONDS)


def node_packages() -> Path:
    """The folder where scripts find their packages; skips the test where Node.js is missing."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: Node.js is missing (Debian: the packages nodejs and npm)")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, timeout=SECONDS).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < NODE:
        pytest.skip(f"Node.js {version} is too old: the clients need {NODE}")
    folder = INSTALLED / "javascript"
    lock = (HERE / "package-lock.json").read_text("utf-8")
    done = folder / "installed"
    if not done.is_file() or done.read_text("utf-8") != lock:
        folder.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, folder)
        npm = shutil.which("npm") or "npm"  # npm.cmd on Windows
        _install([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], folder)
        done.write_text(lock, "utf-8")
    return folder


def _python_packages() -> Path:
    """The folder of programs of their environment."""
    folder = INSTALLED / "python"
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    lock = (HERE / "requirements.txt").read_text("utf-8")
    done = folder / "installed"
    if not done.is_file() or done.read_text("utf-8") != lock:
        INSTALLED.mkdir(parents=True, exist_ok=True)
        uv = [sys.executable, "-m", "uv"]
        _install([*uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], INSTALLED)
        _install([*uv, "pip", "install", "--quiet", "--python", folder, "-r", HERE / "requirements.txt"], INSTALLED)
        done.write_text(lock, "utf-8")
    return programs


def _install(command: list[Any], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", timeout=SECONDS)
    assert done.returncode == 0, f"{' '.join(map(str, command))} failed:\n{done.stderr[-4000:]}"
