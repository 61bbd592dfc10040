"""The gated layers of a transformer, `down(activation(gate(x)) * up(x))`, where a model's graph has them: one function for
autograd. Gate and up may be the halves of one layer's result, `gate_up(x).chunk(2, -1)`."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from ..ops.gated_mlp import gated_layers, packed_gated_layers
from . import plan
from .activation import layer_of
from .linear import params
from .rows import Finder, activation_of, activation_part
from .values import unpack

__all__ = ["find", "replace", "run", "run_packed"]

_PRODUCTS = (operator.mul, torch.mul, torch.multiply, "mul", "multiply")


class Gated(NamedTuple):
    """The nodes, in the order of the names below."""

    gate: fx.Node
    activation: fx.Node
    up: fx.Node
    product: fx.Node
    down: fx.Node


class Packed(NamedTuple):
    """The same where one layer computes both halves."""

    both: fx.Node
    chunk: fx.Node
    parts: fx.Node
    """The chunk itself or, where it was unpacked into two variables, what unpacks it."""
    gate: fx.Node
    up: fx.Node
    activation: fx.Node
    product: fx.Node
    down: fx.Node


def find(finder: Finder) -> Iterator[Gated | Packed]:
    """All of them in a graph. Each node's result goes into the next one alone, and nothing is written into between the first and
    the last."""
    for node in finder.nodes:
        found = _found(finder, node) or _found_packed(finder, node)
        if found is not None and _may_move(finder, found):
            yield found


def _found(finder: Finder, product: fx.Node) -> Gated | None:
    """The nodes around a product, if it is one of a gate and what it lets through."""
    for gate, activation, up, down in _factors(finder, product):
        found = Gated(gate, activation, up, product, down)
        layers = all([finder.is_layer(node, "linear") for node in (gate, up, down)])
        if layers and gate.args[0] is up.args[0] and all([len(node.users) == 1 for node in found[:-1]]):
            return found
    return None


def _factors(finder: Finder, product: fx.Node) -> Iterator[tuple[fx.Node, ...]]:
    """What a product may be one of, in either order: an activation's argument, the activation and the other factor; and the one
    node that takes the product."""
    if product.target not in _PRODUCTS or len(product.args) != 2 or product.kwargs or len(product.users) != 1:
        return
    (down,) = product.users
    for activation, up in (product.args, product.args[::-1]):
        if isinstance(activation, fx.Node) and isinstance(up, fx.Node) and finder.is_layer(activation, "activation"):
            gate = activation.args[0]
            if isinstance(gate, fx.Node):
                yield gate, activation, up, down


def _found_packed(finder: Finder, product: fx.Node) -> Packed | None:
    """The nodes around a product, if its factors are the halves of one layer's result."""
    for gate, activation, up, down in _factors(finder, product):
        if not gate.target is up.target is operator.getitem or gate.args[0] is not up.args[0]:
            continue
        parts: Any = gate.args[0]
        chunk: Any = parts.args[0] if parts.target is unpack else parts
        if (gate.args[1], up.args[1]) not in ((0, 1), (1, 0)) or not _is_halving(chunk):
            continue
        found = Packed(chunk.args[0], chunk, parts, gate, up, activation, product, down)
        layers = finder.is_layer(found.both, "linear") and finder.is_layer(down, "linear")
        alone = all([len(node.users) == 1 for node in (found.both, gate, up, activation)])
        if layers and alone and len(parts.users) == 2 and (chunk is parts or len(chunk.users) == 1):
            return found
    return None


def _is_halving(node: fx.Node) -> bool:
    """Whether it is a `chunk` of a tensor into two along its last dimension."""
    if node.target not in (torch.chunk, "chunk") or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    words = dict(zip(("chunks", "dim"), node.args[1:], strict=False)) | node.kwargs
    return words == dict(chunks=2, dim=-1)


def _may_move(finder: Finder, found: Gated | Packed) -> bool:
    """Whether all of it may run where its last node stands."""
    return not any([finder.writes(node, finder.called(found)) for node in finder.between(found)])


def replace(graph: fx.Graph, found: Gated | Packed, order: dict[fx.Node, int]) -> None:
    """Put a call of `run` or `run_packed` in the place of these nodes."""
    with graph.inserting_before(found.down):
        function = activation_of(found.activation)
        node = found.activation
        activation = graph.get_attr(str(node.target)) if function is None else activation_part(node, function)
        swapped = found.product.args[0] is found.up
        if isinstance(found, Packed):
            layers = [graph.get_attr(str(node.target)) for node in (found.both, found.down)]
            gate_last = found.gate.args[1] == 1
            call = graph.call_function(run_packed, (found.both.args[0], activation, *layers, gate_last, swapped))
        else:
            layers = [graph.get_attr(str(node.target)) for node in (found.gate, found.up, found.down)]
            turns = [("gate", "activation", "up")[i] for i in sorted(range(3), key=lambda i: order[found[i]])]
            call = graph.call_function(run, (found.gate.args[0], activation, *layers, " ".join(turns), swapped))
        call.meta["is_wrapped"] = True  # as torch.fx.wrap: when the graph is traced again, the call stays one
    found.down.replace_all_uses_with(call)
    for node in sorted({*found}, key=order.__getitem__, reverse=True):
        graph.erase_node(node)


def run(x: torch.Tensor, activation: Any, gate: Any, up: Any, down: Any, turns: str, swapped: bool) -> torch.Tensor:
    """down(activation(gate(x)) * up(x)), as one call where every layer may be joined now.

    Args:
        turns: in which order the model calls the inner layers, "gate activation up" say.
        swapped: whether `up` is the first factor.
    """
    activation = layer_of(activation)
    layers = (gate, activation, up, down)
    values = plan.values(layers, ("linear", "activation", "linear", "linear"))
    if values is not None:
        y = plan.named(layers, gated_layers, x, params(gate), params(up), params(down), values[1].what)
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


def run_packed(x: torch.Tensor, activation: Any, both: Any, down: Any, gate_last: bool, swapped: bool) -> torch.Tensor:
    """down(activation(gate) * up) of the halves of both(x), as one call where every layer may be joined now.

    Args:
        gate_last: whether the gate is the second half.
        swapped: whether `up` is the first factor.
    """
    activation = layer_of(activation)
    layers = (both, activation, down)
    values = plan.values(layers, ("linear", "activation", "linear"))
    if values is not None:
        y = plan.named(layers, packed_gated_layers, x, params(both), params(down), values[1].what, gate_last)
        if y is not None:
            return y
    first, second = both(x).chunk(2, -1)
    gate, up = (second, first) if gate_last else (first, second)
    gate = activation(gate)
    return down(up * gate if swapped else gate * up)
