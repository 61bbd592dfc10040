"""A dropout, the residual that is added to what it leaves, and the normalisation of the sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from ..ops.dropout_add import dropout_add, dropout_add_norm
from . import norm as add_norm
from .plan import PASSES, Pattern, Value

__all__ = ["PATTERNS", "role_of"]


def role_of(layer: Any) -> Any:
    """What a fused call must know of a dropout: p. In eval, or where p is 0, it passes its input on."""
    p = layer.p
    if not (type(p) is float or type(p) is int) or not 0 <= p <= 1:
        return None
    if layer.training is False or p == 0:
        return PASSES
    return None if layer.training is not True or layer.inplace or p == 1 else float(p)


def _add(x: torch.Tensor, layers: Sequence[Any], values: Sequence[Value]) -> torch.Tensor:
    dropout, add = layers
    y = None
    if not (add.inplace or is_dynamo_compiling()):  # Inductor joins torch's dropout with the sum itself
        y = dropout_add(x, add.tensor, values[0].what)
    return add(dropout(x)) if y is None else y


def _add_norm(x: torch.Tensor, layers: Sequence[Any], values: Sequence[Value]) -> tuple[torch.Tensor, torch.Tensor]:
    dropout, add, norm = layers
    if is_dynamo_compiling():
        return add_norm._run(dropout(x), layers[1:], values[1:])
    both = None
    if not add.inplace:
        both = dropout_add_norm(x, add.tensor, values[0].what, *add_norm.arguments(norm, values[2].role))
    if both is None:
        total = _add(x, layers[:2], values[:2])
        return norm(total), total
    return both


PATTERNS = (Pattern("dropout add (layer_norm|rms_norm) ", _add_norm, sum_is_result=True), Pattern("dropout add ", _add))
