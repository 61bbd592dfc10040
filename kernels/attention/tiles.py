"""The tiles of attention, by kernel, kind of arithmetic and head dim, and a pure function that picks one."""

import torch

from ..runtime.tiles import Device, Tile, ask

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
    ("64", 64): (Tile(16, 16, warps=4, stages=1), Tile(16, 16, warps=4, stages=1)),
    ("64", 128): (Tile(16, 16, warps=8, stages=1), Tile(16, 16, warps=8, stages=1)),
}
_DKDV = {
    ("16", 64): (Tile(32, 128, warps=8, stages=2), Tile(32, 64, warps=8, stages=1)),
    ("16", 128): (Tile(32, 64, warps=8, stages=2), Tile(32, 64, warps=8, stages=1)),
    ("16", 256): (Tile(32, 32, warps=8, stages=1), Tile(16, 32, warps=8, stages=1)),
    ("32", 64): (Tile(32, 32, warps=8, stages=1), Tile(32, 32, warps=8, stages=1)),
    ("32", 128): (Tile(16, 16, warps=4, stages=1), Tile(16, 16, warps=4, stages=1)),
    ("32", 256): (Tile(16, 16, warps=8, stages=1), Tile(16, 16, warps=8, stages=1)),
    ("64", 64): (Tile(16, 16, warps=4, stages=1), Tile(16, 16, warps=4, stages=1)),
    ("64", 128): (Tile(16, 16, warps=8, stages=1), Tile(16, 16, warps=8, stages=1)),
}
_TABLES = {"attention": _FORWARD, "attention_dq": _DQ, "attention_dkdv": _DKDV}

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
    ("gfx942", "attention_dq", 128): Tile(64, 32, warps=4, stages=1),
}

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
        table: "attention", "attention_dq" or "attention_dkdv".
        features: the larger one of the two tiles of features: 16, 32, 64, 128 or 256.
        plain: no mask, no dropout, and rows that are loaded 128 bits at a time.
        boxes: descriptors load them.
    """

    def picked() -> Tile:
        if device.architecture == "interpreter":
            return INTERPRETER
        width = max(features, 64)
        kind = {2: "16", 4: "32", 8: "64"}[dtype.itemsize]
        rows = _BOXES[table][width] if boxes else _TABLES[table][kind, width]
        if plain and kind == "16":
            return _SMALLER.get((device.architecture, table, width), rows[0])
        return rows[0] if plain else rows[1]

    forced: Tile | None = ask(table, lambda: (picked(),))
    return picked() if forced is None else forced
