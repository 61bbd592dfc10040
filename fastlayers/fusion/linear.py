"""Linear layers in a row, each with the activation that follows it: one function for autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .._state import own
from ..ops.linear import linear, linear_chain
from .plan import Pattern, Role, Value, register_role, run_alone

__all__ = ["PATTERNS", "params"]


def params(layer: Any) -> tuple[Any, Any]:
    """Weight and bias of a Linear."""
    return own(layer, "weight", type(layer)), own(layer, "bias", type(layer))


def _run(x: torch.Tensor, layers: Sequence[Any], values: Sequence[Value]) -> torch.Tensor:
    if not all([layer.takes(x) for layer in layers[:1] if type(layer) is Transposed]):
        return run_alone(x, layers)
    given: list[Any] = []
    activations: list[Any] = []
    for layer, value in zip(layers, values, strict=True):
        if value.role == "linear":
            given += layer.params if type(layer) is Transposed else params(layer)
            activations.append(None)
        else:
            activations[-1] = value.what
    y = linear_chain(x, given, tuple(activations))
    return run_alone(x, layers) if y is None else y


class Transposed(NamedTuple):
    """Stands in a row of layers for a Linear that the model writes out with `torch.addmm`, and a weight of (in_features,
    out_features), as GPT-2's Conv1D does."""

    weight: torch.Tensor
    bias: torch.Tensor
    size: int
    """Of the last dimension, as the model gives it to `view`."""

    @property
    def label(self) -> str:
        return "addmm"

    @property
    def params(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight.t(), self.bias

    @property
    def fits(self) -> bool:
        """Whether it is a Linear of this size."""
        return self.weight.dim() == 2 and self.weight.shape[1] == self.size and self.bias.shape == (self.size,)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether a Linear computes the same of this input. One of other strides can't be viewed as a matrix."""
        return x.dim() > 0 and x.is_contiguous() and x.numel() > 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.fits and self.takes(x):
            return linear(x, *self.params)
        shape = (*x.size()[:-1], self.size)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


def transposed_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, size: int) -> torch.Tensor:
    """torch.addmm(bias, input.view(-1, input.size(-1)), weight).view(*input.size()[:-1], size)."""
    return Transposed(weight, bias, size)(input)


WRITTEN = "transposed_linear"
register_role(Transposed, Role("linear", joins=lambda layer: layer.fits))
PATTERNS = (Pattern("(linear (activation )?)+", _run),)
