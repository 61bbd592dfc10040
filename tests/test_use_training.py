"""What people do with models, done with ours and torch.nn's side by side: training, derivatives, tracers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import gradients, networks, on_kernels, same

import fastlayers
from fastlayers import nn


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


def test_averaged_model(pair: Any, x: torch.Tensor) -> None:
    averages = [torch.optim.swa_utils.AveragedModel(m) for m in pair]
    for model, average in zip(pair, averages, strict=True):
        for _ in range(2):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.1)
            average.update_parameters(model)
    same(*(a(x) for a in averages))
    assert type(averages[0].module) is nn.Sequential
    assert on_kernels(averages[0], x)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool, pair: Any, x: torch.Tensor) -> None:
    from torch.utils.checkpoint import checkpoint, checkpoint_sequential

    results = []
    for model in pair:
        leaf = x.clone().requires_grad_()
        y = checkpoint(model, leaf, use_reentrant=use_reentrant)
        y.square().sum().backward()
        z = checkpoint_sequential(model, 3, leaf, use_reentrant=use_reentrant)
        z.sum().backward()
        results.append([y, z, leaf.grad, *gradients(model)])
    same(*results)


OPTIMIZERS = {
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, pair: Any, x: torch.Tensor) -> None:
    optimizers = [OPTIMIZERS[name](m.parameters()) for m in pair]
    for _ in range(3):
        for model, optimizer in zip(pair, optimizers, strict=True):

            def closure(model: torch.nn.Module = model, optimizer: Any = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
    for p, q in zip(*(m.parameters() for m in pair), strict=True):
        # Adam divides by the gradient's own size: a rounding in a gradient near zero may move a weight by a step.
        same(p, q, rtol=1e-3, atol=2e-3 if "Ada" in name else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_with_a_scaler(dtype: torch.dtype, pair: Any, x: torch.Tensor, device: torch.device) -> None:
    """Scaled, unscaled, clipped, stepped; an infinite gradient skips the step and halves the scale."""
    scales = []
    for model in pair:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device.type, init_scale=256.0, growth_interval=100)
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=dtype):
                y = model(x)
                assert y.dtype == dtype
            loss = y.float().square().mean()
            scaler.scale(loss * (float("inf") if step == 1 else 1)).backward()
            scaler.unscale_(optimizer)
            assert all(p.grad.dtype == torch.float32 for p in model.parameters())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [128.0, 128.0]
    for p, q in zip(*(m.parameters() for m in pair), strict=True):
        same(p, q, rtol=0.05, atol=0.02)


def test_no_grad_and_inference_mode(pair: Any, x: torch.Tensor) -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            ours, theirs = (m(x) for m in pair)
            same(ours, theirs)
            assert ours.is_inference() == theirs.is_inference()
            assert on_kernels(pair[0], x)
        assert not ours.requires_grad
    with torch.inference_mode():
        frozen = copy.deepcopy(pair[0])
        same(frozen(x), pair[1](x))


def test_train_and_eval(pair: Any) -> None:
    for model in pair:
        assert model.eval() is model
        assert not any(m.training for m in model.modules())
        assert all(m.training for m in model.train().modules())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own
def test_forward_mode(pair: Any, x: torch.Tensor) -> None:
    import torch.autograd.forward_ad as forward_ad

    tangent = torch.randn_like(x)
    results = []
    for model in pair:
        with forward_ad.dual_level():
            y = model(forward_ad.make_dual(x, tangent))
            results.append(forward_ad.unpack_dual(y))
        results[-1] = (results[-1].primal.detach(), results[-1].tangent.detach())
    same(*results)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func's own
def test_functional_transforms(pair: Any, x: torch.Tensor) -> None:
    """Per-sample gradients, an ensemble through stack_module_state, jvp, vjp, and a Hessian of the parameters."""
    from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vjp, vmap

    results = []
    for model in pair:
        params = {k: v.detach() for k, v in model.named_parameters()}

        def loss(p: Any, sample: torch.Tensor, model: Any = model) -> torch.Tensor:
            return functional_call(model, p, (sample[None],)).square().sum()

        y, pull = vjp(model, x)
        stacked, buffers = stack_module_state([model, copy.deepcopy(model)])
        base = copy.deepcopy(model).to("meta")
        ensemble = vmap(lambda p, b, base=base: functional_call(base, (p, b), (x,)))(stacked, buffers)
        last = params["7.bias"]
        results.append(
            [
                *vmap(grad(loss), in_dims=(None, 0))(params, x).values(),
                jvp(model, (x,), (x * 2,))[1],
                pull(torch.ones_like(y))[0],
                ensemble,
                hessian(lambda b, params=params, loss=loss: loss({**params, "7.bias": b}, x[0]))(last),
            ]
        )
    same(*results)


def test_gradient_penalty(pair: Any, x: torch.Tensor) -> None:
    """A second backward through the first, as in WGAN-GP."""
    for model in pair:
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
        (dx.flatten(1).norm(dim=1) - 1).square().mean().backward()
    same(*map(gradients, pair))
    assert pair[0][0].weight.grad.abs().sum() > 0


def test_export(pair: Any, x: torch.Tensor) -> None:
    graphs = []
    for model in pair:
        exported = torch.export.export(model, (x,))
        same(exported.module()(x), model(x))
        graphs.append([str(node.target) for node in exported.graph.nodes if node.op == "call_function"])
    assert graphs[0] == graphs[1]


def test_flop_counter(pair: Any, x: torch.Tensor) -> None:
    """As many, of as many kinds, under the same names."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in pair:
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        counts.append((counter.get_total_flops(), counter.get_flop_counts()))
    assert counts[0] == counts[1]
    assert counts[0][0] > 0


def test_fx(pair: Any, x: torch.Tensor) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    same(torch.fx.symbolic_trace(pair[0])(x), pair[1](x))
    same(make_fx(pair[0])(x)(x), pair[1](x))
