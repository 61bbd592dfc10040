"""Networks that are timed whole, in training and in eval. `make(nn)`, given torch.nn or fastlayers.nn, as in the catalog."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastlayers.catalog.row import Case, Make, case


def mlp(nn: Any) -> torch.nn.Module:
    """The classifier of torch's tutorials."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )  # fmt: skip


class _Residual(torch.nn.Module):
    """y = relu(x + f(x)), or relu(shortcut(x) + f(x))."""

    def __init__(self, nn: Any, body: torch.nn.Module, shortcut: torch.nn.Module | None):
        super().__init__()
        self.body, self.shortcut, self.last = body, shortcut, nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(x) + (x if self.shortcut is None else self.shortcut(x)))


def bottleneck(nn: Any, c: int, width: int, stride: int) -> torch.nn.Module:
    """ResNet-50's block, from c to 4 * width channels."""
    body = nn.Sequential(
        nn.Conv2d(c, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
    )  # fmt: skip
    if stride == 1 and c == 4 * width:
        return _Residual(nn, body, None)
    match = nn.Sequential(nn.Conv2d(c, 4 * width, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * width))
    return _Residual(nn, body, match)


def resnet(nn: Any) -> torch.nn.Module:
    """ResNet-50's stem and one downsampling and one plain bottleneck of each width: He et al., arXiv:1512.03385."""

    layers = [nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers += [nn.MaxPool2d(3, stride=2, padding=1)]
    channels = 64
    for width in (64, 128, 256, 512):
        layers += [bottleneck(nn, channels, width, 1 if width == 64 else 2), bottleneck(nn, 4 * width, width, 1)]
        channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


class _Block(torch.nn.Module):
    """A pre-norm transformer block on (N, 197, 768), its MLP with ReLU in place of GELU."""

    def __init__(self, nn: Any, width: int = 768, heads: int = 12):
        super().__init__()
        self.heads = heads
        self.norms = torch.nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.out(attended)
        return x + self.mlp(self.norms[1](x))


def vit_block(nn: Any) -> torch.nn.Module:
    """One block of ViT-B: Dosovitskiy et al., arXiv:2010.11929."""
    return _Block(nn)


TRAINING: dict[str, Case] = {
    "MLP step, batch 64": case(mlp, (64, 784)),
    "ResNet-50-like step, batch 64": case(resnet, (64, 3, 224, 224)),
    "ViT-B block step, 64 images": case(vit_block, (64, 197, 768)),
    "MLP step, batch 8192": case(mlp, (8192, 784)),
    "MLP step, batch 1024": case(mlp, (1024, 784)),
    "ResNet-50-like step, batch 8": case(resnet, (8, 3, 224, 224)),
    "ViT-B block step, 8 images": case(vit_block, (8, 197, 768)),
}
"""By name, the most telling ones first."""


def evaluated(make: Make) -> Make:
    """The network in eval, its batch normalisations with statistics of some training."""

    def make_evaluated(nn: Any) -> torch.nn.Module:
        network: Any = make(nn)
        network.eval()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
        return network

    return make_evaluated


def _conv(c: int) -> Make:
    return lambda nn: nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU())


INFERENCE: dict[str, Case] = {
    name: case(evaluated(make), shape)
    for name, (make, shape) in {
        "ResNet-50-like, batch 64": (resnet, (64, 3, 224, 224)),
        "Conv+BN+ReLU 3x3 256 @14, batch 32": (_conv(256), (32, 256, 14, 14)),
        "Bottleneck 256 @56, batch 32": (lambda nn: bottleneck(nn, 256, 64, 1), (32, 256, 56, 56)),
        "ResNet-50-like, batch 1": (resnet, (1, 3, 224, 224)),
        "Conv+BN+ReLU 3x3 64 @56, batch 32": (_conv(64), (32, 64, 56, 56)),
    }.items()
}
"""The same in eval."""
