"""Average pooling: y = the sum of a window of x over its divisor, and dx at a pixel = the sum of dy over the windows that hold
the pixel, each over its divisor. Like the maximum's, the gradient is gathered, without atomic operations.

A window of many pixels is shared among the threads of a program, as a row of softmax is; in channels_last with those of the
channels beside it.
"""

import math

import torch
import triton
import triton.language as tl

from ..runtime import launch, tiles
from .positions import (
    coordinates,
    holder,
    large_tile,
    merged,
    pick,
    pixels_of,
    programs,
    rows,
    tile_of,
    window,
    windows_of,
)
from .windows import LARGE, Windows, unrolled


@triton.jit
def _count(begin, end, K, IN, padding, PADDED: tl.constexpr, ADAPTIVE: tl.constexpr):
    """The number of pixels along one dimension by which a window's sum is divided."""
    if ADAPTIVE:
        return end - begin
    elif PADDED:
        return tl.minimum(begin + K, IN + padding) - begin
    else:
        return end - tl.maximum(begin, 0)


@triton.jit
def _divided(total, count, DIVISOR: tl.constexpr):
    """The sum over the number of pixels, or over what the caller wants."""
    if DIVISOR is not None:
        return total / DIVISOR
    else:
        return total / tl.maximum(count, 1)  # a window without pixels has a sum of 0


@triton.jit
def _avg_pool_kernel(
    x_ptr, y_ptr, POSITIONS, C, D, H, W, OD, OH, OW,
    x_n, x_c, x_d, x_h, x_w, y_n, y_c, y_d, y_h, y_w, pad_d, pad_h, pad_w,
    K_D: tl.constexpr, K_H: tl.constexpr, K_W: tl.constexpr, S_D: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, ADAPTIVE: tl.constexpr,
    PADDED: tl.constexpr, DIVISOR: tl.constexpr,
    UNROLLED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M pixels of y by TILE_N channels."""
    m, c, m_inside, c_inside = tile_of(POSITIONS, C, WIDE, TILE_M, TILE_N)
    n, od, oh, ow = coordinates(m, OD, OH, OW)
    d_begin, d_end = window(od, D, OD, K_D, S_D, 1, pad_d, ADAPTIVE)
    h_begin, h_end = window(oh, H, OH, K_H, S_H, 1, pad_h, ADAPTIVE)
    w_begin, w_end = window(ow, W, OW, K_W, S_W, 1, pad_w, ADAPTIVE)
    x_ptr += (n * x_n)[:, None] + (c * x_c)[None, :]
    total = tl.zeros((TILE_M, TILE_N), ACC)
    for i in range(K_D):
        d = d_begin + i
        plane_inside = m_inside & (d >= 0) & (d < d_end)
        for j in range(K_H):
            h = h_begin + j
            row_inside = plane_inside & (h >= 0) & (h < h_end)
            row = d * x_d + h * x_h
            if UNROLLED:
                for k in tl.static_range(K_W):
                    w = w_begin + k
                    mask = (row_inside & (w >= 0) & (w < w_end))[:, None] & c_inside[None, :]
                    total += tl.load(x_ptr + (row + w * x_w)[:, None], mask=mask, other=0.0).to(ACC)
            else:
                for k in range(K_W):
                    w = w_begin + k
                    mask = (row_inside & (w >= 0) & (w < w_end))[:, None] & c_inside[None, :]
                    total += tl.load(x_ptr + (row + w * x_w)[:, None], mask=mask, other=0.0).to(ACC)

    count = _count(d_begin, d_end, K_D, D, pad_d, PADDED, ADAPTIVE)
    count *= _count(h_begin, h_end, K_H, H, pad_h, PADDED, ADAPTIVE)
    count *= _count(w_begin, w_end, K_W, W, pad_w, PADDED, ADAPTIVE)
    y = _divided(total, count.to(ACC)[:, None], DIVISOR)
    offsets = (n * y_n + od * y_d + oh * y_h + ow * y_w)[:, None] + (c * y_c)[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=m_inside[:, None] & c_inside[None, :])


@triton.jit
def _avg_pool_large_kernel(
    x_ptr, y_ptr, WINDOWS, C, D, H, W, OD, OH, OW,
    x_n, x_c, x_d, x_h, x_w, y_n, y_c, y_d, y_h, y_w, pad_d, pad_h, pad_w, K_D, K_H, K_W, S_D, S_H, S_W,
    LAST: tl.constexpr, ROW: tl.constexpr, ADAPTIVE: tl.constexpr, PADDED: tl.constexpr, DIVISOR: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M windows, TILE_K pixels of each at a time."""
    n, c, od, oh, ow, m_inside = windows_of(WINDOWS, C, OD, OH, OW, LAST, WIDE, TILE_M)
    d_begin, d_end = window(od, D, OD, K_D, S_D, 1, pad_d, ADAPTIVE)
    h_begin, h_end = window(oh, H, OH, K_H, S_H, 1, pad_h, ADAPTIVE)
    w_begin, w_end = window(ow, W, OW, K_W, S_W, 1, pad_w, ADAPTIVE)
    x_ptr += n * x_n + c * x_c
    total = tl.zeros((TILE_M, TILE_K), ACC)
    for start in range(0, K_D * K_H * K_W, TILE_K):
        k = start + tl.arange(0, TILE_K)
        offsets, inside = pixels_of(
            k, d_begin, h_begin, w_begin, d_end, h_end, w_end, K_H, K_W, 1, 1, 1, x_d, x_h, x_w, ROW
        )  # fmt: skip
        total += tl.load(x_ptr[:, None] + offsets, mask=m_inside[:, None] & inside, other=0.0).to(ACC)

    count = _count(d_begin, d_end, K_D, D, pad_d, PADDED, ADAPTIVE)
    count *= _count(h_begin, h_end, K_H, H, pad_h, PADDED, ADAPTIVE)
    count *= _count(w_begin, w_end, K_W, W, pad_w, PADDED, ADAPTIVE)
    y = _divided(tl.sum(total, axis=1), count.to(ACC), DIVISOR)
    offsets = n * y_n + c * y_c + od * y_d + oh * y_h + ow * y_w
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=m_inside)


@triton.jit
def _share(dy_ptr, offsets, mask, count, DIVISOR: tl.constexpr, ALIKE: tl.constexpr, ACC: tl.constexpr):
    """What one window adds to the gradient of a pixel. If all divisors are alike, the sum is divided instead."""
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(ACC)
    return dy if ALIKE else _divided(dy, count.to(ACC)[:, None], DIVISOR)


@triton.jit
def _avg_pool_grad_kernel(
    dy_ptr, dx_ptr, POSITIONS, C, D, H, W, OD, OH, OW,
    dy_n, dy_c, dy_d, dy_h, dy_w, dx_n, dx_c, dx_d, dx_h, dx_w, pad_d, pad_h, pad_w, K_D, K_H, K_W,
    KERNEL: tl.constexpr, S_D: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, ADAPTIVE: tl.constexpr,
    HOLDERS_D: tl.constexpr, HOLDERS_H: tl.constexpr, HOLDERS_W: tl.constexpr,
    PADDED: tl.constexpr, DIVISOR: tl.constexpr, ALIKE: tl.constexpr,
    UNROLLED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M pixels of dx by TILE_N channels, each from the windows that may hold it. KERNEL: the windows' sizes, if
    it is compiled for them."""
    SIZE_D = K_D if KERNEL is None else KERNEL[0]
    SIZE_H = K_H if KERNEL is None else KERNEL[1]
    SIZE_W = K_W if KERNEL is None else KERNEL[2]
    m, c, m_inside, c_inside = tile_of(POSITIONS, C, WIDE, TILE_M, TILE_N)
    n, d, h, w = coordinates(m, D, H, W)
    dy_ptr += (n * dy_n)[:, None] + (c * dy_c)[None, :]
    total = tl.zeros((TILE_M, TILE_N), ACC)
    for i in range(HOLDERS_D):
        od, _, d_held = holder(d, i, D, OD, SIZE_D, S_D, 1, pad_d, ADAPTIVE)
        d_begin, d_end = window(od, D, OD, SIZE_D, S_D, 1, pad_d, ADAPTIVE)
        d_count = _count(d_begin, d_end, SIZE_D, D, pad_d, PADDED, ADAPTIVE)
        for j in range(HOLDERS_H):
            oh, _, h_held = holder(h, j, H, OH, SIZE_H, S_H, 1, pad_h, ADAPTIVE)
            h_begin, h_end = window(oh, H, OH, SIZE_H, S_H, 1, pad_h, ADAPTIVE)
            plane = d_count * _count(h_begin, h_end, SIZE_H, H, pad_h, PADDED, ADAPTIVE)
            held = m_inside & d_held & h_held
            row = od * dy_d + oh * dy_h
            if UNROLLED:
                for k in tl.static_range(HOLDERS_W):
                    ow, _, w_held = holder(w, k, W, OW, SIZE_W, S_W, 1, pad_w, ADAPTIVE)
                    w_begin, w_end = window(ow, W, OW, SIZE_W, S_W, 1, pad_w, ADAPTIVE)
                    count = plane * _count(w_begin, w_end, SIZE_W, W, pad_w, PADDED, ADAPTIVE)
                    mask = (held & w_held)[:, None] & c_inside[None, :]
                    total += _share(dy_ptr, (row + ow * dy_w)[:, None], mask, count, DIVISOR, ALIKE, ACC)
            else:
                for k in range(HOLDERS_W):
                    ow, _, w_held = holder(w, k, W, OW, SIZE_W, S_W, 1, pad_w, ADAPTIVE)
                    w_begin, w_end = window(ow, W, OW, SIZE_W, S_W, 1, pad_w, ADAPTIVE)
                    count = plane * _count(w_begin, w_end, SIZE_W, W, pad_w, PADDED, ADAPTIVE)
                    mask = (held & w_held)[:, None] & c_inside[None, :]
                    total += _share(dy_ptr, (row + ow * dy_w)[:, None], mask, count, DIVISOR, ALIKE, ACC)

    if ALIKE:
        total = total / (SIZE_D * SIZE_H * SIZE_W if DIVISOR is None else DIVISOR)
    offsets = (n * dx_n + d * dx_d + h * dx_h + w * dx_w)[:, None] + (c * dx_c)[None, :]
    tl.store(dx_ptr + offsets, total.to(dx_ptr.dtype.element_ty), mask=m_inside[:, None] & c_inside[None, :])


def _alike(windows: Windows, image: torch.Size, outputs: torch.Size, padded: bool, divisor: int | None) -> bool:
    """Whether every window's sum is divided by the same number."""
    if windows.adaptive:
        return False
    each = zip(windows.kernel, windows.stride, windows.padding, image, outputs, strict=True)
    return divisor is not None or all(
        [(padded or p == 0) and (o - 1) * s - p + k <= n + (p if padded else 0) for k, s, p, n, o in each]
    )


def avg_pool(
    x: torch.Tensor, y: torch.Tensor, windows: Windows, *, padded: bool = True, divisor: int | None = None
) -> None:
    """y = the sum of each window over the number of its pixels, or over `divisor`.

    Shape: x (N, C, D, H, W) and y (N, C, OD, OH, OW), both with any strides; no dilation.
    Dtype: each any floating one; sums in float32 (float64).

    Args:
        padded: whether padding counts.
    """
    accumulate = tiles.triton_dtype(torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32))
    outputs = y.shape[2:]
    wide = launch.wide(x, y) or windows.wide(x.shape[2:], outputs)
    meta = dict(PADDED=padded, DIVISOR=divisor, ACC=accumulate, WIDE=wide)
    if windows.taps >= LARGE:
        x, windows = rows(x, windows)
        last = x.stride(1) == 1 and x.shape[1] > 1
        tile = large_tile(windows.taps, last)
        launch.launch(
            _avg_pool_large_kernel, tiles.cdiv(y.numel(), tile.m),
            x, y, y.numel(), *x.shape[1:], *outputs, *x.stride(), *y.stride(),
            *windows.padding, *windows.kernel, *windows.stride,
            **meta, LAST=last, ROW=windows.kernel[:2] == (1, 1), ADAPTIVE=windows.adaptive,
            TILE_M=tile.m, TILE_K=tile.n, num_warps=tile.warps,
        )  # fmt: skip
        return
    x, y = merged(x, y)  # type: ignore[assignment]
    n, c, *image = x.shape
    tile = pick(x)
    launch.launch(
        _avg_pool_kernel, programs(y, tile),
        x, y, n * math.prod(outputs), c, *image, *outputs, *x.stride(), *y.stride(), *windows.padding,
        **windows.constexprs(), **meta, UNROLLED=unrolled(windows.kernel[2]),
        TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip


def avg_pool_grad(
    dy: torch.Tensor, dx: torch.Tensor, windows: Windows, *, padded: bool = True, divisor: int | None = None
) -> None:
    """dx = the sum over the windows that hold a pixel of dy over the number of the window's pixels, or over `divisor`.

    Shape: dy (N, C, OD, OH, OW) and dx (N, C, D, H, W), both with any strides; no dilation.
    Dtype: floating, the same; sums in float32 (float64).
    """
    if dy.numel() == 0:
        dx.zero_()
        return
    dy, dx = merged(dy, dx)  # type: ignore[assignment]
    n, c, *image = dx.shape
    outputs, tile = dy.shape[2:], pick(dx)
    launch.launch(
        _avg_pool_grad_kernel, programs(dx, tile),
        dy, dx, n * math.prod(image), c, *image, *outputs, *dy.stride(), *dx.stride(), *windows.padding, *windows.kernel,
        **windows.gathering(image, outputs),
        PADDED=padded, DIVISOR=divisor, ALIKE=_alike(windows, dx.shape[2:], outputs, padded, divisor),
        ACC=tiles.triton_dtype(torch.promote_types(dx.dtype, torch.float32)),
        WIDE=launch.wide(dy, dx) or windows.wide(image, outputs),
        TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip
