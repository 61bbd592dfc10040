"""The expressions of Python that a forward may consist of. Whatever has no method here is refused: nothing of a forward is ever
left out. Each node of the syntax tree is computed with what is known, or noted in the graph."""

from __future__ import annotations

import ast
import builtins
import enum
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

from .._state import class_before
from . import source
from .state import ATOMS
from .values import MethodOf, Text, call_method, has_mutable, has_node, is_known, join

BINARY: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.MatMult: operator.matmul,
    ast.LShift: operator.lshift, ast.RShift: operator.rshift, ast.BitAnd: operator.and_, ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}  # fmt: skip
_UNARY: dict[type, Any] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert}
_COMPARE: dict[type, Any] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip


_SHAPING = ("expand", "permute", "repeat", "reshape", "view")
"""Methods that may be given any number of arguments, `x.view(*shape, -1)`: they take sizes or dimensions, and write nothing."""
_STEPS = 100_000
"""Statements after which a loop is taken for endless."""


class Refused(TraceError):
    """What stands in a forward that can't be traced rightly, and where. `place`: file and line."""

    def __init__(self, place: str, text: str, reason: str):
        super().__init__(f"{place}, `{text}`: {reason}")
        self.place, self.text, self.reason = place, text, reason


class Expressions:
    """The part of a function's call that computes expressions."""

    interpreter: Any
    """The Interpreter that reads this call."""
    function: Any
    scopes: list[dict[str, Any]]
    cells: dict[str, Any]
    own: set[str]

    def refuse(self, node: ast.AST, reason: str) -> Refused:
        number = getattr(node, "lineno", self.function.__code__.co_firstlineno)
        return Refused(f"{self.function.__code__.co_filename}:{number}", source.line(self.function, number), reason)

    def assign(self, target: ast.AST, value: Any) -> None:
        raise NotImplementedError

    def step(self, node: ast.AST) -> None:
        """Count a statement, or a turn of a loop."""
        self.interpreter.steps += 1
        if self.interpreter.steps > _STEPS:
            raise self.refuse(node, "runs too long")

    def value(self, node: ast.expr) -> Any:
        method = getattr(self, f"of_{type(node).__name__}", None)
        if method is None:
            raise self.refuse(node, f"{words(node)} isn't traced")
        return method(node)

    def known(self, node: ast.AST, value: Any) -> Any:
        """A value that something depends on; refused where it is only known at a call."""
        if isinstance(value, fx.Node):
            raise self.refuse(node, "depends on what is only known at a call")
        return self.interpreter.concrete(value)

    def truth(self, node: ast.expr) -> bool:
        return self.is_true(node, self.value(node))

    def is_true(self, node: ast.AST, value: Any) -> bool:
        value = self.known(node, value)
        if is_known(value) or callable(value):
            if isinstance(value, nn.Module):
                self.interpreter.decides(value, True)
            if isinstance(value, nn.ModuleList | nn.ModuleDict | nn.Sequential | nn.ParameterList | nn.ParameterDict):
                self.interpreter.looked.children(value)
            elif isinstance(value, nn.Module) and any([hasattr(type(value), n) for n in ("__len__", "__bool__")]):
                raise self.refuse(node, "asks a module whether it is true")
            return bool(value)
        raise self.refuse(node, f"asks whether a {type(value).__name__} is true")

    def iterate(self, node: ast.expr) -> Iterator[Any]:
        return self.iterate_value(node, self.value(node))

    def iterate_value(self, node: ast.AST, value: Any) -> Iterator[Any]:
        value = self.known(node, value)
        if isinstance(value, nn.Module):
            return iter(self.interpreter.elements(self, node, value))
        if is_known(value) and isinstance(value, Iterable):
            return iter(value)
        raise self.refuse(node, f"loops over a {type(value).__name__}")

    def of_Constant(self, node: ast.Constant) -> Any:
        return node.value

    def of_Name(self, node: ast.Name) -> Any:
        return self.name(node, node.id)

    def name(self, node: ast.AST, name: str) -> Any:
        for variables in reversed(self.scopes):
            if name in variables:
                return variables[name]
        if name in self.own:
            raise self.refuse(node, f"reads {name} before it is there")
        if name in self.cells:
            self.interpreter.looked.cell(self.cells[name], name)
            return self.cells[name].cell_contents
        variables = self.function.__globals__
        if name in variables:
            self.interpreter.looked.variable(variables, name)
            return variables[name]
        if not hasattr(builtins, name):
            raise self.refuse(node, f"there is no {name}")
        self.interpreter.looked.variable(variables, name)  # that none hides Python's
        return getattr(builtins, name)

    def of_Attribute(self, node: ast.Attribute) -> Any:
        return self._attribute(node, self.value(node.value))

    def _attribute(self, node: ast.Attribute, owner: Any) -> Any:
        if node.attr.startswith("__") and not node.attr.endswith("__"):
            raise self.refuse(node, "reads a private attribute of a class")
        return self.interpreter.attribute(self, node, owner, node.attr)

    def of_Subscript(self, node: ast.Subscript) -> Any:
        return self.interpreter.subscript(self, node, self.value(node.value), self.value(node.slice))

    def of_Slice(self, node: ast.Slice) -> slice:
        return slice(*[None if part is None else self.value(part) for part in (node.lower, node.upper, node.step)])

    def _elements(self, nodes: Sequence[ast.expr]) -> list[Any]:
        found: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                found.extend(self.iterate(node.value))
            else:
                found.append(self.value(node))
        return found

    def of_Tuple(self, node: ast.Tuple) -> Any:
        return self._tuple(node, node.elts)

    def _tuple(self, node: ast.AST, elements: Sequence[ast.expr]) -> Any:
        """The elements as a tuple. If one of them is `*x`, and x is only known at a call, so is the tuple. x is unpacked where it
        stands, since what follows may change it."""
        parts: list[Any] = []
        for element in elements:
            if not isinstance(element, ast.Starred):
                parts.append((self.value(element),))
                continue
            value = self.value(element.value)
            one = isinstance(value, fx.Node)
            parts.append(
                self.interpreter.note(self, element, tuple, (value,)) if one else (*self.iterate_value(element, value),)
            )
        if not any([isinstance(part, fx.Node) for part in parts]):
            return tuple([value for part in parts for value in part])
        if has_mutable(tuple([part for part in parts if not isinstance(part, fx.Node)])):
            raise self.refuse(node, "puts what may be edited into a tuple that is only known at a call")
        return self.interpreter.note(self, node, join, parts)

    def of_List(self, node: ast.List) -> Any:
        return self.interpreter.created(self._elements(node.elts))

    def of_Set(self, node: ast.Set) -> Any:
        return self.interpreter.created(set(self._hashable(node, self._elements(node.elts))))

    def _hashable(self, node: ast.AST, values: list[Any]) -> list[Any]:
        if has_node(values):
            raise self.refuse(node, "depends on what is only known at a call")
        return values

    def of_Dict(self, node: ast.Dict) -> Any:
        found: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                more = self.value(value)
                if not isinstance(more, dict):
                    raise self.refuse(node, "takes in what isn't a dictionary")
                found.update(more)
            else:
                (name,) = self._hashable(node, [self.known(key, self.value(key))])
                found[name] = self.value(value)
        return self.interpreter.created(found)

    def of_BinOp(self, node: ast.BinOp) -> Any:
        return self.binary(node, BINARY[type(node.op)], self.value(node.left), self.value(node.right))

    def binary(self, node: ast.AST, function: Any, left: Any, right: Any) -> Any:
        if isinstance(left, fx.Node) or isinstance(right, fx.Node):
            return self.interpreter.note(self, node, function, (left, right))
        left, right = (self.known(node, v) for v in (left, right))
        for value in (left, right):
            if not is_known(value):
                raise self.refuse(node, f"computes with a {type(value).__name__}")
        return self.interpreter.created(function(left, right))

    def of_UnaryOp(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Not):
            return not self.truth(node.operand)
        value = self.interpreter.concrete(self.value(node.operand))
        function = _UNARY[type(node.op)]
        if isinstance(value, fx.Node):
            return self.interpreter.note(self, node, function, (value,))
        if not isinstance(value, ATOMS):
            raise self.refuse(node, f"computes with a {type(value).__name__}")
        return function(value)

    def of_BoolOp(self, node: ast.BoolOp) -> Any:
        *before, last = node.values
        for part in before:
            value = self.value(part)
            if self.is_true(part, value) is isinstance(node.op, ast.Or):
                return value
        return self.value(last)

    def of_IfExp(self, node: ast.IfExp) -> Any:
        return self.value(node.body if self.truth(node.test) else node.orelse)

    def of_NamedExpr(self, node: ast.NamedExpr) -> Any:
        value = self.scopes[0][node.target.id] = self.value(node.value)
        return value

    def of_Compare(self, node: ast.Compare) -> Any:
        left = self.value(node.left)
        result: Any = True
        for i, (op, right_node) in enumerate(zip(node.ops, node.comparators, strict=True)):
            right = self.value(right_node)
            result = self._compared(node, op, left, right)
            if i + 1 < len(node.ops) and not self.is_true(node, result):
                return result
            left = right
        return result

    def _compared(self, node: ast.Compare, op: ast.cmpop, left: Any, right: Any) -> Any:
        left, right = self.interpreter.concrete(left), self.interpreter.concrete(right)
        own = class_before(type(self.interpreter.model)) if self.interpreter.in_place else None
        if own is not None and (left is own or right is own):
            # Where the graph can't be used, the forward runs as it is written, and would find the subclass.
            raise self.refuse(node, "compares its own class, of which fusing in place makes a subclass")
        if isinstance(op, ast.Is | ast.IsNot):
            same = self.interpreter.is_same(self, node, left, right)
            return same if isinstance(op, ast.Is) else not same
        if isinstance(op, ast.In | ast.NotIn):
            if isinstance(right, nn.Module):
                right = self.interpreter.names(self, node, right)
            keys = [*right] if isinstance(right, dict) else right
            if has_node(left) or has_node(keys) or not is_known(keys):
                raise self.refuse(node, "looks for something in what is only known at a call")
            return (left in right) is isinstance(op, ast.In)
        function = _COMPARE[type(op)]
        if isinstance(left, fx.Node) or isinstance(right, fx.Node):
            return self.interpreter.note(self, node, function, (left, right))
        if has_node(left) or has_node(right):
            raise self.refuse(node, "compares what is only known at a call")
        for value in (left, right):
            if isinstance(value, nn.Module):
                self.interpreter.decides(value, True)
            if (
                not (is_known(value) or isinstance(value, torch.dtype | torch.device | type | enum.Enum))
                and type(value).__eq__ is not object.__eq__
            ):
                raise self.refuse(node, f"compares a {type(value).__name__}")
        return function(left, right)

    def of_JoinedStr(self, node: ast.JoinedStr) -> Any:
        template, values = "", []
        for part in node.values:
            if isinstance(part, ast.Constant):
                template += str(part.value).replace("{", "{{").replace("}", "}}")
                continue
            assert isinstance(part, ast.FormattedValue)
            spec = "" if part.format_spec is None else self.value(part.format_spec)
            if not isinstance(spec, str):
                raise self.refuse(node, "formats as is only known at a call")
            template += (
                "{" + ("" if part.conversion < 0 else f"!{chr(part.conversion)}") + (f":{spec}" if spec else "") + "}"
            )
            values.append(self.interpreter.concrete(self.value(part.value)))
        if has_node(values):
            return Text(template, values)
        if not all([isinstance(v, (*ATOMS, tuple, list, torch.dtype, torch.device)) for v in values]):
            raise self.refuse(node, "writes out an object")
        return template.format(*values)

    # --- comprehensions -----------------------------------------------------------------------------------------------

    def _comprehended(self, generators: Sequence[ast.comprehension], make: Any) -> Iterator[Any]:
        first, *others = generators
        if first.is_async:
            raise self.refuse(first.iter, "waits")
        values = self.iterate(first.iter)
        self.scopes.append({})
        try:
            for value in values:
                self.step(first.iter)
                self.assign(first.target, value)
                if all([self.truth(condition) for condition in first.ifs]):
                    if others:
                        yield from self._comprehended(others, make)
                    else:
                        yield make()
        finally:
            self.scopes.pop()

    def of_ListComp(self, node: ast.ListComp) -> Any:
        return self.interpreter.created([*self._comprehended(node.generators, lambda: self.value(node.elt))])

    def of_GeneratorExp(self, node: ast.GeneratorExp) -> Any:
        return self.interpreter.as_tuple(self._comprehended(node.generators, lambda: self.value(node.elt)))

    def of_SetComp(self, node: ast.SetComp) -> Any:
        found = [*self._comprehended(node.generators, lambda: self.value(node.elt))]
        return self.interpreter.created(set(self._hashable(node, found)))

    def of_DictComp(self, node: ast.DictComp) -> Any:
        pairs = [*self._comprehended(node.generators, lambda: (self.value(node.key), self.value(node.value)))]
        self._hashable(node, [key for key, _ in pairs])
        return self.interpreter.created(dict(pairs))

    def of_Call(self, node: ast.Call) -> Any:
        base = self.interpreter.concrete(self.value(node.func.value)) if isinstance(node.func, ast.Attribute) else None
        if isinstance(node.func, ast.Attribute) and isinstance(base, fx.Node):
            function: Any = MethodOf(base, node.func.attr)
        elif isinstance(node.func, ast.Attribute):
            function = self._attribute(node.func, base)
        else:
            function = self.value(node.func)
        if function is super and not node.args and not node.keywords:
            return self.interpreter.parent(self, node)
        args = self._tuple(node, node.args)
        if isinstance(args, fx.Node):
            owner, name = (function.owner, function.name) if isinstance(function, MethodOf) else (None, "")
            if not isinstance(owner, fx.Node) or name not in _SHAPING or node.keywords:
                raise self.refuse(node, "takes arguments of which only a call knows how many there are")
            return self.interpreter.note(self, node, call_method, (owner, name, args))
        args = [*args]
        kwargs: dict[str, Any] = {}
        for keyword in node.keywords:
            value = self.value(keyword.value)
            if keyword.arg is not None:
                kwargs[keyword.arg] = value
            elif isinstance(value, dict):
                kwargs.update(value)
            else:
                raise self.refuse(node, "takes keywords that are only known at a call")
        return self.interpreter.call(self, node, function, args, kwargs)


def words(node: ast.AST) -> str:
    """A kind of statement or expression."""
    names = {
        "With": "a with statement",
        "Try": "a try statement",
        "FunctionDef": "a function within",
        "Lambda": "a lambda",
    }
    return names.get(type(node).__name__, f"{type(node).__name__} of Python's syntax")
