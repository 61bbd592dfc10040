"""Softmax along one dimension: y = exp(x - max x) / sum exp(x - max x), dx = y (dy - sum dy y).

Every tensor is seen as (OUTER, D, INNER), the sum running over D. Two designs, each reading and writing memory once:

- rows (INNER = 1, D up to 16,384 or 32,768): whole rows in registers, several short ones per program;
- blocks (any other): a program walks along D in blocks for INNER neighbours at a time, first for the maximum and the
  sum, then backwards for the result, so that what it read last is still in cache. Up to one block, it reads once.
"""

import torch
import triton
import triton.language as tl

from . import _launch, _tiles


@triton.jit
def _softmax_rows_kernel(
    x_ptr, y_ptr, ROWS, D, x_row, x_d, y_row,
    ACC: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M whole rows, read from x once and written to y once."""
    pid = tl.program_id(0)
    d = tl.arange(0, TILE_N)
    if WIDE:
        pid, d = pid.to(tl.int64), d.to(tl.int64)
    row = pid * TILE_M + tl.arange(0, TILE_M)
    inside = (row < ROWS)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + (row[:, None] * x_row + d[None, :] * x_d), mask=inside, other=float("-inf")).to(ACC)
    # A row of -inf alone gives (-inf) - (-inf) = NaN, and NaN anywhere reaches the whole row through the sum: as torch.
    e = tl.exp(x - tl.max(x, axis=1)[:, None])
    y = e / tl.sum(e, axis=1)[:, None]
    tl.store(y_ptr + (row[:, None] * y_row + d[None, :]), y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_rows_grad_kernel(
    dy_ptr, y_ptr, dx_ptr, ROWS, D, dy_row, dy_d, y_row,
    ACC: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
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
    dx = y * (dy - tl.sum(dy * y, axis=1)[:, None])
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_blocks_kernel(
    x_ptr, y_ptr, D, INNER, x_outer, x_d, x_inner, y_outer, y_d,
    ACC: tl.constexpr, WIDE: tl.constexpr, ONE_BLOCK: tl.constexpr, TILE_D: tl.constexpr, TILE_I: tl.constexpr,
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
        x = tl.load(x_ptr + offsets, mask=inside, other=float("-inf")).to(ACC)
        e = tl.exp(x - tl.max(x, axis=0)[None, :])
        y = e / tl.sum(e, axis=0)[None, :]
        tl.store(y_ptr + (block[:, None] * y_d + inner[None, :]), y.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        maximum = tl.full((TILE_I,), float("-inf"), ACC)
        total = tl.zeros((TILE_I,), ACC)
        for start in range(0, D, TILE_D):
            d = start + block
            inside = (d < D)[:, None] & i_inside
            offsets = d[:, None] * x_d + inner[None, :] * x_inner
            x = tl.load(x_ptr + offsets, mask=inside, other=float("-inf"), eviction_policy="evict_last").to(ACC)
            highest = tl.maximum(maximum, tl.max(x, axis=0))
            # As long as there was nothing but -inf, the sum is 0, not exp((-inf) - (-inf)).
            base = tl.where(highest == float("-inf"), 0.0, highest)
            total = total * tl.exp(maximum - base) + tl.sum(tl.exp(x - base[None, :]), axis=0)
            maximum = highest
        blocks = tl.cdiv(D, TILE_D)
        for step in range(0, blocks):
            d = (blocks - 1 - step) * TILE_D + block
            inside = (d < D)[:, None] & i_inside
            offsets = d[:, None] * x_d + inner[None, :] * x_inner
            x = tl.load(x_ptr + offsets, mask=inside, other=float("-inf"), eviction_policy="evict_first").to(ACC)
            y = tl.exp(x - maximum[None, :]) / total[None, :]
            tl.store(y_ptr + (d[:, None] * y_d + inner[None, :]), y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_blocks_grad_kernel(
    dy_ptr, y_ptr, dx_ptr, D, INNER, dy_outer, dy_d, dy_inner, y_outer, y_d,
    ACC: tl.constexpr, WIDE: tl.constexpr, ONE_BLOCK: tl.constexpr, TILE_D: tl.constexpr, TILE_I: tl.constexpr,
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
        dx = y * (dy - tl.sum(dy * y, axis=0)[None, :])
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
            total += tl.sum(dy * y, axis=0)
        blocks = tl.cdiv(D, TILE_D)
        for step in range(0, blocks):
            d = (blocks - 1 - step) * TILE_D + block
            inside = (d < D)[:, None] & i_inside
            offsets = d[:, None] * dy_d + inner[None, :] * dy_inner
            dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0, eviction_policy="evict_first").to(ACC)
            offsets = d[:, None] * y_d + inner[None, :]
            y = tl.load(y_ptr + offsets, mask=inside, other=0.0, eviction_policy="evict_first").to(ACC)
            dx = y * (dy - total[None, :])
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _rows(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x as (OUTER, D, INNER): a view where its strides allow one, otherwise a copy."""
    d = x.shape[dim]
    outer = x.shape[:dim].numel()
    return x.reshape(outer, d, x.shape[dim + 1 :].numel())


def softmax(x: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """exp(x - max) / sum exp(x - max) along `dim` (0 <= dim < x.dim()).

    Shape: any, any strides; the result is contiguous, as torch's.
    Dtype: x floating, the result `dtype`; computed in float32, or float64 if either is float64.
    """
    y = _launch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, out = _rows(x, dim), _rows(y, dim)
    outer, d, inner = x.shape
    accumulate = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
    meta = dict(ACC=_tiles.triton_dtype(accumulate), WIDE=_launch.wide(x, out))
    tile = _tiles.softmax_rows(d, accumulate) if inner == 1 else None
    if tile is not None:
        _launch.launch(
            _softmax_rows_kernel, _tiles.cdiv(outer, tile.m),
            x, out, outer, d, *x.stride()[:2], out.stride(0),
            **meta, TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
        )  # fmt: skip
    else:
        tile = _tiles.softmax_blocks(d, inner, accumulate)
        _launch.launch(
            _softmax_blocks_kernel, outer * _tiles.cdiv(inner, tile.n),
            x, out, d, inner, *x.stride(), *out.stride()[:2],
            **meta, ONE_BLOCK=d <= tile.m, TILE_D=tile.m, TILE_I=tile.n, num_warps=tile.warps,
        )  # fmt: skip
    return y


def softmax_grad(dy: torch.Tensor, y: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """dx = y (dy - sum dy y), the sum along `dim`.

    Shape: dy and y the same, any strides; y is copied unless contiguous, as softmax returns it; dx contiguous.
    Dtype: dx is `dtype`.
    """
    result = _launch.empty(y.shape, dtype=dtype, device=y.device)
    if result.numel() == 0:
        return result
    dy, y, dx = _rows(dy, dim), _rows(y.contiguous(), dim), _rows(result, dim)
    outer, d, inner = y.shape
    accumulate = torch.promote_types(y.dtype, torch.float32)
    meta = dict(ACC=_tiles.triton_dtype(accumulate), WIDE=_launch.wide(dy, y))
    tile = _tiles.softmax_rows(d, accumulate, gradient=True) if inner == 1 else None
    if tile is not None:
        _launch.launch(
            _softmax_rows_grad_kernel, _tiles.cdiv(outer, tile.m),
            dy, y, dx, outer, d, *dy.stride()[:2], y.stride(0),
            **meta, TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
        )  # fmt: skip
    else:
        tile = _tiles.softmax_blocks(d, inner, accumulate)
        _launch.launch(
            _softmax_blocks_grad_kernel, outer * _tiles.cdiv(inner, tile.n),
            dy, y, dx, d, inner, *dy.stride(), *y.stride()[:2],
            **meta, ONE_BLOCK=d <= tile.m, TILE_D=tile.m, TILE_I=tile.n, num_warps=tile.warps,
        )  # fmt: skip
    return result
