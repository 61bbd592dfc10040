"""Containers."""

from typing import Any

import torch

from .row import Cases, Make, Row, case


def _mlp(nn: Any) -> torch.nn.Module:
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )  # fmt: skip


def _linear_relu(k: int, n: int) -> Make:
    return lambda nn: nn.Sequential(nn.Linear(k, n), nn.ReLU())


def _conv_relu(c: int, stride: int = 1) -> Make:
    return lambda nn: nn.Sequential(nn.Conv2d(c, c, 3, stride=stride, padding=1), nn.ReLU())


_FUSED: Cases = {
    "Linear+ReLU 8192 x 1024 x 1024": case(_linear_relu(1024, 1024), (8192, 1024)),
    "Linear+ReLU 8192 x 4096 x 4096": case(_linear_relu(4096, 4096), (8192, 4096)),
    "Linear+ReLU 8192 x 784 x 512": case(_linear_relu(784, 512), (8192, 784)),
    **{f"MLP 784-512-512-10, batch {batch}": case(_mlp, (batch, 784)) for batch in (64, 8192, 256, 1024)},
    "Conv+ReLU 3x3 64 @56, batch 32": case(_conv_relu(64), (32, 64, 56, 56)),
    "Conv+ReLU 3x3 256 @14, batch 32": case(_conv_relu(256), (32, 256, 14, 14)),
    "Conv+ReLU 3x3/2 128 @56, batch 32": case(_conv_relu(128, 2), (32, 128, 56, 56)),
}


ROWS = (
    Row(
        "Sequential",
        "Linear or a convolution with the activation that follows in one kernel, a convolution with its BatchNorm as well (in "
        "eval, where no gradients are recorded; in training Conv2d measures its result for BatchNorm2d), consecutive Linear "
        "layers in one function for autograd, a dropout in eval left out; indexing, slicing, append, insert, extend, nesting",
        "a layer with a hook, a subclass or a forward of its own is not fused, nor its neighbours across it",
        speeds=_FUSED,
        cases=dict(
            linear_relu=case(lambda nn: nn.Sequential(nn.Linear(19, 18), nn.ReLU()), (5, 19)),
            chain=case(
                lambda nn: nn.Sequential(nn.Linear(9, 17), nn.ReLU(), nn.Linear(17, 12), nn.Linear(12, 5), nn.ReLU()),
                (3, 2, 9),
            ),
            conv_relu=case(
                lambda nn: nn.Sequential(
                    nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 2, stride=2), nn.ReLU(True)
                ),
                (2, 3, 6, 5),
            ),
            mixed=case(
                lambda nn: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.Softmax(1)),
                (3, 1, 4, 5),
            ),
        ),
    ),
)
