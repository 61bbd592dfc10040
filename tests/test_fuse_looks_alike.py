"""Forwards that look like what `fuse` joins, and where something else reads or writes what is joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fuse_in_place import WIDTH, fused
from torch import nn

import fastlayers

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.fixture(autouse=True)
def _auto() -> Any:
    with fastlayers.policy("auto"):
        yield


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, device=device)


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


class Weights(nn.Module):
    """A forward that writes out what it computes from a Linear, a Dropout and some weights."""

    def __init__(self, function: Callable[[Any, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.lin, self.drop, self.norm = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.LayerNorm(WIDTH)
        self.w = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.cw, self.cb = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4), nn.Parameter(torch.randn(WIDTH))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def written_into(
    norm: Callable[[Any, torch.Tensor], torch.Tensor], s: Any, x: torch.Tensor, *, again: bool
) -> torch.Tensor:
    x = s.lin(x) * 1.0
    d = s.drop(x)
    d += s.w.expand(2, 5, WIDTH)
    k = x * 2  # in eval d is x
    y = norm(s, d) + k
    return y + d if again else y


def one_shape(s: Any, x: torch.Tensor) -> torch.Tensor:
    shape = x.shape
    return torch.addmm(s.cb, x.view(-1, shape[-1]), s.cw).view(shape[:-1] + (WIDTH,))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("norm", [lambda s, d: rms(d, s.w), lambda s, d: s.norm(d)], ids=["written", "layer"])
def test_a_sum_that_is_written_into_what_a_dropout_gives_back(norm: Any, again: bool, x: torch.Tensor) -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        return written_into(norm, s, x, again=again)

    model = Weights(forward).to(x.device).eval()
    ours, _ = fused(model)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "forward",
    [one_shape, lambda s, x: rms(x.size(0) + x, s.w), lambda s, x: rms(x + x.size(0), s.w)],
    ids=["shape", "a size in front", "a size behind"],
)
def test_sizes(forward: Any, x: torch.Tensor) -> None:
    model = Weights(forward).to(x.device)
    ours, _ = fused(model)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
