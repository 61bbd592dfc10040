"""The gated layers of a transformer as `fuse` finds them: what is joined, in which forwards, and that nobody can tell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from activations import OPTIONS

import fastlayers
from fastlayers import functional as FL
from fastlayers.kernels.runtime import launch as _launch
from fastlayers.ops.activation import RULES, Activation
from fastlayers.ops.gated_mlp import _gated_mlp
from fastlayers.testing import assert_within_budget, neighbours

pytestmark = pytest.mark.filterwarnings("ignore:fuse found nothing")


@pytest.fixture(autouse=True)
def _auto() -> Any:
    with fastlayers.policy("auto"):
        yield


class Mlp(torch.nn.Module):
    """Written as Llama's is; `forward` may be another one."""

    def __init__(self, act: torch.nn.Module | None = None, bias: bool = False):
        super().__init__()
        self.gate_proj = torch.nn.Linear(24, 40, bias=bias)
        self.up_proj = torch.nn.Linear(24, 40, bias=bias)
        self.down_proj = torch.nn.Linear(40, 24, bias=bias)
        self.act_fn = torch.nn.SiLU() if act is None else act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = torch.nn.RMSNorm(24), Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


def fused(theirs: torch.nn.Module) -> Any:
    ours = copy.deepcopy(theirs)
    fastlayers.accelerate(ours)
    return fastlayers.fuse(ours)


def joins(model: Any, x: torch.Tensor) -> bool:
    """Whether one call stands for the three layers and the activation."""
    found = [d.op for d in fastlayers.explain(lambda: model(x)) if d.path == "triton"]
    joined = "gated_mlp" in found or "packed_gated_mlp" in found
    assert joined != ("linear" in found)
    return joined


def written_differently(*changes: Callable[..., Any]) -> Any:
    """Classes whose forward computes the same in other words."""
    return [type("Other", (Mlp,), {"forward": change}) for change in changes]


def up_first(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))


def gelu(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


def by_names(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate = self.gate_proj(x)
    up = self.up_proj(x)
    return self.down_proj(torch.mul(torch.relu(gate), up))


class Packed(torch.nn.Module):
    """Written as Phi-3's is; `forward` may be another one."""

    def __init__(self, act: torch.nn.Module | None = None, bias: bool = False):
        super().__init__()
        self.gate_up_proj = torch.nn.Linear(24, 80, bias=bias)
        self.down_proj = torch.nn.Linear(40, 24, bias=bias)
        self.act_fn = torch.nn.SiLU() if act is None else act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.act_fn(gate))


def gate_last(self: Any, x: torch.Tensor) -> torch.Tensor:
    halves = torch.chunk(self.gate_up_proj(x), 2, -1)
    return self.down_proj(halves[0] * F.gelu(halves[1]))


PACKED_GATE_LAST = type("Other", (Packed,), {"forward": gate_last})


@pytest.mark.parametrize("cls", [Mlp, *written_differently(up_first, gelu, by_names), Packed, PACKED_GATE_LAST])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("small_tiles")
def test_gates_are_found(cls: Any, bias: bool, device: torch.device) -> None:
    theirs = cls(bias=bias).to(device)
    x, dy = torch.randn(2, 3, 24, device=device), torch.randn(2, 3, 24, device=device)
    model = fused(theirs)
    assert joins(model, x)

    def values(module: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
        x = x.detach().requires_grad_()
        y = module(x)
        return [y, *torch.autograd.grad(y, [x, *dict(module.named_parameters()).values()], dy)]

    exact = values(copy.deepcopy(theirs).double(), x.double(), dy.double())
    others = [values(theirs, *moved) for moved in neighbours(x, dy)]
    for mine, right, *near in zip(values(model, x, dy), exact, *others, strict=True):
        assert_within_budget(mine, near, right, cls.__name__)


def gate_used_twice(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate = self.gate_proj(x)
    return self.down_proj(self.act_fn(gate) * self.up_proj(x)) + gate.sum()


def product_used_twice(self: Any, x: torch.Tensor) -> torch.Tensor:
    product = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(product) + product.mean()


def of_another_input(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x + 1))


def input_overwritten(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = x + 0
    gate = self.act_fn(self.gate_proj(x))
    x.mul_(2)
    return self.down_proj(gate * self.up_proj(x))


def of_itself(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate = self.act_fn(self.gate_proj(x))
    return self.down_proj(gate * gate)


@pytest.mark.parametrize(
    "cls",
    written_differently(gate_used_twice, product_used_twice, of_another_input, input_overwritten, of_itself),
    ids=["gate", "product", "input", "overwritten", "itself"],
)
def test_what_only_looks_like_a_gate_isn_t_joined(cls: Any, device: torch.device) -> None:
    theirs, x = cls().to(device), torch.randn(3, 24, device=device)
    model = fused(theirs)
    assert not joins(model, x)
    torch.testing.assert_close(model(x), theirs(x))


def of_other_halves(self: Any, x: torch.Tensor) -> torch.Tensor:
    halves = self.gate_up_proj(x).chunk(2, 0)
    return self.down_proj(self.act_fn(halves[0][..., :40]) * halves[1][..., 40:])


def one_half_twice(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_up_proj(x).chunk(2, -1)
    return self.down_proj(self.act_fn(gate) * up) + gate.sum()


def the_same_half(self: Any, x: torch.Tensor) -> torch.Tensor:
    halves = self.gate_up_proj(x).chunk(2, -1)
    return self.down_proj(self.act_fn(halves[0]) * halves[0])


@pytest.mark.parametrize("forward", [of_other_halves, one_half_twice, the_same_half])
def test_what_only_looks_like_halves_isn_t_joined(forward: Any, device: torch.device) -> None:
    theirs, x = type("Other", (Packed,), {"forward": forward})().to(device), torch.randn(4, 24, device=device)
    model = fused(theirs)
    assert not joins(model, x)
    torch.testing.assert_close(model(x), theirs(x))


def test_packed_weights_arent_copied(
    device: torch.device, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many kernels as with two weights, which read the halves of the weight and write those of its gradient where they are."""
    model, x = fused(Packed().to(device)), torch.randn(5, 24, device=device, requires_grad=True)
    weight, addresses = model.get_parameter("gate_up_proj.weight"), set[int]()
    launch = _launch.launch

    def watch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
        addresses.update([t.data_ptr() for t in args if isinstance(t, torch.Tensor)])
        launch(kernel, programs, *args, **meta)

    monkeypatch.setattr(_launch, "launch", watch)
    y = model(x)
    assert launched == ["_gated_matmul_kernel", "_matmul_kernel"]
    assert {weight.data_ptr(), weight[40:].data_ptr()} < addresses
    launched.clear()
    gradient, _, _ = torch.autograd.grad(y.sum(), [weight, model.get_parameter("down_proj.weight"), x])
    assert sorted(launched) == ["_gate_kernel", *["_matmul_kernel"] * 6]
    assert {gradient.data_ptr(), gradient[40:].data_ptr()} < addresses


@pytest.mark.parametrize(
    ("cls", "name"),
    [(Packed, "gate_up_proj"), (Packed, "act_fn"), (Packed, "down_proj"), (PACKED_GATE_LAST, "gate_up_proj")],
)
def test_hooks_of_packed_layers_are_called(cls: Any, name: str, device: torch.device) -> None:
    theirs, x = cls().to(device), torch.randn(3, 24, device=device)
    model, seen = fused(theirs), []
    for m in (model, theirs):
        hook = lambda m, args, y: seen.append((args[0].clone(), y.clone())) or 2 * y  # noqa: E731
        m.get_submodule(name).register_forward_hook(hook)
    assert not joins(model, x)
    seen.clear()
    torch.testing.assert_close(model(x), theirs(x))
    torch.testing.assert_close(*seen)


def test_a_block_trains_as_torchs(device: torch.device) -> None:
    """Five steps; an odd number of tokens; then restored."""
    theirs = torch.nn.Sequential(Block(), Block()).to(device)
    ours = copy.deepcopy(theirs)
    fastlayers.accelerate(ours)
    model = fastlayers.fuse(ours)
    x, target = torch.randn(7, 24, device=device), torch.randn(7, 24, device=device)
    assert joins(model, x)
    steps = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, theirs)]
    for _ in range(5):
        losses = []
        for module, step in zip((model, theirs), steps, strict=True):
            step.zero_grad()
            loss = F.mse_loss(module(x), target)
            loss.backward()
            step.step()
            losses.append(loss)
        torch.testing.assert_close(losses[0], losses[1])
    fastlayers.restore(ours)
    assert not any([type(m).__module__.startswith("fastlayers") for m in ours.modules()])
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x), ours(x))


def test_saved_bytes_and_launches(device: torch.device, launched: list[str]) -> None:
    """Between the layers 2 N numbers a token, where torch saves 4 N. Two kernels forward; backward the input gradients of three
    products, three weight gradients, and one kernel for all that lies between."""
    theirs = Mlp().to(device)
    model, x, kept = fused(theirs), torch.randn(5, 24, device=device, requires_grad=True), []
    given = {t.untyped_storage().data_ptr() for t in (x, *theirs.parameters(), *model.parameters())}
    for module in (model, theirs):
        saved: dict[int, int] = {}

        def pack(t: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[t.untyped_storage().data_ptr()] = t.numel()
            return t

        launched.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = module(x)
        kept.append(sum(n for pointer, n in saved.items() if pointer not in given))
        if module is model:
            assert launched == ["_gated_matmul_kernel", "_matmul_kernel"]
            launched.clear()
            y.sum().backward()
            assert sorted(launched) == ["_gate_kernel", *["_matmul_kernel"] * 6]
    assert kept == [2 * 5 * 40, 4 * 5 * 40]


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj", "act_fn"])
def test_hooks_of_children_are_called(name: str, device: torch.device) -> None:
    """In the model's order, with what they are given there; joined again when they are gone."""
    theirs, x = Mlp().to(device), torch.randn(3, 24, device=device)
    model, seen = fused(theirs), []
    handles = [
        m.get_submodule(name).register_forward_hook(
            lambda m, args, y: seen.append((args[0].clone(), y.clone())) or 2 * y
        )
        for m in (model, theirs)
    ]
    assert not joins(model, x)
    seen.clear()
    torch.testing.assert_close(model(x), theirs(x))
    torch.testing.assert_close(*seen)
    for handle in handles:
        handle.remove()
    assert joins(model, x)


@pytest.mark.parametrize("cls", [Mlp, Packed])
@pytest.mark.parametrize("other", [fastlayers.nn.ReLU, lambda: fastlayers.nn.LayerNorm(40)])
def test_a_layer_of_another_kind_in_its_place(cls: Any, other: Any, device: torch.device) -> None:
    """Put there when the graph was made already."""
    theirs, x = cls().to(device), torch.randn(3, 24, device=device)
    model = fused(theirs)
    assert joins(model, x)
    model.down_proj = theirs.down_proj = other().to(device)
    torch.testing.assert_close(model(x), theirs(x))


def test_few_tiles_run_as_two_products(
    device: torch.device, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers, whether or not one kernel computes both products."""
    from fastlayers.kernels.matmul import gated

    x, gate, up, down = (torch.randn(*shape, device=device) for shape in ((3, 20), (33, 20), (33, 20), (7, 33)))
    one = FL.gated_mlp(x, gate, up, down)
    monkeypatch.setattr(gated, "_pick", lambda *args, **kwargs: None)
    launched.clear()
    torch.testing.assert_close(FL.gated_mlp(x, gate, up, down), one)
    assert launched == ["_matmul_kernel", "_matmul_kernel", "_gate_kernel", "_matmul_kernel"]


def test_activations_by_name() -> None:
    x, gate, up, down = torch.randn(2, 4), torch.randn(6, 4), torch.randn(6, 4), torch.randn(3, 6)
    expected = F.linear(F.gelu(x @ gate.T, approximate="tanh") * (x @ up.T), down)
    torch.testing.assert_close(FL.gated_mlp(x, gate, up, down, activation="gelu_tanh"), expected)
    with pytest.raises(ValueError, match="no activation 'swish'"):
        FL.gated_mlp(x, gate, up, down, activation="swish")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        FL.gated_mlp(x[:, :3], gate, up, down)


@pytest.mark.parametrize("name", [name for name in RULES if Activation(name, OPTIONS.get(name, [()])[0]).joins])
@pytest.mark.usefixtures("small_tiles")
def test_every_activation_as_a_gate(name: str, device: torch.device) -> None:
    """Those whose layers save their result, too, of which only the input is there."""
    activation = Activation(name, OPTIONS.get(name, [()])[0])
    tensors = [torch.randn(shape, device=device) for shape in ((5, 9), (20, 9), (20,), (20, 9), (20,), (7, 20), (7,))]
    dy = torch.randn(5, 7, device=device)

    def values(function: Callable[..., Any], given: Any, dy: torch.Tensor) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in given]
        y = function(leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    def theirs(leaves: Any) -> torch.Tensor:
        x, gate, gate_bias, up, up_bias, down, down_bias = leaves
        return F.linear(activation(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias), down, down_bias)

    mine = values(lambda leaves: _gated_mlp(leaves, activation), tensors, dy)
    torchs = [values(theirs, near, dy) for near in neighbours(*tensors)]
    exact = values(theirs, [t.double() for t in tensors], dy.double())
    for a, *others, c in zip(mine, *torchs, exact, strict=True):
        assert_within_budget(a, others, c)
