"""What tests of several rooms need: checkpoints of small random models, made once each, a thread that computes, an empty home."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from petals_win.span.compute import ComputeThread

Checkpoint = Callable[..., Path]


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
