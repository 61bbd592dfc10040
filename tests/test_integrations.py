"""What other packages' registries take, called as they call it. tests/exam has their models."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contract import by_formula

from fastlayers import integrations
from fastlayers.integrations import FlashAttention, attention_forward
from fastlayers.testing import assert_within_budget, neighbours

CALLS = {
    "causal": dict(),
    "not causal": dict(module=dict(is_causal=False)),
    "not causal in this call": dict(is_causal=False),
    "causal in this call": dict(module=dict(is_causal=False), is_causal=True),
    "one query": dict(queries=1),
    "a longer cache": dict(keys=12),
    "scaled": dict(scaling=0.7),
    "a mask": dict(mask=(2, 1, 7, 7)),
    "a mask of more keys": dict(mask=(2, 1, 7, 12)),
    "one query and a mask": dict(queries=1, keys=9, mask=(2, 1, 1, 9)),
    "a bias": dict(bias=True, module=dict(is_causal=False)),
    "a bias, causal, a longer cache": dict(bias=True, keys=12),
    "a bias and a mask": dict(bias=True, mask=(2, 1, 7, 7)),
    "a bias and a mask to add": dict(bias=True, mask=(2, 1, 7, 7), added=True),
}


def right(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: Any, is_causal: Any, bias: Any) -> torch.Tensor:
    """What is meant, in as many words: every head with its own keys, and one mask of all there is."""
    groups = getattr(module, "num_key_value_groups", 1)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    added = q.new_zeros(q.shape[2], k.shape[2]) if bias is None else bias.to(q.dtype)
    if mask is not None:
        mask = mask[..., : k.shape[2]]
        added = added.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else added + mask.to(q.dtype)
    elif q.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        added = added.masked_fill(~torch.ones(added.shape, dtype=torch.bool, device=q.device).tril(), -torch.inf)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, added, scale=scaling).transpose(1, 2)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", CALLS)
def test_attention_forward(name: str, groups: int, device: torch.device, launched: list[str]) -> None:
    call: dict[str, Any] = CALLS[name]
    queries, keys = call.get("queries", 7), call.get("keys", 7)
    module: Any = SimpleNamespace(**call.get("module", {}), **(dict(num_key_value_groups=groups) if groups > 1 else {}))
    shapes = (2, queries, 6, 8), (2, keys, 6 // groups, 8), (2, keys, 6 // groups, 8)
    given = [torch.randn(shape, device=device).transpose(1, 2) for shape in shapes]  # as a projection leaves them
    dy = torch.randn(2, queries, 6, 8, device=device)
    mask = None
    if "mask" in call:
        mask = torch.rand(call["mask"], device=device) > 0.3
        mask[..., 0] = True
        mask = torch.where(mask, 0.0, -torch.inf) if call.get("added") else mask
    bias = torch.randn(1, 6, queries, keys, device=device) if "bias" in call else None
    scaling, is_causal = call.get("scaling"), call.get("is_causal")

    def run(compute: Any, *tensors: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = compute(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    def attend(q: Any, k: Any, v: Any) -> torch.Tensor:
        y, weights = attention_forward(
            module, q, k, v, mask, scaling=scaling, is_causal=is_causal, position_bias=bias, sliding_window=4
        )
        assert weights is None and y.is_contiguous()
        return y

    def formula(q: Any, k: Any, v: Any) -> torch.Tensor:
        return right(module, q, k, v, mask, scaling, is_causal, bias)

    found = run(attend, *given, dy=dy)
    assert {*launched} == {"attention_kernel", "attention_dq_kernel", "attention_dkdv_kernel"}
    with by_formula():
        others = [run(formula, *moved, dy=moved_dy) for *moved, moved_dy in neighbours(*given, dy)]
        exact = run(formula, *[t.double() for t in given], dy=dy.double())
    for i, (a, c, *b) in enumerate(zip(found, exact, *others, strict=True)):
        assert_within_budget(a, b, c, str(i), 1)


def test_heads_are_shared_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 2, 4, 8)
    seen: list[Any] = []

    def watch(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((key is k, value is k, kwargs["enable_gqa"]))
        return query

    monkeypatch.setattr(integrations, "scaled_dot_product_attention", watch)
    module: Any = SimpleNamespace(num_key_value_groups=3)
    attention_forward(module, q, k, k, torch.ones(1, 1, 4, 4, dtype=torch.bool))
    assert seen == [(True, True, True)]


@pytest.mark.parametrize("asked", [dict(softcap=50.0), dict(output_attentions=True)], ids=str)
def test_what_it_cannot_do_raises(asked: dict[str, Any]) -> None:
    x, module = torch.randn(1, 2, 4, 8), torch.nn.Module()
    with pytest.raises(ValueError, match=next(iter(asked))):
        attention_forward(module, x, x, x, None, **asked)
    nothing: dict[str, Any] = dict.fromkeys(asked)
    attention_forward(module, x, x, x, None, **nothing)


def test_compiled(device: torch.device) -> None:
    """In one graph."""
    x = [torch.randn(1, 2, 5, 8, device=device) for _ in range(3)]
    module = torch.nn.Module()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention_forward(module, q, k, v, None, scaling=0.5)[0]

    assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(*x), attend(*x))


@pytest.fixture
def flash_attention() -> Iterator[None]:
    """Ours, registered and active as a user does it, but on CPU tensors where no GPU is."""
    on = "CUDA" if torch.cuda.is_available() else "CPU"
    integrations.register_flash_attention_impl()
    assert "fastlayers" in torch.nn.attention.list_flash_attention_impls()
    torch.nn.attention.register_flash_attention_impl("fastlayers", register_fn=lambda: FlashAttention(on))
    torch.nn.attention.activate_flash_attention_impl("fastlayers")
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


@pytest.mark.filterwarnings("ignore:.*verrid")  # torch's word for what is wanted here
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_of_torch(
    causal: bool, device: torch.device, flash_attention: None, launched: list[str]
) -> None:
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    q, k, v = (torch.randn(2, 3, 9, 8, device=device).bfloat16().requires_grad_() for _ in range(3))
    y, lse, *_ = flash(q, k, v, 0.0, causal, False, scale=0.4)
    dy = torch.randn_like(y)
    mine = [y, *torch.autograd.grad(y, (q, k, v), dy)]
    assert launched == ["attention_kernel", "attention_dq_kernel", "attention_dkdv_kernel"]

    def theirs(*tensors: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal, scale=0.4)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    with by_formula():
        exact = theirs(*[t.double() for t in (q, k, v)], dy=dy.double())
        near = [theirs(*moved, dy=moved_dy) for *moved, moved_dy in neighbours(q, k, v, dy)]
    for a, c, *b in zip(mine, exact, *near, strict=True):
        assert_within_budget(a, b, c)
    scores = 0.4 * q.double() @ k.double().mT
    scores = scores.masked_fill(~torch.ones(9, 9, device=device).tril().bool(), -torch.inf) if causal else scores
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-2, atol=1e-2)

    seeded = []
    for _ in range(2):
        torch.manual_seed(3)
        dropped = flash(q, k, v, 0.5, causal)[0]
        seeded.append([dropped, *torch.autograd.grad(dropped, (q, k, v), dy)])
    assert all(torch.equal(a, b) for a, b in zip(*seeded, strict=True))
    assert not torch.equal(seeded[0][0], y)


def test_flash_attention_is_undone(device: torch.device) -> None:
    """Then the operators are torch's, of which the CPU has none."""
    x = torch.randn(1, 1, 4, 8)
    flash = FlashAttention("CPU")
    torch.ops.aten._scaled_dot_product_flash_attention(x, x, x)
    flash.remove()
    with pytest.raises(NotImplementedError):
        torch.ops.aten._scaled_dot_product_flash_attention(x, x, x)


# --- rotary embedding -------------------------------------------------------------------------------------------------


def swapped(x: torch.Tensor) -> torch.Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((-b, a), dim=-1).flatten(-2)


def pairs_in_a_row(first: Any, second: Any, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> Any:
    """As GPT-J, under any name."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return first * cos + swapped(first) * sin, second * cos + swapped(second) * sin


def turned_back(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """The other way around."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos - swapped(q) * sin, k * cos - swapped(k) * sin


def fails(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    raise RuntimeError("not for such sizes")


def one_tensor(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    return q + k


def writes(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """Its caller may use q and k afterwards."""
    for x, y in zip((q, k), pairs_in_a_row(q, k, cos, sin), strict=True):
        x.copy_(y)
    return q, k


class Attention(torch.nn.Module):
    def forward(self, q: Any, k: Any, cos: Any, sin: Any, dim: int = 1) -> Any:
        if dim == 0:  # none of which is ours
            return (
                turned_back(q, k, cos, sin),
                fails(q, k, cos, sin),
                one_tensor(q, k, cos, sin),
                writes(q, k, cos, sin),
            )
        return pairs_in_a_row(q, k, cos, sin, unsqueeze_dim=dim)


def test_replace_rotary(device: torch.device, launched: list[str]) -> None:
    """By what it computes: in float64 exactly as before, but on the kernel; then put back. torch's generator isn't touched."""
    model, before = Attention(), pairs_in_a_row
    q, k = (torch.randn(2, heads, 5, 8, dtype=torch.float64, device=device) for heads in (3, 1))
    angles = torch.randn(2, 5, 8, dtype=torch.float64, device=device)
    cos, sin = angles.cos(), angles.sin()
    for dim in (1, 2):
        args = [x.transpose(1, dim) for x in (q, k)]
        expected, state = model(*args, cos, sin, dim), torch.get_rng_state()
        with integrations.replace_rotary(model) as replaced:
            assert replaced.names == (f"{__name__}.pairs_in_a_row",)
            assert torch.equal(torch.get_rng_state(), state)
            assert integrations.replace_rotary(model).names == ()  # ours already
            launched.clear()
            torch.testing.assert_close(model(*args, cos, sin, dim), expected)
            assert launched == ["_rotary_kernel"]
        assert pairs_in_a_row is before
    handle = integrations.replace_rotary(model)
    somebodys = lambda *args, **kwargs: "somebody's"  # noqa: E731
    globals()["pairs_in_a_row"] = somebodys
    handle.remove()
    assert model(q, k, cos, sin) == "somebody's"
    globals()["pairs_in_a_row"] = before


def test_other_arguments_go_to_the_function(device: torch.device, launched: list[str]) -> None:
    model = Attention()
    q, k = torch.randn(2, 1, 2, 5, 8, device=device)
    angles = torch.randn(1, 5, 8, device=device)
    with integrations.replace_rotary(model):
        rotated: Any = pairs_in_a_row
        rotated(q, k, angles.cos(), angles.sin(), 1)
        assert not launched
