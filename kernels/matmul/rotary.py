"""Query, key and value: three products of one x in one kernel, in which those of query and key are turned by their positions.

The columns of the three results lie one after the other in the grid; a program computes a tile of one of them. A tile holds whole
heads, so that both features of a pair are in the program's registers. The products are rounded to the result's dtype before
they are turned, as if `rotary` had read them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..runtime import launch, tiles
from ..runtime.tiles import Device, Tile, cdiv
from .matmul import _descriptor, _finish, _fits_a_descriptor, _place, _sum_products, _sum_tma_products
from .tiles import INTERPRETER, Product, arithmetic

# As in tiles.py, the largest first. In other arithmetic the products run one by one, and so do those of operands that can't be
# loaded 128 bits at a time.
_TILES = {
    "16": (Tile(128, 128, 64, warps=8, stages=3), Tile(64, 128, 64, warps=8, stages=3), Tile(64, 64, 64, warps=4, stages=3)),
    "tf32": (Tile(64, 128, 32, warps=8, stages=3), Tile(64, 64, 32, warps=4, stages=3)),
}  # fmt: skip
_DESCRIPTORS = {
    "sm_90": (Tile(128, 256, 64, warps=8, stages=4), Tile(128, 128, 64, warps=8, stages=4)),
    "sm_100": (Tile(128, 256, 64, warps=8, stages=3), Tile(128, 128, 64, warps=8, stages=3)),
}


@triton.jit
def _columns_halved(x, TILE_M: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (TILE_M, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _store_turned(
    a, b, y_ptr, cos_ptr, sin_ptr, first_m, first_n, M, N, LENGTH, cos_b, cos_l, sin_b, sin_l,
    FIRST: tl.constexpr, HEAD: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, ACC: tl.constexpr,
    HALVES: tl.constexpr, TILE_M: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The tile's pairs of features from the FIRST on, a and b (TILE_M, PAIRS), turned and written. They are halved HALVES times,
    and the parts are turned one after the other, since their angles take twice their registers."""
    if HALVES:
        a_left, a_right = _columns_halved(a, TILE_M, PAIRS)
        b_left, b_right = _columns_halved(b, TILE_M, PAIRS)
        _store_turned(a_left, b_left, y_ptr, cos_ptr, sin_ptr, first_m, first_n, M, N, LENGTH, cos_b, cos_l, sin_b, sin_l,
                      FIRST, HEAD, TURNED, INTERLEAVED, ACC, HALVES - 1, TILE_M, PAIRS // 2)  # fmt: skip
        _store_turned(a_right, b_right, y_ptr, cos_ptr, sin_ptr, first_m, first_n, M, N, LENGTH, cos_b, cos_l, sin_b, sin_l,
                      FIRST + PAIRS // 2, HEAD, TURNED, INTERLEAVED, ACC, HALVES - 1, TILE_M, PAIRS // 2)  # fmt: skip
    else:
        m = first_m + tl.arange(0, TILE_M)
        cos_rows = cos_ptr + (m // LENGTH * cos_b + m % LENGTH * cos_l)
        sin_rows = sin_ptr + (m // LENGTH * sin_b + m % LENGTH * sin_l)
        if INTERLEAVED:
            n = 2 * FIRST + tl.arange(0, 2 * PAIRS)
            d = n % HEAD
            inside = (m < M)[:, None] & (first_n + n < N)[None, :]
            turned = inside & (d < TURNED)[None, :]
            cos = tl.load(cos_rows[:, None] + d[None, :], mask=turned, other=0.0).to(ACC)
            sin = tl.load(sin_rows[:, None] + d[None, :], mask=turned, other=0.0).to(ACC)
            cos1, cos2 = tl.split(tl.reshape(cos, (TILE_M, PAIRS, 2)))
            sin1, sin2 = tl.split(tl.reshape(sin, (TILE_M, PAIRS, 2)))
            y1 = a * cos1 - b * sin1
            y2 = b * cos2 + a * sin2
            if TURNED < HEAD:
                pair = ((FIRST + tl.arange(0, PAIRS)) % (HEAD // 2) < TURNED // 2)[None, :]
                y1 = tl.where(pair, y1, a)
                y2 = tl.where(pair, y2, b)
            y = tl.reshape(tl.join(y1, y2), (TILE_M, 2 * PAIRS)).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + (m[:, None] * N + (first_n + n)[None, :]), y, mask=inside)
        else:
            p = FIRST + tl.arange(0, PAIRS)
            d = p % (HEAD // 2)
            n = first_n + p // (HEAD // 2) * HEAD + d
            inside = (m < M)[:, None] & (n < N)[None, :]
            y_places = y_ptr + (m[:, None] * N + n[None, :])
            cos1 = tl.load(cos_rows[:, None] + d[None, :], mask=inside, other=0.0).to(ACC)
            sin1 = tl.load(sin_rows[:, None] + d[None, :], mask=inside, other=0.0).to(ACC)
            tl.store(y_places, (a * cos1 - b * sin1).to(y_ptr.dtype.element_ty), mask=inside)
            d += HEAD // 2
            cos2 = tl.load(cos_rows[:, None] + d[None, :], mask=inside, other=0.0).to(ACC)
            sin2 = tl.load(sin_rows[:, None] + d[None, :], mask=inside, other=0.0).to(ACC)
            tl.store(y_places + HEAD // 2, (b * cos2 + a * sin2).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _turn(
    accumulator, y_ptr, bias_ptr, cos_ptr, sin_ptr, first_m, first_n, M, N, LENGTH, cos_b, cos_l, sin_b, sin_l,
    HEAD: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, ACC: tl.constexpr, HALVES: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of one tile of query or key."""
    if bias_ptr is not None:
        n = first_n + tl.arange(0, TILE_N)
        accumulator += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(ACC)[None, :]
    x = accumulator.to(y_ptr.dtype.element_ty).to(ACC)
    HALF: tl.constexpr = HEAD // 2
    if INTERLEAVED:
        a, b = tl.split(tl.reshape(x, (TILE_M, TILE_N // 2, 2)))
    else:
        a, b = tl.split(tl.permute(tl.reshape(x, (TILE_M, TILE_N // HEAD, 2, HALF)), (0, 1, 3, 2)))
        a, b = tl.reshape(a, (TILE_M, TILE_N // 2)), tl.reshape(b, (TILE_M, TILE_N // 2))
    _store_turned(a, b, y_ptr, cos_ptr, sin_ptr, first_m, first_n, M, N, LENGTH, cos_b, cos_l, sin_b, sin_l,
                  0, HEAD, TURNED, INTERLEAVED, ACC, HALVES, TILE_M, TILE_N // 2)  # fmt: skip


@triton.jit
def _rotary_matmul_kernel(
    query_ptr, key_ptr, value_ptr, x_ptr, query_weight_ptr, key_weight_ptr, value_weight_ptr,
    query_bias_ptr, key_bias_ptr, value_bias_ptr, cos_ptr, sin_ptr,
    M, QUERIES, KEYS, VALUES, K, LENGTH, cos_b, cos_l, sin_b, sin_l,
    x_m, x_k, query_n, query_k, key_n, key_k, value_n, value_k,
    HEAD: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, K_FITS: tl.constexpr, HALVES: tl.constexpr, GROUP: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: one tile of query (M, QUERIES), key (M, KEYS) or value (M, VALUES)."""
    of_query, of_key = tl.cdiv(QUERIES, TILE_N), tl.cdiv(KEYS, TILE_N)
    tiles_n = of_query + of_key + tl.cdiv(VALUES, TILE_N)
    pid_m, pid_n = _place(tl.program_id(0), tl.cdiv(M, TILE_M), tiles_n, GROUP)
    if WIDE:
        pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)
    first_m = pid_m * TILE_M
    m = first_m + tl.arange(0, TILE_M)
    if pid_n < of_query:
        first_n = pid_n * TILE_N
        n = first_n + tl.arange(0, TILE_N)
        product, _ = _sum_products(x_ptr, query_weight_ptr, m, n, first_n, M, QUERIES, 0, K, x_m, x_k, query_k, query_n,
                                   False, ACC, PRECISION, WIDE, K_FITS, False, TILE_M, TILE_N, TILE_K)  # fmt: skip
        _turn(product, query_ptr, query_bias_ptr, cos_ptr, sin_ptr, first_m, first_n, M, QUERIES, LENGTH,
              cos_b, cos_l, sin_b, sin_l, HEAD, TURNED, INTERLEAVED, ACC, HALVES, TILE_M, TILE_N)  # fmt: skip
    elif pid_n < of_query + of_key:
        first_n = (pid_n - of_query) * TILE_N
        n = first_n + tl.arange(0, TILE_N)
        product, _ = _sum_products(x_ptr, key_weight_ptr, m, n, first_n, M, KEYS, 0, K, x_m, x_k, key_k, key_n,
                                   False, ACC, PRECISION, WIDE, K_FITS, False, TILE_M, TILE_N, TILE_K)  # fmt: skip
        _turn(product, key_ptr, key_bias_ptr, cos_ptr, sin_ptr, first_m, first_n, M, KEYS, LENGTH,
              cos_b, cos_l, sin_b, sin_l, HEAD, TURNED, INTERLEAVED, ACC, HALVES, TILE_M, TILE_N)  # fmt: skip
    else:
        first_n = (pid_n - of_query - of_key) * TILE_N
        n = first_n + tl.arange(0, TILE_N)
        product, _ = _sum_products(x_ptr, value_weight_ptr, m, n, first_n, M, VALUES, 0, K, x_m, x_k, value_k, value_n,
                                   False, ACC, PRECISION, WIDE, K_FITS, False, TILE_M, TILE_N, TILE_K)  # fmt: skip
        _finish(product, value_ptr, None, value_bias_ptr, None, None, first_m, first_n, M, VALUES, VALUES, 1, 0, 0,
                None, None, None, ACC, False, HALVES, TILE_M, TILE_N)  # fmt: skip


@triton.jit
def _rotary_matmul_tma_kernel(
    query_ptr, key_ptr, value_ptr, x, query_weight, key_weight, value_weight,
    query_bias_ptr, key_bias_ptr, value_bias_ptr, cos_ptr, sin_ptr,
    M, QUERIES, KEYS, VALUES, K, LENGTH, cos_b, cos_l, sin_b, sin_l,
    HEAD: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, PRECISION: tl.constexpr,
    X_TRANSPOSED: tl.constexpr, QUERY_TRANSPOSED: tl.constexpr, KEY_TRANSPOSED: tl.constexpr,
    VALUE_TRANSPOSED: tl.constexpr, WIDE: tl.constexpr, HALVES: tl.constexpr, GROUP: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """As _rotary_matmul_kernel, for descriptors, those of the transposed weights (K, N) as _matmul_tma_kernel's b."""
    of_query, of_key = tl.cdiv(QUERIES, TILE_N), tl.cdiv(KEYS, TILE_N)
    tiles_n = of_query + of_key + tl.cdiv(VALUES, TILE_N)
    pid_m, pid_n = _place(tl.program_id(0), tl.cdiv(M, TILE_M), tiles_n, GROUP)
    first_m = pid_m * TILE_M
    wide_m = first_m
    if WIDE:
        wide_m = first_m.to(tl.int64)
    if pid_n < of_query:
        first_n = pid_n * TILE_N
        product, _ = _sum_tma_products(x, query_weight, first_m, first_n, 0, K, False, X_TRANSPOSED, QUERY_TRANSPOSED,
                                       PRECISION, TILE_M, TILE_N, TILE_K)  # fmt: skip
        _turn(product, query_ptr, query_bias_ptr, cos_ptr, sin_ptr, wide_m, first_n, M, QUERIES, LENGTH,
              cos_b, cos_l, sin_b, sin_l, HEAD, TURNED, INTERLEAVED, tl.float32, HALVES, TILE_M, TILE_N)  # fmt: skip
    elif pid_n < of_query + of_key:
        first_n = (pid_n - of_query) * TILE_N
        product, _ = _sum_tma_products(x, key_weight, first_m, first_n, 0, K, False, X_TRANSPOSED, KEY_TRANSPOSED,
                                       PRECISION, TILE_M, TILE_N, TILE_K)  # fmt: skip
        _turn(product, key_ptr, key_bias_ptr, cos_ptr, sin_ptr, wide_m, first_n, M, KEYS, LENGTH,
              cos_b, cos_l, sin_b, sin_l, HEAD, TURNED, INTERLEAVED, tl.float32, HALVES, TILE_M, TILE_N)  # fmt: skip
    else:
        first_n = (pid_n - of_query - of_key) * TILE_N
        product, _ = _sum_tma_products(x, value_weight, first_m, first_n, 0, K, False, X_TRANSPOSED, VALUE_TRANSPOSED,
                                       PRECISION, TILE_M, TILE_N, TILE_K)  # fmt: skip
        _finish(product, value_ptr, None, value_bias_ptr, None, None, wide_m, first_n, M, VALUES, VALUES, 1, 0, 0,
                None, None, None, tl.float32, False, HALVES, TILE_M, TILE_N)  # fmt: skip


def _rows(
    dtype: torch.dtype, precision: str, head_dim: int, device: Device, *, vectors: bool, descriptors: bool
) -> Iterator[Product]:
    """All that `_pick` may choose from, whatever the sizes, the largest tile first."""
    kind = arithmetic(dtype, precision)
    for tile in _DESCRIPTORS.get(device.architecture, ()) if descriptors and kind == "16" else ():
        if tile.n % head_dim == 0:
            yield Product(tile, precision, descriptors=True)
    for tile in _TILES.get(kind, ()) if vectors else ():
        if tile.n % head_dim == 0:
            yield Product(tile, precision)


def _pick(
    m: int,
    sizes: Sequence[int],
    head_dim: int,
    dtype: torch.dtype,
    precision: str,
    device: Device,
    *,
    vectors: bool,
    descriptors: bool,
) -> Product | None:
    """The largest tile that gives at least three quarters of the multiprocessors a program, and of which no more than half lies
    outside of the matrix. None where there is none, or where heads don't fill a tile."""
    if dtype != torch.float32:
        precision = "ieee"  # it concerns float32 alone
    rows = [*_rows(dtype, precision, head_dim, device, vectors=vectors, descriptors=descriptors)]
    asked: Product | None = tiles.ask("rotary_matmul", lambda: rows)
    if asked is None and device.architecture == "interpreter":
        asked = Product(INTERPRETER, precision)
    if asked is not None:
        return None if asked.tile.n % head_dim else replace(asked, precision=precision)
    for row in rows:
        programs = cdiv(m, row.tile.m) * sum(cdiv(n, row.tile.n) for n in sizes)
        if 2 * m > row.tile.m and 4 * programs >= 3 * device.multiprocessors:
            return row
    return None


def _halves(tile: Tile) -> int:
    """How often a tile's pairs are halved in its epilogue, so that a thread turns eight at a time."""
    pairs = tile.m * tile.n // (64 * tile.warps)
    return max(min(pairs // 8, tile.n // 32), 1).bit_length() - 1


def rotary_matmul(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    outs: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    head_dim: int,
    interleaved: bool,
    precision: str,
) -> bool:
    """out = x @ weight.T + bias for three of each, the first two with the first R features of their heads turned as `rotary`
    does. False if it isn't for this kernel, which leaves the outs as they are.

    Shape: x (B L, K) and weights (N, K), any strides; biases (N,) or None; outs (B L, N), contiguous, N a multiple of head_dim;
        cos and sin (B, L, R), any strides.
    Dtype: float16, bfloat16, float32 or float64, the same for all but cos and sin; precision ("ieee" or "tf32") concerns
        float32.
    """
    (m, k), turned = x.shape, cos.shape[-1]
    if head_dim & (head_dim - 1) or head_dim < 4 or (turned < head_dim and not interleaved):
        return False  # heads that are no part of a tile, or halves of which a part is turned
    operands, sizes = (x, *weights), [w.shape[0] for w in weights]
    wide = launch.wide(*operands, *outs, cos, sin)
    picked = _pick(
        m, sizes, head_dim, x.dtype, precision, tiles.device(x.device),
        vectors=not wide and all(launch.vectors(t) for t in operands),
        descriptors=all(_fits_a_descriptor(t) for t in operands),
    )  # fmt: skip
    if picked is None:
        return False
    tile = picked.tile
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    contiguous = [None if bias is None else bias.contiguous() for bias in biases]
    rest: tuple[object, ...] = (*contiguous, cos, sin, m, *sizes, k, cos.shape[1], *cos.stride()[:2], *sin.stride()[:2])
    meta = dict(
        HEAD=head_dim, TURNED=turned, INTERLEAVED=interleaved, PRECISION=picked.precision, WIDE=wide, HALVES=_halves(tile),
        GROUP=8, TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    programs = cdiv(m, tile.m) * sum(cdiv(n, tile.n) for n in sizes)
    if picked.descriptors:
        described = [_descriptor(x, tile.m, tile.k), *[_descriptor(w.T, tile.k, tile.n) for w in weights]]
        words = ("X_TRANSPOSED", "QUERY_TRANSPOSED", "KEY_TRANSPOSED", "VALUE_TRANSPOSED")
        transposed = {word: turn for word, (_, turn) in zip(words, described, strict=True)}
        launch.launch(
            _rotary_matmul_tma_kernel, programs, *outs, *[d for d, _ in described], *rest, **transposed, **meta
        )
    else:
        strides = [stride for t in operands for stride in t.stride()]
        launch.launch(
            _rotary_matmul_kernel, programs, *outs, *operands, *rest, *strides,
            ACC=tiles.triton_dtype(torch.promote_types(x.dtype, torch.float32)), K_FITS=k % tile.k == 0, **meta,
        )  # fmt: skip
    return True
