"""What other packages' registries take. None of these packages is imported here: whoever has one registers what is theirs.

Transformers (tried with 5.24). The mask function is registered as well: without it models make no mask, neither of padding nor
of a sliding window.

    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("fastlayers", fastlayers.integrations.attention_forward)
    AttentionMaskInterface.register("fastlayers", AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation("fastlayers")  # and back: "sdpa"
"""

from __future__ import annotations

from typing import Any

import torch

from .ops.attention import scaled_dot_product_attention

__all__ = ["attention_forward"]


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`fastlayers.functional.scaled_dot_product_attention` for transformers' AttentionInterface, in the place of its "sdpa".

    Without a mask, more than one query attends as `is_causal` says or, where that is None, `module.is_causal` (True if there is
    no such attribute). Heads that share keys aren't repeated, with a mask or without one. What the kernels don't take goes to
    torch's function, and `fastlayers.explain` tells why: a `position_bias` that requires grad, for instance, as T5 trains it.
    Dropout chooses other weights than torch. Other keyword arguments are ignored: a sliding window is in the mask.

    Shape: query (B, H, L, E), key (B, G, S, E) and value (B, G, S, Ev), where G is H / module.num_key_value_groups if the module
        has that attribute and H if not; attention_mask expands to (B, H, L, S) and position_bias to (B, H, L, S), of the mask
        the first S keys count -> (B, L, H, Ev), contiguous, and None in the place of the weights.
    Dtype: as scaled_dot_product_attention. A mask is bool, True where a query attends, or is added to the scores, as
        position_bias is.
    Raises:
        ValueError: `softcap` or `output_attentions`, which only "eager" has.
    """
    if kwargs.get("softcap") is not None:
        raise ValueError('"fastlayers" attention has no softcap: use attn_implementation="eager"')
    if kwargs.get("output_attentions"):
        raise ValueError('"fastlayers" attention never holds the weights: for output_attentions use "eager"')
    queries, keys = query.shape[2], key.shape[2]
    causal = False
    if attention_mask is not None:
        attention_mask = attention_mask[..., :keys]
    elif queries > 1:  # a single one is the newest, after all keys
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if causal and keys > queries:  # of a cache that is longer than what it holds, the rest is never attended to
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    if position_bias is not None:
        attention_mask, causal = _biased(position_bias, attention_mask, causal, query, key), False
    output = scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, causal,
        scale=scaling, enable_gqa=getattr(module, "num_key_value_groups", 1) > 1,
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


def _biased(
    bias: torch.Tensor, mask: torch.Tensor | None, causal: bool, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    """One mask that is added to the scores."""
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        # Not -inf: a query that may attend to nothing attends to everything alike, as in transformers.
        bias = torch.where(mask, bias, torch.finfo(key.dtype).min)
    elif mask is not None:
        bias = bias + mask
    return bias.contiguous()
