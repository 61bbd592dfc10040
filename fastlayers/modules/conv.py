"""torch.nn.modules.conv."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import functional as F
from .._state import own

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConv3d",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "LazyConvTranspose3d",
]


def _arguments(layer: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Any, ...]:
    """Those of torch's function, of an input that is padded first where the padding isn't of zeros."""
    padding = layer.padding
    if layer.padding_mode != "zeros":
        input = F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    return input, weight, bias, layer.stride, padding, layer.dilation, layer.groups


def _transposed_arguments(layer: Any, dims: int, input: Any, output_size: list[int] | None) -> tuple[Any, ...]:
    """Those of torch's function after the tensors."""
    if layer.padding_mode != "zeros":
        raise ValueError(f"Only `zeros` padding mode is supported for ConvTranspose{dims}d")
    if not isinstance(layer.padding, tuple):
        raise AssertionError("self.padding must be a tuple")
    sizes = layer.stride, layer.padding, layer.kernel_size
    more = layer._output_padding(input, output_size, *sizes, dims, layer.dilation)
    return layer.stride, layer.padding, more, layer.groups, layer.dilation


class Conv1d(nn.Conv1d):
    """The cross-correlation of signals with a filter bank. As torch.nn.Conv1d; see `fastlayers.functional.conv1d` for
    shapes, dtypes and errors. Any `padding_mode` but "zeros" pads with torch.nn.functional.pad first, as torch does.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv1d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, own(self, "weight", Conv1d), own(self, "bias", Conv1d))

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.conv1d(*self._arguments(input, weight, bias))

    def _arguments(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Any, ...]:
        return _arguments(self, input, weight, bias)


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
        return _arguments(self, input, weight, bias)


class Conv3d(nn.Conv3d):
    """The cross-correlation of volumes with a filter bank. As torch.nn.Conv3d; see `fastlayers.functional.conv3d` for
    shapes, dtypes and errors. Any `padding_mode` but "zeros" pads with torch.nn.functional.pad first, as torch does.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv3d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, own(self, "weight", Conv3d), own(self, "bias", Conv3d))

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.conv3d(*self._arguments(input, weight, bias))

    def _arguments(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Any, ...]:
        return _arguments(self, input, weight, bias)


class ConvTranspose1d(nn.ConvTranspose1d):
    """The transposed convolution of signals with a filter bank. As torch.nn.ConvTranspose1d; see
    `fastlayers.functional.conv_transpose1d` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose1d.html
    """

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        weight, bias = own(self, "weight", ConvTranspose1d), own(self, "bias", ConvTranspose1d)
        return F.conv_transpose1d(*self._arguments(input, weight, bias, output_size))

    def _arguments(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output_size: list[int] | None = None
    ) -> tuple[Any, ...]:
        return input, weight, bias, *_transposed_arguments(self, 1, input, output_size)


class ConvTranspose2d(nn.ConvTranspose2d):
    """The transposed convolution of images with a filter bank. As torch.nn.ConvTranspose2d; see
    `fastlayers.functional.conv_transpose2d` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose2d.html
    """

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        weight, bias = own(self, "weight", ConvTranspose2d), own(self, "bias", ConvTranspose2d)
        return F.conv_transpose2d(*self._arguments(input, weight, bias, output_size))

    def _arguments(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output_size: list[int] | None = None
    ) -> tuple[Any, ...]:
        return input, weight, bias, *_transposed_arguments(self, 2, input, output_size)


class ConvTranspose3d(nn.ConvTranspose3d):
    """The transposed convolution of volumes with a filter bank. As torch.nn.ConvTranspose3d; see
    `fastlayers.functional.conv_transpose3d` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose3d.html
    """

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        weight, bias = own(self, "weight", ConvTranspose3d), own(self, "bias", ConvTranspose3d)
        return F.conv_transpose3d(*self._arguments(input, weight, bias, output_size))

    def _arguments(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output_size: list[int] | None = None
    ) -> tuple[Any, ...]:
        return input, weight, bias, *_transposed_arguments(self, 3, input, output_size)


class LazyConv1d(nn.LazyConv1d, Conv1d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A Conv1d that learns in_channels from its first input, and becomes a `fastlayers.Conv1d`. As torch.nn.LazyConv1d.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyConv1d.html
    """

    cls_to_become = Conv1d  # type: ignore[assignment]


class LazyConv2d(nn.LazyConv2d, Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A Conv2d that learns in_channels from its first input, and becomes a `fastlayers.Conv2d`. As torch.nn.LazyConv2d.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyConv2d.html
    """

    cls_to_become = Conv2d  # type: ignore[assignment]


class LazyConv3d(nn.LazyConv3d, Conv3d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A Conv3d that learns in_channels from its first input, and becomes a `fastlayers.Conv3d`. As torch.nn.LazyConv3d.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyConv3d.html
    """

    cls_to_become = Conv3d  # type: ignore[assignment]


class LazyConvTranspose1d(nn.LazyConvTranspose1d, ConvTranspose1d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A ConvTranspose1d that learns in_channels from its first input, and becomes a `fastlayers.ConvTranspose1d`. As
    torch.nn.LazyConvTranspose1d.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyConvTranspose1d.html
    """

    cls_to_become = ConvTranspose1d  # type: ignore[assignment]


class LazyConvTranspose2d(nn.LazyConvTranspose2d, ConvTranspose2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A ConvTranspose2d that learns in_channels from its first input, and becomes a `fastlayers.ConvTranspose2d`. As
    torch.nn.LazyConvTranspose2d.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyConvTranspose2d.html
    """

    cls_to_become = ConvTranspose2d  # type: ignore[assignment]


class LazyConvTranspose3d(nn.LazyConvTranspose3d, ConvTranspose3d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A ConvTranspose3d that learns in_channels from its first input, and becomes a `fastlayers.ConvTranspose3d`. As
    torch.nn.LazyConvTranspose3d.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyConvTranspose3d.html
    """

    cls_to_become = ConvTranspose3d  # type: ignore[assignment]
