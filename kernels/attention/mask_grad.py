"""The gradient of a mask of numbers: ds of gradients.py, summed wherever one number of the mask is added to several scores.

It is computed again by a kernel of its own, since dq's and dk's programs hold ds of one head, and a mask is as a rule the same
for many: each element is summed by one program, or by several that share the sum, in a fixed order and without atomics.
"""

import triton
import triton.language as tl

from .parts import is_kept, of_weights, products, scores, unit, weights


@triton.jit(do_not_specialize=["keep", "SHARES"])
def attention_mask_grad_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, dw_ptr, dy_ptr, lse_ptr, delta_ptr, norm_ptr, out_ptr,
    H, L, S, GROUP, scale: tl.float64, keep, unkeep: tl.float64, part: tl.float64,  # type: ignore[valid-type]
    OWN_H, ROWS, COLUMNS, HEADS, STEPS, SHARES, SHARE, SIZE,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mask_b, mask_h, mask_m, mask_n, dw_b, dw_h, dw_m, dw_n,
    dy_b, dy_h, dy_m, dy_d, out_b, out_h, out_m, out_n,
    D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr, OF_KEYS: tl.constexpr, SUM_M: tl.constexpr,
    SUM_N: tl.constexpr, ACC: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: SHARE of the STEPS that a tile of the gradient is the sum of, with SHARES programs for each tile, which write
    partial sums of SIZE elements each. A step is TILE_M queries by TILE_N keys of one head.

    The gradient has OWN_H heads, and ROWS by COLUMNS tiles of each. With SUM_M it has one row, the sum over all queries; with
    SUM_N one column, the sum over all keys. HEADS: how many heads of a sequence each of its own is the sum of.
    """
    # In the interpreter these are Python's numbers, which a cast would take for float32.
    zero = tl.full((), 0.0, tl.float64)
    scale, unkeep, part = (scale + zero).to(ACC), (unkeep + zero).to(ACC), (part + zero).to(ACC)
    share, tile = tl.program_id(0) % SHARES, tl.program_id(0) // SHARES
    column, row, own = tile % COLUMNS, tile // COLUMNS % ROWS, tile // COLUMNS // ROWS
    own_b, own_h = own // OWN_H, own % OWN_H
    tiles_m = tl.cdiv(L, TILE_M) if SUM_M else 1
    tiles_n = tl.cdiv(S, TILE_N) if SUM_N else 1
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    i, j = tl.arange(0, TILE_M), tl.arange(0, TILE_N)
    total = tl.zeros((TILE_M, TILE_N), ACC)
    for step in range(share * SHARE, tl.minimum(share * SHARE + SHARE, STEPS)):
        first_n, first_m = (column + step % tiles_n) * TILE_N, (row + step // tiles_n % tiles_m) * TILE_M
        head = step // tiles_n // tiles_m
        b, h = own_b + head // HEADS, own_h + head % HEADS
        at = tl.cast(b * H + h, tl.int64) * L + first_m + i
        lse = tl.load(
            lse_ptr + at, mask=first_m + i < L, other=float("inf")
        )  # so that queries outside have weights of 0
        delta = tl.load(delta_ptr + at, mask=first_m + i < L, other=0.0)
        s = products(
            q_ptr, k_ptr, b, h, h // GROUP, first_m, first_n, L, S, q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d,
            D, PRECISION, ACC, TILE_M, TILE_N, TILE_K)  # fmt: skip
        dp = products(
            dy_ptr, v_ptr, b, h, h // GROUP, first_m, first_n, L, S, dy_b, dy_h, dy_m, dy_d, v_b, v_h, v_n, v_d,
            DV, PRECISION, ACC, TILE_M, TILE_N, TILE_K)  # fmt: skip
        mask = mask_ptr + (tl.cast(b, tl.int64) * mask_b + tl.cast(h, tl.int64) * mask_h)
        s = scores(s, mask, first_m, first_n, L, S, mask_m, mask_n, scale,
                   True, False, False, False, OF_KEYS, TILE_M, TILE_N)  # fmt: skip
        p = weights(s, lse[:, None], unit(scale, False), False)
        if norm_ptr is not None:
            p *= tl.load(norm_ptr + at, mask=first_m + i < L, other=1.0)[:, None]
        if dw_ptr is not None:
            dw = dw_ptr + (tl.cast(b, tl.int64) * dw_b + tl.cast(h, tl.int64) * dw_h)
            dp += part * of_weights(dw, first_m, first_n, L, S, dw_m, dw_n, False, TILE_M, TILE_N).to(ACC)
        if seed_ptr is not None:
            kept = is_kept(seed, b * H + h, first_m, first_n, L, S, keep, TILE_M, TILE_N)
            dp = tl.where(kept, dp * unkeep, 0.0)
        ds = p * (dp - delta[:, None])
        if SUM_N:
            ds = tl.where(first_n + j[None, :] < S, ds, 0.0)
        total += ds
    out_ptr += tl.cast(share, tl.int64) * SIZE + tl.cast(own_b, tl.int64) * out_b + tl.cast(own_h, tl.int64) * out_h
    m, n = row * TILE_M + i, column * TILE_N + j
    if SUM_M and SUM_N:
        tl.store(out_ptr, tl.sum(tl.sum(total, axis=1), axis=0).to(out_ptr.dtype.element_ty))
    elif SUM_M:
        tl.store(out_ptr + n.to(tl.int64) * out_n, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=n < S)
    elif SUM_N:
        tl.store(out_ptr + m.to(tl.int64) * out_m, tl.sum(total, axis=1).to(out_ptr.dtype.element_ty), mask=m < L)
    else:
        at = out_ptr + (m.to(tl.int64)[:, None] * out_m + n.to(tl.int64)[None, :] * out_n)
        tl.store(at, total.to(out_ptr.dtype.element_ty), mask=(m < L)[:, None] & (n < S)[None, :])
