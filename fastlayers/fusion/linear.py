"""Linear layers in a row, each with the activation that follows it: one function for autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._state import own
from ..ops.linear import linear_chain
from .plan import Pattern, Value, run_alone

__all__ = ["PATTERNS"]


def _run(x: torch.Tensor, layers: Sequence[Any], values: Sequence[Value]) -> torch.Tensor:
    params: list[Any] = []
    activations: list[Any] = []
    for layer, value in zip(layers, values, strict=True):
        if value.role == "linear":
            params += (own(layer, "weight", type(layer)), own(layer, "bias", type(layer)))
            activations.append(None)
        else:
            activations[-1] = value.what
    y = linear_chain(x, params, tuple(activations))
    return run_alone(x, layers) if y is None else y


PATTERNS = (Pattern("(linear (activation )?)+", _run),)
