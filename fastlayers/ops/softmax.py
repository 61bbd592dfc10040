"""Along one dimension:

softmax:     y = exp(x - max x) / sum exp(x - max x);   dx = y (dy - sum dy y)
log_softmax: y = x - max x - log(sum exp(x - max x));   dx = dy - exp(y) sum dy
softmin:     softmax of -x
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch

from .. import _kernels, _torch
from .. import _torch_functional as F
from ..dispatch.support import DTYPES, BadInput, unsupported_dtype
from ..operation import Operation
from ..values import Named, Out, Tensors

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels import softmax as kernels

__all__ = ["log_softmax", "softmax", "softmin"]


class Softmax(Operation):
    """Saves its output alone."""

    tensors = ("input",)
    compiled = False
    autocast = staticmethod(lambda x: torch.softmax(x, -1))
    widens = True
    _kind: ClassVar[dict[str, bool]] = {}
    """The launchers' arguments."""

    class Options(NamedTuple):
        dim: int
        dtype: torch.dtype | None

    def reference(self, input: Any, dim: int, dtype: torch.dtype | None) -> Any:
        return F.softmax(input, dim, dtype=dtype)

    def unsupported(self, t: Any, options: Options) -> str | None:
        dim, dtype, dims = options.dim, options.dtype, t.input.dim()
        if type(dim) is not int or not -dims <= dim < max(dims, 1):
            return BadInput(f"dim {dim!r} of a tensor with {dims}")
        if dims == 0:
            return "a tensor without dimensions"
        if dtype is not None and dtype not in DTYPES:
            return BadInput(f"dtype {dtype}")
        return None if dtype is None else unsupported_dtype(dtype)

    def outputs(self, t: Any, options: Options, needs: Any) -> dict[str, Out | str]:
        return {"output": Out(tuple(t.input.shape), options.dtype or t.input.dtype)}

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        kernels.softmax(t.input, out.output, options.dim % t.input.dim(), **self._kind)

    def saves(self, t: Any, options: Options, needs: Any) -> tuple[str, ...]:
        return ("output",)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        kernels.softmax_grad(dy.output, saved.output, grads.input, options.dim % saved.output.dim(), **self._kind)

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Options, needs: Any) -> Tensors:
        expected = options.dtype or like[0].dtype
        if saved.output.dtype is not expected:  # a hook on saved tensors has made another of it
            raise RuntimeError(f"expected a result of {expected} and not of {saved.output.dtype}")
        wide = torch.promote_types(expected, torch.float32)
        with torch.autocast(dy.output.device.type, enabled=False):
            dx = self._gradient(saved.output.to(wide), dy.output.to(wide), options.dim)
            return (dx.to(like[0].dtype),)

    def _gradient(self, y: torch.Tensor, dy: torch.Tensor, dim: int) -> torch.Tensor:
        return y * (dy - (dy * y).sum(dim, keepdim=True))


class LogSoftmax(Softmax):
    """Saves its output alone."""

    autocast = staticmethod(lambda x: torch.log_softmax(x, -1))
    _kind: ClassVar[dict[str, bool]] = dict(log=True)

    def reference(self, input: Any, dim: int, dtype: torch.dtype | None) -> Any:
        return F.log_softmax(input, dim, dtype=dtype)

    def _gradient(self, y: torch.Tensor, dy: torch.Tensor, dim: int) -> torch.Tensor:
        return dy - y.exp() * dy.sum(dim, keepdim=True)


class Softmin(Softmax):
    """Saves its output alone."""

    autocast = staticmethod(lambda x: F.softmin(x, -1))
    _kind: ClassVar[dict[str, bool]] = dict(negated=True)

    def reference(self, input: Any, dim: int, dtype: torch.dtype | None) -> Any:
        return F.softmin(input, dim, dtype=dtype)

    def _gradient(self, y: torch.Tensor, dy: torch.Tensor, dim: int) -> torch.Tensor:
        return -super()._gradient(y, dy, dim)


_softmax, _log_softmax, _softmin = Softmax(), LogSoftmax(), Softmin()


def _along(op: Softmax, input: torch.Tensor, dim: int | None, stacklevel: int, dtype: torch.dtype | None) -> Any:
    if not isinstance(input, torch.Tensor):
        return op.refused((input,), (dim, dtype), f"{type(input).__name__} is not a tensor")
    if dim is None:
        dim = _torch.softmax_dim(op.name, input.dim(), stacklevel + 1)
    if dtype is not None and dtype in DTYPES and input.is_floating_point():
        wide = torch.promote_types(input.dtype, cast(Any, dtype)) == dtype
        input = input if wide else input.to(dtype)  # torch rounds before the operation; the kernel widens by itself
    return op((input,), dim, dtype)


def softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """exp(x - max x) / sum exp(x - max x) along `dim`. As torch.nn.functional.softmax.

    Shape: any with at least one dimension, of any length; the result is contiguous.
    Dtype: float16, bfloat16, float32, float64, converted to `dtype` on the way if that is given; computed in float32.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets).
    Raises: what torch raises. Without `dim`, warns as torch does and takes torch's choice.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.softmax.html; the single pass for maximum
        and sum over long rows: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.
    """
    return _along(_softmax, input, dim, _stacklevel, dtype)


def log_softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """log(softmax(x)) along `dim`, exact also where softmax is nearly 0. As torch.nn.functional.log_softmax.

    Shape: any with at least one dimension, of any length; the result is contiguous.
    Dtype: float16, bfloat16, float32, float64, converted to `dtype` on the way if that is given; computed in float32.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets).
    Raises: what torch raises. Without `dim`, warns as torch does and takes torch's choice.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.log_softmax.html
    """
    return _along(_log_softmax, input, dim, _stacklevel, dtype)


def softmin(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """softmax(-x) along `dim`. As torch.nn.functional.softmin.

    Shape: any with at least one dimension, of any length; the result is contiguous.
    Dtype: float16, bfloat16, float32, float64, converted to `dtype` on the way if that is given; computed in float32.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets).
    Raises: what torch raises. Without `dim`, warns as torch does and takes torch's choice.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.softmin.html
    """
    return _along(_softmin, input, dim, _stacklevel, dtype)
