"""CONTRIBUTING's recipes, played through: a new activation, a new norm, a new family. What they don't say must follow by itself.

Looks inside where a contributor would edit a file: the tables of activations, of tile functions and of roles.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as TF
import triton
import triton.language as tl

import fastlayers
from fastlayers import nn
from fastlayers.catalog.row import Row, case
from fastlayers.fusion import plan
from fastlayers.fusion.plan import Role
from fastlayers.kernels import activations as tile_functions
from fastlayers.kernels.runtime import launch
from fastlayers.operation import Operation
from fastlayers.ops import activation
from fastlayers.ops.activation import Activation, Rule, _pointwise
from fastlayers.testing import assert_within_budget
from fastlayers.values import Out

# --- a new activation: one that needs its output, one that needs its input and has an option ---------------------------------


@triton.jit
def exp(x, A):
    return tl.exp(x)


@triton.jit
def exp_grad(dy, y, A):
    return dy * y


@triton.jit
def scaled_square(x, A):
    return A[0] * x * x


@triton.jit
def scaled_square_grad(dy, x, A):
    return 2 * A[0] * dy * x


class Exp(torch.nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _pointwise((input,), Activation("exp"), False)


class ScaledSquare(torch.nn.Module):
    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _pointwise((input,), Activation("scaled_square", (float(self.scale),)), False)


@pytest.fixture
def _activations(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (exp, exp_grad, scaled_square, scaled_square_grad):
        monkeypatch.setattr(tile_functions, function.__name__, function, raising=False)
    rules = {
        "exp": Rule(torch.exp, lambda dy, y: dy * y, keeps="output"),
        "scaled_square": Rule(lambda x, scale: scale * x.square()),
    }
    monkeypatch.setattr(activation, "RULES", activation.RULES | rules)
    monkeypatch.setattr(plan, "_entries", dict(plan._entries))
    plan.register_role(Exp, Role("activation", Activation("exp")))
    of = lambda layer: Activation("scaled_square", (float(layer.scale),))  # noqa: E731
    plan.register_role(ScaledSquare, Role("activation", of=of))


ACTIVATIONS = [(Exp, torch.exp), (lambda: ScaledSquare(3), lambda x: 3 * x.square())]


@pytest.mark.parametrize(("make", "reference"), ACTIVATIONS, ids=["by its output", "by its input"])
@pytest.mark.parametrize(
    ("producer", "shape"),
    [
        (nn.Identity, (3, 5)),
        (lambda: nn.Linear(5, 4), (3, 5)),
        (lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6)), (2, 3, 5)),
        (lambda: nn.Conv2d(2, 3, 2), (1, 2, 4, 4)),
    ],
    ids=["alone", "Linear", "chain", "Conv2d"],
)
@pytest.mark.usefixtures("_activations")
def test_an_activation(make: Any, reference: Any, producer: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Values and gradients, alone and behind every producer; second derivatives."""
    first = producer()
    layers = [*first] if isinstance(first, nn.Sequential) else [first]
    model = nn.Sequential(*layers, make(), nn.Linear(3, 2) if shape[-1] == 4 else nn.Identity()).to(device)
    exact = copy.deepcopy(model).double()
    for _ in range(3):  # the third call is replayed
        x = torch.randn(shape, device=device, requires_grad=True)
        y = model(x)
        h = x.double()
        for layer in exact:
            h = reference(h) if isinstance(layer, (Exp, ScaledSquare)) else layer(h)
        assert_within_budget(y, h.float(), h)
        dy = torch.randn_like(y)
        wanted = [p for p in model.parameters() if p.requires_grad]
        mine = torch.autograd.grad(y, [x, *wanted], dy)
        right = torch.autograd.grad(h, [x, *exact.parameters()], dy.double())
        for a, b in zip(mine, right, strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-5)
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradgradcheck(exact, x, fast_mode=True)


@pytest.mark.usefixtures("_activations")
def test_activations_are_fused_by_value(device: torch.device) -> None:
    """Each runs in its producer's kernel with its own option, which may change between two calls."""
    model = nn.Sequential(nn.Linear(5, 4), ScaledSquare(2), nn.Linear(4, 4), ScaledSquare(0.5)).to(device)
    x = torch.randn(3, 5, device=device)

    def expected() -> torch.Tensor:
        h = model[1].scale * TF.linear(x, model[0].weight, model[0].bias).square()
        return model[3].scale * TF.linear(h, model[2].weight, model[2].bias).square()

    for scale in (2, 3, -1.5):
        model[1].scale = scale
        assert [d.op for d in fastlayers.explain(model, x)] == ["linear"]
        torch.testing.assert_close(model(x), expected(), rtol=1e-4, atol=1e-4)


# --- a new norm, in a family of its own ----------------------------------------------------------------------------------------


@triton.jit
def _scale_norm_kernel(x_ptr, weight_ptr, out_ptr, rstd_ptr, N, TILE: tl.constexpr):
    """One program: a row, divided by the root of its mean square."""
    row, n = tl.program_id(0), tl.arange(0, TILE)
    x = tl.load(x_ptr + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(x * x, axis=0) / N + 1e-5)
    y = x * rstd * tl.load(weight_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + n, y.to(out_ptr.dtype.element_ty), mask=n < N)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd)


@triton.jit
def _scale_norm_grad_kernel(dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, N, TILE: tl.constexpr):
    """One program: a row of dx = rstd (w dy - x rstd^2 mean(w dy x))."""
    row, n = tl.program_id(0), tl.arange(0, TILE)
    x = tl.load(x_ptr + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    g = tl.load(dy_ptr + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    g *= tl.load(weight_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    dx = rstd * (g - x * rstd * rstd * (tl.sum(g * x, axis=0) / N))
    tl.store(dx_ptr + row * N + n, dx.to(dx_ptr.dtype.element_ty), mask=n < N)


class RecipeNorm(Operation):
    """input (*, N), weight (N,), which takes no gradient here -> as input."""

    tensors = ("input", "weight")
    autocast = staticmethod(lambda x: TF.rms_norm(x, (1,)))

    class Options(NamedTuple):
        eps: float

    def reference(self, input: Any, weight: Any, eps: float) -> Any:
        return TF.rms_norm(input, weight.shape, weight, eps)

    def unsupported(self, t: Any, options: Any) -> str | None:
        return "a weight that requires grad" if t.weight.requires_grad else None

    def outputs(self, t: Any, options: Any, needs: Any) -> Any:
        found = {"output": Out(tuple(t.input.shape), t.input.dtype)}
        rows = (t.input.numel() // t.input.shape[-1],)
        return found | ({"rstd": Out(rows, torch.float32, differentiable=False)} if needs else {})

    def forward(self, t: Any, out: Any, options: Any, precision: str) -> None:
        x, n = t.input.contiguous(), t.input.shape[-1]
        tile = 1 << (n - 1).bit_length()
        launch.launch(_scale_norm_kernel, x.numel() // n, x, t.weight, out.output, out.rstd, n, TILE=tile)

    def saves(self, t: Any, options: Any, needs: Any) -> tuple[str, ...]:
        return "input", "weight", "rstd"

    def backward(self, grads: Any, dy: Any, saved: Any, options: Any, precision: str) -> None:
        x, n = saved.input.contiguous(), saved.input.shape[-1]
        tile = 1 << (n - 1).bit_length()
        arguments = dy.output.contiguous(), x, saved.weight, saved.rstd, grads.input, n
        launch.launch(_scale_norm_grad_kernel, x.numel() // n, *arguments, TILE=tile)


_recipe_norm = RecipeNorm()


def scale_norm(input: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return _recipe_norm((input, weight), float(eps))


class ScaleNorm(torch.nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("weight", torch.linspace(0.5, 2, size))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return scale_norm(input, self.weight)


ROW = Row(
    "ScaleNorm", "rows", "a weight that requires grad", operation=_recipe_norm, speeds={},
    cases=dict(rows=case(lambda nn: ScaleNorm(9), (4, 9)), images=case(lambda nn: ScaleNorm(5), (2, 3, 5))),
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
@pytest.mark.parametrize("name", ROW.cases)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does
def test_a_norm(name: str, device: torch.device) -> None:
    """Values, gradients, replays, second and batched derivatives, autocast, reasons and torch.compile, from the record."""
    made = ROW.cases[name]
    layer: Any = made.make(nn).to(device)

    def reference(x: torch.Tensor) -> torch.Tensor:
        return TF.rms_norm(x, layer.weight.shape, layer.weight.to(x.dtype), 1e-5)

    for _ in range(3):
        (x,) = made.arguments(torch.float32, device)
        x.requires_grad_()
        y, right = layer(x), reference(x)
        torch.testing.assert_close(y, right)
        dy = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, x, dy), torch.autograd.grad(right, x, dy), rtol=1e-4, atol=1e-5
        )
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (other,) = torch.autograd.grad(reference(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(
        torch.autograd.grad(first.sum(), x), torch.autograd.grad(other.sum(), x), rtol=1e-3, atol=1e-4
    )
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(
        jacobian(layer, x, vectorize=True), jacobian(reference, x, vectorize=True), rtol=1e-4, atol=1e-5
    )
    assert [d.op for d in fastlayers.explain(layer, x)] == ["recipe_norm"]
    weight = layer.weight.clone().requires_grad_()
    with pytest.raises(fastlayers.NotAccelerated, match="a weight that requires grad"):
        scale_norm(x, weight)
    with fastlayers.policy("auto"):
        torch.testing.assert_close(scale_norm(x, weight), reference(x))
        with torch.autocast(device.type, dtype=torch.float16):
            assert layer(x).dtype == TF.rms_norm(x, layer.weight.shape, layer.weight).dtype
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(reference(x).sum(), x), rtol=1e-4, atol=1e-5
        )
        torch._dynamo.reset()
