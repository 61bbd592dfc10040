"""Inside torch.compile: each operation is an operator of torch that Dynamo, AOTAutograd and Inductor keep whole.

    fastlayers::layer_norm(Tensor?[] tensors, SymInt[] ints, float[] floats, str call) -> Tensor[]
    fastlayers::layer_norm_backward(Tensor?[] tensors, SymInt[] ints, float[] floats, str call) -> Tensor[]

One schema serves all: `call` is the options written as a literal in which every number is a place in one of the lists, since
with dynamic sizes numbers are symbols. Operators are functional: a tensor that an operation writes into is cloned, returned as a
further result, and copied into its place outside of the operator.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _torch, autograd
from .dispatch.support import wants_grad
from .values import Named, Numbers, Out, decode, encode

if TYPE_CHECKING:
    from .operation import Operation


def _own_library() -> torch.library.Library:
    """A library of operators under a new name. torch's registry outlives this module: if the package is imported a second time,
    the operators of the first import still exist under their names, and models compiled then still call them."""
    for i in range(1, 1000):
        with contextlib.suppress(RuntimeError):
            return torch.library.Library("fastlayers" if i == 1 else f"fastlayers_{i}", "DEF")
    raise RuntimeError("no name is left for the operators of fastlayers")


_library = _own_library()
_SCHEMA = "(Tensor?[] tensors, SymInt[] ints, float[] floats, str call) -> Tensor[]"


def _written(*parts: Any) -> tuple[list[Any], list[Any], str]:
    """The parts of a call, encoded as an operator's last three arguments: ints, floats, call."""
    numbers = Numbers()
    text = encode(parts, numbers)
    return numbers.ints, numbers.floats, text


# --- what Dynamo traces ------------------------------------------------------------------------------------------------------


def call(op: Operation, tensors: Sequence[Any], options: Any, joined: bool = False) -> Any:
    """As Operation.run, but with a call of the operator instead of launches."""
    if not op.compiled or _torch.below_autograd is None or op.reason_against(tensors, options) is not None:
        return None if joined else op.reference(*tensors, *options)
    if _torch.any_autocast():
        tensors, options = op.prepare(tensors, options)
    if op._random:
        tensors = (*tensors, op.draw(tensors, options))
    if wants_grad(*tensors):
        outputs: Any = autograd.Function.apply(op, options, None, *_distinct(tensors))
    else:
        outputs = op.operator(list(tensors), *_written(tuple(options), None))
    written = op.written(tensors, options)
    for i, new in zip(written, outputs[len(outputs) - len(written) :], strict=True):
        tensors[i].copy_(new)
    return op._results(outputs, options)


def _distinct(tensors: Sequence[Any]) -> list[Any]:
    """The same tensors. One that comes twice becomes a view the second time: Dynamo accepts no tensor twice in a Function."""
    found: list[Any] = []
    for t in tensors:
        found.append(t if t is None or all([t is not other for other in found]) else t.view_as(t))
    return found


def forward(ctx: Any, op: Operation, options: Any, tensors: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """The autograd.Function's forward. It doesn't return the hidden outputs, which only second derivatives need: what AOTAutograd
    traces has none."""
    needs = ctx.needs_input_grad[3:]
    ctx.plan = plan = autograd.Plan(op, tensors, options, needs)
    outputs = op.operator(list(tensors), *_written(tuple(options), needs))
    pool = (*tensors, *outputs)
    ctx.save_for_backward(*[pool[i] for i in plan.places])
    copies = outputs[len(plan.outputs) :]
    ctx.mark_non_differentiable(*[outputs[i] for i in plan.constant if i < plan.results], *copies)
    return (*outputs[: plan.results], *copies)


def backward(ctx: Any, plan: autograd.Plan, dys: Sequence[Any]) -> list[Any]:
    """The autograd.Function's backward."""
    if plan.op.backward_operator is None:  # the forward ran eagerly, and compiled autograd traces the backward
        dy = Named([(plan.outputs[i], d) for i, d in zip(plan.returned, dys, strict=True)])
        saved = Named(zip(plan.names, ctx.saved_tensors, strict=True))
        return [*plan.op.differentiate(dy, saved, plan.like, plan.options, plan.needs)]
    dys = dys[: plan.results]
    text = _written(tuple(plan.options), plan.like, plan.outputs, plan.names, plan.needs)
    found = iter(plan.op.backward_operator([*dys, *ctx.saved_tensors], *text))
    specs = plan.op.gradients(plan.op.named(plan.like), plan.options, plan.needs)
    grads = [None if o is None or isinstance(o, int) else next(found) for o in specs]
    return [grads[o] if isinstance(o, int) else g for o, g in zip(specs, grads, strict=True)]


# --- what runs -----------------------------------------------------------------------------------------------------------------


def register(op: Operation) -> None:
    """Make the two operators: each with a real kernel, a fake one, a FLOP formula, and an error if it is differentiated."""
    if _torch.below_autograd is None:
        return

    def read(call: Sequence[Any], real: bool = False) -> tuple[Any, ...]:
        """The options, and whatever else was written. `real`: options as `op.options` keeps them, by which replays are looked
        up; numbers that are symbols can't be hashed."""
        ints, floats, text = call
        options, *rest = decode(text, Numbers(ints, floats))
        return (op.options if real else op.Options)(*options), *rest

    def real(tensors: list[Any], *call: Any) -> list[torch.Tensor]:
        options, needs = read(call, real=True)
        written = op.written(tensors, options)
        tensors = [t.clone() if i in written else t for i, t in enumerate(tensors)]
        outputs = op._forward(tensors, options, needs or False, op._precision(tensors[op.main].dtype))
        return [*outputs, *[tensors[i] for i in written]]

    def fake(tensors: list[Any], *call: Any) -> list[torch.Tensor]:
        options, needs = read(call)
        outputs = op.outputs(op.named(tensors), options, needs).values()
        copies = [torch.empty_like(tensors[i]) for i in op.written(tensors, options)]
        return [*[_empty(tensors, o) for o in outputs], *copies]

    @functools.lru_cache(maxsize=4096)
    def plan(*call: Any) -> tuple[autograd.Plan, Any]:
        """The plan and the needs that the arguments describe. Equal arguments give one object, by which a replay is found."""
        options, like, outputs, names, needs = read(call, real=True)
        return autograd.Plan.restored(op, options, like, outputs, names), needs

    def real_backward(tensors: list[Any], *call: Any) -> list[torch.Tensor]:
        found, needs = plan(tuple(call[0]), tuple(call[1]), call[2])
        grads = op._backward(tensors, found, needs, op._precision(found.like[op.main].dtype))
        specs = op.gradients(op.named(found.like), found.options, needs)
        return [g for g, o in zip(grads, specs, strict=True) if isinstance(o, Out)]

    def fake_backward(tensors: list[Any], *call: Any) -> list[torch.Tensor]:
        options, like, _, _, needs = read(call)
        return [_empty(tensors, o) for o in op.gradients(op.named(like), options, needs) if isinstance(o, Out)]

    def flops(tensors: list[Any], *call: Any, **_: Any) -> int:
        options, _needs = read(call)
        shapes = [shape if shape is None else Out(tuple(shape), torch.float32) for shape in tensors]
        return op.flops(op.named(shapes), options, None)

    def flops_backward(tensors: list[Any], *call: Any, **_: Any) -> int:
        options, like, _, _, needs = read(call)
        return op.flops(op.named(like), options, needs)

    op.operator = _operator(op.name, real, fake, flops)
    op.backward_operator = _operator(f"{op.name}_backward", real_backward, fake_backward, flops_backward)


def _operator(name: str, kernel: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int]) -> Any:
    _library.define(name + _SCHEMA)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_library.ns}::{name}", fake, lib=_library)
    packet = getattr(getattr(torch.ops, _library.ns), name)
    register_flop_formula(packet)(flops)
    _library.impl(name, _refusing(packet.default, name), "Autograd")
    return packet.default


def _empty(tensors: Sequence[Any], out: Any) -> torch.Tensor:
    some = next(t for t in tensors if t is not None)
    if out.strides is None:
        return some.new_empty(out.shape, dtype=out.dtype)
    return some.new_empty_strided(out.shape, out.strides, dtype=out.dtype)


def _refusing(operator: Any, name: str) -> Callable[..., Any]:
    """An operator's kernel for autograd, which raises: without one its result would silently have no gradient."""

    def kernel(tensors: list[Any], *call: Any) -> Any:
        if wants_grad(*tensors):
            raise RuntimeError(
                f"fastlayers::{name} can't be differentiated: it is a part of a function that can be differentiated once"
            )
        assert _torch.below_autograd is not None
        with _torch.below_autograd():
            return operator(tensors, *call)

    return kernel
