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
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import register_flop_formula

from . import conv, linear
from .pointwise import RECORDS, Pointwise

Tensors = Sequence[torch.Tensor | None]
Thens = tuple[Pointwise | None, ...]

_library = torch.library.Library("fastlayers", "DEF")


def _not_differentiable(name: str) -> None:
    """Give an operator a kernel for autograd that raises: without one its result would silently have no gradient."""
    operator = getattr(torch.ops.fastlayers, name).default

    def kernel(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tree_leaves(args)):
            raise RuntimeError(f"fastlayers::{name} can't be differentiated: it is a part of a function that can, once")
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    _library.impl(name, kernel, "Autograd")


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
    return list(linear._forward(tensors, _records(thens), linear._precision(tensors[0].dtype), keep))


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
    precision = linear._precision(tensors[0].dtype)
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


_not_differentiable("linear_chain")
_not_differentiable("linear_chain_backward")


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


# --- Conv2d ------------------------------------------------------------------------------------------------------------

_GEOMETRY = "int[] stride, int[] padding, int[] end, int[] dilation, int groups"
_library.define(
    f"conv2d(Tensor x, Tensor w, Tensor? b, str then, {_GEOMETRY}, bool? channels_last, Tensor?[] norm, float eps,"
    " Tensor? residual) -> Tensor"
)
_library.define(
    f"conv2d_backward(Tensor dy, Tensor? x, Tensor? w, Tensor? y, str then, {_GEOMETRY},"
    " SymInt[] x_shape, SymInt[] w_shape, bool[] formats, bool[] needs) -> Tensor[]"
)


def _geometry(
    stride: list[int], padding: list[int], end: list[int], dilation: list[int], groups: int
) -> conv._Geometry:
    s, p, e, d = ((first, second) for first, second in (stride, padding, end, dilation))
    return conv._Geometry(s, p, e, d, groups)


@torch.library.impl(_library, "conv2d", "CompositeExplicitAutograd")
def _conv2d(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, then: str,
    stride: list[int], padding: list[int], end: list[int], dilation: list[int], groups: int,
    channels_last: bool | None, norm: list[torch.Tensor | None], eps: float, residual: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    g = _geometry(stride, padding, end, dilation, groups)
    tensors = (x, w, b, residual, *norm)
    return conv._forward(
        tensors, _records([then])[0], g, channels_last, eps if norm else None, conv._precision(x.dtype)
    )[0]


@torch.library.register_fake("fastlayers::conv2d", lib=_library)
def _(
    x: torch.Tensor, w: torch.Tensor, b: Any, then: Any,
    stride: list[int], padding: list[int], end: list[int], dilation: list[int], groups: int,
    channels_last: bool | None, norm: Any, eps: Any, residual: Any,
) -> torch.Tensor:  # fmt: skip
    return conv._output(x, w, _geometry(stride, padding, end, dilation, groups), channels_last)


@torch.library.impl(_library, "conv2d_backward", "CompositeExplicitAutograd")
def _conv2d_backward(
    dy: torch.Tensor, x: torch.Tensor | None, w: torch.Tensor | None, y: torch.Tensor | None, then: str,
    stride: list[int], padding: list[int], end: list[int], dilation: list[int], groups: int,
    x_shape: list[int], w_shape: list[int], formats: list[bool], needs: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """Those of dx, dw and db that are needed."""
    g, record = _geometry(stride, padding, end, dilation, groups), _records([then])[0]
    both = torch.Size(x_shape), torch.Size(w_shape)
    options = record, g, *both, (formats[0], formats[1]), tuple(needs), conv._precision(dy.dtype)
    grads = conv._backward((dy, x, w, y), *options)
    return [grad for grad in grads if grad is not None]


@torch.library.register_fake("fastlayers::conv2d_backward", lib=_library)
def _(
    dy: torch.Tensor, x: Any, w: Any, y: Any, then: Any, stride: Any, padding: Any, end: Any, dilation: Any, groups: Any,
    x_shape: Any, w_shape: Any, formats: Any, needs: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    grads = conv._gradients(dy, x_shape, w_shape, formats, needs)
    return [g for g in grads if g is not None] + ([dy.new_empty(w_shape[:1])] if needs[2] else [])


def _conv_flops(y: Sequence[int], w: Sequence[int]) -> int:
    return 2 * math.prod(y) * math.prod(w[1:])


@register_flop_formula(torch.ops.fastlayers.conv2d)
def _(x: Any, w: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return _conv_flops(out_shape, w)


@register_flop_formula(torch.ops.fastlayers.conv2d_backward)
def _(dy: Sequence[int], *rest: Any, **__: Any) -> int:
    *_, w_shape, _formats, needs = rest
    return _conv_flops(dy, w_shape) * (needs[0] + needs[1])


_not_differentiable("conv2d")
_not_differentiable("conv2d_backward")


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None,
        then: Pointwise | None, g: Any, channels_last: bool | None,
    ) -> torch.Tensor:  # fmt: skip
        (name,), needs = _names((then,)), ctx.needs_input_grad[:3]
        geometry = g.stride, g.padding, g.end, g.dilation, g.groups
        y = torch.ops.fastlayers.conv2d(x, w, b, name, *geometry, channels_last, [], 0.0, None)
        ctx.options = name, *geometry, x.shape, w.shape
        ctx.formats, ctx.needs = [conv._is_channels_last(conv._images(x)), conv._is_channels_last(w)], needs
        ctx.save_for_backward(x if needs[1] else None, w if needs[0] else None, y if name else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = torch.ops.fastlayers.conv2d_backward(dy, *ctx.saved_tensors, *ctx.options, ctx.formats, ctx.needs)
        found = iter(grads)
        return (*[next(found) if needed else None for needed in ctx.needs], None, None, None)


def conv2d(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, then: Pointwise | None, g: Any, channels_last: bool | None,
    norm: Any, residual: torch.Tensor | None, grad: bool,
) -> torch.Tensor:  # fmt: skip
    """The convolution and what follows it as an operator, differentiable if `grad`."""
    if grad:
        return _Conv2d.apply(x, w, b, then, g, channels_last)  # type: ignore[return-value]
    geometry = g.stride, g.padding, g.end, g.dilation, g.groups
    *statistics, eps = norm or (0.0,)
    return torch.ops.fastlayers.conv2d(x, w, b, *_names((then,)), *geometry, channels_last, statistics, eps, residual)
