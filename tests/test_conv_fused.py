"""Convolutions with what follows them in one kernel: a batch normalisation in eval, a residual, an activation.

This file looks inside: at which kernels are launched, in tiles that it forces, and at the memory format of what lies between
two layers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolutions import last, pair, r

import fastlayers
import fastlayers.functional as FL
from fastlayers import nn
from fastlayers.fusion import plan
from fastlayers.kernels.conv import gather as kernels
from fastlayers.kernels.matmul.tiles import Product
from fastlayers.kernels.runtime import tiles as _tiles
from fastlayers.kernels.runtime.tiles import Tile
from fastlayers.ops.conv import _is_channels_last
from fastlayers.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("small_tiles")


def joined(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None, *, groups: int = 1, norm: Any = None, residual: Any = None,
    relu: bool = False,
) -> torch.Tensor:  # fmt: skip
    """What a Sequential makes of a convolution, a batch normalisation with these statistics, a residual and a ReLU."""
    conv = nn.Conv2d(w.shape[1] * groups, w.shape[0], tuple(w.shape[2:]), groups=groups, bias=b is not None)
    conv.weight = torch.nn.Parameter(w, requires_grad=False)
    conv.bias = None if b is None else torch.nn.Parameter(b, requires_grad=False)
    row: list[Any] = [conv]
    if norm is not None:
        mean, variance, weight, bias, eps = norm
        layer = torch.nn.BatchNorm2d(len(mean), eps=eps, affine=weight is not None).eval()
        layer.running_mean, layer.running_var = mean, variance
        if weight is not None:
            layer.weight, layer.bias = (torch.nn.Parameter(t, requires_grad=False) for t in (weight, bias))
        row.append(layer)
    if residual is not None:
        row.append(plan.Residual(residual, lambda y: y + residual))
    if relu:
        row.append(nn.ReLU())
    return plan.run(row, x)


@pytest.mark.parametrize("way", ["pointers", "boxes", "one tap", "depthwise"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_normalised_in_the_epilogue(way: str, dtype: torch.dtype, device: torch.device, launched: list[str]) -> None:
    groups, kernel = (6, 3) if way == "depthwise" else (1, 1 if way == "one tap" else 3)
    x = r(2, 6, 5, 4, device=device, dtype=dtype)
    w, b = r(6, 6 // groups, kernel, kernel, device=device, dtype=dtype), r(6, device=device, dtype=dtype)
    mean, var, weight, bias = (t.to(device, dtype) for t in (r(6), r(6).square(), r(6), r(6)))
    for norm in ((mean, var, weight, bias, 1e-3), (mean, var, None, None, 0.1)):
        results = []
        for t in (dtype, torch.float64):
            y = F.conv2d(x.to(t), w.to(t), b.to(t), groups=groups)
            results.append(F.batch_norm(y, *[None if n is None else n.to(t) for n in norm[:4]], eps=norm[4]).relu())
        launched.clear()
        with torch.no_grad(), _tiles.force(**({"box": Tile(16, 32, 16)} if way == "boxes" else {})):
            y = joined(x, w, b, groups=groups, norm=norm, relu=True)
        assert "_pointwise_kernel" not in launched
        assert_within_budget(y, *results)


RESIDUAL = {
    "pointers": (3, 6, 1, {}),
    "boxes": (3, 6, 1, dict(box=Tile(16, 32, 16))),
    "packed boxes": (3, 10, 2, dict(box=Tile(16, 32, 16))),
    "depthwise": (3, 6, 6, {}),
    "product": (1, 6, 1, {}),
    "product in shares": (1, 18, 1, dict(matmul=Product(Tile(32, 16, 16), "ieee", splits=2))),
    "product transposed": (1, 6, 1, dict(matmul=Product(Tile(32, 16, 16), "ieee", transposed=True))),
    "product, halves": (1, 6, 1, dict(matmul=Product(Tile(64, 64, 16, warps=1), "ieee"))),
}
"""Size of the kernel, channels, groups, tiles."""


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("way", RESIDUAL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_added_in_the_epilogue(
    dtype: torch.dtype, way: str, normalised: bool, device: torch.device, launched: list[str]
) -> None:
    kernel, c, groups, forced = RESIDUAL[way]
    x = r(2, c, 5, 4, device=device, dtype=dtype)
    w, b = r(6, c // groups, kernel, kernel, device=device, dtype=dtype), r(6, device=device, dtype=dtype)
    norm = (r(6), r(6).square(), r(6), r(6)) if normalised else ()
    size = F.conv2d(x, w, groups=groups).shape
    for format in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=format)
        for residual in (r(size), r(size).to(memory_format=torch.channels_last), r(1, *size[1:]).expand(size)):
            residual = residual.to(device, dtype)
            for relu in (False, True):
                results = []
                for t in (dtype, torch.float64):
                    y = F.conv2d(x.to(t), w.to(t), b.to(t), groups=groups)
                    y = F.batch_norm(y, *[n.to(device, t) for n in norm], eps=0.1) if normalised else y
                    y = y + residual.to(t)
                    results.append(y.relu() if relu else y)
                statistics = (*[n.to(device, dtype) for n in norm], 0.1) if normalised else None
                launched.clear()
                with torch.no_grad(), _tiles.force(**forced):
                    y = joined(x, w, b, groups=groups, norm=statistics, residual=residual, relu=relu)
                assert_within_budget(y, *results)
                assert y.stride() == results[0].contiguous(memory_format=format).stride()
                # Else the layers run one by one, and the sum is torch's.
                fits = residual.stride() == y.stride()
                assert ("_pointwise_kernel" in launched) == (relu and not fits)
                others = [name for name in launched if name != "_pointwise_kernel"]
                assert len(others) <= 3, "copies of a weight or an image, and shares to add up"


def test_what_is_added_elsewhere(device: torch.device) -> None:
    """Whatever a kernel can't add is torch's sum, with its broadcasting, promotion, gradients and errors."""
    x, w = r(2, 3, 5, 4, device=device), r(4, 3, 3, 3, device=device)
    y = FL.conv2d(x, w)
    cases = [r(y.shape, dtype=torch.float64), r(4, 1, 1), r(()), r(y.shape).requires_grad_(), torch.ones(y.shape).int()]
    with fastlayers.policy("auto"):
        for residual in (case.to(device) for case in cases):
            for _ in range(3):
                ours = joined(x, w, residual=residual)
                torch.testing.assert_close(ours, y + residual)
                assert ours.requires_grad == residual.requires_grad
        x.requires_grad_()
        (ours,) = torch.autograd.grad(joined(x, w, residual=cases[0].float().to(device)).sum(), x)
        torch.testing.assert_close(ours, torch.autograd.grad(F.conv2d(x, w).sum(), x)[0])
        with pytest.raises(RuntimeError, match="must match the size"):
            joined(x, w, residual=r(2, 4, 5, 4, device=device))
        residual = r(y.shape, device=device)
        for dtype in (torch.bfloat16, torch.float32):
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                for _ in range(3):
                    ours = joined(x, w, residual=residual.to(dtype))
                    assert ours.dtype == dtype
                    torch.testing.assert_close(ours, F.conv2d(x, w) + residual.to(dtype), rtol=0.02, atol=0.1)
        same = r(2, 4, 5, 4, device=device)
        with torch.no_grad():
            one = r(4, 4, 1, 1, device=device)
            for _ in range(3):
                torch.testing.assert_close(joined(same, one, residual=same), F.conv2d(same, one) + same)


def three(space: Any) -> torch.nn.Module:
    return space.Sequential(
        space.Conv2d(2, 3, 3, padding=1), space.ReLU(), space.Conv2d(3, 5, 2), space.Conv2d(5, 4, 1), space.ReLU()
    )


def test_between_convolutions_images_stay_in_channels_last(
    device: torch.device, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCHW comes in and goes out; it is converted once. Results, gradients and strides are torch's."""
    formats = []
    conv2d = kernels.conv2d
    monkeypatch.setattr(
        kernels, "conv2d", lambda x, *a, **k: (formats.append(_is_channels_last(x)), conv2d(x, *a, **k))[1]
    )
    ours, theirs = pair(three, device)
    for x in (r(2, 2, 4, 5, device=device), last(2, 2, 4, 5).to(device)):
        for weight in (torch.contiguous_format, torch.channels_last):
            ours[2].weight.data = ours[2].weight.data.contiguous(memory_format=weight)
            theirs[2].weight.data = theirs[2].weight.data.contiguous(memory_format=weight)
            formats.clear()
            results = []
            for model in (ours, theirs):
                leaf = x.clone().requires_grad_()
                y = model(leaf)
                results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])])
            assert formats == [_is_channels_last(x), True, True]
            assert results[0][0].stride() == results[1][0].stride()
            torch.testing.assert_close(*results)
    with fastlayers.policy("torch"):
        assert ours(r(2, 2, 4, 5, device=device)).is_contiguous(memory_format=torch.channels_last)
