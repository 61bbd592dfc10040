"""The tiles of matrix products, and pure functions that pick a tile and a kernel from sizes, dtype and GPU model.

Convolutions that load through pointers use the same tiles.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..runtime.tiles import Device, Tile, ask, cdiv

# The tiles of matrix products and convolutions through pointers, by (kind of arithmetic, size class).
#   "16"   float16 and bfloat16 on tensor cores        "tf32"  float32 on tensor cores
#   "ieee" strict float32, without tensor cores        "64"    float64
# "gather" is for operands that can't be loaded 128 bits at a time, and for offsets of 64 bits: the addresses take the registers
# that a larger tile would need.
_PRODUCT = {
    ("16", "large"): Tile(128, 256, 32, warps=8, stages=3),
    ("16", "medium"): Tile(128, 128, 64, warps=8, stages=3),
    ("16", "small"): Tile(64, 64, 64, warps=4, stages=3),
    ("16", "skinny"): Tile(16, 128, 64, warps=4, stages=3),
    ("16", "gather"): Tile(64, 64, 32, warps=8, stages=3),
    ("tf32", "large"): Tile(128, 128, 32, warps=8, stages=3),
    ("tf32", "medium"): Tile(128, 64, 32, warps=4, stages=3),
    ("tf32", "small"): Tile(64, 64, 32, warps=4, stages=3),
    ("tf32", "skinny"): Tile(16, 64, 64, warps=4, stages=3),
    ("tf32", "gather"): Tile(32, 64, 32, warps=8, stages=2),
    ("ieee", "large"): Tile(128, 128, 16, warps=8, stages=3),
    ("ieee", "medium"): Tile(128, 64, 16, warps=8, stages=3),
    ("ieee", "small"): Tile(32, 32, 16, warps=4, stages=3),
    ("ieee", "skinny"): Tile(16, 64, 32, warps=4, stages=3),
    ("ieee", "gather"): Tile(32, 32, 16, warps=8, stages=2),
    ("64", "large"): Tile(64, 64, 16, warps=8, stages=2),
    ("64", "medium"): Tile(64, 32, 16, warps=4, stages=1),
    ("64", "small"): Tile(32, 32, 16, warps=8, stages=2),
    ("64", "skinny"): Tile(16, 32, 16, warps=4, stages=2),
    ("64", "gather"): Tile(32, 32, 16, warps=8, stages=2),
}

# What differs on an architecture, because it has more shared memory or its compiler uses registers otherwise.
_PRODUCT_ON = {
    "sm_86": {("16", "small"): Tile(64, 64, 64, warps=8, stages=3)},
    "sm_89": {("16", "small"): Tile(64, 64, 64, warps=8, stages=3)},
    "sm_90": {
        ("16", "large"): Tile(128, 256, 64, warps=8, stages=3),
        ("ieee", "small"): Tile(64, 64, 16, warps=4, stages=3),
    },
    "sm_100": {
        ("16", "large"): Tile(128, 256, 64, warps=8, stages=3),
        ("16", "gather"): Tile(64, 64, 32, warps=8, stages=1),
        ("tf32", "medium"): Tile(128, 64, 32, warps=8, stages=2),
        ("tf32", "small"): Tile(64, 64, 32, warps=8, stages=3),
        ("tf32", "gather"): Tile(32, 64, 32, warps=8, stages=1),
        ("64", "medium"): Tile(64, 32, 16, warps=8, stages=3),
    },
}

# The interpreter's time depends on the number of programs and steps, not on that of elements, so its tiles are large.
INTERPRETER = Tile(128, 128, 128)


@dataclass(frozen=True)
class Product:
    """How one matrix product runs: in which tile, by which kernel, in how many shares of K."""

    tile: Tile
    precision: str
    splits: int = 1
    descriptors: bool = False
    """Whether the tensor memory accelerator fetches the tiles of a and b through descriptors."""
    programs: int = 0
    """For a persistent kernel, the number of programs, each of which computes several tiles; 0 for a program for each tile."""
    transposed: bool = False
    """Whether c^T = b^T @ a^T is computed. A tile has at least 64 rows but only 16 columns, so few rows of a are columns then."""
    copied: bool = False
    """Whether operands whose k isn't contiguous are copied first (transpose.py), rather than transposed tile by tile."""
    specialized: bool = False
    """Whether the warps of a program have different jobs (experimental/specialized.py). Such a kernel is persistent as well."""


# Products through descriptors: each tile with the share of the arithmetic peak that its main loop is assumed to reach. The
# shares are estimates from published figures; none has been measured.
#   "tf32x3", "bf16x6": strict float32 on tensor cores, with each number split into two or three; see STRICT
_DESCRIPTORS_SM_90 = {
    "16": {
        Tile(128, 256, 64, warps=8, stages=4): 1.0,
        Tile(256, 128, 64, warps=8, stages=4): 1.0,
        Tile(128, 128, 64, warps=8, stages=4): 0.9,
        Tile(64, 256, 64, warps=4, stages=4): 0.85,
        Tile(64, 128, 64, warps=4, stages=4): 0.8,
        Tile(64, 64, 64, warps=4, stages=5): 0.6,
    },
    "tf32": {
        Tile(128, 256, 32, warps=8, stages=3): 1.0,
        Tile(128, 128, 32, warps=8, stages=4): 0.9,
        Tile(64, 128, 32, warps=4, stages=4): 0.8,
        Tile(64, 64, 32, warps=4, stages=4): 0.6,
    },
    "tf32x3": {
        Tile(128, 128, 32, warps=8, stages=3): 0.9,
        Tile(64, 64, 32, warps=4, stages=3): 0.6,
    },
    "bf16x6": {
        Tile(128, 128, 32, warps=8, stages=3): 0.9,
        Tile(64, 64, 32, warps=4, stages=3): 0.6,
    },
}
# On sm_100 these tiles need more shared memory, for operands that the compiler transposes, or more registers than there are.
_INSTEAD_ON_SM_100 = {
    Tile(64, 256, 64, warps=4, stages=4): None,
    Tile(128, 256, 32, warps=8, stages=3): None,
    Tile(64, 64, 32, warps=4, stages=4): Tile(64, 64, 32, warps=8, stages=4),
    Tile(64, 64, 32, warps=4, stages=3): None,
}
_DESCRIPTORS = {
    "sm_90": _DESCRIPTORS_SM_90,
    "sm_100": {
        kind: {there: share for tile, share in tiles.items() if (there := _INSTEAD_ON_SM_100.get(tile, tile))}
        for kind, tiles in _DESCRIPTORS_SM_90.items()
    },
}

# Transposed products, for up to 64 rows of a. They read the weight once, in rows of 256 bytes, and fetch it many steps ahead.
_SKINNY_SM_90 = {
    "16": (
        Tile(64, 16, 128, warps=4, stages=6),
        Tile(64, 32, 128, warps=4, stages=5),
        Tile(64, 64, 128, warps=4, stages=4),
    ),
    "tf32": (
        Tile(64, 16, 64, warps=4, stages=6),
        Tile(64, 32, 64, warps=4, stages=5),
        Tile(64, 64, 64, warps=4, stages=4),
    ),
}
_SKINNY = {"sm_90": _SKINNY_SM_90, "sm_100": _SKINNY_SM_90}

STRICT: dict[str, str] = {}
"""How strict float32 is computed on tensor cores, by architecture, for example {"sm_90": "tf32x3"}. Empty: it is not.

The error hasn't been measured on a device, and a factor within 2**-12 of float32's maximum gives infinity, because its split
overflows (docs/decisions/0006). An architecture may be added once
tests/test_gpu.py::test_strict_float32_on_tensor_cores has passed on it.
"""


SPECIALIZED: tuple[str, ...] = ()
"""Architectures on which large products in 16 bits run by experimental/specialized.py, for example ("sm_90",).

Empty, because no device has run that kernel. An architecture may be added once
tests/test_gpu.py::test_specialized_products has passed on it and `python -m bench picks` finds this kernel the fastest.
"""
_SPECIALIZED = Tile(128, 256, 64, warps=4, stages=3)


@dataclass(frozen=True)
class _Clock:
    """What the estimate assumes that a GPU does in one cycle of its multiprocessors. Not measured. `flops` is by data sheets, and
    the bytes are seeds: by its data sheet an H100 has 1,830 from memory, an H200 2,620."""

    flops: float
    """FLOPs of one multiprocessor in 16-bit matrix products"""
    cache: float
    """bytes from L2 to one multiprocessor"""
    stream: float
    """bytes from memory to one multiprocessor"""
    memory: float
    """bytes from memory to all of them"""


_COPIED = ("tf32", "tf32x3")  # what tensor cores take with contiguous k alone
_CLOCKS = {"sm_90": _Clock(4096, 64, 32, 2350), "sm_100": _Clock(8192, 64, 48, 4200)}
_SHARE_OF_16 = {"16": 1, "tf32": 1 / 2, "tf32x3": 1 / 6, "bf16x6": 1 / 6}


def arithmetic(dtype: torch.dtype, precision: str) -> str:
    """The name of the arithmetic in the tables."""
    if dtype == torch.float64:
        return "64"
    return "16" if dtype.itemsize == 2 else precision


def products(architecture: str) -> dict[tuple[str, str], Tile]:
    """The tiles of matrix products on one architecture."""
    return _PRODUCT | _PRODUCT_ON.get(architecture, {})


def product_rows(
    dtype: torch.dtype, precision: str, device: Device, *, vectors: bool, light: bool, turned: bool = False
) -> Iterator[Tile]:
    """All tiles that `product` may pick, whatever the sizes."""
    sizes = (*(("large",) if light and not turned else ()), "medium", "small", "skinny") if vectors else ("gather",)
    for size in sizes:
        yield products(device.architecture)[arithmetic(dtype, precision), size]


def product(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    precision: str,
    device: Device,
    *,
    vectors: bool,
    light: bool,
    turned: bool = False,
) -> Tile:
    """The largest tile that compiles without spills and gives at least three quarters of the multiprocessors a program.

    Args:
        vectors: both operands can be loaded 128 bits at a time. Element by element, or with offsets of 64 bits, the
            addresses alone fill the registers of all but small tiles.
        light: the epilogue needs few registers, so that the large tile compiles without spills, and K may be shared out.
        turned: tiles of b are turned (turned.py), for which the large tile has no registers.
    """
    kind = arithmetic(dtype, precision)
    tiles = products(device.architecture)
    if not vectors:
        return tiles[kind, "gather"]
    if m <= 16 and n >= 64:
        return tiles[kind, "skinny"]
    for size in ("large", "medium") if light and not turned else ("medium",):
        tile = tiles[kind, size]
        if 2 * m <= tile.m or 2 * n <= tile.n:
            continue  # half of the tile would lie outside of the matrix
        programs = cdiv(m, tile.m) * cdiv(n, tile.n)
        if size == "medium" and light:
            programs *= shares(programs, cdiv(k, tile.k), device)
        if 4 * programs >= 3 * device.multiprocessors:
            return tile
    return tiles[kind, "small"]


def shares(programs: int, steps: int, device: Device) -> int:
    """Among how many programs one sum is shared: as many as fill the GPU, but with at least four steps each."""
    if programs >= device.multiprocessors:
        return 1
    return max(1, min(device.multiprocessors // max(programs, 1), steps // 4, 32))


def matmul(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    precision: str,
    device: Device,
    *,
    vectors: bool,
    descriptors: bool = False,
    plain: bool = False,
    wide: bool = False,
    column_sums: bool = False,
    operand_sums: bool = False,
    turned: bool = False,
) -> Product:
    """How (m, k) @ (k, n) runs.

    Args:
        vectors: both operands can be loaded 128 bits at a time.
        descriptors: descriptors can describe both operands.
        plain: a descriptor can describe c as well, and the epilogue reads nothing but a bias and adds nothing up.
        wide: offsets need 64 bits, for which a persistent program has no registers.
        column_sums: the epilogue adds up columns of c, so K can't be shared out and c not be transposed.
        operand_sums: the first column of tiles adds up rows of a, so c can't be transposed.
        turned: tiles of b are turned, where they are loaded through pointers.
    """
    if dtype != torch.float32:
        precision = "ieee"  # it concerns float32 alone, and one value for all others saves compiling a kernel twice
    kind, light = arithmetic(dtype, precision), not operand_sums

    def rows() -> Iterator[Product]:
        for row in descriptor_products(device.architecture).get(kind, ()) if descriptors else ():
            fits = not row.programs or not (operand_sums or wide)
            fits &= not row.transposed or not (operand_sums or column_sums)
            if fits and not (row.splits > 1 and column_sums):
                yield row

    picked: Product | None = ask("matmul", rows)
    if picked is not None:
        return picked
    tile = ask("product", lambda: product_rows(dtype, precision, device, vectors=vectors, light=light, turned=turned))
    if tile is None and device.architecture == "interpreter":
        return Product(INTERPRETER, precision)
    if tile is None and descriptors:
        picked = _through_descriptors(m, n, k, dtype, precision, device, plain, wide, column_sums, operand_sums)
        if picked is not None:
            return picked
    if tile is None:
        tile = product(m, n, k, dtype, precision, device, vectors=vectors, light=light, turned=turned)
    splits = 1 if column_sums else shares(cdiv(m, tile.m) * cdiv(n, tile.n), cdiv(k, tile.k), device)
    return Product(tile, precision, splits)


def descriptor_products(architecture: str) -> dict[str, list[Product]]:
    """Every product through descriptors that can be picked on an architecture, by kind of arithmetic. Of those that share K
    out, which differ in the number of shares alone, there is one."""
    products: dict[str, list[Product]] = {}
    for kind, tiles in _DESCRIPTORS.get(architecture, {}).items():
        precision = "ieee" if kind == "16" else kind
        plain = [Product(tile, precision, descriptors=True) for tile in tiles]
        skinny = [
            Product(tile, precision, descriptors=True, transposed=True) for tile in _SKINNY[architecture].get(kind, ())
        ]
        persistent = [replace(product, programs=132) for product in plain if _can_persist(product.tile)]
        shared = [replace(product, splits=2) for product in plain + skinny]
        products[kind] = plain + skinny + persistent + shared
        if kind in _COPIED:
            products[kind] += [replace(product, copied=True) for product in products[kind] if not product.transposed]
    return products


def specialized(device: Device) -> Product:
    """The product whose warps have different jobs."""
    return Product(_SPECIALIZED, "ieee", descriptors=True, programs=device.multiprocessors, specialized=True)


def _can_persist(tile: Tile) -> bool:
    """Whether a persistent kernel of this tile is worth compiling. With a small tile, little time passes between two tiles."""
    return tile.m * tile.n >= 128 * 128


@functools.lru_cache(maxsize=4096)
def _through_descriptors(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    precision: str,
    device: Device,
    plain: bool,
    wide: bool,
    column_sums: bool,
    operand_sums: bool,
) -> Product | None:
    """The product with the fewest cycles by the estimate of `_cycles`. None where pointers are better: on architectures without
    the tensor memory accelerator, for other arithmetic, and for products that take less time than making a descriptor."""
    kind = arithmetic(dtype, precision)
    if kind == "ieee" and device.architecture in STRICT:
        kind = precision = STRICT[device.architecture]
    tiles = _DESCRIPTORS.get(device.architecture, {}).get(kind)
    if tiles is None or (2 * m * n * k < 4e9 and (m * k + k * n + m * n) * dtype.itemsize < 32e6):
        return None
    candidates = [(Product(tile, precision, descriptors=True), share) for tile, share in tiles.items()]
    if m <= 64 and not column_sums and not operand_sums:
        skinny = _SKINNY[device.architecture].get(kind, ())
        candidates += [(Product(tile, precision, descriptors=True, transposed=True), 0.5) for tile in skinny]
    best, least = None, float("inf")
    for product, share in candidates:
        rows, columns = (n, m) if product.transposed else (m, n)
        programs = cdiv(rows, product.tile.m) * cdiv(columns, product.tile.n)
        most = 1 if column_sums else shares(programs, cdiv(k, product.tile.k), device)
        for splits in sorted({1, cdiv(most, 2), most}):
            candidate = replace(product, splits=splits)
            cycles = _cycles(rows, columns, k, candidate, share * _SHARE_OF_16[kind], dtype.itemsize, device)
            if cycles < least:
                best, least = candidate, cycles
    assert best is not None
    # An operand that one row or column of tiles reads is read once: copying it would be most of the memory's traffic.
    reused = m > best.tile.m and n > best.tile.n and not best.transposed
    best = replace(best, copied=kind in _COPIED and reused)
    large = best.splits == 1 and not best.transposed and (best.tile.m * best.tile.n >= _SPECIALIZED.m * _SPECIALIZED.n)
    if device.architecture in SPECIALIZED and kind == "16" and plain and large:
        return specialized(device)
    # With several tiles for each multiprocessor and few steps in each, it pays to fetch operands while a tile is written.
    several = cdiv(m, best.tile.m) * cdiv(n, best.tile.n) >= 2 * device.multiprocessors and k <= 2048
    alone = best.splits == 1 and not best.transposed and not operand_sums and not wide
    if several and alone and _can_persist(best.tile):
        return replace(best, programs=device.multiprocessors)
    return best


def _cycles(m: int, n: int, k: int, product: Product, share: float, itemsize: int, device: Device) -> float:
    """An estimate of the cycles of a product: programs run in waves, each limited by arithmetic or by the L2 cache, and all of
    them are limited by memory. `share` is the part of the 16-bit peak that the main loop is assumed to reach."""
    tile, clock = product.tile, _CLOCKS[device.architecture]
    step = max(
        2 * tile.m * tile.n * tile.k / (clock.flops * share), (tile.m + tile.n) * tile.k * itemsize / clock.cache
    )
    programs = cdiv(m, tile.m) * cdiv(n, tile.n) * product.splits
    # Between two tiles the pipeline is filled, and a tile is written while all other multiprocessors write theirs.
    seam = 1500 + tile.m * tile.n * itemsize * device.multiprocessors / clock.memory
    computing = cdiv(programs, device.multiprocessors) * (cdiv(cdiv(k, tile.k), product.splits) * step + seam)
    streaming = (
        (m * k + k * n + m * n) * itemsize / min(clock.memory, min(programs, device.multiprocessors) * clock.stream)
    )
    if product.splits > 1:  # the shares are written in float32, and a second kernel reads them
        streaming += 3000 + 8 * product.splits * m * n / clock.memory
    # The shorter of the two is hidden behind the longer one, but not entirely. Its sixteenth also decides between two products
    # that memory limits alike, for the one that computes less.
    return max(computing, streaming) + min(computing, streaming) / 16
