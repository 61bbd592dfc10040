"""Softmax: every length, every dim, -inf and NaN rows, dtype, dim=None.

Looks inside only to force the design that walks along a row upon short ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import fastlayers.functional as FL
from fastlayers import nn
from fastlayers.kernels.runtime import tiles as _tiles
from fastlayers.kernels.runtime.tiles import Tile
from fastlayers.testing import assert_within_budget, neighbours


def check(x: torch.Tensor, dim: int) -> None:
    dy = torch.randn_like(x)

    def run(
        softmax: Callable[..., torch.Tensor], x: torch.Tensor, dy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.detach().requires_grad_()
        y = softmax(leaf, dim)
        return y, torch.autograd.grad(y, leaf, dy)[0]

    torchs = [run(F.softmax, *moved) for moved in neighbours(x, dy)]
    for name, a, c, *b in zip(
        ("y", "dx"), run(FL.softmax, x, dy), run(F.softmax, x.double(), dy.double()), *torchs, strict=True
    ):
        assert_within_budget(a, b, c, name)
        assert a.is_contiguous()


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 17, 64, 100, 255, 257, 1000, 1025, 4099])
def test_lengths(length: int, device: torch.device) -> None:
    check(torch.randn(3, length, device=device) * 3, 1)


@pytest.mark.parametrize("length", [8193, 33000, 70001, 262144])
def test_long_rows(length: int, device: torch.device) -> None:
    check(torch.randn(2, length, device=device) * 3, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "length", "tile"), [(3, 37, (8, 1)), (3, 16, (8, 1)), (1, 5, (8, 2))])
def test_blocks(rows: int, length: int, tile: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """The design that walks along a row, on rows of several blocks and of one."""
    with _tiles.force(softmax_blocks=Tile(*tile)):
        check(torch.randn(rows, length, dtype=dtype, device=device), 1)
        check(torch.randn(rows, length, 5, dtype=dtype, device=device), 1)


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2])
def test_dims(dim: int, device: torch.device) -> None:
    check(torch.randn(3, 4, 5, 6, device=device), dim)
    check(torch.randn(6, 5, 4, 3, device=device).permute(3, 1, 0, 2), dim)
    check(torch.randn(3, 1, 5, 6, device=device).expand(3, 4, 5, 6), dim)


@pytest.mark.parametrize("blocks", [False, True])
def test_rows_of_inf_and_nan(blocks: bool, device: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    rows = [
        [-inf] * 7,
        [-inf] * 6 + [1.0],
        [1.0] + [-inf] * 6,
        [-inf, -inf, -inf, 2.0, 3.0, -inf, -inf],
        [1.0, 2, nan, 3, 4, 5, 6],
        [nan] * 7,
        [1.0, inf, 2, 3, 4, 5, 6],
        [1e38, -1e38, 3e38, 0, 0, 0, 1],
    ]
    x = torch.tensor(rows, device=device)
    expected = F.softmax(x, 1)
    dy = torch.randn_like(x)
    with _tiles.force(**({"softmax_blocks": Tile(2, 1)} if blocks else {})):
        leaf = x.clone().requires_grad_()
        y = FL.softmax(leaf, 1)
        torch.testing.assert_close(y, expected, equal_nan=True)
        torch.testing.assert_close(FL.softmax(x.t(), 0), expected.t(), equal_nan=True)
        (dx,) = torch.autograd.grad(y, leaf, dy)
    other = x.clone().requires_grad_()
    torch.testing.assert_close(dx, torch.autograd.grad(F.softmax(other, 1), other, dy)[0], equal_nan=True)


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_dim_none_warns_and_chooses_as_torch(dims: int, device: torch.device) -> None:
    x = torch.randn(*range(2, 2 + dims), device=device)
    caught = []
    for softmax, module in ((FL.softmax, nn.Softmax()), (F.softmax, torch.nn.Softmax())):
        for call in (softmax, module):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                y = call(x)
            caught.append((y, [(w.category, str(w.message), w.filename.split("/")[-1]) for w in seen]))
    ours, theirs = caught[:2], caught[2:]
    for (y, mine), (expected, other) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(y, expected)
        assert mine == other
        assert len(mine) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("own", [torch.float16, torch.float32])
def test_dtype_is_converted_on_the_way(own: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(5, 9, device=device, dtype=own)
    results = []
    for softmax in (FL.softmax, F.softmax):
        leaf = x.clone().requires_grad_()
        y = softmax(leaf, 1, dtype=dtype)
        results.append((y, torch.autograd.grad(y.sum() + y.square().sum(), leaf)[0]))
    # What passes through float16 on its way is rounded there, whatever the result's dtype is.
    coarse = torch.float16 if torch.float16 in (own, dtype) else torch.float32
    bounds = dict(rtol=2 * torch.finfo(coarse).eps, atol=2 * torch.finfo(coarse).eps)
    for a, b in zip(*results, strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b, **bounds)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((5,), {}), ((-3,), {}), ((1.0,), {}), ((0,), {"dtype": torch.int32}), (("x",), {}), (((0, 1),), {})],
)
def test_bad_input(args: tuple, kwargs: dict, device: torch.device) -> None:
    x = torch.randn(3, 4, device=device)
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.softmax(x, *args, **kwargs)
    with pytest.raises(theirs.type):
        FL.softmax(x, *args, **kwargs)


def test_create_graph_in_16_bits(device: torch.device) -> None:
    x = torch.tensor([3.0, 0.0], device=device, dtype=torch.float16, requires_grad=True)
    dy = torch.tensor([6e4, -6e4], device=device, dtype=torch.float16)
    a, b = (torch.autograd.grad(f(x, 0), x, dy, create_graph=True)[0] for f in (FL.softmax, torch.softmax))
    torch.testing.assert_close(a, b, rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_hook_that_changes_the_saved_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """torch refuses another dtype than the result had."""
    for softmax in (F.softmax, FL.softmax):
        for _ in range(3):
            x = torch.randn(2, 3, device=device, requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.to(dtype), lambda t: t):
                y = softmax(x, 1)
            with pytest.raises(RuntimeError, match="expected"):
                y.sum().backward()
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.to(dtype), lambda t: t.to(torch.float32)):
                y = softmax(x, 1)
            y.sum().backward()
