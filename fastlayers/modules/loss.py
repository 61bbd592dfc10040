"""torch.nn.modules.loss."""

import torch
from torch import nn

from .. import functional as F

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "MSELoss",
    "NLLLoss",
    "PoissonNLLLoss",
    "SmoothL1Loss",
]


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """The cross entropy of logits and a target. As torch.nn.CrossEntropyLoss; see `fastlayers.functional.cross_entropy` for
    shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class BCELoss(nn.BCELoss):
    """The cross entropy of probabilities of one event each. As torch.nn.BCELoss; see
    `fastlayers.functional.binary_cross_entropy` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.BCELoss.html
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy(input, target, weight=self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """The cross entropy of logits of one event each. As torch.nn.BCEWithLogitsLoss; see
    `fastlayers.functional.binary_cross_entropy_with_logits` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.BCEWithLogitsLoss.html
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


class HuberLoss(nn.HuberLoss):
    """A square near 0, a distance elsewhere. As torch.nn.HuberLoss; see `fastlayers.functional.huber_loss` for
    shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.HuberLoss.html
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class KLDivLoss(nn.KLDivLoss):
    """The Kullback-Leibler divergence. As torch.nn.KLDivLoss; see `fastlayers.functional.kl_div` for
    shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.KLDivLoss.html
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class L1Loss(nn.L1Loss):
    """The distance of each element. As torch.nn.L1Loss; see `fastlayers.functional.l1_loss` for
    shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.L1Loss.html
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.l1_loss(input, target, reduction=self.reduction)


if hasattr(nn, "LinearCrossEntropyLoss"):  # of torch 2.13; linear_cross_entropy itself is there with older ones, too

    class LinearCrossEntropyLoss(nn.LinearCrossEntropyLoss):
        """The cross entropy of a linear layer's results, without the logits in memory. As torch.nn.LinearCrossEntropyLoss; see
        `fastlayers.functional.linear_cross_entropy` for shapes, dtypes and errors.

        Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LinearCrossEntropyLoss.html
        """

        def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            weight, bias = self.linear.weight, self.linear.bias
            if self.out_features:
                weight = weight.reshape((self.num_classes, *self.out_features, self.linear.in_features))
                bias = None if bias is None else bias.reshape((self.num_classes, *self.out_features))
            return F.linear_cross_entropy(
                input,
                weight,
                target,
                linear_bias=bias,
                weight=self.weight,
                reduction=self.reduction,
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
                options=self.options,
            )

    __all__.append("LinearCrossEntropyLoss")


class MSELoss(nn.MSELoss):
    """The square of each element's distance. As torch.nn.MSELoss; see `fastlayers.functional.mse_loss` for
    shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.MSELoss.html
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)


class NLLLoss(nn.NLLLoss):
    """The negative log likelihood of classes. As torch.nn.NLLLoss; see `fastlayers.functional.nll_loss` for shapes, dtypes and
    errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.NLLLoss.html
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.nll_loss(
            input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )  # fmt: skip


class PoissonNLLLoss(nn.PoissonNLLLoss):
    """The negative log likelihood of counts. As torch.nn.PoissonNLLLoss; see `fastlayers.functional.poisson_nll_loss` for
    shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.PoissonNLLLoss.html
    """

    def forward(self, log_input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.poisson_nll_loss(
            log_input, target, log_input=self.log_input, full=self.full, eps=self.eps, reduction=self.reduction
        )


class SmoothL1Loss(nn.SmoothL1Loss):
    """A square near 0, a distance elsewhere. As torch.nn.SmoothL1Loss; see `fastlayers.functional.smooth_l1_loss` for
    shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.SmoothL1Loss.html
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)
