"""Sequential: what is fused, what isn't, and that nobody can tell.

Looks inside only to see which kernels a backward launches.
"""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict

import pytest
import torch

import fastlayers
from fastlayers import nn

pytestmark = pytest.mark.usefixtures("small_tiles")


def ops(model: torch.nn.Module, x: torch.Tensor) -> list[tuple[str, str]]:
    return [(d.module, d.op) for d in fastlayers.explain(model, x)]


@pytest.fixture
def mlp(device: torch.device) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)).to(device)


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    return torch.randn(5, 6, device=device)


def test_neighbours_run_as_one(mlp: nn.Sequential, x: torch.Tensor) -> None:
    (decision,) = fastlayers.explain(mlp, x)
    assert decision.module == "0 + 1 + 2 + 3 + 4"
    assert [k.split("[")[0] for k in decision.kernels] == ["matmul_kernel"] * 3


def test_convolution_and_activation_run_as_one(device: torch.device) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.ReLU()).to(device)
    first, second = fastlayers.explain(model, torch.randn(1, 2, 5, 5, device=device))
    assert (first.module, second.module) == ("0 + 1", "2 + 3")
    assert len(first.kernels) == len(second.kernels) == 1


def test_backward_leaves_no_kernel_between_layers(mlp: nn.Sequential, x: torch.Tensor, launched: list[str]) -> None:
    """All that is launched for three layers and two activations."""
    loss = mlp(x.requires_grad_()).sum()
    launched.clear()
    loss.backward()
    assert launched == ["_matmul_kernel"] * 6  # dW, which carries db, and dx of each layer


def test_backward_computes_what_is_asked_for(device: torch.device, launched: list[str]) -> None:
    """Everything requires a gradient: of the input, the last activation's derivative and then dx through every layer."""
    model = nn.Sequential(nn.Linear(9, 17), nn.ReLU(), nn.Linear(17, 12), nn.Linear(12, 5), nn.ReLU()).to(device)
    x = torch.randn(3, 2, 9, device=device, requires_grad=True)
    for wanted, launches in ((x, 4), (model[3].weight, 2)):
        y = model(x).sum()
        launched.clear()
        torch.autograd.grad(y, wanted)
        assert len(launched) == launches, launched


def hook(*_: object) -> None:
    return None


HOOKS = {
    "forward": lambda m: m.register_forward_hook(hook),
    "pre-forward": lambda m: m.register_forward_pre_hook(hook),
    "full backward": lambda m: m.register_full_backward_hook(hook),
    "backward pre": lambda m: m.register_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("at", range(5))
def test_a_layer_with_a_hook_is_not_fused(mlp: nn.Sequential, x: torch.Tensor, name: str, at: int) -> None:
    expected = mlp(x)
    handle = HOOKS[name](mlp[at])
    alone = [module for module, _ in ops(mlp, x)]
    assert str(at) in alone
    torch.testing.assert_close(mlp(x), expected)
    handle.remove()
    assert len(ops(mlp, x)) == 1


GLOBAL_HOOKS = {
    "forward": torch.nn.modules.module.register_module_forward_hook,
    "pre-forward": torch.nn.modules.module.register_module_forward_pre_hook,
    "full backward": torch.nn.modules.module.register_module_full_backward_hook,
    "backward pre": torch.nn.modules.module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("name", GLOBAL_HOOKS)
def test_a_global_hook_stops_all_fusion(mlp: nn.Sequential, x: torch.Tensor, name: str) -> None:
    handle = GLOBAL_HOOKS[name](hook)
    try:
        assert [module for module, _ in ops(mlp, x)] == ["0", "1", "2", "3", "4"]
    finally:
        handle.remove()
    assert len(ops(mlp, x)) == 1


def test_subclasses_and_patched_layers_are_not_fused(mlp: nn.Sequential, x: torch.Tensor) -> None:
    class Mine(nn.ReLU):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    class Quiet(nn.Linear):
        pass

    mlp[1] = Mine()
    assert [m for m, _ in ops(mlp, x)] == ["0", "1", "2 + 3 + 4"]
    mlp[1] = nn.ReLU()
    mlp[0] = Quiet(6, 8).to(x.device)
    assert [m for m, _ in ops(mlp, x)] == ["0", "1", "2 + 3 + 4"]
    forward = mlp[2].forward
    mlp[2].forward = lambda input: forward(input) * 2
    assert "2" in [m for m, _ in ops(mlp, x)]
    torch.testing.assert_close(mlp(x), mlp[4](mlp[3](mlp[2](mlp[1](mlp[0](x))))))


def test_torchs_own_layers_in_between(x: torch.Tensor) -> None:
    model = nn.Sequential(nn.Linear(6, 4), torch.nn.ReLU(), nn.Linear(4, 4), nn.Dropout(0.0), nn.ReLU()).to(x.device)
    with fastlayers.policy("auto"):
        assert [m for m, _ in ops(model, x)] == ["0", "1", "2 + 4"]  # a Dropout(0) gives back its input


def test_container(device: torch.device) -> None:
    """Indexing, slicing, append, insert, extend, arithmetic, names."""
    for space in (nn, torch.nn):
        model = space.Sequential(space.Linear(3, 3), space.ReLU())
        model.append(space.Linear(3, 2)).extend([space.ReLU()]).insert(1, space.Linear(3, 3))
        model += space.Sequential(space.Linear(2, 2))
        model[5] = space.Linear(2, 1)
        del model[0]
        assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
        assert [type(m).__name__ for m in model[1:3]] == ["ReLU", "Linear"]
        for derived in (model[1:], model + model, model * 2, 2 * model):
            assert type(derived) is type(model)
        assert list((model + model).state_dict())[-1] == "9.bias"
        assert model.pop(4).out_features == 1
        nested = space.Sequential(model, space.Linear(2, 2))
        assert "0.2.weight" in nested.state_dict()
    nested = nested_model(device)
    x = torch.randn(2, 3, device=device)
    assert [m for m, _ in ops(nested, x)] == ["inner.0 + inner.1", "outer"]


def nested_model(device: torch.device) -> nn.Sequential:
    inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    return nn.Sequential(OrderedDict(inner=inner, outer=nn.Linear(4, 2))).to(device)


def test_one_layer_twice_and_tied_weights(device: torch.device) -> None:
    layer, other = nn.Linear(5, 5).to(device), torch.nn.Linear(5, 5).to(device)
    other.load_state_dict(layer.state_dict())
    relu = nn.ReLU()
    ours = nn.Sequential(layer, relu, layer, relu, nn.Linear(5, 5).to(device))
    theirs = torch.nn.Sequential(other, torch.nn.ReLU(), other, torch.nn.ReLU(), torch.nn.Linear(5, 5).to(device))
    ours[4].weight, theirs[4].weight = layer.weight, other.weight
    ours[4].bias, theirs[4].bias = layer.bias, other.bias
    x = torch.randn(3, 5, device=device)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert len(list(ours.parameters())) == 2


def test_errors_inside_a_chain_are_torchs(mlp: nn.Sequential, x: torch.Tensor) -> None:
    mlp[2] = nn.Linear(9, 7).to(x.device)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        mlp(x)


def test_training_step_by_step(mlp: nn.Sequential, device: torch.device) -> None:
    """Weights replaced, edited and moved between calls: nothing about them is remembered."""
    theirs = torch.nn.Sequential(
        *(
            getattr(torch.nn, type(m).__name__)(*([m.in_features, m.out_features] if hasattr(m, "weight") else []))
            for m in mlp
        )
    ).to(device)
    theirs.load_state_dict(mlp.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (mlp, theirs)]
    for step in range(4):
        x = torch.randn(7, 6, device=device)
        for model, optimizer in zip((mlp, theirs), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            model(x).square().mean().backward()
            optimizer.step()
            if step == 1:
                model[0].weight.data = model[0].weight.data * 0.5
            if step == 2:
                with torch.no_grad():
                    model[2].bias.add_(0.25)
        for p, q in zip(mlp.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_patched_instances_are_not_fused(device: torch.device) -> None:
    """Replacing _conv_forward on an instance is how tiling convolutions are made."""
    layer = nn.Conv2d(1, 1, 1).to(device)
    layer._conv_forward = lambda input, weight, bias: input * 0 + 7
    assert nn.Sequential(layer, nn.ReLU())(torch.randn(1, 1, 2, 2, device=device)).unique().tolist() == [7]


def test_what_an_earlier_module_does_to_a_later_one(device: torch.device) -> None:
    """Each is looked at when its turn comes."""

    class Meddler(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.meddle()  # type: ignore[operator]
            return x

    seen: list[object] = []
    x = torch.randn(3, 4, device=device)
    for space in (nn, torch.nn):
        meddler = Meddler()
        model = space.Sequential(meddler, space.Linear(4, 4), space.ReLU()).to(device)
        model[1].requires_grad_(False).weight.copy_(torch.eye(4))
        model[1].bias.zero_()
        for meddle, expected in (
            (lambda m=model: m[1].register_forward_hook(lambda *_: seen.append(_)), x.relu()),
            (lambda m=model: setattr(m[1], "forward", lambda x: x - 1), (x - 1).relu()),
            (lambda m=model: m.__setitem__(2, torch.nn.Tanh()), (x - 1).tanh()),
        ):
            meddler.meddle = meddle
            with fastlayers.policy("auto"):
                torch.testing.assert_close(model(x), expected)
    assert len(seen) == 6


@pytest.mark.parametrize("cls", [nn.Linear, nn.ReLU, torch.nn.Module])
def test_patched_classes_are_not_fused(
    cls: type, mlp: nn.Sequential, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, calls = "__call__" if cls is torch.nn.Module else "forward", []
    method = getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda self, *args: (calls.append(type(self)), method(self, *args))[1])
    mlp(x)
    assert len(calls) == {nn.Linear: 3, nn.ReLU: 2, torch.nn.Module: 6}[cls]


def test_classes_are_not_kept(device: torch.device) -> None:
    def one() -> weakref.ref[type]:
        class Local(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x

        class Mine(nn.Linear):
            pass

        nn.Sequential(Local(), Mine(2, 2), nn.ReLU()).to(device)(torch.randn(1, 2, device=device))
        return weakref.ref(Mine)

    kept = [one() for _ in range(3)]
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_subclass_of_sequential(device: torch.device) -> None:
    class Block(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(2, 2), nn.ReLU())

    for joined in (Block() + nn.Sequential(nn.ReLU()), Block() * 2):
        assert type(joined) is nn.Sequential
    assert len(fastlayers.explain(Block().to(device), torch.randn(3, 2, device=device))) == 1


def test_a_missing_module_is_torchs_error(x: torch.Tensor) -> None:
    for space in (nn, torch.nn):
        model = space.Sequential(space.Linear(6, 2), space.ReLU()).to(x.device)
        model._modules["1"] = None
        with pytest.raises(TypeError, match="not callable"):
            model(x)
