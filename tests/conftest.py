"""What tests of several rooms need: checkpoints of small random models, made once each, a thread that computes, an empty home."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import certifi
import pytest
from httpx._config import DEFAULT_TIMEOUT_CONFIG

if TYPE_CHECKING:
    import torch

    from petals_win.span.compute import ComputeThread
    from petals_win.swarm.local import LocalSwarm

Checkpoint = Callable[..., Path]
_lacking: Counter[tuple[str, str]] = Counter()


def pytest_deselected(items: list[pytest.Item]) -> None:
    if sys.platform == "win32":
        marks = [(item.path.name, mark) for item in items for mark in item.iter_markers("wine_lacks")]
        _lacking.update((file, mark.args[0]) for file, mark in marks)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What Wine lacks for some tests is told like what others were skipped for."""
    for (file, what), count in _lacking.items():
        terminalreporter.write_line(f"LACKING [{count}] {file}: {what}")


@pytest.fixture(scope="session", autouse=True)
def _one_certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The web's certificates: each client of httpx reads all of them, for 18 ms, and none here meets one. They have one now."""
    end = "-----END CERTIFICATE-----\n"
    file = tmp_path_factory.mktemp("web") / "certificates.pem"
    file.write_text(Path(certifi.where()).read_text("utf-8").partition(end)[0] + end, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certifi, "where", lambda: str(file))
        yield


@pytest.fixture(scope="session", autouse=True)
def _patience() -> Iterator[None]:
    """Whoever names no other time lets a server have a minute: with three parts of the tests at once httpx's 5 s may pass."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "read", "write", "pool"):
            patch.setattr(DEFAULT_TIMEOUT_CONFIG, name, 60.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Of torch: other tests compute at the same time. Whatever is run before a test, its sums have the same order."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def _the_same_by_chance() -> None:
    """What a test draws from torch is the same in each run. Not the number by which models are made, whose weights it would repeat."""
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(20)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Makes a folder with a model of a family; `shard_size` in bytes cuts it into several files. Not to be changed."""
    import torch  # here, since most rooms' tests start without it
    from span.families import random_model

    torch.set_num_threads(1)
    made: dict[object, Path] = {}

    def make(family: str, *, shard_size: int | None = None, dtype: torch.dtype = torch.float32, **changes) -> Path:
        key = (family, shard_size, dtype, repr(sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(family) / family
            random_model(family, **changes).to(dtype).save_pretrained(folder, max_shard_size=shard_size or "1GB")
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def swarm() -> Iterator[LocalSwarm]:
    """SmolLM2 in 32 bits on two nodes, blocks 0:15 and 15:30, for all tests that leave it as it is."""
    from petals_win.models.default_model import NAME as DEFAULT_MODEL
    from petals_win.swarm.local import LocalSwarm

    with LocalSwarm(DEFAULT_MODEL, ["0:15", "15:30"], options=["--quant", "none"]) as swarm:
        swarm.wait_until_serving()
        yield swarm


@pytest.fixture
def compute() -> Iterator[ComputeThread]:
    """A thread that computes, and ends with the test."""
    from petals_win.span.compute import ComputeThread

    thread = ComputeThread()
    thread.start()
    yield thread
    thread.stop()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for this user's files."""
    monkeypatch.setenv("PETALS_WIN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
