"""Cross entropy, of class indices or of probabilities.

With p = softmax(x) along the classes, q the class that is asked for (or the probabilities), w the weight of each class:

    loss = sum_c w_c q_c (log sum exp x - x_c)        dx_c = dy (Q p_c - w_c q_c)        Q = sum_c w_c q_c

Every tensor of logits is seen as (OUTER, C, INNER), those of (N, C) or (N, C, 1) as (1, C, N); each of the OUTER * INNER
positions has one loss, and neighbouring programs take neighbouring stretches of INNER. The logits are read once by the forward
and once by the backward, and nothing of their size is stored but the gradient. In between, a position keeps two numbers, the
maximum of its logits and log2 of the sum of exp(x - maximum): one number, log sum exp, would cost digits as soon as the logits
have a common offset. With up to `RECOMPUTED` classes the backward finds both again.

Sums over positions are added up in a fixed order, without atomics: results are the same from run to run.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .reduce import divide, sum_losses
from .runtime import launch
from .runtime import tiles as _tiles
from .runtime.tiles import Device, Tile, cdiv

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)

# Where a running maximum starts. With the lowest finite number instead of -inf, (-inf) - (-inf) never arises while the
# sum is still empty, and a position whose logits are all -inf comes to log2(0) and so to NaN at the end, as torch's does.
_LOWEST = {torch.float32: torch.finfo(torch.float32).min, torch.float64: torch.finfo(torch.float64).min}

RECOMPUTED = 128
"""Up to this many classes, the backward has all logits of a position in registers and needs no statistics."""

# Forward: m positions; n lanes, each with a maximum and a sum of its own; k classes for each lane and turn, of which only
# the largest corrects the lane's sum. The lanes are merged once, at the end.
_LANES = 256
_FEW_ROWS = 1024  # fewer rows than fill the GPU: more of each in flight

# Backward: m positions, n classes.
_GRAD_ELEMENTS = 2048


def _power_of_two(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()


def _forward_tile(shape: Sequence[int], itemsize: int, classes_adjoin: bool, device: Device) -> Tile:
    """(m positions, n lanes, k classes a lane) for logits (OUTER, C, INNER).

    A thread holds whole lanes, so that no turn needs a barrier: one vector of classes, or some classes of a vector of
    positions.
    """
    tile = _picked_forward_tile(shape, itemsize, classes_adjoin, device)
    return _tiles.ask("cross_entropy", lambda: (tile,)) or tile


def _picked_forward_tile(shape: Sequence[int], itemsize: int, classes_adjoin: bool, device: Device) -> Tile:
    outer, classes, inner = shape
    vector = 16 // itemsize
    if classes_adjoin:
        lanes = min(_power_of_two(cdiv(classes, vector)), _LANES)
        if lanes == _LANES and outer * inner < 2 * device.multiprocessors:
            return Tile(1, _FEW_ROWS, vector, warps=16)
        return Tile((_LANES if lanes >= 32 else _LANES // 2) // lanes, lanes, vector, warps=4)
    warps = 4 if outer * cdiv(inner, 128 * vector) >= 4 * device.multiprocessors else 1
    m = min(32 * vector * warps, _power_of_two(inner))
    return Tile(m, 1, max(4, min(_power_of_two(classes), 128 * vector * warps // m)), warps=warps)


def _grad_tile(shape: Sequence[int], itemsize: int, classes_adjoin: bool, recomputed: bool) -> Tile:
    """(m positions, n classes) for logits (OUTER, C, INNER); all classes if the statistics are recomputed."""
    n = _power_of_two(shape[1])
    elements = _GRAD_ELEMENTS // 2 if itemsize == 8 else _GRAD_ELEMENTS
    if not recomputed:
        n = min(n, elements)
        if not classes_adjoin:
            n = elements // min(32 * (16 // itemsize), _power_of_two(shape[2]))
    picked = Tile(min(elements // n, 256), n, warps=4)
    tile = _tiles.ask("cross_entropy_grad", lambda: (picked,)) or picked
    return Tile(tile.m, _power_of_two(shape[1]), warps=tile.warps) if recomputed else tile


@triton.jit
def _probabilities(pointers, inside, smoothing, C, SMOOTHING: tl.constexpr, ACC: tl.constexpr):
    """The target's probabilities, smoothed if so asked."""
    q = tl.load(pointers, mask=inside, other=0.0).to(ACC)
    return q * (1 - smoothing) + smoothing / C if SMOOTHING else q


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_kernel(
    x_ptr, target_ptr, weight_ptr, out_ptr, partials_ptr, statistics_ptr,
    POSITIONS, INNER, C, x_outer, x_c, x_inner, target_outer, target_c, target_inner, weight_c, out_outer, out_inner,
    ignore_index: tl.int64, label_smoothing: tl.float64,  # type: ignore[valid-type]
    ACC: tl.constexpr, LOWEST: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr,
    UNIT: tl.constexpr, INTERLEAVED: tl.constexpr, WIDE: tl.constexpr,
    TILE_P: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program: all classes of TILE_P positions, in blocks of LANES * VECTOR, each logit read once.

    Writes, each unless its pointer is None: the losses; the program's sum of losses and of the targets' weights; the
    statistics (maximum, log2 of the sum, and Q where it depends on the position).
    """
    C = C // UNIT * UNIT
    pid = tl.program_id(0)
    tiles_p = tl.cdiv(INNER, TILE_P)
    outer = (pid // tiles_p).to(tl.int64)
    inner = pid % tiles_p
    lane = tl.arange(0, LANES)[:, None]
    step = tl.arange(0, VECTOR)[None, :]
    # A thread's classes adjoin where they are loaded as one vector; elsewhere neighbouring threads' classes do.
    block = step * LANES + lane if INTERLEAVED else lane * VECTOR + step
    block = block[None, :, :]
    if WIDE:
        inner, block = inner.to(tl.int64), block.to(tl.int64)
    inner = inner * TILE_P + tl.arange(0, TILE_P)
    p_inside = inner < INNER
    x_ptr += outer * (x_outer // UNIT * UNIT)
    row = inner * (x_inner // UNIT * UNIT)
    smoothing = tl.full((), label_smoothing, ACC)
    if PROBABILITIES:
        target_ptr += outer * (target_outer // UNIT * UNIT)
        target_row = (inner * (target_inner // UNIT * UNIT))[:, None, None]

    maximum = tl.full((TILE_P, LANES), LOWEST, ACC)
    total = tl.zeros((TILE_P, LANES), ACC)
    spread = tl.zeros((TILE_P, LANES), ACC)  # sum of w q (x - maximum)
    mass = tl.zeros((TILE_P if PROBABILITIES else 1, LANES), ACC)  # sum of w q
    for start in range(0, C, LANES * VECTOR):
        c = start + block
        inside = (c < C) & p_inside[:, None, None]
        x = tl.load(x_ptr + (row[:, None, None] + c * x_c), mask=inside, other=float("-inf")).to(ACC)
        highest = tl.maximum(maximum, tl.max(x, axis=2))
        above = x - highest[:, :, None]
        total = total * tl.exp2((maximum - highest) * _LOG2E) + tl.sum(tl.exp2(above * _LOG2E), axis=2)
        if PROBABILITIES or (SMOOTHING and weight_ptr is not None):
            if weight_ptr is not None:
                q = tl.load(weight_ptr + c * weight_c, mask=c < C, other=0.0).to(ACC)
            else:
                q = tl.where(c < C, 1.0, 0.0).to(ACC)
            if PROBABILITIES:
                q *= _probabilities(target_ptr + (target_row + c * target_c), inside, smoothing, C, SMOOTHING, ACC)
            # Without any mass so far there is nothing to correct, and the difference may overflow.
            spread += tl.where(mass == 0, 0.0, mass * (maximum - highest))
            spread += tl.sum(tl.where(inside, above * q, 0.0), axis=2)
            # Without this selection, which changes nothing, Triton 3.7 fails to compile a sum of what was just loaded.
            mass += tl.sum(tl.where(c < C, q, 0.0), axis=2)
        elif SMOOTHING:  # so far every lane has seen as many classes, each of coefficient 1
            spread += tl.where(start == 0, 0.0, (maximum - highest) * (start // LANES))
            spread += tl.sum(tl.where(inside, above, 0.0), axis=2)
        maximum = highest
    if SMOOTHING and not PROBABILITIES and weight_ptr is None:
        turns = C // (LANES * VECTOR)
        mass += tl.sum(tl.where(turns * LANES * VECTOR + block < C, 1.0, 0.0).to(ACC), axis=2) + turns * VECTOR
    highest = tl.max(maximum, axis=1)
    # By selection, or the compiler joins each lane's product with the first addition, and no two lanes have the same sum.
    total = tl.where(total == 0, 0.0, total * tl.exp2((maximum - highest[:, None]) * _LOG2E))
    total = tl.sum(total, axis=1)
    log_total = tl.log2(total)
    if PROBABILITIES or SMOOTHING:
        spread += tl.where(mass == 0, 0.0, mass * (maximum - highest[:, None]))
        spread = tl.sum(spread, axis=1)
        mass = tl.sum(mass, axis=1)

    if PROBABILITIES:
        loss = log_total * _LN2 * mass - spread
        target_weight = tl.full((TILE_P,), 1.0, ACC)
    else:
        target = tl.load(target_ptr + (outer * target_outer + inner * target_inner), mask=p_inside, other=0).to(
            tl.int64
        )
        used = target != ignore_index
        exists = (target >= 0) & (target < C)
        readable = p_inside & used & exists
        x = tl.load(x_ptr + (row + target * x_c), mask=readable, other=0.0).to(ACC)
        target_weight = tl.full((TILE_P,), 1.0, ACC)
        if weight_ptr is not None:
            target_weight = tl.load(weight_ptr + target * weight_c, mask=readable, other=0.0).to(ACC)
        loss = (log_total * _LN2 + (highest - x)) * target_weight
        if SMOOTHING:
            loss = (1 - smoothing) * loss + smoothing / C * (log_total * _LN2 * mass - spread)
        loss = tl.where(used, tl.where(exists, loss, float("nan")), 0.0)
        target_weight = tl.where(used, target_weight, 0.0)

    if out_ptr is not None:
        tl.store(out_ptr + outer * out_outer + inner * out_inner, loss.to(out_ptr.dtype.element_ty), mask=p_inside)
    if partials_ptr is not None:
        tl.store(partials_ptr + pid, tl.sum(tl.where(p_inside, loss, 0.0), axis=0))
        if not PROBABILITIES:
            tl.store(partials_ptr + tl.num_programs(0) + pid, tl.sum(tl.where(p_inside, target_weight, 0.0), axis=0))
    if statistics_ptr is not None:
        size = tl.cast(POSITIONS, tl.int64)
        statistics_ptr += outer * INNER
        tl.store(statistics_ptr + inner, highest, mask=p_inside)
        tl.store(statistics_ptr + size + inner, log_total, mask=p_inside)
        if PROBABILITIES or (SMOOTHING and weight_ptr is not None):
            tl.store(statistics_ptr + 2 * size + inner, mass, mask=p_inside)


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_grad_kernel(
    x_ptr, target_ptr, weight_ptr, total_ptr, statistics_ptr, dy_ptr, dx_ptr, dtarget_ptr,
    POSITIONS, INNER, C, DIVISOR,
    x_outer, x_c, x_inner, target_outer, target_c, target_inner, weight_c, dy_outer, dy_inner,
    dx_outer, dx_c, dx_inner, dtarget_outer, dtarget_c, dtarget_inner,
    ignore_index: tl.int64, label_smoothing: tl.float64,  # type: ignore[valid-type]
    ACC: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr,
    UNIT: tl.constexpr, UNIT_DX: tl.constexpr, WIDE: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """One program: TILE_C classes of TILE_P positions, each logit read once and each gradient written once.

    Without statistics the tile holds all classes, and the program finds them itself.
    """
    C = C // UNIT * UNIT
    tiles_c = tl.cdiv(C, TILE_C)
    tiles_p = tl.cdiv(INNER, TILE_P)
    pid_p = tl.program_id(0) // tiles_c
    outer = (pid_p // tiles_p).to(tl.int64)
    inner = pid_p % tiles_p
    c = tl.program_id(0) % tiles_c * TILE_C + tl.arange(0, TILE_C)[None, :]
    if WIDE:
        inner, c = inner.to(tl.int64), c.to(tl.int64)
    inner = inner * TILE_P + tl.arange(0, TILE_P)
    p_inside = inner < INNER
    c_inside = c < C
    inside = p_inside[:, None] & c_inside
    x_ptr += outer * (x_outer // UNIT * UNIT)
    row = inner * (x_inner // UNIT * UNIT)
    x = tl.load(x_ptr + (row[:, None] + c * x_c), mask=inside, other=float("-inf")).to(ACC)
    smoothing = tl.full((), label_smoothing, ACC)
    weights = tl.full((1, 1), 1.0, ACC)
    if (PROBABILITIES or SMOOTHING) and weight_ptr is not None:
        weights = tl.load(weight_ptr + c * weight_c, mask=c_inside, other=0.0).to(ACC)
    if PROBABILITIES:
        target_ptr += outer * (target_outer // UNIT * UNIT)
        row = inner * (target_inner // UNIT * UNIT)
        q = weights * _probabilities(target_ptr + (row[:, None] + c * target_c), inside, smoothing, C, SMOOTHING, ACC)

    if statistics_ptr is None:
        maximum = tl.max(x, axis=1)
        log_total = tl.log2(tl.sum(tl.exp2((x - maximum[:, None]) * _LOG2E), axis=1))
        if PROBABILITIES:
            mass = tl.sum(tl.where(c_inside, q, 0.0), axis=1)
        elif SMOOTHING and weight_ptr is not None:
            mass = tl.sum(weights, axis=1)
    else:
        size = tl.cast(POSITIONS, tl.int64)
        statistics_ptr += outer * INNER
        maximum = tl.load(statistics_ptr + inner, mask=p_inside, other=0.0)
        log_total = tl.load(statistics_ptr + size + inner, mask=p_inside, other=0.0)
        if PROBABILITIES or (SMOOTHING and weight_ptr is not None):
            mass = tl.load(statistics_ptr + 2 * size + inner, mask=p_inside, other=0.0)

    dy = tl.load(dy_ptr + (outer * dy_outer + inner * dy_inner), mask=p_inside, other=0.0).to(ACC)
    if total_ptr is not None:
        dy = divide(dy, tl.zeros((TILE_P,), ACC) + tl.load(total_ptr).to(ACC))
    else:
        dy = divide(dy, tl.zeros((TILE_P,), ACC) + tl.cast(DIVISOR, ACC))
    softmax = tl.exp2((x - maximum[:, None]) * _LOG2E - log_total[:, None])
    if PROBABILITIES:
        dx = (dy * mass)[:, None] * softmax - dy[:, None] * q
    else:
        target = tl.load(target_ptr + (outer * target_outer + inner * target_inner), mask=p_inside, other=0)
        target = target.to(tl.int64)
        exists = (target >= 0) & (target < C)
        # Selected, not multiplied by 0: if every position is ignored, dy was divided by 0. But 0 times the softmax stays
        # NaN where that is, as in torch.
        dy = tl.where(target == ignore_index, 0.0, tl.where(exists, dy, float("nan")))
        hit = dy
        if weight_ptr is not None:
            hit = dy * tl.load(weight_ptr + target * weight_c, mask=p_inside & exists, other=0.0).to(ACC)
        if SMOOTHING:
            hit *= 1 - smoothing
        dx = hit[:, None] * softmax - tl.where(c == target.to(tl.int32)[:, None], hit[:, None], 0.0)
        if SMOOTHING:
            uniform = dy * (smoothing / C)
            if weight_ptr is not None:
                dx += uniform[:, None] * (mass[:, None] * softmax - weights)
            else:
                dx += uniform[:, None] * (C * softmax - 1)
    if dx_ptr is not None:
        dx_ptr += outer * (dx_outer // UNIT_DX * UNIT_DX)
        offsets = (inner * (dx_inner // UNIT_DX * UNIT_DX))[:, None] + c * dx_c
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if dtarget_ptr is not None:
        dtarget = (log_total * _LN2)[:, None] - (x - maximum[:, None])
        dtarget *= dy[:, None] * weights
        if SMOOTHING:
            dtarget *= 1 - smoothing
        dtarget_ptr += outer * (dtarget_outer // UNIT_DX * UNIT_DX)
        offsets = (inner * (dtarget_inner // UNIT_DX * UNIT_DX))[:, None] + c * dtarget_c
        tl.store(dtarget_ptr + offsets, dtarget.to(dtarget_ptr.dtype.element_ty), mask=inside)


def statistics_shape(
    shape: Sequence[int], *, weighted: bool, label_smoothing: float, probabilities: bool
) -> tuple[int, int] | None:
    """The sizes of the statistics to keep for the backward of logits of this shape, float32 or float64; None: none needed.

    A row each for the maximum, log2 of the sum, and the mass of the coefficients if that has to be known.
    """
    classes = shape[0] if len(shape) == 1 else shape[1]
    if classes <= RECOMPUTED:
        return None
    rows = 3 if probabilities or (weighted and label_smoothing > 0) else 2
    return rows, math.prod(shape) // classes


def _logits(t: torch.Tensor) -> torch.Tensor:
    """(N, C, d1, ...), (N, C) or (C,) as (OUTER, C, INNER): a view where the strides allow one, otherwise a copy."""
    if t.dim() == 1:
        return t.view(1, -1, 1)
    inner = math.prod(t.shape[2:])
    return t.reshape(t.shape[:2]).T[None] if inner == 1 else t.reshape(*t.shape[:2], inner)


def _losses(t: torch.Tensor) -> torch.Tensor:
    """One number for each position, (N, d1, ...), (N,) or (), as (OUTER, INNER): a view where the strides allow one."""
    inner = math.prod(t.shape[1:])
    return t.reshape(1, t.numel()) if inner == 1 else t.reshape(t.shape[0], inner)


def _adjoin(x: torch.Tensor) -> bool:
    """Whether neighbouring classes are neighbours in memory; otherwise neighbouring positions are, if anything."""
    return x.stride(1) == 1 or x.shape[1] == 1


def _strides(t: torch.Tensor | None, dimensions: int) -> tuple[int, ...]:
    """The strides to hand over; 0 where a dimension of size 1 has any."""
    if t is None:
        return (0,) * dimensions
    return tuple(s if n > 1 else 0 for n, s in zip(t.shape, t.stride(), strict=True))


def _unit(*tensors: torch.Tensor | None) -> int:
    """How many classes at a time, 16 bytes or more, all of these logits can be taken apart into; 1 if not at all.

    Triton compiles for 128-bit accesses if it knows sizes and strides to be multiples of 16. Of 1000 classes it knows
    nothing; of 1000 // 8 * 8 classes it does.
    """
    given = [t for t in tensors if t is not None]
    unit = max((16 // t.element_size() for t in given), default=1)
    for t in given:
        outer, c, inner = _strides(t, 3)
        if c != 1 or t.data_ptr() % 16 or t.shape[1] % unit or outer % unit or inner % unit:
            return 1
    return unit


def cross_entropy(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    out: torch.Tensor | None,
    total: torch.Tensor | None,
    statistics: torch.Tensor | None,
    *,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> None:
    """Cross entropy of logits x and a target, into `out`; for the backward, into `total` and `statistics`. None: not asked.

    A target of integers is a class for each position. One that equals `ignore_index` counts nothing. Where torch stops the
    process because a target is no class (negative, or C and more), nothing is read out of bounds and the loss is NaN.
    A floating target is a probability for each class, as it stands; "mean" then divides by the number of positions.

    Shape: x (N, C, d1, ...) or (C,), any strides, C >= 1; target (N, d1, ...) or (), or x's; weight (C,); out (), or dense
        (N, d1, ...) or () for reduction "none"; total (), the sum of the targets' weights, which "mean" divides by;
        statistics as `statistics_shape` says, contiguous.
    Dtype: x, weight and out floating; target int64, uint8 or floating; total and statistics float32, or float64 if x is,
        which is also what is computed in.
    """
    probabilities = target.is_floating_point()
    x, target = _logits(x), _logits(target) if probabilities else _losses(target)[:, None]
    outer, classes, inner = x.shape
    positions, accumulate = outer * inner, torch.promote_types(x.dtype, torch.float32)
    tile = _forward_tile(x.shape, x.element_size(), _adjoin(x), _tiles.device(x.device))
    programs = outer * cdiv(inner, tile.m)
    losses = partials = None
    if out is not None and reduction == "none":
        losses = _losses(out)
    elif out is not None:
        partials = launch.empty((2, programs), dtype=accumulate, device=x.device)
    unit = _unit(x, target if probabilities else None)
    launch.launch(
        _cross_entropy_kernel, programs,
        x, target, weight, losses, partials, statistics,
        positions, inner, classes,
        *_strides(x, 3), *_strides(target, 3), *_strides(weight, 1), *_strides(losses, 2),
        ignore_index, label_smoothing,
        ACC=_tiles.triton_dtype(accumulate), LOWEST=_LOWEST[accumulate], PROBABILITIES=probabilities,
        SMOOTHING=label_smoothing > 0, UNIT=unit, INTERLEAVED=unit == 1 and _adjoin(x),
        WIDE=launch.wide(x, target, weight, losses),
        TILE_P=tile.m, LANES=tile.n, VECTOR=tile.k, num_warps=tile.warps,
    )  # fmt: skip
    if partials is not None and out is not None:
        by_weight = reduction == "mean" and not probabilities
        divisor = positions if reduction == "mean" else 1
        sum_losses(out, partials, divisor, total=total, by_weight=by_weight)


def cross_entropy_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    total: torch.Tensor | None,
    statistics: torch.Tensor | None,
    dx: torch.Tensor | None,
    dtarget: torch.Tensor | None = None,
    *,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> None:
    """The gradients of the logits, into `dx`, and of probabilities, into `dtarget`, each unless it is None.

    0 where a position is ignored, NaN where its target is no class. Without the statistics, which more than `RECOMPUTED`
    classes need, the logits are read once more to find them.

    Shape: as for `cross_entropy`, with dy as its out; dy, dx and dtarget with any strides. The "mean" of classes needs
        the forward's total.
    """
    probabilities = target.is_floating_point()
    accumulate = torch.promote_types(x.dtype, torch.float32)
    shape: dict[str, Any] = dict(
        weighted=weight is not None, label_smoothing=label_smoothing, probabilities=probabilities
    )
    needed = statistics_shape(x.shape, **shape)
    if needed is None:
        statistics = None
    elif statistics is None:
        statistics = launch.empty(needed, dtype=accumulate, device=x.device)
        options: dict[str, Any] = dict(ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        cross_entropy(x, target, weight, None, None, statistics, **options)
    x, target = _logits(x), _logits(target) if probabilities else _losses(target)[:, None]
    outer, classes, inner = x.shape
    positions, results = outer * inner, (dx, dtarget)
    dx, dtarget = written = [None if t is None else _logits(t) for t in results]
    dy = _losses(dy) if reduction == "none" else dy.expand(outer, inner)
    tile = _grad_tile(x.shape, x.element_size(), _adjoin(x), recomputed=statistics is None)
    unit, unit_dx = _unit(x, target if probabilities else None), _unit(dx, dtarget)
    launch.launch(
        _cross_entropy_grad_kernel, outer * cdiv(inner, tile.m) * cdiv(classes, tile.n),
        x, target, weight, total if reduction == "mean" else None, statistics, dy, dx, dtarget,
        positions, inner, classes, positions if reduction == "mean" else 1,
        *_strides(x, 3), *_strides(target, 3), *_strides(weight, 1), *_strides(dy, 2),
        *_strides(dx, 3), *_strides(dtarget, 3),
        ignore_index, label_smoothing,
        ACC=_tiles.triton_dtype(accumulate), PROBABILITIES=probabilities, SMOOTHING=label_smoothing > 0,
        UNIT=unit, UNIT_DX=unit_dx, WIDE=launch.wide(x, target, weight, dy, dx, dtarget),
        TILE_P=tile.m, TILE_C=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    for result, seen in zip(results, written, strict=True):
        if result is not None and seen is not None and seen.data_ptr() != result.data_ptr():
            result.copy_(seen.view(result.shape))  # no three dimensions describe it
