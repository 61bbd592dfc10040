"""Maximum pooling: y = max of a window of x, and the place of the maximum within the window, which is all that the gradient
needs: dx at a pixel = sum of dy over the windows that hold the pixel and whose maximum it is.

The gradient is gathered: every pixel of dx adds up, in a fixed order, and is written once, without atomic operations. As in
torch, of equal pixels the first is the maximum, and of NaNs the last.

A window of many pixels is shared among the threads of a program, as an average's is.
"""

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
def _better(x_ptr, offsets, hit, c_inside, number, best, place):
    """The maximum and its place after one more pixel of the window has been seen."""
    mask = hit[:, None] & c_inside[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=float("-inf")).to(best.dtype)
    better = ((x > best) | (x != x) | (place < 0)) & hit[:, None]
    return tl.where(better, x, best), tl.where(better, number, place)


@triton.jit
def _max_pool_kernel(
    x_ptr, y_ptr, place_ptr, index_ptr, POSITIONS, C, D, H, W, OD, OH, OW,
    x_n, x_c, x_d, x_h, x_w, y_n, y_c, y_d, y_h, y_w, pad_d, pad_h, pad_w,
    K_D: tl.constexpr, K_H: tl.constexpr, K_W: tl.constexpr, S_D: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, ADAPTIVE: tl.constexpr,
    UNROLLED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M pixels of y by TILE_N channels. The places, and the indices in x's image, lie as y does."""
    m, c, m_inside, c_inside = tile_of(POSITIONS, C, WIDE, TILE_M, TILE_N)
    n, od, oh, ow = coordinates(m, OD, OH, OW)
    d_begin, d_end = window(od, D, OD, K_D, S_D, DILATION_D, pad_d, ADAPTIVE)
    h_begin, h_end = window(oh, H, OH, K_H, S_H, DILATION_H, pad_h, ADAPTIVE)
    w_begin, w_end = window(ow, W, OW, K_W, S_W, DILATION_W, pad_w, ADAPTIVE)
    x_ptr += (n * x_n)[:, None] + (c * x_c)[None, :]
    best = tl.full((TILE_M, TILE_N), float("-inf"), ACC)
    place = tl.full((TILE_M, TILE_N), -1, tl.int32)
    for i in range(K_D):
        d = d_begin + i * DILATION_D
        plane_inside = m_inside & (d >= 0) & (d < d_end)
        for j in range(K_H):
            h = h_begin + j * DILATION_H
            row_inside = plane_inside & (h >= 0) & (h < h_end)
            row = d * x_d + h * x_h
            if UNROLLED:
                for k in tl.static_range(K_W):
                    w = w_begin + k * DILATION_W
                    hit, number = row_inside & (w >= 0) & (w < w_end), (i * K_H + j) * K_W + k
                    best, place = _better(x_ptr, (row + w * x_w)[:, None], hit, c_inside, number, best, place)
            else:
                for k in range(K_W):
                    w = w_begin + k * DILATION_W
                    hit, number = row_inside & (w >= 0) & (w < w_end), (i * K_H + j) * K_W + k
                    best, place = _better(x_ptr, (row + w * x_w)[:, None], hit, c_inside, number, best, place)

    offsets = (n * y_n + od * y_d + oh * y_h + ow * y_w)[:, None] + (c * y_c)[None, :]
    inside = m_inside[:, None] & c_inside[None, :]
    tl.store(y_ptr + offsets, best.to(y_ptr.dtype.element_ty), mask=inside)
    if place_ptr is not None:
        tl.store(place_ptr + offsets, place.to(place_ptr.dtype.element_ty), mask=inside)
    if index_ptr is not None:
        d = d_begin[:, None] + place // (K_W * K_H) * DILATION_D
        h = h_begin[:, None] + place // K_W % K_H * DILATION_H
        w = w_begin[:, None] + place % K_W * DILATION_W
        tl.store(index_ptr + offsets, (d.to(tl.int64) * H + h) * W + w, mask=inside)


@triton.jit
def _max_pool_large_kernel(
    x_ptr, y_ptr, place_ptr, index_ptr, WINDOWS, C, D, H, W, OD, OH, OW,
    x_n, x_c, x_d, x_h, x_w, y_n, y_c, y_d, y_h, y_w, pad_d, pad_h, pad_w, K_D, K_H, K_W, S_D, S_H, S_W,
    DILATION_D, DILATION_H, DILATION_W,
    LAST: tl.constexpr, ROW: tl.constexpr, ADAPTIVE: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M windows, TILE_K pixels of each at a time. Each of the TILE_K lanes keeps a maximum of its own until the
    end. Places and indices are those of `_max_pool_kernel`."""
    n, c, od, oh, ow, m_inside = windows_of(WINDOWS, C, OD, OH, OW, LAST, WIDE, TILE_M)
    d_begin, d_end = window(od, D, OD, K_D, S_D, DILATION_D, pad_d, ADAPTIVE)
    h_begin, h_end = window(oh, H, OH, K_H, S_H, DILATION_H, pad_h, ADAPTIVE)
    w_begin, w_end = window(ow, W, OW, K_W, S_W, DILATION_W, pad_w, ADAPTIVE)
    x_ptr += n * x_n + c * x_c
    best = tl.full((TILE_M, TILE_K), float("-inf"), ACC)
    place = tl.full((TILE_M, TILE_K), -1, tl.int32)
    for start in range(0, K_D * K_H * K_W, TILE_K):
        k = start + tl.arange(0, TILE_K)
        offsets, inside = pixels_of(
            k, d_begin, h_begin, w_begin, d_end, h_end, w_end, K_H, K_W,
            DILATION_D, DILATION_H, DILATION_W, x_d, x_h, x_w, ROW,
        )  # fmt: skip
        inside &= m_inside[:, None] & (k < K_D * K_H * K_W)[None, :]
        x = tl.load(x_ptr[:, None] + offsets, mask=inside, other=float("-inf")).to(ACC)
        better = ((x > best) | (x != x) | (place < 0)) & inside
        best, place = tl.where(better, x, best), tl.where(better, k[None, :], place)

    seen = place >= 0
    top = tl.max(tl.where(best == best, best, float("-inf")), axis=1)
    first = tl.min(tl.where(seen & (best == top[:, None]), place, 2147483647), axis=1)
    last_nan = tl.max(tl.where(best != best, place, -1), axis=1)
    top = tl.where(last_nan < 0, top, float("nan"))
    first = tl.where(last_nan < 0, first, last_nan)
    offsets = n * y_n + c * y_c + od * y_d + oh * y_h + ow * y_w
    tl.store(y_ptr + offsets, top.to(y_ptr.dtype.element_ty), mask=m_inside)
    if place_ptr is not None:
        tl.store(place_ptr + offsets, first.to(place_ptr.dtype.element_ty), mask=m_inside)
    if index_ptr is not None:
        d = d_begin + first // (K_W * K_H) * DILATION_D
        h = h_begin + first // K_W % K_H * DILATION_H
        w = w_begin + first % K_W * DILATION_W
        tl.store(index_ptr + offsets, (d.to(tl.int64) * H + h) * W + w, mask=m_inside)


@triton.jit
def _chosen(dy_ptr, place_ptr, dy_offsets, place_offsets, mask, number):
    """dy where the maximum is the pixel of this number in its window."""
    place = tl.load(place_ptr + place_offsets, mask=mask, other=0).to(tl.int32)
    dy = tl.load(dy_ptr + dy_offsets, mask=mask, other=0.0)
    return tl.where(place == number[:, None], dy, 0.0)


@triton.jit
def _max_pool_grad_kernel(
    dy_ptr, place_ptr, dx_ptr, POSITIONS, C, D, H, W, OD, OH, OW,
    dy_n, dy_c, dy_d, dy_h, dy_w, place_n, place_c, place_d, place_h, place_w, dx_n, dx_c, dx_d, dx_h, dx_w,
    pad_d, pad_h, pad_w, K_D, K_H, K_W,
    KERNEL: tl.constexpr, S_D: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, ADAPTIVE: tl.constexpr,
    HOLDERS_D: tl.constexpr, HOLDERS_H: tl.constexpr, HOLDERS_W: tl.constexpr,
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
    place_ptr += (n * place_n)[:, None] + (c * place_c)[None, :]
    total = tl.zeros((TILE_M, TILE_N), ACC)
    for i in range(HOLDERS_D):
        od, r, d_held = holder(d, i, D, OD, SIZE_D, S_D, DILATION_D, pad_d, ADAPTIVE)
        for j in range(HOLDERS_H):
            oh, s, h_held = holder(h, j, H, OH, SIZE_H, S_H, DILATION_H, pad_h, ADAPTIVE)
            held = m_inside & d_held & h_held
            dy_row, place_row, number = od * dy_d + oh * dy_h, od * place_d + oh * place_h, (r * SIZE_H + s) * SIZE_W
            if UNROLLED:
                for k in tl.static_range(HOLDERS_W):
                    ow, t, w_held = holder(w, k, W, OW, SIZE_W, S_W, DILATION_W, pad_w, ADAPTIVE)
                    mask = (held & w_held)[:, None] & c_inside[None, :]
                    dy_offsets, place_offsets = (dy_row + ow * dy_w)[:, None], (place_row + ow * place_w)[:, None]
                    total += _chosen(dy_ptr, place_ptr, dy_offsets, place_offsets, mask, number + t).to(ACC)
            else:
                for k in range(HOLDERS_W):
                    ow, t, w_held = holder(w, k, W, OW, SIZE_W, S_W, DILATION_W, pad_w, ADAPTIVE)
                    mask = (held & w_held)[:, None] & c_inside[None, :]
                    dy_offsets, place_offsets = (dy_row + ow * dy_w)[:, None], (place_row + ow * place_w)[:, None]
                    total += _chosen(dy_ptr, place_ptr, dy_offsets, place_offsets, mask, number + t).to(ACC)

    offsets = (n * dx_n + d * dx_d + h * dx_h + w * dx_w)[:, None] + (c * dx_c)[None, :]
    tl.store(dx_ptr + offsets, total.to(dx_ptr.dtype.element_ty), mask=m_inside[:, None] & c_inside[None, :])


def max_pool(
    x: torch.Tensor, y: torch.Tensor, place: torch.Tensor | None, index: torch.Tensor | None, windows: Windows
) -> None:
    """y = the maximum of each window; `place` = its number among the window's pixels; `index` = its number in the image.

    Shape: x (N, C, D, H, W) with any strides, y (N, C, OD, OH, OW) with any, place and index as y in shape and strides.
    Dtype: x and y floating, the same; place any integer that holds windows.taps - 1, index int64.
    """
    outputs = y.shape[2:]
    accumulate = tiles.triton_dtype(torch.promote_types(x.dtype, torch.float32))
    meta = dict(ACC=accumulate, WIDE=launch.wide(x, y) or windows.wide(x.shape[2:], outputs))
    if windows.taps >= LARGE:
        x, windows = rows(x, windows)
        last = x.stride(1) == 1 and x.shape[1] > 1
        tile = large_tile(windows.taps, last)
        launch.launch(
            _max_pool_large_kernel, tiles.cdiv(y.numel(), tile.m),
            x, y, place, index, y.numel(), *x.shape[1:], *outputs, *x.stride(), *y.stride(),
            *windows.padding, *windows.kernel, *windows.stride, *windows.dilation,
            **meta, LAST=last, ROW=windows.kernel[:2] == (1, 1), ADAPTIVE=windows.adaptive,
            TILE_M=tile.m, TILE_K=tile.n, num_warps=tile.warps,
        )  # fmt: skip
        return
    x, y, place, index = merged(x, y, place, index)  # type: ignore[assignment]
    n, c, *image = x.shape
    tile = pick(x)
    launch.launch(
        _max_pool_kernel, programs(y, tile),
        x, y, place, index, n * outputs.numel(), c, *image, *outputs, *x.stride(), *y.stride(), *windows.padding,
        **windows.constexprs(), **meta, UNROLLED=unrolled(windows.kernel[2]),
        TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip


def max_pool_grad(dy: torch.Tensor, place: torch.Tensor, dx: torch.Tensor, windows: Windows) -> None:
    """dx = the sum of dy over the windows whose maximum a pixel is.

    Shape: dy and place (N, C, OD, OH, OW), dx (N, C, D, H, W), all with any strides.
    Dtype: dy and dx floating, the same; place an integer; sums in float32 (float64).
    """
    if dy.numel() == 0:
        dx.zero_()
        return
    dy, place, dx = merged(dy, place, dx)  # type: ignore[assignment]
    _, c, *image = dx.shape
    outputs, tile = dy.shape[2:], pick(dx)
    launch.launch(
        _max_pool_grad_kernel, programs(dx, tile),
        dy, place, dx, dx.numel() // c, c, *image, *outputs, *dy.stride(), *place.stride(), *dx.stride(),
        *windows.padding, *windows.kernel, **windows.gathering(image, outputs),
        ACC=tiles.triton_dtype(torch.promote_types(dx.dtype, torch.float32)),
        WIDE=launch.wide(dy, place, dx) or windows.wide(image, outputs),
        TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip
