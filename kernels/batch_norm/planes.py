"""How the kernels of batch, group and instance normalisation see a tensor: N images of C channels of P pixels each, and tiles of
channels by pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from ..runtime import launch, tiles
from ..runtime.tiles import Tile, cdiv

# Tiles of m channels by n pixels, a thread holding 16 elements (8 in float64). Where the pixels of a channel lie next to each
# other, the first tile is taken that is as wide as an image has pixels; where the channels of a pixel do, the first that is as
# wide as a pixel has channels.
_PIXELS = {
    torch.float32: (Tile(128, 16), Tile(32, 64), Tile(8, 256), Tile(2, 1024)),
    torch.float64: (Tile(64, 16), Tile(16, 64), Tile(4, 256), Tile(1, 1024)),
}
_CHANNELS = {
    torch.float32: (Tile(16, 128), Tile(64, 32), Tile(256, 8)),
    torch.float64: (Tile(16, 64), Tile(64, 16), Tile(256, 4)),
}
_PER_MULTIPROCESSOR = 4
"""How many programs that compute sums are meant to run on a multiprocessor at once."""


@dataclass(frozen=True)
class Planes:
    """Sizes as the kernels see them.

    Statistics are taken of each channel over all images (`across`), or of each of `groups` groups of channels in each image. In
    the first case, images whose pixels follow each other without a gap, as in channels_last, are one image.
    """

    n: int
    c: int
    p: int
    groups: int
    across: bool
    last: bool
    """Whether the channels of a pixel lie next to each other: channels_last, or a single pixel an image."""

    @staticmethod
    def of(t: Any, groups: int | None = None) -> Planes:
        """Of a tensor (N, C, *), or of what is described. In its memory format all others are read, by way of a copy if need be.

        Args:
            groups: None for statistics over all images.
        """
        n, c, p = t.shape[0], t.shape[1], math.prod(t.shape[2:])
        last = p == 1 or (c > 1 and t.stride()[1] == 1)
        across = groups is None
        if across and last:
            n, p = 1, n * p
        return Planes(n, c, p, c if groups is None else groups, across, last)

    @property
    def statistics(self) -> int:
        return self.groups if self.across else self.n * self.groups

    @property
    def depth(self) -> int:
        """The number of channels of a group."""
        return self.c // self.groups

    def rows(self, t: torch.Tensor | None) -> torch.Tensor | None:
        """A tensor as (N, C, P), or (N, P, C) if `last`, with contiguous rows: a view where its strides allow one."""
        if t is None:
            return None
        if self.last:
            t = t.movedim(1, -1).reshape(self.n, self.p, self.c)
        else:
            t = t.reshape(self.n, self.c, self.p)
        return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()

    def tile(self, accumulate: torch.dtype, vector: int) -> Tile:
        table = (_CHANNELS if self.last else _PIXELS)[accumulate]
        size = self.c if self.last else self.p
        tile = next((tile for tile in table if size <= (tile.m if self.last else tile.n)), table[-1])
        if vector <= 2:  # elements with an address each take twice the registers
            tile = replace(tile, warps=8)
        return tiles.ask("batch_norm", lambda: (tile,)) or tile

    def slices(self, tile: Tile, device: tiles.Device) -> Slices:
        """How images and pixels are divided among the programs that compute sums."""
        wanted = max(1, _PER_MULTIPROCESSOR * device.multiprocessors // cdiv(self.c, tile.m))
        images = cdiv(self.n, min(self.n, wanted)) if self.across else 1
        steps = cdiv(self.p, tile.n)
        pixels = cdiv(steps, min(steps, max(1, wanted // cdiv(self.n, images)))) * tile.n
        return Slices(images, pixels, cdiv(self.n, images), cdiv(self.p, pixels))


@dataclass(frozen=True)
class Slices:
    """Each slice is `images` images by `pixels` pixels; the last ones of each may be smaller. There are `rows` by `columns`."""

    images: int
    pixels: int
    rows: int
    columns: int

    @property
    def count(self) -> int:
        return self.rows * self.columns


def strides(rows: torch.Tensor | None) -> tuple[int, int]:
    """From image to image and from row to row; 0 where there is only one."""
    if rows is None:
        return 0, 0
    return (rows.stride(0) if rows.shape[0] > 1 else 0), (rows.stride(1) if rows.shape[1] > 1 else 0)


def vector(*tensors: torch.Tensor | None) -> int:
    """The most elements, up to 8, that can be loaded from rows of all of these at a time."""
    found = 8
    for t in tensors:
        if t is not None:
            found = math.gcd(found, t.shape[2], *strides(t))
    return found


def per_channel(t: torch.Tensor | None) -> torch.Tensor | None:
    """A vector of numbers for channels, contiguous."""
    return t if t is None or t.stride(0) == 1 else t.contiguous()


def is_wide(planes: Planes, *tensors: torch.Tensor | None) -> bool:
    return launch.wide(*tensors, elements=planes.n * planes.c * planes.p)


# In all kernels VEC divides the contiguous size and the strides, and `C // VEC * VEC` tells Triton so, which otherwise knows only
# of numbers that 16 divides.


@triton.jit
def offsets(c, p, row, LAST: tl.constexpr):
    """Offsets of a tile of channels by pixels from the first element of its image."""
    if LAST:
        found = c[:, None] + p[None, :] * row
    else:
        found = c[:, None] * row + p[None, :]
    return found


@triton.jit
def multiples(C, P, LAST: tl.constexpr, VEC: tl.constexpr):
    """C and P, of which VEC divides the contiguous one."""
    if LAST:
        C = C // VEC * VEC
    else:
        P = P // VEC * VEC
    return C, P
