"""y = f(x), one element at a time; dx = f'(x) dy, computed from what the record says is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from .. import _dispatch
from .._dispatch import BadInput, accelerated, replayable

if TYPE_CHECKING or _dispatch.MISSING is None:
    from ..kernels._replay import Found, is_plain
    from ..kernels.pointwise import pointwise, pointwise_grad


@dataclass(frozen=True, eq=False)  # one object for each activation: compared and hashed as such
class Pointwise:
    """An activation as data: it drives the kernel of its own, every producer's epilogue, the torch twin and the tests.

    Args:
        name: of its pair of tile functions in kernels/epilogues.py, `name(x)` and `name_grad(dy, saved)`.
        torch: y from x.
        torch_grad: dx from (dy, saved), in differentiable functions of torch.
        saves: what the derivative needs. Only one that needs no more than its output can join a producer's kernel.
    """

    name: str
    torch: Callable[[torch.Tensor], torch.Tensor]
    torch_grad: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    saves: Literal["input", "output"]

    def __post_init__(self) -> None:
        RECORDS[self.name] = self


RECORDS: dict[str, Pointwise] = {}
"""Every activation by its name, for operators of torch, which take strings and no objects."""


RELU = Pointwise("relu", torch.relu, lambda dy, y: torch.ops.aten.threshold_backward(dy, y, 0), saves="output")


@replayable
def _forward(tensors: Sequence[torch.Tensor | None], record: Pointwise, inplace: bool) -> tuple[torch.Tensor, ...]:
    (x,) = tensors
    assert x is not None
    return (pointwise(x, record.name, inplace=inplace),)


@replayable
def _backward(tensors: Sequence[torch.Tensor | None], record: Pointwise) -> tuple[torch.Tensor, ...]:
    dy, saved = tensors
    assert dy is not None and saved is not None
    return (pointwise_grad(dy, saved, record.name),)


class _Pointwise(torch.autograd.Function):
    """x (*) -> y (*) = f(x); dx = f_grad(dy, x or y)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, record: Pointwise, inplace: bool, found: Found | None) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.record = record
        if inplace:
            ctx.mark_dirty(x)
        results = found and found[0].play((x,), found[1])
        (y,) = results or _forward((x,), record, inplace)
        ctx.save_for_backward(y if record.saves == "output" else x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        (saved,) = ctx.saved_tensors
        results = _dispatch.backward(_backward, (dy, saved), (ctx.record,), dy)
        if results is None:
            results = (ctx.record.torch_grad(dy, saved),)
        return (*results, None, None, None)


_apply = _dispatch.applying(_Pointwise)


def apply(input: torch.Tensor, record: Pointwise, inplace: bool = False) -> torch.Tensor:
    """The body of every activation's door."""
    if _dispatch.wants_grad(input):
        return _Pointwise.apply(input, record, inplace, None)  # type: ignore[return-value]
    version = 0 if input.is_inference() else input._version
    (y,) = _forward((input,), record, inplace)
    if inplace and not input.is_inference() and input._version == version:
        torch.autograd.graph.increment_version(input)  # kernels write behind autograd's back
    return y


def again(input: torch.Tensor, record: Pointwise) -> torch.Tensor | None:
    """The result for an input like one before, of every activation's door; None if there was none."""
    found = _forward.find((input,), (record, False)) if is_plain(input) else None
    if found is None:
        return None
    if found[2] and torch.is_grad_enabled():
        return _apply(input, record, False, found)
    results = found[0].play((input,), found[1])
    return None if results is None else results[0]


def why_not(input: torch.Tensor, inplace: bool = False) -> str | None:
    """What speaks against the kernel for an activation."""
    reason = _dispatch.why_not(input)
    if reason is not None or not inplace:
        return reason
    if input.is_inference() and not torch.is_inference_mode_enabled():
        return BadInput("writing into an inference tensor")
    if any(stride == 0 and size > 1 for stride, size in zip(input.stride(), input.shape, strict=True)):
        return BadInput("writing into a tensor whose elements share memory")
    if _dispatch.wants_grad(input):
        if input.is_leaf:
            return BadInput("writing into a leaf that requires grad")
        if input._is_view():
            return "writing into a view that requires grad"
    return None


def _relu_again(input: torch.Tensor, inplace: bool = False) -> torch.Tensor | None:
    return None if inplace else again(input, RELU)


@accelerated(twin=torch.nn.functional.relu, why_not=why_not, again=_relu_again)
def relu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """max(input, 0), NaN staying NaN. As torch.nn.functional.relu.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64; others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets), and, with `inplace`, is not a view
        that requires grad.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.relu.html
    """
    return apply(input, RELU, inplace)
