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
from ..runtime.tiles import Tile
from .positions import coordinates, holder, merged, pick, programs, tile_of, window
from .windows import Windows, unrolled

_LARGE = 32
"""From so many pixels on a window is shared among threads."""
_MEAN = {64: Tile(16, 64, warps=4), 512: Tile(2, 512, warps=4), 2048: Tile(1, 2048, warps=4)}
"""m windows, n pixels at a time, by the most pixels for which it is taken; the last one for all beyond."""
_MEAN_LAST = Tile(32, 64, warps=4)
"""m windows of adjacent channels, n pixels at a time, in channels_last."""


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
    LAST: tl.constexpr, ADAPTIVE: tl.constexpr, PADDED: tl.constexpr, DIVISOR: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M windows, TILE_K pixels of each at a time. With LAST, the windows of a place's channels follow each
    other, otherwise those of a channel."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    m = pid * TILE_M + tl.arange(0, TILE_M)
    m_inside = m < WINDOWS
    if LAST:
        c = m % C
        n, od, oh, ow = coordinates(m // C, OD, OH, OW)
    else:
        nc, od, oh, ow = coordinates(m, OD, OH, OW)
        n, c = nc // C, nc % C
    d_begin, d_end = window(od, D, OD, K_D, S_D, 1, pad_d, ADAPTIVE)
    h_begin, h_end = window(oh, H, OH, K_H, S_H, 1, pad_h, ADAPTIVE)
    w_begin, w_end = window(ow, W, OW, K_W, S_W, 1, pad_w, ADAPTIVE)
    x_ptr += n * x_n + c * x_c
    total = tl.zeros((TILE_M, TILE_K), ACC)
    for start in range(0, K_D * K_H * K_W, TILE_K):
        k = start + tl.arange(0, TILE_K)
        d = d_begin[:, None] + (k // (K_W * K_H))[None, :]
        h = h_begin[:, None] + (k // K_W % K_H)[None, :]
        w = w_begin[:, None] + (k % K_W)[None, :]
        inside = m_inside[:, None] & (d >= 0) & (h >= 0) & (w >= 0)
        inside &= (d < d_end[:, None]) & (h < h_end[:, None]) & (w < w_end[:, None])
        total += tl.load(x_ptr[:, None] + (d * x_d + h * x_h + w * x_w), mask=inside, other=0.0).to(ACC)

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
    dy_n, dy_c, dy_d, dy_h, dy_w, dx_n, dx_c, dx_d, dx_h, dx_w, pad_d, pad_h, pad_w,
    K_D: tl.constexpr, K_H: tl.constexpr, K_W: tl.constexpr, S_D: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, ADAPTIVE: tl.constexpr,
    HOLDERS_D: tl.constexpr, HOLDERS_H: tl.constexpr, HOLDERS_W: tl.constexpr,
    PADDED: tl.constexpr, DIVISOR: tl.constexpr, ALIKE: tl.constexpr,
    UNROLLED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M pixels of dx by TILE_N channels, each from the windows that may hold it."""
    m, c, m_inside, c_inside = tile_of(POSITIONS, C, WIDE, TILE_M, TILE_N)
    n, d, h, w = coordinates(m, D, H, W)
    dy_ptr += (n * dy_n)[:, None] + (c * dy_c)[None, :]
    total = tl.zeros((TILE_M, TILE_N), ACC)
    for i in range(HOLDERS_D):
        od, _, d_held = holder(d, i, D, OD, K_D, S_D, 1, pad_d, ADAPTIVE)
        d_begin, d_end = window(od, D, OD, K_D, S_D, 1, pad_d, ADAPTIVE)
        d_count = _count(d_begin, d_end, K_D, D, pad_d, PADDED, ADAPTIVE)
        for j in range(HOLDERS_H):
            oh, _, h_held = holder(h, j, H, OH, K_H, S_H, 1, pad_h, ADAPTIVE)
            h_begin, h_end = window(oh, H, OH, K_H, S_H, 1, pad_h, ADAPTIVE)
            plane = d_count * _count(h_begin, h_end, K_H, H, pad_h, PADDED, ADAPTIVE)
            held = m_inside & d_held & h_held
            row = od * dy_d + oh * dy_h
            if UNROLLED:
                for k in tl.static_range(HOLDERS_W):
                    ow, _, w_held = holder(w, k, W, OW, K_W, S_W, 1, pad_w, ADAPTIVE)
                    w_begin, w_end = window(ow, W, OW, K_W, S_W, 1, pad_w, ADAPTIVE)
                    count = plane * _count(w_begin, w_end, K_W, W, pad_w, PADDED, ADAPTIVE)
                    mask = (held & w_held)[:, None] & c_inside[None, :]
                    total += _share(dy_ptr, (row + ow * dy_w)[:, None], mask, count, DIVISOR, ALIKE, ACC)
            else:
                for k in range(HOLDERS_W):
                    ow, _, w_held = holder(w, k, W, OW, K_W, S_W, 1, pad_w, ADAPTIVE)
                    w_begin, w_end = window(ow, W, OW, K_W, S_W, 1, pad_w, ADAPTIVE)
                    count = plane * _count(w_begin, w_end, K_W, W, pad_w, PADDED, ADAPTIVE)
                    mask = (held & w_held)[:, None] & c_inside[None, :]
                    total += _share(dy_ptr, (row + ow * dy_w)[:, None], mask, count, DIVISOR, ALIKE, ACC)

    if ALIKE:
        total = total / (K_D * K_H * K_W if DIVISOR is None else DIVISOR)
    offsets = (n * dx_n + d * dx_d + h * dx_h + w * dx_w)[:, None] + (c * dx_c)[None, :]
    tl.store(dx_ptr + offsets, total.to(dx_ptr.dtype.element_ty), mask=m_inside[:, None] & c_inside[None, :])


def _large_tile(taps: int, last: bool) -> Tile:
    """The tile of windows of so many pixels, in channels_last or not."""
    tile = _MEAN_LAST if last else next((tile for most, tile in _MEAN.items() if taps <= most), _MEAN[2048])
    return tiles.ask("avg_pool_large", lambda: (tile,)) or tile


def _alike(windows: Windows, image: torch.Size, outputs: torch.Size, padded: bool, divisor: int | None) -> bool:
    """Whether every window's sum is divided by the same number."""
    if windows.adaptive:
        return False
    each = zip(windows.kernel, windows.stride, windows.padding, image, outputs, strict=True)
    return divisor is not None or all(
        [(padded or p == 0) and (o - 1) * s - p + k <= n + (p if padded else 0) for k, s, p, n, o in each]
    )


def _rows(x: torch.Tensor, windows: Windows) -> tuple[torch.Tensor, Windows]:
    """A volume whose only window is all of it, as one row of pixels if its strides allow that."""
    _, _, d, h, w = x.shape
    whole = windows.kernel == (d, h, w) and windows.padding == (0, 0, 0) and not windows.adaptive
    flat = (h == 1 or x.stride(3) == w * x.stride(4)) and (d == 1 or x.stride(2) == h * w * x.stride(4))
    if not (whole and flat):
        return x, windows
    size = d * h * w
    step = x.stride(4) if w > 1 else x.stride(3) if h > 1 else x.stride(2)
    row = x.as_strided((*x.shape[:2], 1, 1, size), (*x.stride()[:2], size * step, size * step, step))
    return row, Windows((1, 1, size), (1, 1, size))


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
    if windows.taps >= _LARGE:
        x, windows = _rows(x, windows)
        last = x.stride(1) == 1 and x.shape[1] > 1
        tile = _large_tile(windows.taps, last)
        launch.launch(
            _avg_pool_large_kernel, tiles.cdiv(y.numel(), tile.m),
            x, y, y.numel(), *x.shape[1:], *outputs, *x.stride(), *y.stride(),
            *windows.padding, *windows.kernel, *windows.stride,
            **meta, LAST=last, ADAPTIVE=windows.adaptive, TILE_M=tile.m, TILE_K=tile.n, num_warps=tile.warps,
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
    holders = windows.holders(image, outputs)
    launch.launch(
        _avg_pool_grad_kernel, programs(dx, tile),
        dy, dx, n * math.prod(image), c, *image, *outputs, *dy.stride(), *dx.stride(), *windows.padding,
        **windows.constexprs(), HOLDERS_D=holders[0], HOLDERS_H=holders[1], HOLDERS_W=holders[2],
        PADDED=padded, DIVISOR=divisor, ALIKE=_alike(windows, dx.shape[2:], outputs, padded, divisor),
        UNROLLED=unrolled(holders[2]),
        ACC=tiles.triton_dtype(torch.promote_types(dx.dtype, torch.float32)),
        WIDE=launch.wide(dy, dx) or windows.wide(image, outputs),
        TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip
