"""torch.nn.modules.linear."""

from __future__ import annotations

import torch
from torch import nn

from .. import functional as F
from .._state import own

__all__ = ["LazyLinear", "Linear"]


class Linear(nn.Linear):
    """x W^T + b. As torch.nn.Linear; see `fastlayers.functional.linear` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, own(self, "weight", Linear), own(self, "bias", Linear))


class LazyLinear(nn.LazyLinear, Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A Linear that learns in_features from its first input, and becomes a `fastlayers.Linear`. As torch.nn.LazyLinear.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyLinear.html
    """

    cls_to_become = Linear  # type: ignore[assignment]
