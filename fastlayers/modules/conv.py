"""torch.nn.modules.conv."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .. import functional as F
from .._state import own
from ..ops.pointwise import Pointwise


class Conv2d(nn.Conv2d):
    """The cross-correlation of images with a filter bank. As torch.nn.Conv2d; see `fastlayers.functional.conv2d` for
    shapes, dtypes and errors. Any `padding_mode` but "zeros" pads with torch.nn.functional.pad first, as torch does.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, own(self, "weight", Conv2d), own(self, "bias", Conv2d))

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.conv2d(*self._arguments(input, weight, bias))

    def _arguments(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Any, ...]:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return input, weight, bias, self.stride, padding, self.dilation, self.groups

    chains = False
    normalizes = nn.BatchNorm2d
    adds = True

    @staticmethod
    def forward_fused(
        input: torch.Tensor,
        stages: Sequence[tuple[Conv2d, Pointwise | None]],
        *,
        norm: nn.BatchNorm2d | None = None,
        residual: torch.Tensor | None = None,
        add: Callable[[torch.Tensor], torch.Tensor] | None = None,
        channels_last: bool | None = None,
    ) -> torch.Tensor:
        """A layer, the batch normalisation that follows it in eval, an addition, and an activation, in one kernel."""
        ((layer, then),) = stages
        statistics = None
        if norm is not None:
            if input.dim() != 4:
                return norm(layer(input))  # which torch's normalisation objects to
            names = ("running_mean", "running_var", "weight", "bias")
            statistics = (
                *[own(norm, name, nn.BatchNorm2d) for name in names],
                norm.eps,
            )  # not None: the plan has seen to it
        arguments = layer._arguments(input, own(layer, "weight", Conv2d), own(layer, "bias", Conv2d))
        return F.conv2d_then(
            *arguments, then=then, norm=statistics, residual=residual, add=add, channels_last=channels_last
        )

    @staticmethod
    def carry(input: torch.Tensor, layers: Sequence[Conv2d]) -> list[dict[str, Any]]:
        """channels_last between the layers, and torch's memory format at the end: an image in NCHW is converted once."""
        if any(layer.padding_mode != "zeros" for layer in layers):  # padding has a memory format of its own
            return [{}] * len(layers)
        formats = F.conv2d_formats(input, [own(layer, "weight", Conv2d) for layer in layers])
        return [{"channels_last": format} for format in formats]


class LazyConv2d(nn.LazyConv2d, Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A Conv2d that learns in_channels from its first input, and becomes a `fastlayers.Conv2d`. As torch.nn.LazyConv2d.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyConv2d.html
    """

    cls_to_become = Conv2d  # type: ignore[assignment]
