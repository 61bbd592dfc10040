"""The gradient of attention's mask: what the catalog's rows can't say of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_attention import heads, judge, layers

import fastlayers
import fastlayers.functional as F
from fastlayers.kernels.runtime import tiles
from fastlayers.ops.projected_attention import projected_attention

pytestmark = pytest.mark.usefixtures("small_tiles")
B, H, L, S = 2, 2, 20, 37
SHAPES = [
    (L, S), (1, S), (L, 1), (1, 1), (H, L, S), (1, H, L, S), (B, 1, L, S), (B, 1, 1, S), (B, H, 1, S), (1, 1, L, S),
    (B, H, L, 1), (1, H, 1, 1), (B, H, L, S),
]  # fmt: skip


def arguments(
    *mask: int, group: int = 1, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Query, key, value and mask."""
    shapes = ((B, H, L, 8), (B, H // group, S, 8), (B, H // group, S, 12), mask)
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def attend(space: Any, **options: Any) -> Callable[..., torch.Tensor]:
    return lambda *t: space.scaled_dot_product_attention(*t, **options)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_broadcast(shape: tuple[int, ...], group: int, device: torch.device, launched: list[str]) -> None:
    options: dict[str, Any] = dict(enable_gqa=group > 1, scale=0.4)
    given = arguments(*shape, group=group, device=device)
    size = math.sqrt(B * H * L * S / given[-1].numel())  # a sum over all keys is 0, but for rounding
    judge(attend(F, **options), attend(torch.nn.functional, **options), *given, scale=size)
    assert "attention_mask_grad_kernel" in launched


@pytest.mark.parametrize("shares", [2, 5])
@pytest.mark.parametrize("shape", [(1, S), (H, L, S), (B, 1, 1, S), (1, H, 1, 1), (B, H, L, S)], ids=str)
def test_sums_are_shared(shape: tuple[int, ...], shares: int, device: torch.device, launched: list[str]) -> None:
    """Among more programs than there are steps, too."""
    with tiles.force(attention_mask_shares=shares):
        given = arguments(*shape, device=device)
        judge(attend(F), attend(torch.nn.functional), *given, scale=math.sqrt(B * H * L * S / given[-1].numel()))
    assert launched[-3:-1] == ["attention_mask_grad_kernel", "_sum_partials_kernel"]


def test_how_many_programs_share_a_sum() -> None:
    """Swin's mask of 49 x 49 for 4096 windows is shared, T5's of 512 x 512 is not."""
    from fastlayers.kernels.attention import tiles as picks

    gpu = tiles.Device("sm_90", 132)
    assert picks.mask_shares(3, 4096, gpu) == 88
    assert picks.mask_shares(12 * 64, 8, gpu) == 1
    assert picks.mask_shares(1, 6, gpu) == picks.mask_shares(0, 0, gpu) == 1


def test_the_mask_alone(device: torch.device, launched: list[str]) -> None:
    """Nothing else has a gradient then."""
    q, k, v, mask = arguments(1, H, L, S, device=device, dtype=torch.float64)
    dy = torch.randn(B, H, L, 12, device=device, dtype=torch.float64)
    found = []
    for space in (F, torch.nn.functional):
        leaf = mask.clone().requires_grad_()
        found.append(torch.autograd.grad(space.scaled_dot_product_attention(q, k, v, leaf), leaf, dy)[0])
    torch.testing.assert_close(*found)
    assert launched == ["attention_kernel", "attention_dq_kernel", "attention_mask_grad_kernel"]


def test_what_is_hidden_has_no_gradient(device: torch.device) -> None:
    """Of a key that a mask of -inf hides, and of a query that may attend to none."""
    q, k, v, mask = arguments(H, L, S, device=device)
    mask[torch.rand_like(mask) < 0.3] = -torch.inf
    mask[1, 3] = -torch.inf
    judge(attend(F), attend(torch.nn.functional), q, k, v, mask)
    leaf = mask.requires_grad_()
    (found,) = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, leaf).square().sum(), leaf)
    assert not found[mask == -torch.inf].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_strides_are_the_masks(dtype: torch.dtype, device: torch.device) -> None:
    """A mask of float32 beside queries of 16 bits as well."""
    q, k, v, mask = arguments(L, H, S, device=device, dtype=dtype)
    for given in {dtype, torch.float32} - ({torch.float32} if dtype == torch.float64 else set()):
        leaf = mask.to(given).transpose(0, 1).requires_grad_()
        y = F.scaled_dot_product_attention(q, k, v, leaf)
        dy = torch.randn_like(y)
        (found,) = torch.autograd.grad(y, leaf, dy)
        exact = leaf.detach().double().requires_grad_()
        right = torch.autograd.grad(
            attend(torch.nn.functional)(q.double(), k.double(), v.double(), exact), exact, dy.double()
        )
        assert found.dtype == given and found.stride() == leaf.stride()
        tolerance: dict[str, Any] = (
            dict(rtol=2e-2, atol=2e-2 if dtype == torch.float16 else 1e-1) if dtype.itemsize == 2 else {}
        )
        torch.testing.assert_close(found.double(), right[0], **tolerance)


def test_empty(device: torch.device) -> None:
    """Without queries there is nothing to sum, and the gradient is zero."""
    q, k, v, mask = arguments(1, H, 1, S, device=device)
    leaf = mask.requires_grad_()
    for query, key, value in ((q[:, :, :0], k, v), (q[:0], k[:0], v[:0])):
        y = F.scaled_dot_product_attention(query, key, value, leaf)
        (found,) = torch.autograd.grad(y.sum(), leaf)
        assert found.shape == mask.shape and not found.any()


@pytest.mark.parametrize("weights", ["", "mean", "each"])
@pytest.mark.parametrize("shape", [(B, 3, 5, 21), (1, 3, 1, 21), (1, 1, 5, 21)], ids=str)
def test_beside_weights_and_dropout(weights: str, shape: tuple[int, ...], device: torch.device) -> None:
    """As by the formula, of which second derivatives are made, with the same choice."""
    q, k, v = (torch.randn(n, B, 12, device=device, dtype=torch.float64).requires_grad_() for n in (5, 21, 21))
    mask = torch.randn(shape, device=device, dtype=torch.float64, requires_grad=True)
    found = projected_attention((q, k, v, mask), 3, 1, 0.4, False, weights, True, None)
    results = found if weights else (found,)
    dys = [torch.randn_like(y) for y in results]
    kernels, formula = (
        torch.autograd.grad(results, (q, k, v, mask), dys, retain_graph=True, create_graph=create)
        for create in (False, True)
    )
    torch.testing.assert_close(kernels, formula)


@pytest.mark.parametrize("shape", [(3, 4), (1, 2, 1, 4)], ids=str)
def test_second_derivatives(shape: tuple[int, ...], device: torch.device) -> None:
    tensors = [
        torch.randn(s, device=device, dtype=torch.float64, requires_grad=True)
        for s in ((1, 2, 3, 4), (1, 2, 4, 4), (1, 2, 4, 4), shape)
    ]
    assert torch.autograd.gradcheck(F.scaled_dot_product_attention, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(F.scaled_dot_product_attention, tensors, fast_mode=True)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (6, 5, 7)], ids=str)
def test_of_a_layer(shape: tuple[int, ...], need_weights: bool, device: torch.device) -> None:
    """MultiheadAttention's, beside a mask of padding and a key of zeros."""
    mask = torch.randn(shape, device=device)
    x, memory = torch.randn(5, 2, 9, device=device), torch.randn(7, 2, 9, device=device)
    padding = torch.zeros(2, 7, device=device).masked_fill_(torch.rand(2, 7, device=device) < 0.3, -torch.inf)
    found = []
    for layer in layers(device, 9, 3, add_zero_attn=True):
        leaves = [t.clone().requires_grad_() for t in (x, memory, mask)]
        y, w = layer(leaves[0], leaves[1], leaves[1], padding, need_weights, leaves[2])
        total = y.square().sum() + (w.square().sum() if need_weights else 0)
        found.append([y, *torch.autograd.grad(total, leaves)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_replayed_with_the_same_bits(device: torch.device, plays: list[None]) -> None:
    tensors = [t.requires_grad_() for t in arguments(1, H, 1, S, device=device)]
    found = [torch.autograd.grad(attend(F)(*tensors).sum(), tensors) for _ in range(4)]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=0, atol=0)
    assert len(plays) >= 4


def test_runs_on_kernels(device: torch.device) -> None:
    tensors = [t.requires_grad_() for t in arguments(L, S, device=device)]
    (decision,) = fastlayers.explain(attend(F), *tensors)
    assert decision.path == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_queries_that_are_masked_by_a_finite_number(dtype: torch.dtype, device: torch.device) -> None:
    """Beside it the log-sum-exp can't tell how many keys there are: the weights' own sum does, where products are strict."""
    q, k, v = (t.to(device, dtype) for t in heads((1, 2, 18, 16), (1, 2, 300, 16), (1, 2, 300, 16)))
    mask = torch.randn(18, 300, device=device, dtype=dtype)
    mask[3] -= 1e18
    mask[4] = torch.finfo(dtype).min
    judge(F.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention, q, k, v, mask)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_beside_a_large_log_sum_exp(masked: bool, device: torch.device) -> None:
    """It is rounded, and all weights of a query with it, by up to 2**-24 of itself. torch makes no error in such scores."""
    q, k = torch.randint(-3, 4, (2, 1, 2, 20, 16), device=device).float() / 2
    v, mask = (t.to(device) for t in heads((1, 2, 20, 16), (20, 20)))
    if masked:
        given = [q, k, v, (8 * mask).round() / 8 + 256]
    else:
        q[..., 0], k[..., 0] = 32, 32
        given = [q, k, v]
    judge(F.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention, *given)
