"""Fusion in place: a module gets a generated subclass of its exact class, whose forward runs what `fuse` makes of the class's own
forward. A graph is made at the first call with arguments of a kind; where none can be made, the class's own forward runs."""

from __future__ import annotations

import copyreg
import functools
import inspect
import threading
import weakref
from collections.abc import Iterable
from types import FunctionType
from typing import Any

from torch import fx, nn
from torch.compiler import is_dynamo_compiling
from torch.fx.proxy import TraceError

from .._state import class_before
from . import calls, plan, rotary, trace
from .interpret import is_known_layer
from .state import MISSING

_CONSTANT = (type(None), bool, str)
"""Types of arguments that decide something in many forwards, and get a graph for each value."""
_KINDS, _CHANGES = 16, 8
"""So many kinds of arguments have a graph, and so often is it made anew where something that it was made of has changed. Beyond
that the class's own forward runs."""
_lock = threading.RLock()


class _Given:
    """Stands in the kind of a call for an argument that a graph has as an input."""

    def __repr__(self) -> str:
        return "given"


_GIVEN = _Given()


class Graphs:
    """The graphs of one module: of its forward, and of the first statements of its methods. There is one for each kind of call:
    whether the module is in training, the names of the arguments, and the values of those that are None, a bool or a word. Copies
    and pickles of a module begin anew."""

    def __init__(self) -> None:
        self._module: weakref.ref[nn.Module] | None = None
        self._found: dict[Any, Any] = {}
        self._changes: dict[Any, int] = {}

    def __reduce__(self) -> Any:
        return Graphs, ()

    def of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The graph for a call; None where the class's own forward is to run."""
        kind = (
            module.training,
            tuple([v if type(v) in _CONSTANT else _GIVEN for v in args]),
            tuple([(name, v if type(v) in _CONSTANT else _GIVEN) for name, v in kwargs.items()]),
        )
        return self._of_kind(module, kind)

    def begun(
        self, module: nn.Module, function: FunctionType, first: calls.Beginning, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """The values of some variables of a method after its first statements, which are computed by a graph; None where the
        statements are to run."""
        given = tuple([v if type(v) in _CONSTANT else _GIVEN for v in args])
        graph = self._of_kind(module, (module.training, given, first), function)
        if graph is None or graph._of() is not function or plan.everyone_is_watched():
            return None
        known = all([is_known_layer(_at(module, path)) for path in graph._layers])
        return self.run(graph, module, args) if known else None

    def run(self, graph: Any, module: nn.Module, args: Iterable[Any]) -> Any:
        """What a graph of this module's computes."""
        graph.__dict__["training"] = module.training
        result = type(graph).forward(graph, *[v for v in args if type(v) not in _CONSTANT])
        if graph._looked.late:
            changed = graph._looked.changed(module, within=True)
            if changed is not None:
                self.give_up()
                raise RuntimeError(f"{changed} is changed by a call and read in it, which a graph can't follow")
        return result

    def _of_kind(self, module: nn.Module, kind: tuple[Any, ...], function: FunctionType | None = None) -> Any:
        graph = self._found.get(kind, MISSING)
        if self._module is None or self._module() is not module:
            if self._module is not None:  # a shallow copy, whose parameters aren't those of the graphs
                return None
            self._module = weakref.ref(module)
        if graph is not MISSING and (graph is None or graph._looked.changed(module) is None):
            return graph
        with _lock:
            return self._make(module, kind, function)

    def _make(self, module: nn.Module, kind: tuple[Any, ...], function: FunctionType | None) -> Any:
        if kind not in self._found and len(self._found) >= _KINDS:
            return None
        if function is not None and not rotary.is_unseen():  # then a function for rotary embedding isn't recognised
            return None
        self._changes[kind] = self._changes.get(kind, 0) + 1
        _, args, others = kind
        graph = _made(module, args, others, function) if self._changes[kind] <= _CHANGES else None
        self._found[kind] = graph
        return graph

    def give_up(self) -> None:
        """From now on the class's own forward runs, whatever it is called with."""
        self._found = dict.fromkeys(self._found)


def _made(module: nn.Module, args: tuple[Any, ...], others: Any, function: FunctionType | None = None) -> Any:
    """A graph in which something runs fused: of a module's forward, where `others` are its arguments by name, or of the first
    statements of a function, where `others` says which. None where they can't be read, nothing is found, or names are none that
    Python's source can have."""
    try:
        if function is None:
            return trace.local(module, args, dict(others), _GIVEN)
        graph = trace.beginning(module, function, args, _GIVEN, others.count, others.names)
    except (TraceError, SyntaxError):
        return None
    if graph is not None:  # weakly, since a function may hold anything
        vars(graph)["_of"] = weakref.ref(function)
    return graph


def _at(module: Any, path: list[str]) -> Any:
    """The module of this path, if there is one."""
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module


@functools.cache
def class_after(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass for modules of exactly this class, which goes by its name."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Dynamo, torch.fx and torch.jit are to see the forward as it is written, and hooks for all modules every call.
        if is_dynamo_compiling() or plan.everyone_is_watched():
            return cls.forward(self, *args, **kwargs)
        graphs: Any = self.__dict__.get(calls.GRAPHS)  # a module that was made from the generated class has none
        graph = None if graphs is None else graphs.of(self, args, kwargs)
        if graphs is None:
            return cls.forward(self, *args, **kwargs)
        if graph is None:
            return calls.chosen(cls.forward)(self, *args, **kwargs)
        return graphs.run(graph, self, (*args, *kwargs.values()))

    def reduce(self: Any, protocol: Any) -> Any:
        function, args, *rest = super(after, self).__reduce_ex__(max(protocol, 2))
        if function is copyreg.__newobj__ and args[0] is after:  # type: ignore[attr-defined]
            return _new, (cls, *args[1:]), *rest
        return function, args, *rest

    names = dict(__module__=cls.__module__, __qualname__=cls.__qualname__, __doc__=cls.__doc__)
    make: Any = type(cls)
    after: Any = make(
        cls.__name__, (cls,), {**names, "forward": forward, "__reduce_ex__": reduce, "_class_before": cls}
    )
    return after


def _new(cls: type[nn.Module], *args: Any) -> nn.Module:
    """A module of the subclass, for a pickle."""
    after = class_after(cls)
    return after.__new__(after, *args)


def is_fused(module: nn.Module) -> bool:
    """Whether its class is a generated one, or a subclass of one as parametrizations make it. Somebody may have given the module
    another class since, whose own forward runs."""
    return calls.GRAPHS in vars(module) and hasattr(type(module), "_class_before")


def drop_unused(module: nn.Module) -> None:
    """Take the graphs from a module that is fused no longer, since somebody has given it another class."""
    if not is_fused(module):
        vars(module).pop(calls.GRAPHS, None)


def fuse_in_place(module: nn.Module) -> None:
    module.__class__ = class_after(type(module))
    vars(module)[calls.GRAPHS] = Graphs()


def undo(module: nn.Module) -> None:
    module.__class__ = class_before(type(module))
    del vars(module)[calls.GRAPHS]


def candidates(model: nn.Module, allowed: set[int]) -> list[nn.Module]:
    """The modules in whose forwards something is found: the model itself, or parts of it, wherever a forward can't be read. None
    of them is, or contains, a module that isn't allowed, by identity."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    waiting: list[tuple[nn.Module, frozenset[int]]] = [(model, frozenset())]
    while waiting:
        module, read = waiting.pop()  # and the modules whose forwards are parts of a graph around it
        if id(module) in seen:
            continue
        seen.add(id(module))
        if id(module) not in read and _may_change(module, allowed):
            graph = _guessed(module)
            if graph is not None or (calls.leads(module) and _has_subclasses(type(module))):
                found.extend([] if is_fused(module) else [module])
            read = read if graph is None else read | graph._looked.forwards()
        waiting += [(child, read) for child in module._modules.values() if child is not None]
    return found


def _may_change(module: nn.Module, allowed: set[int]) -> bool:
    cls = type(module)
    torchs = cls.__module__.split(".")[0] in ("torch", "fastlayers") or isinstance(module, fx.GraphModule)
    return not torchs and "forward" not in vars(module) and all([id(m) in allowed for m in module.modules()])


def _guessed(module: nn.Module) -> Any:
    """The graph for a call as its signature makes one expect it: with the arguments that have no default, or with all."""
    try:
        parameters = [*inspect.signature(type(module).forward).parameters.values()][1:]
    except (TypeError, ValueError):  # it isn't a function of Python's
        return None
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for given in ([p for p in named if p.default is p.empty], named):
        found = _made(module, tuple([_GIVEN for p in given if p.kind is not p.KEYWORD_ONLY]), ())
        if found is not None and _has_subclasses(type(module)):
            return found
    return None


def _has_subclasses(cls: type[nn.Module]) -> bool:
    """Whether one can be generated: a class may ask more of its subclasses, or forbid them."""
    try:
        class_after(class_before(cls))
    except Exception:
        return False
    return True
