"""The backward kernels of attention. With weights p = exp(scores - lse), computed again, and delta = sum(out * dy):

    ds = p (dy v^T - delta);   dq = scale ds k;   dk = scale ds^T q;   dv = p^T dy

dq is summed by one kernel, dk and dv by another, each element by one program and in a fixed order, without atomics. Where the
weights are a result as well, their gradient dw is added to dy v^T, and the sum of the weights times dw to delta.

A row of weights adds up to 1, but for what the log-sum-exp was rounded by, and a row of ds to 0, but for what out and the
products were. Where a weight is nearly 1, the latter is much beside ds itself. So where float32 products are strict, and in
float64, the kernel of dq takes the sums of both rows as it computes them, divides by the first, subtracts the second times the
mean of the keys from dq / scale, and leaves both to the other kernels: see docs/decisions/0016.
"""

import triton
import triton.language as tl

from ..reduce import divide
from .parts import is_kept, load_rows, of_weights, products, scores, store_rows, unit, weights

_FEATURES = tl.constexpr(32)
"""Of strict products, the features that are multiplied at a time."""


@triton.jit
def _dq_blocks(
    dq, mean, total, excess, q, dy, lse, delta, k, v, mask_ptr, seed, dw_ptr, b, h, bh, first_m, begin, end,
    L, S, D, DV, GROUP, scale, keep, unkeep, part, q_b, q_h, q_m, q_d, dy_b, dy_h, dy_m, dy_d,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mask_m, mask_n, dw_m, dw_n,
    BOUNDS: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, BOXES: tl.constexpr, PRECISION: tl.constexpr,
    LATER: tl.constexpr, OF_KEYS: tl.constexpr, DQ: tl.constexpr, CENTRED: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, TILE_D: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """Take the keys from `begin` to `end` into dq / scale, with DQ, and with CENTRED into the sums of p and ds, and that of the
    keys times their weights, which dq alone needs. q and dy are tiles, or pointers with CENTRED."""
    factor = unit(scale, LATER)
    inside = (first_m + tl.arange(0, TILE_M) < L)[:, None]
    for first_n in range(begin, end, TILE_N):
        if CENTRED:
            s = products(
                q, k, b, h, h // GROUP, first_m, first_n, L, S, q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d,
                D, PRECISION, delta.dtype, TILE_M, TILE_N, min(TILE_D, _FEATURES))  # fmt: skip
            dp = products(
                dy, v, b, h, h // GROUP, first_m, first_n, L, S, dy_b, dy_h, dy_m, dy_d, v_b, v_h, v_n, v_d,
                DV, PRECISION, delta.dtype, TILE_M, TILE_N, min(TILE_V, _FEATURES))  # fmt: skip
            if DQ:
                k_tile = load_rows(k, b, h // GROUP, first_n, S, D, k_b, k_h, k_n, k_d, not BOUNDS, 0, TILE_N, TILE_D)
        else:
            k_tile = load_rows(k, b, h // GROUP, first_n, S, D, k_b, k_h, k_n, k_d, not BOUNDS, BOXES, TILE_N, TILE_D)
            v_tile = load_rows(v, b, h // GROUP, first_n, S, DV, v_b, v_h, v_n, v_d, not BOUNDS, BOXES, TILE_N, TILE_V)
            s = tl.dot(q, k_tile.T, input_precision=PRECISION, out_dtype=delta.dtype)
            dp = tl.dot(dy, v_tile.T, input_precision=PRECISION, out_dtype=delta.dtype)
        # Keys outside must be masked although they were loaded as 0: exp(0 - lse) may be inf, and inf * 0 is NaN.
        s = scores(s, mask_ptr, first_m, first_n, L, S, mask_m, mask_n, scale,
                   BOUNDS, CAUSAL, False, LATER, OF_KEYS, TILE_M, TILE_N)  # fmt: skip
        p = weights(s, lse[:, None], factor, LATER and not CENTRED and q.dtype.primitive_bitwidth == 16)
        if dw_ptr is not None:
            dp += part * of_weights(dw_ptr, first_m, first_n, L, S, dw_m, dw_n, False, TILE_M, TILE_N).to(dp.dtype)
        if DROPOUT:
            kept = is_kept(seed, bh, first_m, first_n, L, S, keep, TILE_M, TILE_N)
            dp = tl.where(kept, dp * unkeep, 0.0)
        ds = p * (dp - delta[:, None])
        if CENTRED:
            total += tl.sum(p, axis=1)
            excess += tl.sum(tl.where(inside, ds, 0.0), axis=1)  # see kernels/batch_norm/whole.py
        if DQ:
            dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION, out_dtype=dq.dtype)
            if CENTRED:  # excess is small: of what it is multiplied by, a few digits are enough
                rough: tl.constexpr = "tf32" if PRECISION == "tf32x3" else PRECISION
                mean = tl.dot(p, k_tile, mean, input_precision=rough, out_dtype=mean.dtype)
    return dq, mean, total, excess


@triton.jit(do_not_specialize=["keep"])
def attention_dq_kernel(
    q_ptr, k, v, mask_ptr, seed_ptr, dw_ptr, more_ptr, out_ptr, dy_ptr, lse_ptr, delta_ptr, norm_ptr, dq_ptr,
    H, L, S, GROUP,
    scale: tl.float64, keep, unkeep: tl.float64, part: tl.float64,  # type: ignore[valid-type]
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mask_b, mask_h, mask_m, mask_n, dw_b, dw_h, dw_m, dw_n,
    out_b, out_h, out_m, out_d, dy_b, dy_h, dy_m, dy_d, dq_b, dq_h, dq_m, dq_d,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, BOXES: tl.constexpr, PRECISION: tl.constexpr,
    LATER: tl.constexpr, OF_KEYS: tl.constexpr, ACC: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """One program: delta of TILE_M queries of one head, and dq, unless its pointer is None.
    dw_ptr: the gradient of the weights, of which `part` counts, or None; more_ptr: what it adds to delta.
    norm_ptr: where to write what the weights of a row have to be multiplied by to add up to 1; None: they are left as they are,
    and ds too."""
    # In the interpreter these are Python's numbers, which a cast would take for float32.
    zero = tl.full((), 0.0, tl.float64)
    scale, unkeep, part = (scale + zero).to(ACC), (unkeep + zero).to(ACC), (part + zero).to(ACC)
    tiles = tl.cdiv(L, TILE_M)
    pid_m, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if CAUSAL:
        pid_m = tiles - 1 - pid_m
    b, h, first_m = bh // H, bh % H, pid_m * TILE_M
    out = load_rows(out_ptr, b, h, first_m, L, DV, out_b, out_h, out_m, out_d, False, 0, TILE_M, TILE_V)
    dy = load_rows(dy_ptr, b, h, first_m, L, DV, dy_b, dy_h, dy_m, dy_d, False, 0, TILE_M, TILE_V)
    m = first_m + tl.arange(0, TILE_M)
    # tl.where stands between product and sum: see kernels/batch_norm/whole.py.
    inside = (m < L)[:, None] & (tl.arange(0, TILE_V) < DV)[None, :]
    delta = tl.sum(tl.where(inside, out.to(ACC) * dy.to(ACC), 0.0), axis=1)
    row = tl.cast(bh, tl.int64) * L + m
    if more_ptr is not None:
        delta += tl.load(more_ptr + row, mask=m < L, other=0.0)
    CENTRED: tl.constexpr = norm_ptr is not None
    DQ: tl.constexpr = dq_ptr is not None
    if not CENTRED:
        tl.store(delta_ptr + row, delta, mask=m < L)
    if DQ or CENTRED:
        if CENTRED:
            q, dy = q_ptr, dy_ptr
        else:
            q = load_rows(q_ptr, b, h, first_m, L, D, q_b, q_h, q_m, q_d, False, 0, TILE_M, TILE_D)
        lse = tl.load(lse_ptr + row, mask=m < L, other=float("inf"))
        if mask_ptr is not None:
            mask_ptr += tl.cast(b, tl.int64) * mask_b + tl.cast(h, tl.int64) * mask_h
        if dw_ptr is not None:
            dw_ptr += tl.cast(b, tl.int64) * dw_b + tl.cast(h, tl.int64) * dw_h
        seed = 0
        if seed_ptr is not None:
            seed = tl.load(seed_ptr)
        end, full = S, S // TILE_N * TILE_N
        if CAUSAL:
            end = min(S, first_m + TILE_M)
            full = min(full, (first_m + 1) // TILE_N * TILE_N)
        dq = tl.zeros((TILE_M, TILE_D), ACC)
        mean = tl.zeros((TILE_M, TILE_D), ACC)
        total = tl.zeros((TILE_M,), ACC)
        excess = tl.zeros((TILE_M,), ACC)
        dq, mean, total, excess = _dq_blocks(
            dq, mean, total, excess, q, dy, lse, delta, k, v, mask_ptr, seed, dw_ptr, b, h, bh, first_m, 0, full, L, S, D,
            DV, GROUP, scale, keep, unkeep, part, q_b, q_h, q_m, q_d, dy_b, dy_h, dy_m, dy_d,
            k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mask_m, mask_n, dw_m, dw_n,
            False, CAUSAL, seed_ptr is not None, BOXES, PRECISION, LATER, OF_KEYS, DQ, CENTRED,
            TILE_M, TILE_N, TILE_D, TILE_V)  # fmt: skip
        dq, mean, total, excess = _dq_blocks(
            dq, mean, total, excess, q, dy, lse, delta, k, v, mask_ptr, seed, dw_ptr, b, h, bh, first_m, full, end, L, S, D,
            DV, GROUP, scale, keep, unkeep, part, q_b, q_h, q_m, q_d, dy_b, dy_h, dy_m, dy_d,
            k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mask_m, mask_n, dw_m, dw_n,
            True, CAUSAL, seed_ptr is not None, BOXES, PRECISION, LATER, OF_KEYS, DQ, CENTRED,
            TILE_M, TILE_N, TILE_D, TILE_V)  # fmt: skip
        if CENTRED:
            norm = divide(tl.full((TILE_M,), 1.0, ACC), tl.where(total == 0, 1.0, total))
            excess *= norm
            tl.store(norm_ptr + row, norm, mask=m < L)
            tl.store(delta_ptr + row, delta + excess, mask=m < L)
            dq = (dq - excess[:, None] * mean) * norm[:, None]
        if DQ:
            store_rows(dq_ptr, dq * scale, b, h, first_m, L, D, dq_b, dq_h, dq_m, dq_d, TILE_M, TILE_D)


@triton.jit
def _dkdv_blocks(
    dk, dv, k_tile, v_tile, q, dy, lse_ptr, delta_ptr, norm_ptr, mask_ptr, seed, dw_ptr, b, h, bh, first_n, begin, L, S, D, DV,
    scale, keep, unkeep, part, q_b, q_h, q_m, q_d, dy_b, dy_h, dy_m, dy_d, mask_m, mask_n, dw_m, dw_n,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, BOXES: tl.constexpr, PRECISION: tl.constexpr,
    LATER: tl.constexpr, OF_KEYS: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
):  # fmt: skip
    factor = unit(scale, LATER)
    for first_m in range(begin, L, TILE_M):
        m = first_m + tl.arange(0, TILE_M)
        q_tile = load_rows(q, b, h, first_m, L, D, q_b, q_h, q_m, q_d, False, BOXES, TILE_M, TILE_D)
        dy_tile = load_rows(dy, b, h, first_m, L, DV, dy_b, dy_h, dy_m, dy_d, False, BOXES, TILE_M, TILE_V)
        row = tl.cast(bh, tl.int64) * L + m
        lse = tl.load(lse_ptr + row, mask=m < L, other=float("inf"))  # so that queries outside have weights of 0
        delta = tl.load(delta_ptr + row, mask=m < L, other=0.0)
        s = tl.dot(k_tile, q_tile.T, input_precision=PRECISION, out_dtype=dk.dtype)
        dp = tl.dot(v_tile, dy_tile.T, input_precision=PRECISION, out_dtype=dk.dtype)
        s = scores(s, mask_ptr, first_m, first_n, L, S, mask_m, mask_n, scale,
                   CAUSAL, CAUSAL, True, LATER, OF_KEYS, TILE_M, TILE_N)  # fmt: skip
        p = weights(s, lse[None, :], factor, LATER and k_tile.dtype.primitive_bitwidth == 16)
        if norm_ptr is not None:
            p *= tl.load(norm_ptr + row, mask=m < L, other=1.0)[None, :]
        dropped = p
        if dw_ptr is not None:
            dp += part * of_weights(dw_ptr, first_m, first_n, L, S, dw_m, dw_n, True, TILE_M, TILE_N).to(dp.dtype)
        if DROPOUT:
            kept = is_kept(seed, bh, first_m, first_n, L, S, keep, TILE_M, TILE_N).T
            dropped = tl.where(kept, p * unkeep, 0.0)
            dp = tl.where(kept, dp * unkeep, 0.0)
        dv = tl.dot(dropped.to(dy_tile.dtype), dy_tile, dv, input_precision=PRECISION, out_dtype=dv.dtype)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION, out_dtype=dk.dtype)
    return dk, dv


@triton.jit(do_not_specialize=["keep"])
def attention_dkdv_kernel(
    k_ptr, v_ptr, q, mask_ptr, seed_ptr, dw_ptr, dy, lse_ptr, delta_ptr, norm_ptr, dk_ptr, dv_ptr, H, L, S, GROUP,
    scale: tl.float64, keep, unkeep: tl.float64, part: tl.float64,  # type: ignore[valid-type]
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mask_b, mask_h, mask_m, mask_n, dw_b, dw_h, dw_m, dw_n,
    dy_b, dy_h, dy_m, dy_d, dk_b, dk_h, dk_n, dk_d, dv_b, dv_h, dv_n, dv_d,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, BOXES: tl.constexpr, PRECISION: tl.constexpr,
    LATER: tl.constexpr, OF_KEYS: tl.constexpr, ACC: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of TILE_N keys of one head of k and v, each unless its pointer is None, over the queries of all the
    heads that share it, one head after the other. q and dy are pointers, or descriptors with BOXES."""
    # In the interpreter these are Python's numbers, which a cast would take for float32.
    zero = tl.full((), 0.0, tl.float64)
    scale, unkeep, part = (scale + zero).to(ACC), (unkeep + zero).to(ACC), (part + zero).to(ACC)
    tiles = tl.cdiv(S, TILE_N)
    first_n, bh_k = tl.program_id(0) % tiles * TILE_N, tl.program_id(0) // tiles
    b, h_k = bh_k // (H // GROUP), bh_k % (H // GROUP)
    k_tile = load_rows(k_ptr, b, h_k, first_n, S, D, k_b, k_h, k_n, k_d, False, 0, TILE_N, TILE_D)
    v_tile = load_rows(v_ptr, b, h_k, first_n, S, DV, v_b, v_h, v_n, v_d, False, 0, TILE_N, TILE_V)
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    begin = 0
    if CAUSAL:
        begin = first_n // TILE_M * TILE_M
    dk = tl.zeros((TILE_N, TILE_D), ACC)
    dv = tl.zeros((TILE_N, TILE_V), ACC)
    for g in range(0, GROUP):
        h = h_k * GROUP + g
        mask = mask_ptr
        if mask_ptr is not None:
            mask = mask_ptr + (tl.cast(b, tl.int64) * mask_b + tl.cast(h, tl.int64) * mask_h)
        dw = dw_ptr
        if dw_ptr is not None:
            dw = dw_ptr + (tl.cast(b, tl.int64) * dw_b + tl.cast(h, tl.int64) * dw_h)
        # One loop looks at the diagonal all along. A second loop, for the blocks without it, would need more registers than
        # there are. Keys outside give rows of dk and dv that nobody stores.
        dk, dv = _dkdv_blocks(
            dk, dv, k_tile, v_tile, q, dy, lse_ptr, delta_ptr, norm_ptr, mask, seed, dw, b, h, b * H + h, first_n, begin, L, S,
            D, DV, scale, keep, unkeep, part, q_b, q_h, q_m, q_d, dy_b, dy_h, dy_m, dy_d, mask_m, mask_n, dw_m, dw_n,
            CAUSAL, seed_ptr is not None, BOXES, PRECISION, LATER, OF_KEYS, TILE_M, TILE_N, TILE_D, TILE_V)  # fmt: skip
    if dk_ptr is not None:
        store_rows(dk_ptr, dk * scale, b, h_k, first_n, S, D, dk_b, dk_h, dk_n, dk_d, TILE_N, TILE_D)
    if dv_ptr is not None:
        store_rows(dv_ptr, dv, b, h_k, first_n, S, DV, dv_b, dv_h, dv_n, dv_d, TILE_N, TILE_V)


@triton.jit(do_not_specialize=["keep"])
def dropout_factors_kernel(
    seed_ptr, out_ptr, L, S, keep, unkeep: tl.float64, TILE_M: tl.constexpr, TILE_N: tl.constexpr  # type: ignore[valid-type]
):  # fmt: skip
    """One program: what dropout multiplies TILE_M x TILE_N weights of one head by."""
    tiles_m, tiles_n = tl.cdiv(L, TILE_M), tl.cdiv(S, TILE_N)
    pid, bh = tl.program_id(0) % (tiles_m * tiles_n), tl.program_id(0) // (tiles_m * tiles_n)
    first_m, first_n = pid // tiles_n * TILE_M, pid % tiles_n * TILE_N
    kept = is_kept(tl.load(seed_ptr), bh, first_m, first_n, L, S, keep, TILE_M, TILE_N)
    unkeep = unkeep + tl.full((), 0.0, tl.float64)
    m, n = first_m + tl.arange(0, TILE_M), first_n + tl.arange(0, TILE_N)
    at = out_ptr + (tl.cast(bh, tl.int64) * L + m)[:, None] * S + n[None, :]
    factor = tl.where(kept, unkeep, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(at, factor, mask=(m < L)[:, None] & (n < S)[None, :])
