"""Which tile a kernel works in: frozen records in tables, and pure functions that pick from them.

Nothing is tuned at run time: a pick depends on sizes, dtype and GPU model alone, costs no benchmark on the first call
and is the same tomorrow. No GPU has yet been asked whether the picks are the best ones: they follow from what compiles
without spills and from filling the multiprocessors.

CI compiles every tile that these functions can return, for all targets (bench/audit.py).
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv is the same, for kernels too, and 6 us a call for it."""
    return -(-a // b)


@dataclass(frozen=True)
class Tile:
    """m x n outputs at a time, k of the sum per step; `warps` warps; `stages` of loads in flight."""

    m: int
    n: int
    k: int = 1
    warps: int = 4
    stages: int = 3

    @property
    def fills_registers(self) -> bool:
        """Whether a float32 accumulator of m x n takes half of all registers a thread may have, or more."""
        return self.m * self.n >= 128 * 32 * self.warps


@dataclass(frozen=True)
class Device:
    """What a pick needs to know of a GPU. `architecture`: "sm_90", "gfx942" ... or "interpreter"."""

    architecture: str
    multiprocessors: int


@functools.lru_cache
def device(device: torch.device) -> Device:
    """The Device a tensor lives on. Asked at a launch, never at import."""
    if device.type == "cpu":
        return Device("interpreter", 1)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Device(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """The Triton dtype of an accumulator."""
    return {torch.float32: tl.float32, torch.float64: tl.float64}[dtype]


# Matrix products, matmul and convolution alike, by (kind of arithmetic, size class).
#   "16"   float16 and bfloat16 on tensor cores        "tf32"  float32 on tensor cores
#   "ieee" strict float32, without tensor cores        "64"    float64
# "gather" is for operands that can't be loaded 128 bits at a time, and for offsets of 64 bits.
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

# Where a target has room for more: shared memory, or registers in that target's code.
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

# The interpreter pays per program and per step, not per element: few, large tiles.
_INTERPRETER = Tile(128, 128, 128)


@dataclass(frozen=True)
class Product:
    """How one matrix product runs: in which tile, by which kernel, in how many shares of K."""

    tile: Tile
    precision: str
    splits: int = 1
    descriptors: bool = False
    """Tiles of a and b come through descriptors, fetched by the tensor memory accelerator."""
    programs: int = 0
    """This many programs take one tile after the other; 0: a program for each tile."""
    transposed: bool = False
    """c^T = b^T @ a^T: the few rows of a as columns, where the narrowest tile is 16 wide instead of 64."""
    specialized: bool = False
    """By warps with a job each; persistent as well."""


# The same products through descriptors, for matmul: tile and the share of the arithmetic peak that it is thought to
# reach. The shares are seeds from published figures and arithmetic, not measured on any device.
#   "tf32x3", "bf16x6": strict float32 on tensor cores, each number split into two or three; see STRICT
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
# There the compiler wants more shared memory for operands that it transposes, or more registers than there are.
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

# Transposed, for up to 64 rows: the weight is streamed once, in rows of 256 bytes, many steps ahead.
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
"""How strict float32 is computed on tensor cores, by architecture: {"sm_90": "tf32x3"}, say. Empty, so nowhere.

No device has measured their error yet, and near float32's maximum the split overflows (docs/decisions/0006): a row belongs
here once tests/test_gpu.py::test_strict_float32_on_tensor_cores has passed on that architecture, and whoever adds it
accepts infinity where a factor lies within 2**-12 of float32's maximum.
"""


SPECIALIZED: tuple[str, ...] = ()
"""Architectures on which large products in 16 bits run by warps with a job each (matmul_specialized.py): "sm_90", say.

Empty: no device has run that kernel. A name belongs here once tests/test_gpu.py::test_specialized_products has passed on
that architecture and `python -m bench picks` finds it the fastest way for large products.
"""
_SPECIALIZED = Tile(128, 256, 64, warps=4, stages=3)


@dataclass(frozen=True)
class _Clock:
    """What one GPU does in a cycle of its multiprocessors, from data sheets; not measured."""

    flops: float
    """of one multiprocessor, 16-bit matrix products"""
    cache: float
    """bytes from L2 to one multiprocessor"""
    stream: float
    """bytes from memory to one multiprocessor"""
    memory: float
    """bytes from memory to all of them"""


_CLOCKS = {"sm_90": _Clock(4096, 64, 32, 2350), "sm_100": _Clock(8192, 64, 48, 4200)}
_SHARE_OF_16 = {"16": 1, "tf32": 1 / 2, "tf32x3": 1 / 6, "bf16x6": 1 / 6}

_POINTWISE = Tile(1, 1024, warps=4)
_ACTIVATION_GRAD = (Tile(32, 128, warps=4), Tile(128, 32, warps=4))
_SUM_PARTIALS = (Tile(4, 512, warps=4), Tile(32, 64, warps=4))

# Softmax rows by the power of two that holds them; beyond the last, blocks.
_SOFTMAX_ROWS = {
    **{n: Tile(512 // n, n, warps=4) for n in (1, 2, 4, 8)},  # unaligned: narrow loads, many registers
    **{n: Tile(1024 // n, n, warps=4) for n in (16, 32, 64, 128, 256)},
    512: Tile(2, 512, warps=4),
    1024: Tile(1, 1024, warps=4),
    2048: Tile(1, 2048, warps=4),
    4096: Tile(1, 4096, warps=8),
    8192: Tile(1, 8192, warps=8),
    16384: Tile(1, 16384, warps=16),
    32768: Tile(1, 32768, warps=32),
}
_SOFTMAX_ROWS_LIMIT = {torch.float32: 32768, torch.float64: 8192}
_SOFTMAX_ROWS_GRAD_LIMIT = {torch.float32: 16384, torch.float64: 4096}
_SOFTMAX_BLOCKS = {
    "long rows": Tile(4096, 1, warps=8),
    "few neighbours": Tile(128, 16, warps=4),
    "short": Tile(32, 64, warps=4),
    "tall": Tile(128, 64, warps=8),
}

forced: dict[str, Any] = {}
"""Tiles by kernel that override every pick: what `force` sets."""


@contextlib.contextmanager
def force(**tiles: Any) -> Iterator[None]:
    """Use these tiles (by kernel: product, pointwise, ...) instead of the picks; `matmul` takes a Product, which says
    everything. For tests and tuning."""
    before = dict(forced)
    forced.update(tiles)
    try:
        yield
    finally:
        forced.clear()
        forced.update(before)


def _arithmetic(dtype: torch.dtype, precision: str) -> str:
    if dtype == torch.float64:
        return "64"
    return "16" if dtype.itemsize == 2 else precision


def products(architecture: str) -> dict[tuple[str, str], Tile]:
    """The tiles of matrix products on one architecture."""
    return _PRODUCT | _PRODUCT_ON.get(architecture, {})


def _product(
    m: int, n: int, k: int, dtype: torch.dtype, precision: str, device: Device, *, vectors: bool, light: bool
) -> Tile:
    """The largest tile that compiles without spills and still gives most multiprocessors something to do."""
    kind = _arithmetic(dtype, precision)
    tiles = products(device.architecture)
    if not vectors:
        return tiles[kind, "gather"]
    if m <= 16 and n >= 64:
        return tiles[kind, "skinny"]
    # An epilogue that reads a tile needs the registers that the large one takes.
    for size in ("large", "medium") if light else ("medium",):
        tile = tiles[kind, size]
        if 2 * m <= tile.m or 2 * n <= tile.n:
            continue  # half of it would lie outside
        programs = cdiv(m, tile.m) * cdiv(n, tile.n)
        if size == "medium" and light:
            programs *= _splits(programs, cdiv(k, tile.k), device)
        if 4 * programs >= 3 * device.multiprocessors:
            return tile
    return tiles[kind, "small"]


def _splits(programs: int, steps: int, device: Device) -> int:
    """Over how many programs to spread one sum: enough to fill the GPU, but at least four steps each."""
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
) -> Product:
    """How (m, k) @ (k, n) runs.

    Args:
        vectors: both operands can be loaded 128 bits at a time. Element by element, or with offsets of 64 bits, the
            addresses alone fill the registers of all but small tiles.
        descriptors: both operands can stand behind descriptors.
        plain: c can stand behind one too, and nothing is read or added up to make it but a bias.
        wide: offsets take 64 bits, for which a persistent program has no registers left.
        column_sums: the epilogue adds up columns of c, so that K is not shared out and c not transposed.
        operand_sums: the first column of tiles adds up rows of a, so that c is not transposed.
    """
    if dtype != torch.float32:
        precision = "ieee"  # of no concern, and one kernel less
    if "matmul" in forced:
        return forced["matmul"]
    if "product" in forced:
        tile = forced["product"]
    elif device.architecture == "interpreter":
        return Product(_INTERPRETER, precision)
    else:
        if descriptors:
            product = _through_descriptors(m, n, k, dtype, precision, device, plain, wide, column_sums, operand_sums)
            if product is not None:
                return product
        tile = _product(m, n, k, dtype, precision, device, vectors=vectors, light=not operand_sums)
    splits = 1 if column_sums else _splits(cdiv(m, tile.m) * cdiv(n, tile.n), cdiv(k, tile.k), device)
    return Product(tile, precision, splits)


def descriptor_products(architecture: str) -> dict[str, list[Product]]:
    """Every product through descriptors that can be picked on one architecture, by kind of arithmetic; of those that
    share K out, one number of shares."""
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
    return products


def specialized(device: Device) -> Product:
    """The product by warps with a job each."""
    return Product(_SPECIALIZED, "ieee", descriptors=True, programs=device.multiprocessors, specialized=True)


def _can_persist(tile: Tile) -> bool:
    """Whether a persistent program of this tile is worth compiling: a small one's seams are short."""
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
    """The product that ought to take the fewest cycles, or None where pointers serve better: on other architectures, for
    other arithmetic, and for what is done before the host has made a descriptor."""
    kind = _arithmetic(dtype, precision)
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
        most = 1 if column_sums else _splits(programs, cdiv(k, product.tile.k), device)
        for splits in sorted({1, cdiv(most, 2), most}):
            candidate = replace(product, splits=splits)
            cycles = _cycles(rows, columns, k, candidate, share * _SHARE_OF_16[kind], dtype.itemsize, device)
            if cycles < least:
                best, least = candidate, cycles
    assert best is not None
    large = best.splits == 1 and not best.transposed and (best.tile.m * best.tile.n >= _SPECIALIZED.m * _SPECIALIZED.n)
    if device.architecture in SPECIALIZED and kind == "16" and plain and large:
        return specialized(device)
    # Several tiles for each multiprocessor and few steps in each: worth fetching across the seam between two tiles.
    several = cdiv(m, best.tile.m) * cdiv(n, best.tile.n) >= 2 * device.multiprocessors and k <= 2048
    alone = best.splits == 1 and not best.transposed and not operand_sums and not wide
    if several and alone and _can_persist(best.tile):
        return replace(best, programs=device.multiprocessors)
    return best


def _cycles(m: int, n: int, k: int, product: Product, share: float, itemsize: int, device: Device) -> float:
    """An estimate of what a product takes: waves of programs, each limited by arithmetic or by L2, and all together by
    memory. `share` is the part of the 16-bit peak that its main loop is thought to reach."""
    tile, clock = product.tile, _CLOCKS[device.architecture]
    step = max(
        2 * tile.m * tile.n * tile.k / (clock.flops * share), (tile.m + tile.n) * tile.k * itemsize / clock.cache
    )
    programs = cdiv(m, tile.m) * cdiv(n, tile.n) * product.splits
    # Between two tiles: filling the pipeline, and writing while all other multiprocessors write theirs.
    seam = 1500 + tile.m * tile.n * itemsize * device.multiprocessors / clock.memory
    computing = cdiv(programs, device.multiprocessors) * (cdiv(cdiv(k, tile.k), product.splits) * step + seam)
    streaming = (
        (m * k + k * n + m * n) * itemsize / min(clock.memory, min(programs, device.multiprocessors) * clock.stream)
    )
    if product.splits > 1:  # written and read again in float32, by a second kernel
        streaming += 3000 + 8 * product.splits * m * n / clock.memory
    # One hides behind the other, but never all of it: of two picks that memory limits alike, the one that does less.
    return max(computing, streaming) + min(computing, streaming) / 16


def conv(pixels: int, channels: int, dtype: torch.dtype, precision: str, device: Device, *, vectors: bool) -> Tile:
    """Tile for a convolution seen as (pixels, channels and taps) @ (channels and taps, channels)."""
    if "product" in forced:
        return forced["product"]
    if device.architecture == "interpreter":
        return _INTERPRETER
    return _product(pixels, channels, 0, dtype, precision, device, vectors=vectors, light=False)


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
    """Tile and number of shares of the pixels for a weight gradient seen as (channels, pixels) @ (pixels, columns)."""
    if "product" in forced:
        tile = forced["product"]
    elif device.architecture == "interpreter":
        return _INTERPRETER, 1
    else:
        tile = products(device.architecture)[_arithmetic(dtype, precision), "small" if vectors else "gather"]
    programs = cdiv(channels, tile.m) * cdiv(columns, tile.n) * groups
    return tile, _splits(programs, cdiv(pixels, tile.k), device)


# --- convolution by boxes, and depthwise ---------------------------------------------------------------------------------

# Convolutions by boxes, on the GPUs that have tiled tensor descriptors (TMA). The one switch: without an architecture's
# name here, it takes the kernels that load through pointers. m: channels of the result, n: pixels, k: channels summed.
# In the weight gradient m: channels of x, n: channels of dz, k: pixels.
BOX_ARCHITECTURES = ("sm_90", "sm_100")
BOX_FLOPS = 500_000_000  # some microseconds through pointers; a seed, not measured
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

# Depthwise convolutions: m pixels, n channels; elements in a tile, by bytes of an element. In NCHW neighbouring threads
# must take neighbouring pixels, so n is 1, and every element has an address of its own.
_DEPTHWISE_CHANNELS_LAST = {2: 2048, 4: 1024, 8: 512}
_DEPTHWISE_NCHW = 256


@functools.cache
def box_tiles(architecture: str) -> dict[tuple[str, str], Tile]:
    """The tiles of convolutions by boxes on one architecture."""
    return _BOX | _BOX_ON.get(architecture, {}) if architecture in BOX_ARCHITECTURES else {}


def takes_boxes(flops: int, dtype: torch.dtype, precision: str, device: Device) -> bool:
    """Whether convolutions of this kind load through tiled tensor descriptors. Not strict float32 nor float64, which
    compile to a stack of kilobytes behind descriptors; nor what is done before its operands are copied to where a
    descriptor can read them."""
    if "box" in forced:
        return True
    fits = device.architecture in BOX_ARCHITECTURES and _arithmetic(dtype, precision) in ("16", "tf32")
    return fits and flops >= BOX_FLOPS


@functools.lru_cache(maxsize=4096)
def box(pixels: int, images: tuple[int, int, int]) -> tuple[int, int, int]:
    """The box of so many pixels (a power of two), in images, rows and columns, that covers `images` (N, H, W) with the
    least waste; of equals the widest, then the highest."""
    n, h, w = images
    sizes = [1 << i for i in range(pixels.bit_length())]
    boxes = [(pixels // (high * wide), high, wide) for wide in sizes for high in sizes if high * wide <= pixels]
    return min(boxes, key=lambda b: (cdiv(n, b[0]) * cdiv(h, b[1]) * cdiv(w, b[2]), -b[2], -b[1]))


@functools.lru_cache(maxsize=4096)
def packed_groups(groups: int, c: int, o: int, whole_c: int, whole_o: int) -> int:
    """How many groups of a convolution, with c channels and o in each, are computed as one: as many as 64 channels hold,
    which a tile of tensor cores has anyway. `whole_c`, `whole_o`: where there are several packed groups, each must begin at
    a multiple of these. For their sake up to four groups are packed that are larger, and 0 says that there is no way."""
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
    """Tile and box for `copies` convolutions to `channels` channels of `images` (N, H, W), each a sum over taps and `depth`
    channels. `reach`: a step must divide this many channels, because other ones follow. `crowded`: the epilogue needs
    offsets of 64 bits, a residual in NCHW or a second sum, for which the large tile has no registers left."""
    if "box" in forced:
        tile = forced["box"]
    else:
        kind, tiles = _arithmetic(dtype, precision), box_tiles(device.architecture)
        pixels = images[0] * images[1] * images[2]
        for size in (("medium",) if crowded else ("large", "medium")) if channels > 64 else ("narrow",):
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
    """Tile, box and shares of the pixels for `copies` (taps, groups) weight gradients (c, pixels) @ (pixels, o)."""
    if "box" in forced:
        tile = forced["box"]
    else:
        kind = _arithmetic(dtype, precision)
        size = ", narrow" if min(c, o) <= 64 else ", wide" if kind == "16" and o % 256 == 0 else ""
        tile = box_tiles(device.architecture)[kind, f"weight grad{size}"]
    shape = box(tile.k, images)
    steps = cdiv(images[0], shape[0]) * cdiv(images[1], shape[1]) * cdiv(images[2], shape[2])
    programs = cdiv(c, tile.m) * cdiv(o, tile.n) * copies
    return tile, shape, _splits(programs, steps, device)


def depthwise(channels: int, dtype: torch.dtype, *, channels_last: bool) -> Tile:
    """(m pixels, n channels) at a time."""
    if "depthwise" in forced:
        return forced["depthwise"]
    if not channels_last:
        return Tile(_DEPTHWISE_NCHW, 1)
    n = min(64, 1 << (channels - 1).bit_length())
    return Tile(_DEPTHWISE_CHANNELS_LAST[dtype.itemsize] // n, n)


def depthwise_weight_grad(
    channels: int, pixels: int, r: int, s: int, dtype: torch.dtype, device: Device, *, channels_last: bool
) -> tuple[Tile, int]:
    """(m pixels, n channels, k >= s taps) at a time, and the number of shares of the pixels: several programs for every
    multiprocessor, with at least eight steps each."""
    tile = depthwise(channels, dtype, channels_last=channels_last)
    taps = 1 << (s - 1).bit_length()
    tile = replace(tile, m=max(1, 2 * tile.m // taps), k=taps)
    programs = r * cdiv(channels, tile.n)
    return tile, max(1, min(cdiv(8 * device.multiprocessors, programs), cdiv(pixels, 8 * tile.m)))


def channels_last(pitch: int) -> Tile:
    """(m pixels, n channels) at a time for a copy to channels_last."""
    return forced.get("channels_last", _CHANNELS_LAST[min(64, 1 << (pitch - 1).bit_length())])


def packed_weight(pitch: int) -> Tile:
    """(m rows, all of their n channels) at a time for the weight of packed groups."""
    n = 1 << (pitch - 1).bit_length()
    return Tile(max(4096 // n, 1), n, warps=8)


def pointwise() -> Tile:
    return forced.get("pointwise", _POINTWISE)


def activation_grad(rows_are_contiguous: bool) -> Tile:
    """(m, n) for a pass over a matrix: long along the dimension that is contiguous in memory."""
    return forced.get("activation_grad", _ACTIVATION_GRAD[rows_are_contiguous])


def sum_partials(partials: int) -> Tile:
    """(m partials, n elements) at a time."""
    return forced.get("sum_partials", _SUM_PARTIALS[partials > 32])


def softmax_rows(d: int, accumulate: torch.dtype, gradient: bool = False) -> Tile | None:
    """Rows of d elements held in registers, or None where they are too long for that."""
    if "softmax_blocks" in forced:
        return None
    if "softmax_rows" in forced:
        return forced["softmax_rows"]
    size = 1 << (d - 1).bit_length()
    limit = (_SOFTMAX_ROWS_GRAD_LIMIT if gradient else _SOFTMAX_ROWS_LIMIT)[accumulate]
    return _SOFTMAX_ROWS[size] if size <= limit else None


def softmax_blocks(d: int, inner: int, accumulate: torch.dtype) -> Tile:
    """(m elements along the sum, n inner neighbours) at a time."""
    if "softmax_blocks" in forced:
        return forced["softmax_blocks"]
    if inner == 1:
        return _SOFTMAX_BLOCKS["long rows"]
    if inner <= 16:
        return _SOFTMAX_BLOCKS["few neighbours"]
    return _SOFTMAX_BLOCKS["short" if d <= 32 else "tall"]
