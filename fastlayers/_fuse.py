"""Fusion beyond Sequential: torch.fx finds the layers that follow one another in a model's forward."""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from . import _fusion
from .modules import Sequential
from .ops.pointwise import relu

_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELU = (F.relu, torch.relu, torch.relu_, relu, "relu", "relu_")
_INTO_FIRST = (operator.iadd, "add_")
"""Those that write their result into their first operand."""


def run(input: torch.Tensor, residual: torch.Tensor | None, *parts: Any) -> torch.Tensor:
    """What a Sequential of these parts computes, among which "add" stands for adding the residual and "relu" for itself."""
    modules = [_fusion.Add(residual) if p == "add" else _fusion.RECTIFY if p == "relu" else p for p in parts]
    for step in _fusion.plan(modules):
        input = step(input)
    return input


def fuse(model: nn.Module) -> fx.GraphModule:
    """A module that computes what the model does, with layers that follow one another in its `forward` run together, as they
    would within a Sequential of ours: wherever one's result goes into the next one alone. `accelerate` the model first.

        fastlayers.accelerate(model)
        fused = fastlayers.fuse(model.eval())
        with torch.inference_mode(): fused(x)

    Conv2d, BatchNorm2d (in eval, where no gradients are recorded), the addition of a residual (likewise) and ReLU become one
    kernel, and so do Linear and ReLU; Linear layers in a row are one function for autograd. Sums and ReLU may be operators,
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
            elif not (node.target in _RELU and len(node.args) == 1):
                break
            if any(self._writes(n) for n in self.nodes[self.order[last] + 1 : self.order[node]]):
                break
            found.append(node)
        return found, residual

    def _join(self, found: list[fx.Node], residual: Any) -> None:
        """Put a call of `run` where the last of these nodes stands, and take them out."""
        with self.graph.inserting_before(found[-1]):
            parts = [
                self.graph.get_attr(str(node.target))
                if node.op == "call_module"
                else ("add" if node.target in _ADD else "relu")
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
            home, name = getattr(node.target, "__module__", None) or "", getattr(node.target, "__name__", "_")
            if home == "_operator":
                return name.startswith(("i", "set", "del")) and name not in ("index", "inv", "invert")
            known = home.startswith(("torch", "builtins", "math", "fastlayers")) and not home.startswith("torch._ops")
            return not known or name.endswith("_") or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
        return False


def _other_operand(node: fx.Node, one: fx.Node) -> fx.Node | None:
    """What a sum adds to this operand, if it is a sum of two and wouldn't be written into the other one."""
    if len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    other = second if first is one else first
    if other is one or not isinstance(other, fx.Node) or (node.target in _INTO_FIRST and first is not one):
        return None
    return other
