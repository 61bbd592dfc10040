"""Activations as tile functions: GELU's accuracy and special values, and products that write what comes before one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from activations import one_by_one

from fastlayers.kernels.matmul.matmul import matmul
from fastlayers.kernels.matmul.tiles import Product
from fastlayers.kernels.pointwise import pointwise, pointwise_grad
from fastlayers.kernels.reduce import activation_grad
from fastlayers.kernels.runtime import tiles
from fastlayers.kernels.runtime.tiles import Tile
from fastlayers.ops.activation import Activation
from fastlayers.testing import assert_within_budget

RELU, GELU, GELU_TANH = Activation("relu"), Activation("gelu"), Activation("gelu_tanh")
nan = float("nan")

WAYS = {
    "a tile": Product(Tile(16, 16, 16), "ieee"),
    "halves": Product(Tile(64, 64, 16, warps=1), "ieee"),
    "shares of K": Product(Tile(16, 16, 16), "ieee", splits=2),
    "transposed": Product(Tile(16, 16, 16), "ieee", transposed=True),
    "descriptors": Product(Tile(16, 16, 16), "ieee", descriptors=True),
    "persistent": Product(Tile(16, 16, 16), "ieee", descriptors=True, programs=2),
}


def gelu(x: torch.Tensor, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """y and dy/dx by torch."""
    x = x.detach().requires_grad_()
    y = F.gelu(x, approximate="tanh" if activation is GELU_TANH else "none")
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def ours(x: torch.Tensor, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """y and dy/dx by the kernels."""
    y, dx = torch.full_like(x, nan), torch.full_like(x, nan)
    pointwise(x, y, activation)
    pointwise_grad(torch.ones_like(x), x, dx, activation)
    return y, dx


@pytest.mark.parametrize("activation", [GELU, GELU_TANH])
def test_gelu_is_as_close_as_torchs(activation: Activation, device: torch.device) -> None:
    near, far = torch.logspace(-12, 0, 2000, device=device), torch.linspace(-30, 30, 40_001, device=device)
    x = torch.cat([near, -near, far])
    exact = gelu(x.double(), activation)
    for found, expected, right in zip(ours(x, activation), gelu(x, activation), exact, strict=True):
        error, theirs = ((t - right).abs() / (1 + right.abs()) for t in (found, expected))
        assert error.max() <= 1.1 * theirs.max()
    for found, right in zip(ours(x.double(), activation), exact, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-14)
    if activation is GELU:  # in the tail, where torch's own formula has no digits left
        tail = torch.linspace(-9, -3, 1000, device=device)
        right = tail.double() * 0.5 * torch.special.erfc(-tail.double() / math.sqrt(2))
        torch.testing.assert_close(ours(tail, activation)[0].double(), right, rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [GELU, GELU_TANH])
def test_gelu_of_nan_infinities_and_huge_numbers(
    activation: Activation, dtype: torch.dtype, device: torch.device
) -> None:
    """-inf gives NaN, as torch."""
    special = [-math.inf, -1e20, -1e15, -200.0, -0.0, 0.0, 200.0, 1e15, 1e20, math.inf, nan]
    x = torch.tensor(special, dtype=dtype, device=device)
    for found, right in zip(ours(x, activation), one_by_one(gelu, x, activation), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(ours(x, activation)[0].signbit()[4:6], x.signbit()[4:6])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", [GELU, GELU_TANH, RELU])
def test_a_product_writes_what_comes_before_its_activation(
    way: str, dtype: torch.dtype, activation: Activation, device: torch.device
) -> None:
    a, b, bias = (torch.randn(*shape, device=device).to(dtype) for shape in ((20, 32), (32, 24), (24,)))
    out, z = (torch.full((20, 24), nan, dtype=dtype, device=device) for _ in "12")
    with tiles.force(matmul=WAYS[way], sum_partials=Tile(2, 64)):
        assert matmul(a, b, bias=bias, then=activation, z=z, out=out, precision="ieee") is out
    exact = a.double() @ b.double() + bias
    assert_within_budget(z, torch.addmm(bias, a, b), exact)
    assert_within_budget(out, activation(torch.addmm(bias, a, b)), activation(exact))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_derivative_of_the_input_in_an_epilogue(way: str, dtype: torch.dtype, device: torch.device) -> None:
    """With its column sums where K isn't shared out."""
    a, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((20, 32), (32, 24)))
    saved = torch.randn(24, 20, device=device).to(dtype).T
    sums = None if WAYS[way].splits > 1 else torch.full((24,), nan, dtype=dtype, device=device)
    with tiles.force(matmul=WAYS[way], sum_partials=Tile(2, 64)):
        dz = matmul(a, b, undo=(GELU, saved), column_sums=sums, precision="ieee")
    slope = gelu(saved.double(), GELU)[1]
    exact, reference = (a.double() @ b.double()) * slope, (a @ b) * slope.to(dtype)
    assert_within_budget(dz, reference, exact)
    if sums is not None:
        assert_within_budget(sums, reference.sum(0), exact.sum(0))


def test_a_gradient_with_its_sums(device: torch.device) -> None:
    """Over one activation and over none; dz alone, sums alone, neither."""
    dy, saved = torch.randn(2, 5, 7, device=device), torch.randn(2, 7, 5, device=device).mT
    dz, sums = torch.full_like(saved, nan), torch.full((7,), nan, device=device)
    with tiles.force(activation_grad=Tile(4, 4), sum_partials=Tile(2, 4)):
        activation_grad(dy, saved, GELU, dz, sums)
        right = dy.double() * gelu(saved.double(), GELU)[1]
        torch.testing.assert_close(dz.double(), right, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sums.double(), right.sum((0, 1)), rtol=1e-5, atol=1e-5)
        activation_grad(dy, saved, GELU, dz.fill_(nan), None)
        torch.testing.assert_close(dz.double(), right, rtol=1e-5, atol=1e-6)
        activation_grad(dy, None, None, None, sums.fill_(nan))
        torch.testing.assert_close(sums, dy.sum((0, 1)), rtol=1e-5, atol=1e-5)
        activation_grad(dy, None, None, None, None)


def test_many_partial_sums_are_shared_among_programs(launched: list[str], device: torch.device) -> None:
    """Else a bias of few channels is added up by one program, tile after tile."""
    dy, sums = torch.randn(1, 2100, 3, device=device), torch.full((3,), nan, device=device)
    with tiles.force(activation_grad=Tile(4, 4)):
        activation_grad(dy, None, None, None, sums)
    torch.testing.assert_close(sums.double(), dy.double().sum((0, 1)), rtol=1e-5, atol=1e-4)
    assert launched == ["_activation_grad_kernel", "_sum_partials_kernel", "_sum_partials_kernel"]


def test_results_of_any_strides(device: torch.device) -> None:
    """In place, into slices, from expanded gradients; nothing is written beside a slice."""
    for x, out in (
        (torch.randn(6, 8, device=device)[:, ::2], torch.full((6, 8), nan, device=device)[:, 1::2]),
        (torch.randn(4, 6, device=device).T, torch.full((6, 4), nan, device=device)),
        (torch.randn(6, 1, device=device).expand(6, 4), torch.full((4, 6), nan, device=device).T),
    ):
        right, slope = gelu(x, GELU)
        pointwise(x, out, GELU)
        torch.testing.assert_close(out, right)
        pointwise_grad(torch.full((1, 1), 2.0, device=device).expand_as(x), x, out, GELU)
        torch.testing.assert_close(out, 2 * slope)
        inplace = torch.stack([x, x], -1)[..., 0]
        pointwise(inplace, inplace, GELU)
        torch.testing.assert_close(inplace, right)
        beside = out._base if out._base is not None and out._base.numel() > out.numel() else None
        assert beside is None or beside[:, ::2].isnan().all()
