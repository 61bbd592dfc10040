"""Precision and promotion, read from torch's own switches and from torch itself, at every call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

Probe = Callable[[torch.Tensor], torch.Tensor]
"""Has torch compute an operation on a (1, 1) tensor: the dtype of the result tells what autocast does to it."""

_CASTABLE = (torch.float16, torch.bfloat16, torch.float32)


# What torch.backends.cuda.matmul.fp32_precision and torch.backends.cudnn.conv.fp32_precision ask, 0.7 us sooner.
_fp32_precision = torch._C._get_fp32_precision_getter


def matmul_precision() -> str:
    """ "tf32" if torch allows it for matrix products on CUDA, else "ieee" (torch's default)."""
    return "tf32" if _fp32_precision("cuda", "matmul") == "tf32" else "ieee"


def conv_precision() -> str:
    """ "tf32" if torch allows it for convolutions in cuDNN (torch's default), else "ieee"."""
    return "tf32" if _fp32_precision("cuda", "conv") == "tf32" else "ieee"


def after_autocast(probe: Probe | None, tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which autocast, as it is now, has torch compute `probe` for a tensor of this dtype and device."""
    kind = tensor.device.type
    if probe is None or tensor.dtype not in _CASTABLE or not _autocasts(kind):
        return tensor.dtype
    ask = _ask if torch.compiler.is_compiling() else _asked  # Dynamo traces no cache, and drops what nobody uses
    return ask(probe, tensor.device, torch.get_autocast_dtype(kind), tensor.dtype)


def _autocasts(kind: str) -> bool:
    """Whether autocast is on for such devices. Some ("meta") know none, and torch raises; Dynamo would note the question."""
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def _ask(probe: Probe, device: torch.device, autocast: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    # The rule differs between devices and versions of torch, so torch is asked, once for each combination.
    with torch.no_grad(), torch.autocast(device.type, dtype=autocast, cache_enabled=False):
        return probe(torch.zeros((1, 1), device=device, dtype=dtype)).dtype


_asked = functools.lru_cache(_ask)


def autocast(probe: Probe, *tensors: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
    """The tensors in the dtypes that autocast has torch compute in, converted differentiably."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    converted: list[torch.Tensor | None] = []
    before = after = device = None
    for tensor in tensors:
        if tensor is not None:
            if tensor.dtype is not before or tensor.device != device:  # as a rule they are all the same
                before, device, after = tensor.dtype, tensor.device, after_autocast(probe, tensor)
            if after is not None and after is not before:
                tensor = _cast(tensor, after)
        converted.append(tensor)
    return converted


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.is_leaf and tensor.requires_grad and not torch.compiler.is_compiling() and _keeps(tensor.device.type):
        cast = torch.einsum("...->...", tensor)
        if cast.dtype is dtype:
            return cast
    return tensor.to(dtype)


@functools.cache
def _keeps(kind: str) -> bool:
    """Whether einsum takes part in autocast on such devices. torch keeps what autocast converted of a parameter until the
    outermost region ends, but for its own operators; of one tensor, this one returns what it was given."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::einsum", f"Autocast{kind.upper()}")
