"""Which neighbours of a Sequential run as one kernel.

Fusion is data. An activation's class declares `pointwise`, its record; a layer's class that can take a record into its
epilogue declares `forward_fused(input, [(layer, record or None), ...])` and `chains`, whether it takes more than one
stage. N + M declarations, no table of pairs. Only a class that declares them itself counts, so a user's subclass is
never fused by accident.

Three declarations more, for images. `normalizes`: the class of torch's whose layer, where it only applies its running
statistics, is taken into the epilogue too. `adds`: whether an `Add` is. `carry(input, layers)`: what to tell each of several
layers in a row, of whose results in between nobody sees the memory format.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules import module as _torch

from ._dispatch import fused
from ._state import own

Step = Callable[[torch.Tensor], torch.Tensor]


class Function:
    """Stands among modules for a function, which nobody can hook."""

    _forward_hooks = _forward_pre_hooks = _backward_hooks = _backward_pre_hooks = _compiled_call_impl = None


class Add(Function):
    """x + residual."""

    def __init__(self, residual: Any):
        self.residual = residual

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.residual


@dataclass
class _Part:
    """Layers that run as one kernel, or as one function for autograd. Here `stages`, `members`, `norm` and `add` are their
    places in the Sequential."""

    stages: list[tuple[int, Any]] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    norm: int | None = None
    add: int | None = None


Group = tuple[Any, list[_Part]]
"""The class of some layers in a row, and how they are joined."""


def plan(modules: Iterable[Any]) -> list[Step]:
    """The steps that compute the modules in order. What follows from their classes is remembered; whether somebody watches
    one is asked at every call: hooks come and go."""
    modules = tuple(modules)
    compiling = torch.compiler.is_compiling()  # Dynamo traces no cache
    read, group = (declarations, _groups.__wrapped__) if compiling else (_remembered, _groups)
    everyoneis_watched = _torch._has_any_global_hook()
    normalizes: type | None = None
    kinds: list[type] = []
    joins: list[bool] = []
    for module in modules:
        kind = type(module)
        declared = read(kind)
        normalizes = declared.get("normalizes", normalizes)
        fuses = len(declared) > 0 or (kind is normalizes and _only_applies_statistics(module))
        fuses = fuses or (kind is Add and not torch.is_grad_enabled())
        kinds.append(kind)
        joins.append(fuses and not everyoneis_watched and not is_watched(module))
    return [
        modules[found] if isinstance(found, int) else functools.partial(_run, modules, *found)
        for found in group(tuple(kinds), tuple(joins))
    ]


@functools.lru_cache(maxsize=1024)
def _groups(kinds: tuple[type, ...], joins: tuple[bool, ...]) -> list[int | Group]:
    """The places of modules of these classes, each alone or in a group; `joins` says which may be in one."""
    groups: list[int | Group] = []
    producer: Any = None  # the class of the run of layers being gathered
    parts: list[_Part] = []

    def close() -> None:
        nonlocal producer, parts
        if sum(len(part.members) for part in parts) > 1:
            groups.append((producer, parts))
        else:
            groups.extend(member for part in parts for member in part.members)
        producer, parts = None, []

    for i, (kind, joined) in enumerate(zip(kinds, joins, strict=True)):
        declared = declarations(kind) if joined else {}
        record = declared.get("pointwise")
        norm = joined and kind is getattr(producer, "normalizes", None)
        add = joined and kind is Add and getattr(producer, "adds", False)
        open_ended = producer is not None and parts[-1].stages[-1][1] is None
        if open_ended and record is not None and record.saves == "output":
            parts[-1].stages[-1] = (parts[-1].stages[-1][0], record)
            parts[-1].members.append(i)
        elif open_ended and norm and parts[-1].norm is parts[-1].add is None:
            parts[-1].norm = i
            parts[-1].members.append(i)
        elif open_ended and add and parts[-1].add is None:
            parts[-1].add = i
            parts[-1].members.append(i)
        elif "forward_fused" in declared:
            if producer is not kind or not (declared["chains"] or "carry" in declared):
                close()
            producer = kind
            if not parts or not declared["chains"]:
                parts.append(_Part())
            parts[-1].stages.append((i, None))
            parts[-1].members.append(i)
        else:
            close()
            groups.append(i)
    close()
    return groups


def declarations(kind: type) -> dict[str, Any]:
    """What a class declares itself, not one that it inherits from. (In vars(kind) Dynamo doesn't trust itself to look.)"""
    names = ("pointwise", "forward_fused", "chains", "carry", "normalizes", "adds")
    found = {name: getattr(kind, name, None) for name in names}
    return {
        name: value
        for name, value in found.items()
        if value is not None and not any(getattr(base, name, None) is value for base in kind.__bases__)
    }


_remembered = functools.cache(declarations)


def _run(modules: Sequence[Any], producer: Any, parts: list[_Part], input: torch.Tensor) -> torch.Tensor:
    hints: list[dict[str, Any]] = [{}] * len(parts)
    if len(parts) > 1:
        hints = producer.carry(input, [modules[part.stages[0][0]] for part in parts])
    for part, hint in zip(parts, hints, strict=True):
        stages = [(modules[i], record) for i, record in part.stages]
        if part.norm is not None:
            hint = hint | {"norm": modules[part.norm]}
        if part.add is not None:
            hint = hint | {"residual": modules[part.add].residual}
        listening = fused(*[modules[i] for i in part.members])
        if listening is None:
            input = producer.forward_fused(input, stages, **hint)
        else:
            with listening:
                input = producer.forward_fused(input, stages, **hint)
    return input


def _only_applies_statistics(module: Any) -> bool:
    """Whether a batch normalisation only applies its running statistics now, and nobody asks for gradients through them."""
    return (
        not module.training
        and not torch.is_grad_enabled()
        and own(module, "running_mean", type(module)) is not None
        and own(module, "running_var", type(module)) is not None
    )


def is_watched(module: torch.nn.Module) -> bool:
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
