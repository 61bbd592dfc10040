"""Functions in place of those that a forward calls, where no graph of it can be made. The forward runs as its author wrote it, as
a copy of its code in which a call `f(x)` is `chosen(f)(x)`. What `f` is is looked up when it is called, as ever: a function of
torch.nn.functional gives ours, one that computes rotary embedding gives ours, another one of somebody's own gives its copy.

Nothing else differs: variables, branches, caches and arguments are the author's, and the copy shares the function's global
variables and those around it. The function itself isn't touched.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import operator
import types
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from .. import _originals, _torch
from . import rotary, source
from .state import MISSING, found_on_class

__all__ = ["chosen", "leads"]

_NAME = "_fastlayers_chosen"
_FUTURE = functools.reduce(operator.or_, [getattr(__future__, n).compiler_flag for n in __future__.all_feature_names])
_FRAMES = {"dir", "eval", "exec", "locals", "vars"}
"""Functions that see the variables of the one that calls them."""
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)


class _Copy(NamedTuple):
    code: types.CodeType
    defaults: Any
    named_defaults: Any
    function: Any
    """The copy, or ours; None where a copy would be the same."""
    is_ours: bool
    of: Any
    """A weak reference to the function, which takes this away with it."""


_copies: dict[int, _Copy] = {}
"""By the function's identity: a WeakKeyDictionary took several times as long."""


def chosen(function: Any) -> Any:
    """What is called in the place of a function; the very function, unless it is or leads to one that we have."""
    kind = type(function)
    if kind is types.MethodType:
        inner = function.__func__
        found = _copied(inner) if type(inner) is types.FunctionType else inner
        return function if found is inner else types.MethodType(found, function.__self__)
    if kind is types.FunctionType:
        return _originals.ours_for.get(function) or _copied(function)
    return _originals.ours_for.get(function, function) if kind is types.BuiltinFunctionType else function


def _copied(function: types.FunctionType) -> Any:
    return _entry(function).function or function


def _entry(function: types.FunctionType) -> _Copy:
    code, defaults, named = function.__code__, function.__defaults__, function.__kwdefaults__
    key = id(function)
    found = _copies.get(key)
    if found is not None and found.code is code and found.defaults is defaults and found.named_defaults is named:
        return found
    if not source.is_readable(function) or not _torch.unseen():
        return _Copy(code, defaults, named, None, False, None)
    ours = rotary.ours(function)
    of = weakref.ref(function, lambda _: _copies.pop(key, None))
    found = _copies[key] = _Copy(code, defaults, named, ours or _made(function), ours is not None, of)
    return found


# --- the copy -------------------------------------------------------------------------------------------------------------


def _made(function: types.FunctionType) -> types.FunctionType | None:
    """The copy of a function; None where no call in it is to be looked at, or where its source isn't what runs."""
    tree = _tree(function)
    sites = [] if tree is None else [*_sites(function, tree)]
    if tree is None or not sites:
        return None
    code = function.__code__
    for node, _, _ in sites:
        node.func = ast.Call(ast.Name(_NAME, ast.Load()), [node.func], [])
    # What is evaluated where a function is defined isn't part of its code. Its own name may be that of a global variable.
    tree.decorator_list, tree.returns, tree.name = [], None, f"{_NAME}_copy"
    tree.args.defaults = [ast.Constant(None) for _ in tree.args.defaults]
    tree.args.kw_defaults = [default and ast.Constant(None) for default in tree.args.kw_defaults]
    for argument in ast.walk(tree.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    around = [ast.arg(name) for name in (_NAME, *code.co_freevars)]
    empty: Any = dict(posonlyargs=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    outer = ast.FunctionDef("around", ast.arguments(args=around, **empty), [tree], [])
    module = ast.fix_missing_locations(ast.Module([outer], []))
    compiled = compile(module, code.co_filename, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True)
    (inner,) = _codes_in(*_codes_in(compiled))
    cells = {_NAME: types.CellType(chosen), **dict(zip(code.co_freevars, function.__closure__ or (), strict=True))}
    closure = tuple([cells[name] for name in inner.co_freevars])
    named: Any = {name: getattr(code, name) for name in ("co_name", "co_qualname") if hasattr(code, name)}
    inner = inner.replace(**named)
    made = types.FunctionType(inner, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, function.__qualname__
    made.__doc__ = function.__doc__
    made.__module__ = function.__module__
    vars(made).update(vars(function))
    return made


def _codes_in(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def _tree(function: types.FunctionType) -> ast.FunctionDef | None:
    """A syntax tree of its own for a function that may be copied: one that doesn't look at its own variables by another way than
    their names, and whose names aren't those of a class alone."""
    try:
        tree = source.tree(function)
    except source.NotFound:
        return None
    names = {
        name
        for code in (function.__code__, *source.codes(function.__code__))
        for name in (*code.co_names, *code.co_varnames, *code.co_freevars, *code.co_cellvars)
    }
    private = any(["__" in name and not name.endswith("__") for name in names])
    if not isinstance(tree, ast.FunctionDef) or private or names & {_NAME, *_FRAMES}:
        return None
    return copy.deepcopy(tree)


# --- its calls ------------------------------------------------------------------------------------------------------------

_VARIABLE, _OWN = "variable", "own"


class _Site(NamedTuple):
    """A call in a function: the node, what kind of name it calls, and what that names now."""

    node: ast.Call
    kind: str | None
    """_VARIABLE: a variable of the function. _OWN: an attribute of `self`. None: another one."""
    value: Any
    """The function; of an attribute or a variable, its name."""


def _sites(function: types.FunctionType, tree: ast.FunctionDef) -> Iterator[_Site]:
    """The calls that may lead to a function of ours, those within functions and classes within left out."""
    waiting: list[ast.AST] = [*tree.body]
    while waiting:
        node = waiting.pop()
        waiting += [child for child in ast.iter_child_nodes(node) if not isinstance(child, _SCOPES)]
        if isinstance(node, ast.Call) and not isinstance(node, _SCOPES):
            site = _site(function, node)
            if site.kind is not None or _is_ours(site.value) or _is_somebodys(site.value):
                yield site


def _site(function: types.FunctionType, node: ast.Call) -> _Site:
    called, code = node.func, function.__code__
    variables = {*code.co_varnames, *code.co_cellvars}
    if isinstance(called, ast.Name) and called.id in variables:
        return _Site(node, _VARIABLE, called.id)
    if isinstance(called, ast.Attribute):
        owner = called.value
        parent = isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super"
        if parent or (isinstance(owner, ast.Name) and owner.id == "self" and code.co_varnames[:1] == ("self",)):
            return _Site(node, _OWN, called.attr)
    return _Site(node, None, _named(function, called, variables))


def _named(function: types.FunctionType, node: ast.AST, variables: set[str]) -> Any:
    """What a name, or names with dots of modules, stand for now; MISSING where that is only known at a call."""
    if isinstance(node, ast.Attribute):
        owner = _named(function, node.value, variables)
        return vars(owner).get(node.attr, MISSING) if isinstance(owner, types.ModuleType) else MISSING
    if not isinstance(node, ast.Name) or node.id in variables:
        return MISSING
    code = function.__code__
    if node.id in code.co_freevars:
        try:
            return (function.__closure__ or ())[code.co_freevars.index(node.id)].cell_contents
        except ValueError:  # nothing is in it yet
            return MISSING
    return function.__globals__.get(node.id, MISSING)


def _is_ours(value: Any) -> bool:
    """Whether it is a function of torch.nn.functional that we have."""
    kinds = types.FunctionType | types.BuiltinFunctionType
    return isinstance(value, kinds) and value in _originals.ours_for


def _is_somebodys(value: Any) -> bool:
    return isinstance(value, types.FunctionType) and source.is_readable(value)


# --- which modules --------------------------------------------------------------------------------------------------------


def leads(module: nn.Module) -> bool:
    """Whether a module's forward leads to a function of ours, or may: it calls a property, or a variable into which it has put
    what is computed from a global one, as those do that look an implementation up by its name."""
    forward = found_on_class(type(module), "forward")
    return isinstance(forward, types.FunctionType) and _leads(forward, module, set())


def _leads(function: types.FunctionType, module: nn.Module | None, seen: set[int]) -> bool:
    if id(function) in seen or not _is_somebodys(function):
        return False
    seen.add(id(function))
    if _entry(function).is_ours:
        return True
    tree = _tree(function)
    for node, kind, value in () if tree is None else _sites(function, tree):
        if kind == _VARIABLE and module is not None:
            if any([_looks_up(function, statement, value) for statement in ast.walk(tree)]):  # type: ignore[arg-type]
                return True
        elif kind == _OWN:
            value = _own(module, value)
            if isinstance(value, property):
                return True
        # A decorator's function has the function that it stands for around it, and hands the module on.
        around = isinstance(node.func, ast.Name) and node.func.id in function.__code__.co_freevars
        of = module if kind == _OWN or around else None
        if _is_ours(value) or (isinstance(value, types.FunctionType) and _leads(value, of, seen)):
            return True
    return False


def _looks_up(function: types.FunctionType, node: ast.AST, variable: str) -> bool:
    """Whether a statement puts into a variable what is computed from a global one."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    value = getattr(node, "value", None)
    if value is None or not any([isinstance(t, ast.Name) and t.id == variable for t in targets]):
        return False
    names = [part.id for part in ast.walk(value) if isinstance(part, ast.Name)]
    space = function.__globals__
    return any([n in space and not isinstance(space[n], type | types.ModuleType) for n in names])


def _own(module: nn.Module | None, name: str) -> Any:
    """A function that is an attribute of a module or of its class."""
    found = MISSING if module is None else vars(module).get(name, found_on_class(type(module), name))
    return getattr(found, "__func__", found) if isinstance(found, staticmethod) else found
