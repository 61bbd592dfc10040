"""torch.nn.modules.transformer.

Between its children a layer of ours runs rows of layers, as Sequential does: Linear and activation, dropout, residual and norm.
A child with a hook, a subclass or a `forward` of its own is called as it is. torch's fast path for inference, which calls no
child and takes a GELU("tanh") for a GELU(), is torch's alone: ours give what torch gives with
`torch.backends.mha.set_fastpath_enabled(False)`. Nested tensors, which a TransformerEncoder in eval makes of padded sequences,
are torch's, fast path and all. Inside torch.compile torch's own forward calls the children.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from ..dispatch import support
from ..fusion import plan
from ..fusion.activation import called
from ..ops.multi_head_attention import numbers
from . import activation, dropout, linear, normalization

__all__ = [
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]

_CHILDREN: dict[str, Any] = {
    "MultiheadAttention": activation.MultiheadAttention,
    "Linear": linear.Linear,
    "Dropout": dropout.Dropout,
    "LayerNorm": normalization.LayerNorm,
}
"""What torch's constructors build, by the names that they call it."""


def _building(theirs: type[nn.Module], **children: Any) -> Any:
    """The class's own constructor, with these classes in the place of torch's, which it calls by their names."""
    make: Any = theirs.__init__
    if not isinstance(make, types.FunctionType):  # somebody has replaced it by something else, which is then called
        return make
    space = {**make.__globals__, **_CHILDREN, **children}
    del space["__name__"]  # Dynamo would look for what the constructor calls in the module of this name
    made = types.FunctionType(make.__code__, space, make.__name__, make.__defaults__, make.__closure__)
    made.__kwdefaults__, made.__annotations__, made.__module__ = make.__kwdefaults__, make.__annotations__, __name__
    made.__doc__ = make.__doc__
    return made


def _is_torchs(layer: nn.Module, ours: type[nn.Module], *names: str) -> bool:
    """Whether nobody overrode these methods of torch's, which then would have to be called."""
    return all([getattr(type(layer), n) is getattr(ours, n) and n not in layer.__dict__ for n in names])


def _added(residual: torch.Tensor) -> plan.Residual:
    return plan.Residual(residual, lambda x: residual + x)


def _attended(
    attention: nn.Module, x: torch.Tensor, memory: torch.Tensor, mask: Any, padding: Any, is_causal: bool
) -> torch.Tensor:
    return attention(
        x, memory, memory, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=is_causal
    )[0]  # fmt: skip


def _feed_forward(layer: Any) -> list[Any]:
    return [layer.linear1, called(layer.activation), layer.dropout, layer.linear2]


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Self-attention and a feed-forward network, each with a residual and a norm. As torch.nn.TransformerEncoderLayer, without
    its fast path: in eval as well, the children are called.

    Shape: src (S, E), (S, N, E), or (N, S, E) with batch_first; the result as src.
    Dtype: float16, bfloat16, float32, float64.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerEncoderLayer.html
    """

    __init__ = _building(nn.TransformerEncoderLayer)

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        theirs = functools.partial(super().forward, src, src_mask, src_key_padding_mask, is_causal)
        if src.is_nested:
            return support.run_reference("transformer_encoder_layer", "nested tensors", theirs)
        if is_dynamo_compiling() or not _is_torchs(self, TransformerEncoderLayer, "_sa_block", "_ff_block"):
            return theirs()
        # torch makes numbers of booleans here, for which MultiheadAttention doesn't take its operator for inference.
        masks = numbers(src_mask, src.dtype), numbers(src_key_padding_mask, src.dtype), is_causal
        x = src
        if self.norm_first:
            y = self.norm1(x)
            y = _attended(self.self_attn, y, y, *masks)
            y, x = plan.run_with_sum((self.dropout1, _added(x), self.norm2), y)
            return plan.run((*_feed_forward(self), self.dropout2, _added(x)), y)
        y = _attended(self.self_attn, x, x, *masks)
        x = plan.run((self.dropout1, _added(x), self.norm1), y)
        return plan.run((*_feed_forward(self), self.dropout2, _added(x), self.norm2), x)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """Self-attention, attention to an encoder's result, and a feed-forward network, each with a residual and a norm. As
    torch.nn.TransformerDecoderLayer.

    Shape: tgt (T, E), (T, N, E), or (N, T, E) with batch_first; memory the same with S; the result as tgt.
    Dtype: float16, bfloat16, float32, float64.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerDecoderLayer.html
    """

    __init__ = _building(nn.TransformerDecoderLayer)

    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        of_self = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        of_memory = memory_mask, memory_key_padding_mask, memory_is_causal
        own = not _is_torchs(self, TransformerDecoderLayer, "_sa_block", "_mha_block", "_ff_block")
        if is_dynamo_compiling() or own:
            return super().forward(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                tgt_is_causal, memory_is_causal,
            )  # fmt: skip
        x = tgt
        if self.norm_first:
            y = self.norm1(x)
            y = _attended(self.self_attn, y, y, *of_self)
            y, x = plan.run_with_sum((self.dropout1, _added(x), self.norm2), y)
            y = _attended(self.multihead_attn, y, memory, *of_memory)
            y, x = plan.run_with_sum((self.dropout2, _added(x), self.norm3), y)
            return plan.run((*_feed_forward(self), self.dropout3, _added(x)), y)
        y = _attended(self.self_attn, x, x, *of_self)
        x = plan.run((self.dropout1, _added(x), self.norm1), y)
        y = _attended(self.multihead_attn, x, memory, *of_memory)
        x = plan.run((self.dropout2, _added(x), self.norm2), y)
        return plan.run((*_feed_forward(self), self.dropout3, _added(x), self.norm3), x)


class TransformerEncoder(nn.TransformerEncoder):
    """Copies of an encoder layer, one after the other. As torch.nn.TransformerEncoder. In eval, where it turns padded
    input into nested tensors, torch's own code runs, and padded rows come out as 0.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerEncoder.html
    """


class TransformerDecoder(nn.TransformerDecoder):
    """Copies of a decoder layer, one after the other. As torch.nn.TransformerDecoder.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerDecoder.html
    """


class Transformer(nn.Transformer):
    """An encoder and a decoder. As torch.nn.Transformer.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Transformer.html
    """

    __init__ = _building(
        nn.Transformer,
        TransformerEncoderLayer=TransformerEncoderLayer,
        TransformerEncoder=TransformerEncoder,
        TransformerDecoderLayer=TransformerDecoderLayer,
        TransformerDecoder=TransformerDecoder,
    )
