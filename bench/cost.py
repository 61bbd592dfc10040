"""What a case of the catalog computes and moves at the least, from the records of our operations.

Our layer is called on meta tensors, which have no memory, forward and backward. Launches are noted instead of made, and so
are the calls of operations, whose records count their FLOPs. So a new layer needs nothing here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from fastlayers import nn
from fastlayers.catalog import Case, Floats
from fastlayers.reporting.dry_run import ANY, noting, size
from fastlayers.reporting.gpus import Work


@dataclass
class Call:
    """A case's layer and its arguments, all on the meta device."""

    layer: Callable[..., Any]
    arguments: list[Any]
    state: list[torch.Tensor]
    """Parameters and buffers."""
    wanted: list[torch.Tensor]
    """The inputs and parameters whose gradient is asked for."""

    @classmethod
    def of(cls, case: Case, namespace: Any, dtype: torch.dtype) -> Call:
        with torch.device("meta"):
            layer = case.make(namespace)
        state: list[torch.Tensor] = []
        if isinstance(layer, torch.nn.Module):
            layer.to(dtype)
            state = [*layer.parameters(), *layer.buffers()]
        arguments = case.arguments(dtype, "meta")
        for given, argument in zip(case.inputs, arguments, strict=True):
            if isinstance(given, Floats):
                argument.requires_grad_()
        wanted = [t for t in (*arguments, *state) if isinstance(t, torch.Tensor) and t.requires_grad]
        return cls(layer, arguments, state, wanted)

    def forward(self) -> list[torch.Tensor]:
        """The results."""
        return [t for t in tree_leaves(self.layer(*self.arguments)) if isinstance(t, torch.Tensor)]

    def backward(self, results: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        """The gradients of what is wanted."""
        results = [y for y in results if y.requires_grad]
        return torch.autograd.grad(results, self.wanted, [torch.empty_like(y) for y in results], allow_unused=True)


class Cost(NamedTuple):
    """Forward reads inputs and state and writes results, each once; backward reads the gradients of the results and what our
    layer saves, and writes the gradients."""

    forward: Work
    backward: Work


@functools.cache
def cost(case: Case, dtype: torch.dtype) -> Cost:
    """The FLOPs and the fewest bytes of a case."""
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    with noting(ANY) as noted:
        call = Call.of(case, nn, dtype)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results = call.forward()
        forward = Work(noted.flops, size(call.arguments) + size(call.state) + size(results))
        gradients = call.backward(results)
    moved = size(y for y in results if y.requires_grad) + sum(saved.values()) + size(gradients)
    return Cost(forward, Work(noted.flops - forward.flops, moved))
