"""y = exp(x - max x) / sum exp(x - max x) along one dimension; dx = y (dy - sum dy y)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F

from .. import _dispatch, _dtypes
from .._dispatch import DTYPES, BadInput, accelerated, replayable

if TYPE_CHECKING or _dispatch.MISSING is None:
    from ..kernels import softmax as kernels
    from ..kernels._replay import Found, is_plain


@replayable
def _forward(tensors: Sequence[torch.Tensor | None], dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    (x,) = tensors
    assert x is not None
    return (kernels.softmax(x, dim, dtype),)


@replayable
def _backward(tensors: Sequence[torch.Tensor | None], dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    dy, y = tensors
    assert dy is not None and y is not None
    return (kernels.softmax_grad(dy, y, dim, dtype),)


class _Softmax(torch.autograd.Function):
    """x (*, D, *) -> y (*, D, *) in `dtype`; dx = y (dy - sum dy y) in x's dtype. Saves y alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, dtype: torch.dtype, found: Found | None) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.dim, ctx.dtype = dim, x.dtype
        results = found and found[0].play((x,), found[1])
        (y,) = results or _forward((x,), dim, dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        (y,) = ctx.saved_tensors
        results = _dispatch.backward(_backward, (dy, y), (ctx.dim, ctx.dtype), dy)
        if results is None:
            with torch.autocast(y.device.type, enabled=False):
                accumulate = torch.promote_types(y.dtype, torch.float32)
                y, dy = y.to(accumulate), dy.to(accumulate)
                results = ((y * (dy - (dy * y).sum(ctx.dim, keepdim=True))).to(ctx.dtype),)
        return (*results, None, None, None)


_apply = _dispatch.applying(_Softmax)


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, -1)


def _twin(input: torch.Tensor, dim: int, dtype: torch.dtype | None) -> torch.Tensor:
    return F.softmax(input, dim, dtype=dtype)


def _why_not(input: torch.Tensor, dim: int, dtype: torch.dtype | None) -> str | None:
    reason = _dispatch.why_not(input, autocast=_probe)
    if reason is not None:
        return reason
    if type(dim) is not int or not -input.dim() <= dim < max(input.dim(), 1):
        return BadInput(f"dim {dim!r} of a tensor with {input.dim()}")
    if input.dim() == 0:
        return "a tensor without dimensions"
    if dtype is not None and dtype not in DTYPES:
        return BadInput(f"dtype {dtype}")
    return None if dtype is None else _dispatch.why_not_dtype(dtype)


def _again(input: torch.Tensor, dim: int, dtype: torch.dtype | None) -> torch.Tensor | None:
    if type(dim) is not int or not is_plain(input):
        return None
    if dim < 0:
        dim += input.dim()
    if dtype is None:
        dtype = _dtypes.after_autocast(_probe, input) if torch._C._is_any_autocast_enabled() else input.dtype
    found = _forward.find((input,), (dim, dtype))
    if found is None:
        return None
    if found[2] and torch.is_grad_enabled():
        return _apply(input, dim, dtype, found)
    results = found[0].play((input,), found[1])
    return None if results is None else results[0]


@accelerated(twin=_twin, why_not=_why_not, again=_again)
def _softmax(input: torch.Tensor, dim: int, dtype: torch.dtype | None) -> torch.Tensor:
    dtype = dtype or _dtypes.after_autocast(_probe, input)
    if torch.promote_types(input.dtype, dtype) != dtype:
        input = input.to(dtype)  # torch rounds before the operation; a widening happens in the kernel
    dim %= input.dim()
    if _dispatch.wants_grad(input):
        return _Softmax.apply(input, dim, dtype, None)  # type: ignore[return-value]
    return _forward((input,), dim, dtype)[0]


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
    if dim is None:
        choose: Any = F._get_softmax_dim  # pyright: ignore[reportAttributeAccessIssue]
        dim = choose("softmax", input.dim(), _stacklevel)
    return _softmax(input, cast(int, dim), dtype)
