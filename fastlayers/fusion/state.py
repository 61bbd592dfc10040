"""What tracing has looked at besides the inputs: flags, numbers, functions, classes. A graph holds for as long as all of it is
what it was, which is asked at every call."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import _torch
from .._state import class_before
from . import plan

MISSING: Any = type("Missing", (), {"__repr__": lambda self: "nothing"})()
"""In the place of an attribute that isn't there."""

ATOMS = (type(None), bool, int, float, complex, str, bytes)
"""Values that are compared by value."""


def found_on_class(cls: type, name: str) -> Any:
    """A class's attribute as it stands in the class, not bound to anything; MISSING if there is none. Generated classes are
    passed over, also where FSDP2, say, has made a subclass of one."""
    for base in cls.__mro__:
        if name in base.__dict__ and class_before(base) is base:
            return base.__dict__[name]
    return MISSING


def forward_of(cls: type) -> Any:
    """A class's forward as its author wrote it."""
    return found_on_class(cls, "forward")


def _attribute(owner: Any, name: str) -> Any:
    """An object's attribute, as Python finds it before it is bound."""
    if isinstance(owner, types.ModuleType | type):
        return getattr(owner, name, MISSING)
    own = getattr(owner, "__dict__", {})
    if name in own:
        return own[name]
    if isinstance(owner, nn.Module):
        for state in (owner._parameters, owner._buffers, owner._modules):
            if name in state:
                return state[name]
    return found_on_class(type(owner), name)


def _where(owner: Any, name: str) -> Any:
    """Which part of a module's state holds a value of this name; None if the value is None, MISSING if there is none."""
    own = owner.__dict__
    if name in own:
        return None if own[name] is None else "__dict__"
    for kind in ("_parameters", "_buffers", "_modules"):
        if name in own[kind]:
            return None if own[kind][name] is None else kind
    return MISSING


def _item(owner: Any, name: str) -> Any:
    return owner.get(name, MISSING)


def _cell(owner: Any, name: str) -> Any:
    return owner.cell_contents


def _dtype(owner: Any, name: str) -> Any:
    return getattr(getattr(owner, name, None), "dtype", MISSING)


def _training(owner: Any, name: str) -> Any:
    return owner.training


def _class(owner: Any, name: str) -> Any:
    return type(owner)


def _children(owner: Any, name: str) -> Any:
    return tuple(owner._modules)


def _forward(owner: Any, name: str) -> Any:
    """The function that a call of this module comes to; MISSING if somebody watches the call."""
    return MISSING if plan.is_watched(owner) else forward_of(type(owner))


def _written(owner: Any, name: str) -> Any:
    return forward_of(type(owner))


def _global_hooks(owner: Any, name: str) -> Any:
    return bool(_torch.has_global_hook())


class _Entry(NamedTuple):
    read: Callable[[Any, str], Any]
    owner: Any
    """None: the fused module itself."""
    name: str
    value: Any
    content: Any
    """A copy of a list, tuple, dictionary or set, which may be edited; else None."""
    late: bool


class Looked:
    """The list of what was looked at."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self.late = False
        """Whether modules of anybody's were called before what is looked at now: their calls may change anything."""
        self._keys: set[Any] = set()

    def __len__(self) -> int:
        return len(self.entries)

    def _add(self, read: Callable[[Any, str], Any], owner: Any, name: str, value: Any) -> None:
        key = read, id(owner), name, self.late  # what was read before a call is read again after it
        if key not in self._keys:
            self._keys.add(key)
            content = _copied(value, None) if isinstance(value, (list, tuple, dict, set)) else None
            self.entries.append(_Entry(read, owner, name, value, content, self.late))

    def back_to(self, length: int) -> None:
        """Forget what was looked at since there were so many."""
        for entry in self.entries[length:]:
            self._keys.discard((entry.read, id(entry.owner), entry.name, entry.late))
        del self.entries[length:]

    def attribute(self, owner: Any, name: str) -> None:
        """An attribute of a module, a class, a module of Python, or of any object without an own way to look them up."""
        self._add(_attribute, owner, name, _attribute(owner, name))

    def where(self, module: nn.Module, name: str) -> None:
        """That a module has a tensor or a child of this name, or None in its place."""
        self._add(_where, module, name, _where(module, name))

    def variable(self, variables: dict[str, Any], name: str) -> None:
        """A global variable."""
        self._add(_item, variables, name, _item(variables, name))

    def cell(self, cell: Any, name: str) -> None:
        """A variable of the function around."""
        self._add(_cell, cell, name, cell.cell_contents)

    def training(self, module: nn.Module | None, value: bool) -> None:
        """Whether a module is in training; None: the fused module."""
        self._add(_training, module, "training", value)

    def forward(self, module: nn.Module) -> None:
        """That a module's call is a call of its class's forward, and that nobody watches it."""
        self._add(_forward, module, "forward", _forward(module, ""))

    def written(self, module: nn.Module) -> None:
        """The forward of a module's class, as its author wrote it."""
        self._add(_written, module, "forward", _written(module, ""))

    def forwards(self) -> frozenset[int]:
        """The modules, by identity, whose calls are calls of their class's forward."""
        return frozenset([id(e.owner) for e in self.entries if e.read is _forward])

    def global_hooks(self) -> None:
        """Whether there is a hook for all modules."""
        self._add(_global_hooks, None, "global hooks", _global_hooks(None, ""))

    def class_of(self, module: Any) -> None:
        self._add(_class, module, "class", type(module))

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        """Of a parameter or buffer."""
        self._add(_dtype, module, name, _dtype(module, name))
        return _dtype(module, name)

    def children(self, module: nn.Module) -> None:
        """The names of a module's children."""
        self._add(_children, module, "children", _children(module, ""))

    def changed(self, fused: nn.Module, within: bool = False) -> str | None:
        """What is no longer as it was, in words; None if nothing is. `within`: after a call, among what modules in it may have
        changed before it was read."""
        entries = [e for e in self.entries if e.late] if within else self.entries
        for read, owner, name, value, content, _ in entries:
            now = read(fused if owner is None else owner, name)
            if (now is not value or content is not None) and not _same(now, value if content is None else content):
                return f"{name} of {type(owner if owner is not None else fused).__name__}"
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Looked:
        """For a copied model: of its own objects the copies."""
        return _restored(
            [
                _Entry(e.read, _copied(e.owner, memo), e.name, _copied(e.value, memo), _copied(e.content, memo), e.late)
                for e in self.entries
            ]
        )

    def __reduce__(self) -> Any:
        """A pickle keeps what modules say of themselves in plain values. Functions and other objects are new ones in another
        process, and the model itself isn't there."""
        return _restored, ([e for e in self.entries if e.read in (_training, _children) or _is_plain(e)],)

    def of_itself(self, model: nn.Module) -> Looked:
        """The same without a reference to this module, which is handed to `changed`: what is kept in it holds it no longer."""
        return _restored([e._replace(owner=None) if e.owner is model else e for e in self.entries])

    def without(self, model: nn.Module) -> Looked:
        """The same without the attributes of this module."""
        return _restored([e for e in self.entries if e.owner is not model])


def _restored(entries: list[_Entry]) -> Looked:
    looked = Looked()
    looked.entries = entries
    looked.late = any([e.late for e in entries])
    return looked


def _is_plain(entry: _Entry) -> bool:
    return isinstance(entry.owner, nn.Module) and type(entry.value) in ATOMS


def _same(a: Any, b: Any) -> bool:
    """Equal in type and value; anything but plain values and containers of them: the same object."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) in ATOMS:
        return a == b or (a != a and b != b)
    if isinstance(a, dict):
        return list(a) == list(b) and all([_same(x, y) for x, y in zip(a.values(), b.values(), strict=True)])
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all([_same(x, y) for x, y in zip(a, b, strict=True)])
    return isinstance(a, set) and a == b


def _copied(value: Any, memo: dict[int, Any] | None) -> Any:
    """A copy of containers; with a memo, a deep copy of whatever belongs to a model."""
    if memo is None:
        if type(value) in (dict, OrderedDict):
            return type(value)([(key, _copied(v, memo)) for key, v in value.items()])
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*[_copied(v, memo) for v in value])
        if type(value) in (list, tuple):
            return type(value)([_copied(v, memo) for v in value])
        return set(value) if type(value) is set else value
    if value is MISSING or isinstance(value, types.ModuleType | type | types.CellType):
        return value
    if callable(value) and not isinstance(value, nn.Module):
        return value
    if isinstance(value, dict) and "__builtins__" in value:  # a module's variables
        return value
    return copy.deepcopy(value, memo)
