"""Linear layers, alone or in a chain with their activations:

x (*, K), W (N, K), b (N,) -> z = x W^T + b, y = f(z) (*, N)
dz = f'(y) dy, dx = dz W, dW = dz^T x, db = sum of dz over rows
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .. import _dispatch, _dtypes
from .._dispatch import BadInput, accelerated
from .pointwise import Pointwise

if TYPE_CHECKING or _dispatch.MISSING is None:
    from ..kernels import _launch
    from ..kernels.matmul import matmul
    from ..kernels.reduce import activation_grad

Stage = tuple[torch.Tensor, torch.Tensor | None, Pointwise | None]
"""Weight, bias and the activation that follows, of one layer in a chain."""


def _undo(then: Pointwise | None, saved: torch.Tensor | None) -> tuple[str, torch.Tensor] | None:
    return None if then is None or saved is None else (then.name, saved)


def _forward(
    x: torch.Tensor, thens: Sequence[Pointwise | None], params: Sequence[torch.Tensor | None]
) -> Iterator[torch.Tensor]:
    """The outputs of the stages, one kernel each: matrices, but for the last, which has x's leading dimensions."""
    precision = _dtypes.matmul_precision()
    rows = x.shape[:-1].numel()
    hidden = x.reshape(rows, x.shape[-1])
    for i, then in enumerate(thens):
        weight = params[2 * i]
        assert weight is not None
        lead = x.shape[:-1] if i == len(thens) - 1 else (rows,)
        # In its final shape: a Function that returns a view of its result breaks in-place use of it.
        output = _launch.empty((*lead, weight.shape[0]), dtype=x.dtype, device=x.device)
        out = output.view(rows, weight.shape[0])
        name = None if then is None else then.name
        matmul(hidden, weight.T, bias=params[2 * i + 1], then=name, out=out, precision=precision)
        hidden = out
        yield output


class _Linear(torch.autograd.Function):
    """x (*, K), then W_i (N_i, N_i-1) and b_i (N_i,) of each stage -> y (*, N), and the hidden outputs worth keeping.

    In backward, the product that makes a stage's dx also applies the derivative of the activation before it, and the one
    that makes its dW adds up its bias gradient, so that nothing between two layers runs on its own.

    The hidden outputs are returned, though nobody takes them, because what is saved must be an input or an output for
    second derivatives to reach it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, thens: tuple[Pointwise | None, ...], *params: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        needs = ctx.needs_input_grad
        count = len(thens)
        outputs = list(_forward(x, thens, params))
        flows = _flows(needs)
        weights = [params[2 * i] if flows[i] else None for i in range(count)]
        kept = [
            outputs[i] if (thens[i] and flows[i + 1]) or (i + 1 < count and needs[2 + 2 * (i + 1)]) else None
            for i in range(count)
        ]
        ctx.set_materialize_grads(False)
        ctx.thens, ctx.x_shape = thens, x.shape
        ctx.is_tensor = (True, False, *(p is not None for p in params))
        ctx.hidden = [i for i in range(count - 1) if kept[i] is not None]
        saved = (x if needs[2] else None, *weights, *kept)
        # Nothing is saved for a bias alone, and such a graph may be gone through twice, as torch's.
        ctx.saves = any(t is not None for t in saved)
        if ctx.saves:
            ctx.save_for_backward(*saved)
        return (outputs[-1], *(outputs[i] for i in ctx.hidden))

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, *dhidden: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grads: list[torch.Tensor | None] = [None] * len(ctx.needs_input_grad)
        if dy is None and all(d is None for d in dhidden):
            return tuple(grads)
        needs = _dispatch.asked_for(ctx)
        # A hidden output has a gradient of its own only in a second derivative.
        if dy is None or any(d is not None for d in dhidden) or _dispatch.backward_through_torch(dy):
            _backward_torch(ctx, dy, dict(zip(ctx.hidden, dhidden, strict=True)), needs, grads)
        else:
            _backward_triton(ctx, dy, needs, grads)
        return tuple(grads)


def _flows(needs: Sequence[bool]) -> list[bool]:
    """For every stage, and at last the end: whether the gradient has to reach its input, because x or a parameter of a
    stage before it wants one."""
    flows = [needs[0]]
    for i in range(2, len(needs), 2):
        flows.append(flows[-1] or needs[i] or needs[i + 1])
    return flows


def _saved(ctx: Any) -> tuple[int, Any, Sequence[Any], Sequence[Any]]:
    """Rows, x as a matrix, weights, and the outputs as matrices: whatever of it was saved."""
    count = len(ctx.thens)
    rows = ctx.x_shape[:-1].numel()
    x, *rest = ctx.saved_tensors if ctx.saves else [None] * (1 + 2 * count)
    x = None if x is None else x.reshape(rows, ctx.x_shape[-1])
    outputs = [None if h is None else h.reshape(rows, h.shape[-1]) for h in rest[count:]]
    return rows, x, rest[:count], outputs


def _backward_triton(ctx: Any, dy: torch.Tensor, needs: list[bool], grads: list[torch.Tensor | None]) -> None:
    rows, x, weights, outputs = _saved(ctx)
    thens, flows = ctx.thens, _flows(needs)
    precision = _dtypes.matmul_precision()
    last = len(thens) - 1

    def column_sums(i: int) -> torch.dtype | None:
        """A bias gradient that no weight gradient carries."""
        return dy.dtype if needs[3 + 2 * i] and not needs[2 + 2 * i] else None

    dz, grads[3 + 2 * last] = activation_grad(
        dy.reshape(1, rows, dy.shape[-1]),
        undo=_undo(thens[last], None if outputs[last] is None else outputs[last][None]),
        column_sums=column_sums(last),
    )
    dz = dz[0]
    for i in range(last, -1, -1):
        if needs[2 + 2 * i]:
            source = x if i == 0 else outputs[i - 1]
            assert source is not None
            grads[2 + 2 * i], grads[3 + 2 * i] = matmul(
                dz.T, source, operand_sums=dy.dtype if needs[3 + 2 * i] else None, precision=precision
            )
        if i > 0 and flows[i]:
            dz, grads[1 + 2 * i] = matmul(
                dz, weights[i], undo=_undo(thens[i - 1], outputs[i - 1]), column_sums=column_sums(i - 1), precision=precision
            )  # fmt: skip
    if needs[0]:
        dx = _launch.empty(ctx.x_shape, dtype=dy.dtype, device=dy.device)
        matmul(dz, weights[0], out=dx.view(rows, ctx.x_shape[-1]), precision=precision)
        grads[0] = dx


def _backward_torch(
    ctx: Any,
    dy: torch.Tensor | None,
    dhidden: dict[int, torch.Tensor | None],
    needs: list[bool],
    grads: list[torch.Tensor | None],
) -> None:
    """The same in differentiable functions of torch."""
    rows, x, weights, outputs = _saved(ctx)
    thens, flows = ctx.thens, _flows(needs)
    last = len(thens) - 1
    with torch.autocast(next(d for d in (dy, *dhidden.values()) if d is not None).device.type, enabled=False):
        dh = None if dy is None else dy.reshape(rows, dy.shape[-1])
        for i in range(last, -1, -1):
            extra = dhidden.get(i)
            if extra is not None:
                dh = extra if dh is None else dh + extra
            if dh is None:
                continue
            dz = thens[i].torch_grad(dh, outputs[i]) if thens[i] and flows[i + 1] else dh
            if needs[3 + 2 * i]:
                grads[3 + 2 * i] = dz.sum(0)
            if needs[2 + 2 * i]:
                grads[2 + 2 * i] = dz.T @ (x if i == 0 else outputs[i - 1])
            dh = dz @ weights[i] if flows[i] else None
        if needs[0] and dh is not None:
            grads[0] = dh.reshape(ctx.x_shape)


def _why_not_stage(width: int, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    if weight.dim() != 2:
        return f"a weight with {weight.dim()} dimensions"
    if weight.shape[1] != width:
        return BadInput(f"{width} features for a weight of {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        return BadInput(f"a bias of {tuple(bias.shape)} for a weight of {tuple(weight.shape)}")
    return None


def _why_not_chain(input: torch.Tensor, stages: Sequence[Stage]) -> str | None:
    params = (p for weight, bias, _ in stages for p in ((weight,) if bias is None else (weight, bias)))
    reason = _dispatch.why_not(input, *params, autocast=_probe)
    if reason is not None:
        return reason
    if input.dim() == 0:
        return BadInput("an input without dimensions")
    width = input.shape[-1]
    for weight, bias, _ in stages:
        reason = _why_not_stage(width, weight, bias)
        if reason is not None:
            return reason
        width = weight.shape[0]
    return None


def _why_not(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> str | None:
    return _why_not_chain(input, ((weight, bias, None),))


def _probe(x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, x)


def _twin(input: torch.Tensor, stages: Sequence[Stage]) -> torch.Tensor:
    for weight, bias, then in stages:
        input = F.linear(input, weight, bias)
        if then is not None:
            input = then.torch(input)
    return input


def _chain(input: torch.Tensor, stages: Sequence[Stage]) -> torch.Tensor:
    thens = tuple(stage[2] for stage in stages)
    x, *params = _dtypes.autocast(_probe, input, *(p for stage in stages for p in stage[:2]))
    assert x is not None
    if _dispatch.wants_grad(x, *params):
        return _Linear.apply(x, thens, *params)[0]  # type: ignore[index]
    # Of the outputs keep the last alone: each is freed as soon as the next one is there.
    return collections.deque(_forward(x, thens, params), maxlen=1).pop()


@accelerated(twin=F.linear, why_not=_why_not)
def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """input @ weight.T + bias. As torch.nn.functional.linear.

    Shape: input (*, in_features) with any leading dimensions or none, weight (out_features, in_features), bias
        (out_features,); the result (*, out_features), contiguous. All with any strides.
    Dtype: float16, bfloat16, float32, float64, the same for all; sums in float32 (float64). float32 obeys
        torch.backends.cuda.matmul.fp32_precision. Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets), and bias is None or (out_features,).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.linear.html
    """
    return _chain(input, ((weight, bias, None),))


@accelerated(twin=_twin, why_not=_why_not_chain)
def linear_chain(input: torch.Tensor, stages: Sequence[Stage]) -> torch.Tensor:
    """Linear layers and the activations between them, one kernel a layer in forward and two in backward.

    Shape: input (*, K); stages of (weight (N_i, N_i-1), bias (N_i,) or None, activation record or None).
    Dtype, Runs on Triton when, Raises: as `linear`, for all stages at once.
    """
    return _chain(input, stages)
