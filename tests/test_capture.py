"""capture: what it refuses, and what it notices at a call. torch's own CUDA graphs are replaced by calls of the module."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from changes import drop_bias, replace, swap_data, to_double

import fastlayers
from fastlayers import nn

_capture = sys.modules["fastlayers.capture"]  # `fastlayers.capture` itself is the function


def test_capture_says_what_it_can_not_take(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(TypeError, match="takes a module, not function"):
        fastlayers.capture(lambda x: x, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes tensors as inputs, not list"):
        fastlayers.capture(net, [x])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the inputs of a call"):
        fastlayers.capture(net)
    hooked = nn.Sequential(nn.Linear(3, 2))
    hooked[0].register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="0 has a hook"):
        fastlayers.capture(hooked, x)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="capture needs a GPU"):
            fastlayers.capture(net, x)
    monkeypatch.setattr(_capture, "_has_gpu", lambda: True)
    with pytest.raises(ValueError, match="everything on one GPU, not on cpu"):
        fastlayers.capture(net, x)
    with pytest.raises(ValueError, match="everything on one GPU, not on cpu, meta"):
        fastlayers.capture(net, x.to("meta"))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands for torch's own capture, on the CPU: warms up, and then calls the module."""
    made: list[Any] = []

    def make(module: torch.nn.Module, samples: tuple[torch.Tensor, ...]) -> Any:
        made.append((module, samples))
        for _ in range(3):
            module(*samples)
        return module

    monkeypatch.setattr(_capture, "_has_gpu", lambda: True)
    monkeypatch.setattr(_capture, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    return made


def test_capture_keeps_the_rules_of_graphs(graphs: list[Any]) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(4, 3)
    captured = fastlayers.capture(net, x)
    module, (sample,) = graphs[0]
    assert module is not net
    assert "forward" not in vars(net)
    assert sample.data_ptr() != x.data_ptr()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    y = captured(x)
    assert y.requires_grad
    y.sum().backward()
    assert net[0].weight.grad is not None
    with torch.no_grad():
        net[0].weight.add_(1)  # an optimiser
    captured(x)
    for wrong in (x[:2], x.double(), x.clone().requires_grad_()):
        with pytest.raises(ValueError, match=r"captured for torch.float32 \[4, 3\] on cpu, called with torch"):
            captured(wrong)
    with pytest.raises(ValueError, match="called with nothing"):
        captured()
    net.eval()
    with pytest.raises(RuntimeError, match=r"train\(\) or eval\(\)"):
        captured(x)
    net.train()
    captured(x)


@pytest.mark.parametrize("change", [replace, swap_data, drop_bias, to_double], ids=lambda c: c.__name__)
def test_capture_notices_what_moved(change: Callable[[Any], None], graphs: list[Any]) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
    captured = fastlayers.capture(net, torch.randn(2, 6))
    change(net)
    with pytest.raises(RuntimeError, match="replaced, moved or frozen"):
        captured(torch.randn(2, 6))


def test_capture_notices_another_module(graphs: list[Any]) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU())
    captured = fastlayers.capture(net, torch.randn(2, 6))
    net[1] = torch.nn.Tanh()
    with pytest.raises(RuntimeError, match="replaced, moved or frozen"):
        captured(torch.randn(2, 6))


def test_capture_for_inference(graphs: list[Any]) -> None:
    net, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    with torch.no_grad():
        captured = fastlayers.capture(net, x)
    assert not captured(x).requires_grad  # grad mode is on, but there is no graph for backward
    frozen = torch.nn.Linear(3, 2).requires_grad_(False)
    assert not fastlayers.capture(frozen, x)(x).requires_grad
    torch.testing.assert_close(captured(x), net(x))
