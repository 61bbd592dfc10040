"""What autocast makes of an operation, asked of the installed torch: the rule differs between devices and versions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _torch

Probe = Callable[[torch.Tensor], torch.Tensor]
"""Has torch compute an operation on a (1, 1) tensor: the dtype of the result tells what autocast does to it."""

_CASTABLE = (torch.float16, torch.bfloat16, torch.float32)


def dtype_after(probe: Probe | None, tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which autocast, as it is now, has torch compute `probe` for a tensor of this dtype and device."""
    kind = tensor.device.type
    if probe is None or tensor.dtype not in _CASTABLE or not _is_on(kind):
        return tensor.dtype
    ask = _ask if torch.compiler.is_compiling() else _asked  # Dynamo traces no cache, and drops what nobody uses
    return ask(probe, tensor.device, torch.get_autocast_dtype(kind), tensor.dtype)


def _is_on(kind: str) -> bool:
    """Whether autocast is on for such devices. Some ("meta") know none, and torch raises; Dynamo would note the question."""
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def _ask(probe: Probe, device: torch.device, autocast: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    with torch.no_grad(), torch.autocast(device.type, dtype=autocast, cache_enabled=False):
        return probe(torch.zeros((1, 1), device=device, dtype=dtype)).dtype


_asked = functools.lru_cache(_ask)


def convert(probe: Probe, tensors: Sequence[Any]) -> Sequence[Any]:
    """The tensors in the dtypes that autocast has torch compute in, converted differentiably."""
    if not _torch.any_autocast():
        return tensors
    converted: list[Any] = []
    before = after = device = None
    for tensor in tensors:
        if tensor is not None:
            if tensor.dtype is not before or tensor.device != device:  # as a rule they are all the same
                before, device, after = tensor.dtype, tensor.device, dtype_after(probe, tensor)
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
    """Whether torch's cache keeps what autocast converts of a parameter in einsum until the outermost region ends. The cache
    serves torch's own operators alone; of one tensor, einsum returns what it was given."""
    return _torch.autocast_keeps_casts(kind)
