"""Which functions are known as rotary embedding by what their source computes, and what is called in their place."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import pytest
import torch
from test_fuse_calls import _auto, apply_rotary, rotate_half  # noqa: F401

import fastlayers
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


# --- what only resembles it -----------------------------------------------------------------------------------------------


def without_query_gradient(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return apply_rotary(q.detach(), k, cos, sin)


def without_angle_gradient(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return apply_rotary(q, k, cos.detach(), sin)


def limited(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    q, k = apply_rotary(q, k, cos, sin)
    return q.clamp(-65504, 65504), k.clamp(-65504, 65504)


def without_nan(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return apply_rotary(q.nan_to_num(), k, cos, sin)


def for_eight_features(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    other = [torch.cat((-x[..., -4:], x[..., :-4]), -1) for x in (q, k)]
    return q * cos + other[0] * sin, k * cos + other[1] * sin


def for_several_positions(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return apply_rotary(q, k, cos.squeeze(1), sin.squeeze(1))


class Pair(NamedTuple):
    q: Any
    k: Any


def with_a_name(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return Pair(*apply_rotary(q, k, cos, sin))


@pytest.mark.parametrize(
    "function",
    [
        with_a_name, without_query_gradient, without_angle_gradient, limited, without_nan, for_eight_features,
        for_several_positions,
    ],
)  # fmt: skip
def test_functions_that_resemble_it(function: Any) -> None:
    """They have other gradients, results of another type, or the same numbers for some sizes alone."""
    assert rotary.ours(function) is None


def test_found_whatever_the_mode() -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert rotary.ours(apply_rotary) is not None


# --- calls that the kernel doesn't take as the function does --------------------------------------------------------------


def with_names(query: Any, key: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    return apply_rotary(query, key, cos, sin, unsqueeze_dim)


def of_heads_before(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    """Whose unsqueeze_dim is a word without meaning."""
    return apply_rotary(q, k, cos, sin)


def with_longer_angles(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return apply_rotary(q, k, cos[:, : q.shape[2]], sin[:, : q.shape[2]])


def in_float32(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return apply_rotary(q.float(), k.float(), cos, sin)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


ANGLES = (2, 5, 8), (2, 5, 8)
SQUARE = (2, 5, 5, 8), (2, 5, 5, 8)
SHAPES = (2, 4, 5, 8), (2, 2, 5, 8)


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (with_names, [], dict(zip(("query", "key", "cos", "sin"), tensors(*SHAPES, *ANGLES), strict=True))),
        (with_names, tensors(*SHAPES), dict(zip(("cos", "sin"), tensors(*ANGLES), strict=True))),
        (of_heads_before, tensors(*SQUARE, *ANGLES), {"unsqueeze_dim": 2}),
        (apply_rotary, tensors(*SQUARE, (2, 5, 1), (2, 5, 1)), {"unsqueeze_dim": 3}),
        (with_longer_angles, tensors(*SHAPES, (2, 9, 8), (2, 9, 8)), {}),
        (apply_rotary, tensors(*SHAPES, (2, 5, 1), (2, 5, 1)), {}),
        (apply_rotary, tensors(*SHAPES, (2, 1, 8), (2, 1, 8)), {}),
        (in_float32, tensors(*SHAPES, *ANGLES, dtype=torch.bfloat16), {}),
        (partly, [t.transpose(1, 2) for t in tensors((2, 5, 4, 8), (2, 5, 2, 8))] + tensors((2, 5, 4), (2, 5, 4)), {}),
        (apply_rotary, [t.to(torch.uint8) for t in tensors(*SHAPES)] + tensors(*ANGLES), {}),
    ],
    ids=range(10),
)  # fmt: skip
def test_as_the_function_does(function: Any, args: list[Any], kwargs: dict[str, Any], device: torch.device) -> None:
    ours: Any = rotary.ours(function)
    assert ours is not None
    args, kwargs = (
        [t.to(device) for t in args],
        {n: t.to(device) if n != "unsqueeze_dim" else t for n, t in kwargs.items()},
    )
    for one, right in zip(ours(*args, **kwargs), function(*args, **kwargs), strict=True):
        assert one.dtype is right.dtype
        assert one.stride() == right.stride()
        torch.testing.assert_close(one, right)


def test_where_the_kernel_does_not_take_it_the_function_runs(device: torch.device, launched: list[str]) -> None:
    """Ours in torch's operators would round three times, where with_pairs rounds once."""
    ours: Any = rotary.ours(with_pairs)
    args = [t.to(device) for t in tensors(*SHAPES, *ANGLES, dtype=torch.bfloat16)]
    with fastlayers.policy("torch"):
        for one, right in zip(ours(*args), with_pairs(*args), strict=True):
            assert torch.equal(one, right)
    args[2].requires_grad_()
    assert torch.equal(ours(*args)[0], with_pairs(*args)[0])
    assert not launched
    assert [(d.op, d.path, d.reason) for d in fastlayers.explain(ours, *args)] == [
        ("rotary_embedding", "torch", "cos or sin that require grad")
    ]
