"""The weights of attention, computed again from each query's sum of exponentials, and what their gradient adds to delta."""

import triton
import triton.language as tl

from .parts import is_kept, load_rows, of_weights, scores, unit, weights


@triton.jit
def _weights(
    q, k_ptr, mask_ptr, seed, lse, b, h, bh, first_m, first_n, L, S, scale, keep, unkeep,
    k_b, k_h, k_n, k_d, mask_m, mask_n,
    D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, LATER: tl.constexpr, OF_KEYS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """TILE_M x TILE_N weights of one head as dropout leaves them. What is outside is any number."""
    k = load_rows(k_ptr, b, h, first_n, S, D, k_b, k_h, k_n, k_d, False, 0, TILE_N, TILE_D)
    s = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=lse.dtype)
    s = scores(s, mask_ptr, first_m, first_n, L, S, mask_m, mask_n, scale,
               False, False, False, LATER, OF_KEYS, TILE_M, TILE_N)  # fmt: skip
    p = weights(s, lse[:, None], unit(scale, LATER), LATER and k.dtype.primitive_bitwidth == 16)
    if DROPOUT:
        p = tl.where(is_kept(seed, bh, first_m, first_n, L, S, keep, TILE_M, TILE_N), p * unkeep, 0.0)
    return p


@triton.jit(do_not_specialize=["keep"])
def attention_weights_kernel(
    q_ptr, k_ptr, mask_ptr, seed_ptr, lse_ptr, w_ptr, H, L, S,
    scale: tl.float64, keep, unkeep: tl.float64, part: tl.float64,  # type: ignore[valid-type]
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, mask_b, mask_h, mask_m, mask_n, w_b, w_h, w_m, w_n,
    D: tl.constexpr, AVERAGE: tl.constexpr, PRECISION: tl.constexpr, LATER: tl.constexpr, OF_KEYS: tl.constexpr,
    ACC: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: `part` of TILE_M x TILE_N weights of one head or, with AVERAGE, of the sum over all heads in their order."""
    # In the interpreter the scales are Python's numbers, which a cast would take for float32.
    zero = tl.full((), 0.0, tl.float64)
    scale, unkeep, part = (scale + zero).to(ACC), (unkeep + zero).to(ACC), (part + zero).to(ACC)
    tiles_m, tiles_n = tl.cdiv(L, TILE_M), tl.cdiv(S, TILE_N)
    pid, one = tl.program_id(0) % (tiles_m * tiles_n), tl.program_id(0) // (tiles_m * tiles_n)
    first_m, first_n = pid // tiles_n * TILE_M, pid % tiles_n * TILE_N
    if AVERAGE:
        b, first_h, heads = one, 0, H
    else:
        b, first_h, heads = one // H, one % H, 1
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    m, n = first_m + tl.arange(0, TILE_M), first_n + tl.arange(0, TILE_N)
    total = tl.zeros((TILE_M, TILE_N), ACC)
    for i in range(0, heads):
        h = first_h + i
        q = load_rows(q_ptr, b, h, first_m, L, D, q_b, q_h, q_m, q_d, False, 0, TILE_M, TILE_D)
        lse = tl.load(lse_ptr + tl.cast(b * H + h, tl.int64) * L + m, mask=m < L, other=float("inf"))
        mask = mask_ptr
        if mask_ptr is not None:
            mask = mask_ptr + (tl.cast(b, tl.int64) * mask_b + tl.cast(h, tl.int64) * mask_h)
        total += _weights(
            q, k_ptr, mask, seed, lse, b, h, b * H + h, first_m, first_n, L, S, scale, keep, unkeep,
            k_b, k_h, k_n, k_d, mask_m, mask_n,
            D, seed_ptr is not None, PRECISION, LATER, OF_KEYS, TILE_M, TILE_N, TILE_D)  # fmt: skip
    w_ptr += tl.cast(b, tl.int64) * w_b + tl.cast(first_h, tl.int64) * w_h
    at = w_ptr + (m.to(tl.int64)[:, None] * w_m + n.to(tl.int64)[None, :] * w_n)
    tl.store(at, (total * part).to(w_ptr.dtype.element_ty), mask=(m < L)[:, None] & (n < S)[None, :])


@triton.jit(do_not_specialize=["keep"])
def attention_weights_delta_kernel(
    q_ptr, k_ptr, mask_ptr, seed_ptr, lse_ptr, dw_ptr, delta_ptr, H, L, S,
    scale: tl.float64, keep, unkeep: tl.float64, part: tl.float64,  # type: ignore[valid-type]
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, mask_b, mask_h, mask_m, mask_n, dw_b, dw_h, dw_m, dw_n,
    D: tl.constexpr, PRECISION: tl.constexpr, LATER: tl.constexpr, OF_KEYS: tl.constexpr, ACC: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: of TILE_M queries of one head, the sums over all keys of the weights times `part` of their gradient."""
    zero = tl.full((), 0.0, tl.float64)
    scale, unkeep, part = (scale + zero).to(ACC), (unkeep + zero).to(ACC), (part + zero).to(ACC)
    tiles = tl.cdiv(L, TILE_M)
    first_m, bh = tl.program_id(0) % tiles * TILE_M, tl.program_id(0) // tiles
    b, h = bh // H, bh % H
    q = load_rows(q_ptr, b, h, first_m, L, D, q_b, q_h, q_m, q_d, False, 0, TILE_M, TILE_D)
    m = first_m + tl.arange(0, TILE_M)
    row = tl.cast(bh, tl.int64) * L + m
    lse = tl.load(lse_ptr + row, mask=m < L, other=float("inf"))
    if mask_ptr is not None:
        mask_ptr += tl.cast(b, tl.int64) * mask_b + tl.cast(h, tl.int64) * mask_h
    dw_ptr += tl.cast(b, tl.int64) * dw_b + tl.cast(h, tl.int64) * dw_h
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    delta = tl.zeros((TILE_M,), ACC)
    for first_n in range(0, S, TILE_N):
        w = _weights(
            q, k_ptr, mask_ptr, seed, lse, b, h, bh, first_m, first_n, L, S, scale, keep, unkeep,
            k_b, k_h, k_n, k_d, mask_m, mask_n,
            D, seed_ptr is not None, PRECISION, LATER, OF_KEYS, TILE_M, TILE_N, TILE_D)  # fmt: skip
        dw = of_weights(dw_ptr, first_m, first_n, L, S, dw_m, dw_n, False, TILE_M, TILE_N).to(ACC)
        # tl.where stands between product and sum: see kernels/batch_norm/whole.py.
        inside = (m < L)[:, None] & (first_n + tl.arange(0, TILE_N) < S)[None, :]
        delta += tl.sum(tl.where(inside, w * dw, 0.0), axis=1)
    tl.store(delta_ptr + row, delta * part, mask=m < L)
