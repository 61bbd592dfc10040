"""A residual and what dropout leaves of x, as the layers of a transformer end: residual + dropout(x), and its LayerNorm.

All of these stand for several layers: where the kernels don't take a call whole, the layers are called one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _kernels
from ..operation import Operation
from ..values import Named, Needs, Out, Tensors
from .dropout import Dropout, _dropout, _launch, _numbers, _vector
from .norm import AddLayerNorm

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels import dropout as dropout_kernels
    from ..kernels import norm as kernels

__all__: list[str] = []  # none is a function of torch's


class DropoutAdd(Dropout):
    """input and residual of one shape -> dropout(input) + residual. Saves what was drawn, two numbers."""

    tensors = ("input", "residual", "seed")
    floats = ("input", "residual")

    def reference(self, *args: Any) -> Any:
        raise NotImplementedError("a joined call, which is never made of torch's functions")

    def unsupported(self, t: Any, options: Any) -> str | None:
        if t.residual.shape != t.input.shape:
            return "a residual that is broadcast"
        if not (t.input.is_contiguous() and t.residual.is_contiguous()):
            return "a sum whose strides torch would choose by those of its terms"
        return None

    def outputs(self, t: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        return {"output": Out(tuple(t.input.shape), t.input.dtype)}

    def forward(self, t: Any, out: Named, options: Any, precision: str) -> None:
        _launch(t.input, out.output, t.seed, options, *_numbers(options), residual=t.residual)

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        return ("seed",) if needs[0] else ()

    def gradients(self, like: Any, options: Any, needs: Needs) -> tuple[Out | int | str | None, ...]:
        dx = Out(tuple(like.input.shape), like.input.dtype) if needs[0] else None
        return dx, "output" if needs[1] else None, None

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        if grads.input is not None:
            super().backward(grads, dy, saved, options, precision)

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Any, needs: Needs) -> Tensors:
        dx = super().differentiate(dy, saved, like, options, needs)[0] if needs[0] else None
        return dx, dy.output if needs[1] else None, None


class DropoutAddLayerNorm(AddLayerNorm):
    """input and residual (*, *shape) -> the normalised sum dropout(input) + residual, and the sum."""

    tensors = ("input", "residual", "weight", "bias", "seed")
    compiled = False

    class Options(NamedTuple):  # pyright: ignore[reportIncompatibleVariableOverride]
        shape: tuple[int, ...]
        eps: float
        dtype: torch.dtype | None
        p: float
        vector: int
        """As Dropout's."""

    def random(self, options: Any) -> bool:
        return True

    def advance(self, t: Any, options: Any) -> int:
        return dropout_kernels.advance(t.input.numel(), 4, t.input.device)

    def _statistics(self, x: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        return super()._statistics(x, options, needs and needs[:-1])

    def forward(self, t: Any, out: Named, options: Any, precision: str) -> None:
        drops = _drops(options)
        _launch(t.input, out.sum, t.seed, drops, *_numbers(drops), residual=t.residual)
        size = math.prod(options.shape)
        kernels.layer_norm(
            out.sum, None, t.weight, t.bias, out.output, None, out.mean, out.rstd, size, options.eps
        )  # fmt: skip

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        return (*super().saves(t, options, needs[:-1]), *(("seed",) if needs[0] else ()))

    def gradients(self, like: Any, options: Any, needs: Needs) -> tuple[Out | int | str | None, ...]:
        return Operation.gradients(self, like, options, needs)

    def reached(self, given: Sequence[str], needs: Needs) -> Needs:
        return (*super().reached(given, needs[:-1]), False)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        dx = grads.input
        total = dx if grads.residual is None else grads.residual
        kernels.layer_norm_grad(
            dy.output, dy.sum, saved.sum, saved.weight, saved.mean, saved.rstd,
            total, grads.weight, grads.bias, math.prod(options.shape),
        )  # fmt: skip
        if dx is not None:  # in place, where nobody asks for the residual's
            drops = _drops(options)
            _launch(total, dx, saved.seed, drops, *_numbers(drops))

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Any, needs: Needs) -> Tensors:
        dx, dr, dw, db = super().differentiate(dy, saved, like[:-1], options[:3], needs[:-1])
        if dx is not None:
            dx = _dropout.differentiate(Named(output=dx), saved, like, _drops(options), needs)[0]
        return dx, dr, dw, db, None


def _drops(options: Any) -> Any:
    """The dropout's own options."""
    return _dropout.options("dropout", options.p, False, options.vector)


_dropout_add, _dropout_add_layer_norm = DropoutAdd(), DropoutAddLayerNorm()


def dropout_add(input: torch.Tensor, residual: torch.Tensor, p: float) -> torch.Tensor | None:
    """dropout(input, p) + residual in one pass over memory, for 0 < p < 1; None where the kernels don't take both."""
    if not _are_tensors(input, residual):
        return None
    return _dropout_add((input, residual), "dropout", p, False, _vector(input), joined=True)


def dropout_add_layer_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    p: float,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """layer_norm(dropout(input, p) + residual), and the sum, for 0 < p < 1; None where the kernels don't take all, or autocast
    would compute them in different dtypes."""
    if not _are_tensors(input, residual):
        return None
    return _dropout_add_layer_norm(
        (input, residual, weight, bias), tuple(normalized_shape), float(eps), None, p, _vector(input), joined=True
    )  # fmt: skip


def _are_tensors(input: object, residual: object) -> bool:
    """A model may add a number. torch draws nothing for an empty tensor."""
    return isinstance(input, torch.Tensor) and isinstance(residual, torch.Tensor) and input.numel() > 0
