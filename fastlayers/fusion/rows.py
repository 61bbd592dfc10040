"""Which nodes of a model's graph are layers in a row, and a call of `run` in the place of each row.

A row is a chain of nodes of which each one's result goes into the next alone. It may end in a sum and a norm where others use the
sum, too, as in the residual stream of a transformer: then the call has two results, and stands where the sum stood.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .. import _torch
from ..ops.activation import CALLS, Activation
from ..ops.norm import rms_norm_expression
from . import linear, norm, plan
from .values import inplace

_SUMS = (operator.add, torch.add, "add")
_KNOWN = ("torch", "fastlayers", "builtins", "math", "_operator")
"""Packages whose functions write into what they are given only if their names or arguments say so."""

_RANDOM = {
    "alpha_dropout", "bernoulli", "cauchy", "dropout", "dropout1d", "dropout2d", "dropout3d", "exponential",
    "feature_alpha_dropout", "feature_dropout", "fractional_max_pool2d", "fractional_max_pool3d", "geometric",
    "gumbel_softmax", "log_normal", "multi_head_attention_forward", "multinomial", "normal", "poisson", "rand", "rand_like",
    "randint", "randint_like", "randn", "randn_like", "random", "randperm", "rrelu", "scaled_dot_product_attention", "uniform",
}  # fmt: skip
"""Functions and methods that draw random numbers, without the underscore of those that write into a tensor."""


class _Member(NamedTuple):
    """A node of a row."""

    node: fx.Node
    role: str
    part: Any
    """A module's name, an activation, or a word for how a residual is added."""
    input: int = 0
    """Which of the node's arguments comes from the node before it."""
    residual: int = 0
    """Which of them is the residual. Not the argument itself, which an earlier row may replace."""


class _Written(NamedTuple):
    """What stands for a layer that is written out."""

    role: str
    part: str


_WRITTEN: dict[Any, _Written] = {
    rms_norm_expression: _Written(norm.WRITTEN, norm.WRITTEN),
    linear.transposed_linear: _Written("linear", linear.WRITTEN),
}
"""By the function that computes it, whose first argument is the layer's input."""


class Finder:
    """Finds rows in a graph. `modules` are the model's, by path; `run` is what the graph calls for a row."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], run: Callable[..., Any]):
        self.graph, self.modules, self.run = graph, modules, run
        self.nodes = list(graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}

    def rows(self, taken: set[fx.Node]) -> Iterator[list[_Member]]:
        """All rows of more than one node, none of them in two, nor among those that are taken."""
        for first in self.nodes:
            row = [] if first in taken else self._joined(self._row(first, taken))
            if row:
                taken.update([member.node for member in row])
                yield row

    def _row(self, first: fx.Node, taken: set[fx.Node]) -> list[_Member]:
        """The longest row that begins here. All of it may run where its last node stands (or where its sum does): until then
        nobody else sees what it computes, nothing is written into that it reads, and random numbers are drawn in the same
        order."""
        begin = self._begin(first)
        row = [] if begin is None else [begin]
        while row:
            last = row[-1]
            node = self._next(last)
            if node is None or node in taken:
                break
            member = self._member(node, last.node)
            if member is None:
                break
            if member.part == "iadd" and all([m.role == "dropout" for m in row]):
                break  # in eval a dropout gives back its input, so others may see what is written into it
            between = self.nodes[self.order[last.node] + 1 : self.order[node]]
            called = self.called([m.node for m in (*row, member)])
            random = any([m.role == "dropout" for m in row])
            if any([self.writes(n, called) or (random and self.draws(n)) for n in between]):
                break
            row.append(member)
            if len(last.node.users) > 1:
                break
        return row

    def _joined(self, row: list[_Member]) -> list[_Member]:
        """The part of the row from the first to the last of its nodes that some pattern joins with others, be it with the
        dropouts or, as in eval, without them."""
        joined: list[int] = []
        for places in (range(len(row)), [i for i, member in enumerate(row) if member.role != "dropout"]):
            steps = plan.plan(tuple([plan.Value(row[i].role) for i in places]))
            joined += [i for step in steps if step.pattern is not None for i in places[step.begin : step.end]]
        return row[min(joined) : max(joined) + 1] if joined else []

    def _begin(self, node: fx.Node) -> _Member | None:
        """A row begins with a layer that isn't an activation, or with a sum of two tensors."""
        if node.op == "call_module":
            member = self._member(node, None)
            late = member is not None and getattr(
                self.modules[str(node.target)], "inplace", False
            )  # others see it written
            return None if member is None or member.role == "activation" or late else member
        if node.target is linear.transposed_linear:
            return self._member(node, None)
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and node.target in _SUMS:
            member = self._member(node, first)
            return member if member is not None and self._next(member) is not None else None
        return None

    def _next(self, last: _Member) -> fx.Node | None:
        """The one node that takes the last one's result; of a sum's several, the norm that can be joined with it."""
        users = sorted(last.node.users, key=self.order.__getitem__)
        if len(users) > 1 and last.role == "add":
            norms = [u for u in users if plan.follows_sum(self._role(u))][:1]
            # The weight of a norm that is written out may be computed after the sum: then nobody may ask for that before.
            users = [user for user in norms if user.op == "call_module" or user is users[0]]
        elif last.role == "add" and len(users) == 1 and not self._continues(users[0]):
            return None
        return users[0] if len(users) == 1 else None

    def _continues(self, node: fx.Node) -> bool:
        return self._role(node) is not None or activation_of(node) is not None

    def _role(self, node: fx.Node) -> str | None:
        """What the class of the module that it calls, with one input and nothing else, stands for; or a layer that is
        written out."""
        if node.target in _WRITTEN:
            return _WRITTEN[node.target].role
        alone = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        return plan.role(type(self.modules[str(node.target)])) if alone else None

    def _member(self, node: fx.Node, before: fx.Node | None) -> _Member | None:
        if node.target in _WRITTEN:
            x, *others = node.args
            as_input = before is None or (x is before and all([arg is not before for arg in others]))
            return _Member(node, *_WRITTEN[node.target]) if as_input else None
        if node.op == "call_module":
            role = self._role(node)
            return None if role is None else _Member(node, role, str(node.target))
        if before is not None:
            added = self._added(node, before)
            if added is not None:
                return _Member(node, "add", *added)
        activation = activation_of(node)
        return None if activation is None else _Member(node, "activation", activation)

    def _added(self, node: fx.Node, one: fx.Node) -> tuple[str, int, int] | None:
        """If it is the sum of this operand and another one, and isn't written into the other one: its word, and which of the
        arguments the two are."""
        operands, word, offset = node.args, "add", 0
        if node.target is inplace and operands[0] == "iadd":
            operands, word, offset = operands[1:], "iadd", 1
        elif node.target == "add_":
            word = "iadd"
        elif node.target not in _SUMS:
            return None
        if len(operands) != 2 or node.kwargs:
            return None
        place = 0 if operands[0] is one else 1
        other = operands[1 - place]
        if other is one or not isinstance(other, fx.Node):
            return None
        if operands[0] is not one:
            word = {"add": "radd"}.get(word, "")
        return (word, offset + place, offset + 1 - place) if word else None

    def is_layer(self, node: fx.Node, role: str) -> bool:
        """Whether it calls a module of this role with one input and nothing else, or an activation's function."""
        if role == "activation" and activation_of(node) is not None:
            return True
        return node.op == "call_module" and self._role(node) == role

    def between(self, nodes: Collection[fx.Node]) -> list[fx.Node]:
        """The other nodes from the first to the last of these."""
        places = [self.order[node] for node in nodes]
        return [node for node in self.nodes[min(places) : max(places)] if node not in nodes]

    def called(self, nodes: Iterable[fx.Node]) -> list[nn.Module]:
        """The modules that these nodes call."""
        return [self.modules[str(node.target)] for node in nodes if node.op == "call_module"]

    def writes(self, node: fx.Node, called: list[nn.Module]) -> bool:
        """Whether it might write into a tensor that is there already, or into statistics of one of these modules."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            known = type(module).__module__.startswith(("torch.nn.modules.", "fastlayers.modules."))
            harmless = known and not getattr(module, "inplace", False) and not plan.is_watched(module)
            return not harmless or any([module is one for one in called])
        if node.op == "call_method":
            return str(node.target).endswith("_") or not hasattr(torch.Tensor, str(node.target))
        if node.op == "call_function":
            known = node.target is not inplace and _home(node) in _KNOWN
            return not known or getattr(node.target, "__name__", "_").endswith("_") or _writes_as_asked(node)
        return False

    def draws(self, node: fx.Node) -> bool:
        """Whether it might draw random numbers."""
        if node.op == "call_module":
            return plan.role(type(self.modules[str(node.target)])) in (None, "dropout")
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        return name.rstrip("_") in _RANDOM

    def replace(self, row: list[_Member]) -> None:
        """Put a call of `run` in the place of these nodes."""
        first, last = row[0], row[-1]
        with_sum = len(row[-2].node.users) > 1
        # Where the others look for the sum, or where the result is.
        at = row[-2].node if with_sum and last.node.op == "call_module" else last.node
        with self.graph.inserting_before(at):
            parts = [self._argument(member) for member in row]
            call = self.graph.call_function(self.run, (first.node.args[first.input], with_sum, *parts))
            call.meta["is_wrapped"] = True  # as torch.fx.wrap: when the graph is traced again, the call stays one
            result = call
            if with_sum:
                total = self.graph.call_function(operator.getitem, (call, 1))
                row[-2].node.replace_all_uses_with(total, lambda user: user is not last.node)
                result = self.graph.call_function(operator.getitem, (call, 0))
        last.node.replace_all_uses_with(result)
        for member in reversed(row):
            self.graph.erase_node(member.node)

    def _argument(self, member: _Member) -> Any:
        """What `run` is given for it."""
        if member.node.op == "call_module":
            return self.graph.get_attr(member.part)
        if member.node.target in _WRITTEN:
            return (member.part, *member.node.args[1:])
        if member.role == "add":
            return member.part, member.node.args[member.residual]
        return activation_part(member.node, member.part)


_WRITING = {"inplace": (None, False), "out": (None,), "max_norm": (None,), "running_mean": (None,)}
"""Arguments of functions that write only if they are given something else than this."""


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin function, which takes these by name alone
        return None


def _writes_as_asked(node: fx.Node) -> bool:
    """Whether a call of a function, which writes into nothing by itself, is asked to."""
    signature, given = _signature(node.target), node.kwargs  # type: ignore[arg-type]
    try:
        given = node.kwargs if signature is None else signature.bind(*node.args, **node.kwargs).arguments
    except TypeError:  # it will raise an error
        return True
    return any([given.get(name, values[0]) not in values for name, values in _WRITING.items()])


def _home(node: fx.Node) -> str:
    """The package of the function that it calls; none of operators, which anyone may have registered."""
    return "" if _torch.is_operator(node.target) else (getattr(node.target, "__module__", None) or "").split(".")[0]


def activation_of(node: fx.Node) -> Activation | None:
    """The value of the activation that it applies to its first argument; None if it is none."""
    function = node.op == "call_function" and _home(node) in ("torch", "fastlayers")
    if not (function or node.op == "call_method") or not node.args:
        return None
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    call = CALLS.get(name.removesuffix("_"))
    try:
        return None if call is None else call(*node.args[1:], **node.kwargs)
    except (TypeError, ValueError):  # arguments that it doesn't have, or that aren't known before the call
        return None


def activation_part(node: fx.Node, activation: Activation) -> Any:
    """What a row's call is given for the activation that this node applies."""
    return ("expression", activation) if node.meta.get("is_expression") else activation
