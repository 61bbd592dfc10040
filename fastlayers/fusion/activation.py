"""An activation that a model calls as a function."""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from .. import _torch_functional as F
from .. import functional
from ..ops.activation import CALLS, Activation, _pointwise
from .plan import Role, register_role


class Applied(NamedTuple):
    """Stands in a row of layers for a call of an activation's function."""

    activation: Activation
    written_out: bool = False
    """Whether the model writes it as an expression, which takes integers, too: torch's functions refuse them."""

    @property
    def label(self) -> str:
        return self.activation.function

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _pointwise((as_floating(x) if self.written_out else x,), self.activation, False)


def as_floating(x: torch.Tensor) -> torch.Tensor:
    """What torch's operators compute with when they are given a tensor and a floating number."""
    return x if x.is_floating_point() or x.is_complex() else x.to(torch.get_default_dtype())


register_role(Applied, Role("activation", of=lambda call: call.activation if call.activation.joins else None))


def layer_of(part: Any) -> Any:
    """What stands in a row for a part of a call: a module, or an activation that a model calls as a function or, behind the word
    "expression", writes out."""
    if isinstance(part, Activation):
        return Applied(part)
    return Applied(part[1], written_out=True) if isinstance(part, tuple) else part


def called(function: Any) -> Any:
    """What stands in a row for a module or a function that the model calls with one tensor: an activation's value for torch's
    functions and ours, otherwise the very thing."""
    if is_dynamo_compiling() or not isinstance(function, types.FunctionType | types.BuiltinFunctionType):
        return function
    name = function.__name__
    if name not in ("relu", "gelu") or function not in (getattr(F, name), getattr(functional, name)):
        return function
    return Applied(CALLS[name]())
