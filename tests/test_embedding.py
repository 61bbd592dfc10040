"""What an embedding does that isn't a derivative, and indices that there are no rows for."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastlayers
import fastlayers.functional as FL
from fastlayers import nn


@pytest.mark.parametrize("count", [9, 230])
@pytest.mark.parametrize("padding", [None, -1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gradients_scaled_by_frequency(
    count: int, padding: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    """Each row's gradient is the mean of those of its indices."""
    weight = torch.randn(4, 7, device=device, requires_grad=True)
    indices = torch.randint(3, (count,), device=device).to(dtype)
    dy = torch.randn(count, 7, device=device)
    found = [
        torch.autograd.grad(f(indices, weight, padding_idx=padding, scale_grad_by_freq=True), weight, dy)[0]
        for f in (FL.embedding, F.embedding)
    ]
    torch.testing.assert_close(*found)


def test_indices_out_of_range_are_nan(device: torch.device) -> None:
    """Where torch raises on a CPU and stops the process on a GPU. Nothing is read nor written out of bounds."""
    weight = torch.randn(4, 7, device=device, requires_grad=True)
    indices = torch.tensor([1, -1, 4, 3], device=device)
    y = FL.embedding(indices, weight)
    assert y.isnan().all(1).tolist() == [False, True, True, False]
    (gradient,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert gradient.sum(1).tolist() == [0, 7, 0, 7]


def bags(
    indices: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, factors: torch.Tensor, padding: int | None
) -> torch.Tensor:
    """The sum of each bag, by a product with a matrix of factors."""
    ends = torch.cat([offsets[1:], torch.tensor([len(indices)], device=indices.device)])
    places = torch.arange(len(indices), device=indices.device)
    within = (places >= offsets[:, None]) & (places < ends[:, None]) & (indices != padding)
    return (within * factors) @ weight[indices.long()]


@pytest.mark.parametrize("count", [9, 230])
@pytest.mark.parametrize("padding", [None, -1, 1])
@pytest.mark.usefixtures("small_tiles")
def test_bags(count: int, padding: int | None, device: torch.device) -> None:
    """Every mode and integer type, bags that are empty, a table with rows that nobody looks up and one that many do; judged by
    products in float64."""
    rows = 5
    counted = None if padding is None else padding % rows
    begins = torch.tensor([0, 0, 2, count // 2, count - 1, count - 1], device=device)
    for one, other, mode in zip(
        (torch.int32, torch.int64) * 2,
        (torch.int64, torch.int64, torch.int32, torch.int32),
        ("sum", "mean") * 2,
        strict=True,
    ):
        indices = torch.randint(3, (count,), device=device).to(one)
        weight = torch.randn(7, rows, device=device).T.requires_grad_()
        factors = torch.rand(count, device=device, requires_grad=mode == "sum")
        given: dict[str, Any] = dict(mode=mode, per_sample_weights=factors if mode == "sum" else None)
        for last in (False, True):
            offsets = torch.cat([begins, torch.tensor([count], device=device)]) if last else begins
            with fastlayers.policy("triton"):
                y = FL.embedding_bag(
                    indices, weight, offsets.to(other), include_last_offset=last, padding_idx=padding, **given
                )
            leaves = [t.detach().double().requires_grad_() for t in (weight, factors)]
            used = leaves[1] if mode == "sum" else torch.ones_like(leaves[1])
            right = bags(indices, leaves[0], begins, used, counted)
            if mode == "mean":
                sizes = bags(indices, torch.ones(rows, 1, dtype=torch.double, device=device), begins, used, counted)
                right = right / sizes.clamp(min=1)
            wanted = slice(None) if mode == "sum" else slice(1)
            dy = torch.randn_like(y)
            found = torch.autograd.grad(y, [weight, factors][wanted], dy)
            exact = torch.autograd.grad(right, leaves[wanted], dy.double())
            torch.testing.assert_close([y, *found], [t.float() for t in (right, *exact)], rtol=1e-5, atol=1e-5)


def test_gradients_of_bags_scaled_by_frequency(device: torch.device) -> None:
    """Each place's share is divided by how often its row was looked up in all bags; torch counts wrongly on a CPU
    (pytorch#190063)."""
    weight = torch.randn(4, 7, device=device, requires_grad=True)
    indices = torch.tensor([[1, 3, 1], [0, 1, 3]], device=device)
    dy = torch.randn(2, 7, device=device)
    y = FL.embedding_bag(indices, weight, mode="mean", scale_grad_by_freq=True)
    (found,) = torch.autograd.grad(y, weight, dy)
    a, b = dy[0] / 3, dy[1] / 3
    expected = torch.stack([b, (a + a + b) / 3, torch.zeros_like(a), (a + b) / 2])
    torch.testing.assert_close(found, expected)


def test_bags_that_make_no_sense_are_nan(device: torch.device) -> None:
    """Rows that don't exist, unless they are padding, and offsets that descend or leave the input."""
    weight = torch.randn(4, 7, device=device, requires_grad=True)
    indices = torch.tensor([1, -1, 4, 3, 2], device=device)
    y = FL.embedding_bag(indices, weight, torch.tensor([0, 1, 2, 3, 9, 4], device=device), mode="sum")
    assert y.isnan().all(1).tolist() == [False, True, True, True, True, False]
    (gradient,) = torch.autograd.grad(y[[0, 5]].sum(), weight)
    assert gradient[1].tolist() == [1.0] * 7
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (ValueError, dict(mode="median")),
        (ValueError, dict(offsets=None)),
        (ValueError, dict(input=torch.zeros(2, 3, dtype=torch.int64), offsets=torch.tensor(0))),
        (ValueError, dict(offsets=torch.zeros(1, 1, dtype=torch.int64))),
        (ValueError, dict(input=torch.zeros(2, 3, dtype=torch.int64))),
        (ValueError, dict(input=torch.zeros(2, 3, dtype=torch.int64), offsets=torch.zeros(2, 1, dtype=torch.int64))),
        (ValueError, dict(per_sample_weights=torch.ones(4), mode="sum")),
        (NotImplementedError, dict(per_sample_weights=torch.ones(5))),
        (RuntimeError, dict(per_sample_weights=torch.ones(5).double(), mode="sum")),
        (RuntimeError, dict(padding_idx=4)),
        (TypeError, dict(padding_idx=True)),
        (RuntimeError, dict(input=torch.ones(5))),
        (RuntimeError, dict(offsets=torch.zeros(1))),
        (RuntimeError, dict(offsets=torch.zeros(0, dtype=torch.int64), include_last_offset=True)),
        (ValueError, dict(mode="max", scale_grad_by_freq=True)),
        (ValueError, dict(mode="max", sparse=True)),
        (ValueError, dict(weight=torch.ones(7))),
    ],
)
@pytest.mark.parametrize("policy", ["auto", "triton"])
def test_errors_of_bags(error: type[Exception], arguments: dict[str, Any], policy: Any) -> None:
    """torch's exception with torch's words."""
    indices, offsets = torch.tensor([1, 0, 3, 3, 2]), torch.tensor([0, 2])
    given: dict[str, Any] = dict(input=indices, weight=torch.ones(4, 7), offsets=offsets) | arguments
    with pytest.raises(error) as theirs:
        F.embedding_bag(**given)
    if "sparse" in arguments and policy == "triton":
        return  # that it is sparse comes first
    with fastlayers.policy(policy), pytest.raises(error, match=re.escape(str(theirs.value))):
        FL.embedding_bag(**given)


def test_a_bag_layer_of_given_weights() -> None:
    weight = torch.randn(4, 7)
    layer = nn.EmbeddingBag.from_pretrained(weight, mode="sum", padding_idx=1)
    assert type(layer) is nn.EmbeddingBag
    assert not layer.weight.requires_grad
    assert layer.weight.data_ptr() == weight.data_ptr()
    assert nn.EmbeddingBag(4, 7, _weight=weight).weight.data_ptr() == weight.data_ptr()
    indices = torch.tensor([[1, 2, 3]])
    assert torch.equal(layer(indices)[0], weight[2:].sum(0))


def test_indices_behind_the_last_bag_have_no_gradient(device: torch.device) -> None:
    """Not even where the first bag's gradient is infinite."""
    weight = torch.randn(6, 5, device=device, requires_grad=True)
    indices, offsets = torch.tensor([0, 1, 2, 3, 4], device=device), torch.tensor([0, 1, 3], device=device)
    y = FL.embedding_bag(indices, weight, offsets, mode="sum", include_last_offset=True)
    dy = torch.ones_like(y)
    dy[0] = float("inf")
    (dw,) = torch.autograd.grad(y, weight, dy)
    assert dw[0].isinf().all()
    assert torch.equal(dw[1:], torch.tensor([1.0, 1, 0, 0, 0], device=device)[:, None].expand(5, 5))
