"""Normalisation by the input's own statistics: in one launch where all that is normalised together fits into registers, and
otherwise in three."""

import torch

from .. import epilogues
from ..runtime import launch
from . import statistics, whole
from .planes import Planes


def normalize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    planes: Planes,
    eps: float,
    running: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    momentum: float = 0.0,
    factor: torch.Tensor | None = None,
    then: epilogues.Activation | None = None,
) -> None:
    """out = then((x - mean) * rstd * weight + bias), rstd being 1 / sqrt(var + eps). Running statistics move by `momentum`, or by
    `factor`, towards mean and unbiased variance.

    Shape: x (N, C, *), any strides; weight and bias (C,); out as x, contiguous or in channels_last, `planes` being its own;
        mean and rstd `planes.statistics` numbers, contiguous, None if nobody needs them; running mean and variance (C,), any
        strides: over the batch, or, where each channel is a group, averages of all images; `factor` one number.
    Dtype: any floating each; computed in float32, or in float64 if x is float64; mean and rstd of that dtype.
    """
    accumulate = torch.promote_types(x.dtype, torch.float32)
    if whole.fits(planes, accumulate):
        whole.whole(x, weight, bias, out, mean, rstd, planes, eps, running, momentum, factor, then)
        return
    if mean is None or rstd is None:
        mean, rstd = (launch.empty((planes.statistics,), dtype=accumulate, device=x.device) for _ in range(2))
    statistics.statistics(x, mean, rstd, planes, eps, running, momentum, factor)
    statistics.apply(x, mean, rstd, weight, bias, out, planes, then=then)
