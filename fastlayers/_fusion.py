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

from . import _dispatch
from ._state import own


class Function:
    """Stands among modules for a function, which nobody can hook."""

    _forward_hooks = _forward_pre_hooks = _backward_hooks = _backward_pre_hooks = _compiled_call_impl = None

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        self.function = function

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Add(Function):
    """Of x, its sum with a residual, which `function` computes as the model would."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], residual: Any):
        super().__init__(function)
        self.residual = residual


@dataclass
class _Part:
    """Layers that run as one kernel, or as one function for autograd. Here `stages`, `members`, `norm` and `add` are their
    places in a row."""

    stages: list[tuple[int, Any]] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    norm: int | None = None
    add: int | None = None


Group = tuple[Any, list[_Part]]
"""The class of some layers in a row, and how they are joined."""


def run(modules: Iterable[Any], input: torch.Tensor) -> torch.Tensor:
    """What the modules compute, one after the other.

    Each is looked at when its turn comes, as torch does: any but ours may have hooked, patched or replaced those after it.
    Only what follows from classes is remembered.
    """
    row: list[Any] = []  # of modules that may be joined, not called yet
    last: dict[str, Any] = {}  # what was declared last
    everyone_is_watched = _everyone_is_watched()
    for module in modules:
        declared = declarations(type(module))
        last = declared or last
        joins = (
            declared
            or (type(module) is last.get("normalizes") and _only_applies_statistics(module, last))
            or (type(module) is Add and not torch.is_grad_enabled())
        )
        if joins and not everyone_is_watched and not is_watched(module):
            row.append(module)
            continue
        input = module(_run(row, input))
        row = []
        everyone_is_watched = _everyone_is_watched()
    return _run(row, input)


def _group(kinds: tuple[type, ...]) -> list[int | Group]:
    """The places of modules of these classes, each alone or in a group."""
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

    for i, kind in enumerate(kinds):
        declared = declarations(kind)
        record = declared.get("pointwise")
        norm = kind is getattr(producer, "normalizes", None)
        add = kind is Add and getattr(producer, "adds", False)
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


_grouped = functools.lru_cache(maxsize=1024)(_group)

_declared: dict[type, dict[str, Any]] = {}
"""Of classes that declare something. No others are kept: somebody may make a class for each module."""


def declarations(kind: type) -> dict[str, Any]:
    """What a class declares itself, not one that it inherits from; nothing if its `forward` was replaced since."""
    declared = _declared.get(kind)
    if declared is None:
        if getattr(kind, "pointwise", None) is None and getattr(kind, "forward_fused", None) is None:
            return {}
        declared = _declare(kind)
        if not declared:
            return {}
        if not torch.compiler.is_compiling():
            _declared[kind] = declared
    return declared if declared["forward"] is getattr(kind, "forward", None) else {}


def _declare(kind: type) -> dict[str, Any]:
    # In vars(kind) Dynamo doesn't trust itself to look.
    names = ("pointwise", "forward_fused", "chains", "carry", "normalizes", "adds")
    found = {name: getattr(kind, name, None) for name in names}
    declared = {
        name: value
        for name, value in found.items()
        if value is not None and not any(getattr(base, name, None) is value for base in kind.__bases__)
    }
    if declared:
        declared["forward"] = getattr(kind, "forward", None)
    if "normalizes" in declared:
        declared["normalize"] = declared["normalizes"].forward
    return declared


def _run(row: Sequence[Any], input: torch.Tensor) -> torch.Tensor:
    """Modules in a row, none of which is watched."""
    if not row:
        return input
    group = _group if torch.compiler.is_compiling() else _grouped  # Dynamo traces no cache
    for found in group(tuple(map(type, row))):
        input = row[found](input) if isinstance(found, int) else _run_group(row, *found, input)
    return input


def _run_group(row: Sequence[Any], producer: Any, parts: list[_Part], input: torch.Tensor) -> torch.Tensor:
    hints: list[dict[str, Any]] = [{}] * len(parts)
    if len(parts) > 1 and not any(part.add is not None for part in parts[:-1]):  # a sum may be in the residual's format
        hints = producer.carry(input, [row[part.stages[0][0]] for part in parts])
    for part, hint in zip(parts, hints, strict=True):
        stages = [(row[i], record) for i, record in part.stages]
        if part.norm is not None:
            hint = hint | {"norm": row[part.norm]}
        if part.add is not None:
            hint = hint | {"residual": row[part.add].residual, "add": row[part.add].function}
        listening = _dispatch.fused(*[row[i] for i in part.members])
        if listening is None:
            input = producer.forward_fused(input, stages, **hint)
        else:
            with listening:
                input = producer.forward_fused(input, stages, **hint)
    return input


def _only_applies_statistics(module: Any, declared: dict[str, Any]) -> bool:
    """Whether a batch normalisation only applies its running statistics now, and nobody asks for gradients through them."""
    kind = type(module)
    return (
        not module.training
        and not torch.is_grad_enabled()
        and declared["normalize"] is kind.forward
        and own(module, "running_mean", kind) is not None
        and own(module, "running_var", kind) is not None
    )


def _everyone_is_watched() -> bool:
    """Whether somebody sees the calls of all modules: a global hook, a patch of Module.__call__ (torch.fx's, say), or
    torch.jit, which compares what it sees at one call with the next, and with gradients with without."""
    if _torch._has_any_global_hook():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch.nn.Module.__call__ is not _dispatch.module_call or torch._C._get_tracing_state() is not None


def is_watched(module: Any) -> bool:
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
