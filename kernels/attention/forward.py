"""The forward kernel of attention: softmax(scale * q k^T + mask) v, block by block of keys, without the weights in memory.

Maxima, exponentials and sums are in float32, for float64 in float64. Sums run over the keys in order, so that the same call
always gives the same bits.
"""

import triton
import triton.language as tl

from .parts import is_kept, load_rows, scores, store_rows, unit, weights


@triton.jit
def forward_blocks(
    acc, total, highest, q, k, v, mask_ptr, seed, b, h, bh, first_m, begin, end, L, S, D, DV, GROUP, scale, keep,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mask_m, mask_n,
    BOUNDS: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, BOXES: tl.constexpr, PRECISION: tl.constexpr,
    LATER: tl.constexpr, OF_KEYS: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
):  # fmt: skip
    """Take the keys from `begin` to `end` into the weighted sum of values, the sum of weights and the greatest score."""
    factor = unit(scale, LATER)
    for first_n in range(begin, end, TILE_N):
        k_tile = load_rows(k, b, h // GROUP, first_n, S, D, k_b, k_h, k_n, k_d, not BOUNDS, BOXES, TILE_N, TILE_D)
        s = tl.dot(q, k_tile.T, input_precision=PRECISION, out_dtype=acc.dtype)
        s = scores(s, mask_ptr, first_m, first_n, L, S, mask_m, mask_n, scale,
                   BOUNDS, CAUSAL, False, LATER, OF_KEYS, TILE_M, TILE_N)  # fmt: skip
        top = tl.maximum(highest, tl.max(s, axis=1))
        base = tl.where(top == float("-inf"), 0.0, top)  # there is nothing but -inf so far
        p = weights(s, base[:, None], factor, LATER and k_tile.dtype.primitive_bitwidth == 16)
        shrink = tl.exp2((highest - base) * factor)
        total = total * shrink + tl.sum(p, axis=1)
        if DROPOUT:
            p = tl.where(is_kept(seed, bh, first_m, first_n, L, S, keep, TILE_M, TILE_N), p, 0.0)
        v_tile = load_rows(v, b, h // GROUP, first_n, S, DV, v_b, v_h, v_n, v_d, not BOUNDS, BOXES, TILE_N, TILE_V)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION, out_dtype=acc.dtype)
        highest = top
    return acc, total, highest


@triton.jit(do_not_specialize=["keep"])
def attention_kernel(
    q_ptr, k, v, mask_ptr, seed_ptr, out_ptr, lse_ptr,
    H, L, S, GROUP, scale: tl.float64, keep, unkeep: tl.float64,  # type: ignore[valid-type]
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mask_b, mask_h, mask_m, mask_n, out_b, out_h, out_m, out_d,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, BOXES: tl.constexpr, PRECISION: tl.constexpr,
    LATER: tl.constexpr, OF_KEYS: tl.constexpr, EMPTY_IS_NAN: tl.constexpr, ACC: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M queries of one head. GROUP heads share a head of k and v. k and v are pointers, or descriptors
    with BOXES. lse_ptr: each query's log-sum-exp of `scores` as they are, for the backward, or None. A query
    that may attend to nothing gives 0 or, with EMPTY_IS_NAN, NaN as softmax does."""
    # In the interpreter the scales are Python's numbers, which a cast would take for float32.
    zero = tl.full((), 0.0, tl.float64)
    scale, unkeep = (scale + zero).to(ACC), (unkeep + zero).to(ACC)
    tiles = tl.cdiv(L, TILE_M)
    pid_m, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if CAUSAL:
        pid_m = tiles - 1 - pid_m  # the last queries attend to the most keys, and so come first
    b, h, first_m = bh // H, bh % H, pid_m * TILE_M
    q = load_rows(q_ptr, b, h, first_m, L, D, q_b, q_h, q_m, q_d, False, 0, TILE_M, TILE_D)
    if mask_ptr is not None:
        mask_ptr += tl.cast(b, tl.int64) * mask_b + tl.cast(h, tl.int64) * mask_h
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    end, full = S, S // TILE_N * TILE_N
    if CAUSAL:
        end = min(S, first_m + TILE_M)
        full = min(full, (first_m + 1) // TILE_N * TILE_N)
    acc = tl.zeros((TILE_M, TILE_V), ACC)
    total = tl.zeros((TILE_M,), ACC)
    highest = tl.full((TILE_M,), float("-inf"), ACC)
    # First the blocks of keys that all of these queries may attend to, then the rest, where bounds and diagonal are looked at.
    acc, total, highest = forward_blocks(
        acc, total, highest, q, k, v, mask_ptr, seed, b, h, bh, first_m, 0, full, L, S, D, DV, GROUP, scale, keep,
        k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mask_m, mask_n, False, CAUSAL, seed_ptr is not None, BOXES, PRECISION,
        LATER, OF_KEYS, TILE_M, TILE_N, TILE_D, TILE_V)  # fmt: skip
    acc, total, highest = forward_blocks(
        acc, total, highest, q, k, v, mask_ptr, seed, b, h, bh, first_m, full, end, L, S, D, DV, GROUP, scale, keep,
        k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mask_m, mask_n, True, CAUSAL, seed_ptr is not None, BOXES, PRECISION,
        LATER, OF_KEYS, TILE_M, TILE_N, TILE_D, TILE_V)  # fmt: skip
    if EMPTY_IS_NAN:
        total = tl.where(total == 0, float("nan"), total)
    if lse_ptr is not None:
        # +inf for a query that may attend to nothing makes all its weights 0 in the backward.
        m = first_m + tl.arange(0, TILE_M)
        lse = tl.where(total == 0, float("inf"), highest + tl.log2(total) / unit(scale, LATER))
        tl.store(lse_ptr + tl.cast(bh, tl.int64) * L + m, lse, mask=m < L)
    acc = acc * (unkeep / tl.where(total == 0, 1.0, total))[:, None]
    store_rows(out_ptr, acc, b, h, first_m, L, DV, out_b, out_h, out_m, out_d, TILE_M, TILE_V)
