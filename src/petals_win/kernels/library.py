"""The compiled kernels: which file this processor takes, and the structures that they read.

Knows C's view of a step. Does not know models or torch's modules; src/kernels/blocks.c says what is computed.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import threading
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, ClassVar

import torch

import petals_win
from petals_win.daemon.build import this_target

logger = logging.getLogger(__name__)

MOST_ROWS = 16
STAGES = 6  # of a block
FLOAT32, BFLOAT16, INT4, INT8 = range(4)  # how weights lie in memory
GROUP, PANEL = 32, 16  # in INT4 and INT8: inputs that share a scale, and outputs that lie side by side

_SAME_PLACE = 512  # floats; rows that are multiples of them apart share places of caches

# By torch's names of what a processor of AMD's or Intel's can do. Others than these and ARM's compute by torch alone.
_VARIANTS = {"AVX512": "avx512", "AVX2": "avx2"}
_ENDINGS = {"win32": ".dll", "darwin": ".dylib"}


class Linear(Structure):
    """A layer's weight [outputs, inputs] of a kind, and its bias [outputs] in float32 or NULL."""

    _fields_: ClassVar[Any] = [
        *((name, c_void_p) for name in ("weight", "bias")),
        *((name, c_int64) for name in ("outputs", "inputs", "kind")),
    ]


class Block(Structure):
    """A block's weights and settings. Norms, in float32, of queries and keys are NULL where there are none. kept: the kind of what sessions hold."""

    _fields_: ClassVar[Any] = [
        *((name, Linear) for name in ("queries", "keys", "values", "out", "gate", "up", "down")),
        *((name, c_void_p) for name in ("norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, c_float) for name in ("eps", "mlp_eps", "query_eps", "key_eps", "scale")),
        *((name, c_int32) for name in ("query_heads", "key_heads", "size", "turns", "kept")),
    ]


class Held(Structure):
    """Where a session keeps keys and values of a block, [heads, slots, size] each, of its tokens from `first` on."""

    _fields_: ClassVar[Any] = [
        ("keys", c_void_p),
        ("values", c_void_p),
        *((name, c_int64) for name in ("slots", "first", "window", "chunked")),
    ]


class Row(Structure):
    """A token: where a Held for each block begins, its position, and where in the rotary tables it is found."""

    _fields_: ClassVar[Any] = [("held", c_void_p), ("position", c_int64), ("angle", c_int64)]


class Step(Structure):
    """A step of some rows through some blocks, a layer behind them, or both: addresses, of what the caller keeps alive."""

    _fields_: ClassVar[Any] = [
        *((name, c_void_p) for name in ("blocks", "rows", "cosines", "sines", "hidden", "work", "head", "outputs")),
        *((name, c_int64) for name in ("first", "count", "row_count", "width", "turning", "threads")),
        *((name, c_int64) for name in ("wanted", "came", "inside")),
        ("next", c_void_p),
        ("stages", c_void_p),
    ]


class Kernels:
    """The loaded library, and threads that help with its steps."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._step, self._help, self._floats = library.petals_step, library.petals_help, library.petals_step_floats
        self._step.argtypes, self._help.argtypes = [POINTER(Step)], []
        self._step.restype = self._help.restype = None
        self._floats.argtypes, self._floats.restype = [POINTER(Block), c_int64, c_int64, c_int64], c_int64
        self._unpack = library.petals_unpack
        self._unpack.argtypes, self._unpack.restype = [c_void_p, c_int, c_int64, c_int64, c_void_p, c_int], None
        self._quantize = library.petals_quantize
        self._quantize.restype = c_int
        self._quantize.argtypes = [c_void_p, c_int, c_int64, c_int64, c_int64, c_void_p, c_void_p]
        self._many_floats = library.petals_many_floats
        self._many_floats.argtypes, self._many_floats.restype = [c_int64], c_int64
        self._helpers = 0

    def linear(self, layer: Linear, inputs: torch.Tensor) -> torch.Tensor:
        """Of rows [rows, inputs] in float32."""
        rows, threads = len(inputs), torch.get_num_threads()
        inputs = _apart(inputs) if rows > MOST_ROWS and layer.inputs % _SAME_PLACE == 0 else inputs.contiguous()
        outputs, stages = torch.empty(rows, layer.outputs), (c_int32 * 2)()
        if not rows:
            return outputs
        work = torch.empty(rows * (layer.inputs // GROUP) if rows <= MOST_ROWS else self._many_floats(threads))
        step = Step(
            hidden=inputs.data_ptr(),
            work=work.data_ptr(),
            head=ctypes.addressof(layer),
            outputs=outputs.data_ptr(),
            row_count=rows,
            width=inputs.stride(0),
            threads=threads,
            stages=ctypes.addressof(stages),
        )
        self.run(step)
        return outputs

    def floats(self, block: Block, rows: int, width: int, threads: int) -> int:
        """How many floats of memory a step of so many rows [width] needs for its work on a block, with so many threads."""
        return self._floats(block, rows, width, threads)

    def unpack(self, panels: torch.Tensor, kind: int, to: torch.Tensor) -> None:
        """Of a weight of a kind, panels [count, groups, bytes], its columns [groups x GROUP, count x PANEL] in float32 or bfloat16."""
        into = FLOAT32 if to.dtype is torch.float32 else BFLOAT16
        self._unpack(panels.data_ptr(), kind, *panels.shape[:2], to.data_ptr(), into)

    def quantize(self, weight: torch.Tensor, panels: torch.Tensor) -> bool:
        """Fill panels [count, groups, bytes] of INT4 from rows [rows, columns] in float32 or bfloat16, and zeros for those that lack, by this thread alone.

        Holds no lock of Python's meanwhile. Returns whether all values are numbers that can be kept so.
        """
        weight, scratch = weight.contiguous(), torch.empty(self._many_floats(1))
        kind = FLOAT32 if weight.dtype is torch.float32 else BFLOAT16
        return bool(
            self._quantize(weight.data_ptr(), kind, *weight.shape, len(panels), panels.data_ptr(), scratch.data_ptr())
        )

    def run(self, step: Step) -> None:
        """Compute a step, with the help of `step.threads` - 1 threads as far as they come. Holds no lock of Python's meanwhile."""
        while self._helpers < step.threads - 1:
            self._helpers += 1
            # It never comes back to Python, whose lock it would have to wait for in every step.
            threading.Thread(target=self._help, name="kernels", daemon=True).start()
        self._step(step)


def _apart(inputs: torch.Tensor) -> torch.Tensor:
    """The same rows, a little farther apart: else all would meet in the same few places of the processor's nearest memory."""
    return torch.nn.functional.pad(inputs, (0, GROUP))[:, : inputs.shape[1]]


def variant() -> str | None:
    """Which kernels this processor takes: avx2, avx512 or arm64; None if there are none for it."""
    if this_target().endswith("/arm64"):
        return "arm64"
    return _VARIANTS.get(torch.backends.cpu.get_cpu_capability())


@functools.cache
def kernels() -> Kernels | None:
    """The kernels for this processor; None if there are none, or they cannot be loaded."""
    name = variant()
    if name is None:
        return None
    path = _folder() / f"blocks-{name}{_ENDINGS.get(sys.platform, '.so')}"
    try:
        return Kernels(path)
    except OSError as e:
        logger.warning("Blocks are computed by torch alone, which takes longer: the kernels cannot be loaded (%s)", e)
        return None


def _folder() -> Path:
    """Of the installed package's own libraries, or else the bin folder of this checkout."""
    packaged = Path(petals_win.__file__).parent / "kernels" / "bin"
    return packaged if packaged.is_dir() else Path(petals_win.__file__).resolve().parents[2] / "bin"
