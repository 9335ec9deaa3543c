"""Libraries that people build programs on, with the API in front of a scripted engine: chat, stream, a tool, an object.

Run by scripts/clients, in .venv. Each library is installed in its newest version into an environment of its own under build/, since they ask
for different versions of openai; Vercel's AI SDK in the newest version for Node.js 20. One line is printed for each, and the status is 1 if
one has failed. What each of them asks is in tests/api/clients/by_hand.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from api.serving import serving  # noqa: E402

INSTALLED = ROOT / "build" / "clients-by-hand"
CLIENTS = ROOT / "tests" / "api" / "clients" / "by_hand"
PACKAGES = {
    "langchain": ["langchain-openai"],
    "llamaindex": ["llama-index-llms-openai-like"],
    "pydantic_ai": ["pydantic-ai-slim[openai]"],
    "instructor": ["instructor"],
    "ai_sdk": ["ai@6", "@ai-sdk/openai-compatible@2", "zod@4"],
}
STEPS = ["chat", "stream", "tool", "object"]
SECONDS = 600


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", timeout=SECONDS)


def installed(name: str, folder: Path) -> list[str | Path]:
    """Install or update what a client needs; the command that runs it."""
    if name == "ai_sdk":
        npm = shutil.which("npm")
        if npm is None or shutil.which("node") is None:
            raise RuntimeError(
                "Node.js is missing. Get it from https://nodejs.org (Debian: sudo apt install nodejs npm)"
            )
        install = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", *PACKAGES[name]]
        commands, program = [install], ["node", shutil.copy(CLIENTS / "ai_sdk_client.mjs", folder)]
    else:
        uv = [sys.executable, "-m", "uv"]
        commands = [
            [*uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable, folder / "venv"],
            [*uv, "pip", "install", "--quiet", "--upgrade", "--python", folder / "venv", *PACKAGES[name]],
        ]
        python = "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
        program = [folder / "venv" / python, "-I", "-X", "utf8", CLIENTS / f"{name}_client.py"]
    for command in commands:
        done = run(command, folder)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return program


def verdict(name: str, url: str, model: str) -> str | None:
    """What a client could not do, or None."""
    folder = INSTALLED / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = run([*installed(name, folder), url, model], folder)
    except (RuntimeError, subprocess.TimeoutExpired) as e:
        return str(e)
    steps = done.stdout.split()
    if done.returncode == 0 and steps == STEPS:
        return None
    return f"after {', '.join(steps) or 'nothing'}:\n{done.stderr[-3000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/clients", description=__doc__.splitlines()[0])
    parser.add_argument("client", nargs="*", help=f"{', '.join(PACKAGES)} (default: all)")
    chosen = parser.parse_args().client or list(PACKAGES)
    if unknown := [name for name in chosen if name not in PACKAGES]:
        parser.error(f"There is no client {unknown[0]!r}. Choose from: {', '.join(PACKAGES)}.")
    failed = 0
    with serving() as served:
        for name in chosen:
            wrong = verdict(name, served.url, served.model)
            failed += wrong is not None
            print(f"{name}: {'ok, ' + ', '.join(STEPS) if wrong is None else 'failed ' + wrong}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
