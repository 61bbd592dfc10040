"""One Spec per layer. `make(torch.nn)` and `make(fastlayers)` are twins under one seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

Make = Callable[[Any], torch.nn.Module]
"""A layer from a namespace: torch.nn or fastlayers.nn."""


@dataclass(frozen=True)
class Variant:
    """One way to build and call a layer: `make(nn)` applied to a tensor of `shape`."""

    make: Make
    shape: tuple[int, ...]


Direction = Literal["forward", "input grad", "weight grad", "backward"]
"""backward: all gradients, of the input and of the parameters."""
Count = Callable[[torch.nn.Module, torch.Tensor, Direction], int]
"""Of a layer applied to an input, both of which may live on the meta device."""


@dataclass(frozen=True)
class Spec:
    """What a layer promises. `supports` and `falls_back` are its row in the README's table.

    `flops`: floating-point operations. `elements`: the fewest elements that must be read from memory and written to it,
    each once; times the size of one they are the fewest bytes. `bench_shapes`: what its speed is measured at, by name,
    the most telling ones first.
    """

    name: str
    variants: dict[str, Variant]
    supports: str
    falls_back: str
    flops: Count
    elements: Count
    bench_shapes: dict[str, Variant]


def _size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _product_flops(module: Any, x: torch.Tensor, direction: Direction) -> int:
    """An output is a sum of as many products as one output's weights; either gradient has as many of them again."""
    return (4 if direction == "backward" else 2) * module(x).numel() * module.weight[0].numel()


def _product_elements(module: torch.nn.Module, x: torch.Tensor, direction: Direction) -> int:
    x_size, y_size, parameters = x.numel(), module(x).numel(), _size(module)
    # x, w, y are read or written in each direction; in backward dx and dw are written beside x and w, which are read.
    return x_size + y_size + parameters + (x_size + parameters if direction == "backward" else 0)


def _per_element(forward: int, backward: int) -> Count:
    def count(module: torch.nn.Module, x: torch.Tensor, direction: Direction) -> int:
        return x.numel() * (forward if direction == "forward" else backward)

    return count


def _children(module: Any, x: torch.Tensor) -> Iterator[tuple[torch.nn.Module, torch.Tensor]]:
    """Every layer and its input."""
    for layer in module:
        yield layer, x
        x = layer(x)


def _sequential_flops(module: torch.nn.Module, x: torch.Tensor, direction: Direction) -> int:
    flops = {spec.name: spec.flops for spec in SPECS}
    layers = _children(module, x)
    return sum(flops[type(layer).__name__](layer, x, direction) for layer, x in layers if type(layer).__name__ in flops)


def _sequential_elements(module: torch.nn.Module, x: torch.Tensor, direction: Direction) -> int:
    """What lies between two layers need not be written in forward, but is read in backward where a weight met it."""
    once = x.numel() + module(x).numel() + _size(module)
    if direction == "forward":
        return once
    hidden = sum(input.numel() for layer, input in _children(module, x) if _size(layer) and input is not x)
    return once + x.numel() + _size(module) + hidden


_Variants = dict[str, tuple[Make, tuple[int, ...]]]


def _spec(
    name: str,
    supports: str,
    falls_back: str,
    flops: Count,
    elements: Count,
    bench_shapes: _Variants,
    **variants: tuple[Make, tuple[int, ...]],
) -> Spec:
    by_name = [{key: Variant(*variant) for key, variant in v.items()} for v in (variants, bench_shapes)]
    return Spec(name, by_name[0], supports, falls_back, flops, elements, by_name[1])


def _linear(rows: int, k: int, n: int) -> tuple[Make, tuple[int, ...]]:
    return lambda nn: nn.Linear(k, n), (rows, k)


def _round_robin(*groups: _Variants) -> _Variants:
    """One of each group, then a second one of each, and so on."""
    turns = itertools.zip_longest(*(group.items() for group in groups))
    return dict(item for turn in turns for item in turn if item is not None)


def _linear_shapes() -> _Variants:
    llama = dict(up=(4096, 14336), down=(14336, 4096), qkv=(4096, 6144), out=(4096, 4096))

    def tokens(*counts: int) -> _Variants:
        return {
            f"Llama-8B {name}, {count} tokens": _linear(count, k, n)
            for count in counts
            for name, (k, n) in llama.items()
        }

    vit, mlp = {}, {}
    for images in (64, 1):
        vit[f"ViT-B up, {images} images"] = _linear(197 * images, 768, 3072)
        vit[f"ViT-B down, {images} images"] = _linear(197 * images, 3072, 768)
    for batch in (64, 8192, 1024, 256):
        mlp[f"MLP 784-512, batch {batch}"] = _linear(batch, 784, 512)
        mlp[f"MLP 512-10, batch {batch}"] = _linear(batch, 512, 10)
    odd = {
        f"odd {rows} x {k} x {n}": _linear(rows, k, n)
        for rows, k, n in ((4097, 1023, 1001), (1000, 1000, 1000), (333, 4095, 4097), (8191, 100, 7))
    }
    head = {"GPT-2 head, 1024 tokens": _linear(1024, 768, 50257)}
    return _round_robin(tokens(4096), vit, mlp, head | odd, tokens(1, 64, 512))


def _conv(
    batch: int, c: int, o: int, image: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[Make, tuple[int, ...]]:
    def make(nn: Any) -> torch.nn.Module:
        return nn.Conv2d(c, o, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)

    return make, (batch, c, image, image)


# (channels in, out, image, kernel, stride): every distinct convolution of ResNet-50 v1.5, one of each sort first.
_RESNET_50 = (
    (64, 64, 56, 3, 1), (256, 64, 56, 1, 1), (256, 256, 14, 3, 1), (128, 128, 56, 3, 2),
    (3, 64, 224, 7, 2), (128, 128, 28, 3, 1), (512, 512, 7, 3, 1), (256, 256, 28, 3, 2), (512, 512, 14, 3, 2),
    (64, 64, 56, 1, 1), (64, 256, 56, 1, 1), (256, 128, 56, 1, 1),
    (128, 512, 28, 1, 1), (512, 128, 28, 1, 1), (512, 256, 28, 1, 1), (256, 1024, 14, 1, 1),
    (1024, 256, 14, 1, 1), (1024, 512, 14, 1, 1), (512, 2048, 7, 1, 1), (2048, 512, 7, 1, 1),
    (256, 512, 56, 1, 2), (512, 1024, 28, 1, 2), (1024, 2048, 14, 1, 2),
)  # fmt: skip


def _conv_shapes() -> _Variants:
    def resnet(batch: int) -> _Variants:
        return {
            f"ResNet-50 {kernel}x{kernel}/{stride} {c}-{o} @{image}, batch {batch}": _conv(
                batch, c, o, image, kernel, stride
            )
            for c, o, image, kernel, stride in _RESNET_50
        }

    others: _Variants = {}
    for c, image, kernel, stride in ((144, 56, 3, 1), (96, 56, 7, 1), (144, 56, 3, 2), (960, 7, 3, 1), (768, 7, 7, 1)):
        name = f"depthwise {kernel}x{kernel}/{stride} {c} @{image}, batch 32"
        others[name] = _conv(32, c, c, image, kernel, stride, c)
    networks: _Variants = {}
    for c, o, image in ((128, 256, 56), (64, 64, 224), (512, 512, 28)):
        networks[f"VGG 3x3 {c}-{o} @{image}, batch 32"] = _conv(32, c, o, image, 3)
    for c, image in ((640, 32), (320, 64), (1280, 16)):
        networks[f"U-Net 3x3 {c} @{image}, batch 4"] = _conv(4, c, c, image, 3)
    for c, image in ((128, 56), (512, 14)):
        networks[f"ResNeXt 3x3 {c} in 32 groups @{image}, batch 32"] = _conv(32, c, c, image, 3, groups=32)
    return _round_robin(resnet(32), resnet(256), others, networks, resnet(1))


_COLUMNS = (4096, 256, 1024, 16384, 65536, 64, 50257, 262144, 1000)
"""Row lengths, 2^27 elements at a time: 256 MB in 16 bits, several times any L2. And once what stays in one."""


def _rows_of(make: Make) -> _Variants:
    sizes = {f"{2**27 // d} x {d}": (2**27 // d, d) for d in _COLUMNS} | {"1024 x 4096": (1024, 4096)}
    return {name: (make, shape) for name, shape in sizes.items()}


def _mlp(nn: Any) -> torch.nn.Module:
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )  # fmt: skip


def _linear_relu(k: int, n: int) -> Make:
    return lambda nn: nn.Sequential(nn.Linear(k, n), nn.ReLU())


def _conv_relu(c: int, stride: int = 1) -> Make:
    return lambda nn: nn.Sequential(nn.Conv2d(c, c, 3, stride=stride, padding=1), nn.ReLU())


_FUSED: _Variants = {
    "Linear+ReLU 8192 x 1024 x 1024": (_linear_relu(1024, 1024), (8192, 1024)),
    "Linear+ReLU 8192 x 4096 x 4096": (_linear_relu(4096, 4096), (8192, 4096)),
    "Linear+ReLU 8192 x 784 x 512": (_linear_relu(784, 512), (8192, 784)),
    **{f"MLP 784-512-512-10, batch {batch}": (_mlp, (batch, 784)) for batch in (64, 8192, 256, 1024)},
    "Conv+ReLU 3x3 64 @56, batch 32": (_conv_relu(64), (32, 64, 56, 56)),
    "Conv+ReLU 3x3 256 @14, batch 32": (_conv_relu(256), (32, 256, 14, 14)),
    "Conv+ReLU 3x3/2 128 @56, batch 32": (_conv_relu(128, 2), (32, 128, 56, 56)),
}


# Sizes lie just above one or two of the tiles that the tests force, and are odd.
SPECS = [
    _spec(
        "Linear",
        "any leading dimensions, none, empty batch; with or without bias; any strides",
        "a bias that isn't (out_features,)",
        _product_flops,
        _product_elements,
        _linear_shapes(),
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
        _product_flops,
        _product_elements,
        _conv_shapes(),
        three=(lambda nn: nn.Conv2d(5, 18, 3, padding=1), (2, 5, 7, 6)),
        strided=(lambda nn: nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0)), (2, 4, 9, 7)),
        dilated=(lambda nn: nn.Conv2d(3, 5, 3, stride=(1, 3), dilation=2, padding=2), (1, 3, 8, 10)),
        grouped=(lambda nn: nn.Conv2d(6, 4, 3, groups=2, bias=False), (2, 6, 5, 5)),
        groups_of_two=(lambda nn: nn.Conv2d(6, 3, 2, groups=3), (2, 6, 4, 3)),
        multiplied=(lambda nn: nn.Conv2d(3, 6, 3, padding=1, groups=3), (2, 3, 4, 5)),
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
        _per_element(1, 1),
        _per_element(2, 3),  # x, y; dy, y, dx
        _rows_of(lambda nn: nn.ReLU()),
        matrix=(lambda nn: nn.ReLU(), (13, 11)),
        scalar=(lambda nn: nn.ReLU(), ()),
        image=(lambda nn: nn.ReLU(), (2, 3, 5, 4)),
    ),
    _spec(
        "Softmax",
        "any dim and length; dim=None with torch's choice and warning; rows of -inf and NaN as torch",
        "a tensor without dimensions",
        _per_element(5, 4),  # maximum, -, exp, sum, /; dy y, sum, -, y ( )
        _per_element(2, 3),
        _rows_of(lambda nn: nn.Softmax(-1)),
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
        _sequential_flops,
        _sequential_elements,
        _FUSED,
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
