"""Linear layers, alone or in a chain with their activations:

x (*, K), W (N, K), b (N,) -> z = x W^T + b, y = f(z) (*, N)
dz = f'(y) dy, dx = dz W, dW = dz^T x, db = sum of dz over rows
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from .. import _dispatch, _dtypes
from .._dispatch import BadInput, accelerated, replayable
from .pointwise import Pointwise

if TYPE_CHECKING or _dispatch.MISSING is None:
    from ..kernels import _launch
    from ..kernels._replay import NOTHING, Found, is_plain, something
    from ..kernels.matmul import matmul
    from ..kernels.reduce import activation_grad

Stage = tuple[torch.Tensor, torch.Tensor | None, Pointwise | None]
"""Weight, bias and the activation that follows, of one layer in a chain."""
Thens = tuple[Pointwise | None, ...]
Tensors = Sequence[torch.Tensor | None]


_LONE: Thens = (None,)


def _undo(then: Pointwise | None, saved: torch.Tensor | None) -> tuple[str, torch.Tensor] | None:
    return None if then is None or saved is None else (then.name, saved)


@replayable
def _forward(tensors: Tensors, thens: Thens, precision: str, keep: bool) -> tuple[torch.Tensor, ...]:
    """Of x and the parameters, the outputs of the stages, one kernel each: matrices, but for the last, which has x's
    leading dimensions. Without `keep` the last alone: each of the others is freed as soon as the next one is there."""
    x, *params = tensors
    assert x is not None
    rows = x.shape[:-1].numel()
    hidden = x.reshape(rows, x.shape[-1])
    outputs: list[torch.Tensor] = []
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
        outputs = [*outputs, output] if keep else [output]
    return tuple(outputs)


class _Plan(NamedTuple):
    """What follows, for forward and backward, from which tensors there are and which of their gradients may be asked for."""

    thens: Thens
    choose: Callable[[tuple[Any, ...]], tuple[torch.Tensor | None, ...]] | None
    """Of None, x, the parameters and the outputs: those to save, as x, weights, outputs, or None in its place. None if
    there are none: nothing is saved for a bias alone, and such a graph may be gone through twice, as torch's."""
    hidden: tuple[int, ...]
    """Which outputs but the last are among them."""
    edges: tuple[int, ...]
    """Of x and the parameters; see `_dispatch.edges`."""
    x_shape: torch.Size


def _keeps(thens: Thens, needs: Sequence[bool], flows: Sequence[bool], i: int) -> bool:
    """Whether backward needs the output of stage i: for its activation's derivative, or the next weight's gradient."""
    return (thens[i] is not None and flows[i + 1]) or (i + 1 < len(thens) and needs[3 + 2 * i])


def _plan(thens: Thens, needs: Sequence[bool], tensors: Tensors) -> _Plan:
    """Of x and the parameters of each stage: `needs` says whose gradients may be asked for."""
    count = len(thens)
    flows = _flows(needs)
    kept = [_keeps(thens, needs, flows, i) for i in range(count)]
    first = 2 + 2 * count
    weights = [2 + 2 * i if flows[i] else 0 for i in range(count)]
    outputs = [first + i if kept[i] else 0 for i in range(count)]
    places = (1 if needs[1] else 0, *weights, *outputs)
    hidden = tuple([i for i in range(count - 1) if kept[i]])
    choose = operator.itemgetter(*places) if any(places) else None
    x = cast(torch.Tensor, tensors[0])
    return _Plan(thens, choose, hidden, _dispatch.edges(needs, tensors), x.shape)


class _Linear(torch.autograd.Function):
    """x (*, K), then W_i (N_i, N_i-1) and b_i (N_i,) of each stage -> y (*, N), and the hidden outputs worth keeping.

    In backward, the product that makes a stage's dx also applies the derivative of the activation before it, and the one
    that makes its dW adds up its bias gradient, so that nothing between two layers runs on its own.

    The hidden outputs are returned, though nobody takes them, because what is saved must be an input or an output for
    second derivatives to reach it.
    """

    @staticmethod
    def forward(
        ctx: Any, thens: Thens, found: Found | None, x: torch.Tensor, *params: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        tensors = (x, *params)
        outputs = found and found[0].play(tensors, found[1])
        plan = found and found[0].memo
        if outputs is None:
            outputs = _forward(tensors, thens, _precision(x.dtype), len(thens) > 1)
        if plan is None:
            plan = _plan(thens, ctx.needs_input_grad[2:], tensors)
            if found is not None:  # for whose kind of tensors it is always the same
                found[0].memo = plan
        choose, hidden = plan.choose, plan.hidden
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        if choose is not None:
            ctx.save_for_backward(*choose((None, *tensors, *outputs)))
        if not hidden:
            return (outputs[-1],)
        return (outputs[-1], *[outputs[i] for i in hidden])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, *dhidden: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None and all(d is None for d in dhidden):
            return (None,) * len(ctx.needs_input_grad)
        thens, choose, hidden, edges, x_shape = ctx.plan
        needs = _dispatch.asked_for(ctx, edges)
        saved = ctx.saved_tensors if choose is not None else (None,) * (1 + 2 * len(thens))
        # A hidden output has a gradient of its own only in a second derivative.
        if dy is None or dhidden.count(None) != len(dhidden):
            grads = None
        else:
            options = thens, x_shape, needs, _precision(dy.dtype)
            grads = _dispatch.backward(_backward, (dy, *saved), options, dy)
        if grads is None:
            extra = dict(zip(hidden, dhidden, strict=True))
            grads = _backward_torch(dy, extra, saved, thens, x_shape, needs)
        return (None, None, *grads)


def _precision(dtype: torch.dtype) -> str:
    return _dtypes.matmul_precision() if dtype is torch.float32 else "ieee"


def _flows(needs: Sequence[bool]) -> list[bool]:
    """For every stage, and at last the end: whether the gradient has to reach its input, because x or a parameter of a
    stage before it wants one."""
    flows = [needs[0]]
    for i in range(1, len(needs), 2):
        flows.append(flows[-1] or needs[i] or needs[i + 1])
    return flows


def _matrix(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return tensor.reshape(rows, tensor.shape[-1])


@replayable
def _backward(
    tensors: Tensors, thens: Thens, x_shape: torch.Size, needs: tuple[bool, ...], precision: str
) -> tuple[torch.Tensor | None, ...]:
    """Of dy and what was saved, the gradients of x and the parameters, as far as needed."""
    count, rows = len(thens), x_shape[:-1].numel()
    dy, x = tensors[:2]
    weights = tensors[2 : 2 + count]
    outputs = [None if h is None else _matrix(h, rows) for h in tensors[2 + count :]]
    assert dy is not None
    dtype, flows, last = dy.dtype, _flows(needs), count - 1
    grads: list[torch.Tensor | None] = [None] * len(needs)

    def column_sums(i: int) -> torch.dtype | None:
        """A bias gradient that no weight gradient carries."""
        return dtype if needs[2 + 2 * i] and not needs[1 + 2 * i] else None

    saved = outputs[last]
    dz, grads[2 + 2 * last] = activation_grad(
        dy.reshape(1, rows, dy.shape[-1]),
        undo=_undo(thens[last], None if saved is None else saved[None]),
        column_sums=column_sums(last),
    )
    dz = dz[0]
    for i in range(last, -1, -1):
        weight = weights[i]
        if needs[1 + 2 * i]:
            source = _matrix(cast(torch.Tensor, x), rows) if i == 0 else outputs[i - 1]
            assert source is not None
            grads[1 + 2 * i], grads[2 + 2 * i] = matmul(
                dz.T, source, operand_sums=dtype if needs[2 + 2 * i] else None, precision=precision
            )
        if i > 0 and flows[i]:
            assert weight is not None
            dz, grads[2 * i] = matmul(
                dz, weight, undo=_undo(thens[i - 1], outputs[i - 1]), column_sums=column_sums(i - 1), precision=precision
            )  # fmt: skip
    if needs[0]:
        assert weights[0] is not None
        grads[0] = _launch.empty(x_shape, dtype=dtype, device=dy.device)
        matmul(dz, weights[0], out=_matrix(grads[0], rows), precision=precision)
    return tuple(grads)


def _backward_torch(
    dy: torch.Tensor | None,
    dhidden: dict[int, torch.Tensor | None],
    saved: Tensors,
    thens: Thens,
    x_shape: torch.Size,
    needs: tuple[bool, ...],
) -> list[torch.Tensor | None]:
    """The same in differentiable functions of torch."""
    count, rows = len(thens), x_shape[:-1].numel()
    x, *rest = saved
    weights: Any = rest[:count]
    outputs: Any = [None if h is None else _matrix(h, rows) for h in rest[count:]]
    flows, last = _flows(needs), count - 1
    grads: list[torch.Tensor | None] = [None] * len(needs)
    with torch.autocast(next(d for d in (dy, *dhidden.values()) if d is not None).device.type, enabled=False):
        dh = None if dy is None else _matrix(dy, rows)
        for i in range(last, -1, -1):
            extra = dhidden.get(i)
            if extra is not None:
                dh = extra if dh is None else dh + extra
            if dh is None:
                continue
            then = thens[i]
            dz = then.torch_grad(dh, outputs[i]) if then and flows[i + 1] else dh
            if needs[2 + 2 * i]:
                grads[2 + 2 * i] = dz.sum(0)
            if needs[1 + 2 * i]:
                grads[1 + 2 * i] = dz.T @ (_matrix(cast(torch.Tensor, x), rows) if i == 0 else outputs[i - 1])
            dh = dz @ weights[i] if flows[i] else None
        if needs[0] and dh is not None:
            grads[0] = dh.reshape(x_shape)
    return grads


def _why_not_stage(width: int, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    if weight.dim() != 2:
        return f"a weight with {weight.dim()} dimensions"
    if weight.shape[1] != width:
        return BadInput(f"{width} features for a weight of {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        return BadInput(f"a bias of {tuple(bias.shape)} for a weight of {tuple(weight.shape)}")
    return None


def _why_not_chain(input: torch.Tensor, stages: Sequence[Stage]) -> str | None:
    tensors = [input]
    for weight, bias, _ in stages:
        tensors += (weight,) if bias is None else (weight, bias)
    reason = _dispatch.why_not(*tensors, autocast=_probe)
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
    thens = tuple([stage[2] for stage in stages])
    tensors = _dtypes.autocast(_probe, *_tensors(input, stages))
    x = cast(torch.Tensor, tensors[0])
    grad = _dispatch.wants_grad(*tensors)
    if torch.compiler.is_compiling():
        from . import traced  # which imports this file

        return traced.linear_chain(tensors, thens, grad)
    if grad:
        return _Linear.apply(thens, None, *tensors)[0]  # type: ignore[index]
    return _forward(tensors, thens, _precision(x.dtype), False)[-1]


def _tensors(input: torch.Tensor, stages: Sequence[Stage]) -> list[torch.Tensor | None]:
    tensors: list[torch.Tensor | None] = [input]
    for weight, bias, _ in stages:
        tensors += (weight, bias)
    return tensors


_apply = _dispatch.applying(_Linear)


def _again(tensors: Tensors, present: Sequence[torch.Tensor], thens: Thens) -> torch.Tensor | None:
    x = present[0]
    if not is_plain(x):
        return None
    keep = len(thens) > 1 and torch.is_grad_enabled()
    if torch._C._is_any_autocast_enabled():
        dtype = _dtypes.after_autocast(_probe, x)
        if not all(map(is_plain, present)) or not _forward.expects(x, (thens, _precision(dtype), keep)):
            return None
        tensors = _dtypes.autocast(_probe, *tensors)
        present = something(tensors)
    precision = _precision(present[0].dtype)
    found = _forward.find(present, (thens, precision, keep))
    if found is None and keep:  # nothing may require grad
        found = _forward.find(present, (thens, precision, False))
        found = None if found is None or found[2] else found
    if found is None:
        return None
    if found[2] and torch.is_grad_enabled():
        return _apply(thens, found, *tensors)[0]
    results = found[0].play(present, found[1])
    return None if results is None else results[-1]


def _linear_again(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    tensors = (input, weight, bias)
    return _again(tensors, (input, weight, NOTHING[2]) if bias is None else tensors, _LONE)  # type: ignore[arg-type]


def _chain_again(input: torch.Tensor, stages: Sequence[Stage]) -> torch.Tensor | None:
    tensors = _tensors(input, stages)
    return _again(tensors, something(tensors), tuple([stage[2] for stage in stages]))


@accelerated(twin=F.linear, why_not=_why_not, again=_linear_again, traceable=True)
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


@accelerated(twin=_twin, why_not=_why_not_chain, again=_chain_again, traceable=True)
def linear_chain(input: torch.Tensor, stages: Sequence[Stage]) -> torch.Tensor:
    """Linear layers and the activations between them, one kernel a layer in forward and two in backward.

    Shape: input (*, K); stages of (weight (N_i, N_i-1), bias (N_i,) or None, activation record or None).
    Dtype, Runs on Triton when, Raises: as `linear`, for all stages at once.
    """
    return _chain(input, stages)
