"""What the tests of convolutions share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import fastlayers.functional as FL
from fastlayers import nn
from fastlayers.testing import assert_within_budget

r = torch.randn


def last(*shape: int) -> torch.Tensor:
    return r(shape).to(memory_format=torch.channels_last)


FORMATS = [
    lambda *s: r(s),
    lambda *s: r(s).to(memory_format=torch.channels_last),
    lambda *s: r(s[0], s[2], s[3], s[1] + 2).permute(0, 3, 1, 2)[:, 1:-1],
    lambda *s: r(s[0], s[1], s[2] + 1, s[3] * 2)[:, :, 1:, ::2],
    lambda *s: r(s[3], s[2], s[1], s[0]).permute(3, 2, 1, 0),
    lambda *s: r(1, *s[1:]).expand(s),
    lambda *s: r(s[0], 1, *s[2:]).expand(s),
]


def check(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, **geometry: Any) -> None:
    """Against torch in float64, where only the order of sums differs."""
    x, w, b = x.double(), w.double(), None if b is None else b.double()
    dy = torch.randn_like(F.conv2d(x, w, b, **geometry))
    results = []
    for conv in (FL.conv2d, F.conv2d):
        leaves = [t.clone().requires_grad_() for t in (x, w, b) if t is not None]
        y = conv(*leaves, **geometry)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert results[0][0].stride() == results[1][0].stride()


def within_budget(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, **geometry: Any) -> None:
    """Result and gradients against torch in float64, within the budget of their dtype."""
    inputs = [t for t in (x, w, b) if t is not None]
    dy = torch.randn_like(F.conv2d(*inputs, **geometry))
    results = []
    for conv, dtype in ((FL.conv2d, x.dtype), (F.conv2d, x.dtype), (F.conv2d, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        y = conv(*leaves, **geometry)
        results.append([y, *torch.autograd.grad(y, leaves, dy.to(dtype))])
    for ours, torchs, exact in zip(*results, strict=True):
        assert_within_budget(ours, torchs, exact)
    assert results[0][0].stride() == results[1][0].stride()


def pair(make: Any, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same model of our layers and of torch's, with statistics as after some training."""
    ours, theirs = make(nn).to(device), make(torch.nn).to(device)
    for module in theirs.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs
