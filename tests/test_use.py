"""What people do to modules, done to ours and to torch.nn's side by side: hooks, other weights, parameters, checkpoints.

Looks inside only to see that frozen layers launch nothing in backward.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import gradients, network, networks, on_kernels, same
from torch.nn.modules import module as registries
from torch.nn.utils import parametrizations, parametrize, prune

import fastlayers
from fastlayers import nn

Log = list[tuple[str, Any]]


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    """As users have it. What must run on the kernels says so."""
    with fastlayers.policy("auto"):
        yield


@pytest.fixture
def pair(device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    return networks(device)


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    return torch.randn(5, 2, 4, 4, device=device)


def watch_modules(model: torch.nn.Module, log: Log) -> list[Any]:
    handles = []
    for name, m in model.named_modules():
        handles += [
            m.register_forward_pre_hook(lambda m, a, n=name: log.append((f"pre {n}", a[0].detach().clone()))),
            m.register_forward_pre_hook(
                lambda m, a, kw, n=name: log.append((f"pre with kwargs {n}", sorted(kw))), with_kwargs=True
            ),
            m.register_forward_hook(lambda m, a, y, n=name: log.append((f"forward {n}", y.detach().clone()))),
            m.register_forward_hook(lambda m, a, y, n=name: log.append((f"first {n}", y.sum().detach())), prepend=True),
            m.register_full_backward_pre_hook(lambda m, dy, n=name: log.append((f"backward pre {n}", dy[0].clone()))),
            m.register_full_backward_hook(lambda m, dx, dy, n=name: log.append((f"backward {n}", dy[0].clone()))),
        ]
        handles += [
            p.register_hook(lambda g, n=f"{name}.{key}": log.append((f"gradient {n}", g.clone())))
            for key, p in m.named_parameters(recurse=False)
        ]
    return handles


def watch_everything(model: torch.nn.Module, log: Log) -> list[Any]:
    names = {m: name for name, m in model.named_modules()}
    r = registries
    return [
        r.register_module_forward_pre_hook(lambda m, a: log.append((f"pre {names[m]}", a[0].detach().clone()))),
        r.register_module_forward_hook(lambda m, a, y: log.append((f"forward {names[m]}", y.detach().clone()))),
        r.register_module_full_backward_pre_hook(lambda m, dy: log.append((f"back pre {names[m]}", dy[0].clone()))),
        r.register_module_full_backward_hook(lambda m, dx, dy: log.append((f"back {names[m]}", dy[0].clone()))),
    ]


@pytest.mark.parametrize("watch", [watch_modules, watch_everything])
def test_hooks_come_and_go(watch: Callable[..., list[Any]], pair: Any, x: torch.Tensor) -> None:
    """Order and values of every kind of hook; without them, fused again; with them again, seen again."""
    logs: list[Log] = [[], []]
    for round in range(3):
        for model, log in zip(pair, logs, strict=True):
            handles = watch(model, log) if round != 1 else []
            before = len(log)
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            model(leaf).square().sum().backward()
            assert (len(log) > before) == bool(handles)
            for handle in handles:
                handle.remove()
        same(*map(gradients, pair))
        assert on_kernels(pair[0], x)
    order = [[name for name, _ in log if not name.startswith("gradient")] for log in logs]
    assert order[0] == order[1]
    ours, theirs = (dict(log) for log in logs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        same(ours[name], theirs[name])


def test_hooks_that_change_values(pair: Any, x: torch.Tensor) -> None:
    def double(p: torch.Tensor) -> None:
        p.grad.mul_(2)

    for model in pair:
        model[3].register_forward_hook(lambda m, a, y: y * 2)
        model[5].register_forward_pre_hook(lambda m, a: (a[0] + 1,))
        model[6].register_full_backward_pre_hook(lambda m, dy: (dy[0] * 3,))
        model[0].weight.register_hook(lambda g: g * 0.5)
        model[7].weight.register_post_accumulate_grad_hook(double)
        model(x.clone().requires_grad_()).square().sum().backward()
    same(*(m(x) for m in pair))
    same(*map(gradients, pair))


def test_state_dict_hooks(pair: Any) -> None:
    logs: list[list[str]] = [[], []]
    for model, log in zip(pair, logs, strict=True):
        layer = model[3]
        layer.register_state_dict_pre_hook(lambda m, prefix, keep, log=log: log.append(f"state pre {prefix}"))
        layer.register_state_dict_post_hook(
            lambda m, state, prefix, meta, log=log: log.append(f"state {sorted(state)}")
        )
        layer.register_load_state_dict_pre_hook(lambda m, state, prefix, *_, log=log: log.append(f"load {prefix}"))
        layer.register_load_state_dict_post_hook(lambda m, keys, log=log: log.append(f"loaded {keys}"))
        model.load_state_dict(model.state_dict())
    assert logs[0] == logs[1]
    assert len(logs[0]) == 4


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        lambda m: parametrizations.weight_norm(m),
        lambda m: torch.nn.utils.weight_norm(m),
        lambda m: parametrizations.spectral_norm(m, n_power_iterations=2),
        lambda m: parametrizations.orthogonal(m),
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        lambda m: prune.ln_structured(m, "weight", 0.5, n=2, dim=0),
    ],
    ids=["weight_norm", "old weight_norm", "spectral_norm", "orthogonal", "pruned", "pruned rows"],
)
def test_reparametrized(change: Callable[..., Any], pair: Any, x: torch.Tensor) -> None:
    """Trained for three steps with another weight behind `weight`, then made permanent."""
    for model in pair:
        torch.manual_seed(1)
        change(model[0])
        torch.manual_seed(1)
        change(model[3])
    assert on_kernels(pair[0], x)  # first: a forward pass is a step of spectral_norm's power iteration
    pair[1].load_state_dict(pair[0].state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in pair]
    for _ in range(3):
        for model, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        same(*(m(x) for m in pair), rtol=1e-4, atol=1e-4)  # power iterations amplify a rounding
    for model in pair:
        for layer in (model[0], model[3]):
            if parametrize.is_parametrized(layer):
                parametrize.remove_parametrizations(layer, "weight")
            elif prune.is_pruned(layer):
                prune.remove(layer, "weight")
            else:
                torch.nn.utils.remove_weight_norm(layer)
    assert type(pair[0][0]) is nn.Conv2d
    assert pair[0].state_dict().keys() == pair[1].state_dict().keys()
    same(*(m(x) for m in pair), rtol=1e-4, atol=1e-4)


def doubled(base: Any) -> Any:
    class Doubled(base):
        @property
        def weight(self) -> Any:
            return self._parameters["weight"] * 2 if "weight" in self._parameters else super().__getattr__("weight")

    return Doubled


def quantised(base: Any) -> Any:
    class Quantised(base):
        def __getattr__(self, name: str) -> Any:
            value = super().__getattr__(name)
            return value.round() if name in ("weight", "bias") else value

    return Quantised


def replaced(base: Any) -> Any:
    cls = type("Replaced", (base,), {})
    cls.after = lambda self: setattr(cls, "weight", torch.ones_like(self._parameters["weight"]))
    return cls


@pytest.mark.parametrize("subclass", [doubled, quantised, replaced])
def test_subclasses_with_attributes_of_their_own(subclass: Any, device: torch.device) -> None:
    for name, arguments, shape in (("Linear", (6, 5), (4, 6)), ("Conv2d", (3, 4, 2), (1, 3, 4, 5))):
        ours, theirs = (subclass(getattr(space, name))(*arguments).to(device) for space in (nn, torch.nn))
        for p, q in zip(ours._parameters.values(), theirs._parameters.values(), strict=True):
            p.data = q.data = torch.linspace(-3, 3, p.numel(), device=device).view(p.shape)
        for layer in (ours, theirs):
            getattr(layer, "after", lambda: None)()
        x = torch.randn(shape, device=device)
        for wrap in (lambda layer: layer, lambda layer: nn.Sequential(layer, nn.ReLU())):
            for _ in range(3):
                same(wrap(ours)(x), wrap(theirs)(x), rtol=1e-4, atol=1e-4)


def test_tied_weights_and_one_layer_twice(device: torch.device) -> None:
    class Tied(torch.nn.Module):
        def __init__(self, space: Any):
            super().__init__()
            self.embedding = space.Embedding(11, 6)
            self.layer = space.Linear(6, 6)
            self.head = space.Linear(6, 11, bias=False)
            self.head.weight = self.embedding.weight
            self.relu = space.ReLU()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden = self.embedding(tokens)
            return self.head(self.relu(self.layer(self.relu(self.layer(hidden)))))

    # In float64: a sum of squares over tied weights cancels more than float32 has to spare.
    ours, theirs = Tied(nn).to(device).double(), Tied(torch.nn).to(device).double()
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randint(11, (3, 5), device=device)
    for model in (ours, theirs):
        model(tokens).square().sum().backward()
    same(gradients(ours), gradients(theirs))
    assert len(list(ours.parameters())) == 3


def test_frozen_parts_cost_nothing(pair: Any, x: torch.Tensor, launched: list[str]) -> None:
    """Frozen to the last layer: backward is its two products, and nothing of the others is saved."""
    stored = []
    for model in pair:
        model.requires_grad_(False)
        model[7].requires_grad_(True)
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            y = model(x)
        stored.append(sum(t.nbytes for t in saved))
        if model is pair[0]:
            launched.clear()
            y.sum().backward()
            assert sum("matmul" in name for name in launched) == 1, launched
            assert not any("conv" in name for name in launched)
        else:
            y.sum().backward()
    assert stored[0] <= stored[1] == 5 * 7 * 4
    same(*map(gradients, pair))
    assert [g is None for g in gradients(pair[0])] == [True] * 6 + [False] * 2


def test_accumulation_and_zero_grad(pair: Any, x: torch.Tensor) -> None:
    for model in pair:
        for step, to_none in enumerate((True, False, True)):
            model.zero_grad(set_to_none=to_none)
            assert all(
                (p.grad is None) if to_none else (p.grad is None or not p.grad.any()) for p in model.parameters()
            )
            for part in x.split(2):
                model(part * (step + 1)).square().sum().backward()
    same(*map(gradients, pair))


def test_apply_and_access(pair: Any, x: torch.Tensor, device: torch.device) -> None:
    for model in pair:
        torch.manual_seed(3)
        model.apply(lambda m: torch.nn.init.xavier_uniform_(m.weight) if isinstance(m, torch.nn.Linear) else None)
        assert model.get_submodule("3") is model[3]
        assert model.get_parameter("3.weight") is model[3].weight
        model[3].register_parameter("scale", torch.nn.Parameter(torch.ones(1, device=device)))
        model[3].register_buffer("count", torch.zeros(1, device=device))
        model[5].register_parameter("bias", None)
        model.add_module("extra", torch.nn.Identity())
        model[7].weight = torch.nn.Parameter(model[7].weight.detach() * 2)
        model[0].bias.data.fill_(0.5)
    assert [n for n, _ in pair[0].named_parameters()] == [n for n, _ in pair[1].named_parameters()]
    assert [n for n, _ in pair[0].named_buffers()] == [n for n, _ in pair[1].named_buffers()] == ["3.count"]
    same(*(m(x) for m in pair))
    assert on_kernels(pair[0], x)


@pytest.mark.parametrize("ours_first", [True, False])
def test_checkpoints_in_both_directions(ours_first: bool, pair: Any, x: torch.Tensor) -> None:
    """Saved by one, loaded by the other; strict loading complains in torch's words."""
    source, target = pair if ours_first else pair[::-1]
    with torch.no_grad():
        for p in source.parameters():
            p.add_(0.1)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert str(target.load_state_dict(state)) == "<All keys matched successfully>"
    same(source(x), target(x))
    state["8.weight"] = state.pop("7.weight")
    state["3.weight"] = state["3.weight"][:1]
    errors = []
    for model in pair:
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(state)
        errors.append(str(caught.value))
        del state["3.weight"]
        keys = model.load_state_dict(state, strict=False)
        assert (keys.missing_keys, keys.unexpected_keys) == (["3.weight", "7.weight"], ["8.weight"])
        state["3.weight"] = torch.zeros(1, 64)
    assert errors[0] == errors[1]
    assigned = copy.deepcopy(target)
    assigned.load_state_dict(source.state_dict(), assign=True)
    same(assigned(x), source(x))


def test_meta_then_to_empty(pair: Any, x: torch.Tensor, device: torch.device) -> None:
    with torch.device("meta"):
        model = network(nn)
    assert model(x.to("meta")).is_meta
    model.to_empty(device=device).load_state_dict(pair[1].state_dict())
    same(model(x), pair[1](x))
    assert on_kernels(model, x)
    skipped = torch.nn.utils.skip_init(nn.Linear, 3, 2, device=device)
    assert type(skipped) is nn.Linear
    assert skipped.weight.shape == (2, 3)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_layers(x: torch.Tensor, device: torch.device) -> None:
    """On the kernels from the first call on."""
    models = []
    for space in (nn, torch.nn):
        torch.manual_seed(0)
        model = space.Sequential(space.LazyConv2d(3, 2), space.ReLU(), space.Flatten(), space.LazyLinear(2)).to(device)
        if space is nn:
            with fastlayers.policy("auto"):
                assert on_kernels(model, x)
        else:
            model(x)
        models.append(model)
    assert [type(m) for m in models[0]] == [nn.Conv2d, nn.ReLU, torch.nn.Flatten, nn.Linear]
    models[1].load_state_dict(models[0].state_dict())
    same(*(m(x) for m in models))
