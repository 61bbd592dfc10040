"""A residual and the normalisation of the sum: one pass over memory, with both results. An RMSNorm may be written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .._state import own
from ..ops.norm import add_norm, add_rms_norm_expression, rms_norm_expression
from .plan import Pattern, Role, Value, register_role

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


class Written(NamedTuple):
    """Stands in a row of layers for an RMSNorm that the model writes out."""

    weight: torch.Tensor | None
    options: tuple[Any, ...]
    """What `rms_norm_expression` is given beside its tensors."""

    @property
    def label(self) -> str:
        return "rms_norm"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm_expression(x, self.weight, *self.options)


def _run_written(x: torch.Tensor, layers: Sequence[Any], values: Sequence[Value]) -> tuple[torch.Tensor, torch.Tensor]:
    add, norm = layers
    are_tensors = isinstance(x, torch.Tensor) and isinstance(add.tensor, torch.Tensor)  # or a size
    both = (
        None if add.inplace or not are_tensors else add_rms_norm_expression(x, add.tensor, norm.weight, *norm.options)
    )
    if both is None:
        total = add(x)
        return norm(total), total
    return both


WRITTEN = "rms_norm_expression"
register_role(Written, Role(WRITTEN))
PATTERNS = (
    Pattern("add (layer_norm|rms_norm) ", _run, sum_is_result=True),
    Pattern(f"add {WRITTEN} ", _run_written, sum_is_result=True),
)
