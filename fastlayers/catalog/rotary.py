"""Rotary position embedding."""

from typing import Any

import torch

from ..ops.rotary import _rotary_embedding, rotary_embedding
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
)
