"""Layer normalisation and RMS normalisation of rows: y = (x - mean) / sqrt(var + eps) * weight + bias.

Every tensor is seen as (ROWS, N), N being the product of the sizes that are normalised over. Two designs each way:

- Rows that fit into registers: a program holds several short ones, or one long one. Forward and backward read and write
  memory once. The variance is computed in a second pass over the registers, from differences to the mean.
- Longer rows, in blocks. Forward, a program reads one row twice. Backward, a first kernel reads each row for the two means
  that its gradient needs; a second one, in which a program holds some of the columns, reads it again and writes the
  gradients.

The gradients of weight and bias are sums over all rows. A fixed number of programs walks over the rows, each adding to sums
that it holds in registers, and `sum_partials` adds what they arrive at. The order of all additions is fixed, so that two runs
on one GPU model give the same bits.
"""

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl

from .dropout import NO_DROP, Drop, multiplied, row_factors
from .reduce import sum_partials
from .runtime import launch, tiles
from .runtime.tiles import Tile

# Tiles of m rows by n columns, by the dtype that is computed in; a row goes into the first that is wide enough. A thread holds
# 16 elements of each tensor, more in the longest rows of the forward, and fewer in float64, where each takes two registers.
# The backward loads the next rows while it works on the present ones (two stages) where a multiprocessor has registers for
# one or two programs only: four hide each other's waiting for memory.
_ROWS = {
    torch.float32: (
        Tile(128, 16), Tile(64, 32), Tile(32, 64), Tile(16, 128), Tile(8, 256), Tile(4, 512), Tile(2, 1024),
        Tile(1, 2048), Tile(1, 4096), Tile(1, 8192, warps=8), Tile(1, 16384, warps=8),
    ),
    torch.float64: (
        Tile(64, 16), Tile(32, 32), Tile(16, 64), Tile(8, 128), Tile(4, 256), Tile(2, 512), Tile(1, 1024),
        Tile(1, 2048), Tile(1, 4096, warps=8), Tile(1, 8192, warps=16),
    ),
}  # fmt: skip
_ROWS_GRAD = {
    torch.float32: (
        Tile(128, 16, stages=1), Tile(64, 32, stages=2), Tile(32, 64, stages=1), Tile(16, 128, stages=1),
        Tile(8, 256, stages=1), Tile(4, 512, stages=1), Tile(2, 1024, stages=1), Tile(1, 2048, stages=1),
        Tile(1, 4096, warps=8, stages=2), Tile(1, 8192, warps=16, stages=2),
    ),
    torch.float64: (
        Tile(64, 16, stages=1), Tile(32, 32, stages=1), Tile(16, 64, stages=1), Tile(8, 128, stages=1),
        Tile(4, 256, stages=1), Tile(2, 512, stages=1), Tile(1, 1024, stages=1),
        Tile(1, 2048, warps=8, stages=1), Tile(1, 4096, warps=16, stages=2),
    ),
}  # fmt: skip
_STAGES_ON = {("sm_100", 512): 2, ("sm_100", 8192): 1}  # where the other number spills
_BLOCKS = {torch.float32: Tile(1, 4096, warps=8, stages=2), torch.float64: Tile(1, 2048, warps=8, stages=1)}

_TRITON = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64,
}  # fmt: skip

# A multiprocessor has registers for so many warps of the backward, which hold sums for weight and bias.
_WARPS = {torch.float32: 16, torch.float64: 12}


def _tile(
    size: int, accumulate: torch.dtype, vector: int, device: tiles.Device, gradient: bool = False, wide: bool = False
) -> Tile:
    """The tile for rows of `size` elements, `vector` of which are loaded at a time. Where its n is less than the size, rows
    are worked through in blocks of n."""
    table, blocks = (_ROWS_GRAD if gradient else _ROWS)[accumulate], _BLOCKS[accumulate]
    tile = next((tile for tile in table if size <= tile.n), blocks)
    tile = replace(tile, stages=_STAGES_ON.get((device.architecture, tile.n), tile.stages))
    if vector <= 2:
        # Elements with an address and a mask each take twice the registers, so that a thread gets half as many; with addresses of
        # 64 bits the longest rows have no registers left.
        tile = blocks if tile.warps == 16 or (wide and tile.n > 8192) else tile
        m, warps = (tile.m // 2, tile.warps) if tile.m > 1 else (1, 2 * tile.warps)
        tile = replace(tile, m=m, warps=warps, stages=1)
    return tiles.ask("layer_norm", lambda: (tile,)) or tile


# In all kernels VEC divides N and the strides between rows, and `N // VEC * VEC` tells Triton so, which
# otherwise knows only of numbers that 16 divides, and would load rows of 1000 elements one by one.


@triton.jit
def _load_sum(
    x_ptr, residual_ptr, x_offsets, residual_offsets, inside, factor,
    SUM: tl.constexpr, ACC: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """A tile of x, or of x + residual, rounded to SUM as torch rounds a sum before it normalises it. `factor`: what dropout
    multiplies x by before, or None."""
    x = tl.load(x_ptr + x_offsets, mask=inside, other=0.0, eviction_policy=EVICTION).to(ACC)
    if factor is not None:
        x = multiplied(x, factor, x_ptr.dtype.element_ty)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + residual_offsets, mask=inside, other=0.0, eviction_policy=EVICTION).to(ACC)
        x = x.to(SUM).to(ACC)
    return x


@triton.jit(do_not_specialize=["seed", "offset", "threshold"])
def _layer_norm_rows_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr, mean_ptr, rstd_ptr,
    ROWS, N, x_row, residual_row, EPS: tl.float64,
    draw_ptr, THREADS, seed: tl.int64, offset: tl.int64, threshold: tl.int64, SCALE: tl.float64, DROP: tl.constexpr,
    CENTER: tl.constexpr, SUM: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M whole rows. Reads x and residual once, writes out, total and two numbers a row once.

    With DROP, x is dropped from before the sum, in chunks of as many elements."""
    N, x_row, residual_row = N // VEC * VEC, x_row // VEC * VEC, residual_row // VEC * VEC
    eps = (tl.full((), 0.0, tl.float64) + EPS).to(ACC)  # in the interpreter EPS is a Python number
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    row = pid * TILE_M + tl.arange(0, TILE_M)
    n = tl.arange(0, TILE_N)
    row_inside = row < ROWS
    inside = row_inside[:, None] & (n < N)[None, :]
    offsets = row[:, None] * N + n[None, :]
    factor = None
    if DROP:
        factor = row_factors(draw_ptr, row, N, THREADS, seed, offset, threshold, SCALE, DROP, TILE_M, TILE_N, ACC)
    x = _load_sum(
        x_ptr, residual_ptr, row[:, None] * x_row + n[None, :], row[:, None] * residual_row + n[None, :], inside, factor,
        SUM, ACC, "",
    )  # fmt: skip
    # Weight and bias are loaded once for each row of the tile: one row, broadcast, would have to pass through shared
    # memory to reach the threads that hold its columns.
    columns = 0 * row[:, None] + n[None, :]
    if total_ptr is not None:
        tl.store(total_ptr + offsets, x.to(SUM), mask=inside)
    if CENTER:
        # In float32 `/` may be off by two units in the last place, which a mean far from 0 would show.
        mean = tl.sum(x, axis=1)
        if ACC == tl.float64:  # noqa: SIM300
            mean /= N
        else:
            mean = tl.div_rn(mean, tl.cast(N, ACC))
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean, mask=row_inside)
        # Lanes beyond N hold 0, and would add the square of the mean.
        x = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, mask=row_inside)
    y = x * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(ACC)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(ACC)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm_blocks_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr, mean_ptr, rstd_ptr,
    N, x_row, residual_row, EPS: tl.float64,
    CENTER: tl.constexpr, SUM: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: one row, TILE_N elements at a time. Reads x and residual twice, writes the rest once."""
    N, x_row, residual_row = N // VEC * VEC, x_row // VEC * VEC, residual_row // VEC * VEC
    eps = (tl.full((), 0.0, tl.float64) + EPS).to(ACC)
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, TILE_N)
    if WIDE:
        block = block.to(tl.int64)
    x_ptr += row * x_row
    out_ptr += row * N
    if residual_ptr is not None:
        residual_ptr += row * residual_row
    if total_ptr is not None:
        total_ptr += row * N
    # Sums of x - shift and of its square. The shift is the mean of the first block: so the squares are of the variance's
    # size, and their sum loses nothing when the square of the mean is taken off.
    if CENTER:
        x = _load_sum(x_ptr, residual_ptr, block, block, block < N, None, SUM, ACC, "evict_last")
        shift = tl.sum(x, axis=0) / TILE_N
    sums = tl.zeros((TILE_N,), ACC)
    squares = tl.zeros((TILE_N,), ACC)
    for start in range(0, N, TILE_N):
        n = start + block
        x = _load_sum(x_ptr, residual_ptr, n, n, n < N, None, SUM, ACC, "evict_last")
        if total_ptr is not None:
            tl.store(total_ptr + n, x.to(SUM), mask=n < N)
        if CENTER:
            x = tl.where(n < N, x - shift, 0.0)
            sums += x
        squares += x * x
    variance = tl.sum(squares, axis=0) / N
    if CENTER:
        rest = tl.sum(sums, axis=0) / N  # mean - shift
        variance -= rest * rest
        variance = tl.where(variance < 0, 0.0, variance)  # by rounding, where all elements are equal; keeps NaN
        if mean_ptr is not None:
            tl.store(mean_ptr + row, shift + rest)
    rstd = tl.rsqrt(variance + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd)
    # Backwards: what was read last is still in the cache.
    blocks = tl.cdiv(N, TILE_N)
    for step in range(0, blocks):
        n = (blocks - 1 - step) * TILE_N + block
        x = _load_sum(x_ptr, residual_ptr, n, n, n < N, None, SUM, ACC, "evict_first")
        if CENTER:
            x = (x - shift) - rest  # x - mean loses digits to the rounding of a mean that is large
        y = x * rstd
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + n, mask=n < N, other=0.0).to(ACC)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(ACC)
        tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["seed", "offset", "threshold"])
def _layer_norm_grad_kernel(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, means_ptr, dx_ptr, dw_ptr, db_ptr,
    ROWS, N, dy_row, dtotal_row, x_row, dropped_ptr,
    draw_ptr, THREADS, seed: tl.int64, offset: tl.int64, threshold: tl.int64, SCALE: tl.float64, DROP: tl.constexpr,
    CENTER: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: TILE_N columns of TILE_M rows at a time, stepping over the rows that other programs take.

    Reads dy, x and dtotal once and writes dx once; at its end it writes one row each of the partial sums dw and db.
    Pointers to results that nobody asked for are None, and what they alone need isn't read. With WHOLE a tile holds whole
    rows, and the two means along a row are taken here; otherwise `_layer_norm_grad_means_kernel` has written them. With DROP
    it also writes dropped: dx as dropout's backward takes it, drawn anew.
    """
    N, dy_row, dtotal_row, x_row = N // VEC * VEC, dy_row // VEC * VEC, dtotal_row // VEC * VEC, x_row // VEC * VEC
    pid_m, pid_n, programs = tl.program_id(0), 0, tl.num_programs(0)
    if not WHOLE:
        tiles_n = tl.cdiv(N, TILE_N)
        pid_m, pid_n, programs = pid_m // tiles_n, pid_m % tiles_n, programs // tiles_n
        if WIDE:
            pid_n = pid_n.to(tl.int64)
    n = pid_n * TILE_N + tl.arange(0, TILE_N)
    n_inside = n < N
    tile_row = tl.arange(0, TILE_M)
    if WIDE:
        tile_row = tile_row.to(tl.int64)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + (0 * tile_row[:, None] + n[None, :]), mask=n_inside[None, :], other=0.0)
    dw = tl.zeros((TILE_M, TILE_N), ACC)
    db = tl.zeros((TILE_M, TILE_N), ACC)
    for start in tl.range(pid_m * TILE_M, ROWS, programs * TILE_M, num_stages=STAGES):
        row = start + tile_row
        row_inside = row < ROWS
        inside = row_inside[:, None] & n_inside[None, :]
        dy = tl.load(dy_ptr + (row[:, None] * dy_row + n[None, :]), mask=inside, other=0.0).to(ACC)
        if db_ptr is not None:
            db += dy
        if x_ptr is not None:
            x = tl.load(x_ptr + (row[:, None] * x_row + n[None, :]), mask=inside, other=0.0).to(ACC)
            rstd = tl.load(rstd_ptr + row, mask=row_inside, other=0.0)[:, None]
            if CENTER:
                x -= tl.load(mean_ptr + row, mask=row_inside, other=0.0)[:, None]
            x *= rstd
            if dw_ptr is not None:
                dw += dy * x
            if dx_ptr is not None or DROP:
                if weight_ptr is not None:
                    dy *= w.to(ACC)
                # x needs no select: beyond N, where it isn't 0, dy is.
                if not WHOLE:
                    mean_dyx = tl.load(means_ptr + row, mask=row_inside, other=0.0)
                    if CENTER:
                        mean_dy = tl.load(means_ptr + ROWS + row, mask=row_inside, other=0.0)
                elif CENTER:  # two sums in one reduction, with half the barriers of two
                    mean_dyx, mean_dy = tl.split(tl.sum(tl.join(dy * x, dy), axis=1) / N)
                else:
                    mean_dyx = tl.sum(dy * x, axis=1) / N
                dx = dy - x * mean_dyx[:, None]
                if CENTER:
                    dx -= mean_dy[:, None]
                dx *= rstd
                if dtotal_ptr is not None:
                    offsets = row[:, None] * dtotal_row + n[None, :]
                    dx += tl.load(dtotal_ptr + offsets, mask=inside, other=0.0).to(ACC)
                offsets = row[:, None] * N + n[None, :]
                if dx_ptr is not None:
                    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
                if DROP:
                    GRAD: tl.constexpr = dropped_ptr.dtype.element_ty
                    factor = row_factors(
                        draw_ptr, row, N, THREADS, seed, offset, threshold, SCALE, DROP, TILE_M, TILE_N, ACC
                    )
                    tl.store(dropped_ptr + offsets, (dx.to(GRAD).to(ACC) * factor).to(GRAD), mask=inside)
    offsets = tl.cast(pid_m, tl.int64) * N + n
    if dw_ptr is not None:
        tl.store(dw_ptr + offsets, tl.sum(dw, axis=0), mask=n_inside)
    if db_ptr is not None:
        tl.store(db_ptr + offsets, tl.sum(db, axis=0), mask=n_inside)


@triton.jit
def _layer_norm_grad_means_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, means_ptr,
    ROWS, N, dy_row, x_row,
    CENTER: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: one row. Of dy * weight it writes the mean product with the normalised row, and the mean."""
    N, dy_row, x_row = N // VEC * VEC, dy_row // VEC * VEC, x_row // VEC * VEC
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, TILE_N)
    if WIDE:
        block = block.to(tl.int64)
    dy_ptr += row * dy_row
    x_ptr += row * x_row
    rstd = tl.load(rstd_ptr + row)
    products = tl.zeros((TILE_N,), ACC)
    sums = tl.zeros((TILE_N,), ACC)
    for start in range(0, N, TILE_N):
        n = start + block
        dy = tl.load(dy_ptr + n, mask=n < N, other=0.0).to(ACC)
        x = tl.load(x_ptr + n, mask=n < N, other=0.0).to(ACC)
        if weight_ptr is not None:
            dy *= tl.load(weight_ptr + n, mask=n < N, other=0.0).to(ACC)
        if CENTER:
            x -= tl.load(mean_ptr + row)
            sums += dy
        products += dy * (x * rstd)
    tl.store(means_ptr + row, tl.sum(products, axis=0) / N)
    if CENTER:
        tl.store(means_ptr + ROWS + row, tl.sum(sums, axis=0) / N)


def _rows(x: torch.Tensor | None, size: int) -> torch.Tensor | None:
    """x as (ROWS, size) with contiguous rows: a view where its strides allow one, otherwise a copy."""
    if x is None:
        return None
    x = x.reshape(x.numel() // size, size)
    return x if x.stride(1) == 1 or size == 1 else x.contiguous()


def _row_stride(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _vector(size: int, *strides: int) -> int:
    """The most elements, up to 8, that can be loaded at a time: a number that divides all of these."""
    return math.gcd(8, size, *strides)


def _draws(drop: Drop, x: torch.Tensor, size: int, tile: Tile) -> bool:
    """Whether a kernel in this tile draws for rows of x itself; else the dropout is a launch of its own."""
    return size <= tile.n and drop.fits(x, size)


def layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    total: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    size: int,
    eps: float,
    center: bool = True,
    drop: Drop | None = None,
) -> None:
    """out = (x - mean) * rstd * weight + bias, rstd being 1 / sqrt(var + eps), along rows of `size` elements.

    With a residual, x + residual is normalised and written to total. An output that is None is not written.

    Shape: x and residual the same, their last dimensions having `size` elements together, any strides; weight and bias
        `size` elements; out and total as x, contiguous; mean and rstd (ROWS,), contiguous.
    Dtype: any floating each; computed in float32, or in float64 if what is normalised is float64; mean and rstd of that
        dtype. x + residual is rounded to the dtype of total, or to torch's for the sum.

    Args:
        center: False for RMSNorm: neither is a mean subtracted, nor written to `mean`.
        drop: the residual is added to what this leaves of x. Then there is one, all of x's shape are contiguous, and total is
            asked for.
    """
    if x.numel() == 0:
        return
    x_rows, residual_rows = _rows(x, size), _rows(residual, size)
    sum_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if total is not None:
        sum_dtype = total.dtype
    accumulate = torch.promote_types(sum_dtype, torch.float32)
    x_row, residual_row = _row_stride(x_rows), _row_stride(residual_rows)
    vector = _vector(size, x_row, residual_row)
    tensors = (x_rows, residual_rows, _rows(weight, size), _rows(bias, size), out, total, mean, rstd)
    wide = x.numel() >= 2**31 or launch.wide(x_rows, residual_rows)
    tile, rows = _tile(size, accumulate, vector, tiles.device(x.device), wide=wide), x.numel() // size
    if drop is not None and not _draws(drop, x, size, tile):
        assert total is not None
        drop.launch(x, total, residual)
        layer_norm(total, None, weight, bias, out, None, mean, rstd, size, eps, center)
        return
    meta = dict(
        CENTER=center, SUM=_TRITON[sum_dtype], ACC=tiles.triton_dtype(accumulate), VEC=vector,
        WIDE=wide, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    if size <= tile.n:
        launch.launch(
            _layer_norm_rows_kernel, tiles.cdiv(rows, tile.m),
            *tensors, rows, size, x_row, residual_row, eps, *(drop.arguments(x) if drop else NO_DROP),
            **meta, DROP=drop.vector if drop else 0, TILE_M=tile.m,
        )  # fmt: skip
    else:
        launch.launch(_layer_norm_blocks_kernel, rows, *tensors, size, x_row, residual_row, eps, **meta)


def layer_norm_grad(
    dy: torch.Tensor | None,
    dtotal: torch.Tensor | None,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    dx: torch.Tensor | None,
    dw: torch.Tensor | None,
    db: torch.Tensor | None,
    size: int,
    center: bool = True,
    drop: tuple[Drop, torch.Tensor] | None = None,
) -> None:
    """The gradients of `layer_norm` at x, which is what was normalised: x + residual where there was a residual.

    A gradient that is None is not computed. x, mean and rstd may be None if only db is asked for.

    Shape: dy, dtotal and x the same, any strides; dx like them, contiguous; weight, dw and db `size` elements, dw and db
        contiguous; mean and rstd as `layer_norm` writes them.
    Dtype: any floating each; computed in the dtype of rstd.

    Args:
        dy: the gradient of out. None is a gradient of zeros.
        dtotal: the gradient of total, which is added to dx. None if there is none.
        drop: `layer_norm`'s, and the gradient of what it dropped from, which is contiguous.
    """
    drops, dropped = drop or (None, None)
    if dx is None:
        dx = dropped  # needed all the same: dropped's gradient is computed from dx
    results = [gradient for gradient in (dx, dw, db) if gradient is not None]
    if dy is None or dy.numel() == 0:
        for gradient in results:
            if gradient is dx and dtotal is not None:
                gradient.copy_(dtotal)
            else:
                gradient.zero_()
        if drops is not None:
            drops.launch(dx, dropped)
        return
    if not results:
        return
    if dx is None:  # then these need not be read
        weight = dtotal = None
        if dw is None:
            x = mean = rstd = None
    accumulate = torch.promote_types(dy.dtype if rstd is None else rstd.dtype, torch.float32)
    dy_rows, dtotal_rows, x_rows, weight = (_rows(t, size) for t in (dy, dtotal, x, weight))
    dy_row, dtotal_row, x_row = (_row_stride(t) for t in (dy_rows, dtotal_rows, x_rows))
    vector = _vector(size, dy_row, dtotal_row, x_row)
    device, rows = tiles.device(dy.device), dy.numel() // size
    wide = dy.numel() >= 2**31 or launch.wide(dy_rows, dtotal_rows, x_rows)
    tile = _tile(size, accumulate, vector, device, wide=wide, gradient=True)
    whole, tiles_n = size <= tile.n, tiles.cdiv(size, tile.n)
    programs = tiles.cdiv(rows, tile.m)
    if dw is not None or db is not None:
        most = max(1, _WARPS[accumulate] // tile.warps) * device.multiprocessors
        programs = min(programs, max(1, most // tiles_n))
    meta = dict(
        CENTER=center, ACC=tiles.triton_dtype(accumulate), VEC=vector, TILE_N=tile.n, num_warps=tile.warps,
        WIDE=wide,
    )  # fmt: skip
    means = None
    if not whole and dx is not None:
        means = launch.empty((2, rows), dtype=accumulate, device=dy.device)
        launch.launch(
            _layer_norm_grad_means_kernel, rows,
            dy_rows, x_rows, weight, mean, rstd, means, rows, size, dy_row, x_row, **meta,
        )  # fmt: skip
    partials = [
        None if gradient is None else launch.empty((programs, size), dtype=accumulate, device=dy.device)
        for gradient in (dw, db)
    ]
    # The longest rows in float32 leave no registers for what is drawn.
    room = tile.n <= 4096 or dy.dtype != torch.float32
    drawn = drops if drops is not None and room and _draws(drops, dropped, size, tile) else None
    launch.launch(
        _layer_norm_grad_kernel, programs * tiles_n,
        dy_rows, dtotal_rows, x_rows, weight, mean, rstd, means, None if drawn and dx is dropped else dx, *partials,
        rows, size, dy_row, dtotal_row, x_row, dropped, *(drawn.arguments(dx) if drawn else NO_DROP),
        **meta, DROP=drawn.vector if drawn else 0, WHOLE=whole, TILE_M=tile.m, STAGES=tile.stages,
    )  # fmt: skip
    for partial, gradient in zip(partials, (dw, db), strict=True):
        if partial is not None and gradient is not None:
            sum_partials(partial, gradient.view(size))
    if drops is not None and drawn is None:
        drops.launch(dx, dropped)
