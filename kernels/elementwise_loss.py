"""Elementwise losses: a function of the input x and the target t, times a weight, and then the mean or the sum.

A loss is a pair of tile functions, `name(x, t, p, A)` and `name_grad(x, t, p, A)`, which returns the derivatives with respect to
x and to t. A holds the loss's number, 0 where it has none, which is an argument of the kernels, so that another delta needs no
other kernel, and its switch, for which they are compiled. p is the weight of positive examples, None where there is none. Of the
two derivatives, the compiler drops the one that isn't stored.

Sums are added up in a fixed order, without atomics: results are the same from run to run.
"""

from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl

from .pointwise import offsets
from .reduce import divide, sum_losses
from .runtime import launch, tiles
from .runtime.tiles import Tile, cdiv

_ELEMENTWISE_LOSS = Tile(1, 1024, warps=4)
_ELEMENTWISE_LOSS_GRAD = Tile(1, 1024, warps=4)
"""n elements at a time."""

_PROGRAMS = 8
"""How many programs for each multiprocessor add up the losses. More would leave more partial sums to add."""

_DIMENSIONS = 3
"""The most dimensions that kernels take. Where a call's tensors have more after those that can be merged are, they are copied."""


class Loss(Protocol):
    """What launchers need to know of a loss."""

    @property
    def function(self) -> str:
        """The name of its tile function in this file."""
        ...

    @property
    def args(self) -> tuple[float, ...]:
        """The options of that function: at most one number and one switch, in any order."""
        ...


# --- tile functions --------------------------------------------------------------------------------------------------------


@triton.jit
def _log1p(x):
    """log(1 + x) for x <= 1, also where 1 + x has lost the digits of x. Triton's interpreter has no libdevice.

    The factor makes up for what the rounding of 1 + x took away: W. Kahan's, in Goldberg, "What every computer scientist should
    know about floating-point arithmetic", theorem 4.
    """
    above = 1 + x
    rounded = above - 1
    return tl.where(rounded == 0, x, tl.log(above) * (x / rounded))


@triton.jit
def mse(x, t, p, A):
    return (x - t) * (x - t)


@triton.jit
def mse_grad(x, t, p, A):
    return 2 * (x - t), 2 * (t - x)


@triton.jit
def l1(x, t, p, A):
    return tl.abs(x - t)


@triton.jit
def l1_grad(x, t, p, A):
    # As torch's sign: 0 where the difference is 0 or NaN.
    sign = tl.where(x - t > 0, 1.0, tl.where(x - t < 0, -1.0, 0.0)).to(x.dtype)
    return sign, -sign


@triton.jit
def smooth_l1(x, t, p, A):
    distance = tl.abs(x - t)
    return tl.where(distance < A[0], 0.5 * distance * distance / A[0], distance - 0.5 * A[0])


@triton.jit
def smooth_l1_grad(x, t, p, A):
    d = x - t
    dx = tl.where(d <= -A[0], -1.0, tl.where(d >= A[0], 1.0, d / A[0]))
    return dx, -dx


@triton.jit
def huber(x, t, p, A):
    distance = tl.abs(x - t)
    return tl.where(distance <= A[0], 0.5 * distance * distance, A[0] * (distance - 0.5 * A[0]))


@triton.jit
def huber_grad(x, t, p, A):
    d = x - t
    dx = tl.where(d <= -A[0], -A[0], tl.where(d >= A[0], A[0], d))
    return dx, -dx


@triton.jit
def _at_least(x, bound):
    """The larger of the two; NaN if one is NaN."""
    return tl.where(x < bound, bound, x)


@triton.jit
def binary_cross_entropy(x, t, p, A):
    # Where torch stops the process because x is no probability, one of the logarithms is NaN.
    return (t - 1) * _at_least(_log1p(-x), -100.0) - t * _at_least(tl.log(x), -100.0)


@triton.jit
def binary_cross_entropy_grad(x, t, p, A):
    return (x - t) / _at_least((1 - x) * x, 1e-12), _log1p(-x) - tl.log(x)


@triton.jit
def binary_cross_entropy_with_logits(x, t, p, A):
    softplus = _log1p(tl.exp(-tl.abs(x))) + tl.where(x > 0, 0.0, -x)  # log(1 + exp(-x))
    if p is not None:
        softplus *= 1 + (p - 1) * t
    return (1 - t) * x + softplus


@triton.jit
def binary_cross_entropy_with_logits_grad(x, t, p, A):
    e = tl.exp(-tl.abs(x))
    sigmoid = tl.where(x < 0, e, 1.0) / (1 + e)
    if p is not None:
        dx = (p * t + 1 - t) * sigmoid - p * t
        dt = (p - 1) * (_log1p(e) + tl.where(x > 0, 0.0, -x)) - x
    else:
        dx = sigmoid - t
        dt = -x
    return dx, dt


@triton.jit
def kl_div(x, t, p, A):
    return tl.where(t == 0, 0.0, t * tl.log(t)) - t * x


@triton.jit
def kl_div_grad(x, t, p, A):
    # t / t is NaN where t is 0, as torch's derivative by the target is.
    return -t, tl.log(t) + t / t - x


@triton.jit
def kl_div_of_logs(x, t, p, A):
    return tl.exp(t) * (t - x)


@triton.jit
def kl_div_of_logs_grad(x, t, p, A):
    e = tl.exp(t)
    return -e, e * (t - x) + e


@triton.jit
def _stirling(t, FULL: tl.constexpr):
    """log(t!) where t > 1, else 0; and its derivative, which is NaN where torch's is, for t <= 0."""
    if FULL:
        log = tl.log(t)
        value = tl.where(t <= 1, 0.0, t * log - t + 0.5 * (log + 1.8378770664093453))  # log(2 pi)
        slope = log + 0.5 / t
        slope = tl.where(t <= 1, 0 * slope, slope)
    else:
        value = tl.zeros_like(t)
        slope = value
    return value, slope


@triton.jit
def poisson(x, t, p, A):
    value, _ = _stirling(t, A[1])
    return x - t * tl.log(x + A[0]) + value


@triton.jit
def poisson_grad(x, t, p, A):
    _, slope = _stirling(t, A[1])
    return 1 - t / (x + A[0]), slope - tl.log(x + A[0])


@triton.jit
def poisson_of_log(x, t, p, A):
    value, _ = _stirling(t, A[1])
    return tl.exp(x) - t * x + value


@triton.jit
def poisson_of_log_grad(x, t, p, A):
    _, slope = _stirling(t, A[1])
    return tl.exp(x) - t, slope - x


# --- kernels ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _elementwise_loss_kernel(
    x_ptr, t_ptr, weight_ptr, p_ptr, out_ptr, partials_ptr,
    SIZE, N1, N2, x_0, x_1, x_2, t_0, t_1, t_2, w_0, w_1, w_2, p_0, p_1, p_2, out_0, out_1, out_2,
    A: tl.float64, SWITCH: tl.constexpr, F: tl.constexpr, ACC: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: TILE elements at a time, stepping over those that other programs take, each read once. It writes their
    losses to out, or the sum of its losses to its place in partials; the other one's pointer is None."""
    first = tl.program_id(0)
    block = tl.arange(0, TILE)
    if WIDE:
        first, block = first.to(tl.int64), block.to(tl.int64)
    sums = tl.zeros((TILE,), ACC)
    for start in range(first * TILE, SIZE, tl.num_programs(0) * TILE):
        i = start + block
        inside = i < SIZE
        x = tl.load(x_ptr + offsets(i, N1, N2, x_0, x_1, x_2, FLAT), mask=inside, other=0.0).to(ACC)
        t = tl.load(t_ptr + offsets(i, N1, N2, t_0, t_1, t_2, FLAT), mask=inside, other=0.0).to(ACC)
        p = None
        if p_ptr is not None:
            p = tl.load(p_ptr + offsets(i, N1, N2, p_0, p_1, p_2, FLAT), mask=inside, other=0.0).to(ACC)
        loss = F(x, t, p, (tl.full((), A, ACC), SWITCH))
        if weight_ptr is not None:
            loss *= tl.load(weight_ptr + offsets(i, N1, N2, w_0, w_1, w_2, FLAT), mask=inside, other=0.0).to(ACC)
        if out_ptr is not None:
            tl.store(
                out_ptr + offsets(i, N1, N2, out_0, out_1, out_2, FLAT), loss.to(out_ptr.dtype.element_ty), mask=inside
            )
        else:
            sums += tl.where(inside, loss, 0.0)
    if partials_ptr is not None:
        tl.store(partials_ptr + tl.program_id(0), tl.sum(sums, axis=0))


@triton.jit
def _elementwise_loss_grad_kernel(
    dy_ptr, x_ptr, t_ptr, weight_ptr, p_ptr, dx_ptr, dt_ptr,
    SIZE, N1, N2, DIVISOR,
    dy_0, dy_1, dy_2, x_0, x_1, x_2, t_0, t_1, t_2, w_0, w_1, w_2, p_0, p_1, p_2,
    dx_0, dx_1, dx_2, dt_0, dt_1, dt_2,
    A: tl.float64, SWITCH: tl.constexpr, F_GRAD: tl.constexpr, ACC: tl.constexpr, SCALAR: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: TILE elements, each read once, and written once to dx and dt, of which one may be None. x and t are None where
    the derivatives that are asked for don't need them. SCALAR: dy is one number, which is divided by DIVISOR."""
    pid = tl.program_id(0)
    block = tl.arange(0, TILE)
    if WIDE:
        pid, block = pid.to(tl.int64), block.to(tl.int64)
    i = pid * TILE + block
    inside = i < SIZE
    x = tl.zeros((TILE,), ACC)
    t = tl.zeros((TILE,), ACC)
    if x_ptr is not None:
        x = tl.load(x_ptr + offsets(i, N1, N2, x_0, x_1, x_2, FLAT), mask=inside, other=0.0).to(ACC)
    if t_ptr is not None:
        t = tl.load(t_ptr + offsets(i, N1, N2, t_0, t_1, t_2, FLAT), mask=inside, other=0.0).to(ACC)
    p = None
    if p_ptr is not None:
        p = tl.load(p_ptr + offsets(i, N1, N2, p_0, p_1, p_2, FLAT), mask=inside, other=0.0).to(ACC)
    if SCALAR:
        dy = divide(tl.load(dy_ptr).to(ACC), tl.cast(DIVISOR, ACC))
    else:
        dy = tl.load(dy_ptr + offsets(i, N1, N2, dy_0, dy_1, dy_2, FLAT), mask=inside, other=0.0).to(ACC)
    if weight_ptr is not None:
        dy *= tl.load(weight_ptr + offsets(i, N1, N2, w_0, w_1, w_2, FLAT), mask=inside, other=0.0).to(ACC)
    dx, dt = F_GRAD(x, t, p, (tl.full((), A, ACC), SWITCH))
    if dx_ptr is not None:
        tl.store(
            dx_ptr + offsets(i, N1, N2, dx_0, dx_1, dx_2, FLAT), (dy * dx).to(dx_ptr.dtype.element_ty), mask=inside
        )
    if dt_ptr is not None:
        tl.store(
            dt_ptr + offsets(i, N1, N2, dt_0, dt_1, dt_2, FLAT), (dy * dt).to(dt_ptr.dtype.element_ty), mask=inside
        )


# --- launchers -------------------------------------------------------------------------------------------------------------


class _Described(NamedTuple):
    """The tensors of a launch, or copies of them, with their common sizes and their strides."""

    given: list[torch.Tensor | None]
    written: list[torch.Tensor | None]
    sizes: tuple[int, ...]
    """N1 and N2, the last two of three dimensions."""
    strides: list[int]
    """Three for each tensor."""
    flat: bool
    """Whether all tensors are dense and alike, so that no sizes nor strides are needed."""
    wide: bool


def _describe(shape: torch.Size, given: list[torch.Tensor | None], written: list[torch.Tensor | None]) -> _Described:
    given = [t if t is None or t.shape == shape else t.expand(shape) for t in given]
    sizes, strides = launch.collapse(shape, [t.stride() for t in (*given, *written) if t is not None])
    if len(sizes) > _DIMENSIONS:
        given = [None if t is None else t.contiguous() for t in given]
        written = [None if t is None else launch.empty(shape, dtype=t.dtype, device=t.device) for t in written]
        sizes, strides = launch.collapse(shape, [t.stride() for t in (*given, *written) if t is not None])
    flat = len(sizes) == 0 or (len(sizes) == 1 and all(s == [1] for s in strides))
    if flat:
        sizes, strides = [], [[] for _ in strides]
    padded = iter([[0] * (_DIMENSIONS - len(s)) + s for s in strides])
    each = [(0,) * _DIMENSIONS if t is None else next(padded) for t in (*given, *written)]
    sizes = [1] * (_DIMENSIONS - len(sizes)) + sizes
    wide = launch.wide(*given, *written, elements=shape.numel())
    return _Described(given, written, tuple(sizes[1:]), [s for strides in each for s in strides], flat, wide)


def elementwise_loss(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    pos_weight: torch.Tensor | None,
    out: torch.Tensor,
    loss: Loss,
    reduction: str,
) -> None:
    """out = the losses, their sum, or the sum divided by the number of elements ("mean") or of the first dimension ("batchmean").

    Shape: x and target the same, any strides; weight and pos_weight broadcast to it; out as x, any strides, or ().
    Dtype: any floating each; computed in float32, or in float64 if x is float64.
    """
    accumulate = torch.promote_types(x.dtype, torch.float32)
    tile = tiles.ask("elementwise_loss", lambda: (_ELEMENTWISE_LOSS,)) or _ELEMENTWISE_LOSS
    size, whole = x.numel(), reduction == "none"
    inputs = [x, target, weight, pos_weight]
    given, written, sizes, strides, flat, wide = _describe(x.shape, inputs, [out if whole else None])
    programs, partials = cdiv(size, tile.n), None
    if not whole:
        programs = min(programs, _PROGRAMS * tiles.device(x.device).multiprocessors)
        partials = launch.empty((1, programs), dtype=accumulate, device=x.device)
    launch.launch(
        _elementwise_loss_kernel, programs,
        *given, *written, partials, size, *sizes, *strides, *_options(loss),
        F=globals()[loss.function], ACC=tiles.triton_dtype(accumulate), FLAT=flat,
        WIDE=wide, TILE=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    if partials is not None:
        sum_losses(out, partials, _divisor(x, reduction))
    elif written[0] is not out:
        out.copy_(written[0])


def _options(loss: Loss) -> tuple[float, bool]:
    """The number and the switch of a loss."""
    numbers = [a for a in loss.args if type(a) is not bool]
    return (*numbers, 0.0)[0], True in [a for a in loss.args if type(a) is bool]


def _divisor(x: torch.Tensor, reduction: str) -> int:
    return x.numel() if reduction == "mean" else x.shape[0] if reduction == "batchmean" else 1


def elementwise_loss_grad(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    target: torch.Tensor | None,
    weight: torch.Tensor | None,
    pos_weight: torch.Tensor | None,
    dx: torch.Tensor | None,
    dtarget: torch.Tensor | None,
    loss: Loss,
    reduction: str,
) -> None:
    """The gradients of `elementwise_loss`, each unless it is None.

    Shape: as there, with dy as its out. x and target may be None where the derivatives don't depend on them.
    """
    like = dx if dx is not None else dtarget
    assert like is not None
    accumulate = torch.promote_types(like.dtype, torch.float32)
    tile = tiles.ask("elementwise_loss_grad", lambda: (_ELEMENTWISE_LOSS_GRAD,)) or _ELEMENTWISE_LOSS_GRAD
    size, scalar = like.numel(), reduction != "none"
    inputs = [None if scalar else dy, x, target, weight, pos_weight]
    given, written, sizes, strides, flat, wide = _describe(like.shape, inputs, [dx, dtarget])
    launch.launch(
        _elementwise_loss_grad_kernel, cdiv(size, tile.n),
        dy if scalar else given[0], *given[1:], *written, size, *sizes, _divisor(like, reduction), *strides,
        *_options(loss),
        F_GRAD=globals()[loss.function + "_grad"], ACC=tiles.triton_dtype(accumulate), SCALAR=scalar,
        FLAT=flat, WIDE=wide, TILE=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    for result, computed in zip((dx, dtarget), written, strict=True):
        if result is not None and computed is not result:
            result.copy_(computed)
