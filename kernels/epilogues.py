"""Functions on a tile in registers, and their derivatives.

Each activation is a pair: `name(x)` and `name_grad(dy, saved)`, where `saved` is whatever the activation's record says
it saves (its output, for ReLU). The stand-alone kernels, the epilogues of the matrix products and of the convolution,
and their backward passes all call the same pair, so an activation is written once.

A tile comes in its accumulation dtype (float32, or float64), never in 16 bits.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit
def relu(x):
    # Not tl.maximum(x, 0) nor tl.where(x > 0, x, 0): both compile to an instruction that turns NaN into 0.
    return tl.where(x < 0, 0.0, x)


@triton.jit
def relu_grad(dy, y):
    # torch's rule: a NaN output passes the gradient on.
    return tl.where(y <= 0, 0.0, dy)


class Norm(NamedTuple):
    """What turns channels into normalised ones, as torch.nn.functional.batch_norm does in eval: (x - mean) /
    sqrt(var + eps) * weight + bias, each tensor with one number for each channel."""

    mean: torch.Tensor
    var: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float


@triton.jit
def finish(
    x, channel, inside, CHANNEL_DIM: tl.constexpr, bias_ptr, mean_ptr, var_ptr, weight_ptr, shift_ptr,
    residual_ptr, offsets, hit, EPS: tl.constexpr, THEN: tl.constexpr,
):  # fmt: skip
    """then(norm(x + bias) + residual) for a tile of which dimension CHANNEL_DIM runs over channels; what is None is left
    out. The residual lies at the tile's own offsets.

    The sum is normalised before it is ever rounded, with the weight as it is: closer than a folded one would be.
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
    if THEN is not None:
        x = THEN(x)
    return x


def forward(name: str | None) -> Callable | None:
    """The tile function called `name`; None stays None (no activation)."""
    return None if name is None else globals()[name]


def backward(name: str | None) -> Callable | None:
    """The derivative of the tile function called `name`; None stays None."""
    return None if name is None else globals()[f"{name}_grad"]


def tensors(norm: Norm | None) -> tuple[torch.Tensor | None, ...]:
    """The pointers that `finish` takes for it."""
    return (None,) * 4 if norm is None else norm[:4]
