"""Which neighbours of a Sequential run as one kernel.

Fusion is data. An activation's class declares `pointwise`, its record; a layer's class that can take a record into its
epilogue declares `forward_fused(input, [(layer, record or None), ...])` and `chains`, whether it takes more than one
stage. N + M declarations, no table of pairs. Only a class that declares them itself counts, so a user's subclass is
never fused by accident.

Two declarations more, for images. `normalizes`: the class of torch's whose layer, where it only applies its running
statistics, is taken into the epilogue too. `carry(input, layers)`: what to tell each of several layers in a row, of whose
results in between nobody sees the memory format.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules import module as _torch

from ._dispatch import fused

Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class _Part:
    """Layers that run as one kernel, or as one function for autograd."""

    stages: list[tuple[torch.nn.Module, Any]] = field(default_factory=list)
    members: list[torch.nn.Module] = field(default_factory=list)
    norm: torch.nn.Module | None = None


def plan(modules: Iterable[torch.nn.Module]) -> list[Step]:
    """The steps that compute the modules in order. Made anew at every call: hooks come and go."""
    steps: list[Step] = []
    producer: Any = None  # the class of the run of layers being gathered
    parts: list[_Part] = []

    def close() -> None:
        nonlocal producer, parts
        if sum(len(part.members) for part in parts) > 1:
            steps.append(functools.partial(_run, producer, parts))
        else:
            steps.extend(member for part in parts for member in part.members)
        producer, parts = None, []

    read = _declarations if torch.compiler.is_compiling() else _remembered  # Dynamo traces no cache
    everyone_is_watched = _torch._has_any_global_hook()
    for module in modules:
        declared = read(type(module))
        record = declared.get("pointwise")
        norm = producer is not None and _normalizes(producer, module)
        fuses = norm or record is not None or "forward_fused" in declared
        alone = everyone_is_watched or not fuses or _is_watched(module)
        open_ended = not alone and producer is not None and parts[-1].stages[-1][1] is None
        if open_ended and record and record.saves == "output":
            parts[-1].stages[-1] = (parts[-1].stages[-1][0], record)
            parts[-1].members.append(module)
        elif open_ended and norm and parts[-1].norm is None:
            parts[-1].norm = module
            parts[-1].members.append(module)
        elif not alone and "forward_fused" in declared:
            if producer is not type(module) or not (declared["chains"] or "carry" in declared):
                close()
            producer = type(module)
            if not parts or not declared["chains"]:
                parts.append(_Part())
            parts[-1].stages.append((module, None))
            parts[-1].members.append(module)
        else:
            close()
            steps.append(module)
    close()
    return steps


def _declarations(kind: type) -> dict[str, Any]:
    """What a class declares itself, not one that it inherits from. (In vars(kind) Dynamo doesn't trust itself to look.)"""
    names = ("pointwise", "forward_fused", "chains", "carry", "normalizes")
    found = {name: getattr(kind, name, None) for name in names}
    return {
        name: value
        for name, value in found.items()
        if value is not None and not any(getattr(base, name, None) is value for base in kind.__bases__)
    }


_remembered = functools.cache(_declarations)


def _run(producer: Any, parts: list[_Part], input: torch.Tensor) -> torch.Tensor:
    hints: list[dict[str, Any]] = [{} for _ in parts]
    if len(parts) > 1:
        hints = producer.carry(input, [part.stages[0][0] for part in parts])
    for part, hint in zip(parts, hints, strict=True):
        if part.norm is not None:
            hint = hint | {"norm": part.norm}
        listening = fused(*part.members)
        if listening is None:
            input = producer.forward_fused(input, part.stages, **hint)
        else:
            with listening:
                input = producer.forward_fused(input, part.stages, **hint)
    return input


def _normalizes(producer: Any, module: Any) -> bool:
    """Whether the module only applies running statistics now, and nobody asks for gradients through them."""
    return (
        type(module) is getattr(producer, "normalizes", None)
        and not module.training
        and module.running_mean is not None
        and module.running_var is not None
        and not torch.is_grad_enabled()
    )


def _is_watched(module: torch.nn.Module) -> bool:
    """Whether somebody could tell that this module's __call__ wasn't called. Global hooks apart."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # as some replace it on a single instance
        or "_conv_forward" in module.__dict__
        or module._compiled_call_impl is not None
    )
