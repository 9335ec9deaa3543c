"""A head that is plain for one answer and packed for several computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from petals_win.client import head as head_module
from petals_win.client.head import fast_head
from petals_win.span import layouts
from petals_win.span.packed_linear import PackedLinear, packed_if_possible

packs = isinstance(packed_if_possible(nn.Linear(8, 8).requires_grad_(False)), PackedLinear)


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    monkeypatch.setattr("petals_win.span.native.kernels", lambda: None)


@pytest.fixture
def plain() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 300, bias=False).requires_grad_(False)


@pytest.fixture
def tied(plain) -> nn.Embedding:
    embedding = nn.Embedding(300, 48)
    embedding.weight = plain.weight
    return embedding


def decide(monkeypatch, *, for_one: bool, for_several: bool) -> None:
    monkeypatch.setattr(head_module, "fastest_layout", lambda *weight: "packed" if for_one else "by rows")
    monkeypatch.setattr(layouts, "fastest_layout", lambda *weight: "packed" if for_one else "by columns")
    monkeypatch.setattr(head_module, "_faster", lambda one, other, weight: for_several)


def test_as_it_was_measured(monkeypatch, plain, tied):
    decide(monkeypatch, for_one=False, for_several=False)
    assert fast_head(plain, tied) is plain
    decide(monkeypatch, for_one=True, for_several=False)
    assert isinstance(fast_head(plain, tied), PackedLinear) == packs
    decide(monkeypatch, for_one=False, for_several=True)
    own = fast_head(copy.deepcopy(plain), nn.Embedding(300, 48))
    assert type(own) is nn.Linear and own.weight.stride() == (
        1,
        300,
    ), "it has a weight of its own, which is there once"
    both = fast_head(plain, tied)
    assert (both is not plain) == packs
    other = nn.Identity()
    assert fast_head(other, tied) is other


def test_the_same_for_any_number_of_rows(monkeypatch, plain, tied):
    decide(monkeypatch, for_one=False, for_several=True)
    head = fast_head(plain, tied)
    for rows in (1, 3, 4, 16):
        inputs = torch.randn(rows, 1, 48)
        assert torch.allclose(head(inputs), plain(inputs), atol=1e-6)
    assert torch.equal(head.weight, plain.weight)
    inputs = torch.randn(6, 1, 48, requires_grad=True)
    (mine,) = torch.autograd.grad(head(inputs).sum(), inputs)
    (theirs,) = torch.autograd.grad(plain(inputs).sum(), inputs)
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_it_is_measured(plain):
    assert isinstance(head_module._faster(plain, plain, plain.weight), bool)
