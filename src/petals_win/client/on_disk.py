"""Tensors that are kept in a temporary file, since they are rarely wanted again.

Knows tensors and files. The file has no name that others could open, and is gone with the last of its tensors, or with the process.
"""

from __future__ import annotations

import tempfile
import weakref
from typing import IO

import torch


class TensorFile:
    """A temporary file that tensors are added to. Not for several threads."""

    def __init__(self) -> None:
        """Raises OSError where the system lets no file be made."""
        self._file: IO[bytes] = tempfile.TemporaryFile(buffering=0)
        weakref.finalize(self, self._file.close)  # with the last tensor

    def add(self, tensor: torch.Tensor) -> TensorOnDisk:
        """Write a tensor of the CPU behind the others. Raises OSError, as for a full disk; the others are as they were then."""
        begin = self._file.seek(0, 2)
        content = tensor.contiguous().view(torch.uint8).numpy().data.cast("B")
        while content:  # a file without a buffer may take less at once
            content = content[self._file.write(content) :]
        return TensorOnDisk(self, begin, tensor.shape, tensor.dtype)

    def read(self, begin: int, nbytes: int) -> bytearray:
        """Raises OSError if they are not all there."""
        content = bytearray(nbytes)
        left = memoryview(content)
        self._file.seek(begin)
        while left:
            count = self._file.readinto(left)  # pyright: ignore[reportAttributeAccessIssue]
            if not count:
                raise OSError("A temporary file is shorter than what was written to it")
            left = left[count:]
        return content


class TensorOnDisk:
    """One tensor of a TensorFile."""

    def __init__(self, file: TensorFile, begin: int, shape: torch.Size, dtype: torch.dtype) -> None:
        self._file, self._begin = file, begin
        self.shape, self.dtype = shape, dtype

    def load(self) -> torch.Tensor:
        """The tensor, anew at each call. Raises OSError."""
        content = self._file.read(self._begin, self.shape.numel() * self.dtype.itemsize)
        return torch.frombuffer(content, dtype=self.dtype).view(self.shape)
