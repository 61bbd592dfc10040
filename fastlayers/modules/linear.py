"""torch.nn.modules.linear."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .. import functional as F
from .._state import own
from ..ops.pointwise import Pointwise


class Linear(nn.Linear):
    """x W^T + b. As torch.nn.Linear; see `fastlayers.functional.linear` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, own(self, "weight", Linear), own(self, "bias", Linear))

    chains = True

    @staticmethod
    def forward_fused(input: torch.Tensor, stages: Sequence[tuple[Linear, Pointwise | None]]) -> torch.Tensor:
        """Several layers and the activations between them, as one function for autograd."""
        tensors = [(own(layer, "weight", Linear), own(layer, "bias", Linear), then) for layer, then in stages]
        return F.linear_chain(input, tensors)


class LazyLinear(nn.LazyLinear, Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A Linear that learns in_features from its first input, and becomes a `fastlayers.Linear`. As torch.nn.LazyLinear.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyLinear.html
    """

    cls_to_become = Linear  # type: ignore[assignment]
