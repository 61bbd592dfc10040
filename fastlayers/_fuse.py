"""Fusion beyond Sequential: torch.fx finds the layers that follow one another in a model's forward."""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from typing import Any

import torch
from torch import fx, nn

from . import _fusion, functional
from .modules import Sequential
from .ops.pointwise import RECORDS

_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_INTO_FIRST = (operator.iadd, "add_")
"""Those that write their result into their first operand."""


def run(input: torch.Tensor, residual: torch.Tensor | None, *parts: Any) -> torch.Tensor:
    """What a Sequential of these parts computes. Among modules, words stand for functions: "add" for adding the residual, an
    activation's name for that."""
    modules = [
        p if not isinstance(p, str) else _activation(p) if p in RECORDS else _fusion.Add(residual) for p in parts
    ]
    for step in _fusion.plan(modules):
        input = step(input)
    return input


@functools.cache
def _activation(name: str) -> Any:
    """The function as a part of a run, whose class declares its record."""
    function = getattr(functional, name, RECORDS[name].torch)
    return type(name, (_fusion.Function,), {"pointwise": RECORDS[name], "__call__": lambda self, x: function(x)})()


def fuse(model: nn.Module) -> fx.GraphModule:
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
    the model does, and state_dict is the same. What holds of torch.fx holds here: the model's own Python runs once, now,
    with `training` as it is, so that it mustn't depend on data. Of modules that contain others, those that have a hook now
    are left whole; the model's own hooks stay with the model.

    Shape, Dtype: any that the model takes.
    Raises:
        torch.fx.proxy.TraceError: forward depends on data. Fuse the modules within that don't.
    Source: https://docs.pytorch.org/docs/stable/fx.html
    """
    return _Fuser(model).result()


class _Proxy(fx.Proxy):
    """Notes `x += y` and `x[i] = y` as what they are: torch.fx would note x = x + y, and refuse the other. And notes our
    functions as ours."""

    def _fastlayers_note(self, function: Any, args: Any, kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, args, kwargs)


def _noting(operation: Any) -> Any:
    def method(self: fx.Proxy, *args: Any) -> Any:
        noted = self.tracer.create_proxy("call_function", operation, (self, *args), {})
        return None if operation is operator.setitem else noted

    return method


for _name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _noting(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Keeps our layers whole, and whatever has a hook; looks into our Sequentials as into torch's."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _fusion.is_watched(m):
            return True
        ours = type(m).__module__.startswith("fastlayers.modules.")
        return type(m) is not Sequential and (ours or super().is_leaf_module(m, module_qualified_name))

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if type(m) is Sequential:
            forward = functools.partial(nn.Sequential.forward, m)
        return super().call_module(m, forward, args, kwargs)


class _Fuser:
    """Finds runs of nodes in a model's graph, and puts a call of `run` in the place of each."""

    def __init__(self, model: nn.Module):
        self.model, self.modules = model, dict(model.named_modules(remove_duplicate=False))
        # A Sequential of ours has a forward of its own, which is not to be looked into.
        root = nn.Sequential(OrderedDict(model._modules)) if type(model) is Sequential else model  # pyright: ignore
        self.graph = _Tracer().trace(root)
        self.nodes = list(self.graph.nodes)
        for node in self.nodes:
            if isinstance(node.type, str):  # of `from __future__ import annotations`: torch.fx couldn't pickle it
                node.type = None
        self.order = {node: i for i, node in enumerate(self.nodes)}

    def result(self) -> fx.GraphModule:
        taken: set[fx.Node] = set()
        for first in self.nodes:
            if first not in taken and "forward_fused" in self._declared(first):
                found, residual = self._follow(first)
                taken.update(found)
                if len(found) > 1:
                    self._join(found, residual)
        fused = fx.GraphModule(self.model, self.graph, type(self.model).__name__)
        # All that the model has, called or not, in its order: state_dict and parameters are the same.
        for own in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            setattr(fused, own, getattr(self.model, own).copy())
        return fused

    def _follow(self, first: fx.Node) -> tuple[list[fx.Node], Any]:
        """The longest run that begins here, and what is added in it. All of it may run where its last node stands: until
        then nobody else sees what it computes, and nothing is written into."""
        found, residual, producer = [first], None, type(self._module(first))
        while len(found[-1].users) == 1:
            last, (node,) = found[-1], found[-1].users
            declared = self._declared(node)
            if node.op == "call_module":
                if not (declared or type(self._module(node)) is getattr(producer, "normalizes", None)):
                    break
                if "forward_fused" in declared:
                    producer = type(self._module(node))
            elif node.target in _ADD and residual is None and getattr(producer, "adds", False):
                residual = _other_operand(node, last)
                if residual is None:
                    break
            elif _activation_of(node) is None:
                break
            if any(self._writes(n) for n in self.nodes[self.order[last] + 1 : self.order[node]]):
                break
            found.append(node)
        return found, residual

    def _join(self, found: list[fx.Node], residual: Any) -> None:
        """Put a call of `run` where the last of these nodes stands, and take them out."""
        with self.graph.inserting_before(found[-1]):
            parts = [
                self.graph.get_attr(str(node.target)) if node.op == "call_module" else (_activation_of(node) or "add")
                for node in found
            ]
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

    def _writes(self, node: fx.Node) -> bool:
        """Whether it might write into a tensor that is there already."""
        if node.op == "call_module":
            module = self._module(node)
            known = type(module).__module__.startswith(("torch.nn.modules.", "fastlayers.modules."))
            return not known or getattr(module, "inplace", False) or _fusion.is_watched(module)
        if node.op == "call_method":
            return str(node.target).endswith("_")
        if node.op == "call_function":
            home, name = _home(node), getattr(node.target, "__name__", "_")
            if home == "_operator":
                return name.startswith(("i", "set", "del")) and name not in ("index", "inv", "invert")
            known = home.startswith(("torch", "builtins", "math", "fastlayers"))
            return not known or name.endswith("_") or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
        return False


def _home(node: fx.Node) -> str:
    """The module of the function that it calls. Of operators that anyone may have registered, none."""
    home = getattr(node.target, "__module__", None) or ""
    return "" if home.startswith("torch._ops") else home


def _activation_of(node: fx.Node) -> str | None:
    """The name of the activation that it applies to its one argument."""
    function = node.op == "call_function" and _home(node).startswith(("torch", "fastlayers"))
    if not (function or node.op == "call_method") or len(node.args) != 1 or node.kwargs.keys() - {"inplace"}:
        return None
    name = (str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")).removesuffix("_")
    return name if name in RECORDS else None


def _other_operand(node: fx.Node, one: fx.Node) -> fx.Node | None:
    """What a sum adds to this operand, if it is a sum of two and wouldn't be written into the other one."""
    if len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    other = second if first is one else first
    if other is one or not isinstance(other, fx.Node) or (node.target in _INTO_FIRST and first is not one):
        return None
    return other
