"""Rotary position embedding: pairs of features of query and key, turned by angles that belong to their position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _kernels
from .. import _torch_functional as F
from ..dispatch.support import BadInput
from ..operation import Operation
from ..values import Named, Needs, Out

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels import rotary as kernels

__all__ = ["rotary_embedding"]


class RotaryEmbedding(Operation):
    """query (B, H, L, D), key (B, G, L, D), cos and sin (L, R), (1, L, R) or (B, L, R) -> as query, as key. Saves cos and sin."""

    tensors = ("query", "key", "cos", "sin")
    floats = ("query", "key")
    compiled = False

    class Options(NamedTuple):
        interleaved: bool

    def reference(self, query: Any, key: Any, cos: Any, sin: Any, interleaved: bool) -> Any:
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
        return _turned(query, cos, sin, interleaved), _turned(key, cos, sin, interleaved)

    def results(self, options: Any) -> int:
        return 2

    def unsupported(self, t: Any, options: Options) -> str | None:
        q, k, cos, sin = t.query, t.key, t.cos, t.sin
        if k is None or cos is None or sin is None:
            return BadInput("no key, cos or sin")
        if q.dim() != 4 or k.dim() != 4 or cos.dim() not in (2, 3) or cos.shape != sin.shape:
            return "other dimensions than (B, H, L, D), and (L, R) or (B, L, R)"
        if k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
            return BadInput(f"query {tuple(q.shape)} and key {tuple(k.shape)}")
        return angles_unsupported(cos, sin, q.shape, q.dtype)

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        return {"rotated_query": Out.pointwise(t.query), "rotated_key": Out.pointwise(t.key)}

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        pairs = [(t.query, out.rotated_query), (t.key, out.rotated_key)]
        kernels.rotary(pairs, *for_each(t.cos, t.sin, t.query.shape[0]), interleaved=options.interleaved)

    def saves(self, t: Any, options: Options, needs: Needs) -> tuple[str, ...]:
        return "cos", "sin"

    def gradients(self, like: Any, options: Options, needs: Needs) -> tuple[Out | int | str | None, ...]:
        # In the order of memory of query and key, so that the gradient of a projection is a view of theirs.
        return *[Out.pointwise(x) if need else None for x, need in zip(like[:2], needs, strict=False)], None, None

    def reached(self, given: Sequence[str], needs: Needs) -> Needs:
        return needs[0] and "rotated_query" in given, needs[1] and "rotated_key" in given, False, False

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        both = (dy.rotated_query, grads.query), (dy.rotated_key, grads.key)
        pairs = [(d, g) for d, g in both if g is not None]
        if pairs:
            angles = for_each(saved.cos, saved.sin, pairs[0][0].shape[0])
            kernels.rotary(pairs, *angles, interleaved=options.interleaved, backward=True)


def angles_unsupported(cos: Any, sin: Any, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """What speaks against turning a query (B, H, L, D) of this dtype by these angles, both (L, R) or (B, L, R)."""
    size, features = cos.shape[-1], shape[3]
    if size % 2 or size > features:
        return BadInput(f"{size} angles for {features} features")
    if cos.shape[-2] != shape[2] or (cos.dim() == 3 and cos.shape[0] not in (1, shape[0])):
        return "angles that are broadcast along positions"
    if features > 1024:
        return "more than 1024 features"
    for angles in (cos, sin):
        if angles.dtype not in (torch.float32, dtype):
            return "cos or sin in a dtype that is neither float32 nor the query's"
        if angles.requires_grad:
            return "cos or sin that require grad"
    return None


def for_each(cos: torch.Tensor, sin: torch.Tensor, batch: int) -> list[torch.Tensor]:
    """Of the batch: cos and sin as views (B, L, R)."""
    return [t.expand(batch, *t.shape[-2:]) for t in (cos, sin)]


def _turned(x: Any, cos: Any, sin: Any, interleaved: bool) -> Any:
    size = cos.shape[-1]
    turned = x[..., :size]
    pairs = turned.unflatten(-1, (size // 2, 2) if interleaved else (2, size // 2))
    signs = torch.arange(-1, 2, 2, dtype=x.dtype, device=x.device)  # not `stack`, which some autocasts refuse
    other = pairs.flip(-1) * signs if interleaved else pairs.flip(-2) * signs[:, None]
    y = (turned * cos + other.flatten(-2) * sin).to(x.dtype)
    if size == x.shape[-1]:
        return y
    rest = torch.arange(x.shape[-1], device=x.device) >= size
    return torch.where(rest, x, F.pad(y, (0, x.shape[-1] - size)))  # lies in memory as x does


_rotary_embedding = RotaryEmbedding()


def rotary_embedding(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """query and key with each pair of features turned by the angle that belongs to their position, in one kernel:

        query * cos + rotate_half(query) * sin, and the same of key

    where rotate_half makes (-b, a) of each pair (a, b). Computed in float32 and rounded once, where that expression rounds three
    times in 16 bits. The gradient turns back. Where cos or sin have fewer features than query and key, R < D, the first R are
    turned and the others copied. The gradients of cos and sin, where they are required,
    are computed by torch's functions.

    Shape: query (B, H, L, D), key (B, G, L, D), any strides: the view (B, H, L, D) of a projection (B, L, H * D) isn't copied.
        cos and sin (L, R), (1, L, R) or (B, L, R), a number for each turned feature, R even and at most D. The results have
        query's and key's shapes and order in memory. Other shapes are broadcast by torch's functions.
    Dtype: query, key and the results alike float16, bfloat16, float32 or float64; cos and sin float32 or query's dtype.
        Computed in float32 (float64 for float64).
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets), D is at most 1024, and cos and sin don't
        require grad.
    Raises: what torch's functions raise.

    Args:
        interleaved: whether the pairs are features 2j and 2j + 1 (GPT-J, GLM), rather than j and j + R/2 (Llama, NeoX).

    Source: Su et al., "RoFormer", arXiv:2104.09864.
    """
    return _rotary_embedding((query, key, cos, sin), interleaved)
