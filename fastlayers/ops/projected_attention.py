"""Attention of heads that lie side by side in the features, where a projection wrote them; with the weights, if wanted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _kernels, _torch
from .. import _torch_functional as F
from ..dispatch import autocast
from ..dispatch.support import BadInput
from ..values import Named, Needs, Out, Tensors
from . import attention

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels.attention import launchers as kernels

__all__: list[str] = []  # none is a function of torch's


def _softmax(x: torch.Tensor) -> torch.Tensor:
    return F.softmax(x, -1)


def in_heads(x: torch.Tensor, heads: int, batch: int) -> torch.Tensor:
    """Of (rows, N, E), or (N, rows, E) if `batch` is 0, a view (N, heads, rows, E / heads)."""
    x = x.view(*x.shape[:-1], heads, x.shape[-1] // heads)  # batched gradients know no unflatten
    return x.transpose(1, 2) if batch == 0 else x.permute(1, 2, 0, 3)


class ProjectedAttention(attention.Attention):
    """query (L, N, E), key and value (S, N, E); attn_mask a number to be added for each (N, heads, L, S), of which sizes may be 1
    -> (L, N, E) and, if they are wanted, the weights as dropout leaves them, (N, heads, L, S) or their mean (N, L, S). With
    `batch` 0, N comes first.

    Without a value, key (S, N, 2 E) holds the values behind the keys; without a key as well, query (L, N, 3 E) holds all of them.
    So what one projection wrote has one gradient, which nobody has to put together.

    Saves the results and one number for each query and head beside what it is given.
    """

    class Options(NamedTuple):
        heads: int
        batch: int
        dropout_p: float
        is_causal: bool
        weights: str
        """Which weights are a result: "", "each" head's or their "mean"."""
        empty_is_nan: bool
        """Whether a query that may attend to no key gives NaN; 0 otherwise."""
        dtype: torch.dtype | None
        """The weights'; None: query's."""

    def label(self, options: Options) -> str:
        return "scaled_dot_product_attention"

    def reference(
        self, query: Any, key: Any, value: Any, attn_mask: Any, heads: int, batch: int, dropout_p: float,
        is_causal: bool, weights: str, empty_is_nan: bool, dtype: torch.dtype | None,
    ) -> Any:  # fmt: skip
        q, k, v = _three(query, key, value, heads, batch, _held(key, value))
        found: Any = None
        if weights:
            y, found = _weighed(q, k, v, attn_mask, dropout_p)
            found = found.mean(1) if weights == "mean" else found
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal)
            if empty_is_nan and attn_mask is not None:
                y = y.masked_fill((attn_mask == -math.inf).all(-1, keepdim=True), math.nan)
        y = (y.transpose(1, 2) if batch == 0 else y.permute(2, 0, 1, 3)).flatten(2)
        return (y, found) if weights else y

    def unsupported(self, t: Any, options: Options) -> str | None:
        features = t.query.shape[-1] // (options.heads * (3 if t.key is None else 1))
        if features == 0 or attention.too_wide(features, t.query.dtype):
            return attention.WIDTHS
        mask = t.attn_mask
        if mask is not None:
            dtype = autocast.dtype_after(attention.probe, t.query)
            wrong = options.weights != "" and mask.dtype != dtype and not _torch.any_autocast()
            if wrong or mask.dtype not in (torch.float32, dtype):
                return BadInput(f"a mask of {mask.dtype}")
        return attention.CHOSEN if options.weights == "" and not attention.flash_enabled() else None

    def prepare(self, tensors: Tensors, options: Options) -> tuple[Tensors, Options]:
        dtype = autocast.dtype_after(_softmax, tensors[0])
        tensors, options = super().prepare(tensors, options)
        return tensors, self.changed(options, dtype=dtype)

    def results(self, options: Options) -> int:
        return 2 if options.weights else 1

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        q, dtype = t.query, t.query.dtype
        n, l = q.shape[options.batch], q.shape[1 - options.batch]
        s, e = (l, q.shape[-1] // 3) if t.key is None else (t.key.shape[1 - options.batch], q.shape[-1])
        found: dict[str, Out | str] = {"output": Out((*q.shape[:-1], e), dtype)}
        if options.weights:
            shape = (n, l, s) if options.weights == "mean" else (n, options.heads, l, s)
            found["weights"] = Out(shape, options.dtype or dtype)
        if needs is not None or options.weights:
            kept = torch.promote_types(dtype, torch.float32)
            found["lse"] = Out((n, options.heads, l), kept, differentiable=False)
        return found

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        q, k, v = _three(t.query, t.key, t.value, options.heads, options.batch, _held(t.key, t.value))
        y = in_heads(out.output, options.heads, options.batch)
        empty_is_nan = options.empty_is_nan and k.shape[2] > 0  # of no keys at all torch makes 0
        words: dict[str, Any] = dict(dropout=options.dropout_p, scale=None, precision=precision)
        kernels.attention(
            q, k, v, t.attn_mask, t.seed, y, out.lse, causal=options.is_causal, empty_is_nan=empty_is_nan, **words
        )
        if out.weights is not None:
            kernels.attention_weights(q, k, t.attn_mask, t.seed, out.lse, out.weights, **words)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        heads, batch, held = options.heads, options.batch, _held(saved.key, saved.value)
        q, k, v = _three(saved.query, saved.key, saved.value, heads, batch, held)
        gradients = _three(grads.query, grads.key, grads.value, heads, batch, held)
        output, dy_ = saved.output, dy.output
        # Only the weights have a gradient; they don't depend on the values, whose gradient is zero.
        if dy_ is None:
            dy_ = torch.zeros_like(output)
            if gradients[2] is not None:
                gradients[2].zero_()
                gradients[2] = None
        kernels.attention_grad(
            in_heads(dy_, heads, batch), q, k, v, saved.attn_mask, saved.seed, in_heads(output, heads, batch), saved.lse,
            *gradients, causal=options.is_causal, dropout=options.dropout_p, scale=None, precision=precision,
            d_mask=grads.attn_mask, d_weights=dy.weights,
        )  # fmt: skip

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Options, needs: Needs) -> Tensors:
        # Written out: torch's function can't be given our dropout mask.
        some = dy.output if dy.weights is None else dy.weights
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), torch.autocast(some.device.type, enabled=False):
            given: list[Any] = []
            for t, need in zip((saved.query, saved.key, saved.value, saved.attn_mask), needs, strict=False):
                given.append(
                    None if t is None else t.detach().requires_grad_() if need and not t.requires_grad else t.view_as(t)
                )
            wanted = [t for t, need in zip(given, needs, strict=False) if need]
            q, k, v = _three(given[0], given[1], given[2], options.heads, options.batch, _held(saved.key, saved.value))
            empty = math.nan if options.empty_is_nan else 0.0
            y, weights = attention.formula(
                q, k, v, given[3], saved.seed, options.dropout_p, options.is_causal, None, empty
            )
            weights = weights.mean(1) if options.weights == "mean" else weights
            pairs = []
            if dy.output is not None:
                pairs.append((y.to(dy.output.dtype), in_heads(dy.output, options.heads, options.batch)))
            if dy.weights is not None:
                pairs.append((weights.to(dy.weights.dtype), dy.weights))
            results, gradients = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(results, wanted, gradients, create_graph=create_graph, allow_unused=True))
        return [next(found) if need else None for need in needs]

    def reached(self, given: Any, needs: Needs) -> Needs:
        if "output" in given or not needs[2]:
            return needs
        return (*needs[:2], False, *needs[3:])  # the weights don't depend on the values

    def flops(self, like: Any, options: Options, needs: Needs | None) -> int:
        q = like.query.shape
        n, l = q[options.batch], q[1 - options.batch]
        s, e = (l, q[-1] // 3) if like.key is None else (like.key.shape[1 - options.batch], q[-1])
        once = 2 * n * l * s * e
        if needs is None:
            return (3 if options.weights else 2) * once
        # The weights and their gradient, then queries, keys and values, of which a tensor may hold several.
        held = {1: (1, 1, 1), 2: (1, 2, 0), 3: (3, 0, 0)}[_held(like.key, like.value)]
        return (2 + sum([n for n, need in zip(held, needs, strict=False) if need])) * once


def _held(key: Any, value: Any) -> int:
    """How many of queries, keys and values lie side by side in one tensor: in the first if three, in the second if two."""
    return 3 if key is None else 2 if value is None else 1


def _three(query: Any, key: Any, value: Any, heads: int, batch: int, held: int) -> list[Any]:
    """Queries, keys and values in heads, or their gradients, of which some may be None."""
    parts = [query, key, value]
    if held > 1:
        packed = parts[3 - held]
        e = 0 if packed is None else packed.shape[-1] // held
        parts[3 - held :] = [None if packed is None else packed.narrow(-1, i * e, e) for i in range(held)]
    return [None if x is None else in_heads(x, heads, batch) for x in parts]


def _weighed(q: Any, k: Any, v: Any, mask: Any, dropout_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What the heads find (N, heads, L, D), and their weights, by torch's functions as in its multi_head_attention_forward."""
    n, heads, _, d = q.shape
    q, k, v = ((q * math.sqrt(1 / d)).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    if mask is None:
        scores = torch.bmm(q, k.mT)
    else:
        alike = mask.shape[0] == mask.shape[1] == 1
        mask = mask[0] if alike else mask.expand(n, heads, *mask.shape[2:]).flatten(0, 1)
        scores = torch.baddbmm(mask, q, k.mT)
    weights = F.softmax(scores, -1)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return torch.bmm(weights, v).unflatten(0, (n, heads)), weights.unflatten(0, (n, heads))


projected_attention = ProjectedAttention()
