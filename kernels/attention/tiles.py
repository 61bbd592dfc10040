"""The tiles of attention, by kernel, kind of arithmetic and head dim, and a pure function that picks one."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..runtime.tiles import Device, Tile, ask, cdiv

# m queries and n keys at a time. Kinds of arithmetic:
#   "16"     float16 and bfloat16 on tensor cores
#   "tf32"   float32 on tensor cores             "tf32x3"  strict float32, each number in two, on NVIDIA's tensor cores
#   "ieee"   strict float32 on AMD's             "64"      float64
# "plain": without a mask and dropout, with rows that are loaded 128 bits at a time; "careful": all else, whose addresses, masks
# and random numbers take registers.
_FORWARD = {
    ("16", 64): (Tile(128, 64, warps=8, stages=3), Tile(64, 64, warps=8, stages=2)),
    ("16", 128): (Tile(128, 32, warps=8, stages=3), Tile(64, 64, warps=8, stages=2)),
    ("16", 256): (Tile(64, 32, warps=8, stages=2), Tile(32, 32, warps=8, stages=1)),
    ("32", 64): (Tile(64, 32, warps=8, stages=2), Tile(32, 32, warps=8, stages=1)),
    ("32", 128): (Tile(32, 16, warps=8, stages=1), Tile(32, 16, warps=8, stages=1)),
    ("32", 256): (Tile(16, 16, warps=8, stages=1), Tile(16, 16, warps=8, stages=1)),
    ("64", 64): (Tile(16, 16, warps=4, stages=1), Tile(16, 16, warps=8, stages=1)),
    ("64", 128): (Tile(16, 16, warps=8, stages=1), Tile(16, 16, warps=8, stages=1)),
}
_DQ = {
    ("16", 64): (Tile(64, 64, warps=8, stages=2), Tile(64, 64, warps=8, stages=2)),
    ("16", 128): (Tile(64, 64, warps=8, stages=2), Tile(32, 64, warps=8, stages=1)),
    ("16", 256): (Tile(32, 32, warps=8, stages=1), Tile(32, 32, warps=8, stages=1)),
    ("32", 64): (Tile(32, 32, warps=8, stages=1), Tile(32, 32, warps=8, stages=1)),
    ("32", 128): (Tile(16, 16, warps=8, stages=1), Tile(16, 16, warps=8, stages=1)),
    ("32", 256): (Tile(16, 16, warps=8, stages=1), Tile(16, 16, warps=8, stages=1)),
    ("64", 64): (Tile(16, 16, warps=8, stages=1), Tile(16, 16, warps=8, stages=1)),
    ("64", 128): (Tile(16, 16, warps=8, stages=1), Tile(16, 16, warps=8, stages=1)),
}
_DKDV = {
    ("16", 64): (Tile(32, 128, warps=8, stages=2), Tile(32, 64, warps=8, stages=1)),
    ("16", 128): (Tile(32, 64, warps=8, stages=2), Tile(32, 64, warps=8, stages=1)),
    ("16", 256): (Tile(32, 32, warps=8, stages=1), Tile(16, 32, warps=8, stages=1)),
    ("32", 32): (Tile(32, 16, warps=4, stages=1), Tile(32, 16, warps=4, stages=1)),  # with 8 warps of 32 x 32 it spills
    ("32", 64): (Tile(32, 32, warps=8, stages=1), Tile(32, 32, warps=8, stages=1)),
    ("32", 128): (Tile(16, 16, warps=4, stages=1), Tile(16, 16, warps=4, stages=1)),
    ("32", 256): (Tile(16, 16, warps=8, stages=1), Tile(16, 16, warps=8, stages=1)),
    ("64", 64): (Tile(16, 16, warps=4, stages=1), Tile(16, 16, warps=4, stages=1)),
    ("64", 128): (Tile(16, 16, warps=8, stages=1), Tile(16, 16, warps=8, stages=1)),
}
_WEIGHTS = {
    ("16", 64): (Tile(64, 64, warps=8, stages=2), Tile(64, 64, warps=8, stages=1)),
    ("16", 128): (Tile(64, 64, warps=8, stages=2), Tile(64, 64, warps=8, stages=1)),
    ("16", 256): (Tile(32, 64, warps=8, stages=1), Tile(32, 32, warps=8, stages=1)),
    ("32", 64): (Tile(32, 32, warps=8, stages=2), Tile(32, 32, warps=8, stages=1)),
    ("32", 128): (Tile(32, 32, warps=8, stages=1), Tile(16, 16, warps=8, stages=1)),
    ("32", 256): (Tile(16, 16, warps=8, stages=1), Tile(16, 16, warps=8, stages=1)),
    ("64", 64): (Tile(16, 16, warps=4, stages=1), Tile(16, 16, warps=4, stages=1)),
    ("64", 128): (Tile(16, 16, warps=8, stages=1), Tile(16, 16, warps=8, stages=1)),
}
_TABLES = {"attention": _FORWARD, "attention_dq": _DQ, "attention_dkdv": _DKDV, "attention_weights": _WEIGHTS}

_MASK_GRAD = {
    "16": Tile(64, 32, 32, warps=8, stages=2),
    "32": Tile(32, 16, 32, warps=8, stages=1),
    "64": Tile(16, 16, 32, warps=4, stages=1),
}
"""k features at a time."""

# Through descriptors, "16" alone.
_BOXES = {
    "attention": {
        64: (Tile(128, 128, warps=8, stages=3), Tile(64, 64, warps=8, stages=2)),
        128: (Tile(128, 128, warps=8, stages=2), Tile(64, 64, warps=8, stages=2)),
        256: (Tile(128, 64, warps=8, stages=2), Tile(64, 32, warps=8, stages=2)),
    },
    "attention_dq": {
        64: (Tile(128, 128, warps=8, stages=2), Tile(64, 64, warps=8, stages=2)),
        128: (Tile(128, 64, warps=8, stages=2), Tile(64, 64, warps=8, stages=2)),
        256: (Tile(64, 32, warps=8, stages=2), Tile(32, 32, warps=8, stages=2)),
    },
    "attention_dkdv": {
        64: (Tile(64, 128, warps=8, stages=2), Tile(32, 64, warps=8, stages=2)),
        128: (Tile(32, 128, warps=8, stages=2), Tile(32, 64, warps=8, stages=2)),
        256: (Tile(32, 64, warps=8, stages=2), Tile(32, 32, warps=8, stages=2)),
    },
}
BOX_ARCHITECTURES = ("sm_90", "sm_100")

# Plain ones, where the compiler of a GPU needs more registers.
_SMALLER = {
    ("sm_100", "attention_dkdv", 128): Tile(32, 64, warps=8, stages=2),
    ("sm_100", "attention_weights", 64): Tile(64, 32, warps=8, stages=2),
    ("gfx942", "attention_dq", 128): Tile(64, 32, warps=4, stages=1),
}

# Where keys are shared out: for up to 16 queries of a group of heads, which is the fewest rows that a product has, and for more.
_SHARES = {
    ("16", 64): (Tile(16, 64, warps=4, stages=3), Tile(64, 64, warps=8, stages=2)),
    ("16", 128): (Tile(16, 64, warps=4, stages=2), Tile(64, 64, warps=8, stages=2)),
    ("16", 256): (Tile(16, 32, warps=4, stages=2), Tile(32, 32, warps=8, stages=1)),
    ("32", 64): (Tile(16, 32, warps=4, stages=2), Tile(32, 32, warps=8, stages=1)),
    ("32", 128): (Tile(16, 16, warps=4, stages=2), Tile(16, 16, warps=4, stages=2)),
    ("32", 256): (Tile(16, 16, warps=8, stages=1), Tile(16, 16, warps=8, stages=1)),
    ("64", 64): (Tile(16, 16, warps=8, stages=1), Tile(16, 16, warps=8, stages=1)),
    ("64", 128): (Tile(16, 16, warps=8, stages=1), Tile(16, 16, warps=8, stages=1)),
}


@dataclass(frozen=True)
class Shares:
    """How attention runs whose keys are shared out."""

    tile: Tile
    shares: int
    """Among how many programs. What one alone finds is the result."""


INTERPRETER = Tile(128, 128)
"""The interpreter's time depends on the number of programs and steps, not on that of elements."""

WIDEST = 256
WIDEST_IN_FLOAT64 = 128
"""The most features of a head, for which there is room in registers and shared memory."""


def precision(dtype: torch.dtype, asked: str, device: Device) -> str:
    """How products are computed. Strict float32 takes three products of tensor cores on NVIDIA's GPUs, as in torch's own kernels:
    one by one, without tensor cores, their additions would take far longer than all else together."""
    if dtype == torch.float32 and asked == "ieee" and device.architecture.startswith("sm_"):
        return "tf32x3"
    return asked if dtype == torch.float32 else "ieee"


def pick(table: str, dtype: torch.dtype, features: int, device: Device, *, plain: bool, boxes: bool) -> Tile:
    """The tile of a kernel.

    Args:
        table: "attention", "attention_dq", "attention_dkdv" or "attention_weights".
        features: the larger one of the two tiles of features: 16, 32, 64, 128 or 256.
        plain: no mask, no dropout, and rows that are loaded 128 bits at a time.
        boxes: descriptors load them.
    """

    def picked() -> Tile:
        if device.architecture == "interpreter":
            return INTERPRETER
        width = max(features, 64)
        kind = {2: "16", 4: "32", 8: "64"}[dtype.itemsize]
        tiles = _TABLES[table]
        rows = _BOXES[table][width] if boxes else tiles.get((kind, features)) or tiles[kind, width]
        if plain and kind == "16":
            return _SMALLER.get((device.architecture, table, width), rows[0])
        return rows[0] if plain else rows[1]

    forced: Tile | None = ask(table, lambda: (picked(),))
    return picked() if forced is None else forced


def shares(
    batch: int, heads: int, group: int, queries: int, keys: int, dtype: torch.dtype, features: int, device: Device
) -> Shares | None:
    """How the keys are shared out; None where a program should take all keys of its queries.

    It pays where few queries leave multiprocessors idle, or where several heads would read the same keys and values. Each share
    has at least four steps of the loop, and there are two programs for each multiprocessor at most: more would only have more to
    put together.

    Args:
        heads: the number of heads of queries, of which `group` share a head of keys and values.
        features: as for `pick`.
    """
    rows = group * queries
    few, many = _SHARES[{2: "16", 4: "32", 8: "64"}[dtype.itemsize], max(features, 64)]
    long = keys >= 256

    def right() -> Iterator[Shares]:
        for tile in (few, many) if long and rows <= 64 else ():
            yield from (Shares(tile, 1), Shares(tile, 2))

    forced: Shares | None = ask("attention_shares", right)
    if forced is not None or device.architecture == "interpreter" or not long:
        return forced
    tile = few if rows <= 16 else many
    programs = batch * heads // group * cdiv(rows, tile.m)
    found = max(1, min(2 * device.multiprocessors // max(programs, 1), cdiv(keys, tile.n) // 4))
    if rows <= 64:
        # A tile of 16 rows computes less for a few queries than the least one of the kernel for many.
        return Shares(tile, found) if found > 1 or group > 1 or rows <= 16 else None
    # Programs with more queries each fetch their keys faster, where there are enough of them.
    idle = 4 * batch * heads * cdiv(queries, 128) <= device.multiprocessors
    return Shares(tile, found) if idle and found > 1 else None


def mask_tile(dtype: torch.dtype, device: Device) -> Tile:
    """The tile of the gradient of a mask."""
    picked = _MASK_GRAD[{2: "16", 4: "32", 8: "64"}[dtype.itemsize]]
    if device.architecture == "interpreter":
        picked = Tile(128, 128, WIDEST)
    return ask("attention_mask_grad", lambda: (picked,)) or picked


def mask_shares(programs: int, steps: int, device: Device) -> int:
    """How many programs share each sum of the gradient of a mask, where there are so many sums of so many steps: as many as make
    two programs for each multiprocessor, with at least four steps each."""
    picked = max(1, min(2 * device.multiprocessors // max(programs, 1), steps // 4))
    forced: int | None = ask("attention_mask_shares", lambda: (1, 2))
    return picked if forced is None else forced
