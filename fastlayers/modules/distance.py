"""torch.nn.modules.distance."""

from __future__ import annotations

import torch
from torch import nn

from .. import functional as F

__all__ = ["CosineSimilarity"]


class CosineSimilarity(nn.CosineSimilarity):
    """The cosine of the angle between vectors. As torch.nn.CosineSimilarity; see `fastlayers.functional.cosine_similarity` for
    shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.CosineSimilarity.html
    """

    def forward(self, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        return F.cosine_similarity(x1, x2, self.dim, self.eps)
