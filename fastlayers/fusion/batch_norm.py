"""A normalisation of channels and the activation behind it: one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import functional as F
from ..ops.batch_norm import norm_joined
from .plan import Pattern, Value

__all__ = ["PATTERNS"]


def _takes_batch(norm: Any, x: torch.Tensor) -> bool:
    """Whether this is a batch with the right number of channels, where an InstanceNorm neither objects nor warns."""
    return x.dim() == norm._get_no_batch_dim() + 1 and x.shape[1] == norm.num_features


def _run(x: torch.Tensor, layers: Sequence[Any], values: Sequence[Value]) -> torch.Tensor:
    norm, activation = layers
    function = "batch_norm" if values[0].role == "batch_norm" else values[0].what
    if not hasattr(norm, "_arguments"):  # of torch's own class, of which only a convolution makes something
        return activation(norm(x))
    if function == "instance_norm":
        norm._check_input_dim(x)
        if not _takes_batch(norm, x):
            return activation(norm(x))
    arguments = norm._arguments(x)  # which counts the batch: once, whoever normalises it
    y = norm_joined(function, values[1].what, *arguments)
    return activation(getattr(F, function)(*arguments)) if y is None else y


PATTERNS = (Pattern("(batch_norm |norm )activation ", _run),)
