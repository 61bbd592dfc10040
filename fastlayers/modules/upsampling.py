"""torch.nn.modules.upsampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import functional as F

__all__ = ["Upsample", "UpsamplingBilinear2d", "UpsamplingNearest2d"]


def _interpolate(layer: Any, input: torch.Tensor) -> torch.Tensor:
    return F.interpolate(
        input,
        layer.size,
        layer.scale_factor,
        layer.mode,
        layer.align_corners,
        recompute_scale_factor=layer.recompute_scale_factor,
    )


class Upsample(nn.Upsample):
    """The input with other sizes. As torch.nn.Upsample; see `fastlayers.functional.interpolate` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Upsample.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _interpolate(self, input)


class UpsamplingNearest2d(nn.UpsamplingNearest2d):
    """Images with other sizes, by their nearest pixels. As torch.nn.UpsamplingNearest2d; see
    `fastlayers.functional.interpolate` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.UpsamplingNearest2d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _interpolate(self, input)


class UpsamplingBilinear2d(nn.UpsamplingBilinear2d):
    """Images with other sizes, interpolated between corners that stay. As torch.nn.UpsamplingBilinear2d; see
    `fastlayers.functional.interpolate` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.UpsamplingBilinear2d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _interpolate(self, input)
