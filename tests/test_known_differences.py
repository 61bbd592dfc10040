"""The README's known differences from torch.nn are as it says they are: where one of these tests fails, the list changes.

Others are held by tests/test_linear.py (sparse gradients), test_loss_kernels.py (a class out of range), test_fx.py (functions),
test_traced.py (second derivatives of a compiled model) and test_fuse_forwards.py (a fused model within a compiled one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointError, checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastlayers
import fastlayers.functional as FL
from fastlayers import nn

SPACES = (nn, torch.nn)


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    with fastlayers.policy("auto"):
        yield


def saved(call: Callable[[], Any]) -> list[torch.Tensor]:
    """What autograd keeps of a call."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return kept


def test_linear_layers_are_one_node(device: torch.device) -> None:
    """The gradients of all layers arrive at its end."""
    nodes = []
    for space in SPACES:
        model = space.Sequential(space.Linear(2, 3), space.Linear(3, 2)).to(device)
        y = model(torch.randn(4, 2, device=device))  # which keeps its graph alive
        node, count = y.grad_fn, 0
        while node is not None and not hasattr(node, "variable"):
            count += 1
            node = next((n for n, _ in node.next_functions if n is not None and not hasattr(n, "variable")), None)
        nodes.append(count)
    assert nodes[0] == 1
    assert nodes[1] > 1


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")  # torch's own
def test_jit_script() -> None:
    """It compiles layers that were restored."""
    layer = nn.Linear(2, 3)
    with pytest.raises(RuntimeError):
        torch.jit.script(layer)
    fastlayers.restore(layer, to=torch.nn)
    x = torch.randn(4, 2)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


def test_strides_of_gradients(device: torch.device) -> None:
    """Ordinary ones, whatever the tensor's; a weight's in the weight's memory format."""
    x = torch.randn(3, 5, device=device).T.requires_grad_()
    strides = []
    for function in (FL.linear, F.linear):
        strides.append(torch.autograd.grad(function(x, torch.randn(4, 3, device=device)).sum(), x)[0].stride())
    assert strides[0] == (3, 1) != strides[1]
    layer = nn.Conv2d(2, 2, 3).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    layer(torch.randn(1, 2, 4, 4, device=device)).sum().backward()
    assert layer.weight.grad.stride() == layer.weight.stride() != layer.weight.contiguous().stride()


@pytest.mark.parametrize(("classes", "more"), [(128, 0), (129, 2 * 4 * 3)])
def test_what_cross_entropy_saves(classes: int, more: int, device: torch.device) -> None:
    """Of the logits as many bytes as torch of their log-softmax; beyond 128 classes, two numbers a row more."""
    logits = torch.randn(3, classes, device=device, requires_grad=True)
    target = torch.randint(classes, (3,), device=device)
    kept = saved(lambda: FL.cross_entropy(logits, target))
    floats = [t for t in kept if t.dtype == torch.float32 and t.numel() > 1]
    assert sum(t.nbytes for t in floats) == logits.nbytes + more


def test_a_convolution_saves_no_more_than_its_gradients_need(device: torch.device) -> None:
    """The weight's gradient needs the input alone."""
    x = torch.randn(1, 2, 4, 4, device=device)
    for space, count in ((nn, 1), (torch.nn, 2)):
        layer = space.Conv2d(2, 2, 3, bias=False).to(device)
        assert len(saved(lambda layer=layer: layer(x))) == count
        y = layer(x)
        with torch.no_grad():
            layer.weight.mul_(2)
        if space is nn:
            y.sum().backward()
            continue
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_an_infinite_weight_times_padding(device: torch.device) -> None:
    """NaN in the result, in torch as well; in the input's gradient in ours alone, on a CPU."""
    found = []
    for space in SPACES:
        layer = space.Conv2d(1, 1, 3, padding=1, bias=False).to(device)
        torch.nn.init.constant_(layer.weight, float("inf"))
        x = torch.ones(1, 1, 4, 4, device=device, requires_grad=True)
        y = layer(x)
        assert int(y.isnan().sum()) == 12, "those at the border"
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        found.append(int(dx.isnan().sum()))
    assert found[0] == 12
    assert device.type != "cpu" or found[1] == 0


def chain(space: Any, device: torch.device) -> Any:
    torch.manual_seed(0)
    return space.Sequential(space.Linear(3, 4), space.ReLU(), space.Linear(4, 2)).to(device)


@pytest.mark.parametrize("between", ["a mode", "a hook"])
def test_a_checkpoint_that_changes_in_between(between: str, device: torch.device) -> None:
    for space in SPACES:
        model, x = chain(space, device), torch.randn(5, 3, device=device, requires_grad=True)
        if between == "a mode":
            with FlopCounterMode(display=False):
                y: Any = checkpoint(model, x, use_reentrant=False)
            handle = None
        else:
            y = checkpoint(model, x, use_reentrant=False)
            handle = torch.nn.modules.module.register_module_forward_hook(lambda *a: None)
        try:
            if space is torch.nn:
                y.sum().backward()
                continue
            with pytest.raises(CheckpointError):
                y.sum().backward()
        finally:
            if handle is not None:
                handle.remove()


def test_a_hook_between_a_checkpoint_and_its_recomputation_finds_tensors_in_the_same_order(
    device: torch.device,
) -> None:
    """Layers that run as one save in the order in which they would save alone, so that where the numbers agree none is taken for
    another, although all have one shape."""
    layers = nn.Sequential(*[part for _ in range(3) for part in (nn.Linear(5, 5), nn.GELU())]).to(device)
    x = torch.randn(5, 5, device=device, requires_grad=True)
    wanted = torch.autograd.grad(layers(x).sum(), [x, *layers.parameters()])
    y: Any = checkpoint(layers, x, use_reentrant=False)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        torch.testing.assert_close(torch.autograd.grad(y.sum(), [x, *layers.parameters()]), wanted)
    finally:
        handle.remove()
