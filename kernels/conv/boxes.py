"""Convolution with the main loop of a matrix product: tiles of the image come through TMA descriptors.

The pixels of a tile are a *box* of TILE_IMAGES x TILE_H x TILE_W pixels. What one tap (r, s) reads for them is a box of the
image too, shifted by the tap. A tiled tensor descriptor fetches that box in one instruction and fills with zeros what lies
outside of the image, before its first row as well as after its last, so that padding needs no mask and the loop computes no
addresses. The image is operand b of (channels of y, taps) @ (taps, pixels), because both operands then stay in shared memory.

    stride        The image is seen as (N, H/stride, stride, W/stride, stride*C), of which a tap reads one phase.
    input grad    The same loop runs over dz, for each class of pixels of dx that are congruent modulo the stride, so that no
                  product with an inserted zero is computed.
    weight grad   The sum runs over pixels, box by box, and its shares are added up in a fixed order.
    few channels  With contiguous channels, what a row of taps reads is contiguous, and overlaps with what it reads for the next
                  pixel. So the image is seen as one of S*C channels, and the kernel as R x 1.
    small groups  Several are packed into one, whose weight is zero for channels of different groups.

An operand that a descriptor can't read is copied: to channels_last, padded to vectors of 16 bytes and whole phases.

No device has run these kernels yet. They compile for sm_90 and sm_100. Coordinates before the start of an image, views of rank 5
and overlapping pixels are documented by NVIDIA, but have been tested in Triton's interpreter only.

Source: CUDA driver API, cuTensorMapEncodeTiled; implicit matrix product: Chetlur et al., arXiv:1410.0759.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import epilogues
from ..reduce import sum_partials
from ..runtime import launch, tiles
from . import tiles as picks
from .geometry import Geometry, Pair
from .layout import (
    channels_last,
    multiple,
    operand,
    pack_weight,
    pixels_in_vector,
    unpack_weight,
    weight_operand,
    whole,
)  # fmt: skip


@triton.jit
def first_tap(offset, TAPS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr):
    """The first tap t for which STRIDE divides offset - t*DILATION; TAPS if there is none."""
    first = TAPS + offset * 0
    for i in tl.static_range(TAPS):
        t = TAPS - 1 - i
        first = tl.where((offset - t * DILATION) % STRIDE == 0, t, first)
    return first


@triton.jit
def _sum_taps(
    x, w, first_n, top, left, first_c, first_o, first_m, first_r, first_s, taps, taps_w, C, x_w, w_tap, pad_h, pad_w, member,
    S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, INPUT_GRAD: tl.constexpr, OWN_C: tl.constexpr, STAGES: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """The sum over taps and C channels for one box. (top, left) is what the first tap reads, if INPUT_GRAD, and what a tap at
    (0, 0) would read without padding, if not. With OWN_C, the sum runs over the OWN_C channels of one member of a packed group
    alone."""
    # The taps of one class are STEP apart, and the pixels of dz that they read -BACK.
    BACK_H: tl.constexpr = STEP_H * DILATION_H // STRIDE_H
    BACK_W: tl.constexpr = STEP_W * DILATION_W // STRIDE_W
    accumulator = tl.zeros((TILE_M, TILE_N), ACC)
    for step in tl.range(0, tl.cdiv(C, TILE_K) * taps, num_stages=STAGES):
        tap = step % taps
        k = step // taps * TILE_K
        if INPUT_GRAD:
            i = tap // taps_w
            j = tap % taps_w
            b = x.load([first_n, top - i * BACK_H, left - j * BACK_W, first_c + k])
            column = ((first_r + i * STEP_H) * S + first_s + j * STEP_W) * w_tap
            if w.dtype.primitive_bitwidth == 16:
                a = w.load([first_c + k, column + first_m]).T
            else:
                a = w.load([first_m, column + first_c + k])
        else:
            h = tap // S * DILATION_H - pad_h
            v = tap % S * DILATION_W - pad_w
            if STRIDE_H * STRIDE_W == 1:
                b = x.load([first_n, top + h, left + v, first_c + k])
            else:
                # Division rounds towards zero: keep it away from negative numbers.
                h += pad_h * STRIDE_H
                v += pad_w * STRIDE_W
                channel = v % STRIDE_W * x_w + first_c + k
                row = top + h // STRIDE_H - pad_h
                b = x.load([first_n, row, h % STRIDE_H, left + v // STRIDE_W - pad_w, channel])
            a = w.load([first_o + first_m, tap * w_tap + k])
        b = tl.reshape(b, (TILE_N, TILE_K))
        if OWN_C:
            b = tl.where(((k + tl.arange(0, TILE_K)) // OWN_C == member)[None, :], b, 0.0)
        accumulator = tl.dot(a, b.T, accumulator, input_precision=PRECISION, out_dtype=ACC)
    return accumulator


@triton.jit
def _conv_box_kernel(
    y_ptr, x, w, bias_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, residual_ptr, z_ptr, partials_ptr,
    N, H, W, O, C, y_n, y_c, y_h, y_w, x_w, w_tap, pad_h, pad_w, A0: tl.float64, A1: tl.float64,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, INPUT_GRAD: tl.constexpr, EPS: tl.constexpr,
    THEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, RUN: tl.constexpr,
    OWN_O: tl.constexpr, OWN_C: tl.constexpr, TILE_IMAGES: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M of the O channels of one group of y (N, H, W), for a box of TILE_N pixels. With INPUT_GRAD, y is
    dx, x is dz, and the box lies in one class of pixels: those at (h*STRIDE_H + class_h, w*STRIDE_W + class_w).

    x and w are descriptors. That of the image has sizes (N, H, W, channels) or, in phases, (N, H/STRIDE_H, STRIDE_H, W/STRIDE_W,
    STRIDE_W*x_w). That of the weight has its rows and, as columns, taps and channels, with w_tap between taps. The sum runs over
    C channels in each group. RUN neighbouring pixels are stored at once.

    The members of a packed group have OWN_C channels of x and OWN_O of y each; both are 0 if no groups are packed. The weight is
    zero for channels of different members, but zero times infinity or NaN is NaN. So if the sum has a NaN, it is computed anew
    for each member by itself.
    """
    tiles_m = tl.cdiv(O, TILE_M)
    pid_m = tl.program_id(0) % tiles_m
    rest = tl.program_id(0) // tiles_m
    if INPUT_GRAD:
        class_w = rest % STRIDE_W
        class_h = rest // STRIDE_W % STRIDE_H
        rest = rest // (STRIDE_H * STRIDE_W)
        first_r = first_tap(class_h + pad_h, R, STRIDE_H, DILATION_H)
        first_s = first_tap(class_w + pad_w, S, STRIDE_W, DILATION_W)
        taps_w = tl.cdiv(S - first_s, STEP_W)
        taps = tl.cdiv(R - first_r, STEP_H) * taps_w
        tiles_h = tl.cdiv(tl.cdiv(H, STRIDE_H), TILE_H)
        tiles_w = tl.cdiv(tl.cdiv(W, STRIDE_W), TILE_W)
        first = class_h * y_h + class_w * y_w
        y_ptr += first
        if residual_ptr is not None:
            residual_ptr += first
        if z_ptr is not None:
            z_ptr += first
        y_h *= STRIDE_H
        y_w *= STRIDE_W
        H = tl.cdiv(H - class_h, STRIDE_H)
        W = tl.cdiv(W - class_w, STRIDE_W)
    else:
        first_r = 0
        first_s = 0
        taps_w = S
        taps = R * S
        tiles_h = tl.cdiv(H, TILE_H)
        tiles_w = tl.cdiv(W, TILE_W)
    first_w = rest % tiles_w * TILE_W
    first_h = rest // tiles_w % tiles_h * TILE_H
    rest = rest // (tiles_w * tiles_h)
    tiles_n = tl.cdiv(N, TILE_IMAGES)
    first_n = rest % tiles_n * TILE_IMAGES
    group = rest // tiles_n
    first_m = pid_m * TILE_M
    first_c = group * C
    first_o = group * O

    top = first_h
    left = first_w
    if INPUT_GRAD:
        top += (class_h + pad_h - first_r * DILATION_H) // STRIDE_H
        left += (class_w + pad_w - first_s * DILATION_W) // STRIDE_W
    accumulator = _sum_taps(
        x, w, first_n, top, left, first_c, first_o, first_m, first_r, first_s, taps, taps_w, C, x_w, w_tap, pad_h, pad_w, 0,
        S, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, STEP_H, STEP_W, INPUT_GRAD, 0, None,
        ACC, PRECISION, TILE_M, TILE_N, TILE_K,
    )  # fmt: skip
    if RUN > 1:
        y_n, y_c, y_h, W = multiple(y_n, RUN), multiple(y_c, RUN), multiple(y_h, RUN), multiple(W, RUN)
    pixel = tl.arange(0, TILE_N)
    n = first_n + pixel // (TILE_H * TILE_W)
    h = first_h + pixel // TILE_W % TILE_H
    v = first_w + pixel % TILE_W
    m = first_m + tl.arange(0, TILE_M)
    inside = (m < O)[:, None] & ((n < N) & (h < H) & (v < W))[None, :]
    if OWN_C:  # noqa: SIM102, because this condition is decided when the kernel is compiled
        if tl.max((inside & (accumulator != accumulator)).to(tl.int32)) > 0:
            last_m = min(first_m + TILE_M, O) - 1
            for member in range(first_m // OWN_O, last_m // OWN_O + 1):
                alone = _sum_taps(
                    x, w, first_n, top, left, first_c, first_o, first_m, first_r, first_s, taps, taps_w, C, x_w, w_tap,
                    pad_h, pad_w, member, S, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, STEP_H, STEP_W, INPUT_GRAD, OWN_C,
                    1, ACC, PRECISION, TILE_M, TILE_N, TILE_K,
                )  # fmt: skip
                accumulator = tl.where((m // OWN_O == member)[:, None], alone, accumulator)
    if WIDE:
        n, h, v, m = n.to(tl.int64), h.to(tl.int64), v.to(tl.int64), m.to(tl.int64)
    offsets = ((first_o + m) * y_c)[:, None] + (n * y_n + h * y_h + v * y_w)[None, :]
    accumulator = epilogues.finish(
        accumulator, first_o + m, m < O, 0, bias_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr,
        residual_ptr, z_ptr, offsets, inside, A0, A1, EPS, THEN,
    )  # fmt: skip
    y = accumulator.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y, mask=inside)
    if partials_ptr is not None:
        boxes = tiles_n * tiles_h * tiles_w
        box = tl.program_id(0) // tiles_m % boxes
        channels = tl.num_programs(0) // (tiles_m * boxes) * O
        hit = (n < N) & (h < H) & (v < W)
        epilogues.measure(y, partials_ptr, box, boxes, channels, first_o + m, m < O, hit, 0)


@triton.jit
def _conv_box_weight_grad_kernel(
    dw_ptr, x, dz,
    N, H, W, C, O, dw_size, dw_o, dw_c, dw_r, dw_s, x_w, pad_h, pad_w, boxes_per_split,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr, BOX_FITS: tl.constexpr,
    OWN_O: tl.constexpr, OWN_C: tl.constexpr,
    TILE_IMAGES: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: dw of one tap, for TILE_M of the C channels of x and TILE_N of the O of dz (N, H, W) in one group, over
    one share of the pixels, TILE_K to a box. With SPLITS > 1, dw is a workspace of SPLITS tensors laid out like dw.

    x and dz are descriptors as in `_conv_box_kernel`. Without BOX_FITS, boxes reach beyond the edge of dz. They are zero there,
    but x may have infinities at the same place, and infinity times zero is NaN. In a packed group, whose members have OWN_C
    channels of x and OWN_O of dz, products of channels of different members are computed but not stored.
    """
    tiles_m = tl.cdiv(C, TILE_M)
    tiles_n = tl.cdiv(O, TILE_N)
    pid_n = tl.program_id(0) % tiles_n
    pid_m = tl.program_id(0) // tiles_n % tiles_m
    rest = tl.program_id(0) // (tiles_n * tiles_m)
    tap = rest % (R * S)
    split = rest // (R * S) % SPLITS
    group = rest // (R * S * SPLITS)
    r = tap // S
    s = tap % S
    channel = group * C + pid_m * TILE_M
    row = r * DILATION_H - pad_h
    column = s * DILATION_W - pad_w
    phase = 0
    if STRIDE_H * STRIDE_W > 1:
        # Division rounds towards zero: keep it away from negative numbers.
        row += pad_h * STRIDE_H
        column += pad_w * STRIDE_W
        phase = row % STRIDE_H
        channel += column % STRIDE_W * x_w
        row = row // STRIDE_H - pad_h
        column = column // STRIDE_W - pad_w
    tiles_h = tl.cdiv(H, TILE_H)
    tiles_w = tl.cdiv(W, TILE_W)
    begin = split * boxes_per_split
    end = min(begin + boxes_per_split, tl.cdiv(N, TILE_IMAGES) * tiles_h * tiles_w)
    pixel = tl.arange(0, TILE_K)

    accumulator = tl.zeros((TILE_M, TILE_N), ACC)
    w = begin % tiles_w * TILE_W
    h = begin // tiles_w % tiles_h * TILE_H
    n = begin // (tiles_w * tiles_h) * TILE_IMAGES
    for _ in range(begin, end):
        if STRIDE_H * STRIDE_W == 1:
            a = x.load([n, h + row, w + column, channel])
        else:
            a = x.load([n, h + row, phase, w + column, channel])
        a = tl.reshape(a, (TILE_K, TILE_M))
        if not BOX_FITS:
            pixel_inside = (h + pixel // TILE_W % TILE_H < H) & (w + pixel % TILE_W < W)
            a = tl.where(pixel_inside[:, None], a, 0.0)
        b = tl.reshape(dz.load([n, h, w, group * O + pid_n * TILE_N]), (TILE_K, TILE_N))
        accumulator = tl.dot(a.T, b, accumulator, input_precision=PRECISION, out_dtype=ACC)
        # The next box is found by counting, because dividing its number takes many more instructions.
        w += TILE_W
        row_ends = w >= W
        w = tl.where(row_ends, 0, w)
        h += tl.where(row_ends, TILE_H, 0)
        image_ends = h >= H
        h = tl.where(image_ends, 0, h)
        n += tl.where(image_ends, TILE_IMAGES, 0)

    c = pid_m * TILE_M + tl.arange(0, TILE_M)
    o = pid_n * TILE_N + tl.arange(0, TILE_N)
    dw_ptr += split.to(tl.int64) * dw_size + r * dw_r + s * dw_s
    inside = (c < C)[:, None] & (o < O)[None, :]
    if OWN_C:
        inside = inside & ((c // OWN_C)[:, None] == (o // OWN_O)[None, :])
        c = c % OWN_C
    offsets = (c * dw_c)[:, None] + ((group * O + o) * dw_o)[None, :]
    tl.store(dw_ptr + offsets, accumulator.to(dw_ptr.dtype.element_ty), mask=inside)


def _descriptor(x: torch.Tensor, block: list[int], phases: Pair = (1, 1)) -> TensorDescriptor:
    """A descriptor of x (N, C, H, W) as (N, H, W, C), or in phases. `block` is a number of images, rows, columns and channels."""
    n, c, h, w = x.shape
    unit = 16 // x.element_size()
    x_n, x_h, x_w = (x.stride(d) if x.shape[d] > 1 else unit for d in (0, 2, 3))
    if phases == (1, 1):
        return TensorDescriptor(x, [n, h, w, c], [x_n, x_h, x_w, 1], block)
    shape = [n, h // phases[0], phases[0], w // phases[1], (phases[1] - 1) * x_w + c]
    strides = [x_n, phases[0] * x_h, x_h, phases[1] * x_w, 1]
    return TensorDescriptor(x, shape, strides, [*block[:2], 1, *block[2:]])


def _weight_descriptor(w: torch.Tensor, block: list[int]) -> tuple[TensorDescriptor, int]:
    """A descriptor of w (O, C, R, S), in memory (O, R, S, C), as (O, taps and channels), and the distance between taps."""
    o, c, r, s = w.shape
    step = w.stride(3) if s > 1 else w.stride(2) if r > 1 else c
    row = w.stride(0) if o > 1 else 16
    return TensorDescriptor(w, [o, (r * s - 1) * step + c], [row, 1], block), step


def _one_phase(size: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[slice, int, int, int] | None:
    """Along one dimension: if all taps read the same phase of the image, a slice that selects it, and the stride (1), padding and
    dilation of the same convolution over that slice. Else None."""
    if stride == 1:
        return slice(None), 1, padding, dilation
    if kernel > 1 and dilation % stride:
        return None
    phase = -padding % stride
    if phase >= size:
        return None
    return slice(phase, None, stride), 1, (padding + phase) // stride, max(dilation // stride, 1)


def _without_strides(x: torch.Tensor, w: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, Geometry]:
    """The image and geometry of the same convolution, with stride 1 wherever a slice of the image allows it."""
    slices, sizes = [], []
    for i in (0, 1):
        size = geometry.stride[i], geometry.padding[i], geometry.dilation[i]
        one = _one_phase(x.shape[2 + i], w.shape[2 + i], *size)
        slices.append(slice(None) if one is None else one[0])
        sizes.append(size if one is None else one[1:])
    stride, padding, dilation = zip(*sizes, strict=True)
    return x[:, :, slices[0], slices[1]], geometry._replace(stride=stride, padding=padding, dilation=dilation)


def _is_stem(x: torch.Tensor, w: torch.Tensor, geometry: Geometry) -> bool:
    """Whether there are so few channels that the sum is better computed in steps of a row of taps than of one tap's channels."""
    few = w.shape[1] * x.element_size() < 16
    return geometry.groups == 1 and few and w.shape[3] > 1 and geometry.dilation[1] == 1


def _stem(x: torch.Tensor, s: int, out_width: int, geometry: Geometry) -> tuple[torch.Tensor, int, Geometry]:
    """The image (N, C, H, W) as (N, S*pitch, H, OW): pixel j holds all that the taps of a row read for output column j, so
    that neighbours overlap. Also its pitch, the numbers that a pixel's C channels take up, zeros included, and the geometry
    of the convolution over it, whose kernel is R x 1."""
    (down, right), (top, left), n, c, h = geometry.stride, geometry.padding, *x.shape[:3]
    pitch = 1 << (c - 1).bit_length()
    while right * pitch * x.element_size() % 16:
        pitch *= 2
    height, width = whole(h, down), whole((out_width - 1) * right + s, 16)
    copy = channels_last(x, pitch=pitch, size=(height, width), left=left)
    row = width * pitch
    image = copy.as_strided((n, s * pitch, height, out_width), (height * row, 1, row, right * pitch))
    return image, pitch, geometry._replace(stride=(down, 1), padding=(top, 0), dilation=(geometry.dilation[0], 1))


def takes(y: torch.Tensor, w_shape: Sequence[int], precision: str) -> bool:
    """Whether boxes are used for the convolution with the result y (N, O, OH, OW) and a weight (O, C/groups, R, S), and for its
    two gradients, which take as many FLOPs each."""
    flops = 2 * y.numel() * math.prod(w_shape[1:])
    return picks.takes_boxes(flops, y.dtype, precision, tiles.device(y.device))


def conv2d(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, geometry: Geometry, **more: Any
) -> bool:
    """As `gather.conv2d`, which says what there is `more`. False, and nothing is done, where boxes can't compute it: for example,
    an empty batch has no descriptor."""
    if len(x) == 0 or not takes(y, w.shape, more["precision"]):
        return False
    if _is_stem(x, w, geometry):
        o, _, r, s = w.shape
        x, pitch, geometry = _stem(x, s, y.shape[3], geometry)
        row = whole(s * pitch, 64)
        w = channels_last(w, pitch=pitch, size=(r, row // pitch)).as_strided((o, row, r, 1), (r * row, 1, row, row))
    x, geometry = _without_strides(x, w, geometry)
    return _launch_box(x, w, y, bias, geometry, **more, input_grad=False)


def conv2d_input_grad(
    dz: torch.Tensor, w: torch.Tensor, dx: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry, **more: Any
) -> bool:
    """As `gather.conv2d_input_grad`, with `more` as in `conv2d`. False, and nothing is done, where boxes can't compute it."""
    if len(dz) == 0 or not takes(dz, w.shape, more["precision"]):
        return False
    return _launch_box(dz, w, dx, bias, geometry, **more, input_grad=True)


def _launch_box(
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    *,
    precision: str,
    then: epilogues.Activation | None,
    norm: epilogues.Norm | None,
    residual: torch.Tensor | None,
    z: torch.Tensor | None,
    input_grad: bool,
    partials: epilogues.Partials | None = None,
) -> bool:
    stride, groups = geometry.stride, geometry.groups
    n, _, h, v = y.shape
    r, s = w.shape[2:]
    o, c = (w.shape[1], w.shape[0] // groups) if input_grad else (w.shape[0] // groups, min(w.shape[1], x.shape[1]))
    phases, classes = ((1, 1), stride) if input_grad else (stride, (1, 1))
    members = picks.packed_groups(groups, c, o, 16, 1)
    if members == 0:
        return False  # a step of the sum would read channels of the next group
    own_o, own_c = (o, c) if members > 1 else (0, 0)
    groups, o, c = groups // members, members * o, members * c
    x, wide = operand(x, phases), launch.wide(y)
    # No step of the sum may reach into the next group or the next phase.
    reach = math.gcd(c, x.shape[1]) if groups > 1 else x.shape[1] if phases[1] > 1 else None
    tile, (images, rows_h, rows_w) = picks.conv_box(
        o, c, (n, -(-h // classes[0]), -(-v // classes[1])), groups * classes[0] * classes[1], reach, x.dtype, precision,
        tiles.device(x.device),
        crowded=wide or members > 1 or partials is not None or ((residual, z) != (None, None) and y.stride(1) != 1),
    )  # fmt: skip
    x_desc = _descriptor(x, [images, rows_h, rows_w, tile.k], phases)
    # Tensor cores take 32 bits with the summed channels contiguous alone: for an input gradient the weight is transposed once.
    turned = input_grad and w.element_size() > 2
    # The last step over the channels of a tap reads beyond them, where there must be zeros.
    step = 16 // w.element_size() if input_grad and not turned else tile.k
    w = pack_weight(w, groups * members, members, step) if members > 1 else w
    w = weight_operand(w.transpose(0, 1) if turned else w, step)
    w_desc, w_tap = _weight_descriptor(w, [tile.k, tile.m] if input_grad and not turned else [tile.m, tile.k])
    boxes = tiles.cdiv(n, images)
    boxes *= tiles.cdiv(tiles.cdiv(h, classes[0]), rows_h) * tiles.cdiv(tiles.cdiv(v, classes[1]), rows_w)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    function, options = epilogues.tile_function(then)
    launch.launch(
        _conv_box_kernel, tiles.cdiv(o, tile.m) * classes[0] * classes[1] * boxes * groups,
        y, x_desc, w_desc, bias, *epilogues.tensors(norm), residual, z, partials and partials.empty(boxes, y),
        n, h, v, o, c, *y.stride(), x.stride(3), w_tap, *geometry.padding, *options,
        **geometry.constexprs((r, s)),
        STEP_H=geometry.step[0], STEP_W=geometry.step[1],
        INPUT_GRAD=input_grad, EPS=0.0 if norm is None else norm.eps, THEN=function,
        ACC=tiles.triton_dtype(accumulate), PRECISION=precision, WIDE=wide,
        RUN=pixels_in_vector(y, rows_w) if classes[1] == 1 else 1, OWN_O=own_o, OWN_C=own_c,
        TILE_IMAGES=images, TILE_H=rows_h, TILE_W=rows_w,
        TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return True


def conv2d_weight_grad(
    dz: torch.Tensor,
    x: torch.Tensor,
    dw: torch.Tensor,
    geometry: Geometry,
    *,
    precision: str,
) -> bool:
    """As `gather.conv2d_weight_grad`. False, and nothing is done, where boxes can't compute it."""
    if len(x) == 0 or not takes(dz, dw.shape, precision):
        return False
    target = dw
    stem = _is_stem(x, dw, geometry)
    if stem:
        o, _, r, s = dw.shape
        x, pitch, geometry = _stem(x, s, dz.shape[3], geometry)
        packed = launch.empty((o, r, s, pitch), dtype=dw.dtype, device=dw.device)
        target = packed.view(o, r, 1, s * pitch).permute(0, 3, 1, 2)
    x, geometry = _without_strides(x, target, geometry)
    groups = geometry.groups
    n, o, h, v = dz.shape
    o, (_, c, r, s) = o // groups, target.shape
    unit = 16 // x.element_size()
    members = picks.packed_groups(groups, c, o, unit, unit)
    if members == 0:
        return False  # a box would not begin at a multiple of 16 bytes, which Triton's interpreter refuses
    own_o, own_c = (o, c) if members > 1 else (0, 0)
    groups, o, c = groups // members, members * o, members * c
    x, dz = operand(x, geometry.stride), operand(dz)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    tile, (images, rows_h, rows_w), splits = picks.conv_box_weight_grad(
        c, o, (n, h, v), r * s * groups, x.dtype, precision, tiles.device(x.device)
    )
    boxes = tiles.cdiv(n, images) * tiles.cdiv(h, rows_h) * tiles.cdiv(v, rows_w)
    out = target if splits == 1 else launch.empty((splits, target.numel()), dtype=accumulate, device=dw.device)
    launch.launch(
        _conv_box_weight_grad_kernel, tiles.cdiv(c, tile.m) * tiles.cdiv(o, tile.n) * r * s * splits * groups,
        out, _descriptor(x, [images, rows_h, rows_w, tile.m], geometry.stride),
        _descriptor(dz, [images, rows_h, rows_w, tile.n]),
        n, h, v, c, o, target.numel(), *target.stride(), x.stride(3), *geometry.padding, tiles.cdiv(boxes, splits),
        **geometry.constexprs((r, s)),
        ACC=tiles.triton_dtype(accumulate), PRECISION=precision, SPLITS=splits,
        BOX_FITS=h % rows_h == 0 and v % rows_w == 0, OWN_O=own_o, OWN_C=own_c,
        TILE_IMAGES=images, TILE_H=rows_h, TILE_W=rows_w,
        TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        sum_partials(out, target.as_strided((target.numel(),), (1,)))
    if stem:
        unpack_weight(packed, dw)
    return True
