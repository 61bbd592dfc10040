"""Softmax along one dimension, its logarithm, and softmax of -x:

softmax:     y = exp(x - max x) / sum exp(x - max x),   dx = y (dy - sum dy y)
log_softmax: y = x - max x - log(sum exp(x - max x)),   dx = dy - exp(y) sum dy
softmin:     softmax of -x

Every tensor is seen as (OUTER, D, INNER), where the sum runs over D. There are two kernels for each direction:

- rows, for INNER = 1 and D up to 16,384 or 32,768: a program holds whole rows in registers, several if they are short, and
  reads and writes memory once;
- blocks, for all others: a program goes along D in blocks of several neighbours, once for the maximum and the sum, and once
  backwards for the result, so that what it read last is still in the cache. If D fits into one block, it reads once.
"""

import torch
import triton
import triton.language as tl

from .runtime import launch, tiles
from .runtime.tiles import Tile

_SOFTMAX_ROWS = {
    **{
        n: Tile(512 // n, n, warps=4) for n in (1, 2, 4, 8)
    },  # unaligned, so loaded element by element into many registers
    **{n: Tile(1024 // n, n, warps=4) for n in (16, 32, 64, 128, 256)},
    512: Tile(2, 512, warps=4),
    1024: Tile(1, 1024, warps=4),
    2048: Tile(1, 2048, warps=4),
    4096: Tile(1, 4096, warps=8),
    8192: Tile(1, 8192, warps=8),
    16384: Tile(1, 16384, warps=16),
    32768: Tile(1, 32768, warps=32),
}
"""m rows of n elements, by the smallest power of two that a row fits into."""
_LIMIT = {torch.float32: 32768, torch.float64: 8192}
_GRAD_LIMIT = {torch.float32: 16384, torch.float64: 4096}
"""The longest row that fits into registers, by the dtype in which it is computed."""
_BLOCKS = {
    "long rows": Tile(4096, 1, warps=8),
    "few neighbours": Tile(128, 16, warps=4),
    "short": Tile(32, 64, warps=4),
    "tall": Tile(128, 64, warps=8),
}
"""m elements along D, n neighbours along INNER."""


def rows_tile(d: int, accumulate: torch.dtype, gradient: bool = False, most_warps: int = 32) -> Tile | None:
    """The tile for rows of d elements, or None if they don't fit into the registers of `most_warps` warps."""
    if "softmax_blocks" in tiles.forced:
        return None
    least, most = 1 << (d - 1).bit_length(), (_GRAD_LIMIT if gradient else _LIMIT)[accumulate]
    while _SOFTMAX_ROWS[most].warps > most_warps:
        most //= 2
    # The audit may ask for a longer tile than the row needs, but not for rows under 16 elements, which are not aligned.
    longer = range(least.bit_length() - 1, most.bit_length()) if d >= 16 else (least.bit_length() - 1,)
    tile = tiles.ask("softmax_rows", lambda: [_SOFTMAX_ROWS[1 << i] for i in longer if 1 << i <= most])
    if tile is not None:
        return tile
    return _SOFTMAX_ROWS[least] if least <= most else None


def blocks_tile(d: int, inner: int) -> Tile:
    """The tile for d elements along the sum and `inner` neighbours."""
    if inner == 1:
        tile = _BLOCKS["long rows"]
    elif inner <= 16:
        tile = _BLOCKS["few neighbours"]
    else:
        tile = _BLOCKS["short" if d <= 32 else "tall"]
    return tiles.ask("softmax_blocks", lambda: (tile,)) or tile


@triton.jit
def _load(pointers, inside, EVICTION: tl.constexpr, NEGATED: tl.constexpr, ACC: tl.constexpr):
    """x, or -x; outside, -inf."""
    if NEGATED:
        x = -tl.load(pointers, mask=inside, other=float("inf"), eviction_policy=EVICTION).to(ACC)
    else:
        x = tl.load(pointers, mask=inside, other=float("-inf"), eviction_policy=EVICTION).to(ACC)
    return x


@triton.jit
def _sum_term(dy, y, LOG: tl.constexpr):
    """What the gradient sums up."""
    return dy if LOG else dy * y


@triton.jit
def _gradient(dy, y, total, LOG: tl.constexpr, NEGATED: tl.constexpr):
    dx = dy - tl.exp(y) * total if LOG else y * (dy - total)
    return -dx if NEGATED else dx


@triton.jit
def _softmax_rows_kernel(
    x_ptr, y_ptr, ROWS, D, x_row, x_d, y_row,
    LOG: tl.constexpr, NEGATED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M whole rows, read from x once and written to y once."""
    pid = tl.program_id(0)
    d = tl.arange(0, TILE_N)
    if WIDE:
        pid, d = pid.to(tl.int64), d.to(tl.int64)
    row = pid * TILE_M + tl.arange(0, TILE_M)
    inside = (row < ROWS)[:, None] & (d < D)[None, :]
    x = _load(x_ptr + (row[:, None] * x_row + d[None, :] * x_d), inside, "", NEGATED, ACC)
    # As in torch, a row of nothing but -inf becomes NaN by (-inf) - (-inf), and a NaN reaches its whole row by the sum.
    x -= tl.max(x, axis=1)[:, None]
    e = tl.exp(x)
    total = tl.sum(e, axis=1)[:, None]
    y = x - tl.log(total) if LOG else e / total
    tl.store(y_ptr + (row[:, None] * y_row + d[None, :]), y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_rows_grad_kernel(
    dy_ptr, y_ptr, dx_ptr, ROWS, D, dy_row, dy_d, y_row,
    LOG: tl.constexpr, NEGATED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M whole rows of dx, each element read once from dy and y."""
    pid = tl.program_id(0)
    d = tl.arange(0, TILE_N)
    if WIDE:
        pid, d = pid.to(tl.int64), d.to(tl.int64)
    row = pid * TILE_M + tl.arange(0, TILE_M)
    inside = (row < ROWS)[:, None] & (d < D)[None, :]
    offsets = row[:, None] * y_row + d[None, :]
    dy = tl.load(dy_ptr + (row[:, None] * dy_row + d[None, :] * dy_d), mask=inside, other=0.0).to(ACC)
    y = tl.load(y_ptr + offsets, mask=inside, other=0.0).to(ACC)
    dx = _gradient(dy, y, tl.sum(_sum_term(dy, y, LOG), axis=1)[:, None], LOG, NEGATED)
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_blocks_kernel(
    x_ptr, y_ptr, D, INNER, x_outer, x_d, x_inner, y_outer, y_d,
    LOG: tl.constexpr, NEGATED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, ONE_BLOCK: tl.constexpr,
    TILE_D: tl.constexpr, TILE_I: tl.constexpr,
):  # fmt: skip
    """One program: D elements for each of TILE_I inner neighbours. Reads x once or twice, writes y once."""
    tiles = tl.cdiv(INNER, TILE_I)
    outer = (tl.program_id(0) // tiles).to(tl.int64)
    inner = tl.program_id(0) % tiles
    block = tl.arange(0, TILE_D)
    if WIDE:
        inner, block = inner.to(tl.int64), block.to(tl.int64)
    inner = inner * TILE_I + tl.arange(0, TILE_I)
    i_inside = (inner < INNER)[None, :]
    x_ptr += outer * x_outer
    y_ptr += outer * y_outer
    if ONE_BLOCK:
        inside = (block < D)[:, None] & i_inside
        offsets = block[:, None] * x_d + inner[None, :] * x_inner
        x = _load(x_ptr + offsets, inside, "", NEGATED, ACC)
        x -= tl.max(x, axis=0)[None, :]
        e = tl.exp(x)
        total = tl.sum(e, axis=0)[None, :]
        y = x - tl.log(total) if LOG else e / total
        tl.store(y_ptr + (block[:, None] * y_d + inner[None, :]), y.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        maximum = tl.full((TILE_I,), float("-inf"), ACC)
        total = tl.zeros((TILE_I,), ACC)
        for start in range(0, D, TILE_D):
            d = start + block
            inside = (d < D)[:, None] & i_inside
            offsets = d[:, None] * x_d + inner[None, :] * x_inner
            x = _load(x_ptr + offsets, inside, "evict_last", NEGATED, ACC)
            highest = tl.maximum(maximum, tl.max(x, axis=0))
            # While all elements so far are -inf, the sum has to stay 0, where exp((-inf) - (-inf)) would be NaN.
            base = tl.where(highest == float("-inf"), 0.0, highest)
            total = total * tl.exp(maximum - base) + tl.sum(tl.exp(x - base[None, :]), axis=0)
            maximum = highest
        blocks = tl.cdiv(D, TILE_D)
        for step in range(0, blocks):
            d = (blocks - 1 - step) * TILE_D + block
            inside = (d < D)[:, None] & i_inside
            offsets = d[:, None] * x_d + inner[None, :] * x_inner
            x = _load(x_ptr + offsets, inside, "evict_first", NEGATED, ACC) - maximum[None, :]
            y = x - tl.log(total)[None, :] if LOG else tl.exp(x) / total[None, :]
            tl.store(y_ptr + (d[:, None] * y_d + inner[None, :]), y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_blocks_grad_kernel(
    dy_ptr, y_ptr, dx_ptr, D, INNER, dy_outer, dy_d, dy_inner, y_outer, y_d,
    LOG: tl.constexpr, NEGATED: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, ONE_BLOCK: tl.constexpr,
    TILE_D: tl.constexpr, TILE_I: tl.constexpr,
):  # fmt: skip
    """One program: D elements of dx for each of TILE_I inner neighbours. Reads dy and y once or twice."""
    tiles = tl.cdiv(INNER, TILE_I)
    outer = (tl.program_id(0) // tiles).to(tl.int64)
    inner = tl.program_id(0) % tiles
    block = tl.arange(0, TILE_D)
    if WIDE:
        inner, block = inner.to(tl.int64), block.to(tl.int64)
    inner = inner * TILE_I + tl.arange(0, TILE_I)
    i_inside = (inner < INNER)[None, :]
    dy_ptr += outer * dy_outer
    y_ptr += outer * y_outer
    dx_ptr += outer * y_outer
    if ONE_BLOCK:
        inside = (block < D)[:, None] & i_inside
        offsets = block[:, None] * y_d + inner[None, :]
        dy = tl.load(dy_ptr + (block[:, None] * dy_d + inner[None, :] * dy_inner), mask=inside, other=0.0).to(ACC)
        y = tl.load(y_ptr + offsets, mask=inside, other=0.0).to(ACC)
        dx = _gradient(dy, y, tl.sum(_sum_term(dy, y, LOG), axis=0)[None, :], LOG, NEGATED)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    else:
        total = tl.zeros((TILE_I,), ACC)
        for start in range(0, D, TILE_D):
            d = start + block
            inside = (d < D)[:, None] & i_inside
            offsets = d[:, None] * dy_d + inner[None, :] * dy_inner
            dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0, eviction_policy="evict_last").to(ACC)
            offsets = d[:, None] * y_d + inner[None, :]
            y = tl.load(y_ptr + offsets, mask=inside, other=0.0, eviction_policy="evict_last").to(ACC)
            total += tl.sum(_sum_term(dy, y, LOG), axis=0)
        blocks = tl.cdiv(D, TILE_D)
        for step in range(0, blocks):
            d = (blocks - 1 - step) * TILE_D + block
            inside = (d < D)[:, None] & i_inside
            offsets = d[:, None] * dy_d + inner[None, :] * dy_inner
            dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0, eviction_policy="evict_first").to(ACC)
            offsets = d[:, None] * y_d + inner[None, :]
            y = tl.load(y_ptr + offsets, mask=inside, other=0.0, eviction_policy="evict_first").to(ACC)
            dx = _gradient(dy, y, total[None, :], LOG, NEGATED)
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _rows(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x as (OUTER, D, INNER): a view where its strides allow one, otherwise a copy."""
    d = x.shape[dim]
    outer = x.shape[:dim].numel()
    return x.reshape(outer, d, x.shape[dim + 1 :].numel())


def softmax(x: torch.Tensor, out: torch.Tensor, dim: int, *, log: bool = False, negated: bool = False) -> None:
    """out = exp(x - max) / sum exp(x - max) along `dim` (0 <= dim < x.dim()), or its logarithm, or that of -x.

    Shape: both the same; x has any strides, out is contiguous, as torch's result.
    Dtype: each any floating one; computed in float32, or in float64 if either is float64.
    """
    if out.numel() == 0:
        return
    x = _rows(x, dim)
    out = out.view(x.shape)
    outer, d, inner = x.shape
    accumulate = torch.promote_types(torch.promote_types(x.dtype, out.dtype), torch.float32)
    meta = dict(LOG=log, NEGATED=negated, ACC=tiles.triton_dtype(accumulate), WIDE=launch.wide(x, out))
    warps = tiles.device(x.device).most_warps
    tile = rows_tile(d, accumulate, most_warps=warps) if inner == 1 else None
    if tile is not None:
        launch.launch(
            _softmax_rows_kernel, tiles.cdiv(outer, tile.m),
            x, out, outer, d, *x.stride()[:2], out.stride(0),
            **meta, TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
        )  # fmt: skip
    else:
        tile = blocks_tile(d, inner)
        launch.launch(
            _softmax_blocks_kernel, outer * tiles.cdiv(inner, tile.n),
            x, out, d, inner, *x.stride(), *out.stride()[:2],
            **meta, ONE_BLOCK=d <= tile.m, TILE_D=tile.m, TILE_I=tile.n, num_warps=tile.warps,
        )  # fmt: skip


def softmax_grad(
    dy: torch.Tensor, y: torch.Tensor, dx: torch.Tensor, dim: int, *, log: bool = False, negated: bool = False
) -> None:
    """dx = y (dy - sum dy y), the sum along `dim`, or what it is of `softmax` with the same arguments.

    Shape: all the same; dy and y have any strides, but y is copied unless it is contiguous, as `softmax` leaves it; dx is
        contiguous.
    Dtype: each any floating one; computed in float32, or in float64 if y is float64.
    """
    if dx.numel() == 0:
        return
    dy, y = _rows(dy, dim), _rows(y.contiguous(), dim)
    dx = dx.view(y.shape)
    outer, d, inner = y.shape
    accumulate = torch.promote_types(y.dtype, torch.float32)
    meta = dict(LOG=log, NEGATED=negated, ACC=tiles.triton_dtype(accumulate), WIDE=launch.wide(dy, y))
    warps = tiles.device(dy.device).most_warps
    tile = rows_tile(d, accumulate, gradient=True, most_warps=warps) if inner == 1 else None
    if tile is not None:
        launch.launch(
            _softmax_rows_grad_kernel, tiles.cdiv(outer, tile.m),
            dy, y, dx, outer, d, *dy.stride()[:2], y.stride(0),
            **meta, TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
        )  # fmt: skip
    else:
        tile = blocks_tile(d, inner)
        launch.launch(
            _softmax_blocks_grad_kernel, outer * tiles.cdiv(inner, tile.n),
            dy, y, dx, d, inner, *dy.stride(), *y.stride()[:2],
            **meta, ONE_BLOCK=d <= tile.m, TILE_D=tile.m, TILE_I=tile.n, num_warps=tile.warps,
        )  # fmt: skip
