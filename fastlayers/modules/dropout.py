"""torch.nn.modules.dropout."""

import torch
from torch import nn

from .. import functional as F

__all__ = ["AlphaDropout", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout"]


class Dropout(nn.Dropout):
    """Elements dropped at random in training. As torch.nn.Dropout; see `fastlayers.functional.dropout` for shapes, dtypes and
    errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Dropout.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.dropout(input, self.p, self.training, self.inplace)


class Dropout1d(nn.Dropout1d):
    """Channels of signals dropped at random in training. As torch.nn.Dropout1d; see `fastlayers.functional.dropout1d` for shapes,
    dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Dropout1d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(nn.Dropout2d):
    """Channels of images dropped at random in training. As torch.nn.Dropout2d; see `fastlayers.functional.dropout2d` for shapes,
    dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Dropout2d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(nn.Dropout3d):
    """Channels of volumes dropped at random in training. As torch.nn.Dropout3d; see `fastlayers.functional.dropout3d` for shapes,
    dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Dropout3d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(nn.AlphaDropout):
    """Dropout that keeps mean and variance, for networks of SELU. As torch.nn.AlphaDropout, which doesn't look at `inplace`
    either; see `fastlayers.functional.alpha_dropout` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.AlphaDropout.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.alpha_dropout(input, self.p, self.training)


class FeatureAlphaDropout(nn.FeatureAlphaDropout):
    """The same of whole feature maps. As torch.nn.FeatureAlphaDropout, which doesn't look at `inplace` either; see
    `fastlayers.functional.feature_alpha_dropout` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.FeatureAlphaDropout.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.feature_alpha_dropout(input, self.p, self.training)
