"""Rotary embedding beyond its catalog row: dtypes and shapes of the angles, strides, and what isn't taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastlayers
import fastlayers.functional as FL
from fastlayers.kernels.runtime import launch as _launch
from fastlayers.ops.rotary import _rotary_embedding
from fastlayers.testing import assert_within_budget


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query and key as views of projections, of which the key has a single head; cos and sin of this shape."""
    features = shape[-1]
    heads = [torch.randn(2, 5, h * (features + 2), device=device).to(dtype) for h in (3, 1)]
    q, k = (x.view(2, 5, -1, features + 2).transpose(1, 2).requires_grad_() for x in heads)
    angles = torch.randn(shape, device=device)
    return [q, k, angles.cos(), angles.sin()]


def reference(*args: Any, interleaved: bool) -> Any:
    return _rotary_embedding.reference(*args, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(5, 6), (1, 5, 6), (2, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_angles_in_float32(
    dtype: torch.dtype, shape: tuple[int, ...], interleaved: bool, device: torch.device, launched: list[str]
) -> None:
    """Rounded once, whatever the query's dtype; gradients lie as query and key do, so that those of projections are views."""
    q, k, cos, sin = draw(*shape, device=device, dtype=dtype)
    dys = [torch.randn_like(x) for x in (q, k)]

    def values(function: Any, q: Any, k: Any, cos: Any, sin: Any, dys: Any) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k)]
        ys = function(*leaves, cos, sin, interleaved=interleaved)
        return [*ys, *torch.autograd.grad(ys, leaves, dys)]

    mine = values(FL.rotary_embedding, q, k, cos, sin, dys)
    assert launched == ["_rotary_kernel"] * 2
    others = values(reference, q, k, cos, sin, dys)
    exact = values(reference, q.double(), k.double(), cos.double(), sin.double(), [dy.double() for dy in dys])
    for a, b, c in zip(mine, others, exact, strict=True):
        assert_within_budget(a, b, c, scale=4)
    assert [mine[0].stride(), mine[2].stride()] == [q.stride()] * 2


def test_one_of_the_results(device: torch.device, launched: list[str]) -> None:
    """Only its own tensor has a gradient then, and only that is computed."""
    q, k, cos, sin = draw(5, 8, device=device)
    for i, x in enumerate((q, k)):
        y = FL.rotary_embedding(q, k, cos, sin)[i]
        launched.clear()
        found = torch.autograd.grad(y.sum(), (q, k), allow_unused=True)
        assert launched == ["_rotary_kernel"]
        assert found[1 - i] is None
        torch.testing.assert_close(
            found[i], torch.autograd.grad(reference(q, k, cos, sin, interleaved=False)[i].sum(), x)[0]
        )


def test_no_copies(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of a packed projection are read where they are, in one launch."""
    packed = torch.randn(2, 5, 3, 4, 8, device=device)
    q, k, _ = packed.permute(2, 0, 3, 1, 4).unbind(0)
    angles = torch.randn(5, 8, device=device)
    launches: list[set[int]] = []
    launch = _launch.launch

    def watch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
        launches.append({t.data_ptr() for t in args if isinstance(t, torch.Tensor)})
        launch(kernel, programs, *args, **meta)

    monkeypatch.setattr(_launch, "launch", watch)
    mine = FL.rotary_embedding(q, k, angles.cos(), angles.sin())
    assert len(launches) == 1
    assert {q.data_ptr(), k.data_ptr()} < launches[0]
    torch.testing.assert_close(mine, reference(q, k, angles.cos(), angles.sin(), interleaved=False))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, c, s: (q, k, c.requires_grad_(), s), "cos or sin that require grad"),
        (lambda q, k, c, s: (q, k, c.half(), s), "cos or sin in a dtype that is neither float32 nor the query's"),
        (lambda q, k, c, s: (q, k, c[:1], s[:1]), "angles that are broadcast along positions"),
        (lambda q, k, c, s: (q[0], k[0], c, s), "other dimensions than (B, H, L, D), and (L, R) or (B, L, R)"),
    ],
    ids=["grad", "dtype", "broadcast", "dimensions"],
)
def test_what_torch_takes(change: Any, reason: str, device: torch.device) -> None:
    """The same numbers, and a gradient of the angles."""
    args = change(*draw(5, 8, device=device))
    with fastlayers.policy("auto"):
        explained = fastlayers.explain(lambda: FL.rotary_embedding(*args))
        assert [d.reason for d in explained.decisions if d.op == "rotary_embedding"] == [reason]
        mine = FL.rotary_embedding(*args)
    torch.testing.assert_close(mine, reference(*args, interleaved=False))
    if args[2].requires_grad:
        assert torch.autograd.grad(mine[0].sum(), args[2])[0].abs().sum() > 0


def test_bad_input_raises(device: torch.device) -> None:
    q, k, cos, sin = draw(5, 8, device=device)
    for wrong in ((q, k, cos[:, :7], sin[:, :7]), (q, k[..., :6], cos, sin), (q[:, :, :4], k, cos, sin)):
        with pytest.raises(RuntimeError):
            FL.rotary_embedding(*wrong)
