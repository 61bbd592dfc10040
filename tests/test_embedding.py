"""What an embedding does that isn't a derivative, and indices that there are no rows for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastlayers.functional as FL


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
