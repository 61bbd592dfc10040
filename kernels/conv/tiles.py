"""The tiles of convolutions, and pure functions that pick from them by sizes, dtype and GPU model."""

import functools
from dataclasses import replace

import torch

from ..matmul.tiles import INTERPRETER, arithmetic, product, product_rows, products, shares
from ..runtime.tiles import Device, Tile, ask, cdiv, forced

# The tiles of convolutions by boxes: m channels of the result, n pixels, k channels that are summed; in the weight gradient m
# channels of x, n channels of dz, k pixels. An architecture that isn't listed here uses the kernels that load through pointers.
BOX_ARCHITECTURES = ("sm_90", "sm_100")
# Below, copying operands and making descriptors takes longer than the convolution; an estimate, not measured.
BOX_FLOPS = 500_000_000
_BOX = {
    ("16", "large"): Tile(128, 256, 64, warps=8, stages=4),
    ("16", "medium"): Tile(128, 128, 64, warps=8, stages=3),
    ("16", "narrow"): Tile(64, 128, 64, warps=4, stages=3),
    ("16", "small"): Tile(64, 64, 64, warps=4, stages=4),
    ("16", "weight grad"): Tile(128, 128, 64, warps=8, stages=4),
    ("16", "weight grad, wide"): Tile(128, 256, 64, warps=8, stages=3),
    ("16", "weight grad, narrow"): Tile(64, 64, 64, warps=4, stages=4),
    ("tf32", "large"): Tile(128, 128, 32, warps=8, stages=4),
    ("tf32", "medium"): Tile(128, 64, 32, warps=4, stages=3),
    ("tf32", "narrow"): Tile(64, 128, 32, warps=4, stages=4),
    ("tf32", "small"): Tile(64, 64, 32, warps=4, stages=4),
    ("tf32", "weight grad"): Tile(128, 64, 32, warps=8, stages=3),
    ("tf32", "weight grad, narrow"): Tile(64, 64, 32, warps=4, stages=3),
}
_BOX_ON = {
    "sm_100": {
        ("tf32", "narrow"): Tile(64, 64, 32, warps=8, stages=4),
        ("tf32", "small"): Tile(64, 64, 32, warps=8, stages=4),
    },
}
_CHANNELS_LAST = {pitch: Tile(4096 // pitch, pitch, warps=8) for pitch in (1, 2, 4, 8, 16, 32, 64)}

# Depthwise convolutions: the elements of a tile of m pixels and n channels, in channels_last by the bytes of an element. In NCHW
# n is 1, because neighbouring threads have to read neighbouring pixels, and every element needs an address of its own.
_DEPTHWISE_CHANNELS_LAST = {2: 2048, 4: 1024, 8: 512}
_DEPTHWISE_UNALIGNED = 512  # in channels_last too, if channels can't be loaded 128 bits at a time
_DEPTHWISE_NCHW = 256


def conv(pixels: int, channels: int, dtype: torch.dtype, precision: str, device: Device, *, vectors: bool) -> Tile:
    """The tile for a convolution, seen as a product (pixels, channels and taps) @ (channels and taps, channels)."""
    tile = ask("product", lambda: product_rows(dtype, precision, device, vectors=vectors, light=False))
    if tile is None and device.architecture == "interpreter":
        return INTERPRETER
    return tile or product(pixels, channels, 0, dtype, precision, device, vectors=vectors, light=False)


def conv_weight_grad(
    channels: int,
    columns: int,
    pixels: int,
    groups: int,
    dtype: torch.dtype,
    precision: str,
    device: Device,
    *,
    vectors: bool,
) -> tuple[Tile, int]:
    """The tile for a weight gradient, seen as a product (channels, pixels) @ (pixels, columns), and the number of shares of the
    pixels."""
    picked = products(device.architecture)[arithmetic(dtype, precision), "small" if vectors else "gather"]
    tile = ask("product", lambda: (picked,))
    if tile is None and device.architecture == "interpreter":
        return INTERPRETER, 1
    tile = tile or picked
    programs = cdiv(channels, tile.m) * cdiv(columns, tile.n) * groups
    return tile, shares(programs, cdiv(pixels, tile.k), device)


@functools.cache
def box_tiles(architecture: str) -> dict[tuple[str, str], Tile]:
    """The tiles of convolutions by boxes on one architecture."""
    return _BOX | _BOX_ON.get(architecture, {}) if architecture in BOX_ARCHITECTURES else {}


def takes_boxes(flops: int, dtype: torch.dtype, precision: str, device: Device) -> bool:
    """Whether convolutions load through tiled tensor descriptors. Strict float32 and float64 don't, because Triton compiles them
    to kilobytes of stack, nor do those that take less time than copying operands for a descriptor would."""
    if "box" in forced:
        return True
    fits = device.architecture in BOX_ARCHITECTURES and arithmetic(dtype, precision) in ("16", "tf32")
    return fits and flops >= BOX_FLOPS


@functools.lru_cache(maxsize=4096)
def box(pixels: int, images: tuple[int, int, int]) -> tuple[int, int, int]:
    """The box of `pixels` pixels (a power of two), in images, rows and columns, that covers `images` (N, H, W) with the fewest
    boxes. Of several, the widest, then the highest."""
    n, h, w = images
    sizes = [1 << i for i in range(pixels.bit_length())]
    boxes = [(pixels // (high * wide), high, wide) for wide in sizes for high in sizes if high * wide <= pixels]
    return min(boxes, key=lambda b: (cdiv(n, b[0]) * cdiv(h, b[1]) * cdiv(w, b[2]), -b[2], -b[1]))


@functools.lru_cache(maxsize=4096)
def packed_groups(groups: int, c: int, o: int, whole_c: int, whole_o: int) -> int:
    """How many groups of a convolution are computed as one, each with c input and o output channels; 0 if boxes can't compute it.

    As many are packed as fit into 64 channels, which a tile has anyway. If several packed groups remain, each must begin at a
    multiple of `whole_c` and `whole_o` channels, for which up to four larger groups may be packed.
    """
    if groups == 1:
        return 1
    divisors = [p for p in range(1, groups + 1) if groups % p == 0]
    fitting = [p for p in divisors if p == groups or (p * c % whole_c == 0 and p * o % whole_o == 0)]
    small = [p for p in fitting if p * max(c, o) <= 64]
    return max(small) if small else min((p for p in fitting if p <= 4), default=0)


def conv_box(
    channels: int,
    depth: int,
    images: tuple[int, int, int],
    copies: int,
    reach: int | None,
    dtype: torch.dtype,
    precision: str,
    device: Device,
    *,
    crowded: bool,
) -> tuple[Tile, tuple[int, int, int]]:
    """The tile and the box for `copies` convolutions of `images` (N, H, W) to `channels` channels, each a sum over taps and
    `depth` channels.

    Args:
        reach: a step of the sum must divide this number of channels, because those after them belong elsewhere; or None.
        crowded: the epilogue needs offsets of 64 bits, a residual in NCHW, a second sum, or to measure the result, for which the
            large tile has no registers.
    """
    kind, tiles = arithmetic(dtype, precision), box_tiles(device.architecture)
    large = () if crowded else ("large",)
    tile = ask("box", lambda: (tiles[kind, size] for size in (*large, "medium", "narrow", "small")))
    if tile is None:
        pixels = images[0] * images[1] * images[2]
        for size in (*large, "medium") if channels > 64 else ("narrow",):
            tile = tiles[kind, size]
            if 4 * copies * cdiv(channels, tile.m) * cdiv(pixels, tile.n) >= 3 * device.multiprocessors:
                break
        else:
            tile = tiles[kind, "small"]
    k = tile.k
    while k > 16 and (k >= 2 * depth if reach is None else reach % k):
        k //= 2
    return replace(tile, k=k), box(tile.n, images)


def conv_box_weight_grad(
    c: int, o: int, images: tuple[int, int, int], copies: int, dtype: torch.dtype, precision: str, device: Device
) -> tuple[Tile, tuple[int, int, int], int]:
    """The tile, the box and the number of shares of the pixels for `copies` weight gradients (c, pixels) @ (pixels, o), one for
    each tap and group."""
    kind, tiles = arithmetic(dtype, precision), box_tiles(device.architecture)
    tile = ask("box", lambda: (row for (k, size), row in tiles.items() if k == kind and size.startswith("weight grad")))
    if tile is None:
        size = ", narrow" if min(c, o) <= 64 else ", wide" if kind == "16" and o % 256 == 0 else ""
        tile = tiles[kind, f"weight grad{size}"]
    shape = box(tile.k, images)
    steps = cdiv(images[0], shape[0]) * cdiv(images[1], shape[1]) * cdiv(images[2], shape[2])
    programs = cdiv(c, tile.m) * cdiv(o, tile.n) * copies
    return tile, shape, shares(programs, steps, device)


def depthwise(channels: int, dtype: torch.dtype, *, channels_last: bool, vectors: bool) -> Tile:
    """A tile of m pixels and n channels.

    Args:
        vectors: the channels can be loaded 128 bits at a time. Element by element, the addresses alone fill the registers of a
            large tile.
    """
    if channels_last:
        n = min(64, 1 << (channels - 1).bit_length())
        elements = _DEPTHWISE_CHANNELS_LAST[dtype.itemsize]
        tile = Tile((elements if vectors else min(elements, _DEPTHWISE_UNALIGNED)) // n, n)
    else:
        tile = Tile(_DEPTHWISE_NCHW, 1)
    return ask("depthwise", lambda: (tile,)) or tile


def depthwise_weight_grad(
    channels: int, pixels: int, r: int, s: int, dtype: torch.dtype, device: Device, *, channels_last: bool
) -> tuple[Tile, int]:
    """A tile of m pixels, n channels and k >= s taps, and the number of shares of the pixels: enough for several programs on each
    multiprocessor, but with at least eight steps in each."""
    tile = depthwise(channels, dtype, channels_last=channels_last, vectors=True)
    taps = 1 << (s - 1).bit_length()
    tile = replace(tile, m=max(1, 2 * tile.m // taps), k=taps)
    programs = r * cdiv(channels, tile.n)
    return tile, max(1, min(cdiv(8 * device.multiprocessors, programs), cdiv(pixels, 8 * tile.m)))


def channels_last(pitch: int) -> Tile:
    """A tile of m pixels and n channels for a copy to channels_last."""
    tile = _CHANNELS_LAST[min(64, 1 << (pitch - 1).bit_length())]
    return ask("channels_last", lambda: (tile,)) or tile


def packed_weight(pitch: int) -> Tile:
    """A tile of m rows with all of their n channels, for the weight of packed groups."""
    n = 1 << (pitch - 1).bit_length()
    return Tile(max(4096 // n, 1), n, warps=8)
