"""What other packages' registries take. None of these packages is imported here: whoever has one registers what is theirs.

Transformers (tried with 5.24). The mask function is registered as well: without it models make no mask, neither of padding nor
of a sliding window.

    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("fastlayers", fastlayers.integrations.attention_forward)
    AttentionMaskInterface.register("fastlayers", AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation("fastlayers")  # and back: "sdpa"

Rotary embedding: each of transformers' model files has its own function for it, which the attention layers call by name.
`replace_rotary` replaces that function.

    handle = fastlayers.integrations.replace_rotary(model)  # and back: handle.remove()

torch's registry of flash attention: `scaled_dot_product_attention` runs on our kernels wherever torch chooses flash attention
(float16 or bfloat16, no mask; is_causal with as many queries as keys). Unlike `fastlayers.patched` this replaces the
operators underneath, so that it also holds for code that was compiled before.

    fastlayers.integrations.register_flash_attention_impl()
    torch.nn.attention.activate_flash_attention_impl("fastlayers")
    torch.nn.attention.restore_flash_attention_impl()  # and back
"""

from __future__ import annotations

import inspect
import types
from typing import TYPE_CHECKING, Any

import torch

from . import _kernels, draws
from .fusion import rotary
from .fusion.rotary import apply_rotary_pos_emb
from .ops.attention import scaled_dot_product_attention

if TYPE_CHECKING or _kernels.MISSING is None:
    from .kernels.attention import launchers as kernels

__all__ = ["Replaced", "apply_rotary_pos_emb", "attention_forward", "register_flash_attention_impl", "replace_rotary"]


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
    torch's function, and `fastlayers.explain` tells why. A `position_bias` may require grad, as T5 trains it.
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


def register_flash_attention_impl() -> None:
    """Register our kernels with torch.nn.attention as the flash attention implementation "fastlayers". They are used from
    `activate_flash_attention_impl("fastlayers")` until `restore_flash_attention_impl()`.

    Then torch's operators _scaled_dot_product_flash_attention and its backward are ours on CUDA. Nested tensors and varlen_attn
    have operators of their own, which stay torch's. Dropout chooses other weights than torch. Not run on a GPU yet.

    Raises:
        RuntimeError: without triton.
    """
    if _kernels.MISSING is not None:
        raise RuntimeError(_kernels.MISSING)
    torch.nn.attention.register_flash_attention_impl("fastlayers", register_fn=FlashAttention)


class FlashAttention:
    """Our kernels as torch's operators, from its making until `remove`. torch's registry keeps it meanwhile.

    Args:
        device_type: "CUDA", or for tests "CPU", where torch has no kernels for these operators.
    """

    def __init__(self, device_type: str = "CUDA"):
        self.library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        name = "_scaled_dot_product_flash_attention"
        self.library.impl(name, _flash_forward, device_type)
        self.library.impl(f"{name}_backward", _flash_backward, device_type)

    def remove(self) -> None:
        self.library = None  # what it has registered goes with it


def _flash_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The result, the logarithm of each query's sum of exponentials, and what torch's kernels return besides."""
    if return_debug_mask:
        raise RuntimeError("fastlayers' flash attention has no debug mask")
    output = torch.empty_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    state = query.new_zeros(2, dtype=torch.int64)
    if dropout_p > 0:
        state[:1] = draws.seed(query.device)
    kernels.attention(
        query, key, value, None, state[:1] if dropout_p > 0 else None, output, lse,
        causal=is_causal, dropout=dropout_p, scale=scale, precision="ieee",
    )  # fmt: skip
    lse *= kernels.lse_factor(query.shape[-1], scale)
    offset = query.new_zeros((), dtype=torch.int64)
    state, offset = state.view(torch.uint64), offset.view(torch.uint64)
    return output, lse, None, None, query.shape[2], key.shape[2], state, offset, query.new_empty(0)


def _flash_backward(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    logsumexp: torch.Tensor, cum_seq_q: Any, cum_seq_k: Any, max_q: int, max_k: int, dropout_p: float,
    is_causal: bool, philox_seed: torch.Tensor, philox_offset: Any, *, scale: float | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The gradients of query, key and value."""
    grads = [torch.empty_like(t) for t in (query, key, value)]
    seed = philox_seed.view(torch.int64)[:1] if dropout_p > 0 else None
    kernels.attention_grad(
        grad_out, query, key, value, None, seed, out, logsumexp / kernels.lse_factor(query.shape[-1], scale), *grads,
        causal=is_causal, dropout=dropout_p, scale=scale, precision="ieee",
    )  # fmt: skip
    return (*grads,)


class Replaced:
    """Functions that were replaced, as "module.name" in `names`. `remove()`, or the end of a `with` block, puts them back."""

    def __init__(self, functions: list[tuple[dict[str, Any], str, Any, Any]]):
        self._functions = functions
        self.names = tuple([f"{space['__name__']}.{name}" for space, name, _, _ in functions])

    def remove(self) -> None:
        """Put back what was there. What somebody else has put in our place meanwhile stays."""
        for space, name, theirs, ours in self._functions:
            if space.get(name) is ours:
                space[name] = theirs

    def __enter__(self) -> Replaced:
        return self

    def __exit__(self, *args: object) -> None:
        self.remove()


def replace_rotary(model: torch.nn.Module) -> Replaced:
    """Have this model's attention layers call our rotary embedding: in place of each global function that the forward of one of
    its modules calls, that takes `cos` and `sin` after two tensors, and that computes rotary embedding.

        with fastlayers.integrations.replace_rotary(model) as replaced:
            train(model)
        print(replaced.names)  # transformers.models.llama.modeling_llama.apply_rotary_pos_emb

    A function is recognised by what its source computes of small tensors, which shows which features it pairs. Calls with other
    arguments than q, k, cos, sin and unsqueeze_dim go to the original function. Models of the same file share the function,
    so they change too. Tried with transformers 5.24 without the `kernels` package.

    Returns:
        a handle with the `names` of the replaced functions, empty if none was found, and `remove()`.
    """
    found: list[tuple[dict[str, Any], str, Any, Any]] = []
    for cls in dict.fromkeys([type(module) for module in model.modules()]):
        forward: Any = inspect.unwrap(cls.forward)
        for name in forward.__code__.co_names if isinstance(forward, types.FunctionType) else ():
            function = forward.__globals__.get(name)
            if isinstance(function, types.FunctionType):
                ours = rotary.ours(function)
                if ours is not None:
                    found.append((forward.__globals__, name, function, ours))
                    forward.__globals__[name] = ours
    return Replaced(found)
