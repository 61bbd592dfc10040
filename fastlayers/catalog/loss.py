"""Losses."""

from typing import Any

import torch

from ..ops.linear_cross_entropy import _linear_cross_entropy
from ..ops.loss import _cross_entropy, _nll_loss
from .row import Case, Classes, Probabilities, Row, case


def _loss(rows: int, classes: int, **options: Any) -> Case:
    return case(lambda nn: nn.CrossEntropyLoss(**options), (rows, classes), Classes((rows,), classes))


def _weighted(count: int, **options: Any) -> Any:
    return lambda nn: nn.CrossEntropyLoss(torch.linspace(0.5, 2, count), **options)


def _of_linear(features: int, classes: int, rows: int, **options: Any) -> Case:
    return case(
        lambda nn: nn.LinearCrossEntropyLoss(features, classes, **options), (rows, features), Classes((rows,), classes)
    )


ROWS = (
    Row(
        "CrossEntropyLoss",
        "classes and probabilities, any number of dimensions and classes; weight, ignore_index, label_smoothing, every "
        "reduction; each logit read once, and never written into",
        "a weight that requires grad, no classes",
        operation=_cross_entropy,
        scale=1,
        function="cross_entropy",
        speeds={
            "GPT-2, 8192 tokens": _loss(8192, 50257),
            "Llama-3, 8192 tokens": _loss(8192, 128256),
            "Llama-2, 8192 tokens": _loss(8192, 32000),
            "ImageNet, batch 256": _loss(256, 1000),
            "ImageNet, batch 4096, smoothed": _loss(4096, 1000, label_smoothing=0.1),
            "CIFAR-10, batch 128": _loss(128, 10),
            "segmentation, 19 classes @512 x 1024, batch 4": case(
                lambda nn: nn.CrossEntropyLoss(), (4, 19, 512, 1024), Classes((4, 512, 1024), 19)
            ),
            "Gemma, 2048 tokens": _loss(2048, 256128),
        },
        cases=dict(
            mean=case(lambda nn: nn.CrossEntropyLoss(), (7, 11), Classes((7,), 11)),
            none=case(lambda nn: nn.CrossEntropyLoss(reduction="none"), (5, 19), Classes((5,), 19)),
            weighted=case(_weighted(5, ignore_index=1), (9, 5), Classes((9,), 5)),
            smoothed=case(_weighted(6, label_smoothing=0.2, reduction="sum"), (4, 6), Classes((4,), 6)),
            pixels=case(lambda nn: nn.CrossEntropyLoss(), (2, 5, 3, 4), Classes((2, 3, 4), 5)),
            one=case(lambda nn: nn.CrossEntropyLoss(), (9,), Classes((), 9)),
            many=case(lambda nn: nn.CrossEntropyLoss(), (3, 150), Classes((3,), 150)),
            probabilities=case(_weighted(7, label_smoothing=0.1), (4, 7), Probabilities((4, 7))),
        ),
    ),
    Row(
        "NLLLoss",
        "any number of dimensions and classes; weight, ignore_index, every reduction; saves no log probabilities",
        "no classes",
        operation=_nll_loss,
        function="nll_loss",
        speeds={
            "GPT-2, 8192 tokens": case(lambda nn: nn.NLLLoss(), (8192, 50257), Classes((8192,), 50257)),
            "segmentation, 19 classes @512 x 1024, batch 4": case(
                lambda nn: nn.NLLLoss(), (4, 19, 512, 1024), Classes((4, 512, 1024), 19)
            ),
        },
        cases=dict(
            mean=case(lambda nn: nn.NLLLoss(), (7, 11), Classes((7,), 11)),
            none=case(lambda nn: nn.NLLLoss(reduction="none"), (5, 37), Classes((5,), 37)),
            weighted=case(lambda nn: nn.NLLLoss(torch.linspace(0.5, 2, 5), ignore_index=1), (9, 5), Classes((9,), 5)),
            # Of images with other strides than contiguous ones, torch computes no gradient on a CPU.
            pixels=case(lambda nn: nn.NLLLoss(reduction="sum"), (2, 5, 12), Classes((2, 12), 5)),
            one=case(lambda nn: nn.NLLLoss(), (9,), Classes((), 9)),
        ),
    ),
)

_LINEAR = Row(
    "LinearCrossEntropyLoss",
    "one target class for each row, weight, ignore_index, every reduction; the logits are never written, and the "
    "backward computes them again, in chunks",
    "label_smoothing, probabilities, several losses for each row, a weight that requires grad, no classes",
    operation=_linear_cross_entropy,
    function="linear_cross_entropy",
    speeds={
        "GPT-2, 8192 tokens": _of_linear(768, 50257, 8192),
        "Llama-3, 8192 tokens": _of_linear(4096, 128256, 8192),
    },
    cases=dict(
        mean=_of_linear(7, 37, 9),
        none=_of_linear(16, 11, 40, bias=True, reduction="none"),
        weighted=case(
            lambda nn: nn.LinearCrossEntropyLoss(5, 6, weight=torch.linspace(0.5, 2, 6), ignore_index=1),
            (9, 5),
            Classes((9,), 6),
        ),
        total=_of_linear(9, 19, 4, bias=True, reduction="sum"),
    ),
)
if hasattr(torch.nn, "LinearCrossEntropyLoss"):  # of torch 2.13
    ROWS = (*ROWS, _LINEAR)
