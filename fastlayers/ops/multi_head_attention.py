"""Attention between projections: of the inputs to queries, keys and values of several heads, and of what the heads find."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from .. import _torch
from .. import _torch_functional as F
from ..dispatch import support
from ..dispatch.support import BadInput
from .linear import linear
from .projected_attention import projected_attention

__all__ = ["multi_head_attention_forward"]


class Parameters(NamedTuple):
    """What the layer has learned."""

    in_weights: Sequence[Any]
    """One of (3 E, E), or three: (E, E), (E, features of keys), (E, features of values)."""
    in_bias: Any
    """(3 E,) or None."""
    bias_k: Any
    """E elements or None: one more key, for every sequence. So bias_v."""
    bias_v: Any
    out_weight: Any
    out_bias: Any


class Masks(NamedTuple):
    """What hides keys. Of booleans, True hides; other numbers are added to the scores."""

    key_padding: Any
    """(N, S), without a batch (S,); or None."""
    attention: Any
    """(L, S) or (N heads, L, S), or None."""


class Way(NamedTuple):
    """How the heads attend."""

    heads: int
    dropout_p: float
    causal: bool
    """A hint that the mask for attention hides every key behind the query's own place."""
    zero_key: bool
    """Whether there is one more key and value, of zeros."""
    need_weights: bool
    average: bool
    """Whether the weights that are returned are the mean of all heads'."""


def _probe(x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, x)


# --- what speaks against it ----------------------------------------------------------------------------------------------------


def _misfit(query: Any, key: Any, value: Any, features: Any, p: Parameters, heads: int) -> bool:
    """Whether inputs or parameters are of shapes that torch refuses."""
    dims = query.dim()
    if dims not in (2, 3) or key.dim() != dims or value.dim() != dims or query.shape[-1] != features:
        return True
    e = query.shape[-1]
    if type(heads) is not int or heads <= 0 or e % heads or key.shape[:-1] != value.shape[:-1]:
        return True
    if dims == 3 and query.shape[1] != key.shape[1]:
        return True
    if len(p.in_weights) == 1:
        expected = [(3 * e, e)]
        if key.shape[-1] != e or value.shape[-1] != e:
            return True
    else:
        expected = [(e, x.shape[-1]) for x in (query, key, value)]
    if any([tuple(w.shape) != shape for w, shape in zip(p.in_weights, expected, strict=True)]):
        return True
    if (p.bias_k is None) != (p.bias_v is None) or any(
        [b is not None and b.numel() != e for b in (p.bias_k, p.bias_v)]
    ):
        return True
    out, bias = p.out_weight, p.out_bias
    return (
        (p.in_bias is not None and p.in_bias.shape != (3 * e,))
        or out.dim() != 2
        or out.shape[1] != e
        or (bias is not None and bias.shape != out.shape[:1])
    )


def _masks_misfit(query: Any, key: Any, masks: Masks, heads: int) -> bool:
    """Whether the masks are of shapes or dtypes that torch refuses."""
    batch = query.shape[1:-1]
    lengths = (query.shape[0], key.shape[0])
    attention, padding = masks.attention, masks.key_padding
    if any([m is not None and m.dtype != torch.bool and not m.is_floating_point() for m in masks]):
        return True
    if padding is not None and tuple(padding.shape) != (*batch, lengths[1]):
        return True
    return attention is not None and tuple(attention.shape) not in (lengths, (math.prod(batch) * heads, *lengths))


def _reason_against(
    query: Any, key: Any, value: Any, features: Any, p: Parameters, masks: Masks, way: Way
) -> str | None:
    """Why torch's own function must take the whole call. What the single operations of a call that is taken leave to torch, they
    say themselves."""
    floats = [query, key, value, *p.in_weights, p.in_bias, p.bias_k, p.bias_v, p.out_weight, p.out_bias]
    if any([t is None for t in (query, key, value, *p.in_weights, p.out_weight)]):
        return BadInput("no tensor")
    reason = support.unsupported([*floats, *masks], floats, _probe if _torch.any_autocast() else None)
    if reason is not None:
        return reason
    if _misfit(query, key, value, features, p, way.heads) or _masks_misfit(query, key, masks, way.heads):
        return BadInput(f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}")
    if way.causal and masks.attention is None:
        return BadInput("is_causal without attn_mask")
    if not (isinstance(way.dropout_p, (int, float)) and 0 <= way.dropout_p <= 1):
        return BadInput(f"dropout_p {way.dropout_p!r}")
    return None


# --- the computation -----------------------------------------------------------------------------------------------------------


def _product(x: Any, weight: Any, bias: Any) -> torch.Tensor:
    """`linear`, whose rows lie as x's do: those of a transposed batch needn't be copied to become a matrix."""
    if x.stride(0) < x.stride(1):
        return linear(x.transpose(0, 1), weight, bias).transpose(0, 1)
    return linear(x, weight, bias)


def _projected(query: Any, key: Any, value: Any, p: Parameters) -> Sequence[torch.Tensor | None]:
    """Queries, keys and values (..., E). One product makes all that is of one tensor: keys and values of one lie side by side in
    the second, and where queries are of the same one, all in the first."""
    if len(p.in_weights) == 1 and key is value:
        (weight,), bias, e = p.in_weights, p.in_bias, query.shape[-1]
        if query is key:
            return _product(query, weight, bias), None, None
        one, two = (None, None) if bias is None else bias.split([e, 2 * e])
        of_query, of_both = weight.split([e, 2 * e])
        return _product(query, of_query, one), _product(key, of_both, two), None
    weights = p.in_weights if len(p.in_weights) == 3 else p.in_weights[0].chunk(3)
    biases = (None, None, None) if p.in_bias is None else p.in_bias.chunk(3)
    return [_product(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]


def _with_further(projected: Sequence[Any], p: Parameters, zero: bool) -> Sequence[torch.Tensor]:
    """Queries, and the keys and values (S, N, E) with those that the layer adds."""
    *first, packed = [x for x in projected if x is not None]
    q, *both = (*first, *packed.chunk(3 - len(first), -1))
    found = []
    for x, bias in zip(both, (p.bias_k, p.bias_v), strict=True):
        _, n, e = x.shape
        more = [] if bias is None else [bias.view(1, 1, e).expand(1, n, e)]
        found.append(torch.cat([x, *more, *([x.new_zeros((1, n, e))] if zero else [])]))
    return q, *found


def numbers(mask: Any, dtype: torch.dtype) -> Any:
    """What is added to the scores, of a mask or None."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _merged(masks: Masks, n: int, heads: int, dtype: torch.dtype, further: int) -> torch.Tensor | None:
    """What is added to the scores (N, heads, L, S + further), with sizes of 1 where it is the same; None if nothing is."""
    padding, attention = masks
    if padding is not None and attention is not None and padding.dtype != attention.dtype:
        # torch's words.
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
            stacklevel=4,
        )
    found = []
    if attention is not None:
        attention = numbers(attention, dtype)
        found.append(attention[None, None] if attention.dim() == 2 else attention.unflatten(0, (n, heads)))
    if padding is not None:
        found.append(numbers(padding, dtype)[:, None, None])
    if further:
        found = [F.pad(mask, (0, further)) for mask in found]
    return None if not found else found[0] if len(found) == 1 else found[0] + found[1]


def _attended(
    query: Any, key: Any, value: Any, p: Parameters, masks: Masks, way: Way, batch: int, unseeing: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The result in the order of the inputs, of which dimension `batch` is the batch, and the weights if they are asked for.

    Args:
        unseeing: whether a query that may attend to no key gives NaN without weights as well.
    """

    causal = way.causal and masks.key_padding is None and not way.need_weights
    mask, further = None, (p.bias_k is not None) + way.zero_key
    if not causal:
        mask = _merged(masks, query.shape[batch], way.heads, query.dtype, further)
    projected = _projected(query, key, value, p)
    if further:
        projected = _with_further(projected, p, way.zero_key)
    weights = ("mean" if way.average else "each") if way.need_weights else ""
    empty_is_nan = unseeing or way.need_weights
    found = projected_attention(
        (*projected, mask), way.heads, batch, float(way.dropout_p), causal, weights, empty_is_nan, None
    )
    output, weights = found if way.need_weights else (found, None)
    return linear(output, p.out_weight, p.out_bias), weights


# --- torch's functions ---------------------------------------------------------------------------------------------------------


def left(reason: str, call: Callable[[], Any]) -> Any:
    return call() if is_dynamo_compiling() else support.run_reference("multi_head_attention_forward", reason, call)


def inference(
    query: Any, p: Parameters, masks: Masks, way: Way, reference: Callable[[], Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As torch's operator `_native_multi_head_attention`, which torch.nn.MultiheadAttention calls in eval for self-attention of
    batches with batch_first where no gradient is recorded.

    Shape: query (N, L, E); the result the same, contiguous, and the weights (N, L, L) or (N, heads, L, L). A query that may
        attend to no key gives NaN.
    Args:
        reference: what torch computes where the kernels don't take it.
    """
    sequences_first = query.transpose(0, 1) if isinstance(query, torch.Tensor) and query.dim() == 3 else query
    features = p.out_weight.shape[-1]
    reason = _reason_against(sequences_first, sequences_first, sequences_first, features, p, masks, way)
    if reason is not None:
        return left(reason, reference)
    return _attended(query, query, query, p, masks, way, batch=0, unseeing=True)


def multi_head_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: torch.Tensor | None,
    in_proj_bias: torch.Tensor | None,
    bias_k: torch.Tensor | None,
    bias_v: torch.Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    training: bool = True,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: torch.Tensor | None = None,
    k_proj_weight: torch.Tensor | None = None,
    v_proj_weight: torch.Tensor | None = None,
    static_k: torch.Tensor | None = None,
    static_v: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of several heads between projections of the inputs and of the result. As
    torch.nn.functional.multi_head_attention_forward.

    Attention runs on the kernels of `scaled_dot_product_attention`, which read the heads where the projections wrote them. The
    weights are computed a second time to be written, and averaged over the heads on the way: use need_weights=False where they
    aren't used.

    Shape: query (L, N, E) or (L, E), key and value (S, N, features) or (S, features), with any strides; in_proj_weight (3 E, E),
        or with use_separate_proj_weight q_, k_ and v_proj_weight (E, features); in_proj_bias (3 E,); bias_k and bias_v of E
        elements; out_proj_weight (any, E). key_padding_mask (N, S) or (S,), attn_mask (L, S) or (N num_heads, L, S), where True
        hides. The result (L, N, any) or (L, any), contiguous; the weights (N, L, S) or (L, S), or with a dimension of the heads
        before L.
    Dtype: float16, bfloat16, float32 or float64, alike; masks of booleans or numbers. Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets), and neither static_k nor static_v is given.
    Raises: what torch raises. Warns as torch of masks that differ in dtype.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention.html; Vaswani et al., "Attention Is All You
        Need", arXiv:1706.03762.
    """
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    in_weights = separate if use_separate_proj_weight else (in_proj_weight,)
    p = Parameters(in_weights, in_proj_bias, bias_k, bias_v, out_proj_weight, out_proj_bias)
    masks = Masks(key_padding_mask, attn_mask)
    p_of_way = dropout_p if training else 0.0
    reason = support.unusable((query, key, value))
    if reason is None and not (static_k is None and static_v is None):
        reason = "static_k or static_v"
    # Without a reason none of these is a placeholder of torch.fx, of which no boolean can be made.
    further = [reason is None and bool(x) for x in (is_causal, add_zero_attn, need_weights, average_attn_weights)]
    way = Way(num_heads, p_of_way, *further)
    if reason is None:
        reason = _reason_against(query, key, value, embed_dim_to_check, p, masks, way)
    if reason is not None:

        def reference() -> Any:
            return F.multi_head_attention_forward(
                query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v,
                add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training, key_padding_mask, need_weights,
                attn_mask, use_separate_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight, static_k, static_v,
                average_attn_weights, is_causal,
            )  # fmt: skip

        return left(reason, reference)
    if query.dim() == 3:
        return _attended(query, key, value, p, masks, way, batch=1)
    alike = key is value, query is key
    query, key, value = (x.unsqueeze(1) for x in (query, key, value))
    value = key if alike[0] else value
    query = key if alike == (True, True) else query
    if key_padding_mask is not None:
        masks = Masks(key_padding_mask.unsqueeze(0), attn_mask)
    output, weights = _attended(query, key, value, p, masks, way, batch=1)
    return output.squeeze(1), None if weights is None else weights.squeeze(0)
