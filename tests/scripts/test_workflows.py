"""The workflows of hosted CI, by actionlint."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from petals_win.daemon.build import GO_FLAGS, find_go

ROOT = Path(__file__).resolve().parents[2]
ACTIONLINT = "github.com/rhysd/actionlint/cmd/actionlint@v1.7.12"


def test_workflows_are_sound():
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [file.name for file in files] == ["release.yml", "test.yml"]
    command = [find_go(ROOT), "run", ACTIONLINT, *map(str, files)]
    environment = {**os.environ, "GOTOOLCHAIN": "local", "GOWORK": "off", "CGO_ENABLED": "0"}
    environment["GOFLAGS"] = GO_FLAGS.replace("readonly", "mod")  # what p2pd has of Go's library is compiled already
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hosted_ci_runs_the_same_commands_as_any_pc():
    test = (ROOT / ".github" / "workflows" / "test.yml").read_text("utf-8")
    release = (ROOT / ".github" / "workflows" / "release.yml").read_text("utf-8")
    for command, text in ((r"scripts\test.cmd", test), ("scripts/test", test), ("scripts/build", release)):
        assert f"run: {command}\n" in text and (ROOT / command.replace("\\", "/")).is_file()
