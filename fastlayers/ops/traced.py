"""Products inside torch.compile: operators that Dynamo, AOTAutograd and Inductor keep whole, and that call the kernels when
the compiled graph runs.

Each has a fake kernel, which knows sizes and strides, and a real one: the function of tensors that eager calls run too. The
Functions are what Dynamo traces; they leave out what eager alone needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import linear
from .pointwise import RECORDS, Pointwise

Tensors = Sequence[torch.Tensor | None]
Thens = tuple[Pointwise | None, ...]

_library = torch.library.Library("fastlayers", "DEF")


def _records(names: Sequence[str]) -> Thens:
    return tuple([RECORDS[name] if name else None for name in names])


def _names(thens: Thens) -> list[str]:
    return ["" if then is None else then.name for then in thens]


# --- chains of Linear --------------------------------------------------------------------------------------------------

_library.define("linear_chain(Tensor?[] tensors, str[] thens, bool keep) -> Tensor[]")
_library.define(
    "linear_chain_backward(Tensor?[] tensors, str[] thens, SymInt[] x_shape, SymInt[] widths, bool[] needs) -> Tensor[]"
)


@torch.library.impl(_library, "linear_chain", "CompositeExplicitAutograd")
def _linear_chain(tensors: Tensors, thens: list[str], keep: bool) -> list[torch.Tensor]:
    """The outputs of the stages, or the last alone."""
    assert tensors[0] is not None
    return list(linear._forward(tensors, _records(thens), linear._precision(tensors[0]), keep))


@torch.library.register_fake("fastlayers::linear_chain", lib=_library)
def _(tensors: Tensors, thens: list[str], keep: bool) -> list[torch.Tensor]:
    x, *params = tensors
    assert x is not None
    widths = [weight.shape[0] for weight in params[::2] if weight is not None]
    rows = math.prod(x.shape[:-1])  # Size.numel would fix unknown sizes
    hidden = [x.new_empty((rows, width)) for width in widths[:-1]] if keep else []
    return [*hidden, x.new_empty((*x.shape[:-1], widths[-1]))]


@torch.library.impl(_library, "linear_chain_backward", "CompositeExplicitAutograd")
def _linear_chain_backward(
    tensors: Tensors, thens: list[str], x_shape: list[int], widths: list[int], needs: list[bool]
) -> list[torch.Tensor]:
    """Of dy and what was saved, the gradients of those of x and the parameters that need one."""
    assert tensors[0] is not None
    precision = linear._precision(tensors[0])
    grads = linear._backward(tensors, _records(thens), torch.Size(x_shape), tuple(needs), precision)
    return [grad for grad in grads if grad is not None]


@torch.library.register_fake("fastlayers::linear_chain_backward", lib=_library)
def _(
    tensors: Tensors, thens: list[str], x_shape: list[int], widths: list[int], needs: list[bool]
) -> list[torch.Tensor]:
    dy = tensors[0]
    assert dy is not None
    shapes: list[Sequence[int]] = [x_shape]
    for width, last in zip(widths, [x_shape[-1], *widths], strict=False):
        shapes += (width, last), (width,)
    return [dy.new_empty(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]


@register_flop_formula(torch.ops.fastlayers.linear_chain)
def _(tensors: Sequence[Any], *_: Any, **__: Any) -> int:
    """As FlopCounterMode counts torch's products. Given shapes in the place of tensors."""
    x, *params = tensors
    rows = math.prod(x[:-1])
    return sum(2 * rows * n * k for n, k in params[::2])


@register_flop_formula(torch.ops.fastlayers.linear_chain_backward)
def _(
    tensors: Sequence[Any], thens: Any, x_shape: Sequence[int], widths: list[int], needs: list[bool], **_: Any
) -> int:
    rows, flows = math.prod(x_shape[:-1]), linear._flows(needs)
    sizes = [2 * rows * n * k for n, k in zip(widths, [x_shape[-1], *widths], strict=False)]
    return sum(size * (needs[1 + 2 * i] + flows[i]) for i, size in enumerate(sizes))


class _LinearChain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, thens: Thens, *tensors: torch.Tensor | None) -> torch.Tensor:
        outputs = torch.ops.fastlayers.linear_chain(tensors, _names(thens), True)
        x, *params = tensors
        assert x is not None
        needs = ctx.needs_input_grad[1:]
        flows = linear._flows(needs)
        ctx.thens, ctx.x_shape, ctx.needs = thens, x.shape, needs
        ctx.widths = [output.shape[-1] for output in outputs]
        ctx.save_for_backward(
            x if needs[1] else None,
            *[params[2 * i] if flows[i] else None for i in range(len(thens))],
            *[output if linear._keeps(thens, needs, flows, i) else None for i, output in enumerate(outputs)],
        )
        return outputs[-1]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        arguments = _names(ctx.thens), ctx.x_shape, ctx.widths, ctx.needs
        grads = torch.ops.fastlayers.linear_chain_backward((dy, *ctx.saved_tensors), *arguments)
        found = iter(grads)
        return (None, *[next(found) if needed else None for needed in ctx.needs])


def linear_chain(tensors: Tensors, thens: Thens, grad: bool) -> torch.Tensor:
    """The chain as operators, differentiable if `grad`."""
    if grad:
        return _LinearChain.apply(thens, *tensors)  # type: ignore[return-value]
    return torch.ops.fastlayers.linear_chain(tensors, _names(thens), False)[0]
