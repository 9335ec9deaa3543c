"""The linear layers of transformers' models, whichever way round they keep their weight, and putting others in their place.

Knows modules. Does not know what takes their place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def linear_weight(layer: nn.Module) -> torch.Tensor | None:
    """The weight [out, in] of an nn.Linear or of GPT-2's Conv1D; None for any other module, subclasses included."""
    if type(layer) is nn.Linear:
        return layer.weight
    return layer.weight.t() if type(layer) is Conv1D else None


def replace_children(module: nn.Module, replacement: Callable[[nn.Module], nn.Module]) -> int:
    """Put `replacement(child)` in the place of each module below `module`, unless it is the child; returns how many were."""
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if (new := replacement(child)) is not child:
                setattr(parent, name, new)
                count += 1
    return count
