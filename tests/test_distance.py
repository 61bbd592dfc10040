"""Cosine similarity where its row doesn't reach: vectors shorter than eps, whose gradients in torch aren't the derivatives of
their result, several dtypes, and strides that three dimensions don't describe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as TF

import fastlayers
from fastlayers.testing import assert_within_budget, neighbours

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def values(function: Any, x1: torch.Tensor, x2: torch.Tensor, *args: Any) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x1, x2)]
    y = function(*leaves, *args)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def ours(*args: Any) -> list[torch.Tensor]:
    return values(fastlayers.functional.cosine_similarity, *args)


def theirs(*args: Any) -> list[torch.Tensor]:
    return values(TF.cosine_similarity, *args)


def check(x1: torch.Tensor, x2: torch.Tensor, *args: Any) -> None:
    others = [theirs(*near, *args) for near in neighbours(x1, x2)]
    right = theirs(x1.double(), x2.double(), *args)
    for mine, exact, *near in zip(ours(x1, x2, *args), right, *others, strict=True):
        assert mine.dtype == near[0].dtype
        assert_within_budget(mine, near, exact, scale=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [0.0, 1e-8, 3.0])
def test_short_vectors(dtype: torch.dtype, eps: float, device: torch.device) -> None:
    """Zeros and vectors shorter than eps, against others, against each other, and against infinities and NaN."""
    rows = [[0, 0, 0], [1, 2, -1], [0.5, 0, 0], [float("inf"), 1, 0], [float("nan"), 1, 0], [4, 5, 6]]
    x = torch.tensor(rows, dtype=dtype, device=device)
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(dtype, 1e-5)
    for mine, other in zip(ours(x[:, None], x, -1, eps), theirs(x[:, None], x, -1, eps), strict=True):
        scale = max(1.0, other.nan_to_num(0, 0, 0).abs().max().item())
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_two_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    x1, x2 = torch.randn(5, 7, 3, device=device), torch.randn(5, 7, 3, device=device).to(dtype)
    check(x1, x2)
    check(x2, x1)
    with torch.autocast(device.type, torch.bfloat16):
        assert [t.dtype for t in ours(x1, x2)] == [t.dtype for t in theirs(x1, x2)]


@pytest.mark.usefixtures("small_tiles")
def test_strides_beyond_three_dimensions(device: torch.device) -> None:
    """Neither the tensors nor their gradients are described by three dimensions of positions."""
    x1 = torch.randn(3, 2, 5, 2, 3, 4, device=device).permute(5, 1, 2, 3, 4, 0)
    x2 = torch.randn(5, 4, 2, 3, 2, 3, device=device).permute(1, 2, 0, 4, 3, 5)
    check(x1, x2)
    check(x1, x2, 2)


def test_nothing_to_add_up(device: torch.device) -> None:
    """Whatever eps is, even 0."""
    x = torch.ones(2, 0, 3, device=device)
    assert torch.equal(ours(x, x, 1, 0.0)[0], theirs(x, x, 1, 0.0)[0])


def test_integers_are_torchs(device: torch.device) -> None:
    x, i = torch.randn(4, 3, device=device), torch.arange(12, device=device).view(4, 3)
    cosine_similarity = fastlayers.functional.cosine_similarity
    with fastlayers.policy("auto"):
        assert torch.equal(cosine_similarity(x, i), TF.cosine_similarity(x, i))
        with pytest.raises(RuntimeError, match="floating point"):
            cosine_similarity(i, i)


@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf")])
def test_what_torch_says_of_an_eps_that_is_no_bound(eps: float, device: torch.device) -> None:
    fastlayers.policy("auto")
    x = torch.randn(3, 4, device=device)
    found: list[Any] = []
    for space in (TF, fastlayers.functional):
        try:
            found.append(space.cosine_similarity(x, x, 1, eps).tolist())
        except RuntimeError as error:
            found.append(str(error))
    assert str(found[0]) == str(found[1])  # as words, because NaN isn't NaN
