"""Resampling: y at a pixel = x at the nearest pixel of the source, or a linear interpolation of its 2, 4 or 8 neighbours.

The gradient is gathered: a pixel of dx adds up dy over the pixels of y that are made of it, in a fixed order and without atomic
operations. Which these are follows from the forward's own computation of sources, so that rounding can't make them differ.
"""

import math

import torch
import triton
import triton.language as tl

from ..runtime import launch, tiles
from .average import avg_pool
from .positions import coordinates, merged, pick, programs, tile_of
from .windows import Triple, Windows, triple, unrolled


@triton.jit
def _cast(scale, POINT: tl.constexpr):
    """A number as a scalar of that type; in the interpreter it is a Python float."""
    return (tl.full((), 0.0, tl.float64) + scale).to(POINT)


@triton.jit
def _source(o, scale, IN, LINEAR: tl.constexpr, CENTRED: tl.constexpr):
    """Where pixel o comes from along one dimension: the source's pixel at or before that point, and how far beyond it."""
    point = o.to(scale.dtype)
    if CENTRED:
        point = (point + 0.5) * scale
        if LINEAR:
            point = tl.maximum(point - 0.5, 0.0)
    else:
        point = point * scale
    low = tl.minimum(point.to(tl.float32).to(o.dtype), IN - 1)  # torch rounds the point to float32 in float64, too
    return low, tl.minimum(tl.maximum(point - low, 0.0), 1.0)


@triton.jit
def _corner(low, beyond, i: tl.constexpr, CORNERS: tl.constexpr, IN):
    """The i-th of the pixels between which is interpolated along one dimension, and its weight."""
    if CORNERS == 1:
        return low, tl.full(low.shape, 1, beyond.dtype)
    elif i == 0:
        return low, 1 - beyond
    else:
        return tl.minimum(low + 1, IN - 1), beyond


@triton.jit
def _resize_kernel(
    x_ptr, y_ptr, POSITIONS, C, D, H, W, OD, OH, OW, x_n, x_c, x_d, x_h, x_w, y_n, y_c, y_d, y_h, y_w,
    scale_d: tl.float64, scale_h: tl.float64, scale_w: tl.float64,
    LINEAR: tl.constexpr, CENTRED: tl.constexpr, CORNERS_D: tl.constexpr, CORNERS_H: tl.constexpr,
    CORNERS_W: tl.constexpr, POINT: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M pixels of y by TILE_N channels."""
    m, c, m_inside, c_inside = tile_of(POSITIONS, C, WIDE, TILE_M, TILE_N)
    n, od, oh, ow = coordinates(m, OD, OH, OW)
    d, d_beyond = _source(od, _cast(scale_d, POINT), D, LINEAR, CENTRED)
    h, h_beyond = _source(oh, _cast(scale_h, POINT), H, LINEAR, CENTRED)
    w, w_beyond = _source(ow, _cast(scale_w, POINT), W, LINEAR, CENTRED)
    x_ptr += (n * x_n)[:, None] + (c * x_c)[None, :]
    inside = m_inside[:, None] & c_inside[None, :]
    total = tl.zeros((TILE_M, TILE_N), ACC)
    for i in tl.static_range(CORNERS_D):
        d_at, d_weight = _corner(d, d_beyond, i, CORNERS_D, D)
        for j in tl.static_range(CORNERS_H):
            h_at, h_weight = _corner(h, h_beyond, j, CORNERS_H, H)
            for k in tl.static_range(CORNERS_W):
                w_at, w_weight = _corner(w, w_beyond, k, CORNERS_W, W)
                x = tl.load(x_ptr + (d_at * x_d + h_at * x_h + w_at * x_w)[:, None], mask=inside, other=0.0).to(ACC)
                if LINEAR:
                    total += (d_weight * h_weight * w_weight)[:, None] * x
                else:
                    total = x
    offsets = (n * y_n + od * y_d + oh * y_h + ow * y_w)[:, None] + (c * y_c)[None, :]
    tl.store(y_ptr + offsets, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weight(i, o, scale, IN, OUT, LINEAR: tl.constexpr, CENTRED: tl.constexpr):
    """The weight of source pixel i in pixel o along one dimension, and whether o is made of it at all."""
    low, beyond = _source(o, scale, IN, LINEAR, CENTRED)
    at_low = (low == i) & (o < OUT)
    if LINEAR:
        at_high = (tl.minimum(low + 1, IN - 1) == i) & (o < OUT)
        return tl.where(at_low, 1 - beyond, 0.0) + tl.where(at_high, beyond, 0.0), at_low | at_high
    else:
        return at_low.to(beyond.dtype), at_low


@triton.jit
def _first(i, scale, inverse, IN, OUT, LINEAR: tl.constexpr, CENTRED: tl.constexpr):
    """A pixel before which none along one dimension is made of source pixel i. The inverse function finds it up to rounding,
    and `_source` decides."""
    point = i.to(scale.dtype)
    if LINEAR:
        point = (point - 0.5) * inverse - 0.5 if CENTRED else (point - 1) * inverse
        o = tl.maximum(point, 0.0).to(i.dtype)
        weight, _ = _weight(i, o, scale, IN, OUT, LINEAR, CENTRED)
        return tl.where(weight == 0, o + 1, o)
    else:
        point = point * inverse - 0.5 if CENTRED else point * inverse
        o = tl.maximum(point - 1, 0.0).to(i.dtype)
        low, _ = _source(o, scale, IN, LINEAR, CENTRED)
        o = tl.where(low < i, o + 1, o)
        low, _ = _source(o, scale, IN, LINEAR, CENTRED)
        return tl.where(low < i, o + 1, o)


@triton.jit
def _resize_grad_kernel(
    dy_ptr, dx_ptr, POSITIONS, C, D, H, W, OD, OH, OW, dy_n, dy_c, dy_d, dy_h, dy_w, dx_n, dx_c, dx_d, dx_h, dx_w,
    scale_d: tl.float64, scale_h: tl.float64, scale_w: tl.float64,
    inverse_d: tl.float64, inverse_h: tl.float64, inverse_w: tl.float64,
    LINEAR: tl.constexpr, CENTRED: tl.constexpr, DIMS: tl.constexpr,
    MOST_D: tl.constexpr, MOST_H: tl.constexpr, MOST_W: tl.constexpr,
    UNROLLED: tl.constexpr, POINT: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M pixels of dx by TILE_N channels, each from the pixels of dy that may be made of it."""
    m, c, m_inside, c_inside = tile_of(POSITIONS, C, WIDE, TILE_M, TILE_N)
    n, d, h, w = coordinates(m, D, H, W)
    scale_d, scale_h, scale_w = _cast(scale_d, POINT), _cast(scale_h, POINT), _cast(scale_w, POINT)
    d_first = _first(d, scale_d, _cast(inverse_d, POINT), D, OD, LINEAR and DIMS > 2, CENTRED)
    h_first = _first(h, scale_h, _cast(inverse_h, POINT), H, OH, LINEAR and DIMS > 1, CENTRED)
    w_first = _first(w, scale_w, _cast(inverse_w, POINT), W, OW, LINEAR, CENTRED)
    dy_ptr += (n * dy_n)[:, None] + (c * dy_c)[None, :]
    total = tl.zeros((TILE_M, TILE_N), ACC)
    for i in range(MOST_D):
        od = d_first + i
        d_weight, d_made = _weight(d, od, scale_d, D, OD, LINEAR and DIMS > 2, CENTRED)
        for j in range(MOST_H):
            oh = h_first + j
            h_weight, h_made = _weight(h, oh, scale_h, H, OH, LINEAR and DIMS > 1, CENTRED)
            plane, made = d_weight * h_weight, m_inside & d_made & h_made
            row = od * dy_d + oh * dy_h
            if UNROLLED:
                for k in tl.static_range(MOST_W):
                    ow = w_first + k
                    w_weight, w_made = _weight(w, ow, scale_w, W, OW, LINEAR, CENTRED)
                    mask = (made & w_made)[:, None] & c_inside[None, :]
                    dy = tl.load(dy_ptr + (row + ow * dy_w)[:, None], mask=mask, other=0.0).to(ACC)
                    total += (plane * w_weight)[:, None] * dy if LINEAR else dy
            else:
                for k in range(MOST_W):
                    ow = w_first + k
                    w_weight, w_made = _weight(w, ow, scale_w, W, OW, LINEAR, CENTRED)
                    mask = (made & w_made)[:, None] & c_inside[None, :]
                    dy = tl.load(dy_ptr + (row + ow * dy_w)[:, None], mask=mask, other=0.0).to(ACC)
                    total += (plane * w_weight)[:, None] * dy if LINEAR else dy

    offsets = (n * dx_n + d * dx_d + h * dx_h + w * dx_w)[:, None] + (c * dx_c)[None, :]
    tl.store(dx_ptr + offsets, total.to(dx_ptr.dtype.element_ty), mask=m_inside[:, None] & c_inside[None, :])


def _constexprs(x: torch.Tensor, y: torch.Tensor, linear: bool, centred: bool) -> dict[str, object]:
    """What both kernels are compiled for. torch computes the nearest pixel in float32 on GPUs, for float64 as well."""
    accumulate = tiles.triton_dtype(torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32))
    point = accumulate if linear or not x.is_cuda else tiles.triton_dtype(torch.float32)
    return dict(LINEAR=linear, CENTRED=centred, POINT=point, ACC=accumulate, WIDE=launch.wide(x, y))


def _most(size: int, outputs: int, scale: float, linear: bool) -> int:
    """How many of `outputs` pixels at most are made of one of `size` along a dimension."""
    if scale <= 0:
        return outputs
    if linear:
        return min(outputs, math.ceil(2 / scale))
    whole = outputs % size == 0 and scale == size / outputs
    return min(outputs, outputs // size if whole else math.ceil(1 / scale) + 1)


def resize(
    x: torch.Tensor, y: torch.Tensor, scales: tuple[float, float, float], *, dims: int, linear: bool, centred: bool
) -> None:
    """y = x at other points: pixel o of y is at o * scale of x, or, with pixels `centred`, at (o + 0.5) * scale - 0.5.

    Shape: x (N, C, D, H, W) and y (N, C, OD, OH, OW), both with any strides.
    Dtype: each any floating one; computed in float32 (float64).

    Args:
        scales: along each dimension, x's size over y's, as torch computes it.
        dims: the last so many dimensions are resampled.
        linear: interpolate instead of taking the nearest pixel.
    """
    x, y = merged(x, y)  # type: ignore[assignment]
    n, c, *image = x.shape
    outputs, tile = y.shape[2:], pick(x)
    corners = [2 if linear and d >= 3 - dims else 1 for d in range(3)]
    launch.launch(
        _resize_kernel, programs(y, tile),
        x, y, n * outputs.numel(), c, *image, *outputs, *x.stride(), *y.stride(), *scales,
        **_constexprs(x, y, linear, centred), CORNERS_D=corners[0], CORNERS_H=corners[1], CORNERS_W=corners[2],
        TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip


def resize_grad(
    dy: torch.Tensor, dx: torch.Tensor, scales: tuple[float, float, float], *, dims: int, linear: bool, centred: bool
) -> None:
    """dx = the sum of dy over the pixels that are made of a pixel, times its weights.

    Shape: dy (N, C, OD, OH, OW) and dx (N, C, D, H, W), both with any strides.
    Dtype: each any floating one; sums in float32 (float64).

    Args:
        scales, dims, linear, centred: as in `resize`.
    """
    if dy.numel() == 0:
        dx.zero_()
        return
    if dx.shape[2:].numel() == 1:  # all pixels are made of this one, and their weights are 1
        avg_pool(dy, dx, Windows(triple(dy.shape[2:], 1)), divisor=1)
        return
    dy, dx = merged(dy, dx)  # type: ignore[assignment]
    n, c, *image = dx.shape
    outputs, tile = dy.shape[2:], pick(dx)
    inverses = [0.0 if scale <= 0 else 1 / scale for scale in scales]
    each = enumerate(zip(image, outputs, scales, strict=True))
    most: Triple = tuple([_most(*sizes, linear and d >= 3 - dims) for d, sizes in each])  # type: ignore[assignment]
    launch.launch(
        _resize_grad_kernel, programs(dx, tile),
        dy, dx, n * math.prod(image), c, *image, *outputs, *dy.stride(), *dx.stride(), *scales, *inverses,
        **_constexprs(dx, dy, linear, centred), DIMS=dims, MOST_D=most[0], MOST_H=most[1], MOST_W=most[2],
        UNROLLED=unrolled(most[2]), TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip
