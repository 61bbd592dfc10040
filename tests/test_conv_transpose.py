"""Transposed convolutions in the ways in which they can be computed, and with what follows them in one kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolutions import last, pair, r

import fastlayers
import fastlayers.functional as FL
from fastlayers import nn
from fastlayers.kernels.runtime import tiles as _tiles
from fastlayers.kernels.runtime.tiles import Tile

pytestmark = pytest.mark.usefixtures("small_tiles")


def check(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, **sizes: Any) -> None:
    """Result and gradients against torch, in float64."""
    tensors = [t.double() for t in (x, w, b) if t is not None]
    dy = torch.randn_like(F.conv_transpose2d(*tensors, **sizes))
    results = []
    for function in (FL.conv_transpose2d, F.conv_transpose2d):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = function(*leaves, **sizes)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert results[0][0].stride() == results[1][0].stride()


@pytest.mark.parametrize(
    ("kernel", "sizes"),
    [
        ((3, 3), dict(stride=2, padding=1, output_padding=1)),
        ((2, 2), dict(stride=(3, 2), output_padding=(2, 0))),
        ((3, 2), dict(dilation=(2, 3), padding=2, output_padding=(1, 2))),
        ((1, 1), dict(dilation=2, output_padding=1)),
        ((4, 3), dict(stride=(4, 2), padding=(3, 1), dilation=(1, 2))),
    ],
)
@pytest.mark.parametrize("boxes", [False, True])
def test_sizes(kernel: Any, sizes: dict[str, Any], boxes: bool, device: torch.device, launched: list[str]) -> None:
    with _tiles.force(**(dict(box=Tile(16, 32, 16)) if boxes else {})):
        check(last(2, 16, 3, 4).to(device), r(16, 8, *kernel, device=device), r(8, device=device), **sizes)
    assert ("_conv_box_kernel" in launched) == boxes


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_by_boxes(groups: int, device: torch.device) -> None:
    with _tiles.force(box=Tile(16, 32, 16)):
        x, w, b = r(1, 8, 3, 4, device=device), r(8, 2, 3, 3, device=device), r(2 * groups, device=device)
        check(x, w, b, stride=2, groups=groups)


@pytest.mark.parametrize("kind", ["gather", "boxes", "depthwise", "product"])
@pytest.mark.parametrize("gelu", [False, True])
def test_what_follows_in_training(kind: str, gelu: bool, device: torch.device, launched: list[str]) -> None:
    """One kernel forward; the derivative of GELU needs what comes before it."""

    def make(space: Any) -> torch.nn.Module:
        conv = dict(
            depthwise=lambda: space.ConvTranspose2d(8, 8, 3, stride=2, groups=8),
            product=lambda: space.ConvTranspose2d(8, 4, 1),
        ).get(kind, lambda: space.ConvTranspose2d(8, 4, 2, stride=3, output_padding=1))
        return space.Sequential(conv(), space.GELU() if gelu else space.LeakyReLU(0.3))

    ours, theirs = pair(make, device)
    x, found = last(2, 8, 3, 4).to(device), []
    with _tiles.force(**(dict(box=Tile(16, 32, 16)) if kind == "boxes" else {})):
        for model in (ours, theirs):
            leaf = x.detach().requires_grad_()
            launched.clear()
            y = model(leaf)
            if model is ours:
                assert not [name for name in launched if "pointwise" in name]
            found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["1d", "2d", "3d", "transposed 1d", "transposed 2d", "transposed 3d"])
def test_normalised_in_inference(kind: str, device: torch.device, launched: list[str]) -> None:
    """With BatchNorm's statistics and a ReLU, one kernel."""
    dims = int(kind[-2])

    def make(space: Any) -> torch.nn.Module:
        conv = getattr(space, f"ConvTranspose{dims}d" if "transposed" in kind else f"Conv{dims}d")
        model = space.Sequential(conv(4, 6, 3, stride=2), getattr(space, f"BatchNorm{dims}d")(6), space.ReLU())
        return model.eval()

    ours, theirs = pair(make, device)
    x = r(2, 4, *(5, 4, 3)[:dims], device=device)
    with torch.no_grad():
        y = ours(x)
        assert len([name for name in launched if "channels_last" not in name]) == 1
        torch.testing.assert_close(y, theirs(x))
        # A normalisation of other dimensions is torch's to refuse.
        other = nn.Sequential(ours[0], getattr(nn, f"BatchNorm{dims % 2 + 1}d")(6)).to(device).eval()
        with fastlayers.policy("auto"), pytest.raises(ValueError, match="expected"):
            other(x)


def test_output_size(device: torch.device) -> None:
    ours, theirs = pair(lambda space: space.ConvTranspose2d(3, 2, 3, stride=3), device)
    x = r(1, 3, 4, 5, device=device)
    for size in ([12, 15], [14, 17], (1, 2, 13, 16)):
        torch.testing.assert_close(ours(x, output_size=size), theirs(x, output_size=size))
    for layer in (ours, theirs):
        with pytest.raises(ValueError, match="requested an output size"):
            layer(x, output_size=[20, 15])
