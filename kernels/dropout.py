"""Dropout with the very numbers that torch draws on CUDA, none of which are kept: the gradient draws them again.

torch's functions run Philox4x32-10 with the generator's seed as its key. A thread's counter is (offset / 4 + call, thread), and a
call yields four words of 32 bits. T threads go over n elements in turns, T = 256 * min(ceil(n / 256), what the GPU holds at once
/ 256), in one of two orders (aten/src/ATen/native/cuda/Dropout.cu and DistributionTemplates.h):

- in chunks: each thread takes `vector` adjacent elements in a turn (what 16 bytes hold, less where the address or n isn't
  divisible by as much), and makes as many calls as they need words. That is `dropout` out of place.
- in lanes: a thread takes element thread + T * (lane + 4 * call) for each of a call's four words. So do `dropout` where only
  single elements could be loaded, and every function that draws by `bernoulli_`: in place, alpha and feature dropout. In float64
  those take two words for each element, and so have two lanes.

An element is kept where the word, as a number between 0 and 1, is less than 1 - p. Here that is a comparison of integers, with a
threshold that `threshold` finds.
"""

import functools
import math
import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import pointwise
from .runtime import launch, tiles
from .runtime.tiles import Tile, cdiv

_CHUNKS = Tile(1, 256, warps=4)
"""n chunks. They divide 256, so that a program's chunks belong to one turn."""
_LANES = Tile(1, 512, warps=4)
"""n threads of torch's."""
_FEATURES = Tile(1, 1024, warps=4)
"""n elements."""

_INTERPRETED_THREADS = 1024
"""What the interpreter takes for the threads that a GPU holds at once: few, so that small tensors take several turns."""
_META_THREADS = 2**18
"""What stands for them where no GPU is asked: as many as those of a large one."""


@triton.jit
def _start(draw_ptr, seed, offset):
    """Philox's key and the first call, from numbers or from memory."""
    if draw_ptr is not None:
        seed, offset = tl.load(draw_ptr), tl.load(draw_ptr + 1)
    return tl.cast(seed, tl.int64), tl.cast(offset, tl.int64) >> 2


@triton.jit
def _words(seed, call, thread):
    """The four words of one call for each thread."""
    zero = thread * 0
    low, high = (call & 0xFFFFFFFF).to(tl.uint32), (call >> 32).to(tl.uint32)
    return tl.philox(seed, low + zero, high + zero, thread, zero)


@triton.jit
def _chunk_words(seed, call, thread, VEC: tl.constexpr):
    """The words of the elements of each thread's chunk, in the elements' order, in further dimensions of 2 each. `join` makes
    the last dimension, so the most significant bit of an element's place is joined first; then a chunk's words stay in one
    thread."""
    a, b, c, d = _words(seed, call, thread)
    if VEC == 2:
        words = tl.join(a, b)
    elif VEC == 4:
        words = tl.join(tl.join(a, c), tl.join(b, d))
    else:
        e, f, g, h = _words(seed, call + 1, thread)
        words = tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))
    return words


@triton.jit
def row_factors(
    draw_ptr, row, N, THREADS, seed, offset, threshold, SCALE,
    VEC: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What `dropout_chunks` multiplies a tile of rows by, which begin at the first of their N elements: SCALE or 0. VEC divides
    N, and a row has no more chunks than there are threads, so that it lies in two turns at most."""
    seed, call = _start(draw_ptr, seed, offset)
    first = row * (N // VEC)
    turn = first // THREADS
    thread = (first - turn * THREADS)[:, None] + tl.arange(0, TILE_N // VEC)[None, :]
    later = thread >= THREADS
    call += (turn[:, None] + later) * ((VEC + 3) // 4)
    thread = tl.where(later, thread - THREADS, thread).to(tl.uint32)
    words = tl.reshape(_chunk_words(seed, call, thread, VEC), (TILE_M, TILE_N))
    return tl.where(words < threshold.to(tl.uint32), tl.full((), SCALE, ACC), 0.0)


@triton.jit
def multiplied(x, factor, OUT: tl.constexpr):
    """x * factor, rounded as dropout's result is before anything is added to it. A product written `x * factor` would be joined
    with the sum into an fma, which rounds once; an fma of its own, with 0, isn't."""
    return tl.fma(x, factor, tl.zeros_like(factor)).to(OUT).to(x.dtype)


@triton.jit
def _add(x, factor, residual_ptr, i, mask, OUT: tl.constexpr):
    """x * factor + residual, rounded twice as torch's dropout and sum are."""
    return multiplied(x, factor, OUT) + tl.load(residual_ptr + i, mask=mask).to(x.dtype)


@triton.jit(do_not_specialize=["seed", "offset", "threshold"])
def _dropout_chunks_kernel(
    x_ptr, residual_ptr, y_ptr, draw_ptr, SIZE, THREADS,
    seed: tl.int64, offset: tl.int64, threshold: tl.int64, SCALE: tl.float64,
    ACC: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program: CHUNKS chunks of VEC elements of y = x * SCALE, or x * 0 where dropped: there NaN and infinities give NaN. A
    residual is added to y."""
    TILE: tl.constexpr = CHUNKS * VEC
    SIZE = SIZE // VEC * VEC  # itself, which says that no chunk is cut; else each element would be an access of its own
    chunk = tl.program_id(0)
    if WIDE:
        chunk = chunk.to(tl.int64)
    chunk *= CHUNKS
    turn = chunk // THREADS
    thread = (chunk - turn * THREADS + tl.arange(0, CHUNKS)).to(tl.uint32)
    seed, call = _start(draw_ptr, seed, offset)
    words = tl.reshape(_chunk_words(seed, call + turn * ((VEC + 3) // 4), thread, VEC), (TILE,))
    i = chunk * VEC + tl.arange(0, TILE)
    x = tl.load(x_ptr + i, mask=i < SIZE).to(ACC)
    factor = tl.where(words < threshold.to(tl.uint32), tl.full((), SCALE, ACC), 0.0)
    if residual_ptr is not None:
        y = _add(x, factor, residual_ptr, i, i < SIZE, y_ptr.dtype.element_ty)
    else:
        y = x * factor
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < SIZE)


@triton.jit(do_not_specialize=["seed", "offset", "threshold"])
def _dropout_lanes_kernel(
    y_ptr, x_ptr, residual_ptr, draw_ptr, SIZE, THREADS,
    seed: tl.int64, offset: tl.int64, threshold: tl.int64, SCALE: tl.float64, KEPT: tl.float64, DROPPED: tl.float64,
    SHIFTED: tl.constexpr, LANES: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: what TILE of torch's threads do in one turn, y = x * SCALE or x * 0 where dropped, and KEPT or DROPPED added,
    or a residual. Without x it is 1."""
    tiles_n = tl.cdiv(THREADS, TILE)
    turn = tl.program_id(0) // tiles_n
    thread = tl.program_id(0) % tiles_n * TILE + tl.arange(0, TILE)
    if WIDE:
        turn = turn.to(tl.int64)
    seed, call = _start(draw_ptr, seed, offset)
    a, b, c, d = _words(seed, call + turn, thread.to(tl.uint32))
    for lane in tl.static_range(LANES):
        if LANES == 2:
            number = (a if lane == 0 else c).to(tl.uint64) ^ ((b if lane == 0 else d).to(tl.uint64) << 21)
            keep = number < threshold.to(tl.uint64)
        else:
            keep = ((a if lane == 0 else b) if lane < 2 else (c if lane == 2 else d)) < threshold.to(tl.uint32)
        i = (turn * LANES + lane) * THREADS + thread
        mask = (thread < THREADS) & (i < SIZE)
        y = tl.where(keep, tl.full((), SCALE, ACC), 0.0)
        if residual_ptr is not None:
            y = _add(tl.load(x_ptr + i, mask=mask).to(ACC), y, residual_ptr, i, mask, y_ptr.dtype.element_ty)
        elif x_ptr is not None:
            y = tl.load(x_ptr + i, mask=mask).to(ACC) * y
        if SHIFTED:
            y += tl.where(keep, tl.full((), KEPT, ACC), tl.full((), DROPPED, ACC))
        tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dropout_features_kernel(
    x_ptr, factor_ptr, y_ptr, SIZE, CHANNELS, INNER, KEPT: tl.float64, DROPPED: tl.float64,
    LAST: tl.constexpr, SHIFTED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: TILE consecutive elements, each multiplied by the factor of its feature map."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    i = pid * TILE + tl.arange(0, TILE)
    if LAST:
        feature = i // INNER // CHANNELS * CHANNELS + i % CHANNELS
    else:
        feature = i // INNER
    factor = tl.load(factor_ptr + feature, mask=i < SIZE, other=0.0)
    y = tl.load(x_ptr + i, mask=i < SIZE).to(ACC) * factor
    if SHIFTED:
        y += tl.where(factor != 0, tl.full((), KEPT, ACC), tl.full((), DROPPED, ACC))
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < SIZE)


# --- torch's numbers ---------------------------------------------------------------------------------------------------------


def lanes(dtype: torch.dtype) -> int:
    """How many elements of this dtype `bernoulli_` draws by one call of Philox."""
    return 2 if dtype == torch.float64 else 4


def vector(x: object, dtype: torch.dtype, aligned: int) -> int:
    """How many adjacent elements each of torch's threads takes in `dropout`.

    Args:
        x: a tensor or its description.
        aligned: the largest power of two up to 16 that divides its address.
    """
    if not pointwise.is_dense(x):  # type: ignore[arg-type]
        return 1
    count, size = max(aligned // dtype.itemsize, 1), 1
    for n in x.shape:  # type: ignore[attr-defined]
        size *= n
    while size % count:
        count //= 2
    return count


@functools.cache
def _resident(device: torch.device) -> int:
    """How many threads in blocks of 256 the GPU holds at once."""
    if device.type != "cuda":
        return _INTERPRETED_THREADS if device.type == "cpu" else _META_THREADS
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * (properties.max_threads_per_multi_processor // 256) * 256


def threads(size: int, device: torch.device) -> int:
    """The number of torch's threads for so many elements."""
    return min(cdiv(size, 256) * 256, _resident(device))


def advance(size: int, lanes: int, device: torch.device) -> int:
    """How far torch moves the generator for so many elements."""
    return 4 * cdiv(size, threads(size, device) * lanes)


def _float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


@functools.lru_cache(maxsize=4096)
def threshold(p: float, bits: int, double: bool) -> int:
    """The first word that is dropped with probability p: as a number between 0 and 1, by the rounding of curand's formula, it
    isn't less than 1 - p.

    Args:
        bits: 32, or 53 where two words make one number in float64.
        double: whether torch compares with 1 - p in float64 rather than float32.
    """
    kept = 1 - p if double else _float32(1 - p)
    low, high = 0, 2**bits
    while low < high:
        middle = (low + high) // 2
        number = (middle if bits == 53 else _float32(middle)) * 2.0**-bits + 2.0 ** -(bits + 1)
        if (number if bits == 53 else _float32(number)) < kept:
            low = middle + 1
        else:
            high = middle
    return low


# --- launchers ---------------------------------------------------------------------------------------------------------------


def _drawn(draw: torch.Tensor, in_memory: bool | None) -> tuple[torch.Tensor | None, int, int]:
    """The draw as the kernels take it: a pointer, or seed and offset."""
    if draw.device.type != "cpu" if in_memory is None else in_memory:
        return draw, 0, 0
    seed, offset = launch.numbers(draw)
    return None, seed, offset


def _accumulate(out: torch.Tensor) -> torch.dtype:
    return torch.promote_types(out.dtype, torch.float32)


def _in_order(out: torch.Tensor, logical: bool = False) -> torch.Tensor:
    """`out`, or a tensor in its place whose memory is in the order of the draw: that of its own dimensions, or of out's."""
    if out.is_contiguous() if logical else pointwise.is_dense(out):
        return out
    return launch.empty(out.shape, dtype=out.dtype, device=out.device) if logical else launch.empty_like(out)


def _put(dense: torch.Tensor, out: torch.Tensor) -> None:
    if dense is not out:
        out.data.copy_(dense)  # .data: no launcher touches the version counter, which is the caller's to increment


def dropout_chunks(
    x: torch.Tensor,
    out: torch.Tensor,
    draw: torch.Tensor,
    p: float,
    scale: float,
    vector: int,
    in_memory: bool | None = None,
    residual: torch.Tensor | None = None,
) -> None:
    """out = x * scale or x * 0, as torch.nn.functional.dropout draws it for chunks of `vector` elements; and a residual added.

    Shape: all the same, any strides; quickest if `out` is dense and the others have its strides.
    Dtype: floating, the same; draw int64 (2,).

    Args:
        in_memory: whether the kernel reads the draw from memory. By default if it lies on a GPU.
    """
    dense = _in_order(out)
    x = pointwise._laid_out_as(dense, x)
    residual = None if residual is None else pointwise._laid_out_as(dense, residual)
    size, tile = out.numel(), tiles.ask("dropout", lambda: (_CHUNKS,)) or _CHUNKS
    accumulate = _accumulate(out)
    pointer, seed, offset = _drawn(draw, in_memory)
    launch.launch(
        _dropout_chunks_kernel, cdiv(size, tile.n * vector),
        x, residual, dense, pointer, size, threads(size, out.device),
        seed, offset, threshold(p, 32, accumulate == torch.float64), scale,
        ACC=tiles.triton_dtype(accumulate), WIDE=launch.wide(elements=size), VEC=vector, CHUNKS=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    _put(dense, out)


def dropout_lanes(
    x: torch.Tensor | None,
    out: torch.Tensor,
    draw: torch.Tensor,
    p: float,
    numbers: tuple[float, float, float],
    lanes: int,
    logical: bool = False,
    in_memory: bool | None = None,
    residual: torch.Tensor | None = None,
) -> None:
    """out = x * scale + kept, or x * 0 + dropped, as torch draws it for single elements. Without x it is 1. A residual is added
    where there is an x, and nothing else is.

    Shape: all the same, any strides; quickest if `out` is dense and the others have its strides.
    Dtype: floating, the same; draw int64 (2,).

    Args:
        numbers: scale, kept and dropped.
        lanes: how many elements are drawn by one call of Philox.
        logical: whether the draw goes over out's dimensions in their order, rather than in that of its memory.
        in_memory: as for `dropout_chunks`.
    """
    dense = _in_order(out, logical)
    x = None if x is None else pointwise._laid_out_as(dense, x)
    residual = None if residual is None else pointwise._laid_out_as(dense, residual)
    size, tile = out.numel(), tiles.ask("dropout_lanes", lambda: (_LANES,)) or _LANES
    accumulate, count = _accumulate(out), threads(size, out.device)
    pointer, seed, offset = _drawn(draw, in_memory)
    launch.launch(
        _dropout_lanes_kernel, cdiv(size, count * lanes) * cdiv(count, tile.n),
        dense, x, residual, pointer, size, count,
        seed, offset, threshold(p, 53 if lanes == 2 else 32, accumulate == torch.float64), *numbers,
        SHIFTED=numbers[1:] != (0.0, 0.0), LANES=lanes, ACC=tiles.triton_dtype(accumulate),
        WIDE=launch.wide(elements=size), TILE=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    _put(dense, out)


def dropout_features(x: torch.Tensor, out: torch.Tensor, factor: torch.Tensor, shifts: tuple[float, float]) -> None:
    """out = x * factor, each feature map by its own, and shifts[0] added where that isn't 0, shifts[1] where it is.

    Shape: x and out (N, C, *), any strides, quickest if both are contiguous or both channels_last; factor (N, C), contiguous.
    Dtype: x and out floating, the same; factor float32 (float64).
    """
    channels, inner = x.shape[1], math.prod(x.shape[2:])
    last = not out.is_contiguous() and out.movedim(1, -1).is_contiguous()
    dense = out if last else _in_order(out, logical=True)
    x = pointwise._laid_out_as(dense, x)
    size, tile = out.numel(), tiles.ask("dropout_features", lambda: (_FEATURES,)) or _FEATURES
    launch.launch(
        _dropout_features_kernel, cdiv(size, tile.n),
        x, factor, dense, size, channels, inner, *shifts,
        LAST=last, SHIFTED=shifts != (0.0, 0.0), ACC=tiles.triton_dtype(_accumulate(out)),
        WIDE=launch.wide(elements=size), TILE=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    _put(dense, out)


class Drop(NamedTuple):
    """A dropout as launchers take it along that do something else as well.

    Args:
        draw: int64 (2,).
        vector: how many elements each of torch's threads takes, as `vector` says.
    """

    draw: torch.Tensor
    p: float
    scale: float
    vector: int

    def fits(self, x: torch.Tensor, size: int) -> bool:
        """Whether `row_factors` can draw for rows of `size` elements of x, and is worth it: for single elements it would take
        more time than another pass over memory."""
        return self.vector > 1 and size % self.vector == 0 and size // self.vector <= threads(x.numel(), x.device)

    def arguments(self, x: torch.Tensor) -> tuple[Any, ...]:
        """What a kernel takes of it that draws for the elements of x."""
        pointer, seed, offset = _drawn(self.draw, None)
        limit = threshold(self.p, 32, _accumulate(x) == torch.float64)
        return pointer, threads(x.numel(), x.device), seed, offset, limit, self.scale

    def launch(self, x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        """out = what dropout leaves of x, by a kernel of its own; and a residual added."""
        if self.vector > 1:
            dropout_chunks(x, out, self.draw, self.p, self.scale, self.vector, residual=residual)
        else:
            dropout_lanes(x, out, self.draw, self.p, (self.scale, 0.0, 0.0), 4, logical=True, residual=residual)


NO_DROP = (None, 0, 0, 0, 0, 0.0)
"""What kernels take where nothing is dropped."""
