"""dropout(softmax(scale * q k^T + mask)) v, without the weights in memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from .. import _kernels, _torch
from .. import _torch_functional as F
from .._kernels import is_plain
from ..dispatch import autocast, support
from ..dispatch.precision import matmul_precision
from ..dispatch.support import BadInput
from ..operation import Operation
from ..values import Named, Needs, Out, Tensors

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels.attention import launchers as kernels

__all__ = ["scaled_dot_product_attention"]


def probe(x: torch.Tensor) -> torch.Tensor:
    """How torch is asked for its autocast rule."""
    return F.scaled_dot_product_attention(x, x, x)


class Attention(Operation):
    """What operations on the kernels of attention have in common."""

    tensors = ("query", "key", "value", "attn_mask", "seed")
    floats = ("query", "key", "value")
    cast = ("query", "key", "value")
    autocast = staticmethod(probe)

    def random(self, options: Any) -> bool:
        return options.dropout_p > 0

    def precision(self, dtype: torch.dtype) -> str:
        return matmul_precision(dtype)

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        given = [name for name in self.tensors if getattr(t, name) is not None]
        return (*given, "output", "lse")

    def gradients(self, like: Any, options: Any, needs: Needs) -> tuple[Out | int | str | None, ...]:
        # In the order of memory of the tensors, where that is one of heads and rows. More than four dimensions are joined to be
        # written, which takes theirs.
        return tuple(
            [
                (Out.pointwise(o) if o.stride()[-1] == 1 and len(o.shape) <= 4 else Out(o.shape, o.dtype))
                if need
                else None
                for o, need in zip(like, needs, strict=True)
            ]
        )


class ScaledDotProductAttention(Attention):
    """query (..., H, L, E), key (..., H, S, E), value (..., H, S, Ev), attn_mask of the same number of dimensions or fewer that
    expands to (..., H, L, S) -> (..., H, L, Ev). With enable_gqa, key and value have H / GROUP heads.

    Saves the result and one number for each query beside what it is given. Weights are computed again in the backward, and so is
    dropout's choice, from the seed.
    """

    class Options(NamedTuple):
        dropout_p: float
        is_causal: bool
        scale: float | None
        enable_gqa: bool

    def reference(
        self, query: Any, key: Any, value: Any, attn_mask: Any,
        dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool,
    ) -> Any:  # fmt: skip
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        q, k, v = t.query, t.key, t.value
        shape = (*q.shape[:-1], v.shape[-1])
        # As torch's own fused kernels, which take four dimensions and contiguous features; of the rest it makes a product.
        alike = q.dim() == 4 and q.shape[-1] == v.shape[-1] and q.stride()[-1] == k.stride()[-1] == v.stride()[-1] == 1
        found: dict[str, Out | str] = {"output": Out.pointwise(q) if alike else Out(shape, q.dtype)}
        if needs is not None:
            kept = torch.promote_types(q.dtype, torch.float32)
            found["lse"] = Out(tuple(q.shape[:-1]), kept, differentiable=False)
        return found

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        q, k, v, output = map(_heads, (t.query, t.key, t.value, out.output))
        lse = None if out.lse is None else out.lse.view(q.shape[:-1])
        kernels.attention(q, k, v, _mask(t.attn_mask), t.seed, output, lse, precision=precision, **_words(options))

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        dy_, q, k, v, output = map(_heads, (dy.output, saved.query, saved.key, saved.value, saved.output))
        *gradients, d_mask = [None if g is None else _heads(g) for g in grads[:4]]
        kernels.attention_grad(
            dy_, q, k, v, _mask(saved.attn_mask), saved.seed, output, saved.lse.reshape(q.shape[:-1]), *gradients,
            precision=precision, d_mask=d_mask, **_words(options),
        )  # fmt: skip

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Options, needs: Needs) -> Tensors:
        # torch's fused functions have no second derivative, and can't be told what dropout chose: it is their formula.
        create_graph = torch.is_grad_enabled()
        wanted: list[Any] = []
        given: list[Any] = []
        with torch.enable_grad(), torch.autocast(dy.output.device.type, enabled=False):
            for t, need in zip((saved.query, saved.key, saved.value, saved.attn_mask), needs, strict=False):
                given.append(
                    t.detach().requires_grad_() if need and not t.requires_grad else None if t is None else t.view_as(t)
                )
                wanted += [given[-1]] if need else []
            query, key, value, mask = given
            if options.enable_gqa:
                group = query.shape[-3] // key.shape[-3]
                key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
            y, _ = formula(query, key, value, mask, saved.seed, options.dropout_p, options.is_causal, options.scale)
            found = iter(torch.autograd.grad(y.to(dy.output.dtype), wanted, dy.output, create_graph=create_graph))
        return [next(found) if need else None for need in needs]

    def flops(self, like: Any, options: Options, needs: Needs | None) -> int:
        q, v = like.query.shape, like.value.shape
        pairs = 2 * math.prod(q[:-1]) * v[-2]
        if needs is None:
            return pairs * (q[-1] + v[-1])
        # The weights and their gradient, then each of the three.
        return pairs * (q[-1] * (1 + needs[0] + needs[1]) + v[-1] * (1 + needs[2]))


def formula(
    q: Any, k: Any, v: Any, mask: Any, seed: Any, dropout_p: float, is_causal: bool, scale: float | None,
    empty: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The result and the weights, in float32 or more, by functions of torch that can be differentiated any number of times.

    Args:
        seed: dropout's; None without dropout.
        empty: the weights of a query that may attend to nothing.
    """
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, empty)
    if seed is not None:
        weights = weights * kernels.dropout_factors(seed, scores.shape, scores.dtype, dropout_p)
    return weights @ v, weights


def _heads(x: torch.Tensor) -> torch.Tensor:
    """(B, H, rows, columns), a view wherever there is one."""
    if x.dim() == 4:
        return x
    if x.dim() > 4:
        return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
    return x[None] if x.dim() == 3 else x[None, None]


def _mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else _heads(mask)


def _words(options: ScaledDotProductAttention.Options) -> dict[str, Any]:
    return dict(causal=options.is_causal, dropout=options.dropout_p, scale=options.scale)


_attention = ScaledDotProductAttention()


@_torch.constant_in_graphs  # Dynamo can't trace it: a compiled graph keeps what it was compiled under
def flash_enabled() -> bool:
    return torch.backends.cuda.flash_sdp_enabled()


WIDTHS = "heads without features, with more than 256, or in float64 with more than 128"
CHOSEN = "one of torch's own kernels that somebody chose by sdpa_kernel"
"""Reasons."""


def too_wide(features: int, dtype: torch.dtype) -> bool:
    """Whether heads have more features than the kernels take."""
    return features > (128 if dtype == torch.float64 else 256)


def _heads_in_common(query: Any, key: Any, value: Any, enable_gqa: bool) -> tuple[int, ...] | str:
    """All dimensions of the result but its last two; a reason where the kernels don't take these."""
    if min(query.dim(), key.dim(), value.dim()) < 2 + enable_gqa:
        return BadInput("too few dimensions")
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return BadInput(f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}")
    shapes = [tuple(x.shape[:-2]) for x in (query, key, value)]
    if shapes[0] == shapes[1] == shapes[2]:
        return shapes[0]
    if enable_gqa:
        if shapes[1] != shapes[2] or shapes[0][:-1] != shapes[1][:-1]:
            return "groups of heads beside other dimensions that are broadcast"
        if shapes[1][-1] == 0 or shapes[0][-1] % shapes[1][-1]:
            return BadInput(f"{shapes[0][-1]} heads that share {shapes[1][-1]}")
        return shapes[0]
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        return BadInput(f"dimensions {shapes} can't be broadcast")


def _reason_against_mask(query: Any, key: Any, mask: Any, heads: tuple[int, ...], is_causal: bool) -> str | None:
    if is_causal:
        return BadInput("a mask beside is_causal")
    full = (*heads, query.shape[-2], key.shape[-2])
    fits = 2 <= mask.dim() <= len(full) and all(
        [m in (1, n) for m, n in zip(reversed(mask.shape), reversed(full), strict=False)]
    )
    if not fits or mask.dtype not in (torch.bool, torch.float32, autocast.dtype_after(probe, query)):
        return BadInput(f"a mask {tuple(mask.shape)} of {mask.dtype} for {full}")
    return "a mask for more than four dimensions" if len(full) > 4 else None


def _reason_against(
    query: Any, key: Any, value: Any, mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any
) -> tuple[str | None, tuple[int, ...]]:
    """What the record has no words for; if there is nothing, all dimensions of the result but its last two."""
    given = [t for t in (query, key, value, mask) if t is not None]
    if query is None or key is None or value is None or not all([is_plain(t) for t in given]):
        return support.unusable(given) or BadInput("no tensor"), ()
    if not (isinstance(dropout_p, (int, float)) and 0 <= dropout_p <= 1):
        return BadInput(f"dropout_p {dropout_p!r}"), ()
    if type(is_causal) is not bool or type(enable_gqa) is not bool or not isinstance(scale, (int, float, type(None))):
        return BadInput(f"is_causal {is_causal!r}, scale {scale!r}, enable_gqa {enable_gqa!r}"), ()
    if not flash_enabled():
        return CHOSEN, ()
    heads = _heads_in_common(query, key, value, enable_gqa)
    if isinstance(heads, str):
        return heads, ()
    if query.shape[-1] == 0 or too_wide(max(query.shape[-1], value.shape[-1]), query.dtype):
        return WIDTHS, ()
    return None if mask is None else _reason_against_mask(query, key, mask, heads, is_causal), heads


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """dropout(softmax(scale * query key^T + attn_mask)) value. As torch.nn.functional.scaled_dot_product_attention.

    A query that may attend to no key gives 0. Sums run in a fixed order, so that the same call always gives the same bits. Of
    65536 weights dropout keeps the nearest whole number to 1 - dropout_p of them, and divides what is kept by that very share; it
    is a function of torch's generator, but chooses other weights than torch.

    Shape: query (..., L, E), key (..., S, E), value (..., S, Ev), whose first dimensions are broadcast; with enable_gqa, key and
        value may have fewer heads (dimension -3), which divide query's; attn_mask expands to (..., L, S). All with any strides.
    Dtype: query, key and value float16, bfloat16, float32 or float64, alike; attn_mask bool, float32 or query's. Scores, weights
        and sums in float32 (float64); float32 products obey torch.backends.cuda.matmul.fp32_precision, and strict ones take
        three products of tensor cores each on NVIDIA's GPUs. Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets), E and Ev are at most 256 (in float64 128),
        the mask isn't given beside is_causal, and torch's flash attention isn't disabled by sdpa_kernel.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html; Dao,
        "FlashAttention-2", arXiv:2307.08691; here the backward has a kernel for dq of its own instead of atomic additions.
    """
    reason, heads = _reason_against(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if reason is None:
        if not enable_gqa and not tuple(query.shape[:-2]) == tuple(key.shape[:-2]) == tuple(value.shape[:-2]):
            query, key, value = (x.expand(*heads, *x.shape[-2:]) for x in (query, key, value))
        scale = None if scale is None else float(scale)
        return _attention((query, key, value, attn_mask), float(dropout_p), is_causal, scale, enable_gqa)

    def call() -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    if is_dynamo_compiling():
        return call()
    return support.run_reference("scaled_dot_product_attention", reason, call)
