"""torch.nn.modules.instancenorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import functional as F

__all__ = [
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
]


def _arguments(layer: Any, input: torch.Tensor) -> tuple[Any, ...]:
    """Those of torch's instance_norm, of a batch with the right number of channels."""
    momentum = 0.0 if layer.momentum is None else layer.momentum
    measure = layer.training or not layer.track_running_stats
    return input, layer.running_mean, layer.running_var, layer.weight, layer.bias, measure, momentum, layer.eps


class InstanceNorm1d(nn.InstanceNorm1d):
    """Normalisation of each channel of sequences by itself. As torch.nn.InstanceNorm1d; see
    `fastlayers.functional.instance_norm` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.InstanceNorm1d.html
    """

    def _apply_instance_norm(self, input: torch.Tensor) -> torch.Tensor:
        return F.instance_norm(*self._arguments(input))

    def _arguments(self, input: torch.Tensor) -> tuple[Any, ...]:
        return _arguments(self, input)


class InstanceNorm2d(nn.InstanceNorm2d):
    """Normalisation of each channel of images by itself. As torch.nn.InstanceNorm2d; see
    `fastlayers.functional.instance_norm` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.InstanceNorm2d.html
    """

    def _apply_instance_norm(self, input: torch.Tensor) -> torch.Tensor:
        return F.instance_norm(*self._arguments(input))

    def _arguments(self, input: torch.Tensor) -> tuple[Any, ...]:
        return _arguments(self, input)


class InstanceNorm3d(nn.InstanceNorm3d):
    """Normalisation of each channel of volumes by itself. As torch.nn.InstanceNorm3d; see
    `fastlayers.functional.instance_norm` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.InstanceNorm3d.html
    """

    def _apply_instance_norm(self, input: torch.Tensor) -> torch.Tensor:
        return F.instance_norm(*self._arguments(input))

    def _arguments(self, input: torch.Tensor) -> tuple[Any, ...]:
        return _arguments(self, input)


class LazyInstanceNorm1d(nn.LazyInstanceNorm1d, InstanceNorm1d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """An InstanceNorm1d that learns num_features from its first input, and becomes a `fastlayers.InstanceNorm1d`. As
    torch.nn.LazyInstanceNorm1d.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyInstanceNorm1d.html
    """

    cls_to_become = InstanceNorm1d  # type: ignore[assignment]


class LazyInstanceNorm2d(nn.LazyInstanceNorm2d, InstanceNorm2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """An InstanceNorm2d that learns num_features from its first input, and becomes a `fastlayers.InstanceNorm2d`. As
    torch.nn.LazyInstanceNorm2d.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyInstanceNorm2d.html
    """

    cls_to_become = InstanceNorm2d  # type: ignore[assignment]


class LazyInstanceNorm3d(nn.LazyInstanceNorm3d, InstanceNorm3d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """An InstanceNorm3d that learns num_features from its first input, and becomes a `fastlayers.InstanceNorm3d`. As
    torch.nn.LazyInstanceNorm3d.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyInstanceNorm3d.html
    """

    cls_to_become = InstanceNorm3d  # type: ignore[assignment]
