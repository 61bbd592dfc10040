"""An activation that a model calls as a function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..ops.activation import Activation, _pointwise
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
