"""torch.nn.modules.normalization."""

from typing import Any

import torch
from torch import nn

from .. import functional as F

__all__ = ["GroupNorm", "LayerNorm", "RMSNorm"]


class GroupNorm(nn.GroupNorm):
    """Normalisation of groups of channels in each image. As torch.nn.GroupNorm; see `fastlayers.functional.group_norm` for
    shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GroupNorm.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.group_norm(*self._arguments(input))

    def _arguments(self, input: torch.Tensor) -> tuple[Any, ...]:
        return input, self.num_groups, self.weight, self.bias, self.eps


class LayerNorm(nn.LayerNorm):
    """Normalisation over the last dimensions. As torch.nn.LayerNorm; see `fastlayers.functional.layer_norm` for shapes,
    dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LayerNorm.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square over the last dimensions. As torch.nn.RMSNorm; see `fastlayers.functional.rms_norm` for
    shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.RMSNorm.html
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
