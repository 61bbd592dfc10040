"""Convolution over images as an implicit matrix product: no im2col.

    y[n, o, p, q]  = then(bias[o] + sum_{c, r, s} x[n, c, p*stride - padding + r*dilation, ...] w[o, c, r, s])
    dx[n, c, h, v] = sum_{o, r, s} dz[n, o, (h + padding - r*dilation) / stride, ...] w[o, c, r, s]
    dw[o, c, r, s] = sum_{n, p, q} dz[n, o, p, q] x[n, c, p*stride - padding + r*dilation, ...]

Each is a product of a matrix of pixels with a matrix of taps. The launchers here choose between four ways: depthwise convolutions
have kernels of their own (`depthwise`); 1x1 convolutions whose pixels are at equal distances are products for `matmul`; on GPUs
with tiled tensor descriptors, large ones load boxes of pixels (`boxes`); all others use the kernels in this file, which gather
elements through strides, so that NCHW, channels_last and slices of either run the same kernel.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .. import epilogues
from ..matmul import turned
from ..matmul.matmul import matmul
from ..reduce import sum_partials
from ..runtime import launch, tiles
from . import boxes, depthwise
from . import tiles as picks
from .boxes import first_tap
from .geometry import Geometry
from .layout import as_matrix, gathered
from .layout import channels_last as channels_last_copy

_TAPS = 62
"""The number of taps that `_valid_taps` has a bit for."""


@triton.jit
def _valid_taps(inside, h, w, H, W, R: tl.constexpr, S: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr):
    """For each pixel a word, whose bit r*S + s is set if (h + r*STEP_H, w + s*STEP_W) lies in the image (H, W)."""
    row = tl.zeros(h.shape, tl.int64 if R * S > 31 else tl.int32)
    for s in tl.static_range(S):
        row |= ((w + s * STEP_W >= 0) & (w + s * STEP_W < W)).to(row.dtype) << s
    valid = tl.zeros(h.shape, row.dtype)
    for r in tl.static_range(R):
        valid |= tl.where(inside & (h + r * STEP_H >= 0) & (h + r * STEP_H < H), row << (r * S), 0)
    return valid


@triton.jit
def _conv_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, residual_ptr, z_ptr, partials_ptr,
    PIXELS, C, H, W, O, OH, OW, x_n, x_c, x_h, x_w, w_o, w_c, w_r, w_s, y_n, y_c, y_h, y_w, pad_h, pad_w,
    A0: tl.float64, A1: tl.float64,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, EPS: tl.constexpr, THEN: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, ONE_TAP: tl.constexpr, TURNED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: a tile of y of TILE_M output pixels by TILE_N channels of one group.

    K runs over (r, s, c). With ONE_TAP, TILE_K divides the channels of a group, and every step of the loop reads TILE_K channels
    of a single tap (r, s). Which pixels lie inside of the image for which tap is then computed before the loop, as one bit for
    each tap. Otherwise the columns of a step may belong to several taps.
    """
    tiles_m = tl.cdiv(PIXELS, TILE_M)
    tiles_n = tl.cdiv(O, TILE_N)
    pid_n = tl.program_id(0) % tiles_n
    pid_m = tl.program_id(0) // tiles_n % tiles_m
    group = tl.program_id(0) // (tiles_n * tiles_m)
    k = tl.arange(0, TILE_K)
    if WIDE:
        pid_m, pid_n, group, k = pid_m.to(tl.int64), pid_n.to(tl.int64), group.to(tl.int64), k.to(tl.int64)
    m = pid_m * TILE_M + tl.arange(0, TILE_M)
    o = pid_n * TILE_N + tl.arange(0, TILE_N)
    m_inside = m < PIXELS
    o_inside = o < O
    ow = m % OW
    oh = m // OW % OH
    n = m // (OW * OH)
    h = oh * STRIDE_H - pad_h
    w = ow * STRIDE_W - pad_w
    first_o = group * O
    first_c = group * C
    x_pixel = n * x_n + h * x_h + w * x_w + first_c * x_c
    w_row = (first_o + o) * w_o

    accumulator = tl.zeros((TILE_M, TILE_N), ACC)
    if ONE_TAP:
        valid = _valid_taps(m_inside, h, w, H, W, R, S, DILATION_H, DILATION_W)
        x_row = x_pixel[:, None] + (k * x_c)[None, :]
        if TURNED:
            turned_k, turned_o = turned.places(TILE_K, TILE_N)
            turned_o = pid_n * TILE_N + turned_o
            w_column = turned_k.to(k.dtype) * w_c + (first_o + turned_o) * w_o
        else:
            w_column = (k * w_c)[:, None] + w_row[None, :]
        for step in range(0, C // TILE_K * (R * S)):
            tap = step % (R * S)
            c = step // (R * S) * TILE_K
            r = tap // S
            s = tap % S
            if WIDE:
                r, s, c = r.to(tl.int64), s.to(tl.int64), c.to(tl.int64)
            x_tap = x_ptr + (r * DILATION_H * x_h + s * DILATION_W * x_w + c * x_c)
            w_tap = w_ptr + (r * w_r + s * w_s + c * w_c)
            a = tl.load(x_tap + x_row, mask=((valid >> tap) & 1 != 0)[:, None], other=0.0)
            if TURNED:
                b = turned.load(w_tap, w_column, turned_o < O, TILE_K, TILE_N)
            else:
                b = tl.load(w_tap + w_column, mask=o_inside[None, :], other=0.0)
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=ACC)
    else:
        for start in range(0, R * S * C, TILE_K):
            c = (start + k) % C
            tap = (start + k) // C
            r = tap // S
            s = tap % S
            x_tap = r * DILATION_H * x_h + s * DILATION_W * x_w + c * x_c
            w_tap = r * w_r + s * w_s + c * w_c
            hh = h[:, None] + (r * DILATION_H)[None, :]
            ww = w[:, None] + (s * DILATION_W)[None, :]
            k_inside = r < R
            hit = m_inside[:, None] & k_inside[None, :] & (hh >= 0) & (hh < H) & (ww >= 0) & (ww < W)
            a = tl.load(x_ptr + (x_pixel[:, None] + x_tap[None, :]), mask=hit, other=0.0)
            w_inside = k_inside[:, None] & o_inside[None, :]
            b = tl.load(w_ptr + (w_tap[:, None] + w_row[None, :]), mask=w_inside, other=0.0)
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=ACC)

    offsets = (n * y_n + oh * y_h + ow * y_w)[:, None] + ((first_o + o) * y_c)[None, :]
    inside = m_inside[:, None] & o_inside[None, :]
    accumulator = epilogues.finish(
        accumulator, first_o + o, o_inside, 1, bias_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr,
        residual_ptr, z_ptr, offsets, inside, A0, A1, EPS, THEN,
    )  # fmt: skip
    y = accumulator.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y, mask=inside)
    if partials_ptr is not None:
        channels = tl.num_programs(0) // (tiles_n * tiles_m) * O
        epilogues.measure(y, partials_ptr, pid_m, tiles_m, channels, first_o + o, o_inside, m_inside, 1)


@triton.jit
def _conv_input_grad_kernel(
    dz_ptr, w_ptr, bias_ptr, dx_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, residual_ptr, z_ptr,
    N, C, H, W, O, OH, OW,
    dz_n, dz_c, dz_h, dz_w, w_o, w_c, w_r, w_s, dx_n, dx_c, dx_h, dx_w, pad_h, pad_w,
    A0: tl.float64, A1: tl.float64,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, EPS: tl.constexpr, THEN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ONE_TAP: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: a tile of dx of TILE_M input pixels by TILE_N channels of one group. As the result of a transposed
    convolution, dx may have a bias and what else `finish` adds.

    Input pixels that are congruent modulo the stride form a class. They are read by the same taps, every STEP-th from a first
    one on. All pixels of a program are of one class, so that no product with an inserted zero is computed. A class without
    taps has a sum of zero. K runs over (tap of the class, o), with o fastest; ONE_TAP is as in the forward kernel.
    """
    tiles_m = tl.cdiv(N * tl.cdiv(H, STRIDE_H) * tl.cdiv(W, STRIDE_W), TILE_M)
    tiles_n = tl.cdiv(C, TILE_N)
    pid_n = tl.program_id(0) % tiles_n
    pid_m = tl.program_id(0) // tiles_n % tiles_m
    rest = tl.program_id(0) // (tiles_n * tiles_m)
    class_w = rest % STRIDE_W
    class_h = rest // STRIDE_W % STRIDE_H
    group = rest // (STRIDE_W * STRIDE_H)
    k = tl.arange(0, TILE_K)
    if WIDE:
        pid_m, pid_n, group, k = pid_m.to(tl.int64), pid_n.to(tl.int64), group.to(tl.int64), k.to(tl.int64)
    # The pixels of this class form an image of their own.
    class_height = tl.cdiv(H - class_h, STRIDE_H)
    class_width = tl.cdiv(W - class_w, STRIDE_W)
    m = pid_m * TILE_M + tl.arange(0, TILE_M)
    c = pid_n * TILE_N + tl.arange(0, TILE_N)
    m_inside = m < N * class_height * class_width
    c_inside = c < C
    # An image narrower than the stride has classes without pixels, for which this avoids a division by zero.
    across = tl.maximum(class_width, 1)
    down = tl.maximum(class_height, 1)
    w = m % across
    h = m // across % down
    n = m // (across * down)
    if STRIDE_H == 1:
        first_r = 0
    else:
        first_r = first_tap(class_h + pad_h, R, STRIDE_H, DILATION_H)
    if STRIDE_W == 1:
        first_s = 0
    else:
        first_s = first_tap(class_w + pad_w, S, STRIDE_W, DILATION_W)
    taps_h = tl.cdiv(R - first_r, STEP_H)
    taps_w = tl.cdiv(S - first_s, STEP_W)
    # The output pixel that reads the first tap. For each further tap of the class it is STEP*DILATION/STRIDE less.
    oh = h + (class_h + pad_h - first_r * DILATION_H) // STRIDE_H
    ow = w + (class_w + pad_w - first_s * DILATION_W) // STRIDE_W
    BACK_H: tl.constexpr = STEP_H * DILATION_H // STRIDE_H
    BACK_W: tl.constexpr = STEP_W * DILATION_W // STRIDE_W
    first_o = group * O
    first_c = group * C
    dz_pixel = n * dz_n + oh * dz_h + ow * dz_w

    accumulator = tl.zeros((TILE_M, TILE_N), ACC)
    if ONE_TAP:
        # One bit for each tap of the largest class.
        ROW: tl.constexpr = (S + STEP_W - 1) // STEP_W
        valid = _valid_taps(m_inside, oh, ow, OH, OW, (R + STEP_H - 1) // STEP_H, ROW, -BACK_H, -BACK_W)
        dz_row = dz_pixel[:, None] + ((first_o + k) * dz_c)[None, :]
        w_column = ((first_o + k) * w_o)[:, None] + (c * w_c)[None, :]
        taps = taps_h * taps_w
        for step in range(0, O // TILE_K * taps):
            tap = step % taps
            o = step // taps * TILE_K
            i = tap // taps_w
            j = tap % taps_w
            bit = i * ROW + j
            if WIDE:
                i, j, o = i.to(tl.int64), j.to(tl.int64), o.to(tl.int64)
            dz_tap = dz_ptr + (o * dz_c - i * BACK_H * dz_h - j * BACK_W * dz_w)
            w_tap = w_ptr + (o * w_o + (first_r + i * STEP_H) * w_r + (first_s + j * STEP_W) * w_s)
            a = tl.load(dz_tap + dz_row, mask=((valid >> bit) & 1 != 0)[:, None], other=0.0)
            b = tl.load(w_tap + w_column, mask=c_inside[None, :], other=0.0)
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=ACC)
    else:
        for start in range(0, taps_h * taps_w * O, TILE_K):
            o = (start + k) % O
            tap = (start + k) // O
            i = tap // taps_w
            j = tap % taps_w
            dz_tap = (first_o + o) * dz_c - i * BACK_H * dz_h - j * BACK_W * dz_w
            w_tap = (first_o + o) * w_o + (first_r + i * STEP_H) * w_r + (first_s + j * STEP_W) * w_s
            p = oh[:, None] - (i * BACK_H)[None, :]
            q = ow[:, None] - (j * BACK_W)[None, :]
            k_inside = i < taps_h
            hit = m_inside[:, None] & k_inside[None, :] & (p >= 0) & (p < OH) & (q >= 0) & (q < OW)
            a = tl.load(dz_ptr + (dz_pixel[:, None] + dz_tap[None, :]), mask=hit, other=0.0)
            w_inside = k_inside[:, None] & c_inside[None, :]
            b = tl.load(w_ptr + (w_tap[:, None] + (c * w_c)[None, :]), mask=w_inside, other=0.0)
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=ACC)

    dx_pixel = n * dx_n + (h * STRIDE_H + class_h) * dx_h + (w * STRIDE_W + class_w) * dx_w
    offsets = dx_pixel[:, None] + ((first_c + c) * dx_c)[None, :]
    inside = m_inside[:, None] & c_inside[None, :]
    accumulator = epilogues.finish(
        accumulator, first_c + c, c_inside, 1, bias_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr,
        residual_ptr, z_ptr, offsets, inside, A0, A1, EPS, THEN,
    )  # fmt: skip
    tl.store(dx_ptr + offsets, accumulator.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _conv_weight_grad_kernel(
    dz_ptr, x_ptr, dw_ptr,
    PIXELS, C, H, W, O, OH, OW, pixels_per_split, dw_size,
    dz_n, dz_c, dz_h, dz_w, x_n, x_c, x_h, x_w, dw_o, dw_c, dw_r, dw_s, pad_h, pad_w,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: a tile of dw of TILE_M output channels by TILE_N columns (r, s, c) of one group, over one share of
    the output pixels. With SPLITS > 1, dw is a workspace of SPLITS tensors laid out like dw."""
    columns = R * S * C
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
    r = column // C // S
    s = column // C % S
    up = r * DILATION_H - pad_h
    left = s * DILATION_W - pad_w
    first_o = group * O
    first_c = group * C
    x_column = (first_c + c) * x_c + up * x_h + left * x_w
    dz_row = (first_o + o) * dz_c
    begin = split * pixels_per_split
    end = min(begin + pixels_per_split, PIXELS)

    accumulator = tl.zeros((TILE_M, TILE_N), ACC)
    for start in range(begin, end, TILE_K):
        pixel = start + k
        pixel_inside = pixel < end
        ow = pixel % OW
        oh = pixel // OW % OH
        n = pixel // (OW * OH)
        h = oh * STRIDE_H
        w = ow * STRIDE_W
        hh = h[:, None] + up[None, :]
        ww = w[:, None] + left[None, :]
        hit = pixel_inside[:, None] & column_inside[None, :] & (hh >= 0) & (hh < H) & (ww >= 0) & (ww < W)
        dz_pixel = n * dz_n + oh * dz_h + ow * dz_w
        x_pixel = n * x_n + h * x_h + w * x_w
        dz_inside = o_inside[:, None] & pixel_inside[None, :]
        a = tl.load(dz_ptr + (dz_row[:, None] + dz_pixel[None, :]), mask=dz_inside, other=0.0)
        b = tl.load(x_ptr + (x_pixel[:, None] + x_column[None, :]), mask=hit, other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=ACC)

    dw_ptr += split.to(tl.int64) * dw_size
    offsets = ((first_o + o) * dw_o)[:, None] + (c * dw_c + r * dw_r + s * dw_s)[None, :]
    tl.store(dw_ptr + offsets, accumulator.to(dw_ptr.dtype.element_ty), mask=o_inside[:, None] & column_inside[None, :])


def _is_pointwise(w: torch.Tensor, geometry: Geometry) -> bool:
    """Whether a convolution is 1x1 and reads every pixel, so that it is a matrix product if `as_matrix` finds one."""
    return w.shape[2:] == (1, 1) and geometry[:3] == ((1, 1), (0, 0), (0, 0)) and geometry.groups == 1


def _with_layout_of(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The weight, copied to contiguous channels if x has contiguous channels and w hasn't.

    The weight is small compared with x, and without the copy the main loop would load it element by element.
    """
    if x.stride(1) == 1 and w.stride(1) != 1 and w.shape[1] > 1:
        return channels_last_copy(w)
    return w


def _channels_are_vectors(*images: torch.Tensor) -> bool:
    return all(image.stride(1) == 1 and launch.vectors(image) for image in images)


def conv2d(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    geometry: Geometry,
    *,
    precision: str,
    then: epilogues.Activation | None = None,
    norm: epilogues.Norm | None = None,
    residual: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    partials: epilogues.Partials | None = None,
) -> torch.Tensor:
    """y = then(norm(conv(x, w) + bias) + residual), written into `y`, and what comes before `then` into `z`; and what statistics
    of y are merged from into `partials`, which a depthwise convolution hasn't.

    Shape: x (N, C, H, W), w (O, C/groups, R, S), bias (O,), y (N, O, OH, OW), all with any strides; residual and z as y,
        in strides too. y's size says how far the convolution goes below and to the right.
    Dtype: float16, bfloat16, float32 or float64, the same for all; precision ("ieee" or "tf32") concerns float32.
    """
    n, _, height, width = x.shape
    o, c, r, s = w.shape
    oh, ow = y.shape[2:]
    bias = None if bias is None else bias.contiguous()
    if depthwise.takes(w, geometry.groups):
        assert partials is None
        return depthwise.conv2d(x, w, bias, y, geometry, then=then, norm=norm, residual=residual, z=z)
    if norm is None and partials is None and _is_pointwise(w, geometry):
        a, out = as_matrix(x), as_matrix(y)
        if a is not None and out is not None:
            add = None if residual is None else residual.as_strided(out.shape, out.stride())
            before = None if z is None else z.as_strided(out.shape, out.stride())
            matmul(a, w[:, :, 0, 0].T, bias=bias, add=add, then=then, z=before, out=out, precision=precision)
            return y
    more: dict[str, Any] = dict(then=then, norm=norm, residual=residual, z=z)
    if boxes.conv2d(x, w, bias, y, geometry, precision=precision, partials=partials, **more):
        return y
    pixels, o = n * oh * ow, o // geometry.groups
    accumulate = torch.promote_types(x.dtype, torch.float32)
    x = gathered(x, c, w, y)
    w = _with_layout_of(x, w)
    wide = launch.wide(x, w, y)
    one_tap = r * s <= _TAPS
    vectors = not wide and one_tap and c % 64 == 0 and _channels_are_vectors(x, w)
    tile = picks.conv(pixels, o, x.dtype, precision, tiles.device(x.device), vectors=vectors)
    one_tap = one_tap and c % tile.k == 0
    turn = one_tap and turned.pays(w.stride(1), w.stride(0), w.dtype, precision, tiles.device(w.device))
    tile, turn = turned.fit(tile, turn)
    function, options = epilogues.tile_function(then)
    tiles_m = tiles.cdiv(pixels, tile.m)
    launch.launch(
        _conv_kernel, tiles_m * tiles.cdiv(o, tile.n) * geometry.groups,
        x, w, bias, y, *epilogues.tensors(norm), residual, z, partials and partials.empty(tiles_m, y),
        pixels, c, height, width, o, oh, ow,
        *x.stride(), *w.stride(), *y.stride(), *geometry.padding, *options,
        **geometry.constexprs((r, s)),
        EPS=0.0 if norm is None else norm.eps, THEN=function,
        ACC=tiles.triton_dtype(accumulate), PRECISION=precision, WIDE=wide, ONE_TAP=one_tap, TURNED=turn,
        TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def conv2d_input_grad(
    dz: torch.Tensor,
    w: torch.Tensor,
    dx: torch.Tensor,
    geometry: Geometry,
    *,
    precision: str,
    bias: torch.Tensor | None = None,
    then: epilogues.Activation | None = None,
    norm: epilogues.Norm | None = None,
    residual: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of `conv2d` with respect to x, written into `dx`. It is also the transposed convolution of dz,
    and what follows that is as in `conv2d`.

    Shape: dz (N, O, OH, OW), w (O, C/groups, R, S), dx (N, C, H, W), all with any strides; bias (C,); residual and z as dx, in
        strides too.
    """
    n, _, height, width = dx.shape
    o, c, r, s = w.shape
    oh, ow = dz.shape[2:]
    bias = None if bias is None else bias.contiguous()
    more: dict[str, Any] = dict(then=then, norm=norm, residual=residual, z=z)
    if depthwise.takes(w, geometry.groups):
        return depthwise.conv2d(dz, w, bias, dx, geometry, input_grad=True, **more)
    if norm is None and _is_pointwise(w, geometry):
        a, out = as_matrix(dz), as_matrix(dx)
        if a is not None and out is not None:
            add = None if residual is None else residual.as_strided(out.shape, out.stride())
            before = None if z is None else z.as_strided(out.shape, out.stride())
            matmul(a, w[:, :, 0, 0], bias=bias, add=add, then=then, z=before, out=out, precision=precision)
            return dx
    if boxes.conv2d_input_grad(dz, w, dx, bias, geometry, precision=precision, **more):
        return dx
    o, classes = o // geometry.groups, geometry.stride[0] * geometry.stride[1]
    # Every class gets as many tiles as the largest one needs.
    pixels = n * tiles.cdiv(height, geometry.stride[0]) * tiles.cdiv(width, geometry.stride[1])
    accumulate = torch.promote_types(dz.dtype, torch.float32)
    dz = gathered(dz, o, w, dz)
    w = _with_layout_of(dz, w)
    wide = launch.wide(dz, w, dx)
    one_tap = r * s <= _TAPS
    vectors = not wide and one_tap and o % 64 == 0 and _channels_are_vectors(dz, w)
    tile = picks.conv(pixels, c, dz.dtype, precision, tiles.device(dz.device), vectors=vectors)
    function, options = epilogues.tile_function(then)
    launch.launch(
        _conv_input_grad_kernel, tiles.cdiv(pixels, tile.m) * tiles.cdiv(c, tile.n) * classes * geometry.groups,
        dz, w, bias, dx, *epilogues.tensors(norm), residual, z, n, c, height, width, o, oh, ow,
        *dz.stride(), *w.stride(), *dx.stride(), *geometry.padding, *options,
        **geometry.constexprs((r, s)),
        STEP_H=geometry.step[0], STEP_W=geometry.step[1],
        EPS=0.0 if norm is None else norm.eps, THEN=function,
        ACC=tiles.triton_dtype(accumulate), PRECISION=precision, WIDE=wide, ONE_TAP=one_tap and o % tile.k == 0,
        TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dx


def conv2d_weight_grad(
    dz: torch.Tensor,
    x: torch.Tensor,
    dw: torch.Tensor,
    geometry: Geometry,
    *,
    precision: str,
) -> torch.Tensor:
    """The gradient of `conv2d` with respect to w, a sum over all pixels in a fixed order, written into `dw`.

    Shape: dz (N, O, OH, OW), x (N, C, H, W) with any strides; dw (O, C/groups, R, S), dense.
    """
    n, _, height, width = x.shape
    o, c, r, s = dw.shape
    oh, ow = dz.shape[2:]
    if depthwise.takes(dw, geometry.groups):
        return depthwise.conv2d_weight_grad(dz, x, dw, geometry)
    if _is_pointwise(dw, geometry):
        a, b = as_matrix(dz), as_matrix(x)
        if a is not None and b is not None:
            matmul(a.T, b, out=dw.as_strided((o, c), dw.stride()[:2]), precision=precision)
            return dw
    if boxes.conv2d_weight_grad(dz, x, dw, geometry, precision=precision):
        return dw
    o, pixels, columns = o // geometry.groups, n * oh * ow, r * s * c
    x, dz = gathered(x, c, dw, dz), gathered(dz, o, dw, dz)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    wide = launch.wide(dz, x, dw)
    tile, splits = picks.conv_weight_grad(
        o, columns, pixels, geometry.groups, x.dtype, precision, tiles.device(x.device),
        vectors=not wide and _channels_are_vectors(dz, x),
    )  # fmt: skip
    per_split = tiles.cdiv(tiles.cdiv(pixels, tile.k), splits) * tile.k
    out = dw if splits == 1 else launch.empty((splits, dw.numel()), dtype=accumulate, device=dw.device)
    launch.launch(
        _conv_weight_grad_kernel, tiles.cdiv(o, tile.m) * tiles.cdiv(columns, tile.n) * splits * geometry.groups,
        dz, x, out, pixels, c, height, width, o, oh, ow, per_split, dw.numel(),
        *dz.stride(), *x.stride(), *dw.stride(), *geometry.padding,
        **geometry.constexprs((r, s)),
        ACC=tiles.triton_dtype(accumulate), PRECISION=precision, WIDE=wide, SPLITS=splits,
        TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        sum_partials(out, dw.as_strided((dw.numel(),), (1,)))
    return dw
