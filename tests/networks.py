"""A network of ours and of torch's, for the tests of what people do to modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastlayers
from fastlayers import nn


def network(space: Any) -> torch.nn.Module:
    """A convolution and a chain, all of it fused."""
    return space.Sequential(
        space.Conv2d(2, 4, 3, padding=1), space.ReLU(), space.Flatten(),
        space.Linear(64, 9), space.ReLU(), space.Linear(9, 7), space.ReLU(), space.Linear(7, 3),
    )  # fmt: skip


def networks(device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch's, with the same parameters."""
    ours, theirs = network(nn).to(device), network(torch.nn).to(device)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def same(ours: Any, theirs: Any, **tolerances: float) -> None:
    torch.testing.assert_close(ours, theirs, **tolerances)


def gradients(model: torch.nn.Module) -> list[torch.Tensor | None]:
    return [p.grad for p in model.parameters()]


def on_kernels(model: torch.nn.Module, *inputs: torch.Tensor) -> bool:
    decisions = [d for d in fastlayers.explain(model, *inputs) if "not one of our layers" not in (d.reason or "")]
    return bool(decisions) and all(d.path == "triton" for d in decisions)


class Between(torch.nn.Module):
    """A convolution, something, and a ReLU or an addition."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any]):
        super().__init__()
        self.conv, self.other = torch.nn.Conv2d(2, 2, 3, padding=1), torch.nn.Conv2d(2, 2, 1)
        self.norm, self.relu, self.through = torch.nn.BatchNorm2d(2), torch.nn.ReLU(inplace=True), forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.through(self, x.clone())
