"""Fusion beyond Sequential: the layers that follow one another in a model's forward, as a torch.fx graph of it says."""

from __future__ import annotations

import copy
import operator
import threading
import warnings
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from .. import _torch
from ..ops.activation import Activation
from . import allowed, formulas, gated_mlp, linear, norm, plan, projections, rotary
from .activation import layer_of
from .interpret import Left
from .rows import Finder
from .state import Looked
from .tracer import Tracer


def fuse(model: nn.Module) -> fx.GraphModule:
    """A module that computes what the model does, with layers that follow one another in its `forward` run together, as they
    would within a Sequential of ours: wherever one's result goes into the next one alone. `accelerate` the model first.

        fastlayers.accelerate(model)
        fused = fastlayers.fuse(model.eval())
        with torch.inference_mode(): fused(x)

    A convolution, its BatchNorm (in eval, where no gradients are recorded), the addition of a residual (likewise) and ReLU
    become one kernel, and so do Linear and ReLU; Linear layers in a row are one function for autograd. So are the gated layers
    of a transformer, `down(activation(gate(x)) * up(x))`, whose two inner products are one kernel, and the projections to query,
    key and value before rotary embedding. Sum, product and activation may be operators, functions or methods of torch's. In
    training a Conv2d measures its result for the BatchNorm2d behind it, and a dropout, the sum with a residual and its LayerNorm
    or RMSNorm are one kernel. What is fused is decided at every call, as in a Sequential: a layer with a hook runs alone.

    The result, a torch.fx.GraphModule, shares the model's modules, parameters and buffers: it trains as the model does, and
    state_dict is the same. Not shared are the hooks, attributes and methods of the model itself.

    What a model writes out is found, too: RMSNorm, GELU and other activations as expressions, and torch.addmm with a bias.

    The forward of the model, and of the modules in it that aren't torch's or ours, is read and not run, so that nothing of
    the model or of the process changes meanwhile. Only what is known to be traced correctly becomes part of the graph: calls
    of modules, of torch's functions on tensors, of Python's and of the model's own functions, with decisions that don't
    depend on tensors' values. A module that does anything else (stores something, switches grad mode, branches on data) is
    called unchanged; if it contains other modules, a warning names the line. Flags, numbers and functions that a forward
    reads are looked at again at every call, and the model is traced anew where one has changed.

    Modules of torch and fastlayers, and modules with hooks, are called as usual. Arguments whose default is None, a bool or a
    str are fixed to that default. A pickled copy keeps the state at the time of pickling.

    Shape, Dtype: any that the model takes.
    Raises:
        torch.fx.proxy.TraceError: the model's own forward can't be traced; the message says which line stands in the way.
        TypeError: no module.
        ValueError: one whose forward was replaced on the instance. From a call of the result: an argument differs from the
            default that it was fused for, or is None where it wasn't.
        RuntimeError: when a fused module is called, if one of its submodules changes, during that call, something that the
            forward reads afterwards; when a pickled copy is called, if a flag or a number isn't what it was.
    Source: https://docs.pytorch.org/docs/stable/fx.html
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse takes a module, not {type(model).__name__}")
    if "forward" in model.__dict__:
        raise ValueError("forward was replaced on the instance, where fuse doesn't see it")
    if isinstance(model, fx.GraphModule):
        graph, looked, left = copy.deepcopy(model.graph), getattr(model, "_looked", Looked()), []
        source = getattr(model, "_source", ())
    else:
        graph, looked, left = _traced(model, model.training)
        source = (model,)
    if not _join(model, graph):
        warnings.warn("fuse found nothing to fuse; fastlayers.accelerate makes a model's layers ours", stacklevel=2)
    for message in _messages(left):
        warnings.warn(message, stacklevel=2)
    return _module(model, graph, looked, source)


# --- what the graph calls ---------------------------------------------------------------------------------------------


def run(input: torch.Tensor, with_sum: bool, *parts: Any) -> Any:
    """What a Sequential of these parts computes. Each part is a module, an activation that the model calls as a function, or a
    word and what it says something of: "expression" and an activation that the model writes out; "add" (x + residual), "radd"
    (residual + x) or "iadd" (x += residual) and a residual; or a word for an RMSNorm or a Linear that is written out, and what it
    is given after its input. `with_sum`: the result, and the sum that its last layer was given."""
    row = [_layer(part) for part in parts]
    return plan.run_with_sum(row, input) if with_sum else plan.run(row, input)


def _layer(part: Any) -> Any:
    if isinstance(part, Activation) or not isinstance(part, tuple) or part[0] == "expression":
        return layer_of(part)
    word, residual, *options = part
    if word == norm.WRITTEN:
        return norm.Written(residual, tuple(options))
    if word == linear.WRITTEN:
        return linear.Transposed(residual, *options)
    if word == "radd":
        return plan.Residual(residual, lambda x: residual + x)
    return plan.Residual(residual, lambda x: getattr(operator, word)(x, residual), inplace=word == "iadd")


# --- how it comes about -----------------------------------------------------------------------------------------------


def _traced(model: nn.Module, training: bool) -> tuple[fx.Graph, Looked, list[Left]]:
    tracer = Tracer(model, training, rotary.stands_for)
    tracer.trace()
    return tracer.graph, tracer.looked, tracer.left


def local(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], given: Any) -> fx.GraphModule | None:
    """The graph of a module's forward for calls with such arguments, as `Tracer.trace_call` makes it; None where it holds nothing
    that runs fused.

    Raises:
        TraceError: where the forward stands in the way.
    """
    tracer = Tracer(module, module.training, rotary.stands_for)
    tracer.trace_call(args, kwargs, given)
    return _in_place(tracer) if _join(module, tracer.graph, functions=True) else None


def beginning(
    module: nn.Module, function: FunctionType, args: Sequence[Any], given: Any, count: int, names: Sequence[str]
) -> fx.GraphModule | None:
    """The graph of the first statements of a module's method, as `Tracer.trace_beginning` makes it; None where they don't compute
    query, key and value as one call of ours does. It isn't to be run where one of the `_layers` that it calls, by path, is
    watched or somebody's own: its call may change what is read after it, while a part of the statements has run.

    Raises:
        TraceError: where a statement stands in the way.
    """
    tracer = Tracer(module, module.training, rotary.stands_for)
    tracer.trace_beginning(function, args, given, count, names)
    paths = [str(node.target) for node in tracer.graph.nodes if node.op == "call_module"]
    if tracer.looked.late:
        for layer in map(module.get_submodule, paths):
            tracer.placed(layer)
            tracer.looked.forward(layer)
    else:
        _join(module, tracer.graph, functions=True, may_get_hooks=False)
        if not any([projections.is_call(node) for node in tracer.graph.nodes]):
            return None
    made = _in_place(tracer)
    vars(made)["_layers"] = [path.split(".") for path in paths]
    return made


def _in_place(tracer: Tracer) -> fx.GraphModule:
    for node in tracer.graph.nodes:
        # torch.fx doesn't trace this graph again. It would be told of these nodes by a function that holds all frames around it.
        node.meta.pop("is_wrapped", None)
    made = _module(tracer.model, tracer.graph, tracer.looked.of_itself(tracer.model), ())
    made.graph.owning_module = None
    return made


def _join(model: nn.Module, graph: fx.Graph, functions: bool = False, may_get_hooks: bool = True) -> int:
    """Put a call in the place of each expression that is one of our functions, each row of layers, and each group around a gate;
    with `functions`, of each function of torch.nn.functional, too. How many there are."""
    modules = dict(model.named_modules(remove_duplicate=False))
    count = formulas.replace(Finder(graph, modules, run))
    finder = Finder(graph, modules, run)
    turned = [node for node in graph.nodes if rotary.called_by(node) is not None]
    gates, heads = list(gated_mlp.find(finder)), list(projections.find(finder, may_get_hooks))
    rows = list(finder.rows({node for gate in gates for node in gate} | {n for one in heads for n in one.nodes}))
    for row in rows:
        finder.replace(row)
    for gate in gates:
        gated_mlp.replace(graph, gate, finder.order)
    for one in heads:
        projections.replace(graph, one, finder.order)
    formulas.take_integers(graph)
    count += len(rows) + len(gates) + len(turned)
    return count + formulas.replace_functions(graph) if functions else count


def _messages(left: Sequence[Left]) -> list[str]:
    """Which modules are called as they stand, and why: one message for all that have the same reason."""
    found: dict[str, list[Left]] = {}
    for one in left:
        found.setdefault(one.reason, []).append(one)
    messages = []
    for reason, ones in found.items():
        names = ", ".join([one.path for one in ones[:3]]) + (f" and {len(ones) - 3} more" if len(ones) > 3 else "")
        messages.append(f"fuse leaves {names} ({ones[0].kind}) as it is: {reason}")
    return messages


_lock = threading.Lock()


class _Fused(fx.GraphModule):
    """A GraphModule that shares a model's modules, parameters and buffers, and is traced again when what was looked at has
    changed."""

    _source: tuple[nn.Module, ...]
    """The model; nothing in a pickled copy. In a tuple, so that it is no module of this one."""
    _looked: Looked

    @_torch.not_compiled(callees=False)  # the graph alone is: Dynamo would guard only a part of what is looked at
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._look_again()
        result = super().__call__(*args, **kwargs)
        if self._looked.late:
            self._look_back()
        return result

    @_torch.not_compiled(callees=True)
    def _look_again(self) -> None:
        if self._looked.changed(self) is not None:
            self._trace_again()

    @_torch.not_compiled(callees=True)
    def _look_back(self) -> None:
        changed = self._looked.changed(self, within=True)
        if changed is not None:
            raise RuntimeError(f"{changed} is changed by a call and read in it, which a graph can't follow")

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if self._source and self._looked.changed(self) is not None:  # at once, for whoever compiles this module
            self._trace_again()
        return self

    def _trace_again(self) -> None:
        with _lock:
            changed = self._looked.changed(self)
            if changed is None:  # another thread was here
                return
            if not self._source:
                raise RuntimeError(f"{changed} isn't what it was when the model was fused: fuse it again")
            (model,) = self._source
            graph, looked, _ = _traced(model, self.training)
            _join(model, graph)
            _adopt(self, model, graph)
            self.graph, self._looked = graph, looked

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != "_graph"}
        return _made(type(self).__name__, copy.deepcopy(state, memo), copy.deepcopy(self.graph))

    def __reduce__(self) -> Any:
        """The graph itself, where torch.fx would keep its code and trace that anew: random numbers would be constants then."""
        state = {name: value for name, value in self.__dict__.items() if name != "_graph"}
        for model in self._source:
            state["_looked"] = self._looked.without(model)
        nodes = []
        for node in self.graph.nodes:
            target = allowed.path_of(node.target) if node.op == "call_function" else None
            args, kwargs = (map_arg(a, lambda n: _Reference(n.name)) for a in (node.args, node.kwargs))
            whole = bool(node.meta.get("is_wrapped"))
            nodes.append((node.name, node.op, target, None if target else node.target, args, dict(kwargs), whole))
        return _unpickled, (type(self).__name__, {**state, "_source": ()}, nodes)


class _Reference(str):
    """A node's name, in a pickle."""


def _unpickled(name: str, state: dict[str, Any], nodes: Sequence[Any]) -> Any:
    graph, made = fx.Graph(), dict[str, fx.Node]()

    def resolved(value: Any) -> Any:
        if isinstance(value, _Reference):
            return made[value]
        if isinstance(value, slice):
            return slice(*[resolved(v) for v in (value.start, value.stop, value.step)])
        if isinstance(value, dict):
            return {k: resolved(v) for k, v in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*[resolved(v) for v in value])
        return type(value)([resolved(v) for v in value]) if isinstance(value, tuple | list) else value

    for own, op, path, target, args, kwargs, whole in nodes:
        function = target if path is None else allowed.named(path)
        made[own] = graph.create_node(op, function, resolved(tuple(args)), resolved(kwargs), own)
        if whole:
            made[own].meta["is_wrapped"] = True
    return _made(name, state, graph)


def _made(name: str, state: dict[str, Any], graph: fx.Graph) -> Any:
    """A fused module of this state."""
    fused = _Fused.__new__(_Fused)  # pyright: ignore[reportCallIssue]
    nn.Module.__init__(fused)
    vars(fused).update(state)
    type(fused).__name__ = name
    fused.graph = graph
    return fused


def _module(model: nn.Module, graph: fx.Graph, looked: Looked, source: tuple[nn.Module, ...]) -> fx.GraphModule:
    """A module that runs the graph, and shares the model's modules, parameters and buffers."""
    fused = _Fused(model, graph, type(model).__name__)
    _adopt(fused, model, graph)
    fused._looked, fused._source = looked, source
    return fused


def _adopt(fused: fx.GraphModule, model: nn.Module, graph: fx.Graph) -> None:
    """Give it what the model has, and of the model's other attributes the tensors that the graph reads."""
    for own in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        setattr(fused, own, getattr(model, own))
    for node in graph.nodes:
        if node.op == "get_attr" and node.target != "training" and node.target in model.__dict__:
            vars(fused)[node.target] = model.__dict__[node.target]
