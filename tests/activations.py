"""Activations as the kernels see them, without the operations that are built upon them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class Activation(NamedTuple):
    function: str
    saves: str
    args: tuple[float, ...] = ()


RELU = Activation("relu", "output")
GELU = Activation("gelu", "input")
GELU_TANH = Activation("gelu_tanh", "input")

OPTIONS: dict[str, list[tuple[float, ...]]] = {
    "celu": [(0.5,)],  # torch rounds 1 / alpha to float32 in float64's derivative
    "elu": [(0.7,), (-0.5,), (0.0,)],
    "hardshrink": [(0.5,), (0.7,)],
    "hardtanh": [(-1.0, 1.0), (-0.3, 0.7)],
    "leaky_relu": [(0.01,), (-2.0,), (0.0,)],
    "softplus": [(1.0, 20.0), (2.5, 1.0)],
    "softshrink": [(0.5,), (0.7,)],
    "swish": [(1.702,), (-0.7,)],
    "threshold": [(0.5, -1.0), (0.1, 20.0), (0.7, 0.7)],
}
"""Of activations that have some, in torch's order."""


def one_by_one(function: Callable[..., Sequence[torch.Tensor]], x: torch.Tensor, *args: Any) -> list[torch.Tensor]:
    """A function's results of each element by itself: torch's vectors on the CPU make NaN of gelu(inf), in some places of a
    vector alone."""
    return [torch.cat(results) for results in zip(*[function(one, *args) for one in x.split(1)], strict=True)]
