"""What a kernel does to its result while it is in registers: the activations of activations.py, as launchers and kernels take
them, and the epilogue of a convolution."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl

from . import activations


class Activation(Protocol):
    """What launchers need to know of an activation."""

    @property
    def function(self) -> str:
        """The name of its tile function in activations.py."""
        ...

    @property
    def args(self) -> tuple[float, ...]:
        """The options of that function, at most two."""
        ...

    @property
    def saves(self) -> str:
        """What the derivative is computed from in the epilogue of another kernel: "input" or "output"."""
        ...


class Norm(NamedTuple):
    """A batch normalisation in eval, (x - mean) / sqrt(var + eps) * weight + bias, with one number for each channel in every
    tensor."""

    mean: torch.Tensor
    var: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float


@triton.jit
def finish(
    x, channel, inside, CHANNEL_DIM: tl.constexpr, bias_ptr, mean_ptr, var_ptr, weight_ptr, shift_ptr,
    residual_ptr, z_ptr, offsets, hit, A0, A1, EPS: tl.constexpr, THEN: tl.constexpr,
):  # fmt: skip
    """then(norm(x + bias) + residual) for a tile whose dimension CHANNEL_DIM runs over channels. Pointers may be None. The
    residual is read, and what comes before `then` is written to z, at the offsets at which the tile will be written.

    Folding the normalisation into the convolution's weight would round the weight once more than normalising the sum does.
    """
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(x.dtype)
        x += tl.expand_dims(bias, 1 - CHANNEL_DIM)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + channel, mask=inside, other=0.0).to(x.dtype)
        scale = 1 / tl.sqrt(tl.load(var_ptr + channel, mask=inside, other=1.0).to(x.dtype) + EPS)
        if weight_ptr is not None:
            scale *= tl.load(weight_ptr + channel, mask=inside, other=0.0).to(x.dtype)
        x = (x - tl.expand_dims(mean, 1 - CHANNEL_DIM)) * tl.expand_dims(scale, 1 - CHANNEL_DIM)
        if shift_ptr is not None:
            shift = tl.load(shift_ptr + channel, mask=inside, other=0.0).to(x.dtype)
            x += tl.expand_dims(shift, 1 - CHANNEL_DIM)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + offsets, mask=hit, other=0.0).to(x.dtype)
    if z_ptr is not None:
        tl.store(z_ptr + offsets, x.to(z_ptr.dtype.element_ty), mask=hit)
    if THEN is not None:
        x = THEN(x, options(A0, A1, x.dtype))
    return x


Options = tuple[float, float]
"""The arguments A0 and A1 of kernels, an activation's options. The kernels declare them as float64, so that they are rounded to
the dtype that is computed in and to no other."""


def tile_function(
    activation: Activation | None, grad: bool = False, of: str | None = None
) -> tuple[Callable[..., Any] | None, Options]:
    """The tile function of an activation, or of its derivative, and its options; None for None.

    Args:
        of: what the derivative is computed from, where that isn't what the activation says.
    """
    if activation is None:
        return None, (0.0, 0.0)
    first, second, *_ = (*activation.args, 0.0, 0.0)
    name = activation.function
    if grad:
        by = f"{name}_grad_of_{of or activation.saves}"
        name = by if hasattr(activations, by) else f"{name}_grad"
    return getattr(activations, name), (first, second)


@triton.jit
def options(A0, A1, ACC: tl.constexpr):
    """The options as tile functions take them. A0 and A1 are Python numbers in the interpreter."""
    return tl.full((), A0, ACC), tl.full((), A1, ACC)


def tensors(norm: Norm | None) -> tuple[torch.Tensor | None, ...]:
    """The pointers that `finish` takes for a normalisation."""
    return (None,) * 4 if norm is None else norm[:4]
