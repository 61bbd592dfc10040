"""A residual and the normalisation of the sum: one pass over memory, with both results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._state import own
from ..ops.norm import add_norm
from .plan import Pattern, Value

__all__ = ["PATTERNS"]


def arguments(norm: Any, role: str) -> tuple[Any, ...]:
    """What a fused call takes of a norm: shape, weight, bias, eps, and whether the mean is subtracted."""
    center = role == "layer_norm"
    bias = own(norm, "bias", type(norm)) if center else None
    return norm.normalized_shape, own(norm, "weight", type(norm)), bias, norm.eps, center


def _run(x: torch.Tensor, layers: Sequence[Any], values: Sequence[Value]) -> tuple[torch.Tensor, torch.Tensor]:
    add, norm = layers
    both = None
    if not add.inplace:
        both = add_norm(x, add.tensor, *arguments(norm, values[1].role))
    if both is None:
        total = add(x)
        return norm(total), total
    return both


PATTERNS = (Pattern("add (layer_norm|rms_norm) ", _run, sum_is_result=True),)
