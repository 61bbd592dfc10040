"""Depthwise convolution: every channel has a filter of its own, so memory decides, and there is no matrix to multiply.

    y[n, c, p, q]  = then(norm(bias[c] + sum_{r, s} x[n, c, p*stride - padding + r*dilation, ...] w[c, r, s]))
    dx[n, c, h, v] = sum_{r, s} dz[n, c, (h + padding - r*dilation) / stride, ...] w[c, r, s]
    dw[c, r, s]    = sum_{n, p, q} dz[n, c, p, q] x[n, c, p*stride - padding + r*dilation, ...]

In channels_last every load and store is a vector of channels; in NCHW neighbouring threads take neighbouring pixels. What
the taps of a pixel share with its neighbours' comes from the caches.
"""

import torch
import triton
import triton.language as tl

from . import _launch, _tiles, epilogues
from .conv_box import channels_last
from .reduce import sum_partials

Pair = tuple[int, int]


@triton.jit
def _depthwise_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, residual_ptr,
    PIXELS, C, H, W, OH, OW, x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w, pad_h, pad_w,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, INPUT_GRAD: tl.constexpr, EPS: tl.constexpr, THEN: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M of the pixels of y (N, C, OH, OW) by TILE_N channels. With INPUT_GRAD, y is dx and x is dz, and
    of the taps those count that lead to a pixel of dz. w is (R, S, C), contiguous."""
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
        residual_ptr, offsets, inside, EPS, THEN,
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
    r = tl.program_id(0) % R  # neighbours read the same pixels
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
    """Whether this is one: as many groups as channels, and as results."""
    return groups > 1 and w.shape[1] == 1 and w.shape[0] == groups and w.shape[3] <= 64


def conv2d(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    then: str | None = None,
    norm: epilogues.Norm | None = None,
    residual: torch.Tensor | None = None,
    input_grad: bool = False,
) -> torch.Tensor:
    """As `conv.conv2d`, for as many groups as channels and with a residual that has y's strides; with `input_grad`, x is dz
    and y is dx."""
    _, c, height, width = x.shape
    n, _, oh, ow = y.shape
    r, s = w.shape[2:]
    by_channel = channels_last(w.transpose(0, 1))  # (1, C, R, S): in memory (R, S, C)
    tile = _tiles.depthwise(c, x.dtype, channels_last=x.stride(1) == 1 == y.stride(1))
    _launch.launch(
        _depthwise_kernel, _tiles.cdiv(n * oh * ow, tile.m) * _tiles.cdiv(c, tile.n),
        x, by_channel, bias, y, *epilogues.tensors(norm), residual,
        n * oh * ow, c, height, width, oh, ow, *x.stride(), *y.stride(), *padding,
        R=r, S=s, STRIDE_H=stride[0], STRIDE_W=stride[1], DILATION_H=dilation[0], DILATION_W=dilation[1],
        INPUT_GRAD=input_grad, EPS=0.0 if norm is None else norm.eps, THEN=epilogues.forward(then),
        ACC=_tiles.triton_dtype(torch.promote_types(x.dtype, torch.float32)), WIDE=_launch.wide(x, y),
        TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    return y


def conv2d_weight_grad(
    dz: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, *, stride: Pair, padding: Pair, dilation: Pair
) -> torch.Tensor:
    """As `conv.conv2d_weight_grad`, for as many groups as channels; the taps of a channel lie at one stride."""
    n, c, height, width = x.shape
    r, s = dw.shape[2:]
    oh, ow = dz.shape[2:]
    pixels = n * oh * ow
    accumulate = torch.promote_types(x.dtype, torch.float32)
    tile, splits = _tiles.depthwise_weight_grad(
        c, pixels, r, s, x.dtype, _tiles.device(x.device), channels_last=x.stride(1) == 1 == dz.stride(1)
    )
    partials = _launch.empty((splits, r * s, c), dtype=accumulate, device=x.device)
    _launch.launch(
        _depthwise_weight_grad_kernel, splits * r * _tiles.cdiv(c, tile.n),
        dz, x, partials, pixels, c, height, width, oh, ow, _tiles.cdiv(pixels, splits),
        *dz.stride(), *x.stride(), *padding,
        R=r, S=s, STRIDE_H=stride[0], STRIDE_W=stride[1], DILATION_H=dilation[0], DILATION_W=dilation[1],
        ACC=_tiles.triton_dtype(accumulate), WIDE=_launch.wide(dz, x),
        TAPS=tile.k, TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    sum_partials(partials, dw.as_strided((r * s, c), (dw.stride(3), dw.stride(0))))
    return dw
