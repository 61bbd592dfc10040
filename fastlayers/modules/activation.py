"""torch.nn.modules.activation."""

import torch
from torch import nn

from .. import functional as F
from ..ops.pointwise import RELU


class ReLU(nn.ReLU):
    """max(x, 0). As torch.nn.ReLU; see `fastlayers.functional.relu` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.ReLU.html
    """

    pointwise = RELU

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.relu(input, inplace=self.inplace)


class Softmax(nn.Softmax):
    """Softmax along `dim`. As torch.nn.Softmax; see `fastlayers.functional.softmax` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Softmax.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)
