"""What the interpreter of forwards computes with, beside Python's own values and the nodes of the graph, which stand for what is
only known at a call."""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import has_side_effect

from .state import ATOMS

MUTABLE = (list, dict, set)
_PLAIN = {*ATOMS, tuple, range, slice, frozenset, type(Ellipsis), OrderedDict, torch.Size, *MUTABLE}
_OPAQUE = (torch.dtype, torch.device, torch.memory_format, torch.layout)
"""Types of values that a graph may contain besides."""


class Training:
    """A module's `training`: a node where it is handed on, so that it is read at every call, and a bool where it decides."""

    def __init__(self, module: nn.Module):
        self.module = module


class Method:
    """A function of Python's and the object that it is a method of."""

    def __init__(self, owner: Any, function: Callable[..., Any]):
        self.owner, self.function = owner, function


class MethodOf:
    """A method of a node, or of a plain value."""

    def __init__(self, owner: Any, name: str):
        self.owner, self.name = owner, name


class Parent:
    """super(): an object, and the class after which its attributes are looked for."""

    def __init__(self, owner: Any, cls: type):
        self.owner, self.cls = owner, cls


class Text:
    """An f-string of which parts are only known at a call."""

    def __init__(self, template: str, values: list[Any]):
        self.template, self.values = template, values


def has_node(value: Any) -> bool:
    """Whether something in it is only known at a call."""
    if isinstance(value, fx.Node | Training | Text):
        return True
    if isinstance(value, tuple | list | set | frozenset):
        return any([has_node(v) for v in value])
    if isinstance(value, slice):
        return has_node((value.start, value.stop, value.step))
    return isinstance(value, dict) and any([has_node(v) for v in (*value, *value.values())])


def has_mutable(value: Any) -> bool:
    """Whether it is, or contains, what somebody who is given it may edit."""
    return isinstance(value, MUTABLE) or (isinstance(value, tuple) and any([has_mutable(v) for v in value]))


def is_known(value: Any) -> bool:
    """Whether it is of a type with which the interpreter computes at once: one of Python's own, whose operators only compute."""
    return type(value) in _PLAIN or (isinstance(value, tuple) and hasattr(value, "_fields"))


def is_plain(value: Any) -> bool:
    """Whether it consists of plain values alone, none of which is anybody's object."""
    if isinstance(value, tuple | list | set | frozenset):
        return all([is_plain(v) for v in value])
    if isinstance(value, dict):
        return all([is_plain(v) for v in (*value, *value.values())])
    return type(value) in (*ATOMS, range, slice) or is_opaque(value)


def is_opaque(value: Any) -> bool:
    return isinstance(value, _OPAQUE)


# --- functions that a graph calls besides those of the forward --------------------------------------------------------


@has_side_effect
def expects(name: str, value: Any, given: Any) -> None:
    """Raise ValueError if an argument isn't what the graph was made for."""
    if given is not value and (type(given) is not type(value) or given != value):
        raise ValueError(f"fused for {name}={value!r}, and called with another value")


@has_side_effect
def is_given(name: str, given: Any) -> None:
    """Raise ValueError if an argument is None, for which the graph wasn't made."""
    if given is None:
        raise ValueError(f"fused for a {name} that isn't None, and called with None")


@has_side_effect
def verify(condition: Any, template: str | None, *values: Any) -> None:
    """An assert statement."""
    if not condition:
        raise AssertionError(*([] if template is None else [template.format(*values)]))


@has_side_effect
def unpack(value: Any, count: int) -> tuple[Any, ...]:
    """What `a, b = value` takes from it."""
    values = tuple(value)
    if len(values) != count:
        few = f"not enough values to unpack (expected {count}, got {len(values)})"
        raise ValueError(few if len(values) < count else f"too many values to unpack (expected {count})")
    return values


def bound(function: Callable[..., Any], first: Any) -> Any:
    """A function whose first argument is always the same. torch.fx asks what a graph calls for its name."""
    made = functools.partial(function, first)
    for name in ("__name__", "__qualname__", "__module__"):
        setattr(made, name, getattr(function, name))
    return made


@has_side_effect
def inplace(operation: str, *args: Any) -> Any:
    """An operator that writes into its first operand: "iadd", "setitem", ..."""
    return getattr(operator, operation)(*args)


def join(*parts: Any) -> tuple[Any, ...]:
    """What (*a, *b, ...) is."""
    return tuple([value for part in parts for value in part])


def attribute_of(owner: Any, name: str) -> Any:
    """owner.name; not by getattr itself, which torch.fx writes as an attribute of the first argument."""
    return getattr(owner, name)


def call_method(owner: Any, name: str, args: tuple[Any, ...]) -> Any:
    """owner.name(*args)."""
    return getattr(owner, name)(*args)
