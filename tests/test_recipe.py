"""CONTRIBUTING's recipe: an activation is a pair of tile functions, a record and a class; everything else follows."""

from __future__ import annotations

import copy

import pytest
import torch
import triton
import triton.language as tl

import fastlayers
from fastlayers import nn
from fastlayers.kernels import epilogues
from fastlayers.ops import pointwise
from fastlayers.testing import assert_within_budget


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def sigmoid_grad(dy, y):
    return dy * y * (1 - y)


@triton.jit
def square(x):
    return x * x


@triton.jit
def square_grad(dy, x):
    return 2 * dy * x


SIGMOID = pointwise.Pointwise("sigmoid", torch.sigmoid, lambda dy, y: dy * y * (1 - y), saves="output")
SQUARE = pointwise.Pointwise("square", torch.square, lambda dy, x: 2 * dy * x, saves="input")


def door(record: pointwise.Pointwise):
    @fastlayers._dispatch.accelerated(twin=record.torch, why_not=pointwise.why_not)
    def call(input: torch.Tensor) -> torch.Tensor:
        return pointwise.apply(input, record)

    return call


class Sigmoid(torch.nn.Sigmoid):
    pointwise = SIGMOID

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return door(SIGMOID)(input)


class Square(torch.nn.Module):
    pointwise = SQUARE

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return door(SQUARE)(input)


@pytest.fixture(autouse=True)
def _tile_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (sigmoid, sigmoid_grad, square, square_grad):
        monkeypatch.setattr(epilogues, function.__name__, function, raising=False)


@pytest.mark.parametrize(("make", "torchs"), [(Sigmoid, torch.sigmoid), (Square, torch.square)])
def test_alone_and_after_a_layer(make: type[torch.nn.Module], torchs, device: torch.device) -> None:
    for producer, shape in (
        (nn.Identity, (3, 5)),
        (lambda: nn.Linear(5, 4), (3, 5)),
        (lambda: nn.Conv2d(2, 3, 2), (1, 2, 4, 4)),
    ):
        model = nn.Sequential(producer(), make()).to(device)
        x = torch.randn(shape, device=device, requires_grad=True)
        y = model(x)
        right = torchs(copy.deepcopy(model[0]).double()(x.double()))
        assert_within_budget(y, right.float(), right)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        (exact,) = torch.autograd.grad(right, x, dy.double())
        torch.testing.assert_close(dx, exact)


@pytest.mark.parametrize(("make", "fused"), [(Sigmoid, 1), (Square, 2)])
def test_only_what_saves_its_output_joins_a_producer(
    make: type[torch.nn.Module], fused: int, device: torch.device
) -> None:
    model = nn.Sequential(nn.Linear(5, 4), make()).to(device)
    assert len(fastlayers.explain(model, torch.randn(3, 5, device=device))) == fused


@pytest.mark.parametrize("record", [SIGMOID, SQUARE], ids=lambda r: r.name)
def test_second_derivative(record: pointwise.Pointwise, device: torch.device) -> None:
    x = torch.randn(7, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradgradcheck(door(record), x)
