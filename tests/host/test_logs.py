"""Log files: bounded, and one for each process."""

import logging
import subprocess
import sys

import pytest

from petals_win.host import logs
from petals_win.host.logs import log_to_file

OTHER = """
import logging, sys
from petals_win.host.logs import log_to_file
print(log_to_file("node"), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PETALS_WIN_HOME", str(tmp_path))
    before = list(logging.getLogger().handlers)
    yield tmp_path / "logs"
    for handler in [handler for handler in logging.getLogger().handlers if handler not in before]:
        logging.getLogger().removeHandler(handler)
        handler.close()
    if logs._lock is not None:
        logs._lock.release()


def test_lines_of_any_language_are_in_the_file(folder):
    path = log_to_file("node")
    assert path == folder / "node.log"
    logging.getLogger("a.b").warning("Größe ≈ 12 €, half a pair \ud800")
    assert "a.b: Größe ≈ 12 €, half a pair ?" in path.read_text("utf-8")


def test_the_size_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(logs, "_BYTES", 10_000)
    log_to_file("node")
    for number in range(1000):
        logging.getLogger("a.b").warning("line %d of a node that talks", number)
    files = sorted(path.name for path in folder.glob("node.log*"))
    assert files == ["node.log", "node.log.1", "node.log.2"]
    assert sum(path.stat().st_size for path in folder.glob("node.log*")) <= 3 * 10_000
    assert "line 999" in (folder / "node.log").read_text("utf-8")


def test_a_second_process_has_a_file_of_its_own(folder):
    with subprocess.Popen(
        [sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == str(folder / "node.log")
        assert log_to_file("node") == folder / "node-2.log"
        other.kill()
    logs._lock.release()
    assert log_to_file("node") == folder / "node.log", "the name is free again"
