"""Depthwise convolution. Every channel has a filter of its own, so there is no matrix product, and memory limits the speed.

    y[n, c, p, q]  = then(norm(bias[c] + sum_{r, s} x[n, c, p*stride - padding + r*dilation, ...] w[c, r, s]))
    dx[n, c, h, v] = sum_{r, s} dz[n, c, (h + padding - r*dilation) / stride, ...] w[c, r, s]
    dw[c, r, s]    = sum_{n, p, q} dz[n, c, p, q] x[n, c, p*stride - padding + r*dilation, ...]

In channels_last every load and store is a vector of channels; in NCHW neighbouring threads read neighbouring pixels. A pixel is
read for several taps, but only once from memory, and then from the caches.
"""

import torch
import triton
import triton.language as tl

from .. import epilogues
from ..reduce import sum_partials
from ..runtime import launch, tiles
from . import tiles as picks
from .geometry import Geometry
from .layout import channels_last


@triton.jit
def _depthwise_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, residual_ptr, z_ptr,
    PIXELS, C, H, W, OH, OW, x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w, pad_h, pad_w,
    A0: tl.float64, A1: tl.float64,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, INPUT_GRAD: tl.constexpr, EPS: tl.constexpr, THEN: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M of the pixels of y (N, C, OH, OW) by TILE_N channels. With INPUT_GRAD, y is dx and x is dz, and the sum
    runs over the taps that lead to a pixel of dz. w is (R, S, C), contiguous."""
    tiles_n = tl.cdiv(C, TILE_N)
    pid_n = tl.program_id(0) % tiles_n
    pid_m = tl.program_id(0) // tiles_n
    if WIDE:
        pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)
    m = pid_m * TILE_M + tl.arange(0, TILE_M)
    c = pid_n * TILE_N + tl.arange(0, TILE_N)
    m_inside = m < PIXELS
    c_inside = c < C
    ow = m % OW
    oh = m // OW % OH
    n = m // (OW * OH)

    accumulator = tl.zeros((TILE_M, TILE_N), ACC)
    for r in range(R):
        if INPUT_GRAD:
            h = oh + pad_h - r * DILATION_H
            row_inside = m_inside & (h >= 0) & (h % STRIDE_H == 0)
            h = h // STRIDE_H
            row_inside &= h < H
        else:
            h = oh * STRIDE_H - pad_h + r * DILATION_H
            row_inside = m_inside & (h >= 0) & (h < H)
        for s in tl.static_range(S):
            if INPUT_GRAD:
                v = ow + pad_w - s * DILATION_W
                inside = row_inside & (v >= 0) & (v % STRIDE_W == 0)
                v = v // STRIDE_W
                inside &= v < W
            else:
                v = ow * STRIDE_W - pad_w + s * DILATION_W
                inside = row_inside & (v >= 0) & (v < W)
            offsets = (n * x_n + h * x_h + v * x_w)[:, None] + (c * x_c)[None, :]
            x = tl.load(x_ptr + offsets, mask=inside[:, None] & c_inside[None, :], other=0.0).to(ACC)
            w = tl.load(w_ptr + ((r * S + s) * C + c), mask=c_inside, other=0.0).to(ACC)
            accumulator += x * w[None, :]

    offsets = (n * y_n + oh * y_h + ow * y_w)[:, None] + (c * y_c)[None, :]
    inside = m_inside[:, None] & c_inside[None, :]
    accumulator = epilogues.finish(
        accumulator, c, c_inside, 1, bias_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr,
        residual_ptr, z_ptr, offsets, inside, A0, A1, EPS, THEN,
    )  # fmt: skip
    tl.store(y_ptr + offsets, accumulator.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _depthwise_weight_grad_kernel(
    dz_ptr, x_ptr, dw_ptr,
    PIXELS, C, H, W, OH, OW, pixels_per_split, dz_n, dz_c, dz_h, dz_w, x_n, x_c, x_h, x_w, pad_h, pad_w,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    TAPS: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: dw of one row of S <= TAPS taps, for TILE_N channels, over one share of the pixels of dz (N, C, OH, OW).
    dw is a workspace (splits, R, S, C)."""
    tiles_n = tl.cdiv(C, TILE_N)
    r = tl.program_id(0) % R  # neighbouring programs read the same pixels
    pid_n = tl.program_id(0) // R % tiles_n
    split = tl.program_id(0) // (R * tiles_n)
    s = tl.arange(0, TAPS)
    m = tl.arange(0, TILE_M)
    c = pid_n * TILE_N + tl.arange(0, TILE_N)
    if WIDE:
        m, c, split = m.to(tl.int64), c.to(tl.int64), split.to(tl.int64)
    c_inside = c < C
    begin = split * pixels_per_split
    end = tl.minimum(begin + pixels_per_split, PIXELS)

    accumulator = tl.zeros((TAPS, TILE_M, TILE_N), ACC)
    for start in range(begin, end, TILE_M):
        pixel = start + m
        pixel_inside = pixel < end
        ow = pixel % OW
        oh = pixel // OW % OH
        n = pixel // (OW * OH)
        dz_pixel = n * dz_n + oh * dz_h + ow * dz_w
        inside = pixel_inside[:, None] & c_inside[None, :]
        dz = tl.load(dz_ptr + (dz_pixel[:, None] + (c * dz_c)[None, :]), mask=inside, other=0.0).to(ACC)
        h = oh * STRIDE_H - pad_h + r * DILATION_H
        v = (ow * STRIDE_W - pad_w)[None, :] + (s * DILATION_W)[:, None]
        hit = (s < S)[:, None] & (pixel_inside & (h >= 0) & (h < H))[None, :] & (v >= 0) & (v < W)
        x_pixel = (n * x_n + h * x_h)[None, :] + v * x_w
        inside = hit[:, :, None] & c_inside[None, None, :]
        x = tl.load(x_ptr + (x_pixel[:, :, None] + (c * x_c)[None, None, :]), mask=inside, other=0.0).to(ACC)
        accumulator += x * dz[None, :, :]

    offsets = ((split * R + r) * S + s)[:, None] * C + c[None, :]
    tl.store(dw_ptr + offsets, tl.sum(accumulator, axis=1), mask=(s < S)[:, None] & c_inside[None, :])


def takes(w: torch.Tensor, groups: int) -> bool:
    """Whether a convolution is depthwise: there are as many groups as input channels and as output channels."""
    return groups > 1 and w.shape[1] == 1 and w.shape[0] == groups and w.shape[3] <= 64


def conv2d(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    geometry: Geometry,
    *,
    then: epilogues.Activation | None = None,
    norm: epilogues.Norm | None = None,
    residual: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    input_grad: bool = False,
) -> torch.Tensor:
    """As `gather.conv2d`, for depthwise convolutions. With `input_grad`, x is dz and y
    is dx."""
    _, c, height, width = x.shape
    n, _, oh, ow = y.shape
    r, s = w.shape[2:]
    by_channel = channels_last(w.transpose(0, 1))  # (1, C, R, S): in memory (R, S, C)
    vectors = launch.vectors(x) and launch.vectors(y)
    tile = picks.depthwise(c, x.dtype, channels_last=x.stride(1) == 1 == y.stride(1), vectors=vectors)
    function, options = epilogues.tile_function(then)
    launch.launch(
        _depthwise_kernel, tiles.cdiv(n * oh * ow, tile.m) * tiles.cdiv(c, tile.n),
        x, by_channel, bias, y, *epilogues.tensors(norm), residual, z,
        n * oh * ow, c, height, width, oh, ow, *x.stride(), *y.stride(), *geometry.padding, *options,
        **geometry.constexprs((r, s)),
        INPUT_GRAD=input_grad, EPS=0.0 if norm is None else norm.eps, THEN=function,
        ACC=tiles.triton_dtype(torch.promote_types(x.dtype, torch.float32)), WIDE=launch.wide(x, y),
        TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    return y


def conv2d_weight_grad(dz: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """As `gather.conv2d_weight_grad`, for depthwise convolutions. The taps of a channel of dw are at equal distances."""
    n, c, height, width = x.shape
    r, s = dw.shape[2:]
    oh, ow = dz.shape[2:]
    pixels = n * oh * ow
    accumulate = torch.promote_types(x.dtype, torch.float32)
    tile, splits = picks.depthwise_weight_grad(
        c, pixels, r, s, x.dtype, tiles.device(x.device), channels_last=x.stride(1) == 1 == dz.stride(1)
    )
    partials = launch.empty((splits, r * s, c), dtype=accumulate, device=x.device)
    launch.launch(
        _depthwise_weight_grad_kernel, splits * r * tiles.cdiv(c, tile.n),
        dz, x, partials, pixels, c, height, width, oh, ow, tiles.cdiv(pixels, splits),
        *dz.stride(), *x.stride(), *geometry.padding,
        **geometry.constexprs((r, s)),
        ACC=tiles.triton_dtype(accumulate), WIDE=launch.wide(dz, x),
        TAPS=tile.k, TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    sum_partials(partials, dw.as_strided((r * s, c), (dw.stride(3), dw.stride(0))))
    return dw
