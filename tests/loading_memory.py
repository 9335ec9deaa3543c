"""What a process takes while it loads the blocks of a model, and keeps of it: measured in one of its own, from what a first block has left."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

LOADS = """
import sys, threading
import torch
from petals_win.host.memory import give_back_memory, own_bytes
from petals_win.models.source import open_model
from petals_win.span.needs import needs_of
from petals_win.span.span import Span

torch.set_num_threads(1)
path, dtype, quant = sys.argv[1:]
source = open_model(path)
dtype = getattr(torch, dtype) if dtype else source.dtype
# What comes into memory once.
Span.load(source, 0, 1, dtype=dtype, quant=quant).forward(torch.ones(1, 2, source.hidden_size), 0, 1)
give_back_memory()
most = before = own_bytes()
loaded = threading.Event()

def watch():
    global most
    while not loaded.wait(0.001):
        most = max(most, own_bytes())

watching = threading.Thread(target=watch)
watching.start()
span = Span.load(source, 1, source.num_blocks, dtype=dtype, quant=quant)
loaded.set()
watching.join()
give_back_memory()
planned = sum(needs_of(source.config, span.dtype, quant, source.in_few_bits).block_bytes[1:])
print(str(span.dtype).removeprefix("torch."), planned, span.weight_bytes, own_bytes() - before, most - before)
"""


@dataclass(frozen=True)
class Taken:
    """Bytes: what was planned, what the span says of its weights, and what the process kept and took at most, all of them without the first block."""

    dtype: str
    planned: int
    weights: int
    kept: int
    most: int

    def __str__(self) -> str:
        kept, most = self.kept / self.planned, self.most / self.planned
        return f"{self.dtype}: kept {kept:.3f} and took {most:.3f} of the {self.planned:,} bytes that were planned"


def taken_by_loading(path: Path, dtype: str = "", quant: str = "none") -> Taken:
    """All blocks of a model but the first, after that one. dtype: one of torch's names; default: the model's own."""
    command = [sys.executable, "-c", LOADS, str(path), dtype, quant]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kind, *figures = done.stdout.split()[-5:]
    return Taken(kind, *map(int, figures))
