"""Functions of somebody's own that compute rotary embedding of query and key, found by what they compute."""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

from ..ops.rotary import _rotary_embedding, rotary_embedding
from . import trace

__all__ = ["apply_rotary_pos_emb", "ours"]


def apply_rotary_pos_emb(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fastlayers.functional.rotary_embedding` with the signature of transformers' functions of this name.

    Rounded once, where theirs round three times in 16 bits. The results have q's and k's dtype also where cos and sin have
    another one; some of theirs return float32 then, which attention under autocast rounds to the same numbers.

    Shape: q (B, H, L, D) and k (B, G, L, D) or, with unsqueeze_dim=2, (B, L, H, D) and (B, L, G, D); cos and sin (B, L, R), where
        B may be 1 and R at most D -> as q, as k.
    Dtype: as rotary_embedding.

    Args:
        unsqueeze_dim: where q and k have their heads.
        interleaved: as rotary_embedding's.
    """
    if unsqueeze_dim == 1:
        return rotary_embedding(q, k, cos, sin, interleaved=interleaved)
    q, k = (x.movedim(unsqueeze_dim, 1) for x in (q, k))
    q, k = rotary_embedding(q, k, cos, sin, interleaved=interleaved)
    return q.movedim(1, unsqueeze_dim), k.movedim(1, unsqueeze_dim)


def ours(function: types.FunctionType) -> Callable[..., Any] | None:
    """Ours for one of q, k, cos, sin and, maybe, unsqueeze_dim; None if it isn't one that computes rotary embedding.

    The function isn't run: what is compared is what its graph gives for small tensors, which also shows which features it
    pairs. Calls with other arguments, and all calls when something that its graph was made of has changed, go to the function.
    """
    if [*inspect.signature(function).parameters][2:4] != ["cos", "sin"]:
        return None
    try:
        graph, looked = trace.of_function(function, 4)
    except (TraceError, SyntaxError):
        return None
    read = fx.GraphModule(nn.Module(), graph)
    forward = functools.partial(type(read).forward, read)
    for interleaved, repeated in ((False, False), (True, False), (True, True)):
        if all([_computes(forward, size, interleaved, repeated) for size in (8, 4)]):
            q, cos = torch.ones(1, 1, 1, 8, dtype=torch.bfloat16, device="cpu"), torch.ones(1, 1, 8, device="cpu")
            widens = forward(q, q, cos, cos)[0].dtype is torch.float32
            return _calling(function, looked, interleaved, repeated, widens)
    return None


def _computes(function: Callable[..., Any], size: int, interleaved: bool, repeated: bool) -> bool:
    """Whether it gives what ours does for so many turned features of 8, and writes into nothing that it is given. If there are
    fewer features, it may raise an error."""
    shapes = (2, 3, 5, 8), (2, 1, 5, 8), (2, 5, size), (2, 5, size)
    q, k, cos, sin = (_sample(shape, i) for i, shape in enumerate(shapes))
    angles = [_repeated(t) if repeated else t for t in (cos, sin)]
    expected = _rotary_embedding.reference(q, k, *angles, interleaved=interleaved)
    given = [t.clone() for t in (q, k, cos, sin)]
    try:
        results = function(q, k, cos, sin)
    except Exception:
        return size < 8
    if not isinstance(results, tuple) or len(results) != 2:
        return False
    if not all([torch.equal(t, before) for t, before in zip((q, k, cos, sin), given, strict=True)]):
        return False
    pairs = [*zip(results, expected, strict=True)]
    alike = all([isinstance(y, torch.Tensor) and y.shape == right.shape for y, right in pairs])
    return alike and all([torch.allclose(y, right, atol=1e-5) for y, right in pairs])


def _sample(shape: tuple[int, ...], which: int) -> torch.Tensor:
    """Numbers without a pattern, of no generator: its numbers would be missing from somebody's sequence, and vmap refuses it."""
    numbers = torch.arange(math.prod(shape), dtype=torch.float32, device="cpu")
    return (numbers.square() * 0.7 + which).sin().view(shape)


def _repeated(angles: torch.Tensor) -> torch.Tensor:
    """The first half of the angles, each twice, as models with interleaved pairs make them of those of halves."""
    return angles[..., : angles.shape[-1] // 2].repeat_interleave(2, -1)


def _calling(
    function: Callable[..., Any], looked: Any, interleaved: bool, repeated: bool, widens: bool
) -> Callable[..., Any]:
    nobody = nn.Module()

    @functools.wraps(function)
    def rotated(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        dims = [t.dim() if isinstance(t, torch.Tensor) else None for t in (q, k, cos, sin)]
        if dims != [4, 4, 3, 3] or args or kwargs.keys() - {"unsqueeze_dim"} or looked.changed(nobody) is not None:
            return function(q, k, cos, sin, *args, **kwargs)
        if widens and cos.dtype is not q.dtype:
            q, k = (t.to(torch.promote_types(t.dtype, cos.dtype)) for t in (q, k))
        if repeated:
            cos, sin = _repeated(cos), _repeated(sin)
        return apply_rotary_pos_emb(q, k, cos, sin, interleaved=interleaved, **kwargs)

    return rotated
