"""A residual and what dropout leaves of x, as the layers of a transformer end: residual + dropout(x), and its normalisation.

All of these stand for several layers: where the kernels don't take a call whole, the layers are called one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _kernels
from ..operation import Operation
from ..values import Named, Needs, Out, Tensors
from .dropout import Dropout, _dropout, _launch, _numbers, _vector
from .norm import AddNorm

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels import dropout as kernels

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


class DropoutAddNorm(AddNorm):
    """input and residual (*, *shape) -> the normalised sum dropout(input) + residual, and the sum."""

    tensors = ("input", "residual", "weight", "bias", "seed")
    compiled = False

    class Options(NamedTuple):  # pyright: ignore[reportIncompatibleVariableOverride]
        shape: tuple[int, ...]
        eps: float | None
        dtype: torch.dtype | None
        center: bool
        p: float
        vector: int
        """As Dropout's."""

    def random(self, options: Any) -> bool:
        return True

    def advance(self, t: Any, options: Any) -> int:
        return kernels.advance(t.input.numel(), 4, t.input.device)

    def forward(self, t: Any, out: Named, options: Any, precision: str) -> None:
        self._launch_forward(t, out, options, _drop(t.seed, options))

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        return (*super().saves(t, options, needs), *(("seed",) if needs[0] else ()))

    def gradients(self, like: Any, options: Any, needs: Needs) -> tuple[Out | int | str | None, ...]:
        return Operation.gradients(self, like, options, needs)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        drop = None if grads.input is None else (_drop(saved.seed, options), grads.input)
        self._launch_backward(grads, grads.residual, dy, saved, options, drop)

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Any, needs: Needs) -> Tensors:
        dx, *rest = super().differentiate(dy, saved, like, options, needs)
        if dx is not None:
            drops = _dropout.options("dropout", options.p, False, options.vector)
            dx = _dropout.differentiate(Named(output=dx), saved, like, drops, needs)[0]
        return dx, *rest, None


def _drop(draw: torch.Tensor, options: Any) -> Any:
    return kernels.Drop(draw, options.p, 1 / (1 - options.p), options.vector)


_dropout_add, _dropout_add_norm = DropoutAdd(), DropoutAddNorm()


def dropout_add(input: torch.Tensor, residual: torch.Tensor, p: float) -> torch.Tensor | None:
    """dropout(input, p) + residual in one pass over memory, for 0 < p < 1; None where the kernels don't take both."""
    if not _are_tensors(input, residual):
        return None
    return _dropout_add((input, residual), "dropout", p, False, _vector(input), joined=True)


def dropout_add_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    p: float,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float | None,
    center: bool,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """layer_norm(dropout(input, p) + residual), without `center` rms_norm, and the sum, for 0 < p < 1; None where the
    kernels don't take all, or autocast would compute them in different dtypes."""
    if not _are_tensors(input, residual):
        return None
    eps = None if eps is None else float(eps)
    return _dropout_add_norm(
        (input, residual, weight, bias), tuple(normalized_shape), eps, None, center, p, _vector(input), joined=True
    )  # fmt: skip


def _are_tensors(input: object, residual: object) -> bool:
    """A model may add a number. torch draws nothing for an empty tensor."""
    return isinstance(input, torch.Tensor) and isinstance(residual, torch.Tensor) and input.numel() > 0
