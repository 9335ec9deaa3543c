"""Statements 20 and 50 of the conformance checklist: hivemind as upstream publishes it, over our daemon and upstream's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from petals_win.errors import UserError
from petals_win.upstream.build import this_checkout

PROGRAM = Path(__file__).with_name("hivemind_program.py")


@pytest.fixture(scope="module")
def hivemind_as_published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import its P2P from."""
    if sys.platform == "win32":
        pytest.skip("hivemind as published does not run on Windows: it needs Unix sockets")
    folder = tmp_path_factory.mktemp("published")
    try:
        files = this_checkout().upstream_files()
    except UserError as e:
        pytest.skip(f"upstream's wheels cannot be had: {e}")
    for name, content in files.items():
        if name.startswith(("hivemind/p2p/", "hivemind/proto/", "hivemind/utils/", "hivemind/hivemind_cli/")):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    # Without its own, which imports all of hivemind, with packages that the distribution does not need.
    (folder / "hivemind" / "__init__.py").write_text("")
    return folder


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param("our_program", "our_program", id="ours alone"),
        pytest.param("our_program", "reference_program", id="upstream's joins ours"),
        pytest.param("reference_program", "our_program", id="ours joins upstream's"),
        pytest.param("reference_program", "reference_program", id="upstream's alone"),
    ],
)
def test_20_50_hivemind_over(
    first: str, second: str, hivemind_as_published: Path, request: pytest.FixtureRequest
) -> None:
    place = hivemind_as_published / "hivemind" / "hivemind_cli" / "p2pd"
    programs = [request.getfixturevalue(name) for name in (first, second)]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(place), *programs],
        env={**os.environ, "PYTHONPATH": str(hivemind_as_published)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0 and "everything was answered" in done.stdout, done.stdout + done.stderr
