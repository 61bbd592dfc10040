"""Rows of a table by their indices, and the table's gradient: every row of it written once, the sum of the gradients of all
places where the row was looked up, or zeros.

For the gradient the indices are sorted (`torch.sort`, stable), so that equal ones adjoin in the order in which they were
given; `starts` says where each row's begin. The program that writes a row adds up its gradients one after the other. A row that
was looked up often, as the commonest words are, would keep its program busy long after all others have ended. So the sorted
indices are cut into pieces of `PIECE`, and where a row has more indices than that, other programs first add up its part of each
piece. Every sum has a fixed order and there are no atomics, so that results are the same from run to run.
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..runtime import launch, tiles
from ..runtime.tiles import Tile, cdiv

PIECE = 64
"""The number of sorted indices in a piece."""

_EMBEDDING = (Tile(16, 128, warps=4), Tile(2, 1024, warps=4))
_EMBEDDING_GRAD = (Tile(16, 128, warps=4), Tile(2, 512, warps=4))
"""m rows, n columns: for up to 128 columns, and for more."""
_EMBEDDING_PIECES = Tile(PIECE, 64, warps=4)
_STARTS = Tile(1, 256, warps=4)


@triton.jit
def _embedding_kernel(
    index_ptr, weight_ptr, out_ptr,
    COUNT, ROWS, N, index_stride, weight_row, weight_column,
    WIDE: tl.constexpr, VEC: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_N columns of TILE_M results. Where there is no such row, nothing is read and the result is NaN."""
    N, weight_row = N // VEC * VEC, weight_row // VEC * VEC
    tiles_n = tl.cdiv(N, TILE_N)
    pid_m = tl.program_id(0) // tiles_n
    if WIDE:
        pid_m = pid_m.to(tl.int64)
    m = pid_m * TILE_M + tl.arange(0, TILE_M)
    n = tl.program_id(0) % tiles_n * TILE_N + tl.arange(0, TILE_N)
    index = tl.load(index_ptr + m * index_stride, mask=m < COUNT, other=0).to(tl.int64)
    exists = (index >= 0) & (index < ROWS)
    inside = (m < COUNT)[:, None] & (n < N)[None, :]
    offsets = (index * weight_row)[:, None] + (n.to(tl.int64) * weight_column)[None, :]
    row = tl.load(weight_ptr + offsets, mask=inside & exists[:, None], other=float("nan"))
    tl.store(out_ptr + (m[:, None] * N + n[None, :]), row, mask=inside)


@triton.jit
def _starts_kernel(sorted_ptr, starts_ptr, COUNT, ROWS, STEPS, TILE: tl.constexpr):
    """One program: of TILE rows, the place of the first sorted index that isn't smaller, by bisection."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    low = tl.zeros((TILE,), tl.int32)
    high = low + COUNT
    for _ in range(0, STEPS):
        middle = low + (high - low) // 2
        smaller = tl.load(sorted_ptr + middle, mask=low < high, other=0) < row
        searching = low < high
        low = tl.where(searching & smaller, middle + 1, low)
        high = tl.where(searching & ~smaller, middle, high)
    tl.store(starts_ptr + row, low, mask=row <= ROWS)


@triton.jit
def _load_gradients(dy_ptr, order_ptr, factors_ptr, place, n, counted, inside, dy_row, dy_column, ACC: tl.constexpr):
    """The rows of dy that belong to these places among the sorted indices, each times its factor if there are factors: then a row
    of -1 is none."""
    row = tl.load(order_ptr + place, mask=counted, other=0)
    if factors_ptr is not None:
        counted &= row >= 0
    offsets = (row * dy_row)[:, None] + (n.to(tl.int64) * dy_column)[None, :]
    dy = tl.load(dy_ptr + offsets, mask=counted[:, None] & inside[None, :], other=0.0).to(ACC)
    if factors_ptr is not None:
        factor = tl.load(factors_ptr + place, mask=counted, other=0.0)
        dy = tl.where(counted[:, None], dy * factor[:, None], 0.0)
    return dy


@triton.jit
def _embedding_pieces_kernel(
    dy_ptr, sorted_ptr, order_ptr, factors_ptr, starts_ptr, partials_ptr,
    COUNT, ROWS, N, padding_index, dy_row, dy_column,
    ACC: tl.constexpr, VEC: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_N columns of a piece of TILE_M sorted indices. Rows that were looked up more than TILE_M times can be the
    piece's first or its last one: the sums of their gradients are written to two rows of partials."""
    N, dy_row = N // VEC * VEC, dy_row // VEC * VEC
    tiles_n = tl.cdiv(N, TILE_N)
    piece = (tl.program_id(0) // tiles_n).to(tl.int64)
    place = piece * TILE_M + tl.arange(0, TILE_M)
    n = tl.program_id(0) % tiles_n * TILE_N + tl.arange(0, TILE_N)
    keys = tl.load(sorted_ptr + place, mask=place < COUNT, other=-1)
    first = tl.load(sorted_ptr + piece * TILE_M)
    for slot in tl.static_range(2):
        key = first
        if slot == 1:
            key = tl.load(sorted_ptr + min((piece + 1) * TILE_M, COUNT) - 1)
        exists = (key >= 0) & (key < ROWS)
        begin = tl.load(starts_ptr + key, mask=exists, other=0)
        end = tl.load(starts_ptr + key + 1, mask=exists, other=0)
        if (end - begin > TILE_M) & (key != padding_index) & ((slot == 0) | (key != first)):
            dy = _load_gradients(dy_ptr, order_ptr, factors_ptr, place, n, (place < COUNT) & (keys == key), n < N,
                                 dy_row, dy_column, ACC)  # fmt: skip
            tl.store(partials_ptr + ((piece * 2 + slot) * N + n), tl.sum(dy, axis=0), mask=n < N)


@triton.jit
def _embedding_grad_kernel(
    dy_ptr, order_ptr, factors_ptr, starts_ptr, partials_ptr, dw_ptr,
    ROWS, N, padding_index, dy_row, dy_column,
    BY_COUNT: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr, PIECE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_N columns of TILE_M rows of the table's gradient, each written once."""
    N, dy_row = N // VEC * VEC, dy_row // VEC * VEC
    tiles_n = tl.cdiv(N, TILE_N)
    pid_m = tl.program_id(0) // tiles_n
    if WIDE:
        pid_m = pid_m.to(tl.int64)
    m = pid_m * TILE_M + tl.arange(0, TILE_M)
    n = tl.program_id(0) % tiles_n * TILE_N + tl.arange(0, TILE_N)
    begin = tl.load(starts_ptr + m, mask=m < ROWS, other=0)
    end = tl.load(starts_ptr + m + 1, mask=m < ROWS, other=0)
    lookups = tl.where(m == padding_index, 0, end - begin)
    total = tl.zeros((TILE_M, TILE_N), ACC)
    single = tl.where(lookups > PIECE, 0, lookups)
    for i in range(0, tl.max(single, axis=0)):
        total += _load_gradients(dy_ptr, order_ptr, factors_ptr, begin + i, n, i < single, n < N,
                                 dy_row, dy_column, ACC)  # fmt: skip
    first = begin // PIECE
    pieces = tl.where(lookups > PIECE, (end - 1) // PIECE - first + 1, 0)
    for i in range(0, tl.max(pieces, axis=0)):
        piece = first + i
        partial = piece.to(tl.int64) * 2 + tl.where(begin <= piece * PIECE, 0, 1)
        mask = (i < pieces)[:, None] & (n < N)[None, :]
        total += tl.load(partials_ptr + ((partial * N)[:, None] + n[None, :]), mask=mask, other=0.0)
    if BY_COUNT:
        total /= tl.where(lookups > 0, lookups, 1).to(ACC)[:, None]
    mask = (m < ROWS)[:, None] & (n < N)[None, :]
    tl.store(dw_ptr + (m[:, None] * N + n[None, :]), total.to(dw_ptr.dtype.element_ty), mask=mask)


def vector(*sizes: int) -> int:
    """The most elements, up to 8, that can be loaded at a time: a number that divides all of these."""
    return math.gcd(8, *sizes)


def embedding(indices: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out = weight[indices]; NaN where torch stops the process because there is no such row.

    Shape: indices any, any strides; weight (ROWS, N), any strides; out (*indices.shape, N), contiguous.
    Dtype: indices int32 or int64; out as weight, any.
    """
    indices = indices.reshape(indices.numel())
    (rows, n), count = weight.shape, indices.numel()
    tile = tiles.ask("embedding", lambda: _EMBEDDING) or _EMBEDDING[n > 128]
    launch.launch(
        _embedding_kernel, cdiv(count, tile.m) * cdiv(n, tile.n),
        indices, weight, out, count, rows, n, indices.stride(0), *weight.stride(),
        WIDE=out.numel() >= 2**31 or launch.wide(indices), VEC=vector(n, weight.stride(0)),
        TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip


def embedding_grad(
    dy: torch.Tensor,
    indices: torch.Tensor,
    dw: torch.Tensor,
    padding_index: int,
    by_count: bool,
    members: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]] | None = None,
) -> None:
    """dw[row] = the sum of the rows of dy where `indices` is row.

    Shape: indices (COUNT,); dy (COUNT, N), any strides; dw (ROWS, N), contiguous. With `members`, dy has any number of rows.
    Dtype: indices int32 or int64; dy and dw any floating; added up in float32 (float64).

    Args:
        padding_index: the row whose gradient is 0; -1 for none.
        by_count: whether to divide by how often the row was looked up.
        members: where several indices share a row of dy. Of the order (COUNT,) in which the indices are sorted, in which
            places among them follow each other, it gives the row of dy for each, as int64, and what that row is multiplied
            by, in the dtype that sums have, or None.
    """
    (rows, n), count = dw.shape, indices.numel()
    accumulate = torch.promote_types(dw.dtype, torch.float32)
    if rows < 2**31:
        indices = indices.to(torch.int32)  # half of the bytes to sort
    ordered, order = torch.sort(indices, stable=True)
    order, factors = (order, None) if members is None else members(order)
    starts = launch.empty((rows + 1,), dtype=torch.int32, device=dw.device)
    launch.launch(
        _starts_kernel, cdiv(rows + 1, _STARTS.n),
        ordered, starts, count, rows, count.bit_length(), TILE=_STARTS.n, num_warps=_STARTS.warps,
    )  # fmt: skip
    pieces = cdiv(count, PIECE) if count > PIECE else 0
    partials = launch.empty((2 * pieces, n), dtype=accumulate, device=dw.device)
    meta = dict(ACC=tiles.triton_dtype(accumulate), VEC=vector(n, dy.stride(0)))
    tile = _EMBEDDING_PIECES
    launch.launch(
        _embedding_pieces_kernel, pieces * cdiv(n, tile.n),
        dy, ordered, order, factors, starts, partials, count, rows, n, padding_index, *dy.stride(),
        **meta, TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    tile = tiles.ask("embedding_grad", lambda: _EMBEDDING_GRAD) or _EMBEDDING_GRAD[n > 128]
    launch.launch(
        _embedding_grad_kernel, cdiv(rows, tile.m) * cdiv(n, tile.n),
        dy, order, factors, starts, partials, dw, rows, n, padding_index, *dy.stride(),
        **meta, BY_COUNT=by_count, WIDE=dw.numel() >= 2**31 or launch.wide(dy), PIECE=PIECE,
        TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip
