"""`patched`: programs that import torch.nn get our layers and functions, with no line changed. See docs/decisions/0013.

`isinstance(m, torch.nn.Linear)` is true of our layers too, since they are subclasses. `type(m) is torch.nn.Linear` isn't, and a
dictionary keyed by torch's classes doesn't have ours.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from . import _originals, _torch_functional
from .catalog import CLASSES
from .convert import to_ours, why_not_ours
from .dispatch import tally
from .dispatch.tally import Tally

_lock = threading.Lock()
_blocks: list[Tally] = []
"""The tallies of all blocks that are on."""
_init: Any = None
"""Our replacement of torch.nn.Module.__init__ while a block is on, else None."""
_OURS, _LAYERS = {*CLASSES.values()}, tuple(CLASSES)
"""Our classes, and those of torch that they replace."""
_CONTAINERS = {torch.nn.Module, *[getattr(torch.nn, name) for name in torch.nn.modules.container.__all__]}
_NAMING: list[Any] = [
    cls.__init__
    for cls in {getattr(torch.nn, name) for name in torch.nn.modules.__all__}
    if any([inspect.isroutine(value) and value in _originals.ours_for for value in cls.__init__.__defaults__ or ()])
]
"""Constructors of torch.nn that have such a function as a default. They compare their argument with it, so it is replaced too."""


def _building(before: Any) -> Any:
    """torch.nn.Module.__init__, which every module's constructor calls first, with one step more: a module of exactly one of
    torch's classes that we have becomes ours."""

    @functools.wraps(before)
    def init(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        if init is _init:  # no longer so where other code has kept it from an earlier block
            _built(self)

    return init


def _built(module: torch.nn.Module) -> None:
    cls = type(module)
    reason = why_not_ours(module)
    if reason is None:
        to_ours(module)
    for counted in _blocks:
        if reason is None or cls in _OURS:
            counted.layers[cls.__name__] += 1
        elif issubclass(cls, _LAYERS) or (cls.__module__.startswith("torch.nn.") and cls not in _CONTAINERS):
            counted.torchs[cls.__name__, reason] += 1


@contextlib.contextmanager
def patched() -> Iterator[Tally]:
    """Have torch.nn build our layers, and torch.nn.functional's functions be ours, until the end of the block. Also a decorator.

        with fastlayers.patched() as ran:
            model = Net()  # whatever it imports from torch.nn, and wherever
            train(model)
        print(ran)  # layers, kernels launched, and what torch's functions took, and why

    torch.nn's classes stay what they are, so that `isinstance`, subclasses and earlier imports go on as ever. Layers that were
    built in the block stay ours behind it, until `fastlayers.restore`. All this holds for the whole process; blocks may be nested
    and overlap in several threads, and the last one that ends puts back what was there.

    What stays torch's: layers that were built before (see `accelerate`), or are made without a constructor, as by a pickle;
    functions that were imported by name before (`from torch.nn.functional import relu`), and those that have other names
    (`torch.relu`, a tensor's methods); what the program itself has put into torch.nn.functional; and what other processes do,
    unless they are forked. A subclass that the program writes stays a subclass of torch's; where its forward calls functions of
    torch.nn.functional, they are ours. torch.jit.script can't compile what calls our functions or layers.

    Yields:
        What was counted in the block: `layers` and `torchs`, `kernels` and `left`. Prints as a table.
    """
    counted = Tally()
    try:
        with _lock:
            _blocks.append(counted)
            tally.start(counted)
            _put()
        yield counted
    finally:
        with _lock:
            _blocks[:] = [other for other in _blocks if other is not counted]
            tally.stop(counted)
            if not _blocks:
                _put_back()


def _put() -> None:
    global _init
    if _init is None:
        _init = _building(torch.nn.Module.__init__)
        torch.nn.Module.__init__ = _init
    for name, ours in _originals.stand_ins.items():
        if getattr(F, name) is getattr(_torch_functional, name):
            setattr(F, name, ours)
    _replace_defaults(_originals.ours_for)


def _put_back() -> None:
    """Undo our replacements, but for those that other code has replaced again."""
    global _init
    if _init is not None and torch.nn.Module.__init__ is _init:
        torch.nn.Module.__init__ = _init.__wrapped__
    _init = None
    for name, ours in _originals.stand_ins.items():
        if getattr(F, name) is ours:
            setattr(F, name, getattr(_torch_functional, name))
    _replace_defaults({ours: theirs for theirs, ours in _originals.ours_for.items()})


def _replace_defaults(by: dict[Any, Any]) -> None:
    for constructor in _NAMING:
        values = constructor.__defaults__
        constructor.__defaults__ = tuple([by.get(v, v) if inspect.isroutine(v) else v for v in values])
