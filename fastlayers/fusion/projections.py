"""Query, key and value of an attention layer with rotary embedding, where a model's graph has them, as one call: the results of
three layers in heads, `layer(x).view(batch, length, -1, head_dim).transpose(1, 2)`, or three parts of one layer's result, and a
function that turns two of them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.compiler import is_dynamo_compiling

from ..ops import rotary_projections
from . import plan, rotary
from .linear import params
from .rows import Finder
from .state import MISSING
from .values import bound, call_method, join, unpack, verify

__all__ = ["find", "is_call", "replace"]

_HEADS, _POSITIONS = 1, 2
"""Dimensions that a product in heads has exchanged."""


class _Part(NamedTuple):
    """The nodes of query, key or value."""

    layer: fx.Node
    slice: fx.Node | None
    """Of the layer's result; None where it is the layer's alone."""
    view: fx.Node
    transpose: fx.Node

    @property
    def method(self) -> tuple[str, Any]:
        """`view` or `reshape`, and what it is given."""
        _, *args = self.view.args
        return (args[0], args[1]) if self.view.target is call_method else (str(self.view.target), tuple(args))  # type: ignore[return-value]

    @property
    def bounds(self) -> tuple[Any, Any]:
        assert self.slice is not None
        taken: Any = self.slice.args[1]
        return taken[-1].start, taken[-1].stop


class Projections(NamedTuple):
    rotary: fx.Node
    parts: tuple[_Part, _Part, _Part]
    """Of query, key and value."""

    @property
    def nodes(self) -> set[fx.Node]:
        """All that run as one."""
        return {node for part in self.parts for node in part if node is not None} | {self.rotary}


def find(finder: Finder, may_get_hooks: bool) -> Iterator[Projections]:
    """All of them in a graph, none of whose nodes is in two.

    Args:
        may_get_hooks: whether the graph is still run when one of its layers has got a hook.
    """
    taken: set[fx.Node] = set()
    for node in finder.nodes:
        for found in _candidates(finder, node):
            if taken.isdisjoint(found.nodes) and _may_move(finder, found, may_get_hooks):
                taken |= found.nodes
                yield found
                break


def _candidates(finder: Finder, node: fx.Node) -> Iterator[Projections]:
    """What a node that turns query and key may be a part of. The value is any product that isn't turned."""
    given = _given(node)
    if given is None or given[1] not in (MISSING, _HEADS):
        return
    q, k = [_part(finder, one) for one in given[0][:2]]
    if q is None or k is None or q is k or any([len(part.transpose.users) > 1 for part in (q, k)]):
        return
    for value in _beside(finder, q):
        parts = q, k, value
        layers = {part.layer for part in parts}
        cut, inputs = {part.slice is not None for part in parts}, [part.layer.args[0] for part in parts]
        same = len(cut) == 1 and all([x is inputs[0] for x in inputs])
        alone = all([len(layer.users) == 3 // len(layers) for layer in layers])
        is_turned = any([rotary.called_by(user) for user in value.transpose.users])
        if same and alone and not is_turned and len(layers) == (1 if q.slice is not None else 3):
            yield Projections(node, parts)


def _given(node: fx.Node) -> tuple[Sequence[Any], Any] | None:
    """Query, key, cos, sin and unsqueeze_dim, if it calls a function for rotary embedding with nothing else."""
    function = rotary.called_by(node)
    known = None if function is None else rotary.found(function)
    return None if known is None else known.given(node.args, node.kwargs)


def _part(finder: Finder, node: Any) -> _Part | None:
    """What ends in this node, if it is a layer's result, or a part of one's, in heads."""
    if not _calls(node, "transpose", torch.transpose):
        return None
    view, *dims = node.args
    if [*dims] not in ([_HEADS, _POSITIONS], [_POSITIONS, _HEADS]) or not _calls(view, "view", "reshape", call_method):
        return None
    if view.target is call_method and view.args[1] not in ("view", "reshape"):
        return None
    source: Any = view.args[0]
    cut = source if _is_slice(source) else None
    layer = source if cut is None else source.args[0]
    alone = [n for n in (view, cut, layer if cut is None else None) if n is not None]
    if not isinstance(layer, fx.Node) or not finder.is_layer(layer, "linear") or any([len(n.users) > 1 for n in alone]):
        return None
    return _Part(layer, cut, view, node)


def _calls(node: Any, *targets: Any) -> bool:
    """Whether it is a call of one of these functions, or of a tensor's method of this name, with arguments by place."""
    is_call = isinstance(node, fx.Node) and node.op in ("call_function", "call_method")
    return is_call and not node.kwargs and node.target in targets


def _is_slice(node: Any) -> bool:
    """Whether it is `y[..., begin:end]`."""
    if not _calls(node, operator.getitem):
        return False
    key = node.args[1]
    taken = key[1] if isinstance(key, tuple) and len(key) == 2 and key[0] is Ellipsis else None
    return isinstance(taken, slice) and taken.step is None


def _beside(finder: Finder, part: _Part) -> Iterator[_Part]:
    """The parts of the same layer's result, or of those of other layers with the same input."""
    source: Any = part.layer if part.slice is not None else part.layer.args[0]
    for first in source.users:
        node = first
        while len(node.users) == 1:
            (node,) = node.users
            found = _part(finder, node)
            if found is not None:
                yield found
                break


def _may_move(finder: Finder, found: Projections, may_get_hooks: bool) -> bool:
    """Whether all of it may run where the rotary embedding stands: nothing in between writes into a tensor or raises an error of
    its own. Where a layer may get a hook, which can do anything, nothing in between looks into a tensor, draws a random number or
    is a layer either."""
    nodes, end = found.nodes, finder.order[found.rotary]
    if any([finder.order[user] < end for user in found.parts[2].transpose.users]):
        return False
    between = finder.between(nodes)
    if max([finder.order[node] for node in nodes]) > end:
        return False
    if may_get_hooks:
        return all([_describes(node) or _is_free(finder, node) for node in between])
    called = finder.called(nodes)
    return not any([node.target is verify or finder.writes(node, called) for node in between])


_DESCRIBING = {
    getattr, operator.getitem, tuple, join, unpack, "dim", "expand", "movedim", "narrow", "permute", "select", "size", "squeeze",
    "transpose", "unsqueeze", "view",
}  # fmt: skip
"""Functions, and methods of tensors, that look at what a tensor is and not at what it holds."""


def _describes(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr") or node.target in _DESCRIBING


def _is_free(finder: Finder, node: Any) -> bool:
    """Whether it is computed of sizes, numbers and constants alone."""
    if node.op not in ("call_function", "call_method") or node.target is verify or finder.writes(node, []):
        return False
    is_size = node.target in ("dim", "size") or (node.target is getattr and node.args[1] in _SIZES)
    return is_size or (not finder.draws(node) and all([_is_free(finder, one) for one in node.all_input_nodes]))


_SIZES = ("device", "dtype", "ndim", "shape")


def replace(graph: fx.Graph, found: Projections, order: dict[fx.Node, int]) -> None:
    """Put a call of `run` or `run_packed` in the place of these nodes."""
    function, given, parts = rotary.called_by(found.rotary), _given(found.rotary), found.parts
    assert given is not None
    (_, _, cos, sin), dim = given
    words = {} if dim is MISSING else {"unsqueeze_dim": dim}
    with graph.inserting_before(found.rotary):
        if parts[0].slice is None:
            layers: Any = tuple([graph.get_attr(str(part.layer.target)) for part in parts])
            target, how = run, tuple(sorted(range(3), key=lambda i: order[parts[i].layer]))
        else:
            layers = graph.get_attr(str(parts[0].layer.target))
            target, how = run_packed, tuple([part.bounds for part in parts])
        methods = tuple([part.method for part in parts])
        args = parts[0].layer.args[0], layers, how, methods, cos, sin, words
        call = graph.call_function(bound(target, function), args)
        call.meta["is_wrapped"] = True  # as torch.fx.wrap: when the graph is traced again, the call stays one
        turned, value = [graph.call_function(operator.getitem, (call, i)) for i in range(2)]
    found.rotary.replace_all_uses_with(turned)
    parts[2].transpose.replace_all_uses_with(value)
    for node in sorted(found.nodes, key=order.__getitem__, reverse=True):
        graph.erase_node(node)


def is_call(node: fx.Node) -> bool:
    """Whether it stands for projections with rotary embedding."""
    return isinstance(node.target, functools.partial) and node.target.func in (run, run_packed)


# --- what the graph calls -------------------------------------------------------------------------------------------------


def run(
    function: Callable[..., Any],
    x: torch.Tensor,
    layers: Sequence[Any],
    turns: Sequence[int],
    methods: Sequence[tuple[str, Any]],
    cos: torch.Tensor,
    sin: torch.Tensor,
    words: dict[str, Any],
) -> tuple[Any, torch.Tensor]:
    """What the function gives for query and key, and the value, as one call where every layer may be joined now.

    Args:
        function: for rotary embedding.
        layers: of query, key and value.
        turns: in which order the model calls them.
        methods: `view` or `reshape`, and what it is given, for query, key and value.
        words: the function's other arguments.
    """
    if _may_join(layers):
        given = [params(layer) for layer in layers]
        found = _angles(function, x, [weight.shape[0] for weight, _ in given], methods, cos, sin, words)
        if found is not None:
            angles, d = found
            y = plan.named(layers, rotary_projections.rotary_layers, x, given, *angles[:2], d, angles.interleaved)
            if y is not None:
                return _as_the_function(y, angles)
    parts: list[Any] = [None] * 3
    for i in turns:
        parts[i] = _in_heads(layers[i](x), *methods[i])
    q, k, v = parts
    return rotary.apply(function, q, k, cos, sin, **words), v


def run_packed(
    function: Callable[..., Any],
    x: torch.Tensor,
    layer: Any,
    bounds: Sequence[tuple[Any, Any]],
    methods: Sequence[tuple[str, Any]],
    cos: torch.Tensor,
    sin: torch.Tensor,
    words: dict[str, Any],
) -> tuple[Any, torch.Tensor]:
    """The same of three parts of one layer's result, `layer(x)[..., begin:end]`.

    Args:
        bounds: of query, key and value, where they begin and end.
    """
    if _may_join([layer]):
        given = params(layer)
        sizes = _sizes(bounds, given[0].shape[0])
        found = None if sizes is None else _angles(function, x, sizes, methods, cos, sin, words)
        if found is not None and sizes is not None and sizes[1] == sizes[2]:
            (angles, d), heads = found, (sizes[0] // found[1], sizes[1] // found[1])
            joined = rotary_projections.packed_rotary_layers
            y = plan.named([layer], joined, x, given, *angles[:2], heads, d, angles.interleaved)
            if y is not None:
                return _as_the_function(y, angles)
    product = layer(x)
    q, k, v = [
        _in_heads(product[..., begin:end], *method) for (begin, end), method in zip(bounds, methods, strict=True)
    ]
    return rotary.apply(function, q, k, cos, sin, **words), v


def _in_heads(product: torch.Tensor, method: str, shape: Any) -> torch.Tensor:
    return getattr(product, method)(*shape).transpose(_HEADS, _POSITIONS)


def _may_join(layers: Sequence[Any]) -> bool:
    """Whether these are Linear layers, and nobody would notice that their calls are no calls."""
    return not is_dynamo_compiling() and plan.values(layers, ["linear"] * len(layers)) is not None


def _sizes(bounds: Sequence[tuple[Any, Any]], size: int) -> list[int] | None:
    """How many features the parts have; None if they aren't all features, one part after the other."""
    found = [slice(begin, end).indices(size)[:2] for begin, end in bounds]
    edges = [0, *[end for _, end in found]]
    return [e - b for b, e in found] if edges == [*[begin for begin, _ in found], size] else None


def _angles(
    function: Any, x: Any, sizes: Sequence[int], methods: Sequence[Any], cos: Any, sin: Any, words: dict[str, Any]
) -> tuple[rotary.Angles, int] | None:
    """What the kernel is given, and how many features a head has; None where the layers and the function are to run."""
    known = rotary.found(function)
    if known is None or not all([isinstance(t, torch.Tensor) for t in (x, cos, sin)]) or x.dim() != 3 or not x.numel():
        return None
    found = {_head_dim(shape, x, size) for (_, shape), size in zip(methods, sizes, strict=True)}
    (head_dim,) = found if len(found) == 1 else {0}
    if not head_dim:
        return None
    dtype = rotary_projections.dtype_after(x)
    angles = known.angles((dtype, dtype), head_dim, cos, sin, words.get("unsqueeze_dim", MISSING))
    return None if angles is None or angles.dtype is not dtype else (angles, head_dim)


def _head_dim(shape: Sequence[Any], x: torch.Tensor, size: int) -> int:
    """How many features a head has, if a view of this shape has x's batch and positions and the features in heads; 0 if not."""
    given = [*shape[0]] if len(shape) == 1 and isinstance(shape[0], tuple | list) else [*shape]
    if len(given) != 4 or any([type(n) is not int for n in given]) or given.count(-1) > 1:
        return 0
    heads, head_dim = given[2:]
    if heads == -1 and head_dim > 0:
        heads = size // head_dim
    elif head_dim == -1 and heads > 0:
        head_dim = size // heads
    same = all([n in (-1, m) for n, m in zip(given, x.shape[:2], strict=False)])
    return head_dim if same and heads > 0 and head_dim > 0 and heads * head_dim == size else 0


def _as_the_function(results: Sequence[torch.Tensor], angles: rotary.Angles) -> tuple[Any, torch.Tensor]:
    q, k, v = results
    return (q.contiguous(), k.contiguous()) if angles.contiguous else (q, k), v
