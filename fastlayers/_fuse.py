"""Fusion beyond Sequential: torch.fx finds the layers that follow one another in a model's forward."""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import inplace_methods
from torch.fx.node import has_side_effect
from torch.fx.proxy import TraceError

from . import _fusion, functional
from .ops.pointwise import RECORDS

_ADD = (operator.add, torch.add, "add")


@has_side_effect
def inplace(operation: str, *args: Any) -> Any:
    """An operator that writes into its first operand: "iadd", "setitem", ..."""
    return getattr(operator, operation)(*args)


def run(input: torch.Tensor, residual: Any, *parts: Any) -> torch.Tensor:
    """What a Sequential of these parts computes. Among modules, words stand for functions: an activation's name, or what
    adds the residual: "add" (x + residual), "radd" (residual + x) or "iadd" (x += residual)."""
    row = [_function(part, residual) if isinstance(part, str) else part for part in parts]
    return _fusion.run(row, input)


def _function(word: str, residual: Any) -> Any:
    if word in RECORDS:
        return _activation(word)
    if word == "radd":
        return _fusion.Add(lambda x: residual + x, residual)
    return _fusion.Add(lambda x: getattr(operator, word)(x, residual), residual)


@functools.cache
def _activation(name: str) -> Any:
    """The function as a part of a run, whose class declares its record."""
    kind = type(name, (_fusion.Function,), {"pointwise": RECORDS[name]})
    return kind(getattr(functional, name, RECORDS[name].torch))


def fuse(model: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.GraphModule:
    """A module that computes what the model does, with layers that follow one another in its `forward` run together, as they
    would within a Sequential of ours: wherever one's result goes into the next one alone. `accelerate` the model first.

        fastlayers.accelerate(model)
        fused = fastlayers.fuse(model.eval())
        with torch.inference_mode(): fused(x)

    Conv2d, BatchNorm2d (in eval, where no gradients are recorded), the addition of a residual (likewise) and ReLU become one
    kernel, and so do Linear and ReLU; Linear layers in a row are one function for autograd. Sum and ReLU may be operators,
    functions or methods of torch's. What is fused is decided at every call, as in a Sequential: a layer with a hook runs
    alone.

    The result shares all of the model's modules, parameters and buffers, under their names and in their order: it trains as
    the model does, and state_dict is the same. It is a torch.fx.GraphModule, without the attributes, methods and hooks of
    the model's own. The model's Python runs once, now, with `training` as it is: it mustn't depend on data. Of modules that
    contain others, those that have a hook now are left whole.

    Args:
        concrete_args: as for torch.fx.symbolic_trace, arguments of forward that are the same at every call: by default those
            that have a default, which is what they will be. {}: none.
    Shape, Dtype: any that the model takes.
    Raises:
        torch.fx.proxy.TraceError: forward depends on data, or switches grad mode or autocast. Fuse the modules within that
            don't.
        TypeError: forward replaces a buffer.
    Source: https://docs.pytorch.org/docs/stable/fx.html
    """
    return _Fuser(model, concrete_args).result()


class _Proxy(fx.Proxy):
    """Notes `x += y` and `x[i] = y` as what they are: torch.fx would note x = x + y, and refuse the other. And notes our
    functions as ours."""

    def _fastlayers_note(self, function: Any, args: Any, kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, args, kwargs)


def _noting(operation: str) -> Any:
    def method(self: fx.Proxy, *args: Any) -> Any:
        noted = self.tracer.create_proxy("call_function", inplace, (operation, self, *args), {})
        noted.node.meta["is_wrapped"] = True
        return None if operation == "setitem" else noted

    return method


for _name in inplace_methods:
    setattr(_Proxy, f"__{_name}__", _noting(_name))


class _Tracer(fx.Tracer):
    """Keeps our layers whole, and whatever has a hook. Into our Sequentials it looks: they fuse nothing while torch.fx has
    its own in the place of Module.__call__."""

    proxy_buffer_attributes = True  # else a buffer that forward writes into would be written into now

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._modes = _modes()
        return super().trace(root, concrete_args)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise TraceError("forward switches grad mode or autocast, which torch.fx doesn't note")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _fusion.is_watched(m):
            return True
        ours = type(m).__module__.startswith("fastlayers.modules.") and not isinstance(m, nn.Sequential)
        return ours or super().is_leaf_module(m, module_qualified_name)


def _modes() -> Any:
    devices = ("cpu", "cuda")
    autocast = [torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in devices]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


class _Fuser:
    """Finds runs of nodes in a model's graph, and puts a call of `run` in the place of each."""

    def __init__(self, model: nn.Module, concrete_args: dict[str, Any] | None):
        self.model, self.modules = model, dict(model.named_modules(remove_duplicate=False))
        if concrete_args is None:
            parameters = inspect.signature(model.forward).parameters.values()
            concrete_args = {p.name: p.default for p in parameters if p.default is not p.empty}
        self.graph = _Tracer().trace(model, concrete_args)
        self.nodes = list(self.graph.nodes)
        for node in self.nodes:
            if isinstance(node.type, str):  # of `from __future__ import annotations`: torch.fx couldn't pickle it
                node.type = None
        self.order = {node: i for i, node in enumerate(self.nodes)}

    def result(self) -> fx.GraphModule:
        taken: set[fx.Node] = set()
        for first in self.nodes:
            if first not in taken and "forward_fused" in self._declared(first):
                found, words, residual = self._follow(first)
                taken.update(found)
                if len(found) > 1:
                    self._join(found, words, residual)
        fused = fx.GraphModule(self.model, self.graph, type(self.model).__name__)
        # All that the model has, called or not, in its order: state_dict and parameters are the same. Tensors that it keeps
        # otherwise, torch.fx makes buffers of.
        others = fused._buffers.keys() - self.model._buffers.keys()
        for own in ("_parameters", "_buffers", "_modules"):
            models, more = getattr(self.model, own), getattr(fused, own)
            setattr(fused, own, {**models, **{name: more[name] for name in more if name not in models}})
        fused._non_persistent_buffers_set = self.model._non_persistent_buffers_set | others
        return fused

    def _follow(self, first: fx.Node) -> tuple[list[fx.Node], list[str], Any]:
        """The longest run that begins here, the words for what calls no module, and what is added in it. All of it may run
        where its last node stands: until then nobody else sees what it computes, and nothing is written into."""
        found, words, residual, producer = [first], [""], None, type(self._module(first))
        while len(found[-1].users) == 1:
            last, (node,) = found[-1], found[-1].users
            word = ""
            if node.op == "call_module":
                declared = self._declared(node)
                if not (declared or type(self._module(node)) is getattr(producer, "normalizes", None)):
                    break
                if "forward_fused" in declared:
                    producer = type(self._module(node))
            elif residual is None and getattr(producer, "adds", False) and (added := _added(node, last)):
                word, residual = added
            else:
                word = _activation_of(node)
                if not word:
                    break
            between = self.nodes[self.order[last] + 1 : self.order[node]]
            if any(self._writes(n) or self._calls_one_of(found, n) for n in between):
                break
            found.append(node)
            words.append(word)
        if residual is not None and not {"add", "radd", "iadd"} & {*words}:
            residual = None  # what adds it did not join
        return found, words, residual

    def _join(self, found: list[fx.Node], words: list[str], residual: Any) -> None:
        """Put a call of `run` where the last of these nodes stands, and take them out."""
        with self.graph.inserting_before(found[-1]):
            parts = [word or self.graph.get_attr(str(n.target)) for n, word in zip(found, words, strict=True)]
            call = self.graph.call_function(run, (found[0].args[0], residual, *parts))
            call.meta["is_wrapped"] = True  # as by torch.fx.wrap: stays whole when traced again, to be unpickled, say
        found[-1].replace_all_uses_with(call)
        for node in reversed(found):
            self.graph.erase_node(node)

    def _module(self, node: fx.Node) -> nn.Module:
        return self.modules[str(node.target)]

    def _declared(self, node: fx.Node) -> dict[str, Any]:
        """What the class of the module that it calls, with one input and nothing else, declares for fusion."""
        alone = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        return _fusion.declarations(type(self._module(node))) if alone else {}

    def _calls_one_of(self, found: list[fx.Node], node: fx.Node) -> bool:
        """Whether it calls a module that is called in the run as well, which may keep count (of its statistics, say)."""
        calls = [n for n in (node, *found) if n.op == "call_module"]
        return node.op == "call_module" and any(self._module(n) is self._module(node) for n in calls[1:])

    def _writes(self, node: fx.Node) -> bool:
        """Whether it might write into a tensor that is there already."""
        if node.op == "call_module":
            module = self._module(node)
            known = type(module).__module__.startswith(("torch.nn.modules.", "fastlayers.modules."))
            return not known or getattr(module, "inplace", False) or _fusion.is_watched(module)
        if node.op == "call_method":
            return str(node.target).endswith("_")
        if node.op == "call_function":
            known = node.target is not inplace and _home(node).startswith(
                ("torch", "builtins", "math", "fastlayers", "_operator")
            )
            name = getattr(node.target, "__name__", "_")
            return not known or name.endswith("_") or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
        return False


def _home(node: fx.Node) -> str:
    """The module of the function that it calls. Of operators that anyone may have registered, none."""
    home = getattr(node.target, "__module__", None) or ""
    return "" if home.startswith("torch._ops") else home


def _activation_of(node: fx.Node) -> str:
    """The name of the activation that it applies to its one argument; "" if it is none."""
    function = node.op == "call_function" and _home(node).startswith(("torch", "fastlayers"))
    if not (function or node.op == "call_method") or len(node.args) != 1 or node.kwargs.keys() - {"inplace"}:
        return ""
    name = (str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")).removesuffix("_")
    return name if name in RECORDS else ""


def _added(node: fx.Node, one: fx.Node) -> tuple[str, fx.Node] | None:
    """If it is the sum of this operand and another one, and isn't written into the other one: its word, and the other."""
    operands, word = node.args, "add"
    if node.target is inplace and operands[0] == "iadd":
        operands, word = operands[1:], "iadd"
    elif node.target == "add_":
        word = "iadd"
    elif node.target not in _ADD:
        return None
    if len(operands) != 2 or node.kwargs:
        return None
    other = operands[1 if operands[0] is one else 0]
    if other is one or not isinstance(other, fx.Node):
        return None
    if operands[0] is not one:
        word = {"add": "radd"}.get(word, "")
    return (word, other) if word else None
