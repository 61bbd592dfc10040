"""Rotary position embedding, alone or with the projections before it."""

from typing import Any

import torch

from ..ops.rotary import _rotary_embedding, rotary_embedding
from ..ops.rotary_projections import (
    _packed_rotary_projections,
    _rotary_projections,
    packed_rotary_projections,
    rotary_projections,
)
from .row import Case, Row, case

__all__ = ["ROWS"]


class Rotary(torch.nn.Module):
    """As models write it, of torch's functions, with the angles as buffers; with fastlayers.nn, one call of ours."""

    def __init__(self, nn: Any, length: int, turned: int, interleaved: bool = False):
        super().__init__()
        self.interleaved, self.joined = interleaved, nn is not torch.nn
        angles = 0.37 * torch.arange(length * turned).view(length, turned)  # all different
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        args: Any = (query, key, self.cos, self.sin)
        if self.joined:
            return rotary_embedding(*args, interleaved=self.interleaved)
        return _rotary_embedding.reference(*args, interleaved=self.interleaved)


def _rotary(
    batch: int, heads: int, of_keys: int, length: int, features: int, turned: int | None = None, **options: bool
) -> Case:
    return case(
        lambda nn: Rotary(nn, length, turned or features, **options),
        (batch, heads, length, features),
        (batch, of_keys, length, features),
    )


class Projections(Rotary):
    """Query, key and value of an attention layer, of torch's functions or in one call of ours, of three weights or of one."""

    def __init__(
        self, nn: Any, heads: tuple[int, int], head_dim: int, features: int, bias: bool, packed: bool, *angles: Any
    ):
        super().__init__(nn, *angles)
        h, g = heads
        self.heads, self.head_dim = heads, head_dim
        self.weights, self.biases = torch.nn.ParameterList(), torch.nn.ParameterList()
        for n in (h + 2 * g,) if packed else (h, g, g):
            self.weights.append(torch.randn(n * head_dim, features) / features**0.5)
            if bias:
                self.biases.append(torch.randn(n * head_dim))

    def forward(self, x: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # torch 2.11 doesn't compile `[*self.weights]`.
        weights, biases = list(self.weights), list(self.biases) or [None] * len(self.weights)
        angles: Any = (self.cos, self.sin)
        words: Any = dict(head_dim=self.head_dim, interleaved=self.interleaved)
        if self.joined and len(weights) == 1:
            return packed_rotary_projections(x, weights[0], biases[0], *angles, heads=self.heads, **words)
        if self.joined:
            return rotary_projections(x, weights, biases, *angles, **words)
        if len(weights) == 1:
            options: Any = (self.heads, self.head_dim, self.interleaved)
            return _packed_rotary_projections.reference(x, weights[0], biases[0], *angles, *options)
        layers = [t for layer in zip(weights, biases, strict=True) for t in layer]
        arguments: Any = (x, *layers, *angles, self.head_dim, self.interleaved)
        return _rotary_projections.reference(*arguments)


def _projections(
    x: tuple[int, int, int], heads: tuple[int, int], head_dim: int, turned: int | None = None, *,
    interleaved: bool = False, bias: bool = False, packed: bool = False,
) -> Case:  # fmt: skip
    angles = (x[1], turned or head_dim, interleaved)
    return case(lambda nn: Projections(nn, heads, head_dim, x[2], bias, packed, *angles), x)


ROWS = (
    Row(
        "rotary_embedding",
        "query and key in one kernel, heads anywhere in memory, fewer heads of keys; pairs of halves or interleaved, all "
        "features or the first ones; angles for each position, or each of the batch, in float32 or the query's dtype",
        "cos or sin that require grad; cos or sin in a dtype that is neither float32 nor the query's; angles that are broadcast "
        "along positions; more than 1024 features; other dimensions than (B, H, L, D), and (L, R) or (B, L, R)",
        operation=_rotary_embedding,
        function="rotary_embedding",
        scale=4,  # each result is a difference of numbers of the inputs' size
        speeds={
            "Llama-3 8B, 4 x 4096": _rotary(4, 32, 8, 4096, 128),
            "GLM-4 9B, 4 x 4096, 64 of 128, interleaved": _rotary(4, 32, 2, 4096, 128, 64, interleaved=True),
            "Llama-2 7B, 2 x 4096": _rotary(2, 32, 32, 4096, 128),
            "Qwen3-0.6B, 8 x 2048": _rotary(8, 16, 8, 2048, 128),
            "Phi-2, 8 x 2048, 32 of 80": _rotary(8, 32, 32, 2048, 80, 32),
            "Llama-3 8B, 1 token": _rotary(1, 32, 8, 1, 128),
        },
        cases=dict(
            halves=_rotary(2, 3, 1, 5, 12),
            interleaved=_rotary(2, 2, 3, 5, 10, interleaved=True),
            partial=_rotary(2, 3, 2, 7, 11, 6),
            partial_interleaved=_rotary(2, 2, 3, 4, 9, 4, interleaved=True),
        ),
    ),
    Row(
        "rotary_projections",
        "query, key and value of one input, in heads, query and key turned as `rotary_embedding` does; fewer heads of keys, with "
        "or without biases; one sum of products is the input's gradient",
        "cos or sin that require grad; cos or sin in a dtype that is neither float32 nor the query's; angles that are broadcast "
        "along positions; more than 1024 features; other dimensions than (B, L, E), and (L, R) or (B, L, R)",
        operation=_rotary_projections,
        function="rotary_projections",
        scale=4,  # as rotary_embedding's
        speeds={
            "Llama-3 8B, 2 x 2048": _projections((2, 2048, 4096), (32, 8), 128),
            "GLM-4 9B, 2 x 2048, 64 of 128, interleaved": _projections(
                (2, 2048, 4096), (32, 2), 128, 64, interleaved=True, bias=True
            ),
            "Llama-3 1B, 4 x 1024": _projections((4, 1024, 2048), (32, 8), 64),
            "Qwen2-0.5B, 8 x 512": _projections((8, 512, 896), (14, 2), 64, bias=True),
            "Llama-3 8B, 1 token": _projections((1, 1, 4096), (32, 8), 128),
        },
        cases=dict(
            halves=_projections((2, 5, 20), (4, 2), 8, bias=True),
            interleaved=_projections((3, 7, 17), (3, 2), 8, 6, interleaved=True),
            partial=_projections((2, 9, 11), (3, 2), 10, 4, bias=True),
        ),
    ),
    Row(
        "packed_rotary_projections",
        "`rotary_projections` with query, key and value in one weight, as in Phi-3: neither it nor its gradient is copied, and "
        "each gradient is one product",
        "cos or sin that require grad; cos or sin in a dtype that is neither float32 nor the query's; angles that are broadcast "
        "along positions; more than 1024 features; other dimensions than (B, L, E), and (L, R) or (B, L, R)",
        operation=_packed_rotary_projections,
        function="packed_rotary_projections",
        scale=4,
        speeds={},
        cases=dict(
            halves=_projections((2, 5, 20), (4, 2), 8, packed=True),
            interleaved=_projections((3, 7, 17), (3, 2), 8, 6, interleaved=True, bias=True, packed=True),
        ),
    ),
)
