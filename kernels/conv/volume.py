"""Convolution over volumes as an implicit matrix product: what `gather` does for images, with a dimension more.

    y[n, o, d, h, v]  = then(bias[o] + sum_{c, t, r, s} x[n, c, d*stride - padding + t*dilation, ...] w[o, c, t, r, s])
    dx[n, c, d, h, v] = sum_{o, t, r, s} dz[n, o, (d + padding - t*dilation) / stride, ...] w[o, c, t, r, s]
    dw[o, c, t, r, s] = sum_{n, d, h, v} dz[n, o, d, h, v] x[n, c, d*stride - padding + t*dilation, ...]

Elements are gathered through strides, so that any memory format runs the same kernels.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .. import epilogues
from ..reduce import sum_partials
from ..runtime import launch, tiles
from . import tiles as picks
from .boxes import first_tap
from .geometry import Geometry
from .layout import channels_last as channels_last_copy


@triton.jit
def _begin(
    number, pad, TAPS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, STEP: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
):  # fmt: skip
    """Along one dimension, for the pixels of one class: the first tap, how many taps there are, and how far what the first one
    reads is from the pixel's place in the class."""
    if INPUT_GRAD:
        first = first_tap(number + pad, TAPS, STRIDE, DILATION)
        return first, tl.cdiv(TAPS - first, STEP), (number + pad - first * DILATION) // STRIDE
    else:
        return number * 0, number * 0 + TAPS, number * 0 - pad


@triton.jit
def _volume_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, residual_ptr, z_ptr,
    N, C, D, H, W, O, OD, OH, OW,
    x_n, x_c, x_d, x_h, x_w, w_group, w_y, w_x, w_t, w_r, w_s, y_n, y_c, y_d, y_h, y_w, pad_d, pad_h, pad_w,
    A0: tl.float64, A1: tl.float64,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    STEP_D: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, INPUT_GRAD: tl.constexpr,
    EPS: tl.constexpr, THEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, ONE_TAP: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: a tile of y (N, groups*O, OD, OH, OW) of TILE_M pixels by TILE_N channels of one group, from x (N, groups*C,
    D, H, W). With INPUT_GRAD, y is dx and x is dz. Pixels of y that are congruent modulo the stride then form a class, as in
    `gather`, and all pixels of a program are of one; otherwise all pixels are one class.

    K runs over (tap of the class, c), with c fastest. With ONE_TAP, TILE_K divides the channels of a group, and every step of the
    loop reads TILE_K channels of a single tap.
    """
    # Along each dimension: how many classes there are, how far apart the pixels of x are that neighbours in a class read, and how
    # far those that the next tap reads.
    CLASSES_D: tl.constexpr = STRIDE_D if INPUT_GRAD else 1
    CLASSES_H: tl.constexpr = STRIDE_H if INPUT_GRAD else 1
    CLASSES_W: tl.constexpr = STRIDE_W if INPUT_GRAD else 1
    NEXT_D: tl.constexpr = 1 if INPUT_GRAD else STRIDE_D
    NEXT_H: tl.constexpr = 1 if INPUT_GRAD else STRIDE_H
    NEXT_W: tl.constexpr = 1 if INPUT_GRAD else STRIDE_W
    MOVE_D: tl.constexpr = -(STEP_D * DILATION_D // STRIDE_D) if INPUT_GRAD else DILATION_D
    MOVE_H: tl.constexpr = -(STEP_H * DILATION_H // STRIDE_H) if INPUT_GRAD else DILATION_H
    MOVE_W: tl.constexpr = -(STEP_W * DILATION_W // STRIDE_W) if INPUT_GRAD else DILATION_W
    largest = N * tl.cdiv(OD, CLASSES_D) * tl.cdiv(OH, CLASSES_H) * tl.cdiv(OW, CLASSES_W)
    tiles_m = tl.cdiv(largest, TILE_M)
    tiles_n = tl.cdiv(O, TILE_N)
    pid_n = tl.program_id(0) % tiles_n
    pid_m = tl.program_id(0) // tiles_n % tiles_m
    rest = tl.program_id(0) // (tiles_n * tiles_m)
    class_w = rest % CLASSES_W
    class_h = rest // CLASSES_W % CLASSES_H
    class_d = rest // (CLASSES_W * CLASSES_H) % CLASSES_D
    group = rest // (CLASSES_W * CLASSES_H * CLASSES_D)
    k = tl.arange(0, TILE_K)
    if WIDE:
        pid_m, pid_n, group, k = pid_m.to(tl.int64), pid_n.to(tl.int64), group.to(tl.int64), k.to(tl.int64)
    # The pixels of this class form a volume of their own, which may be empty.
    deep = tl.cdiv(OD - class_d, CLASSES_D)
    down = tl.cdiv(OH - class_h, CLASSES_H)
    across = tl.cdiv(OW - class_w, CLASSES_W)
    m = pid_m * TILE_M + tl.arange(0, TILE_M)
    o = pid_n * TILE_N + tl.arange(0, TILE_N)
    m_inside = m < N * deep * down * across
    o_inside = o < O
    deep, down, across = tl.maximum(deep, 1), tl.maximum(down, 1), tl.maximum(across, 1)
    w = m % across
    h = m // across % down
    d = m // (across * down) % deep
    n = m // (across * down * deep)
    first_t, taps_d, shift_d = _begin(class_d, pad_d, T, STRIDE_D, DILATION_D, STEP_D, INPUT_GRAD)
    first_r, taps_h, shift_h = _begin(class_h, pad_h, R, STRIDE_H, DILATION_H, STEP_H, INPUT_GRAD)
    first_s, taps_w, shift_w = _begin(class_w, pad_w, S, STRIDE_W, DILATION_W, STEP_W, INPUT_GRAD)
    x_deep = d * NEXT_D + shift_d
    x_down = h * NEXT_H + shift_h
    x_across = w * NEXT_W + shift_w
    x_pixel = n * x_n + x_deep * x_d + x_down * x_h + x_across * x_w + group * C * x_c
    w_ptr += group * w_group

    accumulator = tl.zeros((TILE_M, TILE_N), ACC)
    taps = taps_d * taps_h * taps_w
    if ONE_TAP:
        for step in range(0, C // TILE_K * taps):
            tap = step % taps
            c = step // taps * TILE_K + k
            i = tap // (taps_h * taps_w)
            j = tap // taps_w % taps_h
            v = tap % taps_w
            if WIDE:
                i, j, v = i.to(tl.int64), j.to(tl.int64), v.to(tl.int64)
            dd = x_deep + i * MOVE_D
            hh = x_down + j * MOVE_H
            ww = x_across + v * MOVE_W
            hit = m_inside & (dd >= 0) & (dd < D) & (hh >= 0) & (hh < H) & (ww >= 0) & (ww < W)
            x_tap = x_ptr + (i * MOVE_D * x_d + j * MOVE_H * x_h + v * MOVE_W * x_w)
            w_tap = w_ptr + ((first_t + i * STEP_D) * w_t + (first_r + j * STEP_H) * w_r + (first_s + v * STEP_W) * w_s)
            a = tl.load(x_tap + (x_pixel[:, None] + (c * x_c)[None, :]), mask=hit[:, None], other=0.0)
            b = tl.load(w_tap + ((c * w_x)[:, None] + (o * w_y)[None, :]), mask=o_inside[None, :], other=0.0)
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=ACC)
    else:
        for start in range(0, taps * C, TILE_K):
            c = (start + k) % C
            tap = (start + k) // C
            i = tap // (taps_h * taps_w)
            j = tap // taps_w % taps_h
            v = tap % taps_w
            dd = x_deep[:, None] + (i * MOVE_D)[None, :]
            hh = x_down[:, None] + (j * MOVE_H)[None, :]
            ww = x_across[:, None] + (v * MOVE_W)[None, :]
            k_inside = i < taps_d
            hit = m_inside[:, None] & k_inside[None, :] & (dd >= 0) & (dd < D)
            hit &= (hh >= 0) & (hh < H) & (ww >= 0) & (ww < W)
            x_tap = i * MOVE_D * x_d + j * MOVE_H * x_h + v * MOVE_W * x_w + c * x_c
            w_tap = (first_t + i * STEP_D) * w_t + (first_r + j * STEP_H) * w_r + (first_s + v * STEP_W) * w_s + c * w_x
            a = tl.load(x_ptr + (x_pixel[:, None] + x_tap[None, :]), mask=hit, other=0.0)
            w_inside = k_inside[:, None] & o_inside[None, :]
            b = tl.load(w_ptr + (w_tap[:, None] + (o * w_y)[None, :]), mask=w_inside, other=0.0)
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=ACC)

    channel = group * O + o
    y_pixel = n * y_n + (d * CLASSES_D + class_d) * y_d
    y_pixel += (h * CLASSES_H + class_h) * y_h + (w * CLASSES_W + class_w) * y_w
    offsets = y_pixel[:, None] + (channel * y_c)[None, :]
    inside = m_inside[:, None] & o_inside[None, :]
    accumulator = epilogues.finish(
        accumulator, channel, o_inside, 1, bias_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr,
        residual_ptr, z_ptr, offsets, inside, A0, A1, EPS, THEN,
    )  # fmt: skip
    tl.store(y_ptr + offsets, accumulator.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _volume_weight_grad_kernel(
    dz_ptr, x_ptr, dw_ptr,
    PIXELS, C, D, H, W, O, OD, OH, OW, pixels_per_split, dw_size,
    dz_n, dz_c, dz_d, dz_h, dz_w, x_n, x_c, x_d, x_h, x_w, dw_o, dw_c, dw_t, dw_r, dw_s, pad_d, pad_h, pad_w,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: a tile of dw of TILE_M output channels by TILE_N columns (t, r, s, c) of one group, over one share of the
    output pixels. With SPLITS > 1, dw is a workspace of SPLITS tensors laid out like dw."""
    columns = T * R * S * C
    tiles_m = tl.cdiv(O, TILE_M)
    tiles_n = tl.cdiv(columns, TILE_N)
    pid_n = tl.program_id(0) % tiles_n
    pid_m = tl.program_id(0) // tiles_n % tiles_m
    rest = tl.program_id(0) // (tiles_n * tiles_m)
    split = rest % SPLITS
    group = rest // SPLITS
    k = tl.arange(0, TILE_K)
    if WIDE:
        pid_m, pid_n, group, k = pid_m.to(tl.int64), pid_n.to(tl.int64), group.to(tl.int64), k.to(tl.int64)
    o = pid_m * TILE_M + tl.arange(0, TILE_M)
    column = pid_n * TILE_N + tl.arange(0, TILE_N)
    o_inside = o < O
    column_inside = column < columns
    c = column % C
    t = column // C // (R * S)
    r = column // C // S % R
    s = column // C % S
    before = t * DILATION_D - pad_d
    up = r * DILATION_H - pad_h
    left = s * DILATION_W - pad_w
    x_column = (group * C + c) * x_c + before * x_d + up * x_h + left * x_w
    dz_row = (group * O + o) * dz_c
    begin = split * pixels_per_split
    end = min(begin + pixels_per_split, PIXELS)

    accumulator = tl.zeros((TILE_M, TILE_N), ACC)
    for start in range(begin, end, TILE_K):
        pixel = start + k
        pixel_inside = pixel < end
        ow = pixel % OW
        oh = pixel // OW % OH
        od = pixel // (OW * OH) % OD
        n = pixel // (OW * OH * OD)
        dd = (od * STRIDE_D)[:, None] + before[None, :]
        hh = (oh * STRIDE_H)[:, None] + up[None, :]
        ww = (ow * STRIDE_W)[:, None] + left[None, :]
        hit = pixel_inside[:, None] & column_inside[None, :] & (dd >= 0) & (dd < D)
        hit &= (hh >= 0) & (hh < H) & (ww >= 0) & (ww < W)
        dz_pixel = n * dz_n + od * dz_d + oh * dz_h + ow * dz_w
        x_pixel = n * x_n + od * STRIDE_D * x_d + oh * STRIDE_H * x_h + ow * STRIDE_W * x_w
        dz_inside = o_inside[:, None] & pixel_inside[None, :]
        a = tl.load(dz_ptr + (dz_row[:, None] + dz_pixel[None, :]), mask=dz_inside, other=0.0)
        b = tl.load(x_ptr + (x_pixel[:, None] + x_column[None, :]), mask=hit, other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=ACC)

    dw_ptr += split.to(tl.int64) * dw_size
    offsets = ((group * O + o) * dw_o)[:, None] + (c * dw_c + t * dw_t + r * dw_r + s * dw_s)[None, :]
    tl.store(dw_ptr + offsets, accumulator.to(dw_ptr.dtype.element_ty), mask=o_inside[:, None] & column_inside[None, :])


def _constexprs(kernel: Any, geometry: Geometry) -> dict[str, int]:
    """The sizes that the kernels are compiled for."""
    sizes = dict(STRIDE=geometry.stride, DILATION=geometry.dilation)
    named = {f"{what}_{dim}": n for what, each in sizes.items() for dim, n in zip("DHW", each, strict=True)}
    return dict(zip("TRS", kernel, strict=True)) | named


def conv3d(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, geometry: Geometry, **more: Any
) -> None:
    """y = then(norm(conv(x, w) + bias) + residual), as `gather.conv2d` for volumes, with `more` as there.

    Shape: x (N, C, D, H, W), w (O, C/groups, T, R, S), bias (O,), y (N, O, OD, OH, OW), all with any strides.
    """
    _launch(x, w, y, geometry, False, bias, **more)


def conv3d_input_grad(
    dz: torch.Tensor,
    w: torch.Tensor,
    dx: torch.Tensor,
    geometry: Geometry,
    bias: torch.Tensor | None = None,
    **more: Any,
) -> None:
    """As `gather.conv2d_input_grad` for volumes, and so the transposed convolution, too.

    Shape: dz (N, O, OD, OH, OW), w (O, C/groups, T, R, S), dx (N, C, D, H, W), all with any strides; bias (C,).
    """
    _launch(dz, w, dx, geometry, True, bias, **more)


def _launch(
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    geometry: Geometry,
    input_grad: bool,
    bias: torch.Tensor | None,
    *,
    precision: str,
    then: epilogues.Activation | None = None,
    norm: epilogues.Norm | None = None,
    residual: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
) -> None:
    groups, classes = geometry.groups, geometry.stride if input_grad else (1, 1, 1)
    kernel, rows = w.shape[2:], w.shape[0] // groups
    if x.stride(1) == 1 and w.stride(1) != 1 and w.shape[1] > 1:
        # The weight is small compared with x, and otherwise the main loop would load it element by element.
        w = channels_last_copy(w.flatten(3)).unflatten(3, kernel[1:])
    o, c = (w.shape[1], rows) if input_grad else (rows, w.shape[1])
    w_y, w_x = (w.stride(1), w.stride(0)) if input_grad else w.stride()[:2]
    # Every class gets as many tiles as the largest one needs.
    pixels, programs = len(y), groups
    for size, n in zip(y.shape[2:], classes, strict=True):
        pixels, programs = pixels * tiles.cdiv(size, n), programs * n
    wide = launch.wide(x, w, y)
    vectors = not wide and c % 64 == 0 and x.stride(1) == 1 and launch.vectors(x)
    tile = picks.conv(pixels, o, x.dtype, precision, tiles.device(x.device), vectors=vectors)
    function, options = epilogues.tile_function(then)
    step = geometry.step if input_grad else (1, 1, 1)
    launch.launch(
        _volume_kernel, tiles.cdiv(pixels, tile.m) * tiles.cdiv(o, tile.n) * programs,
        x, w, None if bias is None else bias.contiguous(), y, *epilogues.tensors(norm), residual, z,
        len(y), c, *x.shape[2:], o, *y.shape[2:],
        *x.stride(), rows * w.stride(0), w_y, w_x, *w.stride()[2:], *y.stride(), *geometry.padding, *options,
        **_constexprs(kernel, geometry), STEP_D=step[0], STEP_H=step[1], STEP_W=step[2], INPUT_GRAD=input_grad,
        EPS=0.0 if norm is None else norm.eps, THEN=function,
        ACC=tiles.triton_dtype(torch.promote_types(x.dtype, torch.float32)), PRECISION=precision, WIDE=wide,
        ONE_TAP=c % tile.k == 0,
        TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def conv3d_weight_grad(
    dz: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, geometry: Geometry, *, precision: str
) -> None:
    """As `gather.conv2d_weight_grad` for volumes.

    Shape: dz (N, O, OD, OH, OW), x (N, C, D, H, W) with any strides; dw (O, C/groups, T, R, S), dense.
    """
    n, o, *outputs = dz.shape
    groups, c, kernel = geometry.groups, dw.shape[1], dw.shape[2:]
    o, pixels, columns = o // groups, n * dz.shape[2:].numel(), c * kernel.numel()
    accumulate = torch.promote_types(x.dtype, torch.float32)
    wide = launch.wide(dz, x, dw)
    vectors = not wide and all([t.stride(1) == 1 and launch.vectors(t) for t in (dz, x)])
    tile, splits = picks.conv_weight_grad(
        o, columns, pixels, groups, x.dtype, precision, tiles.device(x.device), vectors=vectors
    )
    per_split = tiles.cdiv(tiles.cdiv(pixels, tile.k), splits) * tile.k
    out = dw if splits == 1 else launch.empty((splits, dw.numel()), dtype=accumulate, device=dw.device)
    launch.launch(
        _volume_weight_grad_kernel, tiles.cdiv(o, tile.m) * tiles.cdiv(columns, tile.n) * splits * groups,
        dz, x, out, pixels, c, *x.shape[2:], o, *outputs, per_split, dw.numel(),
        *dz.stride(), *x.stride(), *dw.stride(), *geometry.padding,
        **_constexprs(kernel, geometry),
        ACC=tiles.triton_dtype(accumulate), PRECISION=precision, WIDE=wide, SPLITS=splits,
        TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        sum_partials(out, dw.as_strided((dw.numel(),), (1,)))
