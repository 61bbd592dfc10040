"""The gated layers of a transformer, `down(activation(gate(x)) * up(x))`, where a model's graph has them: one function for
autograd."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from .._state import own
from ..ops.gated_mlp import gated_layers
from . import plan
from .activation import layer_of
from .rows import Finder, activation_of

__all__ = ["find", "replace", "run"]

_PRODUCTS = (operator.mul, torch.mul, torch.multiply, "mul", "multiply")


class Gated(NamedTuple):
    """The nodes, in the order of the names below."""

    gate: fx.Node
    activation: fx.Node
    up: fx.Node
    product: fx.Node
    down: fx.Node


def find(finder: Finder) -> Iterator[Gated]:
    """All of them in a graph. Each node's result goes into the next one alone, and nothing is written into between the first and
    the last."""
    for node in finder.nodes:
        found = _found(finder, node)
        if found is not None and _may_move(finder, found):
            yield found


def _found(finder: Finder, product: fx.Node) -> Gated | None:
    """The nodes around a product, if it is one of a gate and what it lets through."""
    if product.target not in _PRODUCTS or len(product.args) != 2 or product.kwargs:
        return None
    for activation, up in (product.args, product.args[::-1]):
        if not isinstance(activation, fx.Node) or not isinstance(up, fx.Node) or not activation.args:
            continue
        gate, down = activation.args[0], next(iter(product.users), None)
        if not isinstance(gate, fx.Node) or down is None or not finder.is_layer(activation, "activation"):
            continue
        found = Gated(gate, activation, up, product, down)
        layers = all([finder.is_layer(node, "linear") for node in (gate, up, down)])
        if layers and gate.args[0] is up.args[0] and all([len(node.users) == 1 for node in found[:-1]]):
            return found
    return None


def _may_move(finder: Finder, found: Gated) -> bool:
    """Whether all of it may run where its last node stands."""
    begin, end = min(finder.order[node] for node in found), finder.order[found.down]
    between = [node for node in finder.nodes[begin:end] if node not in found]
    return not any([finder.writes(node, finder.called(found)) for node in between])


def replace(graph: fx.Graph, found: Gated, order: dict[fx.Node, int]) -> None:
    """Put a call of `run` in the place of these nodes."""
    with graph.inserting_before(found.down):
        function = activation_of(found.activation)
        activation = graph.get_attr(str(found.activation.target)) if function is None else function
        layers = [graph.get_attr(str(node.target)) for node in (found.gate, found.up, found.down)]
        turns = [("gate", "activation", "up")[i] for i in sorted(range(3), key=lambda i: order[found[i]])]
        swapped = found.product.args[0] is found.up
        call = graph.call_function(run, (found.gate.args[0], activation, *layers, " ".join(turns), swapped))
        call.meta["is_wrapped"] = True  # as torch.fx.wrap: when the graph is traced again, the call stays one
    found.down.replace_all_uses_with(call)
    for node in sorted(found, key=order.__getitem__, reverse=True):
        graph.erase_node(node)


def run(x: torch.Tensor, activation: Any, gate: Any, up: Any, down: Any, turns: str, swapped: bool) -> torch.Tensor:
    """down(activation(gate(x)) * up(x)), as one call where every layer may be joined now.

    Args:
        turns: in which order the model calls the inner layers, "gate activation up" say.
        swapped: whether `up` is the first factor.
    """
    activation = layer_of(activation)
    layers = (gate, activation, up, down)
    if not plan.everyone_is_watched():
        values: list[Any] = [plan.value(layer) for layer in layers]
        if None not in values:
            params = [(own(t, "weight", type(t)), own(t, "bias", type(t))) for t in (gate, up, down)]
            y = plan.named(layers, gated_layers, x, *params, values[1].what)
            if y is not None:
                return y
    if turns == "gate up activation":
        first, other = gate(x), up(x)
        first = activation(first)
    elif turns == "up gate activation":
        other = up(x)
        first = plan.run((gate, activation), x)
    else:
        first = plan.run((gate, activation), x)
        other = up(x)
    return down(other * first if swapped else first * other)
