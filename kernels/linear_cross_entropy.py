"""Cross entropy of the logits x @ w.T + bias, which are never written.

In the forward the product's epilogue keeps, of each row of its tile, the maximum, the sum of exp(logit - maximum) and the logit
of the row's class; `_merge_kernel` makes the losses of them. In the backward the same product's epilogue writes the gradient of
the logits, and two more products make the gradients of x and w of it. Both take a chunk of rows at a time. So the logits are
computed twice, from the same numbers in the same precision, and what is rounded is their gradient alone.

Sums run in float32, or in float64 for float64, and in a fixed order, without atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .matmul import tiles as picks
from .matmul import turned
from .matmul.matmul import _descriptor, _fits_a_descriptor, _place, _sum_products, _sum_tma_products, matmul
from .reduce import activation_grad, divide, sum_losses, sum_partials
from .runtime import launch, tiles
from .runtime.tiles import Tile, cdiv

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = {torch.float32: torch.finfo(torch.float32).min, torch.float64: torch.finfo(torch.float64).min}
"""Where a maximum starts: with -inf, (-inf) - (-inf) could arise."""

_MERGE = Tile(32, 64, warps=4)
"""m rows, n of the maxima and sums that their tiles left."""

_PARTIALS_BYTES = 2**27
_CHUNK_BYTES = 2**29
_CHUNK_ROWS = 1024
"""What the tiles of logits leave in the forward, and the gradient of the logits, are computed for so many bytes at a time, but
never for fewer rows, whose products would be limited by reading w and by adding up its gradient."""


@triton.jit
def _finish(
    x, bias_ptr, target_ptr, weight_ptr, partials_ptr, hit_ptr, statistics_ptr, dy_ptr, total_ptr, out_ptr,
    first_m, first_n, M, N, SIZE, SLOTS, target_m, weight_n, dy_m, out_m, ignore_index,
    ACC: tl.constexpr, LOWEST: tl.constexpr, GRADIENT: tl.constexpr, HALVES: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of one tile of logits. Its columns are halved HALVES times, and the parts are computed one after the other, so
    that they have enough registers."""
    if HALVES:
        HALF: tl.constexpr = TILE_N // 2
        left, right = tl.split(tl.permute(tl.reshape(x, (TILE_M, 2, HALF)), (0, 2, 1)))
        _finish(left, bias_ptr, target_ptr, weight_ptr, partials_ptr, hit_ptr, statistics_ptr, dy_ptr, total_ptr, out_ptr,
                first_m, first_n, M, N, SIZE, SLOTS, target_m, weight_n, dy_m, out_m, ignore_index,
                ACC, LOWEST, GRADIENT, HALVES - 1, TILE_M, HALF)  # fmt: skip
        _finish(right, bias_ptr, target_ptr, weight_ptr, partials_ptr, hit_ptr, statistics_ptr, dy_ptr, total_ptr, out_ptr,
                first_m, first_n + HALF, M, N, SIZE, SLOTS, target_m, weight_n, dy_m, out_m, ignore_index,
                ACC, LOWEST, GRADIENT, HALVES - 1, TILE_M, HALF)  # fmt: skip
    else:
        m = first_m + tl.arange(0, TILE_M)
        n = first_n + tl.arange(0, TILE_N)
        m_inside = m < M
        n_inside = n < N
        if bias_ptr is not None:
            x += tl.load(bias_ptr + n, mask=n_inside, other=0.0).to(ACC)[None, :]
        target = tl.load(target_ptr + m * target_m, mask=m_inside, other=-1).to(tl.int64)
        is_target = n[None, :] == target[:, None]
        if GRADIENT:
            top = tl.load(statistics_ptr + m, mask=m_inside, other=0.0)
            log_total = tl.load(statistics_ptr + SIZE + m, mask=m_inside, other=0.0)
            exists = (target >= 0) & (target < N)
            dy = tl.load(dy_ptr + m * dy_m, mask=m_inside, other=0.0).to(ACC)
            if total_ptr is not None:
                dy = divide(dy, tl.zeros((TILE_M,), ACC) + tl.load(total_ptr).to(ACC))
            if weight_ptr is not None:
                dy *= tl.load(weight_ptr + target * weight_n, mask=m_inside & exists, other=0.0).to(ACC)
            # Selected, not multiplied by 0: if every row is ignored, dy was divided by 0.
            dy = tl.where(target == ignore_index, 0.0, tl.where(exists, dy, float("nan")))[:, None]
            dx = dy * tl.exp2((x - top[:, None]) * _LOG2E - log_total[:, None]) - tl.where(is_target, dy, 0.0)
            inside = m_inside[:, None] & n_inside[None, :]
            tl.store(out_ptr + (m[:, None] * out_m + n[None, :]), dx.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            mine = m_inside & (target >= first_n) & (target < first_n + TILE_N) & (target < N)
            tl.store(hit_ptr + m, tl.sum(tl.where(is_target, x, 0.0), axis=1), mask=mine)
            x = tl.where(n_inside[None, :], x, float("-inf"))
            top = tl.max(x, axis=1)
            top = tl.where(top > LOWEST, top, LOWEST)
            total = tl.sum(tl.exp2((x - top[:, None]) * _LOG2E), axis=1)
            place = tl.cast(first_n // TILE_N, tl.int64) * M + m
            counted = m_inside & (first_n < N)  # a half may lie beyond the last class
            tl.store(partials_ptr + place, top, mask=counted)
            tl.store(partials_ptr + tl.cast(SLOTS, tl.int64) * M + place, total, mask=counted)


@triton.jit(do_not_specialize=["ignore_index"])
def _linear_cross_entropy_kernel(
    a_ptr, b_ptr, bias_ptr, target_ptr, weight_ptr, partials_ptr, hit_ptr, statistics_ptr, dy_ptr, total_ptr, out_ptr,
    M, N, K, SIZE, SLOTS, a_m, a_k, b_k, b_n, target_m, weight_n, dy_m, out_m, ignore_index: tl.int64,  # type: ignore[valid-type]
    ACC: tl.constexpr, LOWEST: tl.constexpr, GRADIENT: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, K_FITS: tl.constexpr, TURNED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the logits a @ b + bias. GRADIENT: it writes their gradient; otherwise, the maximum and the sum of
    each row to partials, and the logits of those classes that are the row's."""
    pid_m, pid_n = _place(tl.program_id(0), tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N), 8)
    if WIDE:
        pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)
    m = pid_m * TILE_M + tl.arange(0, TILE_M)
    n = pid_n * TILE_N + tl.arange(0, TILE_N)
    x, _ = _sum_products(a_ptr, b_ptr, m, n, pid_n * TILE_N, M, N, 0, K, a_m, a_k, b_k, b_n,
                         False, ACC, PRECISION, WIDE, K_FITS, TURNED, TILE_M, TILE_N, TILE_K)  # fmt: skip
    _finish(x, bias_ptr, target_ptr, weight_ptr, partials_ptr, hit_ptr, statistics_ptr, dy_ptr, total_ptr, out_ptr,
            pid_m * TILE_M, pid_n * TILE_N, M, N, SIZE, SLOTS, target_m, weight_n, dy_m, out_m, ignore_index,
            ACC, LOWEST, GRADIENT, HALVES, TILE_M, TILE_N)  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def _linear_cross_entropy_tma_kernel(
    dy_ptr, a, b, bias_ptr, target_ptr, weight_ptr, partials_ptr, hit_ptr, statistics_ptr, total_ptr, out_ptr,
    M, N, K, SIZE, SLOTS, target_m, weight_n, dy_m, out_m, ignore_index: tl.int64,  # type: ignore[valid-type]
    LOWEST: tl.constexpr, GRADIENT: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """As _linear_cross_entropy_kernel, for descriptors of a (M, K), or of (K, M) with A_TRANSPOSED; likewise b."""
    pid_m, pid_n = _place(tl.program_id(0), tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N), 8)
    x, _ = _sum_tma_products(a, b, pid_m * TILE_M, pid_n * TILE_N, 0, K, False, A_TRANSPOSED, B_TRANSPOSED, PRECISION,
                             TILE_M, TILE_N, TILE_K)  # fmt: skip
    if WIDE:
        pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)
    _finish(x, bias_ptr, target_ptr, weight_ptr, partials_ptr, hit_ptr, statistics_ptr, dy_ptr, total_ptr, out_ptr,
            pid_m * TILE_M, pid_n * TILE_N, M, N, SIZE, SLOTS, target_m, weight_n, dy_m, out_m, ignore_index,
            tl.float32, LOWEST, GRADIENT, HALVES, TILE_M, TILE_N)  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def _merge_kernel(
    partials_ptr, hit_ptr, target_ptr, weight_ptr, statistics_ptr, out_ptr, sums_ptr,
    M, N, SIZE, SLOTS, PROGRAMS, target_m, weight_n, ignore_index: tl.int64,  # type: ignore[valid-type]
    LOWEST: tl.constexpr, TILE_M: tl.constexpr, TILE_S: tl.constexpr,
):  # fmt: skip
    """One program: the losses of TILE_M rows, from what the tiles of logits left. Writes, each unless its pointer is None: the
    statistics (maximum, log2 of the sum), SIZE of each; the losses; its sums of losses and of weights, PROGRAMS of each."""
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    slot = tl.arange(0, TILE_S)
    inside = m < M
    size = tl.cast(SLOTS, tl.int64) * M
    top = tl.full((TILE_M,), LOWEST, partials_ptr.dtype.element_ty)
    total = tl.zeros((TILE_M,), partials_ptr.dtype.element_ty)
    for start in range(0, SLOTS, TILE_S):
        s = start + slot
        place = s.to(tl.int64)[:, None] * M + m[None, :]
        mask = (s < SLOTS)[:, None] & inside[None, :]
        tops = tl.load(partials_ptr + place, mask=mask, other=LOWEST)
        highest = tl.maximum(top, tl.max(tops, axis=0))
        totals = tl.load(partials_ptr + size + place, mask=mask, other=0.0)
        total *= tl.exp2((top - highest) * _LOG2E)
        total += tl.sum(totals * tl.exp2((tops - highest[None, :]) * _LOG2E), axis=0)
        top = highest
    log_total = tl.log2(total)
    if statistics_ptr is not None:
        tl.store(statistics_ptr + m, top, mask=inside)
        tl.store(statistics_ptr + SIZE + m, log_total, mask=inside)
    target = tl.load(target_ptr + m * target_m, mask=inside, other=0).to(tl.int64)
    used = target != ignore_index
    exists = (target >= 0) & (target < N)
    readable = inside & used & exists
    hit = tl.load(hit_ptr + m, mask=readable, other=0.0)
    weight = tl.full((TILE_M,), 1.0, total.dtype)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + target * weight_n, mask=readable, other=0.0).to(total.dtype)
    loss = tl.where(used, tl.where(exists, (log_total * _LN2 + (top - hit)) * weight, float("nan")), 0.0)
    if out_ptr is not None:
        tl.store(out_ptr + m, loss.to(out_ptr.dtype.element_ty), mask=inside)
    if sums_ptr is not None:
        tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.where(inside, loss, 0.0), axis=0))
        weights = tl.sum(tl.where(inside & used, weight, 0.0), axis=0)
        tl.store(sums_ptr + PROGRAMS + tl.program_id(0), weights)


def _product(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None, precision: str) -> picks.Product:
    """How the logits are computed. K isn't shared out, since an epilogue needs the whole sum."""
    wide = launch.wide(x, w, out)
    return picks.matmul(
        x.shape[0], w.shape[0], w.shape[1], x.dtype, precision, tiles.device(x.device),
        vectors=not wide and launch.vectors(x) and launch.vectors(w),
        descriptors=_fits_a_descriptor(x) and _fits_a_descriptor(w), wide=wide, column_sums=True,
        operand_sums=x.itemsize > 2,  # then no tile is so large that, in strict float32, the epilogue's registers spill
    )  # fmt: skip


def _halves(tile: Tile) -> int:
    """How often the columns of a tile are halved in the epilogue, which leaves 32 elements to a thread."""
    return max(0, (tile.m * tile.n // (32 * 32 * tile.warps)).bit_length() - 1)


def _launch_logits(
    plan: picks.Product, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor,
    weight: torch.Tensor | None, *, size: int, ignore_index: int, partials: Any = None, hit: Any = None,
    statistics: Any = None, dy: Any = None, total: Any = None, out: Any = None,
) -> None:  # fmt: skip
    (m, k), n = x.shape, w.shape[0]
    turn = turned.pays(w.stride(1), w.stride(0), w.dtype, plan.precision, tiles.device(w.device))
    tile, turn = turned.fit(plan.tile, turn and not plan.descriptors)
    halves = _halves(plan.tile)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    sizes = (m, n, k, size, 0 if partials is None else partials.shape[1])
    strides = (target.stride(0), 0 if weight is None else weight.stride(0), 0 if dy is None else dy.stride(0), n)
    meta = dict(
        LOWEST=_LOWEST[accumulate], GRADIENT=out is not None, HALVES=halves, PRECISION=plan.precision,
        WIDE=launch.wide(x, w, out), TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    programs = cdiv(m, tile.m) * cdiv(n, tile.n)
    some = partials if dy is None else dy
    if plan.descriptors:
        a, a_transposed = _descriptor(x, tile.m, tile.k)
        b, b_transposed = _descriptor(w.T, tile.k, tile.n)
        launch.launch(
            _linear_cross_entropy_tma_kernel, programs,
            some, a, b, bias, target, weight, partials, hit, statistics, total, out, *sizes, *strides, ignore_index,
            A_TRANSPOSED=a_transposed, B_TRANSPOSED=b_transposed, **meta,
        )  # fmt: skip
    else:
        launch.launch(
            _linear_cross_entropy_kernel, programs,
            x, w, bias, target, weight, partials, hit, statistics, some, total, out,
            *sizes, *x.stride(), w.stride(1), w.stride(0), *strides, ignore_index,
            ACC=tiles.triton_dtype(accumulate), K_FITS=k % tile.k == 0, TURNED=turn, **meta,
        )  # fmt: skip


def linear_cross_entropy(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    out: torch.Tensor,
    total: torch.Tensor | None,
    statistics: torch.Tensor | None,
    *,
    ignore_index: int,
    reduction: str,
    precision: str,
) -> None:
    """Cross entropy of x @ w.T + bias and a target of classes, into `out`; for the backward, into `total` and `statistics`.

    A target that equals `ignore_index` counts nothing. Where torch stops the process because a target is no class, nothing is
    read out of bounds and the loss is NaN.

    Shape: x (M, K) and w (N, K), any strides; bias (N,); target (M,); weight (N,); out (M,), contiguous, or (); total (), the sum
        of the targets' weights; statistics (2, M), contiguous.
    Dtype: x, w and bias floating, alike; weight and out floating; target int64 or uint8; total and statistics float32, or
        float64 if x is.
    """
    m, n, accumulate = x.shape[0], w.shape[0], torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.contiguous()
    hit = launch.empty((m,), dtype=accumulate, device=x.device)
    # One plan for all chunks: 256 divides the rows of each, unless a test forces it, so they begin as aligned as x.
    plan = _product(x, w, None, precision)
    slots = cdiv(n, plan.tile.n >> _halves(plan.tile))
    rows = _chunk(m, 2 * slots * accumulate.itemsize, _PARTIALS_BYTES)
    chunks, each, sums = range(0, m, max(rows, 1)), cdiv(rows, _MERGE.m), None
    if reduction != "none":
        sums = launch.empty((2, len(chunks) * each), dtype=accumulate, device=x.device)
    # One allocation, since a call that is recorded keeps all of its memory to the end.
    room = launch.empty((2 * slots * rows,), dtype=accumulate, device=x.device)
    for i, start in enumerate(chunks):
        x_, target_, hit_, statistics_, out_, sums_ = x, target, hit, statistics, out, sums
        if len(chunks) > 1:
            x_, target_, hit_ = (t[start : start + rows] for t in (x, target, hit))
            statistics_ = None if statistics is None else statistics.view(2 * m)[start:]
            out_, sums_ = (out[start:], None) if sums is None else (None, sums.view(sums.numel())[i * each :])
        partials = room[: 2 * slots * len(x_)].view(2, slots, len(x_))
        _launch_logits(
            plan, x_, w, bias, target_, weight, size=m, ignore_index=ignore_index, partials=partials, hit=hit_
        )
        # The last chunk has as many programs as the others, so that there is a sum in every place.
        launch.launch(
            _merge_kernel, each,
            partials, hit_, target_, weight, statistics_, out_ if sums is None else None, sums_,
            len(x_), n, m, slots, len(chunks) * each,
            target.stride(0), 0 if weight is None else weight.stride(0), ignore_index,
            LOWEST=_LOWEST[accumulate], TILE_M=_MERGE.m, TILE_S=_MERGE.n, num_warps=_MERGE.warps,
        )  # fmt: skip
    if sums is not None:
        sum_losses(out, sums, 1, total=total, by_weight=reduction == "mean")


def _chunk(m: int, row_bytes: int, most: int) -> int:
    """How many of m rows are computed at a time, so that they take no more than so many bytes."""
    forced = tiles.ask("linear_cross_entropy_rows", lambda: ())
    return forced.m if forced is not None else min(m, max(_CHUNK_ROWS, most // row_bytes // 256 * 256))


def linear_cross_entropy_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    total: torch.Tensor | None,
    statistics: torch.Tensor,
    dx: torch.Tensor | None,
    dw: torch.Tensor | None,
    db: torch.Tensor | None,
    *,
    ignore_index: int,
    reduction: str,
    precision: str,
) -> None:
    """The gradients of `linear_cross_entropy`, each unless it is None, for a chunk of rows at a time. dw and db of several chunks
    are added up in float32 (float64), in order.

    Shape: as there, with dy as its out; dx, dw and db contiguous. "mean" needs the forward's total.
    """
    (m, k), n = x.shape, w.shape[0]
    if m == 0:
        for gradient in (dx, dw, db):
            if gradient is not None:
                gradient.zero_()
        return
    accumulate = torch.promote_types(x.dtype, torch.float32)
    bias, statistics = None if bias is None else bias.contiguous(), statistics.contiguous()
    dy = dy.reshape(m) if reduction == "none" else dy.reshape(1).expand(m)
    rows = _chunk(m, n * x.element_size(), _CHUNK_BYTES)
    chunks = range(0, m, rows)
    dlogits = launch.empty((min(rows, m), n), dtype=x.dtype, device=x.device)
    sums, shares = dw, None
    if len(chunks) > 1 and dw is not None and dw.dtype != accumulate:
        sums = launch.empty((n, k), dtype=accumulate, device=x.device)
    if len(chunks) > 1 and db is not None:
        shares = launch.empty((len(chunks), n), dtype=accumulate, device=x.device)
    for i, start in enumerate(chunks):
        x_, dy_, target_, dx_ = x, dy, target, dx
        if len(chunks) > 1:
            x_, dy_, target_ = (t[start : start + rows] for t in (x, dy, target))
            dx_ = None if dx is None else dx[start : start + rows]
        given = dlogits[: len(x_)]
        _launch_logits(
            _product(x_, w, given, precision), x_, w, bias, target_, weight, size=m, ignore_index=ignore_index,
            statistics=statistics if start == 0 else statistics.view(2 * m)[start:],
            dy=dy_, total=total if reduction == "mean" else None, out=given,
        )  # fmt: skip
        if dx_ is not None:
            matmul(given, w, out=dx_, precision=precision)
        share = db if shares is None else shares[i]
        if sums is not None:
            matmul(given.T, x_, out=sums, add=sums if i else None, operand_sums=share, precision=precision)
        elif share is not None:
            activation_grad(given[None], None, None, None, share)
    if sums is not dw and sums is not None and dw is not None:
        sum_partials(sums[None], dw)
    if shares is not None and db is not None:
        sum_partials(shares, db)
