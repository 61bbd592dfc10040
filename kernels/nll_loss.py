"""The negative log likelihood of classes: each position's log probability of its class, times the class's weight.

Log probabilities are seen as (OUTER, C, INNER), and have one loss for each of the OUTER * INNER positions. Of the tensor itself,
the forward reads one number a position; the gradient, which is 0 nearly everywhere, is written once and nothing read for it but
the classes.

Sums are added up in a fixed order, without atomics: results are the same from run to run.
"""

import math

import torch
import triton
import triton.language as tl

from .reduce import divide, sum_losses
from .runtime import launch, tiles
from .runtime.tiles import Tile, cdiv

_NLL_LOSS = Tile(1, 256, warps=4)
"""n positions."""
_NLL_LOSS_GRAD = (Tile(4, 512, warps=4), Tile(64, 32, warps=4), Tile(512, 4, warps=4))
"""m positions, n classes: for many contiguous classes, for few of them, and for contiguous positions."""


@triton.jit
def _target_weight(target, weight_ptr, weight_c, C, ignore_index, inside, ACC: tl.constexpr):
    """Of each target whether it counts, whether there is such a class, and the class's weight."""
    used = target != ignore_index
    exists = (target >= 0) & (target < C)
    weight = tl.full(target.shape, 1.0, ACC)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + target * weight_c, mask=inside & used & exists, other=0.0).to(ACC)
    return used, exists, weight


@triton.jit(do_not_specialize=["ignore_index"])
def _nll_loss_kernel(
    x_ptr, target_ptr, weight_ptr, out_ptr, partials_ptr,
    SIZE, C, INNER, x_outer, x_c, x_inner, target_outer, target_inner, weight_c,
    ignore_index: tl.int64,  # type: ignore[valid-type]
    ACC: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: TILE positions. It writes their losses to out, or its sums of losses and of weights to partials; the other
    one's pointer is None."""
    position = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = position < SIZE
    outer = position // INNER
    inner = position % INNER
    target = tl.load(target_ptr + (outer * target_outer + inner * target_inner), mask=inside, other=0).to(tl.int64)
    used, exists, weight = _target_weight(target, weight_ptr, weight_c, C, ignore_index, inside, ACC)
    offsets = outer * x_outer + target * x_c + inner * x_inner
    x = tl.load(x_ptr + offsets, mask=inside & used & exists, other=0.0).to(ACC)
    loss = tl.where(used, tl.where(exists, -x * weight, float("nan")), 0.0)
    if out_ptr is not None:
        tl.store(out_ptr + position, loss.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        programs = tl.num_programs(0)
        tl.store(partials_ptr + tl.program_id(0), tl.sum(tl.where(inside, loss, 0.0), axis=0))
        total = tl.sum(tl.where(inside & used, weight, 0.0), axis=0)
        tl.store(partials_ptr + programs + tl.program_id(0), total)


@triton.jit(do_not_specialize=["ignore_index"])
def _nll_loss_grad_kernel(
    dy_ptr, target_ptr, weight_ptr, total_ptr, dx_ptr,
    SIZE, C, INNER, dy_outer, dy_inner, target_outer, target_inner, weight_c, dx_outer, dx_c, dx_inner,
    ignore_index: tl.int64,  # type: ignore[valid-type]
    ACC: tl.constexpr, WIDE: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """One program: TILE_C classes of TILE_P positions, all of which it writes."""
    tiles_c = tl.cdiv(C, TILE_C)
    pid_p = tl.program_id(0) // tiles_c
    pid_c = tl.program_id(0) % tiles_c
    if WIDE:
        pid_p, pid_c = pid_p.to(tl.int64), pid_c.to(tl.int64)
    position = pid_p * TILE_P + tl.arange(0, TILE_P)
    c = (pid_c * TILE_C + tl.arange(0, TILE_C))[None, :]
    inside = position < SIZE
    outer = position // INNER
    inner = position % INNER
    target = tl.load(target_ptr + (outer * target_outer + inner * target_inner), mask=inside, other=0).to(tl.int64)
    used, exists, weight = _target_weight(target, weight_ptr, weight_c, C, ignore_index, inside, ACC)
    dy = tl.load(dy_ptr + (outer * dy_outer + inner * dy_inner), mask=inside, other=0.0).to(ACC)
    if total_ptr is not None:
        dy = divide(dy, tl.zeros((TILE_P,), ACC) + tl.load(total_ptr).to(ACC))
    # Selected, not multiplied by 0: if every position is ignored, dy was divided by 0.
    hit = tl.where(used, tl.where(exists, -dy * weight, float("nan")), 0.0)
    dx = tl.where((c == target[:, None]) | ~(exists | ~used)[:, None], hit[:, None], 0.0)
    offsets = (outer * dx_outer + inner * dx_inner)[:, None] + c * dx_c
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside[:, None] & (c < C))


def _log_probabilities(t: torch.Tensor) -> torch.Tensor:
    """(N, C, d1, ...) or (C,) as (OUTER, C, INNER): a view where the strides allow one, otherwise a copy."""
    return t.reshape(1, -1, 1) if t.dim() == 1 else t.reshape(*t.shape[:2], math.prod(t.shape[2:]))


def _positions(t: torch.Tensor) -> torch.Tensor:
    """(N, d1, ...) or () as (OUTER, INNER): a view where the strides allow one, otherwise a copy."""
    return t.reshape(1, 1) if t.dim() == 0 else t.reshape(t.shape[0], math.prod(t.shape[1:]))


def nll_loss(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    out: torch.Tensor,
    total: torch.Tensor | None,
    *,
    ignore_index: int,
    reduction: str,
) -> None:
    """The negative log likelihoods, their sum or their mean, into `out`; into `total`, what the mean is divided by.

    A target that equals `ignore_index` counts nothing. Where torch stops the process because a target is no class, nothing is
    read out of bounds and the loss is NaN.

    Shape: x (N, C, d1, ...) or (C,) and target (N, d1, ...) or (), any strides; weight (C,); out as target, contiguous, or ();
        total ().
    Dtype: x, weight and out floating, target int64 or uint8; total float32, or float64 if x is, which is also computed in.
    """
    accumulate = torch.promote_types(x.dtype, torch.float32)
    x, target = _log_probabilities(x), _positions(target)
    _, classes, inner = x.shape
    size = target.numel()
    tile = tiles.ask("nll_loss", lambda: (_NLL_LOSS,)) or _NLL_LOSS
    programs, partials = cdiv(size, tile.n), None
    if reduction != "none":
        partials = launch.empty((2, programs), dtype=accumulate, device=x.device)
    launch.launch(
        _nll_loss_kernel, programs,
        x, target, weight, out if partials is None else None, partials, size, classes, inner,
        *x.stride(), *target.stride(), 0 if weight is None else weight.stride(0), ignore_index,
        ACC=tiles.triton_dtype(accumulate), TILE=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    if partials is not None:
        sum_losses(out, partials, 1, total=total, by_weight=reduction == "mean")


def nll_loss_grad(
    dy: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    total: torch.Tensor | None,
    dx: torch.Tensor,
    *,
    ignore_index: int,
    reduction: str,
) -> None:
    """The gradient of the log probabilities, into `dx`, which may have any strides.

    Shape: as for `nll_loss`, with dy as its out, any strides. The mean needs the forward's total.
    """
    accumulate = torch.promote_types(dx.dtype, torch.float32)
    classes, target = dx.shape[0] if dx.dim() == 1 else dx.shape[1], _positions(target)
    dy = _positions(dy) if reduction == "none" else dy.expand(target.shape)
    written = _log_probabilities(dx)
    copied = written.data_ptr() != dx.data_ptr()
    if copied:  # no three dimensions describe it
        written = launch.empty(written.shape, dtype=dx.dtype, device=dx.device)
    picked = _NLL_LOSS_GRAD[2 if written.stride(1) != 1 else 1 if classes <= 32 else 0]
    tile = tiles.ask("nll_loss_grad", lambda: (picked,)) or picked
    size = target.numel()
    launch.launch(
        _nll_loss_grad_kernel, cdiv(size, tile.m) * cdiv(classes, tile.n),
        dy, target, weight, total if reduction == "mean" else None, written, size, classes, target.shape[1],
        *dy.stride(), *target.stride(), 0 if weight is None else weight.stride(0), *written.stride(), ignore_index,
        ACC=tiles.triton_dtype(accumulate), WIDE=dx.numel() >= 2**31 or launch.wide(dy, target, written),
        TILE_P=tile.m, TILE_C=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    if copied:
        dx.copy_(written.view(dx.shape))
