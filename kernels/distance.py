"""Cosine similarity along one dimension: y = sum x1 x2 / (n1 n2), n1 = max(|x1|, eps) and n2 = max(|x2|, eps),

    dx1 = dy / n1 (x2 / n2 - y x1 / |x1|),   dx2 = dy / n2 (x1 / n1 - y x2 / |x2|).

torch divides by the norms before it adds up. This takes a single pass. They differ where squares add up to infinity: there torch
gives 0, and this 0 or NaN.
The norms and y are kept, a number for each pair of vectors, so that the gradients need no sums.

The tensors are seen as (N0, N1, N2, D): positions in up to three dimensions, each with a vector of D elements. A program takes a
tile of positions by elements, in one of two ways:

- rows, where the elements of a vector are neighbours in memory: any positions;
- columns, where the vectors are neighbours, as for dim=1 of images: positions that differ in the last dimension alone.

Where the positions are too few to keep a GPU busy, several programs share the sums of each, and a second kernel adds them up.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .runtime import launch, tiles
from .runtime.tiles import Tile, cdiv

_ROWS = {n: Tile(m, n, warps=4) for m, n in ((128, 4), (64, 16), (16, 64), (4, 256), (1, 1024))}
"""m positions, n elements of their vectors at a time: the largest n that a vector fills."""
_COLUMNS = {
    "short": Tile(256, 4, warps=4),
    "few neighbours": Tile(16, 64, warps=4),
    "some": Tile(64, 16, warps=4),
    "many": Tile(128, 8, warps=4),
}
"""m neighbouring positions, n elements of their vectors at a time."""
_SHARES = Tile(32, 32, warps=4)
"""m positions, n of the programs that share them."""

_PROGRAMS = 4
"""Sums are shared where there would be fewer programs than this for each multiprocessor."""
_LEAST = 2
"""The fewest tiles of a program that shares sums."""


def rows_tile(d: int) -> Tile:
    """The tile for vectors whose elements are neighbours."""
    tile = _ROWS[max([n for n in _ROWS if n <= d], default=min(_ROWS))]
    return tiles.ask("cosine_rows", _ROWS.values) or tile


def columns_tile(d: int, neighbours: int) -> Tile:
    """The tile for so many vectors that are neighbours."""
    if neighbours <= 64:
        tile = _COLUMNS["few neighbours" if neighbours <= 16 else "some"]
    else:
        tile = _COLUMNS["short" if d <= 4 else "many"]
    return tiles.ask("cosine_columns", _COLUMNS.values) or tile


@triton.jit
def _positions(tile, POSITIONS, N1, N2, ROWS: tl.constexpr, TILE_P: tl.constexpr):
    """The positions of a tile: their places in the three dimensions, their numbers, and which of them exist."""
    if ROWS:
        p = tile * TILE_P + tl.arange(0, TILE_P)
        i0, i1, i2 = p // N2 // N1, p // N2 % N1, p % N2
        inside = p < POSITIONS
    else:
        across = tl.cdiv(N2, TILE_P)
        row = tile // across
        i0, i1, i2 = row // N1, row % N1, tile % across * TILE_P + tl.arange(0, TILE_P)
        p = row * N2 + i2
        inside = i2 < N2
    return i0, i1, i2, p, inside


@triton.jit
def _at_least(norm, EPS):
    """torch's clamp: NaN stays."""
    bound = tl.cast(EPS, norm.dtype)
    return tl.where(norm < bound, bound, norm)


@triton.jit
def _write(
    dot, square1, square2, y_ptr, norm1_ptr, norm2_ptr, cosine_ptr, offsets, inside, EPS1, EPS2
):  # fmt: skip
    """The similarity of vectors, and what the gradients need, from the three sums."""
    norm1 = tl.sqrt(square1)
    norm2 = tl.sqrt(square2)
    cosine = dot / _at_least(norm1, EPS1) / _at_least(norm2, EPS2)
    tl.store(y_ptr + offsets, cosine.to(y_ptr.dtype.element_ty), mask=inside)
    if cosine_ptr is not None:
        tl.store(norm1_ptr + offsets, norm1, mask=inside)
        tl.store(norm2_ptr + offsets, norm2, mask=inside)
        tl.store(cosine_ptr + offsets, cosine, mask=inside)


@triton.jit
def _cosine_similarity_kernel(
    x1_ptr, x2_ptr, y_ptr, norm1_ptr, norm2_ptr, cosine_ptr, partials_ptr,
    POSITIONS, D, N1, N2, SHARES, SHARE, EPS1: tl.float64, EPS2: tl.float64,
    x1_0, x1_1, x1_2, x2_0, x2_1, x2_2, y_0, y_1, y_2, x1_d, x2_d,
    ACC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, TILE_P: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: TILE_P positions, and SHARE elements of their vectors, each read once. It writes the similarities or, where
    SHARES programs have a position in common, its sums to partials, (3, SHARES, POSITIONS)."""
    pid = tl.program_id(0)
    block = tl.arange(0, TILE_D)
    if WIDE:
        pid, block = pid.to(tl.int64), block.to(tl.int64)
    share = pid % SHARES
    i0, i1, i2, p, inside = _positions(pid // SHARES, POSITIONS, N1, N2, ROWS, TILE_P)
    x1_ptr += (i0 * x1_0 + i1 * x1_1 + i2 * x1_2)[:, None]
    x2_ptr += (i0 * x2_0 + i1 * x2_1 + i2 * x2_2)[:, None]
    dot = tl.zeros((TILE_P, TILE_D), ACC)
    square1 = tl.zeros((TILE_P, TILE_D), ACC)
    square2 = tl.zeros((TILE_P, TILE_D), ACC)
    for start in range(share * SHARE, tl.minimum(share * SHARE + SHARE, D), TILE_D):
        d = (start + block)[None, :]
        hit = inside[:, None] & (d < D)
        x1 = tl.load(x1_ptr + d * x1_d, mask=hit, other=0.0).to(ACC)
        x2 = tl.load(x2_ptr + d * x2_d, mask=hit, other=0.0).to(ACC)
        dot += x1 * x2
        square1 += x1 * x1
        square2 += x2 * x2
    dots, squares1, squares2 = tl.sum(dot, axis=1), tl.sum(square1, axis=1), tl.sum(square2, axis=1)
    if partials_ptr is None:
        offsets = i0 * y_0 + i1 * y_1 + i2 * y_2
        _write(dots, squares1, squares2, y_ptr, norm1_ptr, norm2_ptr, cosine_ptr, offsets, inside, EPS1, EPS2)
    else:
        place = partials_ptr + (tl.cast(share, tl.int64) * POSITIONS + p)
        step = tl.cast(SHARES, tl.int64) * POSITIONS
        tl.store(place, dots, mask=inside)
        tl.store(place + step, squares1, mask=inside)
        tl.store(place + 2 * step, squares2, mask=inside)


@triton.jit
def _cosine_similarity_shares_kernel(
    partials_ptr, y_ptr, norm1_ptr, norm2_ptr, cosine_ptr,
    POSITIONS, N1, N2, SHARES, EPS1: tl.float64, EPS2: tl.float64, y_0, y_1, y_2,
    TILE_P: tl.constexpr, TILE_S: tl.constexpr,
):  # fmt: skip
    """One program: the similarities of TILE_P positions, from the sums of SHARES programs."""
    i0, i1, i2, p, inside = _positions(tl.program_id(0).to(tl.int64), POSITIONS, N1, N2, True, TILE_P)
    step = tl.cast(SHARES, tl.int64) * POSITIONS
    dot = tl.zeros((TILE_P, TILE_S), partials_ptr.dtype.element_ty)
    square1 = tl.zeros((TILE_P, TILE_S), partials_ptr.dtype.element_ty)
    square2 = tl.zeros((TILE_P, TILE_S), partials_ptr.dtype.element_ty)
    for start in range(0, SHARES, TILE_S):
        share = (start + tl.arange(0, TILE_S))[None, :]
        hit = inside[:, None] & (share < SHARES)
        place = partials_ptr + (share.to(tl.int64) * POSITIONS + p[:, None])
        dot += tl.load(place, mask=hit, other=0.0)
        square1 += tl.load(place + step, mask=hit, other=0.0)
        square2 += tl.load(place + 2 * step, mask=hit, other=0.0)
    dots, squares1, squares2 = tl.sum(dot, axis=1), tl.sum(square1, axis=1), tl.sum(square2, axis=1)
    offsets = i0 * y_0 + i1 * y_1 + i2 * y_2
    _write(dots, squares1, squares2, y_ptr, norm1_ptr, norm2_ptr, cosine_ptr, offsets, inside, EPS1, EPS2)


@triton.jit
def _own_factor(dy, cosine, norm, EPS):
    """What a vector is multiplied by in its own gradient: 0 for a vector of zeros, by whose norm nothing is divided, but NaN if
    the similarity is."""
    return dy * cosine / _at_least(norm, EPS) / tl.where(norm == 0, float("inf"), norm)


@triton.jit
def _cosine_similarity_grad_kernel(
    dy_ptr, x1_ptr, x2_ptr, norm1_ptr, norm2_ptr, cosine_ptr, dx1_ptr, dx2_ptr,
    POSITIONS, D, N1, N2, SHARES, SHARE, EPS1: tl.float64, EPS2: tl.float64,
    dy_0, dy_1, dy_2, x1_0, x1_1, x1_2, x2_0, x2_1, x2_2, y_0, y_1, y_2, dx1_0, dx1_1, dx1_2, dx2_0, dx2_1, dx2_2,
    x1_d, x2_d, dx1_d, dx2_d,
    ACC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, TILE_P: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: TILE_P positions, and SHARE elements of their vectors, each read once, and written once to dx1 and dx2, of
    which one may be None."""
    pid = tl.program_id(0)
    block = tl.arange(0, TILE_D)
    if WIDE:
        pid, block = pid.to(tl.int64), block.to(tl.int64)
    share = pid % SHARES
    i0, i1, i2, _, inside = _positions(pid // SHARES, POSITIONS, N1, N2, ROWS, TILE_P)
    dy = tl.load(dy_ptr + (i0 * dy_0 + i1 * dy_1 + i2 * dy_2), mask=inside, other=0.0).to(ACC)
    offsets = i0 * y_0 + i1 * y_1 + i2 * y_2
    norm1 = tl.load(norm1_ptr + offsets, mask=inside, other=1.0).to(ACC)
    norm2 = tl.load(norm2_ptr + offsets, mask=inside, other=1.0).to(ACC)
    cosine = tl.load(cosine_ptr + offsets, mask=inside, other=0.0).to(ACC)
    other = (dy / _at_least(norm1, EPS1) / _at_least(norm2, EPS2))[:, None]
    own1 = _own_factor(dy, cosine, norm1, EPS1)[:, None]
    own2 = _own_factor(dy, cosine, norm2, EPS2)[:, None]
    x1_ptr += (i0 * x1_0 + i1 * x1_1 + i2 * x1_2)[:, None]
    x2_ptr += (i0 * x2_0 + i1 * x2_1 + i2 * x2_2)[:, None]
    if dx1_ptr is not None:
        dx1_ptr += (i0 * dx1_0 + i1 * dx1_1 + i2 * dx1_2)[:, None]
    if dx2_ptr is not None:
        dx2_ptr += (i0 * dx2_0 + i1 * dx2_1 + i2 * dx2_2)[:, None]
    for start in range(share * SHARE, tl.minimum(share * SHARE + SHARE, D), TILE_D):
        d = (start + block)[None, :]
        hit = inside[:, None] & (d < D)
        x1 = tl.load(x1_ptr + d * x1_d, mask=hit, other=0.0).to(ACC)
        x2 = tl.load(x2_ptr + d * x2_d, mask=hit, other=0.0).to(ACC)
        if dx1_ptr is not None:
            tl.store(dx1_ptr + d * dx1_d, (other * x2 - own1 * x1).to(dx1_ptr.dtype.element_ty), mask=hit)
        if dx2_ptr is not None:
            tl.store(dx2_ptr + d * dx2_d, (other * x1 - own2 * x2).to(dx2_ptr.dtype.element_ty), mask=hit)


_Strides = list[list[int]]


def _describe(dim: int, shape: Sequence[int], *each: torch.Tensor | None) -> tuple[list[int], _Strides] | None:
    """The sizes of the three dimensions of positions, and three strides of each tensor, whether it has `dim` or not. None where
    three dimensions don't describe all tensors."""
    positions = [*shape[:dim], *shape[dim + 1 :]]
    strides = []
    for t in each:
        if t is not None:
            s = t.stride()
            strides.append(s if t.dim() < len(shape) else [*s[:dim], *s[dim + 1 :]])
    sizes, strides = launch.collapse(positions, strides)
    missing = 3 - len(sizes)
    if missing < 0:
        return None
    padded = iter([[0] * missing + s for s in strides])
    return [1] * missing + sizes, [[0] * 3 if t is None else next(padded) for t in each]


def _flat(strides: _Strides) -> list[int]:
    return [s for each in strides for s in each]


def _pick(x1: torch.Tensor, x2: torch.Tensor, dim: int, sizes: Sequence[int], strides: _Strides) -> tuple[Tile, bool]:
    """The tile, and whether it is one of rows. `strides`: x1's and x2's."""
    d, neighbours = x1.shape[dim], sizes[-1]
    if neighbours == 1 or x1.stride(dim) + x2.stride(dim) <= strides[0][-1] + strides[1][-1]:
        return rows_tile(d), True
    return columns_tile(d, neighbours), False


def _work(x: torch.Tensor, dim: int, sizes: Sequence[int], tile: Tile, rows: bool) -> tuple[int, int, int]:
    """How many tiles the positions make, how many programs share each, and how many elements of its vectors each of them has."""
    d = x.shape[dim]
    n0, n1, n2 = sizes
    count = cdiv(n0 * n1 * n2, tile.m) if rows else n0 * n1 * cdiv(n2, tile.m)
    wanted = cdiv(_PROGRAMS * tiles.device(x.device).multiprocessors, count)
    blocks = max(cdiv(d, tile.n), 1)
    share = cdiv(blocks, max(1, min(wanted, blocks // _LEAST))) * tile.n
    return count, max(cdiv(d, share), 1), share


def _meta(
    x1: torch.Tensor, x2: torch.Tensor, tile: Tile, rows: bool, *others: torch.Tensor | None
) -> dict[str, object]:
    accumulate = torch.promote_types(torch.promote_types(x1.dtype, x2.dtype), torch.float32)
    wide = launch.wide(x1, x2, *others, elements=x1.numel())
    acc = tiles.triton_dtype(accumulate)
    return dict(ACC=acc, ROWS=rows, WIDE=wide, TILE_P=tile.m, TILE_D=tile.n, num_warps=tile.warps)


def cosine_similarity(
    x1: torch.Tensor,
    x2: torch.Tensor,
    out: torch.Tensor,
    norm1: torch.Tensor | None,
    norm2: torch.Tensor | None,
    cosine: torch.Tensor | None,
    dim: int,
    eps1: float,
    eps2: float,
) -> None:
    """out = sum x1 x2 / (max(|x1|, eps1) max(|x2|, eps2)) along `dim` (0 <= dim < x1.dim()). For the gradients also the norms,
    before eps, and the similarity as it was computed, or None.

    Shape: x1 and x2 the same, any strides; the others without `dim`, contiguous.
    Dtype: x1, x2 and out any floating one each; the others that in which it is computed: float32, or float64 if x1 or x2 is.
    """
    if out.numel() == 0:
        return
    if x1.numel() == 0:
        eps1 = eps2 = 1.0  # a sum of nothing is 0, whatever eps is
    described = _describe(dim, x1.shape, x1, x2, out)
    if described is None:
        x1, x2 = x1.contiguous(), x2.contiguous()
        described = _describe(dim, x1.shape, x1, x2, out)
        assert described is not None
    sizes, strides = described
    tile, rows = _pick(x1, x2, dim, sizes, strides)
    count, shares, share = _work(x1, dim, sizes, tile, rows)
    meta = _meta(x1, x2, tile, rows, out)
    positions, partials = out.numel(), None
    if shares > 1:
        accumulate = torch.promote_types(torch.promote_types(x1.dtype, x2.dtype), torch.float32)
        partials = launch.empty((3, shares, positions), dtype=accumulate, device=x1.device)
    launch.launch(
        _cosine_similarity_kernel, count * shares,
        x1, x2, out, norm1, norm2, cosine, partials, positions, x1.shape[dim], *sizes[1:], shares, share, eps1, eps2,
        *_flat(strides), x1.stride(dim), x2.stride(dim), **meta,
    )  # fmt: skip
    if partials is not None:
        tile = tiles.ask("cosine_shares", lambda: (_SHARES,)) or _SHARES
        launch.launch(
            _cosine_similarity_shares_kernel, cdiv(positions, tile.m),
            partials, out, norm1, norm2, cosine, positions, *sizes[1:], shares, eps1, eps2, *strides[2],
            TILE_P=tile.m, TILE_S=tile.n, num_warps=tile.warps,
        )  # fmt: skip


def cosine_similarity_grad(
    dy: torch.Tensor,
    x1: torch.Tensor,
    x2: torch.Tensor,
    norm1: torch.Tensor,
    norm2: torch.Tensor,
    cosine: torch.Tensor,
    dx1: torch.Tensor | None,
    dx2: torch.Tensor | None,
    dim: int,
    eps1: float,
    eps2: float,
) -> None:
    """The gradients of `cosine_similarity`, each unless it is None, from what it was given and what it kept.

    Shape: as there, with dy as its out, but any strides; dx1 and dx2 as x1, any strides.
    """
    if x1.numel() == 0:
        return
    written = [dx1, dx2]
    described = _describe(dim, x1.shape, dy, x1, x2, cosine, *written)
    if described is None:
        dy, x1, x2 = dy.contiguous(), x1.contiguous(), x2.contiguous()
        written = [None if t is None else launch.empty(t.shape, dtype=t.dtype, device=t.device) for t in written]
        described = _describe(dim, x1.shape, dy, x1, x2, cosine, *written)
        assert described is not None
    sizes, strides = described
    tile, rows = _pick(x1, x2, dim, sizes, strides[1:3])
    count, shares, share = _work(x1, dim, sizes, tile, rows)
    launch.launch(
        _cosine_similarity_grad_kernel, count * shares,
        dy, x1, x2, norm1, norm2, cosine, *written,
        cosine.numel(), x1.shape[dim], *sizes[1:], shares, share, eps1, eps2,
        *_flat(strides), x1.stride(dim), x2.stride(dim), *[0 if t is None else t.stride(dim) for t in written],
        **_meta(x1, x2, tile, rows, dy, *written),
    )  # fmt: skip
    for result, computed in zip((dx1, dx2), written, strict=True):
        if result is not None and computed is not result:
            result.copy_(computed)
