"""One Spec per layer. `make(torch.nn)` and `make(fastlayers)` are twins under one seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Make = Callable[[Any], torch.nn.Module]
"""A layer from a namespace: torch.nn or fastlayers.nn."""


@dataclass(frozen=True)
class Variant:
    """One way to build and call a layer: `make(nn)` applied to a tensor of `shape`."""

    make: Make
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """What a layer promises. `supports` and `falls_back` are its row in the README's table."""

    name: str
    variants: dict[str, Variant]
    supports: str
    falls_back: str


def _spec(name: str, supports: str, falls_back: str, **variants: tuple[Make, tuple[int, ...]]) -> Spec:
    return Spec(name, {key: Variant(*variant) for key, variant in variants.items()}, supports, falls_back)


# Sizes lie just above one or two of the tiles that the tests force, and are odd.
SPECS = [
    _spec(
        "Linear",
        "any leading dimensions, none, empty batch; with or without bias; any strides",
        "a bias that isn't (out_features,)",
        matrix=(lambda nn: nn.Linear(37, 19), (21, 37)),
        no_bias=(lambda nn: nn.Linear(18, 33, bias=False), (3, 5, 18)),
        vector=(lambda nn: nn.Linear(9, 5), (9,)),
        one_feature=(lambda nn: nn.Linear(5, 1), (4, 5)),
        deep=(lambda nn: nn.Linear(6, 4), (2, 1, 3, 2, 6)),
    ),
    _spec(
        "Conv2d",
        "stride, padding (numbers, same, valid), dilation, groups, depthwise, the four padding modes, unbatched input, "
        "NCHW and channels_last with torch's rule for the result",
        "a dimension of size 0 other than the batch",
        three=(lambda nn: nn.Conv2d(5, 18, 3, padding=1), (2, 5, 7, 6)),
        strided=(lambda nn: nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0)), (2, 4, 9, 7)),
        dilated=(lambda nn: nn.Conv2d(3, 5, 3, stride=(1, 3), dilation=2, padding=2), (1, 3, 8, 10)),
        grouped=(lambda nn: nn.Conv2d(6, 4, 3, groups=2, bias=False), (2, 6, 5, 5)),
        depthwise=(lambda nn: nn.Conv2d(5, 5, 3, padding=1, groups=5), (2, 5, 5, 4)),
        one=(lambda nn: nn.Conv2d(17, 7, 1), (2, 17, 3, 4)),
        one_strided=(lambda nn: nn.Conv2d(4, 6, 1, stride=2), (2, 4, 5, 6)),
        same=(lambda nn: nn.Conv2d(3, 4, (4, 2), padding="same", dilation=(1, 2)), (2, 3, 6, 5)),
        valid=(lambda nn: nn.Conv2d(3, 4, 2, padding="valid"), (2, 3, 4, 4)),
        reflect=(lambda nn: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (1, 2, 4, 5)),
        replicate=(lambda nn: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="replicate"), (1, 2, 4, 5)),
        circular=(lambda nn: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (1, 2, 4, 5)),
        unbatched=(lambda nn: nn.Conv2d(3, 4, 3, padding=1), (3, 5, 4)),
        whole_image=(lambda nn: nn.Conv2d(3, 4, (4, 5)), (2, 3, 4, 5)),
    ),
    _spec(
        "ReLU",
        "any shape and strides; inplace with torch's version counting; NaN stays NaN",
        "inplace on a view that requires grad",
        matrix=(lambda nn: nn.ReLU(), (13, 11)),
        scalar=(lambda nn: nn.ReLU(), ()),
        image=(lambda nn: nn.ReLU(), (2, 3, 5, 4)),
    ),
    _spec(
        "Softmax",
        "any dim and length; dim=None with torch's choice and warning; rows of -inf and NaN as torch",
        "a tensor without dimensions",
        rows=(lambda nn: nn.Softmax(-1), (9, 37)),
        columns=(lambda nn: nn.Softmax(1), (3, 21, 5)),
        first=(lambda nn: nn.Softmax(0), (17, 3)),
        one=(lambda nn: nn.Softmax(1), (4, 1)),
        vector=(lambda nn: nn.Softmax(0), (23,)),
    ),
    _spec(
        "Sequential",
        "Linear or Conv2d with the activation that follows in one kernel, Conv2d with BatchNorm2d as well (in eval, where "
        "no gradients are recorded), consecutive Linear layers in one function for autograd; indexing, slicing, append, "
        "insert, extend, nesting",
        "a layer with a hook, a subclass or a forward of its own is not fused, nor its neighbours across it",
        linear_relu=(lambda nn: nn.Sequential(nn.Linear(19, 18), nn.ReLU()), (5, 19)),
        chain=(
            lambda nn: nn.Sequential(nn.Linear(9, 17), nn.ReLU(), nn.Linear(17, 12), nn.Linear(12, 5), nn.ReLU()),
            (3, 2, 9),
        ),
        conv_relu=(
            lambda nn: nn.Sequential(
                nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 2, stride=2), nn.ReLU(True)
            ),
            (2, 3, 6, 5),
        ),
        mixed=(
            lambda nn: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.Softmax(1)),
            (3, 1, 4, 5),
        ),
    ),
]


def table() -> str:
    """The README's table of layers, in Markdown."""
    always = "CPU tensors, tensor subclasses, functorch transforms, forward-mode AD, other dtypes"
    rows = ["| Layer | On Triton kernels, forward and backward | Torch's own function takes |", "|---|---|---|"]
    rows += [f"| `{spec.name}` | {spec.supports} | {spec.falls_back} |" for spec in SPECS]
    return "\n".join([*rows, f"| all | float16, bfloat16, float32, float64 | {always} |"])
