"""The catalog's layers as functions of all the tensors that they are differentiated by: inputs, then parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from fastlayers import nn
from fastlayers.catalog import ROWS, Floats, Row
from fastlayers.operation import Operation

LAYERS: dict[str, Row] = {row.name: row for row in ROWS if row.operation is not None and not row.random}
"""Those that draw random numbers don't agree with torch's under transforms, which torch's own function takes."""


def _kind(row: Row) -> str:
    """The record, whatever the number of dimensions: MaxPool1d, MaxPool2d and MaxPool3d are one kind."""
    return type(row.operation).__name__.rstrip("123d")


LEADING = {row.name for row in {_kind(row): row for row in reversed(ROWS)}.values()}
"""The first layer of each kind of record. In `make test` they stand for all in tests of what a record and the engine do together;
the numbers of every layer are tested. The others follow with `make slow`."""
_OWN_TESTS = ("rotary_projections", "packed_rotary_projections")
"""Replays of the first are in tests/test_rotary_projections.py; the second, whose weight is viewed in parts, isn't replayed."""
REPLAYED = [name for name in LAYERS if name not in ("Embedding", "EmbeddingBag", "LSTM", *_OWN_TESTS)]
"""The embeddings' backward sorts the indices by torch's own operator, and so isn't replayed. An LSTM's first states are tensors
that torch makes anew at every call, whose addresses can't be compared."""
SEQUENCES = {"GRU", "LSTM", "RNN"}
"""Layers that torch.compile leaves alone, and of whose functions torch has no derivatives forward, no rule for vmap, and on a CPU
no autocast of an LSTM."""
NAMES = [
    pytest.param(name, marks=[] if name in LEADING else pytest.mark.slow) for name in REPLAYED if name not in SEQUENCES
]


class Pair(NamedTuple):
    """The same layer by us and by torch. `draw` gives fresh tensors, without gradients."""

    ours: Callable[..., torch.Tensor]
    theirs: Callable[..., torch.Tensor]
    draw: Callable[..., list[torch.Tensor]]


def pair(row: Row, device: torch.device) -> Pair:
    """The first of the row's cases. Arguments that aren't differentiated (classes, numbers) stay as they are."""
    case = next(iter(row.cases.values()))
    modules: list[Any] = [case.make(space).to(device) for space in (nn, torch.nn)]
    shapes = [p.shape for p in modules[0].parameters()]
    places = [i for i, given in enumerate(case.inputs) if isinstance(given, Floats)]
    fixed = case.arguments(torch.float32, device)

    # Some tensors have a gradient of one result alone: then it is the sum of both, which can be broadcast.
    several = row.operation is not None and type(row.operation).reached is not Operation.reached

    @functools.cache
    def of_dtype(dtype: torch.dtype) -> list[Any]:
        """What is fixed; probabilities have the input's dtype, and stay where they are."""
        return [t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in fixed]

    def calling(module: torch.nn.Module) -> Callable[..., torch.Tensor]:
        # Not torch.func.functional_call, which torch.jit.trace refuses.
        owners = [(m._parameters, name) for m in module.modules() for name, p in m._parameters.items() if p is not None]

        buffers = [
            (m, name) for m in module.modules() for name, b in m.named_buffers(recurse=False) if b.is_floating_point()
        ]

        def call(*tensors: torch.Tensor) -> torch.Tensor:
            arguments = [*of_dtype(tensors[0].dtype)]
            for m, name in buffers:  # statistics have the parameters' dtype
                if getattr(m, name).dtype != tensors[-1].dtype:
                    setattr(m, name, getattr(m, name).to(tensors[-1].dtype))
            for i, tensor in zip(places, tensors, strict=False):
                arguments[i] = tensor
            for (parameters, name), tensor in zip(owners, tensors[len(places) :], strict=True):
                parameters[name] = tensor  # type: ignore[assignment]
            result: Any = module(*arguments)
            if several:
                return sum([r if r.shape == result[0].shape else r.sum() for r in result[1:]], result[0])
            return result[0] if isinstance(result, tuple) else result

        return call

    def draw(dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> list[torch.Tensor]:
        arguments = case.arguments(dtype, device)
        drawn = [arguments[i] for i in places]
        drawn += [torch.randn(shape, device=device).to(dtype) for shape in shapes]
        return [t.requires_grad_(requires_grad) for t in drawn]

    return Pair(calling(modules[0]), calling(modules[1]), draw)
