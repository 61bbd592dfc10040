"""torch.nn.modules.conv."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .. import functional as F
from ..ops.pointwise import Pointwise


class Conv2d(nn.Conv2d):
    """The cross-correlation of images with a filter bank. As torch.nn.Conv2d; see `fastlayers.functional.conv2d` for
    shapes, dtypes and errors. Any `padding_mode` but "zeros" pads with torch.nn.functional.pad first, as torch does.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._conv_forward_then(input, weight, bias, None)

    def _conv_forward_then(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, then: Pointwise | None
    ) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        arguments = (input, weight, bias, self.stride, padding, self.dilation, self.groups)
        return F.conv2d(*arguments) if then is None else F.conv2d_then(*arguments, then=then)

    chains = False

    @staticmethod
    def forward_fused(input: torch.Tensor, stages: Sequence[tuple[Conv2d, Pointwise | None]]) -> torch.Tensor:
        """A layer and the activation that follows it, in one kernel."""
        ((layer, then),) = stages
        return layer._conv_forward_then(input, layer.weight, layer.bias, then)


class LazyConv2d(nn.LazyConv2d, Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A Conv2d that learns in_channels from its first input, and becomes a `fastlayers.Conv2d`. As torch.nn.LazyConv2d.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyConv2d.html
    """

    cls_to_become = Conv2d  # type: ignore[assignment]
