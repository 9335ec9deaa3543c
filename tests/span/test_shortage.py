"""Memory that lacks in the middle: what is known as that, and that nothing of the attempt stays."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from petals_win.span import shortage
from petals_win.span.shortage import give_back, is_shortage


@pytest.mark.parametrize(
    ("error", "lacked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (torch.OutOfMemoryError(""), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
            True,
        ),
        (RuntimeError("The system has no 4096 bytes of memory left"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
        (None, False),
    ],
)
def test_what_lacked(error, lacked):
    assert is_shortage(error) == lacked


def attempt(error: Exception, held: list[weakref.ref]) -> None:
    activations = torch.zeros(100)
    held.append(weakref.ref(activations))
    raise error


def caught(error: Exception, held: list[weakref.ref]) -> Exception:
    """Raised while another one was on its way, as a step that is undone may be."""
    try:
        try:
            attempt(error, held)
        finally:
            attempt(RuntimeError("out of memory, again"), held)
    except RuntimeError as e:
        return e
    raise AssertionError


def test_what_the_attempt_held_is_freed_while_the_error_is_on_its_way():
    gc.disable()
    try:
        held: list[weakref.ref] = []
        error = caught(torch.OutOfMemoryError("CUDA out of memory."), held)
        assert [each() is None for each in held] == [False, False]
        give_back(error)
        assert [each() is None for each in held] == [True, True] and error.__traceback__ is not None
    finally:
        gc.enable()


def test_other_errors_keep_what_tells_of_them(monkeypatch):
    monkeypatch.setattr(shortage, "give_back_memory", lambda: pytest.fail("nothing lacks"))
    held: list[weakref.ref] = []
    try:
        attempt(RuntimeError("the cable is loose"), held)
    except RuntimeError as e:
        give_back(e)
        assert held[0]() is not None
