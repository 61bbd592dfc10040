"""Precision and promotion, read from torch's own switches and from torch itself, at every call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

Probe = Callable[[torch.Tensor], torch.Tensor]
"""Has torch compute an operation on a (1, 1) tensor: the dtype of the result tells what autocast does to it."""

_CASTABLE = (torch.float16, torch.bfloat16, torch.float32)


# What torch.backends.cuda.matmul.fp32_precision and torch.backends.cudnn.conv.fp32_precision ask, 0.7 us sooner.
def matmul_precision() -> str:
    """ "tf32" if torch allows it for matrix products on CUDA, else "ieee" (torch's default)."""
    return "tf32" if torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32" else "ieee"


def conv_precision() -> str:
    """ "tf32" if torch allows it for convolutions in cuDNN (torch's default), else "ieee"."""
    return "tf32" if torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32" else "ieee"


def after_autocast(probe: Probe | None, tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which autocast, as it is now, has torch compute `probe` for a tensor of this dtype and device."""
    kind = tensor.device.type
    if probe is None or tensor.dtype not in _CASTABLE or not torch.is_autocast_enabled(kind):
        return tensor.dtype
    return _probed(probe, tensor.device, torch.get_autocast_dtype(kind), tensor.dtype)


@functools.lru_cache
def _probed(probe: Probe, device: torch.device, autocast: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    # The rule differs between devices and versions of torch, so torch is asked, once for each combination.
    with torch.no_grad(), torch.autocast(device.type, dtype=autocast, cache_enabled=False):
        return probe(torch.zeros((1, 1), device=device, dtype=dtype)).dtype


def autocast(probe: Probe, *tensors: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
    """The tensors in the dtypes that autocast has torch compute in, converted differentiably."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    return [None if t is None else t.to(after_autocast(probe, t)) for t in tensors]
