"""What of a model is read first, to make a graph: its forward as a call without options has it, as a call of some kind has it, a
function, or the first statements of a method."""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.fx.proxy import TraceError

from . import source
from .expressions import Refused
from .interpret import Interpreter
from .state import ATOMS
from .statements import Frame
from .values import expects

__all__ = ["Tracer"]

_NOWHERE = ast.Pass()


@functools.cache
def _names_of_graphs() -> frozenset[str]:
    """The names that a graph's module has itself, and couldn't have from a model."""
    return frozenset((*dir(fx.GraphModule), *vars(fx.GraphModule(nn.Module(), fx.Graph()))))


class Tracer(Interpreter):
    """Makes one graph of one model."""

    def trace(self) -> None:
        """Fill the graph.

        Raises:
            TraceError: where the model's own forward stands in the way.
        """
        frame = self._begin()
        if self._is_sequence(self.model):
            result = self._sequence(frame, _NOWHERE, self.model, self.graph.placeholder("input"))
        else:
            result = self.run(frame.function, self._arguments(frame.function))
        self.graph.output(self._argument(frame, _NOWHERE, result))

    def trace_call(self, args: Sequence[Any], kwargs: dict[str, Any], given: Any) -> None:
        """Fill the graph for calls with such arguments: those that are `given` are its inputs, the others always the same.

        Raises:
            TraceError: where the model's own forward stands in the way.
        """
        self.in_place = True
        frame = self._begin()
        inputs = [self._input(f"argument_{i}") if v is given else v for i, v in enumerate(args)]
        named = {n: self._input(f"keyword_{i}") if v is given else v for i, (n, v) in enumerate(kwargs.items())}
        if self._is_sequence(self.model):
            if len(inputs) != 1 or named:
                raise frame.refuse(_NOWHERE, "takes one argument")
            result = self._sequence(frame, _NOWHERE, self.model, inputs[0])
        else:
            result = self._call_function(frame, _NOWHERE, frame.function, [self.model, *inputs], named)
        self.graph.output(self._argument(frame, _NOWHERE, result))

    def trace_function(self, function: types.FunctionType, count: int, kwargs: dict[str, Any]) -> None:
        """Fill the graph for calls of a function with so many arguments and these keywords. Raises TraceError where it stands
        in the way."""
        frame, inputs = Frame(self, function, {}), [self._input(f"argument_{i}") for i in range(count)]
        result = self.call(frame, _NOWHERE, function, inputs, kwargs)
        self.graph.output(self._argument(frame, _NOWHERE, result))

    def trace_beginning(
        self, function: types.FunctionType, args: Sequence[Any], given: Any, count: int, names: Sequence[str]
    ) -> None:
        """Fill the graph with so many of the first statements of a method of the model's, for calls with such arguments by place.
        Its result are the values that variables of these names have then.

        Raises:
            TraceError: where one of the statements stands in the way, returns, or leaves one of the variables without a value.
        """
        self.in_place = True
        self._begin()
        inputs = [self._input(f"argument_{i}") if v is given else v for i, v in enumerate(args)]
        variables = dict(zip(function.__code__.co_varnames, [self.model, *inputs], strict=False))
        frame = Frame(self, function, variables)
        try:
            body = source.tree(function).body
        except source.NotFound as error:
            raise frame.refuse(_NOWHERE, str(error)) from error
        assert isinstance(body, list)  # of a def; that of a lambda is an expression
        if frame.block(body[:count]) is not None:
            raise frame.refuse(_NOWHERE, "returns")
        missing = [name for name in names if name not in variables]
        values = tuple([variables[name] for name in names if name in variables])
        if missing or not self.hands_on(values, set()):
            raise frame.refuse(_NOWHERE, "leaves variables that a graph can't hand on")
        self.graph.output(self._argument(frame, _NOWHERE, values))

    def _begin(self) -> Frame:
        for name in (*self.model._modules, *self.model._parameters, *self.model._buffers):
            if name in _names_of_graphs():
                raise TraceError(
                    f"{name} of {type(self.model).__name__} has the name of an attribute of torch.fx.GraphModule's"
                )
        forward = self._forward(self.model)
        self.looked.written(self.model)
        self.looked.global_hooks()
        return Frame(self, forward, {})

    def _input(self, name: str) -> fx.Node:
        """An argument that is something: None would be another kind of call."""
        node = self.graph.placeholder(name)
        self._given.add(node)
        return node

    def _arguments(self, forward: types.FunctionType) -> dict[str, Any]:
        """The forward's variables at its beginning: a node for each argument, but for those that a model may well ask for."""
        parameters = [*inspect.signature(forward, follow_wrapped=False).parameters.values()]
        if not parameters or parameters[0].kind is parameters[0].VAR_POSITIONAL:
            raise TraceError("the model's forward names no self")
        first, *others = parameters
        found: dict[str, Any] = {first.name: self.model}
        checks = []
        for parameter in others:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                place = f"{forward.__code__.co_filename}:{forward.__code__.co_firstlineno}"
                text = source.line(forward, forward.__code__.co_firstlineno)
                raise Refused(place, text, f"takes any number of arguments as {parameter.name}")
            default = parameter.default
            if default is not parameter.empty and not isinstance(default, (*ATOMS, tuple)):
                raise TraceError(f"forward's argument {parameter.name} is a {type(default).__name__} by default")
            given = default if default is not parameter.empty else inspect.Signature.empty
            node = self.graph.placeholder(parameter.name, default_value=given)
            found[parameter.name] = node
            if default is None or isinstance(default, bool | str):  # what forward may well ask for: `if mask is None`
                checks.append((parameter.name, default, node))
                found[parameter.name] = default
        for check in checks:
            self._whole(self.graph.call_function(expects, check))
        return found
