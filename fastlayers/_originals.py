"""Whether somebody replaced a method of a torch.nn class, or a function of torch that it calls. A layer of ours does what torch's
does as torch ships it, and steps aside where that is no longer so."""

from __future__ import annotations

import builtins
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import _torch, _torch_functional

_NAMES = {"F": F, "torch": torch, "_VF": _torch.variable_functions}
"""How torch.nn's modules call the namespaces of the functions that they use."""

stand_ins: dict[str, Any] = {}
"""Ours of torch.nn.functional's functions, by their names. `patched` puts them there, which replaces nothing: they compute
the same."""
ours_for: dict[Any, Any] = {}
"""The same by torch's functions themselves."""


def stand_in(functions: dict[str, Any]) -> None:
    """Say which functions of ours stand in for those of torch.nn.functional of these names."""
    stand_ins.update(functions)
    ours_for.update({getattr(_torch_functional, name): ours for name, ours in functions.items()})


def _is_torchs(function: Any) -> bool:
    """Whether a function may be what torch ships, rather than what somebody put there before fastlayers was imported."""
    if isinstance(function, types.FunctionType):
        return (function.__globals__.get("__name__") or "").split(".")[0] == "torch"
    return isinstance(function, types.BuiltinFunctionType | builtins.type)


def _function(space: Any, name: str) -> Any:
    """The function of this name in a namespace of torch's; None if there is none."""
    found = getattr(space, name, None) if space is _torch.variable_functions else vars(space).get(name)
    return found if callable(found) and not isinstance(found, type) else None


def _own(cls: type, name: str) -> Any:
    """A class's attribute, unless it is one of every module's."""
    return None if hasattr(torch.nn.Module, name) else getattr(cls, name, None)


class Originals:
    """What `methods` of a class of torch.nn are, and the functions that they call."""

    def __init__(self, cls: type, methods: tuple[str, ...]):
        self.places: list[tuple[Any, str, Any, Any]] = []
        """Where each stands, its name, what stands there as torch ships it, and what `patched` puts there."""
        found = [*methods]
        for name in found:
            method = getattr(cls, name, None)
            if method is None:
                continue
            self._add(cls, name, method)
            called = getattr(getattr(method, "__code__", None), "co_names", ())
            # Methods of the class that it calls in turn; those of nn.Module itself say nothing of how a layer computes.
            found += [n for n in called if n not in found and isinstance(_own(cls, n), types.FunctionType)]
            for space in [space for word, space in _NAMES.items() if word in called]:
                for function in called:
                    if _function(space, function) is not None:
                        self._add(space, function, _function(space, function))
        self.replaced: Callable[[], bool] = _comparing(self.places, {}, "replaced()", "False", "True")
        """Whether one of them was replaced since."""

    def _add(self, place: Any, name: str, found: Any) -> None:
        original = found if _is_torchs(found) else None
        self.places.append((place, name, original, stand_ins.get(name, original) if place is F else original))


def _comparing(places: Any, given: dict[str, Any], head: str, same: str, other: str) -> Any:
    """A function with this head, which returns `same` where every original is in its place and otherwise `other`, expressions of
    its parameters and of what is given. It is compiled from source with a comparison for each original: a loop, and arguments as
    *args and **kwargs, took a tenth of a Linear layer's time on the CPU."""
    given, unchanged = {**given}, []
    for i, (place, function, original, stand_in) in enumerate(places):
        given[f"place{i}"], given[f"original{i}"], given[f"stand_in{i}"] = place, original, stand_in
        unchanged.append(f"(place{i}.{function} is original{i} or place{i}.{function} is stand_in{i})")
    lines = [  # variables of a function around, since Dynamo looks for global ones in the module of this name
        f"def make({', '.join(given)}):",
        f"    def {head}:",
        f"        if {' and '.join(unchanged) or 'True'}:",
        f"            return {same}",
        f"        return {other}",
        f"    return {head[: head.index('(')]}",
    ]
    space: dict[str, Any] = {"__name__": __name__}
    exec("\n".join(lines), space)
    return space["make"](**given)


@functools.cache
def _of(theirs: type) -> Originals:
    return Originals(theirs, ("forward",))


def of(cls: type) -> Originals:
    """The originals of what computes a layer of this class: one of torch.nn's, or a subclass of it. What they are is noted at the
    first call."""
    return _of(next((c for c in cls.__mro__ if c.__module__.startswith("torch.nn.")), cls))


def watch(*classes: type) -> None:
    """Have every method that these classes override call torch's instead while that is replaced, or a function that it calls."""
    for ours in classes:
        theirs = ours.__bases__[0]
        of(theirs)  # now, rather than when something may have been replaced already
        for name, method in list(vars(ours).items()):
            if isinstance(method, types.FunctionType) and hasattr(theirs, name) and not hasattr(method, "__wrapped__"):
                setattr(ours, name, _watched(theirs, name, method))


def _watched(theirs: type, name: str, method: types.FunctionType) -> Callable[..., Any]:
    """The method, with a look at the originals before, and its own parameters."""
    declared, handed = _parameters(method)
    given, places = {"method": method, "theirs": theirs}, Originals(theirs, (name,)).places
    made = _comparing(places, given, f"watched({declared})", f"method({handed})", f"theirs.{name}({handed})")
    watched: Any = functools.wraps(method)(made)
    watched.__defaults__, watched.__kwdefaults__ = method.__defaults__, method.__kwdefaults__
    return watched


def _parameters(method: types.FunctionType) -> tuple[str, str]:
    """A method's parameters as source, in its definition and in a call. Of the defaults only the places matter."""
    declared, handed, named = [], [], False
    for name, parameter in inspect.signature(method).parameters.items():
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        keyword = parameter.kind is parameter.KEYWORD_ONLY
        if keyword and not named:
            declared.append("*")
        named = named or keyword or star == "*"
        declared.append(star + name + "=None" * (parameter.default is not parameter.empty))
        handed.append(f"{name}={name}" if keyword else star + name)
    return ", ".join(declared), ", ".join(handed)
