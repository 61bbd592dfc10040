"""torch.nn.modules.sparse."""

import torch
from torch import nn

from .. import functional as F

__all__ = ["Embedding", "EmbeddingBag"]


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


class EmbeddingBag(nn.EmbeddingBag):
    """Sums or means of the rows of a table, a bag of indices at a time. As torch.nn.EmbeddingBag; see
    `fastlayers.functional.embedding_bag` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.EmbeddingBag.html
    """

    def forward(
        self, input: torch.Tensor, offsets: torch.Tensor | None = None, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        return F.embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
