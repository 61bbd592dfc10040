"""torch.nn.modules.batchnorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import functional as F

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "SyncBatchNorm",
]


def _arguments(layer: Any, input: torch.Tensor) -> tuple[Any, ...]:
    """Those of torch's batch_norm, with the batch counted as in torch's forward; but a cumulative average, which
    `momentum=None` asks for, doesn't wait for the GPU."""
    momentum = 0.0 if layer.momentum is None else layer.momentum
    mean, var = layer.running_mean, layer.running_var
    if layer.training and layer.track_running_stats:
        count = layer.num_batches_tracked
        if count is not None:
            count.add_(1)
            if layer.momentum is None and mean is not None:
                momentum = 1.0 / count.to(torch.promote_types(mean.dtype, torch.float32))
    elif layer.training:
        mean = var = None
    training = layer.training or (mean is None and var is None)
    return input, mean, var, layer.weight, layer.bias, training, momentum, layer.eps


class BatchNorm1d(nn.BatchNorm1d):
    """Normalisation of each feature, or channel of a sequence, over the batch. As torch.nn.BatchNorm1d; see
    `fastlayers.functional.batch_norm` for shapes, dtypes and errors. With `momentum=None` the host doesn't wait for the GPU.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm1d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(*self._arguments(input))

    def _arguments(self, input: torch.Tensor) -> tuple[Any, ...]:
        self._check_input_dim(input)
        return _arguments(self, input)


class BatchNorm2d(nn.BatchNorm2d):
    """Normalisation of each channel of images over the batch. As torch.nn.BatchNorm2d; see `fastlayers.functional.batch_norm`
    for shapes, dtypes and errors. With `momentum=None` the host doesn't wait for the GPU.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(*self._arguments(input))

    def _arguments(self, input: torch.Tensor) -> tuple[Any, ...]:
        self._check_input_dim(input)
        return _arguments(self, input)


class BatchNorm3d(nn.BatchNorm3d):
    """Normalisation of each channel of volumes over the batch. As torch.nn.BatchNorm3d; see `fastlayers.functional.batch_norm`
    for shapes, dtypes and errors. With `momentum=None` the host doesn't wait for the GPU.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm3d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(*self._arguments(input))

    def _arguments(self, input: torch.Tensor) -> tuple[Any, ...]:
        self._check_input_dim(input)
        return _arguments(self, input)


class LazyBatchNorm1d(nn.LazyBatchNorm1d, BatchNorm1d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A BatchNorm1d that learns num_features from its first input, and becomes a `fastlayers.BatchNorm1d`. As
    torch.nn.LazyBatchNorm1d.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyBatchNorm1d.html
    """

    cls_to_become = BatchNorm1d  # type: ignore[assignment]


class LazyBatchNorm2d(nn.LazyBatchNorm2d, BatchNorm2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A BatchNorm2d that learns num_features from its first input, and becomes a `fastlayers.BatchNorm2d`. As
    torch.nn.LazyBatchNorm2d.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyBatchNorm2d.html
    """

    cls_to_become = BatchNorm2d  # type: ignore[assignment]


class LazyBatchNorm3d(nn.LazyBatchNorm3d, BatchNorm3d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A BatchNorm3d that learns num_features from its first input, and becomes a `fastlayers.BatchNorm3d`. As
    torch.nn.LazyBatchNorm3d.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LazyBatchNorm3d.html
    """

    cls_to_become = BatchNorm3d  # type: ignore[assignment]


class SyncBatchNorm(nn.SyncBatchNorm):
    """Normalisation of each channel over the batches of all processes of a group. As torch.nn.SyncBatchNorm, whose collectives
    run wherever there are several processes; elsewhere, and in eval, see `fastlayers.functional.batch_norm` for shapes, dtypes
    and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            group = self.process_group or torch.distributed.group.WORLD
            if torch.distributed.get_world_size(group) > 1 or not input.is_cuda:  # torch wants GPUs
                return super().forward(input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        return F.batch_norm(*_arguments(self, input))

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> Any:
        """torch's, with layers of this class in the place of torch's."""
        converted = super().convert_sync_batchnorm(module, process_group)
        if converted is not module and type(converted) is nn.SyncBatchNorm:
            converted.__class__ = SyncBatchNorm
        return converted
