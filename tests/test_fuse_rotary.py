"""Which functions are known as rotary embedding by what their source computes, and what is called in their place."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from test_fuse_calls import _auto, apply_rotary, rotate_half  # noqa: F401

from fastlayers.fusion import rotary

pytestmark = pytest.mark.usefixtures("small_tiles")


def interleaved(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    def turned(x: Any) -> Any:
        other = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return (x.float() * cos + other.float() * sin).to(x.dtype)

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return turned(q), turned(k)


def other_pair(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def with_pairs(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    cos, sin = cos[:, None], sin[:, None]
    return (
        (q.float() * cos + other_pair(q).float() * sin).to(q.dtype),
        (k.float() * cos + other_pair(k).float() * sin).to(k.dtype),
    )


def partly(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    cos, sin, size = cos.unsqueeze(1), sin.unsqueeze(1), cos.shape[-1]
    turned = [x[..., :size] * cos + rotate_half(x[..., :size]) * sin for x in (q, k)]
    return torch.cat([turned[0], q[..., size:]], -1), torch.cat([turned[1], k[..., size:]], -1)


def the_other_way(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos - rotate_half(q) * sin, k * cos - rotate_half(k) * sin


def in_place(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    other = rotate_half(q) * sin
    q *= cos
    q += other
    return q, k * cos + rotate_half(k) * sin


def counting(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    COUNTED.append(1)
    return apply_rotary(q, k, cos, sin)


COUNTED: list[int] = []


@pytest.mark.parametrize(
    ("function", "widens"),
    [
        (apply_rotary, True), (with_pairs, False), (partly, True),
        (interleaved, None), (the_other_way, None), (in_place, None), (counting, None), (rotate_half, None),
    ],
)  # fmt: skip
def test_functions(function: Any, widens: bool | None, device: torch.device, launched: list[str]) -> None:
    """A function within a function isn't read; nothing of it is run to know it."""
    ours = rotary.ours(function)
    assert not COUNTED
    assert (ours is not None) == (widens is not None)
    if ours is None:
        return
    turned = 6 if function is partly else 8
    angles = torch.randn(2, 5, turned, device=device)
    q, k = torch.randn(2, 4, 5, 8, device=device), torch.randn(2, 2, 5, 8, device=device)
    args = q, k, angles.cos(), angles.sin()
    for one, other in zip(ours(*args), function(*args), strict=True):
        torch.testing.assert_close(one, other)
    assert launched == ["_rotary_kernel"]
    narrow = q.bfloat16(), k.bfloat16(), *args[2:]
    for one, other in zip(ours(*narrow), function(*narrow), strict=True):
        assert one.dtype is other.dtype is (torch.float32 if widens else torch.bfloat16)
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)
    launched.clear()
    strange = q, k, *[t[:, :1].expand(2, 5, turned)[0, :, :1] for t in args[2:]]  # broadcast, as torch's operators do
    with (
        pytest.raises((RuntimeError, IndexError))
        if function is with_pairs
        else contextlib.suppress(RuntimeError, IndexError)
    ):
        function(*strange)
    assert not launched


def test_heads_behind_positions(device: torch.device, launched: list[str]) -> None:
    ours: Any = rotary.ours(apply_rotary)
    angles = torch.randn(1, 5, 8, device=device)
    args = torch.randn(2, 5, 4, 8, device=device), torch.randn(2, 5, 2, 8, device=device), angles.cos(), angles.sin()
    torch.testing.assert_close(ours(*args, unsqueeze_dim=2), apply_rotary(*args, unsqueeze_dim=2))
    assert launched == ["_rotary_kernel"]
