"""What the kernels of attention have in common: how rows of a head are loaded and stored, the scores, and dropout's choice."""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(
    x, b, h, first, ROWS, COLUMNS, x_b, x_h, x_m, x_d,
    FITS: tl.constexpr, BOXES: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """TILE_R rows of one head from row `first` on, as a tile of TILE_C columns, with zeros outside.

    x is a pointer, or with BOXES a descriptor, whose dimensions are in the order of memory: 1 for (B, H, rows, columns), 2 for
    (B, rows, H, columns), 3 for (rows, B, H, columns). FITS: all rows are inside.
    """
    if BOXES == 1:
        tile = x.load([b, h, first, 0]).reshape([TILE_R, TILE_C])
    elif BOXES == 2:
        tile = x.load([b, first, h, 0]).reshape([TILE_R, TILE_C])
    elif BOXES == 3:
        tile = x.load([first, b, h, 0]).reshape([TILE_R, TILE_C])
    else:
        # The head and its first row are found in 64 bits. Within a tile 32 are enough: see `heads` in launchers.py.
        x += tl.cast(b, tl.int64) * x_b + tl.cast(h, tl.int64) * x_h + tl.cast(first, tl.int64) * x_m
        r, c = tl.arange(0, TILE_R), tl.arange(0, TILE_C)
        at = x + (r[:, None] * x_m + c[None, :] * x_d)
        if FITS and COLUMNS == TILE_C:
            tile = tl.load(at)
        elif COLUMNS == TILE_C:
            tile = tl.load(at, mask=(first + r < ROWS)[:, None], other=0.0)
        else:
            tile = tl.load(at, mask=(first + r < ROWS)[:, None] & (c < COLUMNS)[None, :], other=0.0)
    return tile


@triton.jit
def _columns(
    x, b, h, first, c, ROWS, x_b, x_h, x_m, x_d, COLUMNS: tl.constexpr, TILE_R: tl.constexpr, TILE_K: tl.constexpr
):  # fmt: skip
    """TILE_K columns of TILE_R rows of one head, from column `c` and row `first` on, with zeros outside."""
    x += tl.cast(b, tl.int64) * x_b + tl.cast(h, tl.int64) * x_h + tl.cast(first, tl.int64) * x_m
    r, c = tl.arange(0, TILE_R), c + tl.arange(0, TILE_K)
    inside = (first + r < ROWS)[:, None] & (c < COLUMNS)[None, :]
    return tl.load(x + (r[:, None] * x_m + c[None, :] * x_d), mask=inside, other=0.0)


@triton.jit
def products(
    x, y, b, h, h_y, first_m, first_n, L, S, x_b, x_h, x_m, x_d, y_b, y_h, y_n, y_d,
    FEATURES: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Of TILE_M rows of x and TILE_N rows of y, the products. TILE_K features at a time: strict float32 has no registers for
    more, since it takes each number in two."""
    total = tl.zeros((TILE_M, TILE_N), ACC)
    for c in range(0, FEATURES, TILE_K):
        x_tile = _columns(x, b, h, first_m, c, L, x_b, x_h, x_m, x_d, FEATURES, TILE_M, TILE_K)
        y_tile = _columns(y, b, h_y, first_n, c, S, y_b, y_h, y_n, y_d, FEATURES, TILE_N, TILE_K)
        total = tl.dot(x_tile, y_tile.T, total, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit
def store_rows(
    x, tile, b, h, first, ROWS, COLUMNS, x_b, x_h, x_m, x_d, TILE_R: tl.constexpr, TILE_C: tl.constexpr
):  # fmt: skip
    """Write TILE_R rows of one head from row `first` on; what is outside is left alone."""
    x += tl.cast(b, tl.int64) * x_b + tl.cast(h, tl.int64) * x_h + tl.cast(first, tl.int64) * x_m
    r, c = tl.arange(0, TILE_R), tl.arange(0, TILE_C)
    inside = (first + r < ROWS)[:, None] & (c < COLUMNS)[None, :]
    at = x + (r.to(tl.int64)[:, None] * x_m + c[None, :] * x_d)
    tl.store(at, tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def scores(
    s, mask_ptr, first_m, first_n, L, S, mask_m, mask_n, scale,
    BOUNDS: tl.constexpr, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr, LATER: tl.constexpr, OF_KEYS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Of products of queries and keys, the scores: scale * s + mask, and -inf where a query may not attend.

    LATER: products are left as they are, and `weights` scales their differences; for scales above _LEAST_SCALE of launchers.py,
    without a mask. OF_KEYS: the mask is the same for all queries, and so a vector, or mask_ptr is a column that points to each
    query's own row. TRANSPOSED: keys are the rows of s.
    """
    i, j = tl.arange(0, TILE_M), tl.arange(0, TILE_N)
    if TRANSPOSED:
        i, j = i[None, :], j[:, None]
    else:
        i, j = i[:, None], j[None, :]
    if not LATER:
        s = s * scale
    if mask_ptr is not None:
        # Rows of a mask may lie anywhere: for many keys those of one tile are more than 2**31 elements apart.
        at = mask_ptr + (first_n + j.to(tl.int64)) * mask_n
        inside = first_n + j < S
        if not OF_KEYS:
            at = at + (first_m + i.to(tl.int64)) * mask_m
            inside = inside & (first_m + i < L)
        if mask_ptr.dtype.element_ty == tl.int1:
            s = tl.where(tl.load(at, mask=inside, other=1) != 0, s, float("-inf"))
        else:
            s += tl.load(at, mask=inside, other=0.0).to(s.dtype)
        if s.dtype == tl.float64:
            # A sum of one number each, without which the compiler (3.7) gives what comes of the mask a layout for which it has no
            # products in float64.
            s = tl.sum(s[:, :, None], axis=2)
    if BOUNDS:
        if CAUSAL:
            s = tl.where((first_n + j < S) & (first_n + j <= first_m + i), s, float("-inf"))
        else:
            s = tl.where(first_n + j < S, s, float("-inf"))
    return s


@triton.jit
def unit(scale, LATER: tl.constexpr):
    """What a difference of `scores` is multiplied by to be an argument of exp2."""
    if LATER:
        factor = scale * _LOG2E
    else:
        factor = tl.full((), _LOG2E, scale.dtype)
    return factor


@triton.jit
def weights(s, base, unit, NARROW: tl.constexpr):
    """exp2(unit * (s - base)) of scores.

    A difference of float32 numbers is rounded little, a product of large ones more: it costs the weight as many digits as the
    score has before its point. Without a mask, products of operands of 16 bits have many fewer digits than that. NARROW: for
    them, with one instruction less. (A mask's numbers may be of any size, -3e38 among them: then the rounding of base * unit
    alone would be infinite.)
    """
    if NARROW:
        p = tl.exp2(s * unit - base * unit)
    else:
        p = tl.exp2((s - base) * unit)
    return p


@triton.jit
def of_weights(
    x_ptr, first_m, first_n, L, S, x_m, x_n, TRANSPOSED: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr
):  # fmt: skip
    """A tile of what there is one of for each query and key of a head, with zeros outside. TRANSPOSED: keys are its rows."""
    i, j = tl.arange(0, TILE_M), tl.arange(0, TILE_N)
    if TRANSPOSED:
        i, j = i[None, :], j[:, None]
    else:
        i, j = i[:, None], j[None, :]
    at = x_ptr + (first_m + i.to(tl.int64)) * x_m + (first_n + j.to(tl.int64)) * x_n
    return tl.load(at, mask=(first_m + i < L) & (first_n + j < S), other=0.0)


@triton.jit
def is_kept(seed, bh, first_m, first_n, L, S, keep, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    """Which weights dropout keeps, `keep` of 65536 of them: a function of the seed, the head, the query and the key alone, so
    that every kernel finds the same in whatever tile.

    A call of Philox yields 128 bits, 16 each for 8 keys that lie 8 apart: in the layout of a product's result these are registers
    of one thread. A tile of fewer than 64 keys makes the numbers of 64 and keeps its own by computing each key's call alone.
    """
    query = (tl.cast(bh, tl.int64) * L + first_m + tl.arange(0, TILE_M))[:, None] * (tl.cdiv(S, 64) * 8)
    if TILE_N % 64 == 0:
        i = tl.arange(0, TILE_N // 8)
        a, b, c, d = tl.randint4x(seed, query + (first_n // 8 + i // 8 * 8 + i % 8)[None, :], n_rounds=7)
        word = tl.join(tl.join(a, c), tl.join(b, d)).to(tl.uint32, bitcast=True)  # flattened, it is a b c d
        half = tl.join(word & 0xFFFF, word >> 16).reshape([TILE_M, TILE_N // 64, 8, 8])
        bits = half.permute([0, 1, 3, 2]).reshape([TILE_M, TILE_N])
    else:
        n = (first_n + tl.arange(0, TILE_N))[None, :]
        a, b, c, d = tl.randint4x(seed, query + n // 64 * 8 + n % 8, n_rounds=7)
        place = n // 8 % 8
        word = tl.where(place < 2, a, tl.where(place < 4, b, tl.where(place < 6, c, d))).to(tl.uint32, bitcast=True)
        bits = tl.where(place % 2 == 0, word & 0xFFFF, word >> 16)
    return bits < keep
