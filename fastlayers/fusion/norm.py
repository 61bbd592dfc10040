"""A residual and the normalisation of the sum: one pass over memory, with both results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._state import own
from ..ops.norm import add_layer_norm
from .plan import Pattern, Value

__all__ = ["PATTERNS"]


def _run(x: torch.Tensor, layers: Sequence[Any], values: Sequence[Value]) -> tuple[torch.Tensor, torch.Tensor]:
    add, norm = layers
    weight, bias = own(norm, "weight", type(norm)), own(norm, "bias", type(norm))
    both = None
    if not add.inplace:
        both = add_layer_norm(x, add.tensor, norm.normalized_shape, weight, bias, norm.eps)
    if both is None:
        total = add(x)
        return norm(total), total
    return both


PATTERNS = (Pattern("add layer_norm ", _run, sum_is_result=True),)
