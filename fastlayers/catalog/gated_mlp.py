"""The gated layers of a transformer."""

from typing import Any

import torch
import torch.nn.functional as F

from ..ops.activation import RULES
from ..ops.gated_mlp import _gated_mlp, gated_mlp
from .row import Case, Row, case

__all__ = ["ROWS"]


class Mlp(torch.nn.Module):
    """As models write it, of torch's functions; with fastlayers.nn, one call of ours."""

    def __init__(self, nn: Any, k: int, n: int, m: int, activation: str, bias: bool):
        super().__init__()
        self.activation, self.joined = activation, nn is not torch.nn
        sizes = dict(gate=(n, k), up=(n, k), down=(m, n))
        for name, (rows, columns) in sizes.items():
            weight = torch.randn(rows, columns) / columns**0.5
            self.register_parameter(f"{name}_weight", torch.nn.Parameter(weight))
            self.register_parameter(f"{name}_bias", torch.nn.Parameter(torch.randn(rows)) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights: Any = (self.gate_weight, self.up_weight, self.down_weight)
        biases: Any = (self.gate_bias, self.up_bias, self.down_bias)
        if self.joined:
            return gated_mlp(x, *weights, *biases, activation=self.activation)
        gate, up, down = zip(weights, biases, strict=True)
        return F.linear(RULES[self.activation].torch(F.linear(x, *gate)) * F.linear(x, *up), *down)


def _mlp(rows: Any, k: int, n: int, m: int | None = None, activation: str = "silu", bias: bool = False) -> Case:
    shape = (*rows, k) if isinstance(rows, tuple) else (rows, k)
    return case(lambda nn: Mlp(nn, k, n, m or k, activation, bias), shape)


ROWS = (
    Row(
        "gated_mlp",
        "`down(activation(gate(x)) * up(x))`, which is what `fuse` finds of `Linear`: both inner products in one kernel, half of "
        "what torch saves; with or without biases, any leading dimensions, none",
        "an activation that autocast widens",
        operation=_gated_mlp,
        function="gated_mlp",
        speeds={
            "Llama-8B, 4096 tokens": _mlp(4096, 4096, 14336),
            "Gemma-2B, 2048 tokens": _mlp(2048, 2048, 16384, activation="gelu_tanh"),
            "Llama-8B, 1 token": _mlp(1, 4096, 14336),
            "odd 1000 x 1000 x 999": _mlp(1000, 1000, 999, activation="gelu", bias=True),
        },
        cases=dict(
            silu=_mlp((3, 7), 19, 37, 18),
            gelu=_mlp(21, 17, 33, 5, activation="gelu", bias=True),
            gelu_tanh=_mlp((), 9, 20, activation="gelu_tanh"),
            relu=_mlp(5, 8, 16, activation="relu", bias=True),
        ),
    ),
)
