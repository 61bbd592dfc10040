"""The forward of attention where few queries meet many keys, as in decoding: the keys are shared out among programs, so that all
multiprocessors read them, and what the shares found is put together.

Heads that share a head of k and v stand one after the other in the rows of one tile of queries, so that k and v are read once.
"""

import triton
import triton.language as tl

from .forward import forward_blocks
from .parts import unit


@triton.jit
def _offsets(row, L, x_h, x_m):
    """Where queries of a group of heads lie, of which `row` counts those of the first head first."""
    return (row // L).to(tl.int64) * x_h + (row % L).to(tl.int64) * x_m


@triton.jit(do_not_specialize=["SHARES"])
def attention_shares_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, lse_ptr,
    H, L, S, GROUP, SHARES, SHARE, scale: tl.float64,  # type: ignore[valid-type]
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mask_b, mask_h, mask_m, mask_n,
    out_s, out_b, out_h, out_m, out_d, lse_s,
    D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr, LATER: tl.constexpr, OF_KEYS: tl.constexpr,
    EMPTY_IS_NAN: tl.constexpr, ACC: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M queries of the GROUP heads that share a head of k and v, and SHARE keys; the result as if there were no
    other keys. lse_ptr: each query's log-sum-exp of `scores` as they are, or None; +inf for a query
    that may attend to none of the keys."""
    # In the interpreter the scale is a Python number, which a cast would take for float32.
    scale = (scale + tl.full((), 0.0, tl.float64)).to(ACC)
    tiles = tl.cdiv(GROUP * L, TILE_M)
    pid = tl.program_id(0)
    pid_m, share, bh_k = pid % tiles, pid // tiles % SHARES, pid // tiles // SHARES
    b, h = bh_k // (H // GROUP), bh_k % (H // GROUP) * GROUP
    row, c = pid_m * TILE_M + tl.arange(0, TILE_M), tl.arange(0, TILE_D)
    inside = row < GROUP * L
    q_ptr += tl.cast(b, tl.int64) * q_b + tl.cast(h, tl.int64) * q_h
    at = q_ptr + (_offsets(row, L, q_h, q_m)[:, None] + c[None, :] * q_d)
    q = tl.load(at, mask=inside[:, None] & (c < D)[None, :], other=0.0)
    mask = mask_ptr
    if mask_ptr is not None:
        mask = mask_ptr + (tl.cast(b, tl.int64) * mask_b + tl.cast(h, tl.int64) * mask_h)
        if not OF_KEYS:  # rows out of range read the first row's mask
            mask = mask + tl.where(inside, _offsets(row, L, mask_h, mask_m), 0)[:, None]
    begin = share * SHARE
    end = min(S, begin + SHARE)
    full = begin + max(end - begin, 0) // TILE_N * TILE_N
    acc = tl.zeros((TILE_M, TILE_V), ACC)
    total = tl.zeros((TILE_M,), ACC)
    highest = tl.full((TILE_M,), float("-inf"), ACC)
    acc, total, highest = forward_blocks(
        acc, total, highest, q, k_ptr, v_ptr, mask, 0, b, h, 0, 0, begin, full, L, S, D, DV, GROUP, scale, 0,
        k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mask_m, mask_n, False, False, False, 0, PRECISION,
        LATER, True, TILE_M, TILE_N, TILE_D, TILE_V)  # fmt: skip
    acc, total, highest = forward_blocks(
        acc, total, highest, q, k_ptr, v_ptr, mask, 0, b, h, 0, 0, full, end, L, S, D, DV, GROUP, scale, 0,
        k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mask_m, mask_n, True, False, False, 0, PRECISION,
        LATER, True, TILE_M, TILE_N, TILE_D, TILE_V)  # fmt: skip
    if EMPTY_IS_NAN:
        total = tl.where(total == 0, float("nan"), total)
    if lse_ptr is not None:
        lse = tl.where(total == 0, float("inf"), highest + tl.log2(total) / unit(scale, LATER))
        at = lse_ptr + (tl.cast(share, tl.int64) * lse_s + tl.cast(b * H + h, tl.int64) * L)
        tl.store(at + row, lse, mask=inside)
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    out_ptr += tl.cast(share, tl.int64) * out_s + tl.cast(b, tl.int64) * out_b + tl.cast(h, tl.int64) * out_h
    c = tl.arange(0, TILE_V)
    at = out_ptr + (_offsets(row, L, out_h, out_m)[:, None] + c[None, :] * out_d)
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (c < DV)[None, :])


@triton.jit(do_not_specialize=["SHARES"])
def attention_merge_kernel(
    found_ptr, found_lse_ptr, out_ptr, lse_ptr, H, L, ROWS, SHARES, scale: tl.float64,  # type: ignore[valid-type]
    out_b, out_h, out_m, out_d, LATER: tl.constexpr,
    DV: tl.constexpr, EMPTY_IS_NAN: tl.constexpr, TILE_S: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """One program: one of ROWS queries, from what the shares (SHARES, ROWS, DV) found. TILE_S shares are loaded at a time, since
    each waits for memory; they are added in a fixed order."""
    # In the interpreter the scale is a Python number, which a cast would take for float32.
    factor = unit((scale + tl.full((), 0.0, tl.float64)).to(found_lse_ptr.dtype.element_ty), LATER)
    row = tl.cast(tl.program_id(0), tl.int64)
    s, c = tl.arange(0, TILE_S), tl.arange(0, TILE_V)
    highest = tl.full((TILE_S,), float("-inf"), found_lse_ptr.dtype.element_ty)
    for first in range(0, SHARES, TILE_S):
        at = (first + s).to(tl.int64) * ROWS + row
        lse = tl.load(found_lse_ptr + at, mask=first + s < SHARES, other=float("inf"))
        highest = tl.maximum(highest, tl.where(lse == float("inf"), float("-inf"), lse))
    top = tl.max(highest, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)  # no share had a key to attend to
    totals = tl.zeros((TILE_S,), found_lse_ptr.dtype.element_ty)
    parts = tl.zeros((TILE_S, TILE_V), found_ptr.dtype.element_ty)
    for first in range(0, SHARES, TILE_S):
        at = (first + s).to(tl.int64) * ROWS + row
        exists = first + s < SHARES
        lse = tl.load(found_lse_ptr + at, mask=exists, other=float("inf"))
        inside = exists[:, None] & (c < DV)[None, :]
        found = tl.load(found_ptr + (at[:, None] * DV + c[None, :]), mask=inside, other=0.0)
        weight = tl.where(lse == float("inf"), 0.0, tl.exp2((lse - base) * factor))
        parts += tl.where(inside, weight[:, None] * found, 0.0)
        totals += weight
    acc, total = tl.sum(parts, axis=0), tl.sum(totals, axis=0)
    if EMPTY_IS_NAN:
        total = tl.where(total == 0, float("nan"), total)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, tl.where(total == 0, float("inf"), base + tl.log2(total) / factor))
    acc = acc / tl.where(total == 0, 1.0, total)
    at = out_ptr + (row // (H * L) * out_b + row // L % H * out_h + row % L * out_m) + c * out_d
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=c < DV)
