"""Sums or means of rows of a table, a bag of indices at a time, and their gradients.

A bag is a range of places among the indices: LENGTH of them each, or from one offset to the next. The program that writes a
bag's result adds its rows up one after the other, so that the rows themselves are written nowhere. The table's gradient is
`embedding_grad`'s: the indices are sorted, and every place takes its bag's gradient times its factor, which is its weight, or
one over the size of its bag. Every sum has a fixed order and there are no atomics.
"""

import torch
import triton
import triton.language as tl

from ..runtime import launch, tiles
from ..runtime.tiles import Tile, cdiv
from .rows import embedding_grad, vector

_BAGS = (Tile(16, 128, warps=4), Tile(2, 1024, warps=4))
"""m bags, n columns: for up to 128 columns, and for more."""
_WEIGHTS_GRAD = Tile(8, 128, warps=4)
"""m places, n columns at a time."""
_MEMBERS = Tile(1, 256, warps=4)


@triton.jit
def _bag_of(place, offsets_ptr, offset_stride, BAGS, LENGTH, STEPS, LAST: tl.constexpr):
    """The bags that these places lie in: the last one that doesn't begin after the place, by bisection. With LAST, BAGS for a
    place after the end of the last bag."""
    if offsets_ptr is None:
        low = place // LENGTH
    else:
        low = tl.zeros_like(place)  # the answer lies from low to high
        high = low + BAGS - (0 if LAST else 1)
        for _ in range(0, STEPS):
            middle = low + (high - low + 1) // 2
            searching = low < high
            begin = tl.load(offsets_ptr + middle.to(tl.int64) * offset_stride, mask=searching, other=0)
            low = tl.where(searching & (begin <= place), middle, low)
            high = tl.where(searching & (begin > place), middle - 1, high)
    return low


@triton.jit
def _embedding_bag_kernel(
    index_ptr, weight_ptr, offsets_ptr, factors_ptr, out_ptr, sizes_ptr,
    COUNT, BAGS, ROWS, N, LENGTH, padding_index, index_stride, weight_row, weight_column, offset_stride, factor_stride,
    MEAN: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_N columns of TILE_M bags. Where a row doesn't exist or offsets make no sense, nothing is read and the
    result is NaN."""
    N, weight_row = N // VEC * VEC, weight_row // VEC * VEC
    tiles_n = tl.cdiv(N, TILE_N)
    pid_m = tl.program_id(0) // tiles_n
    if WIDE:
        pid_m = pid_m.to(tl.int64)
    m = pid_m * TILE_M + tl.arange(0, TILE_M)
    pid_n = tl.program_id(0) % tiles_n
    n = pid_n * TILE_N + tl.arange(0, TILE_N)
    if offsets_ptr is None:
        begin = m.to(tl.int64) * LENGTH
        end = begin + LENGTH
    else:
        place = m.to(tl.int64) * offset_stride
        begin = tl.load(offsets_ptr + place, mask=(m > 0) & (m < BAGS), other=0).to(tl.int64)
        last = BAGS if LAST else BAGS - 1
        end = tl.load(offsets_ptr + (place + offset_stride), mask=m < last, other=0).to(tl.int64)
        end = tl.where(m < last, end, COUNT)
    wrong = (m < BAGS) & ((begin < 0) | (begin > end) | (end > COUNT))
    length = tl.where(wrong | (m >= BAGS), 0, end - begin).to(tl.int32)
    size = tl.zeros((TILE_M,), tl.int32)
    total = tl.zeros((TILE_M, TILE_N), ACC)
    for first in range(0, tl.max(length, axis=0), 4):
        for step in tl.static_range(4):  # so that several rows are on their way at once
            place = begin + (first + step)
            counted = first + step < length
            index = tl.load(index_ptr + place * index_stride, mask=counted, other=0).to(tl.int64)
            counted &= (index != padding_index) | (index < 0)
            exists = (index >= 0) & (index < ROWS)
            wrong |= counted & ~exists
            offsets = (index * weight_row)[:, None] + (n.to(tl.int64) * weight_column)[None, :]
            mask = (counted & exists)[:, None] & (n < N)[None, :]
            row = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(ACC)
            if factors_ptr is not None:
                row *= tl.load(factors_ptr + place * factor_stride, mask=counted, other=0.0).to(ACC)[:, None]
            total += row
            size += counted.to(tl.int32)
    if MEAN:
        total /= tl.where(size > 0, size, 1).to(ACC)[:, None]
    total = tl.where(wrong[:, None], float("nan"), total)
    inside = (m < BAGS)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + (m[:, None] * N + n[None, :]), total.to(out_ptr.dtype.element_ty), mask=inside)
    if sizes_ptr is not None:
        tl.store(sizes_ptr + m, size, mask=(m < BAGS) & (pid_n == 0))


@triton.jit
def _members_kernel(
    order_ptr, offsets_ptr, factors_ptr, sizes_ptr, rows_ptr, products_ptr,
    COUNT, BAGS, LENGTH, STEPS, offset_stride, factor_stride, LAST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: of TILE places among the indices, the bag of each, or -1 where it belongs to none, and its factor."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    place = tl.load(order_ptr + i, mask=i < COUNT, other=0).to(tl.int32)
    bag = _bag_of(place, offsets_ptr, offset_stride, BAGS, LENGTH, STEPS, LAST).to(tl.int64)
    within = (i < COUNT) & (bag < BAGS)
    tl.store(rows_ptr + i, tl.where(within, bag, -1), mask=i < COUNT)
    if products_ptr is not None:
        factor = tl.where(within, 1.0, 0.0).to(products_ptr.dtype.element_ty)
        if sizes_ptr is not None:
            size = tl.load(sizes_ptr + bag, mask=within, other=1)
            factor /= tl.where(size > 0, size, 1).to(products_ptr.dtype.element_ty)
        if factors_ptr is not None:
            given = tl.load(factors_ptr + place.to(tl.int64) * factor_stride, mask=within, other=0.0)
            factor = given.to(products_ptr.dtype.element_ty)
        tl.store(products_ptr + i, factor, mask=i < COUNT)


@triton.jit
def _sample_weights_grad_kernel(
    dy_ptr, index_ptr, weight_ptr, offsets_ptr, out_ptr,
    COUNT, BAGS, ROWS, N, LENGTH, STEPS, padding_index,
    dy_row, dy_column, index_stride, weight_row, weight_column, offset_stride,
    LAST: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: of TILE_M places, the products of the row that was looked up with the gradient of its bag."""
    N, dy_row, weight_row = N // VEC * VEC, dy_row // VEC * VEC, weight_row // VEC * VEC
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    bag = _bag_of(m, offsets_ptr, offset_stride, BAGS, LENGTH, STEPS, LAST).to(tl.int64)
    index = tl.load(index_ptr + m.to(tl.int64) * index_stride, mask=m < COUNT, other=0).to(tl.int64)
    counted = (m < COUNT) & (bag < BAGS) & ((index != padding_index) | (index < 0))
    exists = (index >= 0) & (index < ROWS)
    total = tl.zeros((TILE_M, TILE_N), ACC)
    for first in range(0, N, TILE_N):
        n = first + tl.arange(0, TILE_N).to(tl.int64)
        mask = (counted & exists)[:, None] & (n < N)[None, :]
        dy = tl.load(dy_ptr + ((bag * dy_row)[:, None] + (n * dy_column)[None, :]), mask=mask, other=0.0).to(ACC)
        row = (index * weight_row)[:, None] + (n * weight_column)[None, :]
        total += tl.where(mask, dy * tl.load(weight_ptr + row, mask=mask, other=0.0).to(ACC), 0.0)
    result = tl.where(counted & ~exists, float("nan"), tl.sum(total, axis=1))
    tl.store(out_ptr + m, result.to(out_ptr.dtype.element_ty), mask=m < COUNT)


def _bags(indices: torch.Tensor, offsets: torch.Tensor | None, include_last: bool) -> tuple[int, int, int]:
    """How many bags there are, of how many indices each if they are all alike, and the stride of the offsets."""
    if offsets is None:
        return indices.shape[0], indices.shape[1], 0
    return len(offsets) - include_last, 1, offsets.stride(0)


def embedding_bag(
    indices: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None,
    factors: torch.Tensor | None,
    out: torch.Tensor,
    sizes: torch.Tensor | None,
    *,
    mean: bool,
    include_last: bool,
    padding_index: int,
) -> None:
    """out[b] = the sum or mean of the rows of weight that bag b looks up; of an empty bag 0. NaN where there is no such row, or
    offsets don't ascend.

    Shape: indices (COUNT,) with offsets (BAGS,), or (BAGS + 1,) with `include_last`; or (BAGS, LENGTH) without offsets; factors
        as indices; weight (ROWS, N); out (BAGS, N), contiguous; sizes (BAGS,). Others with any strides. The first bag begins
        at 0, whatever its offset is.
    Dtype: indices and offsets int32 or int64; sizes int32; the others any floating; added up in float32 (float64).

    Args:
        factors: what each row is multiplied by.
        sizes: filled with how many rows each bag is a sum of.
        padding_index: an index that counts as none; -1 for none.
    """
    bags, length, offset_stride = _bags(indices, offsets, include_last)
    indices = indices.reshape(indices.numel())
    factors = None if factors is None else factors.reshape(factors.numel())
    (rows, n), count = weight.shape, indices.numel()
    tile = tiles.ask("embedding_bag", lambda: _BAGS) or _BAGS[n > 128]
    launch.launch(
        _embedding_bag_kernel, cdiv(bags, tile.m) * cdiv(n, tile.n),
        indices, weight, offsets, factors, out, sizes,
        count, bags, rows, n, length, padding_index, indices.stride(0), *weight.stride(), offset_stride,
        0 if factors is None else factors.stride(0),
        MEAN=mean, LAST=include_last, ACC=tiles.triton_dtype(torch.promote_types(weight.dtype, torch.float32)),
        WIDE=out.numel() >= 2**31 or launch.wide(indices), VEC=vector(n, weight.stride(0)),
        TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip


def embedding_bag_grad(
    dy: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    factors: torch.Tensor | None,
    sizes: torch.Tensor | None,
    dw: torch.Tensor,
    *,
    include_last: bool,
    padding_index: int,
    by_count: bool,
) -> None:
    """dw[row] = the sum over all places where `indices` is row of dy[the place's bag], times the place's factor, or divided by
    the bag's size.

    Shape: dy (BAGS, N), any strides; dw (ROWS, N), contiguous; the others as in `embedding_bag`.
    Dtype: as in `embedding_bag`.

    Args:
        by_count: whether to divide by how often the row was looked up.
    """
    bags, length, offset_stride = _bags(indices, offsets, include_last)
    if bags == 0:
        dw.zero_()  # the indices lie in no bag
        return
    places = factors if factors is None else factors.reshape(factors.numel())
    accumulate = torch.promote_types(dw.dtype, torch.float32)

    def members(order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        count, device = order.numel(), order.device
        plain = factors is None and sizes is None and not include_last
        products = None if plain else launch.empty((count,), dtype=accumulate, device=device)
        found = launch.empty((count,), dtype=torch.int64, device=device)
        launch.launch(
            _members_kernel, cdiv(count, _MEMBERS.n),
            order, offsets, places, sizes, found, products,
            count, bags, length, bags.bit_length(), offset_stride, 0 if places is None else places.stride(0),
            LAST=include_last, TILE=_MEMBERS.n, num_warps=_MEMBERS.warps,
        )  # fmt: skip
        return found, products

    embedding_grad(dy, indices.reshape(indices.numel()), dw, padding_index, by_count, members)


def sample_weights_grad(
    dy: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None,
    out: torch.Tensor,
    *,
    include_last: bool,
    padding_index: int,
) -> None:
    """The gradient of the factors: at every place, the sum over all columns of dy[the place's bag] * weight[the place's index].

    Shape: dy (BAGS, N), any strides; out as indices, contiguous; the others as in `embedding_bag`.
    Dtype: as in `embedding_bag`.
    """
    bags, length, offset_stride = _bags(indices, offsets, include_last)
    if bags == 0:
        out.zero_()
        return
    indices = indices.reshape(indices.numel())
    (rows, n), count = weight.shape, indices.numel()
    tile = tiles.ask("sample_weights_grad", lambda: (_WEIGHTS_GRAD,)) or _WEIGHTS_GRAD
    launch.launch(
        _sample_weights_grad_kernel, cdiv(count, tile.m),
        dy, indices, weight, offsets, out,
        count, bags, rows, n, length, bags.bit_length(), padding_index,
        *dy.stride(), indices.stride(0), *weight.stride(), offset_stride,
        LAST=include_last, ACC=tiles.triton_dtype(torch.promote_types(weight.dtype, torch.float32)),
        VEC=vector(n, dy.stride(0), weight.stride(0)), TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip
