"""torch.nn.modules.sparse."""

import torch
from torch import nn

from .. import functional as F

__all__ = ["Embedding"]


class Embedding(nn.Embedding):
    """Rows of a table by their indices. As torch.nn.Embedding; see `fastlayers.functional.embedding` for shapes, dtypes
    and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Embedding.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
