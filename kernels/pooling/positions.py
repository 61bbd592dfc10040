"""What the kernels of pooling and resampling share: one program computes some pixels of a volume (N, C, D, H, W), by some
channels. In channels_last every load and store is a vector of channels; otherwise neighbouring threads have neighbouring
pixels."""

import torch
import triton
import triton.language as tl

from ..runtime import tiles
from ..runtime.tiles import Tile

_POOL = {True: 64, False: 1}
"""Channels of a tile by whether they are contiguous."""
_SIZE = {True: 1024, False: 256}
"""Pixels times channels."""


def pick(volume: torch.Tensor) -> Tile:
    """The tile for a volume that is read or written: m pixels by n channels."""
    channels = volume.shape[1]
    last = volume.stride(1) == 1 and channels > 1
    n = min(_POOL[last], 1 << (channels - 1).bit_length())
    tile = Tile(_SIZE[last] // n, n, warps=4)
    return tiles.ask("pool", lambda: (tile,)) or tile


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
def holder(i, j, IN, OUT, K: tl.constexpr, S: tl.constexpr, DILATION: tl.constexpr, padding, ADAPTIVE: tl.constexpr):
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
        return o, j, (first >= 0) & (first % S == 0) & (o < OUT)
