"""The gated layers of a transformer."""

from typing import Any

import torch
import torch.nn.functional as F

from ..ops.activation import RULES
from ..ops.gated_mlp import _gated_mlp, _packed_gated_mlp, gated_mlp, packed_gated_mlp
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


class PackedMlp(torch.nn.Module):
    """The same with gate and up in one weight."""

    def __init__(self, nn: Any, k: int, n: int, m: int, gate_last: bool, bias: bool):
        super().__init__()
        self.gate_last, self.joined = gate_last, nn is not torch.nn
        for name, (rows, columns) in dict(gate_up=(2 * n, k), down=(m, n)).items():
            weight = torch.randn(rows, columns) / columns**0.5
            self.register_parameter(f"{name}_weight", torch.nn.Parameter(weight))
            self.register_parameter(f"{name}_bias", torch.nn.Parameter(torch.randn(rows)) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        args: Any = (x, self.gate_up_weight, self.down_weight, self.gate_up_bias, self.down_bias)
        if self.joined:
            return packed_gated_mlp(*args, gate_last=self.gate_last)
        _, weight, down_weight, bias, down_bias = args
        gate, up = F.linear(x, weight, bias).chunk(2, -1)[:: -1 if self.gate_last else 1]
        return F.linear(F.silu(gate) * up, down_weight, down_bias)


def _packed(rows: Any, k: int, n: int, m: int, gate_last: bool = False, bias: bool = False) -> Case:
    return case(lambda nn: PackedMlp(nn, k, n, m, gate_last, bias), (*rows, k))


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
    Row(
        "packed_gated_mlp",
        "`gated_mlp` with gate and up as halves of one weight, in either order, as `fuse` finds it of Phi-3's "
        "`gate_up(x).chunk(2, -1)`: neither it nor its gradient is copied",
        "an activation that autocast widens",
        operation=_packed_gated_mlp,
        function="packed_gated_mlp",
        speeds={},
        cases=dict(
            silu=_packed((3, 7), 19, 37, 18),
            gate_last=_packed((5,), 9, 20, 7, gate_last=True, bias=True),
        ),
    ),
)
