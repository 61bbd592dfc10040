"""Fusion beyond Sequential: torch.fx finds the layers that follow one another in a model's forward."""

from __future__ import annotations

import contextlib
import operator
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import inplace_methods
from torch.fx.node import has_side_effect
from torch.fx.proxy import TraceError

from . import _fusion, functional
from .ops.pointwise import RECORDS

_ADD = (operator.add, torch.add, "add")
_KNOWN = ("torch", "fastlayers", "builtins", "math", "_operator")
"""Packages whose functions write into what they are given only if their names or arguments say so."""


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

    The result, a torch.fx.GraphModule, shares the model's modules, parameters and buffers: it trains as the model does, and
    state_dict is the same. Not shared are the hooks, attributes and methods of the model itself.

    The forward of the model, and of modules that contain others, runs once, now, with numbers and flags (`training`,
    `inplace`) as they are; hooks that such a module is given later don't see its calls. Modules without others in them, and
    those that have a hook now, are called as ever. Arguments that are None, a bool or a word by default will be that.

    Shape, Dtype: any that the model takes.
    Raises:
        torch.fx.proxy.TraceError: forward depends on data, assigns to an attribute, or switches grad mode or autocast. Fuse
            the modules within that don't.
        TypeError: no module.
        ValueError: one whose forward was replaced on the instance. From a call of the result: an argument differs from the
            default that it was fused for.
    Source: https://docs.pytorch.org/docs/stable/fx.html
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse takes a module, not {type(model).__name__}")
    if "forward" in model.__dict__:
        raise ValueError("forward was replaced on the instance, where torch.fx doesn't see it")
    for name in RECORDS.keys() - _ACTIVATIONS.keys():
        _ACTIVATIONS[name] = _activation(name)
    with _unchanged(model):
        fuser = _Fuser(model)
        fuser.join()
        return fuser.result()


# --- what the graph calls ----------------------------------------------------------------------------------------------


def run(input: torch.Tensor, residual: Any, *parts: Any) -> torch.Tensor:
    """What a Sequential of these parts computes. Among modules, words stand for functions: an activation's name, or what
    adds the residual: "add" (x + residual), "radd" (residual + x) or "iadd" (x += residual)."""
    row = [_function(part, residual) if isinstance(part, str) else part for part in parts]
    return _fusion.run(row, input)


def _function(word: str, residual: Any) -> Any:
    if word in _ACTIVATIONS:
        return _ACTIVATIONS[word]
    if word == "radd":
        return _fusion.Add(lambda x: residual + x, residual)
    return _fusion.Add(lambda x: getattr(operator, word)(x, residual), residual)


def _activation(name: str) -> Any:
    """The function as a part of a run, whose class declares its record."""
    kind = type(name, (_fusion.Function,), {"pointwise": RECORDS[name]})
    return kind(getattr(functional, name, RECORDS[name].torch))


_ACTIVATIONS = {name: _activation(name) for name in RECORDS}


@has_side_effect
def inplace(operation: str, *args: Any) -> Any:
    """An operator that writes into its first operand: "iadd", "setitem", ..."""
    return getattr(operator, operation)(*args)


@has_side_effect
def expects(name: str, value: Any, given: Any) -> None:
    """Raise ValueError if an argument isn't what the graph was made for."""
    if given is not value and (type(given) is not type(value) or given != value):
        raise ValueError(f"fused for {name}={value!r}, and called with another value")


# --- how it comes about ------------------------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """Notes `x += y` and `x[i] = y` as what they are: torch.fx would note x = x + y, and refuse the other. And notes our
    functions as ours."""

    def _fastlayers_note(self, function: Any, args: Any, kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, args, kwargs)


def _noting(operation: str) -> Any:
    def method(self: fx.Proxy, *args: Any) -> Any:
        # Not the operator itself: torch.fx would write `x += 2` for it, after which x is another number.
        noted = self.tracer.create_proxy("call_function", inplace, (operation, self, *args), {})
        _keep_whole(noted.node)
        return None if operation == "setitem" else noted

    return method


for _name in inplace_methods:
    setattr(_Proxy, f"__{_name}__", _noting(_name))


def _keep_whole(node: fx.Node) -> None:
    """As torch.fx.wrap does: when the graph is traced again, to be unpickled, say, the call stays one."""
    node.meta["is_wrapped"] = True


class _Tracer(fx.Tracer):
    """Looks into modules that contain others and have no hook. Our Sequentials fuse nothing meanwhile, as torch.fx has its
    own in the place of Module.__call__."""

    proxy_buffer_attributes = True  # else a buffer that forward writes into would be written into now

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not m._modules or _fusion.is_watched(m) or super().is_leaf_module(m, module_qualified_name)

    def _proxy_placeholder(self, name: str, *args: Any) -> Any:
        proxy = super()._proxy_placeholder(name, *args)
        for default in proxy.node.args:
            if default is None or isinstance(default, (bool, str)):  # what forward may well ask for: `if mask is None`
                _keep_whole(self.create_proxy("call_function", expects, (name, default, proxy), {}).node)
                return default
        return proxy


_CONTEXTS = (
    (torch.no_grad, "__enter__"), (torch.enable_grad, "__enter__"), (torch.inference_mode, "__enter__"),
    (torch.autocast, "__enter__"), (torch.set_grad_enabled, "__init__"),
)  # fmt: skip


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Raise TraceError if within, forward assigns to attributes or enters contexts, of which torch.fx notes nothing; and
    leave the model as it was."""
    thread = threading.get_ident()

    def refusing(enter: Any) -> Any:
        def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                raise TraceError("forward switches grad mode or autocast, which torch.fx doesn't note")
            return enter(self, *args, **kwargs)

        return refuse

    methods = [getattr(kind, name) for kind, name in _CONTEXTS]
    places: list[tuple[nn.Module, dict[str, Any]]] = []
    for m in model.modules():
        places += [(m, own) for own in (m.__dict__, m._parameters, m._buffers, m._modules)]
    before = [{**own} for _, own in places]
    for (kind, name), method in zip(_CONTEXTS, methods, strict=True):
        setattr(kind, name, refusing(method))
    changed: set[str] = set()
    try:
        yield
    finally:
        for (kind, name), method in zip(_CONTEXTS, methods, strict=True):
            setattr(kind, name, method)
        for (m, own), was in zip(places, before, strict=True):
            names = [name for name in own.keys() | was.keys() if own.get(name) is not was.get(name)]
            # torch.fx itself keeps constants there.
            changed |= {f"{type(m).__name__}.{name}" for name in names if not name.startswith("_tensor_constant")}
            if names:
                own.clear()
                own.update(was)
    if changed:
        raise TraceError(f"forward assigns to {', '.join(sorted(changed))}, which torch.fx doesn't note")


class _Fused(fx.GraphModule):
    """A GraphModule whose copies keep apart which buffers are persistent."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _persisting(super().__deepcopy__(memo), self._persistent())

    def __reduce__(self) -> Any:
        return _unpickled, (super().__reduce__(), self._persistent())

    def _persistent(self) -> set[str]:
        return self._buffers.keys() - self._non_persistent_buffers_set


def _persisting(copied: Any, persistent: set[str]) -> Any:
    """A copy, in which constants of the graph are buffers too."""
    copied._non_persistent_buffers_set = copied._buffers.keys() - persistent
    return copied


def _unpickled(reduced: Any, persistent: set[str]) -> Any:
    rebuild, arguments = reduced
    return _persisting(rebuild(*arguments), persistent)


class _Fuser:
    """Finds runs of nodes in a model's graph, and puts a call of `run` in the place of each."""

    def __init__(self, model: nn.Module):
        self.model, self.modules = model, dict(model.named_modules(remove_duplicate=False))
        self.graph = _Tracer().trace(model)
        self.nodes = list(self.graph.nodes)
        for node in self.nodes:
            if isinstance(node.type, str):  # of `from __future__ import annotations`: torch.fx couldn't pickle it
                node.type = None
        self.order = {node: i for i, node in enumerate(self.nodes)}

    def join(self) -> None:
        taken: set[fx.Node] = set()
        for first in self.nodes:
            if first not in taken and "forward_fused" in self._declared(first):
                found, words, residual = self._follow(first)
                taken.update(found)
                if len(found) > 1:
                    self._replace(found, words, residual)
        if not any(node.target is run for node in self.graph.nodes):
            warnings.warn("fuse found nothing to fuse; fastlayers.accelerate makes a model's layers ours", stacklevel=3)

    def result(self) -> fx.GraphModule:
        fused = _Fused(self.model, self.graph, type(self.model).__name__)
        # What torch.fx made buffers of, though the model has it as an attribute or in its code.
        others = {name: fused._buffers[name] for name in fused._buffers if name not in self.model._buffers}
        for own in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            setattr(fused, own, getattr(self.model, own))
        vars(fused).update(others)
        return fused

    def _follow(self, first: fx.Node) -> tuple[list[fx.Node], list[str], Any]:
        """The longest run that begins here, the words for what calls no module, and what is added in it. All of it may run
        where its last node stands: until then nobody else sees what it computes, and nothing is written into."""
        found, words, residual, producer = [first], [""], None, type(self._module(first))
        while len(found[-1].users) == 1:
            last, (node,) = found[-1], found[-1].users
            word, other = "", None
            if node.op == "call_module":
                declared, kind = self._declared(node), type(self._module(node))
                if not (declared or kind is getattr(producer, "normalizes", None)):
                    break
                producer = kind if "forward_fused" in declared else producer
            elif residual is None and getattr(producer, "adds", False) and (added := _added(node, last)):
                word, other = added
            else:
                word = _activation_of(node)
                if not word:
                    break
            between = self.nodes[self.order[last] + 1 : self.order[node]]
            called = [self._module(n) for n in (*found, node) if n.op == "call_module"]
            if any(self._writes(n, called) for n in between):
                break
            found.append(node)
            words.append(word)
            residual = residual if other is None else other
        return found, words, residual

    def _replace(self, found: list[fx.Node], words: list[str], residual: Any) -> None:
        """Put a call of `run` where the last of these nodes stands, and take them out."""
        with self.graph.inserting_before(found[-1]):
            parts = [word or self.graph.get_attr(str(n.target)) for n, word in zip(found, words, strict=True)]
            call = self.graph.call_function(run, (found[0].args[0], residual, *parts))
            _keep_whole(call)
        found[-1].replace_all_uses_with(call)
        for node in reversed(found):
            self.graph.erase_node(node)

    def _module(self, node: fx.Node) -> nn.Module:
        return self.modules[str(node.target)]

    def _declared(self, node: fx.Node) -> dict[str, Any]:
        """What the class of the module that it calls, with one input and nothing else, declares for fusion."""
        alone = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        return _fusion.declarations(type(self._module(node))) if alone else {}

    def _writes(self, node: fx.Node, called: list[nn.Module]) -> bool:
        """Whether it might write into a tensor that is there already, or into statistics of one of these modules."""
        if node.op == "call_module":
            module = self._module(node)
            known = type(module).__module__.startswith(("torch.nn.modules.", "fastlayers.modules."))
            harmless = known and not getattr(module, "inplace", False) and not _fusion.is_watched(module)
            return not harmless or any(module is one for one in called)
        if node.op == "call_method":
            return str(node.target).endswith("_")
        if node.op == "call_function":
            known = node.target is not inplace and _home(node) in _KNOWN
            name = getattr(node.target, "__name__", "_")
            return not known or name.endswith("_") or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
        return False


def _home(node: fx.Node) -> str:
    """The package of the function that it calls; none of operators, which anyone may have registered."""
    home = getattr(node.target, "__module__", None) or ""
    return "" if home.startswith("torch._ops") else home.split(".")[0]


def _activation_of(node: fx.Node) -> str:
    """The name of the activation that it applies to its one argument; "" if it is none."""
    function = node.op == "call_function" and _home(node) in ("torch", "fastlayers")
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
