"""`explain`: which path every layer of a call took, and why."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .. import _torch
from .._kernels import launch
from .table import columns


@dataclass(frozen=True)
class Decision:
    """One call of the operation `op`: its `path` is "triton", and `kernels` says what was launched, or "torch", and `reason`
    says why.

    `module` is the module's name within the model ("" for a bare function); fused neighbours are joined by " + ".
    """

    module: str
    op: str
    path: Literal["triton", "torch"]
    reason: str | None = None
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """What `explain` saw: the decisions in the order of the calls. Prints as a table."""

    decisions: tuple[Decision, ...]

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def __str__(self) -> str:
        rows = [("layer", "operation", "path", "kernels, or why not")]
        rows += [(d.module or "-", d.op, d.path, d.reason or ", ".join(d.kernels) or "nothing to do") for d in self]
        return columns(*rows)


class _Launched(list[str]):
    """What one thread launches."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def append(self, line: str) -> None:
        if threading.get_ident() == self._thread:
            super().append(line)


@dataclass
class Recorder:
    """Collects the decisions while `explain` runs its target."""

    names: dict[int, str]
    """The path of each module, by its id."""
    decisions: list[Decision] = field(default_factory=list)
    thread: int = field(default_factory=threading.get_ident)
    """The thread that `explain` runs in. Calls of other threads are ignored."""
    _stack: list[str] = field(default_factory=list)

    @property
    def module(self) -> str:
        """The path of the module that is being called."""
        return self._stack[-1] if self._stack else ""

    def name(self, layer: Any) -> str:
        """The path of a module. A function among layers that run as one call has a `label` instead."""
        return getattr(layer, "label", None) or self.names.get(id(layer), type(layer).__name__)

    def listens(self) -> bool:
        """Whether the calling thread is the one that `explain` runs in."""
        return threading.get_ident() == self.thread

    def fell_back(self, op: str, reason: str) -> None:
        """Note that torch's function took a call."""
        if self.listens():
            self.decisions.append(Decision(self.module, op, "torch", reason))

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Within, calls are attributed to this module."""
        if not self.listens():
            yield
            return
        self._stack.append(name)
        try:
            yield
        finally:
            self._stack.pop()

    def launching(self, op: str, call: Callable[[], Any]) -> Any:
        """Make a call that runs on kernels, note which ones it launches, and return its result."""
        if not self.listens():
            return call()
        launch.trace = launched = _Launched()
        try:
            result = call()
        finally:
            launch.trace = None
        self.decisions.append(Decision(self.module, op, "triton", None, tuple(launched)))
        return result


recorder: Recorder | None = None
"""The recorder while `explain` runs its target, else None."""
_lock = threading.Lock()
"""Held while `explain` runs its target."""

module_call: Any = _torch.module_call
"""torch.nn.Module.__call__ as torch defines it, or the function that `explain` puts in its place while it runs."""


def fused(*modules: Any) -> contextlib.AbstractContextManager[None]:
    """Within, calls are attributed to all of these modules, which run as one call."""
    if recorder is None:
        return contextlib.nullcontext()
    return recorder.inside(" + ".join([recorder.name(m) for m in modules]))


def explain(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Run `target(*args, **kwargs)` once and tell which path every layer took, and why.

    Shape, Dtype: whatever `target` takes.
    Args:
        target: a module, or any function that calls layers or `fastlayers.functional`.
    Raises:
        TypeError: a target that can't be called.
        RuntimeError: when called within itself, and whatever `target` raises.

    It tells what the calling thread does. Other threads may call modules meanwhile; those that explain wait.
    """
    if not callable(target):
        raise TypeError(f"explain takes a module or a function, not {type(target).__name__}")
    return explain_within(target if isinstance(target, torch.nn.Module) else None, lambda: target(*args, **kwargs))


def explain_within(module: torch.nn.Module | None, call: Callable[[], Any]) -> Explanation:
    """As `explain`, of a call in which modules have their paths in `module`."""
    if recorder is not None and recorder.listens():
        raise RuntimeError("explain can't be called within explain")
    with _lock:
        return _explain(module, call)


def _explain(module: torch.nn.Module | None, target: Callable[[], Any]) -> Explanation:
    global recorder, module_call
    named = module.named_modules(remove_duplicate=True) if module is not None else ()
    found = Recorder({id(m): name or type(m).__name__ for name, m in named})
    call = torch.nn.Module.__call__

    # Not a hook: a layer with hooks isn't fused, and explaining must not change what is explained.
    def recording_call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if recorder is not found or not found.listens():
            return call(self, *args, **kwargs)
        before = len(found.decisions)
        with found.inside(found.name(self)):
            result = call(self, *args, **kwargs)
            if len(found.decisions) == before:  # none of ours was called within either
                name = type(self).__name__
                package = "torch.nn." if type(self).__module__.startswith("torch.nn.") else ""
                found.fell_back(name, f"{package}{name} is not one of our layers")
        return result

    ordinary = module_call
    if call is ordinary:
        module_call = recording_call
    recorder = found
    torch.nn.Module.__call__ = recording_call  # type: ignore[method-assign]
    try:
        target()
    finally:
        torch.nn.Module.__call__ = call  # type: ignore[method-assign]
        recorder, module_call = None, ordinary
    return Explanation(tuple(found.decisions))
