"""Softmax: every length, every dim, -inf and NaN rows, dtype, dim=None."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import fastlayers.functional as FL
from fastlayers import nn
from fastlayers.kernels import _tiles
from fastlayers.kernels._tiles import Tile
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
    twin = x.clone().requires_grad_()
    torch.testing.assert_close(dx, torch.autograd.grad(F.softmax(twin, 1), twin, dy)[0], equal_nan=True)


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
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


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
