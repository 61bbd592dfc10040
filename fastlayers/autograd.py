"""The one autograd.Function of all operations, and what a forward leaves for its backward."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from . import _kernels, _torch, compiled
from .dispatch import support
from .values import Named, Needs, Out, Tensors

if TYPE_CHECKING:
    from .operation import Operation


class Plan:
    """What a forward and its backward need to know of a call. There is one object for all calls with the same signature, by which
    the backward's replay is looked up."""

    def __init__(self, op: Operation, tensors: Tensors, options: Any, needs: Needs):
        self.op, self.options, self.needs = op, options, needs
        self.like: Any = tuple([Out.like(t) for t in tensors])
        specs = op.outputs(op.named(tensors), options, needs)
        self.names = op.saves(op.named(tensors), options, needs)
        """What is saved."""
        places = {
            **{k: i for i, k in enumerate(op.names(len(tensors)))},
            **{k: len(tensors) + i for i, k in enumerate(specs)},
        }
        self.places = [places[k] for k in self.names]
        """Where that is, among the tensors followed by the outputs."""
        self.dtypes = _dtypes(self.names, dict(zip(op.names(len(tensors)), tensors, strict=True)), specs)
        """The dtype of each."""
        self.outputs = tuple(specs)
        self.results = op.results(options)
        differentiable = [not isinstance(s, Out) or s.differentiable for s in specs.values()]
        # A hidden output through which a second derivative passes is returned by the Function beside the results.
        self.returned = [
            i
            for i, (k, d) in enumerate(zip(specs, differentiable, strict=True))
            if i < self.results or (d and k in self.names)
        ]
        self.constant = [i for i in self.returned if not differentiable[i]]
        self.dirty = [places[s] for s in specs.values() if isinstance(s, str)]
        self.bumped = [i for i in op.bumped(tensors, options) if i not in self.dirty]
        self.edges = [
            sum(t is not None for t in tensors[:i]) if need and tensor is not None else -1
            for i, (need, tensor) in enumerate(zip(needs, tensors, strict=True))
        ]
        """Each tensor's index in the node's next_functions, or -1 where no gradient is needed."""
        self.only = needs if sum(needs) == 1 else None
        """The needs, where there is a single one: the engine doesn't run the node unless that one is asked for."""
        self.choose = operator.itemgetter(*self.places) if len(self.places) > 1 else None
        self.plain = self.returned == [*range(len(specs))] and not (self.constant or self.dirty or self.bumped)

    @classmethod
    def restored(cls, op: Operation, options: Any, like: Any, outputs: tuple[str, ...], names: tuple[str, ...]) -> Plan:
        """What the backward alone needs, where only the plan's description is left."""
        plan = object.__new__(cls)
        plan.op, plan.options, plan.like, plan.outputs, plan.names = op, options, like, outputs, names
        plan.results = op.results(options)
        plan.dtypes = _dtypes(names, dict(zip(op.names(len(like)), like, strict=True)), {})
        return plan


def _dtypes(names: Sequence[str], tensors: dict[str, Any], specs: dict[str, Any]) -> list[torch.dtype | None]:
    """The dtypes of tensors and outputs of these names; None where it isn't known."""
    found: list[torch.dtype | None] = []
    for name in names:
        spec = specs.get(name, tensors.get(name))
        found.append(getattr(tensors[spec] if isinstance(spec, str) else spec, "dtype", None))
    return found


class Function(torch.autograd.Function):
    """Every operation's. What is saved is always an argument, an output that is returned, or an output that no gradient passes
    through, so that second derivatives reach everything."""

    @staticmethod
    def forward(ctx: Any, op: Operation, options: Any, found: Any, *tensors: Any) -> tuple[Any, ...]:
        """`found`: the recording of a call with the same signature, if there is one."""
        ctx.set_materialize_grads(False)
        if is_dynamo_compiling():
            return compiled.forward(ctx, op, options, tensors)
        outputs = plan = recording = None
        if found is not None:
            recording, addresses, _ = found
            outputs, plan = recording.play(tensors, addresses), recording.memo
        if outputs is None:
            outputs = op._forward(tensors, options, True, op._precision(tensors[op.main].dtype))
        if plan is None:
            plan = op.plan(tensors, options, ctx.needs_input_grad[3:])
            if recording is not None:
                recording.memo = plan  # always the same for this signature
        ctx.plan = plan
        pool = (*tensors, *outputs)
        if plan.choose is not None:
            ctx.save_for_backward(*plan.choose(pool))
        elif plan.places:
            ctx.save_for_backward(pool[plan.places[0]])
        if plan.plain:
            return outputs
        if plan.dirty:
            ctx.mark_dirty(*[pool[i] for i in plan.dirty])
        if plan.constant:
            ctx.mark_non_differentiable(*[outputs[i] for i in plan.constant])
        for i in plan.bumped:
            torch.autograd.graph.increment_version(pool[i])
        return tuple([outputs[i] for i in plan.returned])

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> tuple[Any, ...]:
        plan = ctx.plan
        if is_dynamo_compiling():  # of a node that was made eagerly, too, under compiled autograd
            return (None, None, None, *compiled.backward(ctx, plan, dys))
        op, count = plan.op, plan.results
        if dys[0] is None and all([d is None for d in dys]):  # dys.count(None) would compare tensors, 50 us each
            return (None,) * len(ctx.needs_input_grad)
        needs = plan.only or _asked_for(ctx, plan.edges)
        if count > 1 and any([d is None for d in dys[:count]]):
            needs = op.reached(
                [plan.outputs[i] for i, d in zip(plan.returned, dys, strict=True) if d is not None], needs
            )
        saved = ctx.saved_tensors if plan.places else ()  # which raises in a second backward, even if nothing was saved
        grads = None
        # A hidden output has a gradient in a second derivative alone.
        if len(dys) == count or all([d is None for d in dys[count:]]):
            grads = _launched(op, (*dys[:count], *saved), plan, needs)
        if grads is None:
            dy = Named({plan.outputs[i]: d for i, d in zip(plan.returned, dys, strict=True)})
            grads = op.differentiate(dy, Named(zip(plan.names, saved, strict=True)), plan.like, plan.options, needs)
        return (None, None, None, *grads)


def _asked_for(ctx: Any, edges: Sequence[int]) -> Needs:
    """Which gradients this very backward must give: torch.autograd.grad may ask for a few of those that require one."""
    nodes, will_run = ctx.next_functions, _torch.will_run
    return tuple([edge >= 0 and will_run(nodes[edge][0]) for edge in edges])


def _launched(op: Operation, tensors: Tensors, plan: Plan, needs: Needs) -> Tensors | None:
    """The gradients by the kernels; None if they must be made of torch's functions: for a second derivative grad mode is on,
    and a batched gradient or a mode can't look into a kernel."""
    if torch.is_grad_enabled() or not _torch.unseen():
        return None
    options = plan, needs, op._precision(plan.like[op.main].dtype)
    grads = op._backward.replay(tensors, options)
    if grads is not None:
        return grads
    # Hooks on saved tensors may have made anything of them.
    expected = zip(tensors[plan.results :], plan.dtypes, strict=True)
    if any([t is not None and dtype is not None and t.dtype is not dtype for t, dtype in expected]):
        return None
    if any([t is not None and _torch.is_batched(t) for t in tensors[: plan.results]]):
        return None
    # What was drawn may lie in host memory.
    names = (*plan.outputs[: plan.results], *plan.names)
    if support.unusable([t for t, name in zip(tensors, names, strict=True) if name != "seed"]):
        return None
    try:
        return op._backward(tensors, *options)
    except _kernels.OutOfResources as error:
        support.fell_back(f"{op.label(plan.options)} backward", support.out_of_resources(error))
        return None


apply = _torch.applying(Function)
"""Function.apply, for calls whose launches are replayed."""
