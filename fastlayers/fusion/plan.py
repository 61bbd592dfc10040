"""Fusion is data. A layer stands for a value, which says all that a fused call needs to know of it beside its tensors; what may
be joined is a pattern over the roles of values, with the function that runs it.

    Linear(...)        Value("linear")
    LeakyReLU(0.1)     Value("activation", Activation("leaky_relu", (0.1,)))

    "(linear (activation )?)+"     fastlayers/fusion/linear.py

The catalog says which classes have which role, and which patterns there are. Sequential and `fuse` share the rest.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from .. import _originals, _torch
from ..dispatch import explain


class Value(NamedTuple):
    """What one layer stands for. It is asked for at every call, since a layer's options may have changed."""

    role: str
    what: Any = None


PASSES: Any = object()
"""What a role's `of` says of a layer that returns its very input now, as a dropout does in eval. Rows run without it."""


class Role:
    """What layers of a class stand for.

    Args:
        name: "linear", "conv", "activation", "batch_norm", "layer_norm", ...
        what: what else a fused call must know of a layer beside its tensors, the same for all layers of the class ...
        of: ... or a function of the layer that says it; None from it: this layer keeps to itself.
        joins: whether this layer may be joined now. Always, by default.
    """

    def __init__(
        self,
        name: str,
        what: Any = None,
        of: Callable[[Any], Any] | None = None,
        joins: Callable[[Any], bool] | None = None,
    ):
        self.name, self.of, self.joins, self.same = name, of, joins, Value(name, what)

    def value(self, layer: Any) -> Value | None:
        """This layer's value; None while it keeps to itself."""
        if self.joins is not None and not self.joins(layer):
            return None
        if self.of is None:
            return self.same
        what = self.of(layer)
        if what is PASSES:
            return _PASSED
        return None if what is None else Value(self.name, what)


_PASSED = Value("passed")


class Residual(NamedTuple):
    """Stands in a row of layers for the addition of a residual; `function` computes the sum as the model would."""

    tensor: Any
    function: Callable[[torch.Tensor], torch.Tensor]
    inplace: bool = False
    """Whether the model writes the sum into x, which others may look at."""

    @property
    def label(self) -> str:
        return "add"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Pattern(NamedTuple):
    """Roles in a row that run as one call."""

    roles: str
    """A regular expression over the roles' names, each followed by a blank."""
    run: Callable[[torch.Tensor, Sequence[Any], Sequence[Value]], Any]
    """Computes what the layers compute, given the input, the layers and their values. Where the kernels don't take the row whole,
    it runs fewer of the layers as one, and the others alone."""
    sum_is_result: bool = False
    """`run` returns the sum that the row begins with as well, which may have other consumers: (result, sum)."""


class _Entry(NamedTuple):
    role: Role
    forward: Any
    """The class's forward when it was registered. A class whose forward was replaced since isn't joined."""
    originals: _originals.Originals
    """The same of the class of torch's that it is, or is a subclass of, and of the functions which that calls."""
    is_module: bool


_entries: dict[type, _Entry] = {}
_patterns: list[tuple[re.Pattern[str], Pattern]] = []


def register_role(cls: type, role: Role) -> None:
    """Say what layers of exactly this class stand for. A subclass counts only if it is registered itself, so that nobody's
    subclass is fused by accident."""
    _entries[cls] = _Entry(role, getattr(cls, "forward", None), _originals.of(cls), issubclass(cls, torch.nn.Module))


def register_pattern(pattern: Pattern) -> None:
    """Say which roles may be joined. Of patterns that match equally many layers, the first one registered counts."""
    _patterns.append((re.compile(pattern.roles), pattern))


register_role(Residual, Role("add"))


# --- which layers may be joined now -----------------------------------------------------------------------------------


def role(cls: type) -> str | None:
    """The name of what layers of exactly this class stand for; None where they always keep to themselves."""
    entry = _entries.get(cls)
    return None if entry is None else entry.role.name


def follows_sum(name: str | None) -> bool:
    """Whether a layer of this role can be joined with a sum that has other consumers, too."""
    return any([pattern.sum_is_result and expression.fullmatch(f"add {name} ") for expression, pattern in _patterns])


def value(layer: Any) -> Value | None:
    """What this layer stands for; None where it must be called by itself."""
    cls = type(layer)
    entry = _entries.get(cls)
    if entry is None or entry.forward is not getattr(cls, "forward", None) or entry.originals.replaced():
        return None
    return None if entry.is_module and is_watched(layer) else entry.role.value(layer)


def values(layers: Sequence[Any], roles: Sequence[str]) -> list[Value] | None:
    """What layers stand for, if they may be joined now and have these roles; else None. Others may have been put in their places
    since a graph was made."""
    if everyone_is_watched():
        return None
    found = [value(layer) for layer in layers]
    return found if [None if v is None else v.role for v in found] == [*roles] else None  # type: ignore[return-value]


def is_watched(module: Any) -> bool:
    """Whether somebody could tell that this module's __call__ wasn't called: a hook, a compiled call, or a forward of its own, as
    some replace it on a single instance. Global hooks apart."""
    own = module.__dict__
    return "forward" in own or "_conv_forward" in own or _torch.is_watched_module(module)


def everyone_is_watched() -> bool:
    """Whether somebody sees the calls of all modules: a global hook, a patch of Module.__call__ (torch.fx's, say), or torch.jit,
    which compares what it sees at one call with the next."""
    if _torch.has_global_hook():
        return True
    if is_dynamo_compiling():
        return False
    return torch.nn.Module.__call__ is not explain.module_call or _torch.jit_tracing() is not None


# --- the plan ---------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Layers `begin` to `end` of a row, and what runs them as one; None for a single layer that is called."""

    begin: int
    end: int
    pattern: Pattern | None


def plan(values: tuple[Value, ...]) -> tuple[Step, ...]:
    """Which layers of a row are joined: a function of their values alone."""
    steps: list[Step] = []
    begin = 0
    while begin < len(values):
        roles = "".join([f"{v.role} " for v in values[begin:]])
        count, chosen = 1, None
        for expression, pattern in _patterns:
            found = expression.match(roles)
            if found is not None and found.group().count(" ") > count:
                count, chosen = found.group().count(" "), pattern
        steps.append(Step(begin, begin + count, chosen))
        begin += count
    return tuple(steps)


_planned = functools.lru_cache(maxsize=4096)(plan)


def run(layers: Iterable[Any], x: Any) -> Any:
    """What the layers compute, one after the other.

    Each is looked at when its turn comes, as in torch's Sequential: any that is called may hook or replace those after it.
    """
    row: list[Any] = []  # layers that may be joined and haven't run yet
    values: list[Value] = []
    watched = everyone_is_watched()
    for layer in layers:
        found = None if watched else value(layer)
        if found is not None and (found is not _PASSED or row or type(x) is torch.Tensor):
            if found is not _PASSED:
                row.append(layer)
                values.append(found)
            continue
        if row:
            x = _run_row(row, values, x)[0]
            row, values = [], []
        x = layer(x)
        watched = everyone_is_watched()
    return _run_row(row, values, x)[0] if row else x


def run_with_sum(layers: Sequence[Any], x: torch.Tensor) -> tuple[Any, Any]:
    """The same, and what the last layer was given: the sum, of a row that ends in `add norm`."""
    if not everyone_is_watched():
        values: list[Any] = [value(layer) for layer in layers]
        if None not in values and values[-1] is not _PASSED:
            kept = [i for i, v in enumerate(values) if v is not _PASSED]
            return _run_row([layers[i] for i in kept], [values[i] for i in kept], x)
    *before, last = layers
    total = run(before, x)
    return last(total), total


def _run_row(layers: Sequence[Any], values: Sequence[Value], x: Any) -> tuple[Any, Any]:
    """The result of layers that may all be joined, and what the last step was given; or, if that returns its sum, the sum."""
    given = x
    # Dynamo, which traces no cache, reads the plan itself.
    for begin, end, pattern in plan(tuple(values)) if is_dynamo_compiling() else _planned(tuple(values)):
        given = x
        if pattern is None:
            x = layers[begin](x)
            continue
        y = named(layers[begin:end], pattern.run, x, layers[begin:end], values[begin:end])
        x, given = y if pattern.sum_is_result else (y, given)
    return x, given


def named(layers: Sequence[Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), which `explain` shows as a call of these layers."""
    if explain.recorder is None:
        return function(*args, **kwargs)
    with explain.fused(*layers):
        return function(*args, **kwargs)


def run_alone(x: Any, layers: Sequence[Any]) -> Any:
    """What layers compute that a pattern's function couldn't join."""
    for layer in layers:
        x = layer(x)
    return x
