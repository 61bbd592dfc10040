"""Projections in heads with rotary embedding, beyond their catalog rows: shapes, dtypes, what is launched and what is saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastlayers
import fastlayers.functional as FL
from fastlayers.ops.rotary import _rotary_embedding
from fastlayers.testing import assert_within_budget, neighbours

E = 20


def draw(
    heads: Sequence[int] = (3, 1, 1),
    head_dim: int = 8,
    turned: int | None = None,
    *,
    bias: bool = True,
    shape: tuple[int, ...] = (2, 5),
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor] | None, torch.Tensor, torch.Tensor]:
    """input, weights, biases, cos and sin."""
    x = torch.randn(*shape, E, device=device).to(dtype).requires_grad_()
    weights = [(torch.randn(h * head_dim, E, device=device) / 4).to(dtype).requires_grad_() for h in heads]
    biases = [torch.randn(h * head_dim, device=device).to(dtype).requires_grad_() for h in heads] if bias else None
    angles = torch.randn(shape[-1], turned or head_dim, device=device)
    return x, weights, biases, angles.cos(), angles.sin()


def model(
    x: Any, weights: Any, biases: Any, cos: Any, sin: Any, *, head_dim: int, interleaved: bool = False
) -> tuple[torch.Tensor, ...]:
    """As models write it, of torch's functions."""
    biases = [None] * 3 if biases is None else biases
    q, k, v = (
        F.linear(x, w, b).view(*x.shape[:-1], -1, head_dim).transpose(1, 2)
        for w, b in zip(weights, biases, strict=True)
    )
    return (*_rotary_embedding.reference(q, k, cos, sin, interleaved), v)


def values(function: Any, tensors: Sequence[torch.Tensor], dys: Sequence[torch.Tensor], **options: Any) -> Any:
    """Results and gradients of what is given as (x, three weights, three biases or none, cos, sin)."""
    leaves = [t.detach().requires_grad_() for t in tensors[:-2]]
    ys = function(leaves[0], leaves[1:4], leaves[4:] or None, *tensors[-2:], **options)
    return [*ys, *torch.autograd.grad(ys, leaves, dys)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim", "turned", "interleaved"),
    [
        ((3, 1, 1), 8, 8, False),
        ((4, 2, 2), 8, 8, True),
        ((2, 2, 2), 16, 8, True),
        ((2, 1, 1), 16, 8, False),
        ((3, 2, 1), 6, 4, False),
        ((1, 1, 1), 16, 16, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.usefixtures("small_tiles")
def test_values_and_gradients(
    dtype: torch.dtype, heads: Any, head_dim: int, turned: int, interleaved: bool, bias: bool, device: torch.device
) -> None:
    x, weights, biases, cos, sin = draw(heads, head_dim, turned, bias=bias, device=device, dtype=dtype)
    tensors = [x, *weights, *(biases or []), cos, sin]
    dys = [torch.randn(2, h, 5, head_dim, device=device).to(dtype) for h in heads]
    words: Any = dict(head_dim=head_dim, interleaved=interleaved)
    mine = values(FL.rotary_projections, tensors, dys, **words)
    others = [
        values(model, [*near[: len(tensors) - 2], cos, sin], near[len(tensors) - 2 :], **words)
        for near in neighbours(*tensors[:-2], *dys)
    ]
    exact = values(model, [t.double() for t in tensors], [d.double() for d in dys], **words)
    for a, right, *near in zip(mine, exact, *others, strict=True):
        assert a.dtype == dtype
        assert_within_budget(a, near, right, scale=4)
    assert all([y.transpose(1, 2).is_contiguous() for y in mine[:3]])


@pytest.mark.parametrize("given", [(2, 5, 8), (1, 5, 8), (5, 8)])
def test_angles_of_a_batch(given: tuple[int, ...], device: torch.device) -> None:
    """And an input and weights with gaps."""
    x, weights, biases, _, _ = draw(device=device)
    x = torch.randn(2, 5, 2 * E, device=device)[..., ::2]
    weights = [torch.randn(E, w.shape[0], device=device).T for w in weights]
    angles = torch.randn(given, device=device)
    mine = FL.rotary_projections(x, weights, biases, angles.cos(), angles.sin(), head_dim=8)
    cos, sin = (t if t.dim() == 3 else t[None] for t in (angles.cos(), angles.sin()))
    torch.testing.assert_close(mine, model(x, weights, biases, cos, sin, head_dim=8), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.usefixtures("small_tiles")
def test_packed(interleaved: bool, bias: bool, device: torch.device) -> None:
    """The same numbers and gradients as of three weights, though one result's gradient may be missing."""
    x, weights, biases, cos, sin = draw((4, 2, 2), bias=bias, device=device)
    words: Any = dict(head_dim=8, interleaved=interleaved)
    weight = torch.cat(weights).detach().requires_grad_()
    packed = None if biases is None else torch.cat(biases).detach().requires_grad_()
    theirs = FL.rotary_projections(x, weights, biases, cos, sin, **words)
    mine = FL.packed_rotary_projections(x, weight, packed, cos, sin, heads=(4, 2), **words)
    torch.testing.assert_close(mine, theirs)
    for chosen in ([0, 1, 2], [1], [0, 2]):
        dys = [torch.randn_like(mine[i]) for i in chosen]
        own = [x, weight, *([] if packed is None else [packed])]
        found = torch.autograd.grad([mine[i] for i in chosen], own, dys, retain_graph=True)
        of = torch.autograd.grad(
            [theirs[i] for i in chosen],
            [x, *weights, *(biases or [])],
            dys,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        torch.testing.assert_close(found[0], of[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], torch.cat(of[1:4]), rtol=1e-4, atol=1e-4)
        if packed is not None:
            torch.testing.assert_close(found[2], torch.cat(of[4:]), rtol=1e-4, atol=1e-4)


def test_one_result(device: torch.device) -> None:
    """Only the parameters that it depends on have gradients."""
    x, weights, biases, cos, sin = draw(device=device)
    for i in range(3):
        y = FL.rotary_projections(x, weights, biases, cos, sin, head_dim=8)[i]
        found = torch.autograd.grad(y.sum(), [x, *weights], allow_unused=True)
        right = torch.autograd.grad(
            model(x, weights, biases, cos, sin, head_dim=8)[i].sum(), [x, *weights], allow_unused=True
        )
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("result", range(3))
def test_gradients_of_one_result(result: int, contiguous: bool, device: torch.device) -> None:
    """Whatever else is frozen, and however its gradient lies in memory."""
    x, weights, biases, cos, sin = draw(device=device)
    assert biases is not None
    for asked in ([x], [weights[result]], [biases[result]], [x, weights[result]]):
        for t in (x, *weights, *biases):
            t.requires_grad_(any(t is one for one in asked))
        ys = [f(x, weights, biases, cos, sin, head_dim=8)[result] for f in (FL.rotary_projections, model)]
        dy = torch.randn_like(ys[0])
        dy = dy.contiguous() if contiguous else dy
        found, right = (torch.autograd.grad(y, asked, dy) for y in ys)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, c, s: (x, c.requires_grad_(), s), "cos or sin that require grad"),
        (lambda x, c, s: (x, c.half(), s.half()), "cos or sin in a dtype that is neither float32 nor the query's"),
        (lambda x, c, s: (x, c[:1], s[:1]), "angles that are broadcast along positions"),
        (lambda x, c, s: (x[0], c, s), "other dimensions than (B, L, E), and (L, R) or (B, L, R)"),
    ],
    ids=["grad", "dtype", "broadcast", "dimensions"],
)
def test_what_torch_takes(change: Any, reason: str, device: torch.device) -> None:
    x, weights, biases, cos, sin = draw(device=device)
    x, cos, sin = change(x, cos, sin)
    with fastlayers.policy("auto"):
        call = lambda: FL.rotary_projections(x, weights, biases, cos, sin, head_dim=8)  # noqa: E731
        decisions = fastlayers.explain(call).decisions
        assert [d.reason for d in decisions if d.op == "rotary_projections"] == [reason]
        q, k, v = call()
    assert (q.shape, k.shape, v.shape) == tuple([(*x.shape[:-2], h, 5, 8) for h in (3, 1, 1)])


def test_bad_input_raises(device: torch.device) -> None:
    x, weights, biases, cos, sin = draw(device=device)
    for wrong in (
        lambda: FL.rotary_projections(x[..., 1:], weights, biases, cos, sin, head_dim=8),
        lambda: FL.rotary_projections(x, weights, biases, cos, sin, head_dim=5),
        lambda: FL.rotary_projections(x, weights, biases, cos[:, :7], sin[:, :7], head_dim=8),
        lambda: FL.packed_rotary_projections(x, weights[0], None, cos, sin, heads=(2, 1), head_dim=8),
    ):
        with pytest.raises(RuntimeError):
            wrong()


def one_by_one(x: Any, weights: Any, biases: Any, cos: Any, sin: Any, *, head_dim: int, interleaved: bool) -> Any:
    """By our own functions."""
    q, k, v = (
        FL.linear(x, w, b).unflatten(-1, (-1, head_dim)).transpose(1, 2) for w, b in zip(weights, biases, strict=True)
    )
    return (*FL.rotary_embedding(q, k, cos, sin, interleaved=interleaved), v)


@pytest.mark.parametrize(("turned", "interleaved"), [(16, False), (16, True), (6, True)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.usefixtures("small_tiles")
def test_one_kernel(
    dtype: torch.dtype, turned: int, interleaved: bool, device: torch.device, launched: list[str]
) -> None:
    """The same numbers as of three products and `rotary_embedding`. In the interpreter products are NumPy's, which adds up in an
    order that depends on their sizes."""
    given = draw((3, 1, 2), 16, turned, shape=(2, 21), device=device, dtype=dtype)
    words: Any = dict(head_dim=16, interleaved=interleaved)
    mine = FL.rotary_projections(*given, **words)
    assert launched == ["_rotary_matmul_kernel"]
    torch.testing.assert_close(mine, one_by_one(*given, **words), rtol=0, atol=4e-6 if dtype == torch.float32 else 8e-3)
    launched.clear()
    torch.autograd.grad(mine, [given[0], *given[1], *(given[2] or [])], [torch.randn_like(y) for y in mine])
    assert launched == ["_rotary_kernel", *["_matmul_kernel"] * 6]


@pytest.mark.parametrize(
    ("head_dim", "turned", "interleaved"), [(12, 12, False), (16, 8, False), (32, 32, False), (2, 2, True)]
)
@pytest.mark.usefixtures("small_tiles")
def test_heads_that_no_tile_holds(
    head_dim: int, turned: int, interleaved: bool, device: torch.device, launched: list[str]
) -> None:
    """Three products and `rotary`, with the same numbers."""
    given = draw((2, 1, 1), head_dim, turned, device=device)
    words: Any = dict(head_dim=head_dim, interleaved=interleaved)
    mine = FL.rotary_projections(*given, **words)
    assert launched == [*["_matmul_kernel"] * 3, "_rotary_kernel"]
    torch.testing.assert_close(mine, one_by_one(*given, **words), rtol=0, atol=0)


def test_infinite_features_that_arent_turned(device: torch.device) -> None:
    """Are copied, and don't meet the angle's zeros."""
    x, weights, biases, cos, sin = draw((1, 1, 1), 8, 4, device=device)
    assert biases is not None
    biases = [torch.full_like(b, float("inf")) for b in biases]
    q, k, _ = FL.rotary_projections(x, weights, biases, cos, sin, head_dim=8, interleaved=True)
    assert (q[..., 4:] == float("inf")).all()
    assert (k[..., 4:] == float("inf")).all()


def test_replayed(device: torch.device, plays: list[None]) -> None:
    """Forward and backward, also where the value's gradient lies in another order."""
    x, weights, biases, cos, sin = draw(device=device)
    found = []
    for _ in range(4):
        leaf = torch.ones_like(x).requires_grad_()
        plays.clear()
        ys = FL.rotary_projections(leaf, weights, biases, cos, sin, head_dim=8)
        dys = [torch.ones(y.shape, device=device) for y in ys]
        found.append([*ys, *torch.autograd.grad(ys, [leaf], dys)])
    assert len(plays) == 2
    torch.testing.assert_close(found[-1], found[0], rtol=0, atol=0)


def test_saved_bytes(device: torch.device) -> None:
    """The input, once, and the angles; nothing between the products and the results."""
    given = draw(device=device)
    x, weights, _, cos, sin = given
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        FL.rotary_projections(*given, head_dim=8)
    assert set(kept) <= {t.untyped_storage().data_ptr() for t in (x, *weights, cos, sin)}
