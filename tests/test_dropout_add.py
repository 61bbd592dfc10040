"""residual + dropout(x), and its normalisation, in one call: what Sequential and `fuse` make of the layers in a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastlayers
import fastlayers.functional as FL
from fastlayers import nn
from fastlayers.fusion import plan
from fastlayers.testing import assert_within_budget

P = 0.3


def run(x: torch.Tensor, residual: torch.Tensor, norm: Any = None, p: float = P) -> tuple[torch.Tensor, torch.Tensor]:
    """The last layer's result, and the sum."""
    layers = [nn.Dropout(p), plan.Residual(residual, lambda y: residual + y)]
    if norm is None:
        total = plan.run(layers, x)
        return total, total
    return plan.run_with_sum([*layers, norm], x)


def names(*args: Any) -> list[tuple[str, str]]:
    return [(d.module, d.path) for d in fastlayers.explain(lambda: run(*args)).decisions]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 16), (3, 5, 7), (70, 40)])
def test_the_sum(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Bit for bit what the layers one by one give under the same seed, and their gradients; one call."""
    x, residual = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    dy = torch.randn(shape, device=device).to(dtype)
    torch.manual_seed(5)
    y = FL.dropout(x, P)
    expected = y + residual
    wanted = torch.autograd.grad(expected, (x, residual), dy)
    for _ in range(3):  # the last by a replay
        torch.manual_seed(5)
        ours = run(x, residual)[0]
        assert torch.equal(ours, expected)
        for a, b in zip(torch.autograd.grad(ours, (x, residual), dy), wanted, strict=True):
            assert torch.equal(a, b)
    assert names(x, residual) == [("Dropout + add", "triton")]
    (gradient,) = torch.autograd.grad(run(x.detach(), residual)[0], residual, dy)
    assert torch.equal(gradient, dy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 16), (3, 5, 7), (70, 40)])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_its_norm(
    shape: tuple[int, ...], dtype: torch.dtype, kind: Any, device: torch.device, launched: list[str]
) -> None:
    """One kernel each way, unless torch draws for single elements."""
    x, residual = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    norm: Any = kind(shape[-1]).to(device, dtype)
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    leaves = (x, residual, *norm.parameters())
    dy, dtotal = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    torch.manual_seed(5)
    kept = FL.dropout(torch.ones_like(x), P) != 0

    def torchs(to: torch.dtype) -> dict[str, torch.Tensor]:
        a, r, *of_norm = (t.detach().to(to).requires_grad_() for t in leaves)
        total = r + a * (kept.to(to) / (1 - P))
        y = (
            F.layer_norm(total, shape[-1:], *of_norm)
            if kind is nn.LayerNorm
            else F.rms_norm(total, shape[-1:], *of_norm)
        )
        return {"y": y, "sum": total} | dict(
            zip("xrwb", torch.autograd.grad((y, total), (a, r, *of_norm), (dy.to(to), dtotal.to(to))), strict=False)
        )

    expected, theirs = torchs(torch.float64), torchs(dtype)
    launched.clear()
    for _ in range(3):
        torch.manual_seed(5)
        y, total = run(x, residual, norm)
        ours = {"y": y, "sum": total} | dict(
            zip("xrwb", torch.autograd.grad((y, total), leaves, (dy, dtotal)), strict=False)
        )
        for name, value in ours.items():
            assert_within_budget(value, [theirs[name]], expected[name], scale=1)
        assert bool([name for name in launched if "dropout" in name]) == (x.numel() % 2 == 1)
    assert names(x, residual, norm) == [(f"Dropout + add + {kind.__name__}", "triton")]


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_gradients_that_are_asked_for(kind: Any, device: torch.device) -> None:
    """Of one result alone, and for one of the tensors alone."""
    x, residual = (torch.randn(4, 24, device=device, requires_grad=True) for _ in range(2))
    norm: Any = kind(24).to(device)

    def gradients(x: torch.Tensor, residual: torch.Tensor, which: int) -> list[Any]:
        torch.manual_seed(5)
        result = run(x, residual, norm)[which]
        leaves = [t for t in (x, residual, *norm.parameters()) if t.requires_grad]
        return [*torch.autograd.grad(result.square().sum(), leaves, allow_unused=True)]

    for which in (0, 1):
        dx, dr, *rest = gradients(x, residual, which)
        torch.testing.assert_close(gradients(x, residual.detach(), which), [dx, *rest])
        torch.testing.assert_close(gradients(x.detach(), residual, which), [dr, *rest])
        assert [g is None for g in rest] == [which == 1] * len([*norm.parameters()])


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_second_derivatives(kind: Any, device: torch.device) -> None:
    x, residual = (torch.randn(3, 8, device=device, dtype=torch.float64, requires_grad=True) for _ in range(2))
    norm: Any = kind(8).to(device, torch.float64)

    def call(x: torch.Tensor, residual: torch.Tensor, with_norm: bool) -> Any:
        torch.manual_seed(5)
        return run(x, residual, norm)[0] if with_norm else run(x, residual)[0].sin()

    for with_norm in (False, True):
        assert torch.autograd.gradgradcheck(lambda *a: call(*a, with_norm), (x, residual))  # noqa: B023


def test_saved_bytes(device: torch.device) -> None:
    """What torch saves for a sum of a dropout is a mask; ours, two numbers."""
    x, residual = (torch.randn(64, 64, device=device, requires_grad=True) for _ in range(2))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(x, residual)
    assert sum(t.numel() for t in saved) == 2


def test_what_isnt_joined(device: torch.device) -> None:
    """Each is right, by fewer layers in one call."""
    x, norm = torch.randn(4, 24, device=device), nn.LayerNorm(24).to(device)
    alone = [("Dropout", "triton")]
    assert names(x, x[:1])[:1] == alone  # broadcast
    assert names(x, x.t().contiguous().t())[:1] == alone
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        half, residual = torch.randn(2, 4, 24, device=device, dtype=torch.bfloat16)
        found = names(half, residual, norm)
    # Where autocast widens the norm (on CUDA) the sum is a call of its own.
    assert {name for name, _ in found} <= {"Dropout + add + LayerNorm", "LayerNorm"}
    empty = torch.empty(0, 24, device=device)
    assert run(empty, empty, norm)[0].shape == (0, 24)


@pytest.mark.parametrize(
    "make", [lambda: nn.Dropout(0.5).eval(), lambda: nn.Dropout(0.0), lambda: nn.Dropout(0.5, True).eval()]
)
def test_passed_through(make: Any, device: torch.device) -> None:
    """A dropout that drops nothing doesn't keep its neighbours apart, nor does it touch anything."""
    x, residual = torch.randn(2, 5, 12, device=device)
    layer, norm = nn.Linear(12, 12).to(device), nn.LayerNorm(12).to(device)
    model = nn.Sequential(layer, make(), nn.ReLU())
    assert [d.module for d in fastlayers.explain(model, x).decisions] == ["0 + 2"]
    torch.testing.assert_close(model(x), layer(x).relu())
    y, total = plan.run_with_sum([make(), plan.Residual(residual, lambda y: residual + y), norm], x)
    torch.testing.assert_close((y, total), (norm(x + residual), x + residual))
    assert nn.Sequential(make())(x) is x
    model[1].register_forward_hook(lambda module, args, result: result * 2)
    torch.testing.assert_close(model(x), (layer(x) * 2).relu())


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sum_and_its_rms_norm(dtype: torch.dtype, eps: float | None, device: torch.device) -> None:
    """Without a dropout: one call, with the bits of the norm of the sum."""
    x, residual = (torch.randn(5, 24, device=device).to(dtype).requires_grad_() for _ in range(2))
    norm = nn.RMSNorm(24, eps=eps).to(device, dtype)
    torch.nn.init.normal_(norm.weight)
    layers = [plan.Residual(residual, lambda y: residual + y), norm]
    dy, dtotal = (torch.randn(5, 24, device=device).to(dtype) for _ in range(2))
    y, total = plan.run_with_sum(layers, x)
    expected = norm(x + residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, expected)
    assert [d.module for d in fastlayers.explain(lambda: plan.run_with_sum(layers, x))] == ["add + RMSNorm"]
    dx, dr, dw = torch.autograd.grad((y, total), (x, residual, norm.weight), (dy, dtotal))
    assert torch.equal(dx, dr)
    wanted, dw_wanted = torch.autograd.grad(expected, (x, norm.weight), dy)
    assert torch.equal(dw, dw_wanted)
    largest = max(
        wanted.abs().max().item(), dtotal.abs().max().item()
    )  # the sum may cancel, and has its terms' roundings
    torch.testing.assert_close(dx, wanted + dtotal, rtol=0, atol=2 * torch.finfo(dtype).eps * largest)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo instantiates a Function
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_compiled_sum_and_its_norm(kind: Any, device: torch.device) -> None:
    x, residual = (torch.randn(5, 24, device=device).requires_grad_() for _ in range(2))
    norm = kind(24).to(device)

    def call(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y, total = plan.run_with_sum([plan.Residual(residual, lambda y: residual + y), norm], x)
        return y.square() + total

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    results = [(y, *torch.autograd.grad(y.sum(), (x, residual))) for y in (call(x, residual), compiled(x, residual))]
    torch.testing.assert_close(results[0], results[1])


class Block(torch.nn.Module):
    """A transformer's feed-forward block as models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(16), torch.nn.LayerNorm(16)
        self.up, self.act, self.down = torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16)
        self.drop, self.drop2 = torch.nn.Dropout(P), torch.nn.Dropout(P)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop2(self.down(self.drop(self.act(self.up(self.norm1(x))))))
        return x + self.norm2(x)


def test_fuse(device: torch.device) -> None:
    """In training and in eval, from one graph each; the numbers are those of the same layers that aren't joined."""
    model = Block().to(device)
    fastlayers.accelerate(model)
    x = torch.randn(3, 16, device=device)
    torch.manual_seed(5)
    expected = model(x)
    fused = fastlayers.fuse(model)
    torch.manual_seed(5)
    torch.testing.assert_close(fused(x), expected)
    found = [d.module for d in fastlayers.explain(fused, x).decisions]
    assert "drop2 + add + norm2" in found, found
    assert "up + act" in found
    expected = model.eval()(x)
    fused = fastlayers.fuse(model)
    torch.testing.assert_close(fused(x), expected)
    found = [d.module for d in fastlayers.explain(fused, x).decisions]
    assert "up + act + down" in found, found
    assert "add + norm2" in found
