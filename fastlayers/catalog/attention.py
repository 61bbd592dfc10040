"""Attention."""

from __future__ import annotations

from typing import Any

import torch

from ..ops.attention import _attention
from .row import Case, Classes, Function, Row, case

__all__ = ["ROWS"]


class Allowed(Classes):
    """An input of booleans, False once in `count`. The first of several queries may attend to nothing."""

    def make(self, dtype: torch.dtype, device: Any) -> torch.Tensor:
        mask = super().make(dtype, device) > 0
        if mask.shape[-2] > 1:
            mask[..., 0, :] = False
        return mask


def _attend(*inputs: Any, **options: Any) -> Case:
    return case(lambda nn: Function(nn.functional.scaled_dot_product_attention, **options), *inputs)


def _heads(batch: int, heads: int, length: int, features: int, of_keys: int | None = None) -> tuple[Any, ...]:
    """Query, key and value of as many queries as keys."""
    few = of_keys or heads
    return (batch, heads, length, features), (batch, few, length, features), (batch, few, length, features)


class Layer(torch.nn.Module):
    """A MultiheadAttention that is called with a query, or with a query and what is both key and value, and these arguments."""

    def __init__(self, attention: torch.nn.Module, **arguments: Any):
        super().__init__()
        self.attention, self.arguments = attention, arguments

    def forward(self, query: torch.Tensor, key: torch.Tensor | None = None, **masks: Any) -> Any:
        key = query if key is None else key
        return self.attention(query, key, key, **masks, **self.arguments)


def _layer(features: int, heads: int, *inputs: Any, weights: str = "", **options: Any) -> Case:
    """Args:
    weights: which of them are asked for: none, their "mean", as torch does by default, or "each" head's.
    """
    arguments = {"need_weights": weights != "", "average_attn_weights": weights != "each"}
    return case(lambda nn: Layer(nn.MultiheadAttention(features, heads, **options), **arguments), *inputs)


ROWS = (
    Row(
        "scaled_dot_product_attention",
        "any number of heads and positions, up to 256 features; heads anywhere in memory; masks of booleans or numbers that "
        "are broadcast in any way, and the gradient of numbers; is_causal with any sizes, scale, dropout, enable_gqa; the "
        "weights are never written; for few queries, as in decoding, programs share the keys out, and heads of a group read "
        "them once",
        "heads without features, with more than 256, or in float64 with more than 128; a mask for more than four dimensions; "
        "groups of heads beside other dimensions that are broadcast; one of torch's own kernels that somebody chose by "
        "sdpa_kernel",
        operation=_attention,
        scale=1,
        function="scaled_dot_product_attention",
        speeds={
            "Llama-3-8B, 4096 tokens, causal": _attend(*_heads(1, 32, 4096, 128, 8), is_causal=True, enable_gqa=True),
            "GPT-2, 8 x 1024 tokens, causal": _attend(*_heads(8, 12, 1024, 64), is_causal=True),
            "ViT-B, 64 images": _attend(*_heads(64, 12, 197, 64)),
            "Swin-T, 4096 windows, a bias that is learned": _attend(*_heads(4096, 3, 49, 32), (1, 3, 49, 49)),
            "Llama-3-8B, a token after 8192": _attend((1, 32, 1, 128), *[(1, 8, 8192, 128)] * 2, enable_gqa=True),
        },
        cases=dict(
            plain=_attend((2, 2, 20, 16), (2, 2, 37, 16), (2, 2, 37, 16)),
            causal=_attend((1, 4, 37, 8), (1, 2, 37, 8), (1, 2, 37, 24), is_causal=True, enable_gqa=True),
            masked=_attend((2, 2, 20, 16), (2, 2, 37, 16), (2, 2, 37, 16), Allowed((2, 1, 20, 37), 4)),
            keys=_attend((1, 2, 20, 12), (1, 2, 37, 12), (1, 2, 37, 12), Allowed((1, 1, 1, 37), 4)),
            matrices=_attend((2, 21, 10), (2, 29, 10), (2, 29, 6), is_causal=True, scale=0.4),
            decoding=_attend(
                (1, 4, 3, 12), (1, 2, 600, 12), (1, 2, 600, 12), Allowed((1, 1, 3, 600), 4), enable_gqa=True
            ),
            bias=_attend((2, 4, 20, 16), (2, 2, 37, 16), (2, 2, 37, 16), (1, 4, 20, 37), enable_gqa=True),
            of_keys=_attend((2, 2, 20, 12), (2, 2, 37, 12), (2, 2, 37, 12), (2, 1, 1, 37)),
            few=_attend((3, 2, 1, 7), (3, 1, 18, 7), (3, 1, 18, 7), scale=-0.5),
        ),
    ),
    Row(
        "MultiheadAttention",
        "kdim, vdim, bias, add_bias_kv, add_zero_attn, dropout, batch_first, unbatched input; every mask, is_causal; the "
        "kernels of scaled_dot_product_attention, which read the heads where a projection wrote them; with need_weights=True, "
        "torch's default, one more kernel computes the weights again, averages and writes them: pass need_weights=False where "
        "nobody reads them",
        "static_k or static_v; nested tensors; of its attention, what scaled_dot_product_attention leaves to torch",
        scale=16,  # the gradients are sums that cancel, of weights times differences
        function="multi_head_attention_forward",
        speeds={
            "ViT-B, 64 images": _layer(768, 12, (64, 197, 768), batch_first=True),
            "BERT-large, 16 x 512 tokens": _layer(1024, 16, (16, 512, 1024), batch_first=True),
            "ViT-B, 64 images, with weights": _layer(768, 12, (64, 197, 768), weights="mean", batch_first=True),
            "DETR's decoder, 100 queries of 32 x 850": _layer(256, 8, (100, 32, 256), (850, 32, 256)),
        },
        cases=dict(
            alone=_layer(12, 3, (20, 2, 12)),
            weights=_layer(8, 2, (2, 18, 8), weights="mean", batch_first=True, add_zero_attn=True),
            each=_layer(6, 3, (19, 2, 6), (5, 2, 6), weights="each"),
            cross=_layer(12, 2, (5, 2, 12), (21, 2, 7), kdim=7, vdim=7, bias=False),
            pair=_layer(6, 3, (19, 6), (5, 6), add_bias_kv=True, add_zero_attn=True),
        ),
    ),
)
