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

    @property
    def label(self) -> str:
        return self.activation.function

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _pointwise((x,), self.activation, False)


register_role(Applied, Role("activation", of=lambda call: call.activation if call.activation.joins else None))


def layer_of(part: Any) -> Any:
    """What stands in a row for a part of a call: a module, or an activation that a model calls as a function."""
    return Applied(part) if isinstance(part, Activation) else part


def called(function: Any) -> Any:
    """What stands in a row for a module or a function that the model calls with one tensor: an activation's value for torch's
    functions and ours, otherwise the very thing."""
    if is_dynamo_compiling() or not isinstance(function, types.FunctionType | types.BuiltinFunctionType):
        return function
    name = function.__name__
    if name not in ("relu", "gelu") or function not in (getattr(F, name), getattr(functional, name)):
        return function
    return Applied(CALLS[name]())
