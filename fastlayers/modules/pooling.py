"""torch.nn.modules.pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import functional as F

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
]


def _max_pool(function: Any, layer: Any, input: torch.Tensor) -> Any:
    return function(
        input,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        ceil_mode=layer.ceil_mode,
        return_indices=layer.return_indices,
    )


class MaxPool1d(nn.MaxPool1d):
    """The maximum of each window of a signal. As torch.nn.MaxPool1d; see `fastlayers.functional.max_pool1d` for shapes, dtypes
    and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.MaxPool1d.html
    """

    def forward(self, input: torch.Tensor) -> Any:
        return _max_pool(F.max_pool1d, self, input)


class MaxPool2d(nn.MaxPool2d):
    """The maximum of each window of images. As torch.nn.MaxPool2d; see `fastlayers.functional.max_pool2d` for shapes, dtypes
    and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.MaxPool2d.html
    """

    def forward(self, input: torch.Tensor) -> Any:
        return _max_pool(F.max_pool2d, self, input)


class MaxPool3d(nn.MaxPool3d):
    """The maximum of each window of volumes. As torch.nn.MaxPool3d; see `fastlayers.functional.max_pool3d` for shapes, dtypes
    and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.MaxPool3d.html
    """

    def forward(self, input: torch.Tensor) -> Any:
        return _max_pool(F.max_pool3d, self, input)


class AvgPool1d(nn.AvgPool1d):
    """The average of each window of a signal. As torch.nn.AvgPool1d; see `fastlayers.functional.avg_pool1d` for shapes, dtypes
    and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.AvgPool1d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.avg_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        )  # fmt: skip


class AvgPool2d(nn.AvgPool2d):
    """The average of each window of images. As torch.nn.AvgPool2d; see `fastlayers.functional.avg_pool2d` for shapes, dtypes
    and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.AvgPool2d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AvgPool3d(nn.AvgPool3d):
    """The average of each window of volumes. As torch.nn.AvgPool3d; see `fastlayers.functional.avg_pool3d` for shapes, dtypes
    and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.AvgPool3d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.avg_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool1d(nn.AdaptiveAvgPool1d):
    """The averages of as many windows of a signal as are asked for. As torch.nn.AdaptiveAvgPool1d; see
    `fastlayers.functional.adaptive_avg_pool1d` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveAvgPool1d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """The averages of as many windows of images as are asked for. As torch.nn.AdaptiveAvgPool2d; see
    `fastlayers.functional.adaptive_avg_pool2d` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveAvgPool2d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveAvgPool3d(nn.AdaptiveAvgPool3d):
    """The averages of as many windows of volumes as are asked for. As torch.nn.AdaptiveAvgPool3d; see
    `fastlayers.functional.adaptive_avg_pool3d` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveAvgPool3d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool3d(input, self.output_size)


class AdaptiveMaxPool1d(nn.AdaptiveMaxPool1d):
    """The maxima of as many windows of a signal as are asked for. As torch.nn.AdaptiveMaxPool1d; see
    `fastlayers.functional.adaptive_max_pool1d` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveMaxPool1d.html
    """

    def forward(self, input: torch.Tensor) -> Any:
        return F.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    """The maxima of as many windows of images as are asked for. As torch.nn.AdaptiveMaxPool2d; see
    `fastlayers.functional.adaptive_max_pool2d` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveMaxPool2d.html
    """

    def forward(self, input: torch.Tensor) -> Any:
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool3d(nn.AdaptiveMaxPool3d):
    """The maxima of as many windows of volumes as are asked for. As torch.nn.AdaptiveMaxPool3d; see
    `fastlayers.functional.adaptive_max_pool3d` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveMaxPool3d.html
    """

    def forward(self, input: torch.Tensor) -> Any:
        return F.adaptive_max_pool3d(input, self.output_size, self.return_indices)
