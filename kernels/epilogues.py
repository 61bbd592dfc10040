"""What a kernel does to its result while it is in registers: the activations of activations.py, as launchers and kernels take
them, and the epilogue of a convolution."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl

from . import activations
from .runtime import launch


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


class Partials:
    """What each tile of a convolution writes beside its result, from which mean and variance of the channels are computed without
    reading the result again: for each channel a shift, the mean relative to it, and the sum of squared differences to that mean;
    and the number of the tile's pixels. The launcher allocates it, since only it knows the number of tiles."""

    data: torch.Tensor
    """(3 * tiles * channels + tiles,): three matrices (tiles, channels), and the numbers of pixels."""
    tiles: int

    def empty(self, tiles: int, y: torch.Tensor) -> torch.Tensor:
        """The memory for `tiles` tiles of y (N, C, ...)."""
        dtype = torch.promote_types(y.dtype, torch.float32)
        self.tiles = tiles
        self.data = launch.empty((tiles * (3 * y.shape[1] + 1),), dtype=dtype, device=y.device)
        return self.data


@triton.jit
def measure(y, partials_ptr, tile, TILES, C, channel, channel_inside, pixel_inside, CHANNEL_DIM: tl.constexpr):
    """Write a tile's `Partials`. y is the tile as it is stored, rounded; its dimension CHANNEL_DIM runs over channels, the other
    over pixels, of which at least one is inside.

    The shift is the tile's mean as far as it is a finite number, so that the squares are of the variance's size, and the mean
    relative to it has the digits that a mean far from 0 has no room for.
    """
    ACROSS: tl.constexpr = 1 - CHANNEL_DIM
    dtype = partials_ptr.dtype.element_ty
    pixels = tl.expand_dims(pixel_inside, CHANNEL_DIM)
    count = tl.sum(pixel_inside.to(tl.int32)).to(dtype)
    y = y.to(dtype)
    shift = tl.sum(tl.where(pixels, y, 0.0), axis=ACROSS) / count
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    y = tl.where(pixels, y - tl.expand_dims(shift, ACROSS), 0.0)
    mean = tl.sum(y, axis=ACROSS) / count
    squares = tl.sum(tl.where(pixels, y * y, 0.0), axis=ACROSS) - mean * mean * count
    squares = tl.where(squares < 0, 0.0, squares)  # by rounding, where all elements are equal; keeps NaN
    size = tl.cast(TILES, tl.int64) * C
    out = partials_ptr + tl.cast(tile, tl.int64) * C + channel
    tl.store(out, shift, mask=channel_inside)
    tl.store(out + size, mean, mask=channel_inside)
    tl.store(out + 2 * size, squares, mask=channel_inside)
    tl.store(partials_ptr + 3 * size + tile + 0 * channel, count, mask=channel == 0)


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
