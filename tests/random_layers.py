"""Layers that draw random numbers, beside torch's. On a CPU torch draws other ones, so what is compared is all else: ours draws
under one seed at every call, and torch's layer is replaced by torch's recipe (aten's Dropout.cpp) with the mask that ours drew.
That the mask is the right one, tests/test_dropout.py says.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch

_masks: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, torch.Tensor]] = weakref.WeakKeyDictionary()
"""By layer, the mask of every kind of input that it was given, and by shape that of the last one."""
_states: list[Any] = []
"""The generators' states before the calls that haven't ended yet."""


def _seed(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
    _states.append((torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []))
    torch.manual_seed(1)
    _mask(module, args[0])
    torch.manual_seed(1)


def _restore(module: torch.nn.Module, args: tuple[Any, ...], result: Any) -> None:
    cpu, gpus = _states.pop()
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(gpus) if gpus else None


def _mask(module: torch.nn.Module, x: torch.Tensor) -> None:
    """Note which elements the layer keeps of such an input: infinity times 0 is NaN."""
    if x.device.type == "meta" or x.numel() == 0:
        return
    masks = _masks.setdefault(module, {})
    key = x.dtype, x.shape, x.stride(), x.data_ptr() % 16
    if key not in masks:
        memory = torch.full(
            (x.untyped_storage().nbytes() // x.element_size(),), math.inf, dtype=x.dtype, device=x.device
        )
        probe = memory.as_strided(x.shape, x.stride(), x.storage_offset())
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            masks[key] = ~type(module).forward(module, probe).isnan()
    masks[x.shape] = masks[key]


def seeded(module: torch.nn.Module) -> torch.nn.Module:
    """The layer, which draws the same numbers at every call; torch's generator stays as it is."""
    module.register_forward_pre_hook(_seed)
    module.register_forward_hook(_restore, always_call=True)
    return module


class Recipe:
    """What torch computes in the place of `theirs` with the mask of `ours`."""

    def __init__(self, ours: torch.nn.Module, theirs: torch.nn.Module):
        self.ours, self.theirs = ours, theirs

    def __deepcopy__(self, memo: Any) -> Recipe:
        return self  # a copy in another dtype takes the same mask

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0 or not self.theirs.training:
            return type(self.theirs).forward(self.theirs, x)
        if x.shape not in _masks.get(self.ours, {}):
            with torch.no_grad():
                self.ours(x.clone(memory_format=torch.preserve_format))
        return recipe(self.theirs, x, _masks[self.ours][x.shape])


def recipe(layer: Any, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """torch's result for this layer of torch's, given which elements are kept."""
    name, p = type(layer).__name__, layer.p
    first = {"Dropout1d": x.dim() - 1, "Dropout3d": x.dim() - 3, "Dropout2d": 2, "FeatureAlphaDropout": 2}
    for d in range(first.get(name, x.dim()), x.dim()):
        kept = kept.narrow(d, 0, 1)
    noise = kept.to(x.dtype)
    if "Alpha" not in name:
        noise = noise / (1 - p)
        return x.mul_(noise) if layer.inplace else x * noise
    alpha = 1.7580993408473766
    a = 1 / math.sqrt((alpha * alpha * p + 1) * (1 - p))
    return x * (noise * a) + (noise - 1) * (alpha * a) + alpha * a * p


def tie(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Have both drop the same elements from now on."""
    seeded(ours)
    theirs.forward = Recipe(ours, theirs)
