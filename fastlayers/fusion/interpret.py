"""From a model's forward to a graph: the forward's source is read and computed with what is known (modules, flags, numbers), and
what is only known at a call becomes a node of a torch.fx graph.

None of the model's code runs, so nothing of the model, of torch or of anybody's is changed, and no other thread notices. What a
statement, an expression or a function would do is known for all that are allowed, and whatever isn't allowed is refused, with the
line on which it stands. A module whose forward is refused is called as it stands.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections import OrderedDict
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .. import _torch
from .._state import own
from . import allowed, plan, source
from .expressions import Expressions, Refused
from .objects import Objects
from .state import ATOMS, MISSING, Looked, forward_of, found_on_class
from .statements import Frame
from .values import (
    MUTABLE,
    Method,
    MethodOf,
    Parent,
    Text,
    Training,
    has_mutable,
    has_node,
    inplace,
    is_given,
    is_known,
    is_opaque,
    is_plain,
)

_EDITS = {
    "append", "clear", "extend", "insert", "pop", "popitem", "reverse", "setdefault", "update", "add", "discard", "remove",
}  # fmt: skip
"""Methods of lists, dictionaries and sets that write into them."""
_READS = {"copy", "count", "get", "index", "items", "keys", "values"}
_COMPARING = {"add", "count", "discard", "index", "remove"}
"""Methods of them that compare values."""
_STRUCTURE = (len, tuple, list, dict, zip, enumerate, reversed, slice)
"""Functions that don't look at the elements of what they are given."""
_DEPTH = 40


class Left(NamedTuple):
    """A module that is called as it stands, and why."""

    path: str
    kind: str
    reason: str


class Interpreter(Objects):
    """Makes one graph of one model. What is read first is said by tracer.Tracer.

    Args:
        training: of the model itself.
        stands_for: what the graph calls in the place of a function of somebody's, which isn't read then; None for one that is
            read.
    """

    def __init__(
        self,
        model: nn.Module,
        training: bool,
        stands_for: Callable[[types.FunctionType, bool], Any] = lambda function, in_place: None,
    ):
        self.model, self.training, self._stands_for, self.in_place = model, training, stands_for, False
        self.graph, self.looked = fx.Graph(), Looked()
        self.graph.erase_node(self.graph.placeholder("self"))  # reserves the name "self", which the generated code uses
        self.paths = {id(m): path for path, m in model.named_modules()}
        self.left: list[Left] = []
        self.read = []
        self.steps = self._depth = 0
        self._own: dict[int, Any] = {}
        """Lists, dictionaries and sets that the forward itself has made, and tuples that stand for other objects."""
        self._given: set[fx.Node] = set()

    def _forward(self, module: nn.Module) -> types.FunctionType:
        """The function that a module's forward is."""
        forward = forward_of(type(module))
        inner = inspect.unwrap(forward) if callable(forward) else None
        if isinstance(inner, types.FunctionType) and source.home(forward) == "fastlayers._originals":
            forward = inner  # one of ours
        if isinstance(forward, types.FunctionType) and source.is_readable(forward):
            return forward
        if not isinstance(inner, types.FunctionType):
            cls = type(module)
            raise Refused(cls.__module__, cls.__qualname__, "its forward isn't a function of Python's")
        number, wrapper = inner.__code__.co_firstlineno, f"{_name(type(forward))} of {source.home(forward)}"
        place = f"{inner.__code__.co_filename}:{number}"
        raise Refused(place, source.line(inner, number), f"is wrapped in {wrapper}")

    def run(self, function: types.FunctionType, variables: dict[str, Any]) -> Any:
        """What a function returns, given its arguments by name."""
        frame = Frame(self, function, variables)
        nowhere = ast.Pass()
        if self._depth >= _DEPTH:
            raise frame.refuse(nowhere, "calls itself too often")
        if function.__code__.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            raise frame.refuse(nowhere, "gives its results one after the other")
        self._depth += 1
        try:
            return frame.run(source.tree(function))
        except source.NotFound as error:
            raise frame.refuse(nowhere, str(error)) from error
        except RecursionError as error:
            raise frame.refuse(nowhere, "is too deep") from error
        finally:
            self._depth -= 1

    # --- nodes --------------------------------------------------------------------------------------------------------

    def note(self, frame: Expressions, node: ast.AST, function: Any, args: Any, kwargs: Any = None) -> fx.Node:
        """A call of a function, which the graph makes at every call."""
        arguments = tuple([self._argument(frame, node, v) for v in args])
        keywords = {name: self._argument(frame, node, v) for name, v in (kwargs or {}).items()}
        noted = self.graph.call_function(function, arguments, keywords)
        home = getattr(function, "__module__", None) or ""
        if home.startswith(("builtins", "math", "collections", "fastlayers.fusion")):
            self._whole(noted)
        return noted

    @staticmethod
    def _whole(node: fx.Node) -> None:
        """As torch.fx.wrap does: when the graph is traced again by torch.fx, the call stays one."""
        node.meta["is_wrapped"] = True

    def inplace(self, frame: Expressions, node: ast.AST, operation: str, *args: Any) -> Any:
        """An operator that writes into its first operand."""
        return self.note(frame, node, inplace, (operation, *args))

    def _argument(self, frame: Expressions, node: ast.AST, value: Any) -> Any:
        """A value as an argument of a node."""
        if isinstance(value, Training):
            if value.module is self.model:
                return self.graph.get_attr("training")
            path = self.paths.get(id(value.module))
            if path is not None:
                return self.graph.get_attr(f"{path}.training")
            value = self.concrete(value)
        if isinstance(value, slice):
            return slice(*[self._argument(frame, node, v) for v in (value.start, value.stop, value.step)])
        if type(value) in (tuple, list, torch.Size):
            parts = [self._argument(frame, node, v) for v in value]
            return parts if type(value) is list else tuple(parts)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            # As a call, since torch 2.11 can't write a named tuple within another container.
            return self.note(frame, node, type(value), tuple(value))
        if type(value) is dict and all([isinstance(key, str) for key in value]):
            return {key: self._argument(frame, node, v) for key, v in value.items()}
        if type(value) is range:
            return tuple(value)
        kinds = (type(None), type(Ellipsis), bool, int, float, complex, str)
        if isinstance(value, fx.Node) or type(value) in kinds or is_opaque(value):
            return value
        if type(value) is OrderedDict:
            return self.note(frame, node, OrderedDict, ([*value.items()],))
        raise frame.refuse(node, f"hands on a {type(value).__name__}, which a graph can't")

    def concrete(self, value: Any) -> Any:
        if not isinstance(value, Training):
            return value
        if value.module is self.model:
            self.looked.training(None, self.training)
            return self.training
        self.looked.training(value.module, value.module.training)
        return value.module.training

    def is_something(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            if node not in self._given:
                self._given.add(node)
                self._whole(self.graph.call_function(is_given, (str(node.target), node)))
            return True
        return node.op == "get_attr"

    # --- what the forward makes itself --------------------------------------------------------------------------------

    def created(self, value: Any) -> Any:
        """A value that the forward has made: if it is a list, dictionary or set, the forward may edit it."""
        if isinstance(value, MUTABLE):
            self._own[id(value)] = value
        return value

    def as_tuple(self, values: Iterable[Any]) -> tuple[Any, ...]:
        """What an iterator or a view of a dictionary gives. In a graph's result it would be another object."""
        found = tuple(values)
        self._own[id(found)] = found
        return found

    def hands_on(self, values: Iterable[Any], seen: set[int]) -> bool:
        """Whether a graph's result can hold values as they are. A tuple in it is a new one at every call and in every place."""
        for value in values:
            if type(value) is tuple:
                if id(value) in self._own or id(value) in seen or not has_node(value):
                    return False
                seen.add(id(value))
                if not self.hands_on(value, seen):
                    return False
            elif not isinstance(value, fx.Node | Training) and type(value) not in ATOMS and not is_opaque(value):
                return False
        return True

    def editable(self, frame: Expressions, node: ast.AST, value: Any) -> None:
        if self._own.get(id(value)) is not value:
            raise frame.refuse(node, f"writes into a {type(value).__name__} that isn't the call's own")

    # --- calls --------------------------------------------------------------------------------------------------------

    def call(self, frame: Any, node: ast.AST, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if isinstance(function, nn.Module):
            return self._call_module(frame, node, function, args, kwargs)
        if isinstance(function, MethodOf):
            return self._call_method(frame, node, function, args, kwargs)
        if isinstance(function, Method):
            found = self.of_container(frame, node, function)
            return (
                self._call_function(frame, node, function.function, [function.owner, *args], kwargs)
                if found is MISSING
                else found
            )
        if isinstance(function, functools.partial):
            return self.call(frame, node, function.func, [*function.args, *args], {**function.keywords, **kwargs})
        if isinstance(function, types.MethodType):
            return self._call_function(frame, node, function.__func__, [function.__self__, *args], kwargs)
        if function is own:
            return self.attribute(frame, node, *args[:2])
        if allowed.is_torch_function(function) or _torch.is_operator(function):
            return self.note(frame, node, function, args, kwargs)
        if allowed.is_python_function(function):
            return self._call_python(frame, node, function, args, kwargs)
        if function is _torch.asserts and not kwargs:
            return frame.asserted(node, *args)
        if function is type and len(args) == 1:
            return self.attribute(frame, node, args[0], "__class__")
        if any([function is f for f in (isinstance, hasattr, getattr, callable)]):
            return self._look(frame, node, function, args)
        if function is torch.jit.is_scripting:  # pyright: ignore[reportPrivateImportUsage]
            return False
        if function is torch.device and not has_node(args):
            return torch.device(*args, **kwargs)
        if isinstance(function, type) and issubclass(function, tuple) and hasattr(function, "_fields"):
            return function(*args, **kwargs)
        if isinstance(function, types.FunctionType):
            return self._call_function(frame, node, function, args, kwargs)
        raise frame.refuse(node, f"calls {_name(function)}, which isn't known to be traced rightly")

    def _call_function(
        self, frame: Expressions, node: ast.AST, function: Any, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Look into a function of somebody's own."""
        if not isinstance(function, types.FunctionType) or not source.is_readable(function):
            raise frame.refuse(node, f"calls {_name(function)}, which isn't known to be traced rightly")
        ours = self._stands_for(function, self.in_place)
        if ours is not None:
            return self.note(frame, node, ours, args, kwargs)
        try:
            bound = inspect.signature(function, follow_wrapped=False).bind(*args, **kwargs)
        except TypeError as error:
            raise frame.refuse(node, f"raises TypeError: {error}") from error
        for parameter in bound.signature.parameters.values():
            if parameter.name not in bound.arguments and has_mutable(parameter.default):
                raise frame.refuse(node, f"calls {_name(function)}, which keeps a default that can be edited")
        bound.apply_defaults()
        variables = {**bound.arguments}
        for parameter in bound.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                self.created(variables[parameter.name])
        try:
            return self.run(function, variables)
        except Refused as refused:
            if not source.is_torchs(function) or source.is_torchs(frame.function):
                raise
            # The line to tell is the one in the user's own code.
            raise frame.refuse(node, f"calls {_name(function)}, in which {refused}") from refused

    def _call_python(
        self, frame: Expressions, node: ast.AST, function: Any, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        args = [self.concrete(v) for v in args]
        kwargs = {name: self.concrete(v) for name, v in kwargs.items()}
        args = [self._listed(frame, node, v) for v in args]
        at_once = not has_node((args, kwargs))
        if not at_once and function in _STRUCTURE and not any([isinstance(v, fx.Node | Text) for v in args]):
            at_once = not kwargs or function in (dict, enumerate, zip)
        if not at_once:
            return self.note(frame, node, function, args, kwargs)
        self._plain(frame, node, function, args, kwargs)
        value = function(*args, **kwargs)
        return self.as_tuple(value) if isinstance(value, Iterator) else self.created(value)

    def _plain(self, frame: Expressions, node: ast.AST, function: Any, args: Any, kwargs: Any) -> None:
        """Refuse a call that could run code of anybody's: a comparison of objects, say."""
        for value in (*args, *kwargs.values()):
            if not is_known(value) and not is_opaque(value):
                raise frame.refuse(node, f"hands a {type(value).__name__} to {_name(function)}")
            if function not in _STRUCTURE and not is_plain(value):
                raise frame.refuse(node, f"hands objects to {_name(function)}")

    def _listed(self, frame: Expressions, node: ast.AST, value: Any) -> Any:
        """A module as the sequence of its elements."""
        return self.elements(frame, node, value) if isinstance(value, nn.Module) else value

    def _look(self, frame: Expressions, node: ast.AST, function: Any, args: list[Any]) -> Any:
        """isinstance, hasattr, getattr, callable."""
        first, *rest = [self.concrete(v) for v in args]
        if isinstance(first, fx.Node | Text) or has_node(rest):
            raise frame.refuse(node, "depends on what is only known at a call")
        if function is isinstance:
            kinds = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
            if any([not isinstance(k, type | types.UnionType) for k in kinds]) or isinstance(
                first, Method | MethodOf | Parent
            ):
                raise frame.refuse(node, "asks for the class of an object in a way that isn't traced")
            if isinstance(first, nn.Module):
                self.placed(first)
                self.looked.class_of(first)
            return isinstance(first, rest[0])
        if function is callable:
            return isinstance(first, Method | MethodOf) or callable(first)
        if isinstance(first, nn.Module) and rest[0] in first._modules:
            self.looked.where(first, rest[0])
        if function is hasattr:
            none = object()
            return self.attribute(frame, node, first, rest[0], none) is not none
        return self.attribute(frame, node, first, *rest)

    def _call_method(
        self, frame: Expressions, node: ast.AST, method: MethodOf, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        """A method of what is only known at a call, or of a plain value."""
        owner, name = method.owner, method.name
        if isinstance(owner, fx.Node):
            if not hasattr(torch.Tensor, name) and has_mutable((*args, *kwargs.values())):
                raise frame.refuse(node, f"hands a list to {name}, which may edit it")
            arguments = [self._argument(frame, node, v) for v in (owner, *args)]
            keywords = {k: self._argument(frame, node, v) for k, v in kwargs.items()}
            return self.graph.call_method(name, tuple(arguments), keywords)
        args = [self.concrete(v) for v in args]
        function, given, first = getattr(owner, name), has_node((args, kwargs)), args[0] if args else None
        if not isinstance(owner, MUTABLE):
            if given:
                raise frame.refuse(node, f"hands to {name} what is only known at a call")
            self._plain(frame, node, function, args, kwargs)
        elif name in _EDITS:
            self.editable(frame, node, owner)
        elif name not in _READS:
            raise frame.refuse(node, f"calls {name} of a {type(owner).__name__}")
        compares = name in _COMPARING and not (is_plain(owner) and is_plain(args))
        unknown = isinstance(first, fx.Node | Text) and name != "append"
        if isinstance(owner, MUTABLE) and (compares or unknown or (kwargs and name != "update")):
            raise frame.refuse(node, f"hands to {name} what is only known at a call")
        value = function(*args, **kwargs)
        return self.as_tuple(value) if isinstance(value, KeysView | ValuesView | ItemsView) else self.created(value)

    def parent(self, frame: Expressions, node: ast.AST) -> Parent:
        """super()."""
        code = frame.function.__code__
        if "__class__" not in frame.cells or not code.co_argcount:
            raise frame.refuse(node, "calls super() outside of a method")
        owner = frame.scopes[0].get(code.co_varnames[0])
        if not isinstance(owner, nn.Module):
            raise frame.refuse(node, "calls super() of what isn't a module")
        return Parent(owner, frame.cells["__class__"].cell_contents)

    # --- modules ------------------------------------------------------------------------------------------------------

    def _call_module(self, frame: Any, node: Any, module: nn.Module, args: list[Any], kwargs: dict[str, Any]) -> Any:
        path = self.path(frame, node, module)
        if not self._is_leaf(module):
            last, looked, given = next(iter(reversed(self.graph.nodes)), None), len(self.looked), {*self._given}
            try:
                self.placed(module)
                self.looked.forward(module)
                if self._is_sequence(module) and len(args) == 1 and not kwargs:
                    return self._sequence(frame, node, module, args[0])
                forward = self._forward(module)
                return self._call_function(frame, node, forward, [module, *args], kwargs)
            except Refused as refused:
                self._back_to(last)
                self.looked.back_to(looked)
                self._given = given
                self.paths[id(module)] = path
                self.left = [left for left in self.left if not left.path.startswith(f"{path}.")]
                if module._modules:
                    self.left.append(Left(path, type(module).__name__, str(refused)))
        if not is_known_layer(module) and has_mutable((*args, *kwargs.values())):
            raise frame.refuse(node, f"hands a list to {path}, which may edit it")
        self.looked.late |= not is_known_layer(module)
        arguments = tuple([self._argument(frame, node, v) for v in args])
        return self.graph.call_module(path, arguments, {k: self._argument(frame, node, v) for k, v in kwargs.items()})

    def _back_to(self, last: fx.Node | None) -> None:
        """Take away the nodes after this one."""
        for node in reversed([*self.graph.nodes]):
            if node is last:
                break
            self.graph.erase_node(node)

    def _is_leaf(self, module: nn.Module) -> bool:
        """Whether its call is a node: somebody watches it, or the module is torch's or ours and no Sequential."""
        if module is self.model:
            return False
        home = type(module).__module__
        torchs = home.startswith(("torch.nn.", "torch.ao.nn.", "fastlayers.")) and not isinstance(module, nn.Sequential)
        called = found_on_class(type(module), "__call__")
        own_call = called is not found_on_class(nn.Module, "__call__")
        watched = plan.is_watched(module) or _torch.has_global_hook()
        return watched or torchs or own_call

    def _is_sequence(self, module: nn.Module) -> bool:
        """Whether its forward calls its children one after the other, and does nothing else."""
        forward = forward_of(type(module))
        home = getattr(forward, "__module__", "")
        known = home == "torch.nn.modules.container" or home == "fastlayers.modules.container"
        iterates = found_on_class(type(module), "__iter__") is found_on_class(nn.Sequential, "__iter__")
        return isinstance(module, nn.Sequential) and known and iterates

    def _sequence(self, frame: Any, node: Any, module: nn.Module, x: Any) -> Any:
        self.looked.children(module)
        for name in module._modules:
            x = self._call_module(frame, node, self.child(frame, node, module, name), [x], {})
        return x


def is_known_layer(module: nn.Module) -> bool:
    """Whether its call changes nothing but its own buffers: it is torch's or ours, and nobody watches it."""
    return type(module).__module__.startswith(("torch.nn.modules.", "fastlayers.modules.")) and not plan.is_watched(
        module
    )


def _name(function: Any) -> str:
    name = getattr(function, "__qualname__", None) or type(function).__name__
    home = getattr(function, "__module__", None)
    return f"{home}.{name}" if isinstance(home, str) and home not in ("builtins", "__main__") else name
