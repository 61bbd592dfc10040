"""What the kernels of pooling and resampling share: one program computes some pixels of a volume (N, C, D, H, W), by some
channels. In channels_last every load and store is a vector of channels; otherwise neighbouring threads have neighbouring
pixels."""

import torch
import triton
import triton.language as tl

from ..runtime import tiles
from ..runtime.tiles import Tile
from .windows import Windows

_POOL = {True: 64, False: 1}
"""Channels of a tile by whether they are contiguous."""
_SIZE = {True: 1024, False: 256}
"""Pixels times channels."""

_WINDOWS = {64: Tile(16, 64, warps=4), 512: Tile(2, 512, warps=4), 2048: Tile(1, 2048, warps=4)}
"""m windows, n pixels at a time, by the most pixels for which it is taken; the last one for all beyond."""
_WINDOWS_LAST = Tile(32, 64, warps=4)
"""m windows of adjacent channels, n pixels at a time, in channels_last."""


def pick(volume: torch.Tensor) -> Tile:
    """The tile for a volume that is read or written: m pixels by n channels."""
    channels = volume.shape[1]
    last = volume.stride(1) == 1 and channels > 1
    n = min(_POOL[last], 1 << (channels - 1).bit_length())
    tile = Tile(_SIZE[last] // n, n, warps=4)
    return tiles.ask("pool", lambda: (tile,)) or tile


def large_tile(taps: int, last: bool) -> Tile:
    """The tile of windows of so many pixels, in channels_last or not."""
    tile = _WINDOWS_LAST if last else next((tile for most, tile in _WINDOWS.items() if taps <= most), _WINDOWS[2048])
    return tiles.ask("pool_large", lambda: (tile,)) or tile


def rows(x: torch.Tensor, windows: Windows) -> tuple[torch.Tensor, Windows]:
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


def merged(*volumes: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The volumes with the channels counted as further images of the batch, where that is possible for all of them and no
    channels are contiguous: then consecutive pixels of different channels are neighbours."""
    present = [v for v in volumes if v is not None]
    if any([v.stride(1) == 1 or (v.shape[0] > 1 and v.stride(0) != v.shape[1] * v.stride(1)) for v in present]):
        return [*volumes]
    return [v if v is None else v.flatten(0, 1).unsqueeze(1) for v in volumes]


def programs(volume: torch.Tensor, tile: Tile) -> int:
    """How many there are for a volume."""
    n, c, d, h, w = volume.shape
    return tiles.cdiv(n * d * h * w, tile.m) * tiles.cdiv(c, tile.n)


@triton.jit
def tile_of(POSITIONS, C, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    """The pixels and channels of this program, and which of them exist."""
    tiles_n = tl.cdiv(C, TILE_N)
    pid_n = tl.program_id(0) % tiles_n
    pid_m = tl.program_id(0) // tiles_n
    if WIDE:
        pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)
    m = pid_m * TILE_M + tl.arange(0, TILE_M)
    c = pid_n * TILE_N + tl.arange(0, TILE_N)
    return m, c, m < POSITIONS, c < C


@triton.jit
def coordinates(m, D, H, W):
    """Image, depth, row and column of pixels that are counted through the batch. Divided in turn, since the sizes of an image are
    32-bit numbers, whose product need not be one."""
    row = m // W
    plane = row // H
    return plane // D, plane % D, row % H, m % W


@triton.jit
def window(o, IN, OUT, K, S, DILATION, padding, ADAPTIVE: tl.constexpr):
    """Where window o begins, and the end of the pixels that it may hold."""
    if ADAPTIVE:
        return o * IN // OUT, ((o + 1) * IN + OUT - 1) // OUT
    else:
        begin = o * S - padding
        return begin, tl.minimum(begin + (K - 1) * DILATION + 1, IN)


@triton.jit
def windows_of(WINDOWS, C, OD, OH, OW, LAST: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr):
    """Image, channel, depth, row and column of each window of this program, and which of them exist. With LAST, the windows of a
    place's channels follow each other, otherwise those of a channel."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    m = pid * TILE_M + tl.arange(0, TILE_M)
    if LAST:
        c = m % C
        n, od, oh, ow = coordinates(m // C, OD, OH, OW)
    else:
        nc, od, oh, ow = coordinates(m, OD, OH, OW)
        n, c = nc // C, nc % C
    return n, c, od, oh, ow, m < WINDOWS


@triton.jit
def pixels_of(
    k, d_begin, h_begin, w_begin, d_end, h_end, w_end, K_H, K_W, DILATION_D, DILATION_H, DILATION_W, x_d, x_h, x_w,
    ROW: tl.constexpr,
):  # fmt: skip
    """Of the pixels k of each window, their offsets and which of them lie in the image. ROW: a window is a single row, so that
    nothing is divided, and neighbouring pixels can be loaded at once."""
    if ROW:
        w = w_begin[:, None] + (k * DILATION_W)[None, :]
        offsets, inside = (d_begin * x_d + h_begin * x_h)[:, None] + w * x_w, (w >= 0) & (w < w_end[:, None])
    else:
        d = d_begin[:, None] + (k // (K_W * K_H) * DILATION_D)[None, :]
        h = h_begin[:, None] + (k // K_W % K_H * DILATION_H)[None, :]
        w = w_begin[:, None] + (k % K_W * DILATION_W)[None, :]
        offsets, inside = d * x_d + h * x_h + w * x_w, (d >= 0) & (h >= 0) & (w >= 0)
        inside &= (d < d_end[:, None]) & (h < h_end[:, None]) & (w < w_end[:, None])
    return offsets, inside


@triton.jit
def holder(i, j, IN, OUT, K, S: tl.constexpr, DILATION: tl.constexpr, padding, ADAPTIVE: tl.constexpr):
    """The j-th of the windows that may hold pixel i, the pixel's number in it, and whether it does hold it."""
    if ADAPTIVE:
        o = i * OUT // IN + j
        return o, i - o * IN // OUT, (o < OUT) & (o * IN < (i + 1) * OUT)
    elif DILATION == 1:
        o = (i + padding) // S - j
        k = i + padding - o * S
        return o, k, (o >= 0) & (o < OUT) & (k < K)
    else:
        first = i + padding - j * DILATION
        o = first // S
        return o, j + 0 * i, (first >= 0) & (first % S == 0) & (o < OUT)
