"""The statements of Python that a forward may consist of. Whatever has no method here is refused, as with expressions."""

from __future__ import annotations

import ast
import operator
from collections.abc import Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import fx
from torch.fx.proxy import TraceError

from . import source
from .expressions import BINARY, Expressions, words
from .values import MUTABLE, Text, has_node, unpack, verify

if TYPE_CHECKING:
    from .interpret import Interpreter

_INPLACE = {
    op: "i" + function.__name__.rstrip("_") for op, function in BINARY.items()
}  # operator.iadd, operator.iand, ...


class Return:
    """That a function has returned."""

    def __init__(self, value: Any):
        self.value = value


class Frame(Expressions):
    """One call of a function of Python's."""

    def __init__(self, interpreter: Interpreter, function: FunctionType, variables: dict[str, Any]):
        self.interpreter, self.function = interpreter, function
        self.scopes = [variables]
        """The function's variables, and those of the comprehensions around."""
        code = function.__code__
        self.cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=False))
        self.own = {*code.co_varnames, *code.co_cellvars}

    def run(self, tree: source.Function) -> Any:
        """What the function returns."""
        if isinstance(tree, ast.Lambda):
            return self._guarded(tree, lambda: self.value(tree.body))
        outcome = self.block(tree.body)
        return outcome.value if isinstance(outcome, Return) else None

    def _guarded(self, node: ast.AST, work: Any) -> Any:
        try:
            return work()
        except TraceError:
            raise
        except Exception as error:
            raise self.refuse(node, f"raises {type(error).__name__}: {error}") from error

    # --- statements ---------------------------------------------------------------------------------------------------

    def block(self, body: Sequence[ast.stmt]) -> Any:
        """Run statements; a Return, "break" or "continue" where one of them ends the block, else None."""
        for statement in body:
            self.step(statement)
            method = getattr(self, f"do_{type(statement).__name__}", None)
            if method is None:
                raise self.refuse(statement, f"{words(statement)} isn't traced")
            outcome = self._guarded(statement, lambda method=method, statement=statement: method(statement))
            if outcome is not None:
                return outcome
        return None

    def do_Pass(self, node: ast.Pass) -> None:
        pass

    def do_Break(self, node: ast.Break) -> str:
        return "break"

    def do_Continue(self, node: ast.Continue) -> str:
        return "continue"

    def do_Return(self, node: ast.Return) -> Return:
        return Return(None if node.value is None else self.value(node.value))

    def do_Expr(self, node: ast.Expr) -> None:
        self.value(node.value)

    def do_Assign(self, node: ast.Assign) -> None:
        value = self.value(node.value)
        for target in node.targets:
            self.assign(target, value)

    def do_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.assign(node.target, self.value(node.value))

    def do_AugAssign(self, node: ast.AugAssign) -> None:
        target = node.target
        if isinstance(target, ast.Attribute):
            raise self.refuse(node, "assigns to an attribute")
        if isinstance(target, ast.Name):
            self.assign(target, self._changed(node, self.name(target, target.id), self.value(node.value)))
            return
        base, key = self.value(target.value), self.value(target.slice)
        old = self.interpreter.subscript(self, target, base, key)
        self._set_item(target, base, key, self._changed(node, old, self.value(node.value)))

    def _changed(self, node: ast.AugAssign, old: Any, value: Any) -> Any:
        if isinstance(old, fx.Node):
            return self.interpreter.inplace(self, node, _INPLACE[type(node.op)], old, value)
        if isinstance(old, MUTABLE) and isinstance(value, fx.Node):
            raise self.refuse(node, "adds what is only known at a call")
        if isinstance(old, MUTABLE):
            self.interpreter.editable(self, node, old)
            return getattr(operator, _INPLACE[type(node.op)])(old, value)
        return self.binary(node, BINARY[type(node.op)], old, value)

    def do_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            if not isinstance(target, ast.Name) or target.id not in self.scopes[0]:
                raise self.refuse(node, "deletes more than a variable")
            del self.scopes[0][target.id]

    def do_If(self, node: ast.If) -> Any:
        return self.block(node.body if self.truth(node.test) else node.orelse)

    def do_For(self, node: ast.For) -> Any:
        for value in self.iterate(node.iter):
            self.assign(node.target, value)
            outcome = self.block(node.body)
            if outcome == "break":
                return None
            if isinstance(outcome, Return):
                return outcome
        return self.block(node.orelse)

    def do_While(self, node: ast.While) -> Any:
        while self.truth(node.test):
            outcome = self.block(node.body)
            if outcome == "break":
                return None
            if isinstance(outcome, Return):
                return outcome
        return self.block(node.orelse)

    def do_Assert(self, node: ast.Assert) -> None:
        if not __debug__:
            return
        condition, nodes = self.value(node.test), self.interpreter.graph.nodes
        count = len(nodes)
        message = None if node.msg is None else self.value(node.msg)
        if isinstance(condition, fx.Node) and not all([_never_fails(n) for n in [*nodes][count:]]):
            raise self.refuse(node, "computes a message that only a failure needs")
        self.asserted(node, condition, message)

    def asserted(self, node: ast.AST, condition: Any, message: Any = None) -> None:
        """That something is true, now or at every call."""
        if isinstance(condition, fx.Node):
            message = message if message is None or isinstance(message, Text) else Text("{}", [message])
            arguments = (None,) if message is None else (message.template, *message.values)
            self.interpreter.note(self, node, verify, (condition, *arguments))
        elif not self.is_true(node, condition):
            raise self.refuse(node, "fails")

    def do_Raise(self, node: ast.Raise) -> None:
        raise self.refuse(node, "is reached")

    # --- what is assigned to ------------------------------------------------------------------------------------------

    def assign(self, target: ast.AST, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.scopes[-1][target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            self._unpack(target, value)
        elif isinstance(target, ast.Subscript):
            self._set_item(target, self.value(target.value), self.value(target.slice), value)
        else:
            raise self.refuse(target, "assigns to an attribute")

    def _unpack(self, target: ast.Tuple | ast.List, value: Any) -> None:
        count = len(target.elts)
        starred = [i for i, t in enumerate(target.elts) if isinstance(t, ast.Starred)]
        if isinstance(value, fx.Node):
            if starred:
                raise self.refuse(target, "takes a number of values that is only known at a call")
            taken = self.interpreter.note(self, target, unpack, (value, count))
            values: list[Any] = [
                self.interpreter.graph.call_function(operator.getitem, (taken, i)) for i in range(count)
            ]
        else:
            values = list(self.iterate_value(target, value))
            if starred:
                begin, end = starred[0], len(values) - (count - starred[0] - 1)
                values[begin:end] = [self.interpreter.created(values[begin:end])]
        for inner, part in zip(target.elts, values, strict=True):
            self.assign(inner.value if isinstance(inner, ast.Starred) else inner, part)

    def _set_item(self, node: ast.Subscript, base: Any, key: Any, value: Any) -> None:
        if isinstance(base, fx.Node):
            self.interpreter.inplace(self, node, "setitem", base, key, value)
            return
        if has_node(key) or not isinstance(base, list | dict):
            raise self.refuse(node, "writes into what isn't the call's own")
        self.interpreter.editable(self, node, base)
        base[key] = value


def _never_fails(node: fx.Node) -> bool:
    """Whether it reads a tensor or what describes it."""
    described = node.op == "call_method" and node.target in ("dim", "size") and len(node.args) == 1 and not node.kwargs
    return described or node.op == "get_attr" or node.target is getattr
