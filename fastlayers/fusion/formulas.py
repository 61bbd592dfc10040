"""Operations that a model writes out in torch's functions and operators: activations, RMSNorm, a product with a bias. In a graph,
each becomes one call of ours."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from .. import _originals, functional
from .. import _torch_functional as F
from ..ops.norm import rms_norm_expression
from .activation import as_floating
from .linear import transposed_linear
from .rows import Finder

__all__ = ["replace"]


def _named(*names: str) -> dict[Any, str]:
    """One name for torch's functions, methods and operators that compute the same."""
    spaces = (operator, torch, F)
    found = {getattr(space, name): names[0] for name in names for space in spaces if hasattr(space, name)}
    return {**found, **dict.fromkeys(names, names[0])}


_NAMES: dict[Any, str] = {
    **_named("mul", "multiply"), **_named("add"), **_named("truediv", "div", "true_divide", "divide"), **_named("pow"),
    **_named("square"), **_named("mean"), **_named("rsqrt"), **_named("tanh"), **_named("erf"), **_named("sigmoid"),
    **_named("softplus"), **_named("relu6"), **_named("to"), **_named("type"), **_named("float"), **_named("type_as"),
}  # fmt: skip
_CURVES = ("tanh", "erf", "sigmoid", "softplus", "relu6")


def _name(node: Any) -> str | None:
    called = isinstance(node, fx.Node) and node.op in ("call_function", "call_method")
    return _NAMES.get(node.target) if called else None


# --- activations: polynomials in x and in curves of polynomials ------------------------------------------------------------


class Polynomial:
    """A sum of products: a coefficient for each product, which is a set of factors and their powers."""

    def __init__(self, terms: dict[Any, float]):
        self.terms = terms

    def __add__(self, other: Polynomial) -> Polynomial:
        return Polynomial({k: self.terms.get(k, 0) + other.terms.get(k, 0) for k in {**self.terms, **other.terms}})

    def __mul__(self, other: Polynomial) -> Polynomial:
        found = Polynomial({})
        for one, a in self.terms.items():
            for two, b in other.terms.items():
                powers = dict(one)
                for factor, power in two:
                    powers[factor] = powers.get(factor, 0) + power
                found += Polynomial({frozenset(powers.items()): a * b})
        return found

    @property
    def key(self) -> Any:
        """Equal for equal polynomials, but for the last digits of their coefficients, which people round."""
        return frozenset((term, f"{value:.5g}") for term, value in self.terms.items())


def _number(value: float) -> Polynomial:
    return Polynomial({frozenset(): value})


def _curve(name: str, x: Polynomial) -> Polynomial:
    return Polynomial({frozenset({((name, x.key), 1)}): 1.0})


_TERM = frozenset({("x", 1)})
_X = Polynomial({_TERM: 1.0})
_CUBE = _number(math.sqrt(2 / math.pi)) * (_X + _number(0.044715) * _X * _X * _X)
_HALF = _number(0.5) * _X
_ACTIVATIONS: dict[Any, tuple[Any, dict[str, Any]]] = {
    (_HALF + _HALF * _curve("tanh", _CUBE)).key: (functional.gelu, {"approximate": "tanh"}),
    (_HALF + _HALF * _curve("erf", _X * _number(math.sqrt(0.5)))).key: (functional.gelu, {}),
    (_X * _curve("sigmoid", _X)).key: (functional.silu, {}),
    (_X * _curve("tanh", _curve("softplus", _X))).key: (functional.mish, {}),
    (_X * _curve("relu6", _X + _number(3)) * _number(1 / 6)).key: (functional.hardswish, {}),
}
"""Our function and its arguments for what it computes."""
_MOST_NODES = 24
"""The most nodes an activation's expression may have."""


def _polynomial(node: Any, x: fx.Node, seen: dict[fx.Node, None]) -> Polynomial | None:
    """What a node computes of x, and in `seen` the nodes between; None if it is no polynomial of x and its curves."""
    if node is x:
        return _X
    if type(node) in (int, float):
        return _number(float(node))
    name = _name(node)
    if name is None or node.kwargs or len(seen) > _MOST_NODES:
        return None
    seen[node] = None
    if name == "pow" and len(node.args) == 2 and node.args[1] in (2, 3):
        base = _polynomial(node.args[0], x, seen)
        return None if base is None else base * base if node.args[1] == 2 else base * base * base
    if name == "truediv" and len(node.args) == 2 and isinstance(node.args[1], int | float) and node.args[1]:
        above = _polynomial(node.args[0], x, seen)
        return None if above is None else above * _number(1 / node.args[1])
    parts = [_polynomial(arg, x, seen) for arg in node.args]
    if None in parts:
        return None
    if name in ("add", "mul") and len(parts) == 2:
        return parts[0] + parts[1] if name == "add" else parts[0] * parts[1]  # type: ignore[operator]
    if name == "square" and len(parts) == 1:
        return parts[0] * parts[0]  # type: ignore[operator]
    return _curve(name, parts[0]) if name in _CURVES and len(parts) == 1 else None  # type: ignore[arg-type]


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes that an expression which ends here may be one of."""
    found: dict[fx.Node, None] = {}
    waiting = [*node.all_input_nodes]
    while waiting and len(found) <= _MOST_NODES:
        one = waiting.pop()
        if one not in found:
            found[one] = None
            waiting += one.all_input_nodes if _name(one) is not None else ()
    return [*found]


def _activation(node: fx.Node) -> tuple[list[fx.Node], Any, tuple[Any, ...], dict[str, Any]] | None:
    if _name(node) not in ("mul", "truediv"):
        return None
    for x in _inputs(node):
        seen: dict[fx.Node, None] = {}
        found = _polynomial(node, x, seen)
        if found is not None:
            function, kwargs = _ACTIVATIONS.get(found.key) or _swish(found, x, seen)
            if function is not None:
                return [*seen], function, (x,), kwargs
    return None


def _swish(found: Polynomial, x: fx.Node, seen: Iterable[fx.Node]) -> tuple[Any, dict[str, Any]]:
    """Our function and its argument if this is x * sigmoid(factor * x). The factor is that of the sigmoid's own argument, since a
    key has but five digits."""
    for node in seen:
        inner = _polynomial(node.args[0], x, {}) if _name(node) == "sigmoid" else None
        factor = 0.0 if inner is None or len(inner.terms) != 1 else inner.terms.get(_TERM, 0.0)
        if factor and math.isfinite(factor) and found.key == (_X * _curve("sigmoid", _number(factor) * _X)).key:
            return functional.swish, {"factor": factor}
    return None, {}


_FUNCTIONS = {functional.swish, *[function for function, _ in _ACTIVATIONS.values()]}


def activation_expression(input: torch.Tensor, name: str, **kwargs: Any) -> torch.Tensor:
    """Our function of this name. Of integers it is what the expression gives, a result in the default dtype: torch's functions
    refuse them."""
    return getattr(functional, name)(as_floating(input), **kwargs)


def take_integers(graph: fx.Graph) -> None:
    """Have the activations that were written out, and run alone, take integers as well."""
    for node in graph.nodes:
        if node.meta.pop("is_expression", False):
            node.args, node.target = (*node.args, node.target.__name__), activation_expression


# --- RMSNorm ---------------------------------------------------------------------------------------------------------------


def _dtype_of(node: Any) -> Any:
    """What a conversion converts to: a dtype, or the node whose dtype it is. None if it is no conversion."""
    name = _name(node)
    given = [*node.args[1:], *node.kwargs.values()] if name in ("to", "type", "float", "type_as") else []
    if name == "float":
        return torch.float32 if not given else None
    if len(given) != 1 or [*node.kwargs] not in ([], ["dtype"]):
        return None
    (to,) = given
    if isinstance(to, torch.dtype):
        return to
    if name == "type_as":
        return to
    asked = isinstance(to, fx.Node) and to.target is getattr and to.args[1] == "dtype"
    return to.args[0] if asked else None


def _only(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other(node: fx.Node | None, one: fx.Node) -> Any:
    """The other factor, if it is a product of this one and another node."""
    if node is None or _name(node) != "mul" or len(node.args) != 2 or node.kwargs:
        return None
    other = node.args[1] if node.args[0] is one else node.args[0]
    return other if isinstance(other, fx.Node) and other is not one else None


def _mean_of_squares(node: Any) -> tuple[list[fx.Node], fx.Node] | None:
    """The nodes, and what is squared, of the mean over the last dimension, which is kept."""
    if _name(node) != "mean":
        return None
    kwargs = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    dim = kwargs.get("dim")
    last = dim == -1 or (isinstance(dim, tuple | list) and [*dim] == [-1])
    squares = node.args[0] if node.args else None
    if not last or kwargs.get("keepdim") is not True or len(kwargs) != 2 or not isinstance(squares, fx.Node):
        return None
    name, args = _name(squares), squares.args
    power = name == "pow" and len(args) == 2 and args[1] == 2
    twice = name == "mul" and len(args) == 2 and args[0] is args[1]
    one = isinstance(args[0], fx.Node) if args else False
    if not one or squares.kwargs or not (power or twice or name == "square"):
        return None
    return [squares, node], args[0]  # type: ignore[return-value]


def _rms_norm(root: fx.Node) -> tuple[list[fx.Node], Any, tuple[Any, ...], dict[str, Any]] | None:
    """x * rsqrt(mean(x^2) + eps), converted before and after, times a weight; from its rsqrt on."""
    total = root.args[0] if _name(root) == "rsqrt" and len(root.args) == 1 else None
    if _name(total) != "add" or len(total.args) != 2 or total.kwargs:  # type: ignore[union-attr]
        return None
    for mean, eps in (total.args, total.args[::-1]):  # type: ignore[union-attr]
        found = _mean_of_squares(mean)
        if found is not None and isinstance(eps, float):
            break
    else:
        return None
    nodes, wide = found
    widens = _dtype_of(wide) is torch.float32
    x = wide.args[0] if widens else wide
    scaled = _only(root)
    factor = _other(scaled, root)
    if factor not in (x, wide) or not isinstance(x, fx.Node):
        return None
    nodes += [total, root, scaled]  # type: ignore[list-item]
    nodes += [wide] if widens and all([user in nodes for user in wide.users]) else []
    return _scaled(nodes, x, scaled, (eps, widens, factor is x))  # type: ignore[arg-type]


def _scaled(nodes: list[fx.Node], x: fx.Node, last: fx.Node, how: tuple[Any, ...]) -> Any:
    """What follows x * rsqrt(...): a conversion, a weight, or both in either order."""
    weight, cast, to = None, "", None
    for _ in range(2):
        user = _only(last)
        dtype, other = (None, None) if user is None else (_dtype_of(user), _other(user, last))
        converts = dtype is x or dtype in (torch.float16, torch.bfloat16)
        if converts and not cast and user.args[0] is last:  # type: ignore[union-attr]
            cast, to = "before" if weight is None else "after", None if dtype is x else dtype
        elif other is not None and other not in nodes and weight is None and cast != "after":
            weight = other
        else:
            break
        nodes.append(user)  # type: ignore[arg-type]
        last = user  # type: ignore[assignment]
    return nodes, rms_norm_expression, (x, weight, *how, cast, to), {}


# --- what is called as a function -------------------------------------------------------------------------------------------


def product_with_bias(bias: torch.Tensor, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """torch.addmm(bias, input, weight), as a Linear whose weight is transposed."""
    if input.dim() == 2 and bias.dim() == 1 and weight.dim() == 2 and bias.shape[0] == weight.shape[1]:
        return functional.linear(input, weight.t(), bias)
    return torch.addmm(bias, input, weight)


def _is_size(node: Any, x: fx.Node, key: Any) -> list[fx.Node] | None:
    """The nodes of `x.shape[key]` or `x.size()[key]`; of a number also those of `x.size(key)`."""
    if not isinstance(node, fx.Node) or node.kwargs:
        return None
    if node.op == "call_method" and node.target == "size" and node.args == (x, key):
        return [node]
    shape = node.args[0] if node.target is operator.getitem and node.args[1] == key else None
    if not isinstance(shape, fx.Node):
        return None
    method = shape.op == "call_method" and shape.target == "size" and shape.args == (x,) and not shape.kwargs
    return [shape, node] if method or (shape.target is getattr and shape.args == (x, "shape")) else None


def _conv1d(node: fx.Node) -> tuple[list[fx.Node], Any, tuple[Any, ...], dict[str, Any]] | None:
    """torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(x.size()[:-1] + (size,))."""
    if _addmm(node) is None:
        return None
    bias, rows, weight = node.args
    last = _only(node)
    views = [v for v in (rows, last) if isinstance(v, fx.Node) and v.op == "call_method" and v.target == "view"]
    if len(views) != 2 or any([v.kwargs for v in views]) or len(rows.args) != 3 or len(last.args) != 2:  # type: ignore[union-attr]
        return None
    (x, minus, features), total = rows.args, last.args[1]  # type: ignore[union-attr]
    joined = isinstance(total, fx.Node) and total.target is operator.add and isinstance(total.args[1], tuple)
    if minus != -1 or last.args[0] is not node or not isinstance(x, fx.Node) or not joined:  # type: ignore[union-attr]
        return None
    inner, outer = _is_size(features, x, -1), _is_size(total.args[0], x, slice(None, -1, None))  # type: ignore[union-attr]
    if inner is None or outer is None or len(total.args[1]) != 1:  # type: ignore[union-attr, arg-type]
        return None
    nodes = [*dict.fromkeys((*inner, *outer, rows, total, node, last))]  # the shape may be asked once for both
    return nodes, transposed_linear, (x, weight, bias, total.args[1][0]), {}  # type: ignore[union-attr, return-value]


def _addmm(node: fx.Node) -> tuple[list[fx.Node], Any, tuple[Any, ...], dict[str, Any]] | None:
    plain = node.target in (torch.addmm, "addmm") and len(node.args) == 3 and not node.kwargs
    return ([node], product_with_bias, node.args, {}) if plain else None


def replace_functions(graph: fx.Graph) -> int:
    """Have a graph call our functions where it calls those of torch.nn.functional; how many there are."""
    found = [node for node in graph.nodes if node.op == "call_function" and node.target in _originals.ours_for]
    for node in found:
        node.target = _originals.ours_for[node.target]
    return len(found)


# --- all of them -----------------------------------------------------------------------------------------------------------


def replace(finder: Finder) -> int:
    """Put calls of ours in the place of all that is written out in a graph; how many there are."""
    found = [*_found(finder)]
    calls: dict[Any, fx.Node] = {}  # by the node that each one stands for, which may be an argument of a later one
    for nodes, function, args, kwargs in found:
        last = max(nodes, key=finder.order.__getitem__)
        with finder.graph.inserting_before(last):
            call = finder.graph.call_function(function, tuple([calls.get(arg, arg) for arg in args]), kwargs)
            call.meta["is_wrapped"] = True
            call.meta["is_expression"] = function in _FUNCTIONS
        last.replace_all_uses_with(call)
        calls[last] = call
        for node in sorted(nodes, key=finder.order.__getitem__, reverse=True):
            asked = [n for n in node.all_input_nodes if n.target is getattr and n.args[1] == "dtype"]
            finder.graph.erase_node(node)
            for unused in [n for n in asked if not n.users]:  # of a conversion that is part of ours now
                finder.graph.erase_node(unused)
    return len(found)


def _found(finder: Finder) -> Iterator[Any]:
    taken: set[fx.Node] = set()
    for node in finder.nodes:
        for rule in (_activation, _rms_norm, _conv1d, _addmm):
            found = rule(node)
            if found is not None and taken.isdisjoint(found[0]) and _may_move(finder, found[0]):
                taken.update(found[0])
                yield found


def _may_move(finder: Finder, nodes: list[fx.Node]) -> bool:
    """Whether nobody else sees what is computed between, and nothing is written into meanwhile."""
    order = sorted(nodes, key=finder.order.__getitem__)
    inside = all([user in nodes for node in order[:-1] for user in node.users])
    between = finder.nodes[finder.order[order[0]] : finder.order[order[-1]]]
    return inside and not any([finder.writes(node, []) for node in between])
