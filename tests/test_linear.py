"""Linear: bad input, sizes of zero, what is saved, float32's switch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastlayers
import fastlayers.functional as FL

r = torch.randn


BAD = {
    "features": lambda: (r(3, 4), r(5, 3)),
    "bias": lambda: (r(3, 4), r(5, 4), r(4)),
    "scalar": lambda: (r(()), r(5, 4)),
    "dtypes": lambda: (r(3, 4), r(5, 4).double()),
    "bias dtype": lambda: (r(3, 4), r(5, 4), r(5).double()),
    "none": lambda: (None, r(5, 4)),
    "no weight": lambda: (r(3, 4), None),
    "list": lambda: ([1.0], r(5, 4)),
    "bias list": lambda: (r(3, 4), r(5, 4), [1.0]),
    "devices": lambda: (r(3, 4), r(5, 4, device="meta"), r(5)),
    "too few": lambda: (r(3, 4),),
    "three dimensions": lambda: (r(3, 4), r(5, 4, 2)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, launched: list[str]) -> None:
    """torch's exception, before anything is launched."""
    args: Any = BAD[case]()
    try:
        F.linear(*args)
    except Exception as error:
        with fastlayers.policy("auto"), pytest.raises(type(error)):
            FL.linear(*args)
    else:
        with fastlayers.policy("auto"):
            FL.linear(*args)
    assert not launched


@pytest.mark.parametrize(
    "shapes", [((4,), (4,), None), ((3, 4), (5, 4), (1,)), ((3, 4), (5, 4), ()), ((3, 4), (5, 4), (3, 5))]
)
def test_what_torch_takes_and_we_dont(shapes: tuple, device: torch.device) -> None:
    args = [None if s is None else r(s, device=device) for s in shapes]
    with fastlayers.policy("auto"):
        torch.testing.assert_close(FL.linear(*args), F.linear(*args))


@pytest.mark.parametrize("shape", [((3, 0), (5, 0)), ((3, 4), (0, 4)), ((2, 0, 4), (5, 4)), ((0,), (3, 0))])
def test_sizes_of_zero(shape: tuple[tuple[int, ...], tuple[int, int]], device: torch.device) -> None:
    x, w, b = r(shape[0], device=device), r(shape[1], device=device), r(shape[1][0], device=device)
    results = []
    for linear in (FL.linear, F.linear):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        y = linear(*leaves)
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert a.shape == b.shape


def test_tf32_is_within_its_own_rounding(device: torch.device) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    x, w = r(33, 65, device=device), r(17, 65, device=device)
    exact = F.linear(x.double(), w.double())
    error = (FL.linear(x, w) - exact).norm() / exact.norm()
    assert 1e-6 < error < 2**-9  # coarser than float32, as asked; no coarser than 10 bits of mantissa


def test_bias_alone_saves_nothing(device: torch.device) -> None:
    """So the graph may be gone through twice, as torch's."""
    for space in (fastlayers.nn, torch.nn):
        layer = space.Linear(3, 2).to(device)
        layer.weight.requires_grad_(False)
        y = layer(torch.randn(4, 3, device=device)).sum()
        y.backward()
        y.backward()
        assert layer.bias.grad.tolist() == [8, 8]


@pytest.mark.parametrize("bias", [True, False])
def test_a_sparse_gradient(bias: bool, device: torch.device) -> None:
    """torch's products take one, where it is a matrix's."""
    layer, x = fastlayers.nn.Linear(3, 2, bias=bias).to(device), torch.randn(4, 3, device=device, requires_grad=True)
    dy = torch.eye(4, 2, device=device)
    expected = torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)
    found = torch.autograd.grad(layer(x), [x, *layer.parameters()], dy.to_sparse())
    torch.testing.assert_close(found, expected)
