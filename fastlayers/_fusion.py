"""Which neighbours of a Sequential run as one kernel.

Fusion is data. An activation's class declares `pointwise`, its record; a layer's class that can take a record into its
epilogue declares `forward_fused(input, [(layer, record or None), ...])` and `chains`, whether it takes more than one
stage. N + M declarations, no table of pairs. Only a class that declares them itself counts, so a user's subclass is
never fused by accident.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn.modules import module as _torch

from ._dispatch import fused

Step = Callable[[torch.Tensor], torch.Tensor]

_PATCHED = frozenset({"forward", "_conv_forward"})
"""Methods that people replace on a single instance."""


def plan(modules: Iterable[torch.nn.Module]) -> list[Step]:
    """The steps that compute the modules in order. Made anew at every call: hooks come and go."""
    steps: list[Step] = []
    producer: Any = None  # the class of the run of layers being gathered
    stages: list[tuple[torch.nn.Module, Any]] = []
    members: list[torch.nn.Module] = []

    def close() -> None:
        nonlocal producer, stages, members
        if len(members) > 1:
            steps.append(functools.partial(_run, producer, stages, members))
        else:
            steps.extend(members)
        producer, stages, members = None, [], []

    everyone_is_watched = _torch._has_any_global_hook()
    for module in modules:
        declared = vars(type(module))
        record = declared.get("pointwise")
        fuses = record is not None or "forward_fused" in declared
        alone = everyone_is_watched or not fuses or _is_watched(module)
        if not alone and producer and record and record.saves == "output" and stages[-1][1] is None:
            stages[-1] = (stages[-1][0], record)
            members.append(module)
        elif not alone and "forward_fused" in declared:
            if producer is not type(module) or not declared["chains"]:
                close()
            producer = type(module)
            stages.append((module, None))
            members.append(module)
        else:
            close()
            steps.append(module)
    close()
    return steps


def _run(
    producer: Any, stages: list[tuple[torch.nn.Module, Any]], members: list[torch.nn.Module], input: torch.Tensor
) -> torch.Tensor:
    listening = fused(*members)
    if listening is None:
        return producer.forward_fused(input, stages)
    with listening:
        return producer.forward_fused(input, stages)


def _is_watched(module: torch.nn.Module) -> bool:
    """Whether somebody could tell that this module's __call__ wasn't called. Global hooks apart."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or not _PATCHED.isdisjoint(vars(module))
        or module._compiled_call_impl is not None
    )
