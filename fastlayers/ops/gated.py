"""Activations with a second operand.

prelu: y = x where it is positive, elsewhere w x
glu:   y = a / (1 + exp(-b)), where a and b are the halves of x
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _kernels
from .. import _torch_functional as F
from ..dispatch.support import BadInput
from ..operation import Operation
from ..values import Named, Needs, Out

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels import gated as kernels

__all__ = ["glu", "prelu"]


class Prelu(Operation):
    """input (N, C, ...), weight (C,); or any input, weight (1,) or () -> as input."""

    tensors = ("input", "weight")
    autocast = staticmethod(lambda x: F.prelu(x, x[0]))
    compiled = False

    def reference(self, input: Any, weight: Any) -> Any:
        return F.prelu(input, weight)

    def unsupported(self, t: Any, options: Any) -> str | None:
        x, w = t.input, t.weight
        if w is None:
            return BadInput("no weight")
        if w.dim() > 1:
            return BadInput(f"a weight with {w.dim()} dimensions")
        if w.numel() != 1 and (x.dim() == 0 or w.numel() != (x.shape[1] if x.dim() > 1 else 1)):
            return BadInput(f"{w.numel()} weights for an input {tuple(x.shape)}")
        return None

    def outputs(self, t: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        return {"output": Out.pointwise(t.input)}

    def forward(self, t: Any, out: Named, options: Any, precision: str) -> None:
        kernels.prelu(t.input, t.weight, out.output)

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        return ("input", "weight") if needs[0] else ("input",)

    def gradients(self, like: Any, options: Any, needs: Needs) -> tuple[Out | int | str | None, ...]:
        x, w = like.input, like.weight
        return Out.pointwise(x) if needs[0] else None, Out(w.shape, w.dtype) if needs[1] else None

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        kernels.prelu_grad(dy.output, saved.input, saved.weight, grads.input, grads.weight)


class Glu(Operation):
    """input, of even size along `dim` -> half of it."""

    tensors = ("input",)
    autocast = staticmethod(lambda x: F.glu(x.expand(1, 2)))
    compiled = False

    class Options(NamedTuple):
        dim: int

    def reference(self, input: Any, dim: int) -> Any:
        return F.glu(input, dim)

    def unsupported(self, t: Any, options: Options) -> str | None:
        dim, dims = options.dim, t.input.dim()
        if type(dim) is not int or not -dims <= dim < dims:
            return BadInput(f"dim {dim!r} of a tensor with {dims}")
        if t.input.shape[dim] % 2:
            return BadInput(f"{t.input.shape[dim]} elements, which have no halves")
        return None

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        shape = [*t.input.shape]
        shape[options.dim] //= 2
        return {"output": Out.pointwise(Out(tuple(shape), t.input.dtype, tuple(t.input.stride())))}

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        kernels.glu(t.input, out.output, options.dim % t.input.dim())

    def saves(self, t: Any, options: Options, needs: Needs) -> tuple[str, ...]:
        return ("input",)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        kernels.glu_grad(dy.output, saved.input, grads.input, options.dim % saved.input.dim())


_prelu, _glu = Prelu(), Glu()
_PRELU = _prelu.options()


def prelu(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """input where it is positive, elsewhere weight * input. As torch.nn.functional.prelu.

    Shape: input (N, C, ...) with weight (C,), or any input with weight (1,) or (); the result has the strides that torch gives
        it.
    Dtype: float16, bfloat16, float32, float64, the same for both; computed in float32 (float64). Under autocast, as torch.
    Runs on Triton when: both tensors are plain ones on one GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.prelu.html; He et al., "Delving Deep into
        Rectifiers", arXiv:1502.01852.
    """
    return _prelu.run((input, weight), _PRELU)


def glu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """The first half of the input along `dim`, times the sigmoid of the second. As torch.nn.functional.glu.

    Shape: any with at least one dimension and an even size along `dim`; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64; computed in float32 (float64).
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.glu.html; Dauphin et al., "Language Modeling
        with Gated Convolutional Networks", arXiv:1612.08083.
    """
    return _glu((input,), dim)
