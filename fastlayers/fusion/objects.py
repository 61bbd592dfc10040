"""Attributes and elements of the objects that a forward reads, each remembered as looked at."""

from __future__ import annotations

import ast
import keyword
import operator
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from .._state import class_before
from .state import MISSING, found_on_class
from .values import Method, MethodOf, Parent, Text, Training, attribute_of, bound, has_node, is_known, is_opaque

if TYPE_CHECKING:
    from .expressions import Expressions

_ORDINARY = (object.__getattribute__, types.SimpleNamespace.__getattribute__)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Objects:
    """The part of the interpreter that reads objects."""

    model: nn.Module
    in_place: bool
    """Whether the model itself is to run the graph, as an instance of a generated class."""
    graph: fx.Graph
    looked: Any
    paths: dict[int, str]
    read: list[tuple[nn.Module, str]]
    """The children that were read: whose they are, and their names."""

    def note(self, frame: Expressions, node: ast.AST, function: Any, args: Any, kwargs: Any = None) -> fx.Node:
        raise NotImplementedError

    def call(self, frame: Expressions, node: ast.AST, function: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def created(self, value: Any) -> Any:
        raise NotImplementedError

    def concrete(self, value: Any) -> Any:
        """The value itself; of a module's `training`, what it is now."""
        raise NotImplementedError

    def path(self, frame: Expressions, node: ast.AST, module: nn.Module) -> str:
        """Where a module stands in the model."""
        path = self.paths.get(id(module))
        if path is None:
            raise frame.refuse(node, f"uses a {type(module).__name__} that isn't a part of the model")
        for part in path.split("."):
            if keyword.iskeyword(part) or any([c in part for c in "\"'\\\n"]):
                raise frame.refuse(node, f"uses a module of the name {part}, which a graph's code can't write")
        return path

    def placed(self, module: nn.Module) -> None:
        """Look at a module itself, not only at what its call gives: another one in its place may be another kind of module."""
        path = self.paths.get(id(module))
        if path:
            parent, _, name = path.rpartition(".")
            self.looked.attribute(self.model.get_submodule(parent), name)

    def decides(self, module: nn.Module, by_identity: bool) -> None:
        """Look at the places where a module was read: something is decided by which one it is, or by that there is one."""
        for owner, name in self.read:
            if owner._modules[name] is module:
                (self.looked.attribute if by_identity else self.looked.where)(owner, name)

    def tensor(self, frame: Expressions, node: ast.AST, module: nn.Module, name: str) -> fx.Node:
        """A parameter, buffer or other tensor of a module's, as a node: it is read at every call."""
        path = self.path(frame, node, module)
        return self.graph.get_attr(f"{path}.{name}" if path else name)

    def child(self, frame: Expressions, node: ast.AST, module: nn.Module, name: str) -> Any:
        child = module._modules[name]
        if child is None:
            self.looked.where(module, name)
            return None
        self.read.append((module, name))
        path = self.path(frame, node, module)
        self.paths[id(child)] = f"{path}.{name}" if path else name
        return child

    # --- attributes ---------------------------------------------------------------------------------------------------

    def attribute(self, frame: Expressions, node: ast.AST, owner: Any, name: str, default: Any = MISSING) -> Any:
        owner = self.concrete(owner)
        if isinstance(owner, fx.Node):
            if name == "dtype" and owner.op == "get_attr":  # of a parameter, which forwards ask for
                path, _, last = str(owner.target).rpartition(".")
                return self.looked.dtype(self.model.get_submodule(path), last)
            return self.note(frame, node, getattr, (owner, name))
        if isinstance(owner, Text):
            raise frame.refuse(node, "edits a text that is only known at a call")
        if isinstance(owner, Parent):
            found = self._after(owner, name)
            return self._bound(frame, node, owner.owner, name, found)
        if isinstance(owner, types.ModuleType):
            # A module's own __getattr__ may do anything, torch's and ours apart.
            lazy = owner.__name__.split(".")[0] in ("torch", "fastlayers")
            found = getattr(owner, name, MISSING) if lazy else vars(owner).get(name, MISSING)
            if not isinstance(found, types.ModuleType):
                self.looked.attribute(owner, name)
        elif isinstance(owner, type):
            found = self._of_class(frame, node, owner, name)
        elif isinstance(owner, nn.Module):
            found = self._of_module(frame, node, owner, name)
        elif is_known(owner) or is_opaque(owner):
            found = self._of_value(frame, node, owner, name)
        else:
            found = self._of_object(frame, node, owner, name, default is MISSING)
        if found is MISSING and default is MISSING:
            raise frame.refuse(node, f"{type(owner).__name__} has no {name}")
        return default if found is MISSING else found

    def _after(self, parent: Parent, name: str) -> Any:
        classes = type(parent.owner).__mro__
        for cls in classes[classes.index(parent.cls) + 1 :]:
            if name in cls.__dict__:
                self.looked.attribute(cls, name)
                return cls.__dict__[name]
        return MISSING

    def _of_class(self, frame: Expressions, node: ast.AST, owner: type, name: str) -> Any:
        if name == "__name__":
            return owner.__name__
        found = found_on_class(owner, name)
        if found is MISSING or type(type(owner)) is not type:
            return MISSING
        self.looked.attribute(owner, name)
        if isinstance(found, classmethod):
            return Method(owner, found.__func__)
        if isinstance(found, staticmethod):
            return found.__func__
        return getattr(owner, name)

    def _of_module(self, frame: Expressions, node: ast.AST, module: nn.Module, name: str) -> Any:
        cls = type(module)
        if cls.__getattribute__ is not object.__getattribute__:
            raise frame.refuse(node, f"{cls.__name__} looks its attributes up in a way of its own")
        self.placed(module)
        if name == "training":
            return Training(module)
        if name == "__class__":
            self.looked.class_of(module)
            return class_before(cls)
        found = found_on_class(cls, name)
        if name in module.__dict__ and not isinstance(found, property):
            self.looked.attribute(module, name)
            value = module.__dict__[name]
            return self.tensor(frame, node, module, name) if isinstance(value, torch.Tensor) else value
        if found is not MISSING:
            return self._bound(frame, node, module, name, found)
        for tensors in (module._parameters, module._buffers):
            if name in tensors:
                self.looked.where(module, name)
                return None if tensors[name] is None else self.tensor(frame, node, module, name)
        if name in module._modules:
            return self.child(frame, node, module, name)
        if found_on_class(cls, "__getattr__") is not found_on_class(nn.Module, "__getattr__"):
            raise frame.refuse(node, f"{cls.__name__} looks its attributes up in a way of its own")
        self.looked.attribute(module, name)
        return MISSING

    def _bound(self, frame: Expressions, node: ast.AST, owner: Any, name: str, found: Any) -> Any:
        """What an attribute of a class is on an object."""
        if found is not MISSING and not isinstance(owner, type):
            self.looked.attribute(owner, name)
        if isinstance(found, property):
            if found.fget is None:
                raise frame.refuse(node, f"{name} can't be read")
            return self.call(frame, node, Method(owner, found.fget), [], {})
        if isinstance(found, types.FunctionType):
            return Method(owner, found)
        if isinstance(found, staticmethod):
            return found.__func__
        if isinstance(found, classmethod):
            return Method(type(owner), found.__func__)
        if found is not MISSING and hasattr(type(found), "__get__"):
            raise frame.refuse(node, f"{name} is computed in a way that isn't traced")
        return found

    def _of_value(self, frame: Expressions, node: ast.AST, value: Any, name: str) -> Any:
        found = getattr(value, name, MISSING)
        if found is MISSING:
            return MISSING
        return MethodOf(value, name) if isinstance(found, types.BuiltinMethodType) else found

    def _of_object(self, frame: Expressions, node: ast.AST, owner: Any, name: str, must_exist: bool) -> Any:
        cls = type(owner)
        if cls is types.FunctionType and name == "__name__":
            return owner.__name__
        written = cls.__getattribute__ not in _ORDINARY and isinstance(cls.__getattribute__, types.FunctionType)
        if self.in_place and written and must_exist:
            # As of transformers' configurations: what it gives is asked at every call.
            return self.note(frame, node, bound(attribute_of, owner), (name,))
        if cls.__getattribute__ not in _ORDINARY or not hasattr(owner, "__dict__"):
            raise frame.refuse(node, f"reads {name} of a {cls.__name__}")
        found = found_on_class(cls, name)
        if name in owner.__dict__ and not isinstance(found, property):
            self.looked.attribute(owner, name)
            return owner.__dict__[name]
        if found is MISSING and hasattr(cls, "__getattr__"):
            raise frame.refuse(node, f"{cls.__name__} looks its attributes up in a way of its own")
        if found is MISSING:
            self.looked.attribute(owner, name)
        return self._bound(frame, node, owner, name, found)

    # --- elements -----------------------------------------------------------------------------------------------------

    def subscript(self, frame: Expressions, node: ast.AST, base: Any, key: Any) -> Any:
        base, key = self.concrete(base), self.concrete(key)
        if isinstance(base, fx.Node):
            return self.note(frame, node, operator.getitem, (base, key))
        if has_node(key):
            raise frame.refuse(node, "takes an element that is only known at a call")
        if isinstance(base, nn.ModuleDict):
            self.names(frame, node, base)
            return self.child(frame, node, base, key)
        if isinstance(base, nn.Module):
            return self.created(self.elements(frame, node, base)[key])
        if not is_known(base):
            raise frame.refuse(node, f"takes an element of a {type(base).__name__}")
        return self.created(base[key])

    def elements(self, frame: Expressions, node: ast.AST, module: nn.Module) -> tuple[Any, ...]:
        """What a loop over a module goes through."""
        own = found_on_class(type(module), "__iter__")
        if isinstance(module, nn.ParameterList) and own is found_on_class(nn.ParameterList, "__iter__"):
            names = [str(i) for i in range(len(module))]
            self.looked.attribute(module, "_size")
            return tuple([self.attribute(frame, node, module, name) for name in names])
        for kind in _CONTAINERS:
            if isinstance(module, kind) and own is found_on_class(kind, "__iter__"):
                names = self.names(frame, node, module)
                return names if kind is nn.ModuleDict else tuple([self.child(frame, node, module, n) for n in names])
        raise frame.refuse(node, f"loops over a {type(module).__name__}")

    def names(self, frame: Expressions, node: ast.AST, module: nn.Module) -> tuple[str, ...]:
        self.placed(module)
        self.looked.children(module)
        return tuple(module._modules)

    def of_container(self, frame: Expressions, node: ast.AST, method: Method) -> Any:
        """A call of one of the methods of torch's containers that give their children; MISSING if it is none of them."""
        module, function = method.owner, method.function
        if not isinstance(module, nn.Module):
            return MISSING
        which = next((w for w in _CHILDREN if function is found_on_class(*_CHILDREN[w])), None)
        if which is None:
            return MISSING
        names = self.names(frame, node, module)
        if which == "len":
            return len(names)
        if which == "keys":
            return names
        children = tuple([self.child(frame, node, module, name) for name in names])
        return children if which in ("values", "children") else tuple(zip(names, children, strict=True))

    # --- identity -----------------------------------------------------------------------------------------------------

    def is_same(self, frame: Expressions, node: ast.AST, left: Any, right: Any) -> bool:
        """left is right."""
        if not isinstance(left, fx.Node) and not isinstance(right, fx.Node):
            for value in (left, right):
                if isinstance(value, Method | MethodOf | Parent | Text):
                    raise frame.refuse(node, "asks whether two methods are the same")
                if isinstance(value, nn.Module):
                    self.decides(value, left is not None and right is not None)
            return left is right
        for one, other in ((left, right), (right, left)):
            if isinstance(one, fx.Node) and other is None and self.is_something(one):
                return False
        raise frame.refuse(node, "depends on what is only known at a call")

    def is_something(self, node: fx.Node) -> bool:
        """Whether a node is known not to be None: an argument that is given, which the graph then checks, or a tensor."""
        raise NotImplementedError


_CHILDREN = {
    "children": (nn.Module, "children"), "named_children": (nn.Module, "named_children"), "keys": (nn.ModuleDict, "keys"),
    "items": (nn.ModuleDict, "items"), "values": (nn.ModuleDict, "values"), "len": (nn.ModuleList, "__len__"),
}  # fmt: skip
