"""torch.nn.modules.fold."""

from __future__ import annotations

import torch
from torch import nn

from .. import functional as F

__all__ = ["Fold", "Unfold"]


class Unfold(nn.Unfold):
    """The windows of images as columns. As torch.nn.Unfold; see `fastlayers.functional.unfold` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Unfold.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.unfold(input, self.kernel_size, self.dilation, self.padding, self.stride)


class Fold(nn.Fold):
    """The sum of windows back into images. As torch.nn.Fold; see `fastlayers.functional.fold` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Fold.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.fold(input, self.output_size, self.kernel_size, self.dilation, self.padding, self.stride)
