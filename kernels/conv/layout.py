"""How images and weights of convolutions lie in memory, and copies of them that lie as a kernel needs them."""

import math

import torch
import triton
import triton.language as tl

from ..runtime import launch, tiles
from . import tiles as picks
from .geometry import Pair


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether a descriptor can read it: the channels are contiguous, and every pixel begins at a multiple of 16 bytes."""
    steps = (s * x.element_size() for d, s in enumerate(x.stride()) if d != 1 and x.shape[d] > 1)
    return x.stride(1) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def as_matrix(x: torch.Tensor) -> torch.Tensor | None:
    """A batch of images (N, C, H, W) as a matrix (N*H*W, C) of pixels, or None if the distance between pixels varies."""
    n, c, h, w = x.shape
    s_n, s_c, s_h, s_w = x.stride()
    step = s_w if w > 1 else s_h if h > 1 else s_n
    if (h > 1 and s_h != w * step) or (n > 1 and s_n != h * w * step):
        return None
    return x.as_strided((n * h * w, c), (step, s_c))


def rows_follow(x: torch.Tensor) -> bool:
    """Whether the pixels of each image are at equal distances from row to row as well."""
    return x.shape[2] == 1 or x.shape[3] == 1 or x.stride(2) == x.shape[3] * x.stride(3)


def whole(number: int, unit: int) -> int:
    """The number, rounded up to whole units."""
    return -(-number // unit) * unit


@triton.jit
def multiple(size, UNIT: tl.constexpr):
    """The size, which is divisible by UNIT, in a form from which the compiler knows that it is."""
    return size // UNIT * UNIT


@triton.jit
def _channels_last_kernel(
    x_ptr, y_ptr,
    C, H, W, x_n, x_c, x_h, x_w, y_h, y_w, left,
    PITCH: tl.constexpr, WIDE: tl.constexpr, RUN: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M pixels of a row of y (N, y_h, y_w, PITCH), TILE_N of their channels. Column `left` of y is column 0 of
    x (N, C, H, W), and y is zero where x has no element. RUN neighbouring pixels are loaded at once."""
    if RUN > 1:
        x_n, x_c, x_h, W = multiple(x_n, RUN), multiple(x_c, RUN), multiple(x_h, RUN), multiple(W, RUN)
        left = multiple(left, RUN)
    tiles_m = tl.cdiv(y_w, TILE_M)
    tiles_n = tl.cdiv(PITCH, TILE_N)
    pid_n = tl.program_id(0) % tiles_n
    pid_m = tl.program_id(0) // tiles_n % tiles_m
    row = tl.program_id(0) // (tiles_n * tiles_m)
    if WIDE:
        row, pid_m, pid_n = row.to(tl.int64), pid_m.to(tl.int64), pid_n.to(tl.int64)
    h = row % y_h
    n = row // y_h
    column = pid_m * TILE_M + tl.arange(0, TILE_M)
    w = column - left
    c = pid_n * TILE_N + tl.arange(0, TILE_N)
    x_inside = ((w >= 0) & (w < W) & (h < H))[:, None] & (c < C)[None, :]
    value = tl.load(x_ptr + (n * x_n + h * x_h + (w * x_w)[:, None] + (c * x_c)[None, :]), mask=x_inside, other=0.0)
    y = (row * y_w + column) * PITCH
    tl.store(y_ptr + (y[:, None] + c[None, :]), value, mask=(column < y_w)[:, None] & (c < PITCH)[None, :])


def channels_last(
    x: torch.Tensor, *, pitch: int | None = None, size: Pair | None = None, left: int = 0
) -> torch.Tensor:
    """A copy in channels_last, with `pitch` channels for each pixel and `size` pixels for each image, whose column `left` is
    column 0 of x. It is zero where x has no element.

    Shape: x (N, C, H, W), any strides; the copy (N, pitch, *size).
    """
    n, c, h, w = x.shape
    pitch, (height, width) = pitch or c, size or (h, w)
    y = launch.empty((n, height, width, pitch), dtype=x.dtype, device=x.device)
    image = x
    if (height, width) == (h, w) and (h == 1 or x.stride(2) == w * x.stride(3)):  # copied as a single row
        height, width = 1, h * w
        image = x.as_strided((n, c, 1, width), (*x.stride()[:2], 0, x.stride(3)))
    _copy(image, y, (height, width, pitch), left)
    return y.permute(0, 3, 1, 2)


def _copy(x: torch.Tensor, y: torch.Tensor, size: tuple[int, int, int], left: int = 0) -> None:
    """Copy images x (N, C, H, W) of any strides into the memory of y: N images of `size` (rows, columns, channels), whose column
    `left` is column 0 of x, and zeros where x has no element."""
    height, width, pitch = size
    tile = picks.channels_last(pitch)
    launch.launch(
        _channels_last_kernel, len(x) * height * tiles.cdiv(width, tile.m) * tiles.cdiv(pitch, tile.n),
        x, y, *x.shape[1:], *x.stride(), height, width, left,
        PITCH=pitch, WIDE=launch.wide(x, y), RUN=math.gcd(pixels_in_vector(x, tile.m), left),
        TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip


def pixels_in_vector(image: torch.Tensor, most: int) -> int:
    """How many neighbouring pixels of images in NCHW can be loaded as one vector of up to 16 bytes, at most `most` (a power of
    two); 1 in any other format."""
    if image.stride(3) != 1 or image.data_ptr() % 16:
        return 1
    steps = (s for n, s in zip(image.shape[:3], image.stride()[:3], strict=True) if n > 1)
    return math.gcd(16 // image.element_size(), most, image.shape[3], *steps)


def unpack_weight(packed: torch.Tensor, w: torch.Tensor) -> None:
    """Copy the first C channels of packed (O, R, S, pitch) into w (O, C, R, S), contiguous or in channels_last."""
    o, c, r, s = w.shape
    row, pitch = packed.stride(0), packed.shape[3]
    if w.is_contiguous():  # as images of C rows with R*S columns and a single channel
        _copy(packed.as_strided((o, 1, c, r * s), (row, 1, 1, pitch)), w, (c, r * s, 1))
    else:
        _copy(packed.as_strided((o, c, 1, r * s), (row, 1, 1, pitch)), w, (1, r * s, c))


@triton.jit
def _pack_kernel(
    w_ptr, packed_ptr,
    ROWS, C, O, w_o, w_c, w_r, w_s,
    R: tl.constexpr, S: tl.constexpr, MEMBERS: tl.constexpr, PITCH: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M rows (o, r, s) of packed (ROWS, PITCH). A row has the C channels of its own member of the packed group
    at their place among the channels of all MEMBERS, and zeros elsewhere. Each member has O rows of w."""
    row = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    column = tl.arange(0, TILE_N)
    o = row // (R * S)
    c = column[None, :] - (o // O % MEMBERS * C)[:, None]
    inside = (row < ROWS)[:, None] & (column < PITCH)[None, :]
    w_row = o * w_o + row // S % R * w_r + row % S * w_s
    value = tl.load(w_ptr + (w_row[:, None] + c * w_c), mask=inside & (c >= 0) & (c < C), other=0.0)
    tl.store(packed_ptr + (row[:, None] * PITCH + column[None, :]), value, mask=inside)


def pack_weight(w: torch.Tensor, groups: int, members: int, step: int) -> torch.Tensor:
    """The weight with which a convolution in groups/members groups computes what one with w (O, C, R, S) computes in `groups`.

    Its shape is (O, members*C, R, S), in memory (O, R, S, C), with zeros up to a multiple of `step` channels.
    """
    o, c, r, s = w.shape
    packed = launch.empty((o, r, s, whole(members * c, step)), dtype=w.dtype, device=w.device)
    pitch = packed.shape[3]
    tile = picks.packed_weight(pitch)
    launch.launch(
        _pack_kernel, tiles.cdiv(o * r * s, tile.m), w, packed, o * r * s, c, o // groups, *w.stride(),
        R=r, S=s, MEMBERS=members, PITCH=pitch, TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    return packed.permute(0, 3, 1, 2)


def operand(x: torch.Tensor, phases: Pair = (1, 1)) -> torch.Tensor:
    """x, or if a descriptor can't read x, a copy in channels_last that is a multiple of `phases` in height and width, and of 16
    bytes in channels."""
    _, c, h, w = x.shape
    # Phases along a row lie one after the other in what a descriptor takes for channels, which steps of 16 must divide.
    unit = 16 if phases[1] > 1 else 16 // x.element_size()
    size = whole(h, phases[0]), whole(w, phases[1])
    if is_channels_last(x) and size == (h, w) and (phases[1] == 1 or c % unit == 0):
        return x
    return channels_last(x, pitch=whole(c, unit), size=size)


def weight_operand(w: torch.Tensor, step: int) -> torch.Tensor:
    """w (O, C, R, S), or a copy, that in memory is (O, R, S, C) with a multiple of `step` channels. The copy has zeros added."""
    in_order = is_channels_last(w) and rows_follow(w)
    return w if in_order and w.shape[1] % step == 0 else channels_last(w, pitch=whole(w.shape[1], step))


def gathered(x: torch.Tensor, c: int, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The image x that a convolution with the weight w and the result y gathers through pointers, or a copy in channels_last.

    Neighbouring threads take neighbouring channels, of c in each group. Where these lie apart, each thread asks for a sector of
    32 bytes for its element, and does so again for each tap. A copy reads and writes every element once.
    """
    flops = 2 * y.numel() // max(y.shape[1], 1) * w.numel()
    return channels_last(x) if x.stride(1) != 1 and c % 16 == 0 and flops >= picks.BOX_FLOPS else x
