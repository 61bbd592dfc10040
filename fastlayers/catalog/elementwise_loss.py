"""Losses of one element each."""

from __future__ import annotations

from typing import Any

import torch

from ..ops.elementwise_loss import _elementwise_loss
from .row import Between, Case, Floats, Probabilities, Row, case

_LAYOUTS = "every reduction, any strides, a target that is broadcast or asks for a gradient"
_WEIGHTS = "every reduction, any strides, weights that are broadcast, a target that asks for a gradient"
_LARGER = "a weight with more elements than the input"


def _loss(name: str, *inputs: Any, **options: Any) -> Case:
    """A function among the options makes a tensor, on the device that is then the default."""
    return case(
        lambda nn: getattr(nn, name)(**{key: v() if callable(v) else v for key, v in options.items()}), *inputs
    )  # fmt: skip


def _regression(name: str, function: str, falls_back: str, speeds: dict[str, tuple[int, ...]], **options: Any) -> Row:
    """A loss of the difference of two tensors. The options change it in one of its cases."""
    shape = (7, 11)
    return Row(
        name,
        _LAYOUTS,
        falls_back,
        operation=_elementwise_loss,
        function=function,
        speeds={label: _loss(name, size, size) for label, size in speeds.items()},
        cases=dict(
            mean=_loss(name, shape, shape, **options),
            none=_loss(name, (3, 2, 5, 4), (3, 2, 5, 4), reduction="none"),
            total=_loss(name, (130,), (130,), reduction="sum"),
        ),
    )


ROWS = (
    _regression(
        "MSELoss",
        "mse_loss",
        "a weight",
        {
            "diffusion, 4 x 64 x 64, batch 64": (64, 4, 64, 64),
            "images, 3 x 512 x 512, batch 16": (16, 3, 512, 512),
        },
    ),
    _regression("L1Loss", "l1_loss", "a weight", {"images, 3 x 512 x 512, batch 16": (16, 3, 512, 512)}),
    _regression(
        "SmoothL1Loss", "smooth_l1_loss", "nothing beyond the last row", {"boxes, 2^20 x 4": (2**20, 4)}, beta=0.5
    ),
    _regression("HuberLoss", "huber_loss", "a weight", {"depth, 480 x 640, batch 16": (16, 1, 480, 640)}, delta=0.7),
    Row(
        "BCELoss",
        _WEIGHTS,
        _LARGER,
        operation=_elementwise_loss,
        function="binary_cross_entropy",
        speeds={"images, 1 x 512 x 512, batch 16": _loss("BCELoss", *[Between((16, 1, 512, 512))] * 2)},
        cases=dict(
            mean=_loss("BCELoss", *[Between((7, 11))] * 2),
            weighted=_loss(
                "BCELoss", *[Between((3, 5, 4))] * 2, weight=lambda: torch.linspace(0.5, 2, 4), reduction="none"
            ),
            total=_loss("BCELoss", *[Between((9, 3))] * 2, reduction="sum"),
        ),
    ),
    Row(
        "BCEWithLogitsLoss",
        _WEIGHTS,
        _LARGER,
        operation=_elementwise_loss,
        function="binary_cross_entropy_with_logits",
        speeds={
            "segmentation, 1 x 512 x 512, batch 16": _loss("BCEWithLogitsLoss", *[Floats((16, 1, 512, 512))] * 2),
            "80 labels with weights, 2^16 rows": _loss(
                "BCEWithLogitsLoss", *[Floats((2**16, 80))] * 2, pos_weight=lambda: torch.linspace(0.5, 2, 80)
            ),
        },
        cases=dict(
            mean=_loss("BCEWithLogitsLoss", (7, 11), Probabilities((7, 11))),
            weighted=_loss(
                "BCEWithLogitsLoss",
                (2, 3, 5, 4),
                Probabilities((2, 3, 5, 4)),
                reduction="none",
                pos_weight=lambda: torch.linspace(0.5, 2, 3)[:, None, None],
                weight=lambda: torch.linspace(1, 2, 4),
            ),
            total=_loss(
                "BCEWithLogitsLoss",
                (9, 3),
                Probabilities((9, 3)),
                pos_weight=lambda: torch.full((3,), 2.0),
                reduction="sum",
            ),
        ),
    ),
    Row(
        "KLDivLoss",
        _LAYOUTS,
        "nothing beyond the last row",
        operation=_elementwise_loss,
        function="kl_div",
        speeds={
            "distillation, 4096 x 32000": _loss(
                "KLDivLoss", (4096, 32000), (4096, 32000), log_target=True, reduction="batchmean"
            )
        },
        cases=dict(
            batchmean=_loss("KLDivLoss", (7, 11), Probabilities((7, 11)), reduction="batchmean"),
            logs=_loss("KLDivLoss", (5, 6), (5, 6), log_target=True, reduction="none"),
            total=_loss("KLDivLoss", (9, 3), Probabilities((9, 3)), reduction="sum"),
        ),
    ),
    Row(
        "PoissonNLLLoss",
        _LAYOUTS,
        "integers",
        operation=_elementwise_loss,
        function="poisson_nll_loss",
        speeds={"counts, 2^24": _loss("PoissonNLLLoss", (2**24,), (2**24,))},
        cases=dict(
            mean=_loss("PoissonNLLLoss", (7, 11), (7, 11)),
            full=_loss("PoissonNLLLoss", (5, 6), Probabilities((5, 6)), full=True, reduction="none"),
            rates=_loss("PoissonNLLLoss", Between((9, 3)), (9, 3), log_input=False, reduction="sum"),
        ),
    ),
)
