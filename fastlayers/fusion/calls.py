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
import inspect
import operator
import types
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from .. import _originals
from . import rotary, source
from .state import MISSING, found_on_class

__all__ = ["GRAPHS", "Beginning", "chosen", "leads"]

GRAPHS = "_fused_graphs"
"""Where a fused module keeps its graphs."""
_NAME, _BEGIN, _BEGUN = "_fastlayers_chosen", "_fastlayers_begin", "_fastlayers_begun"
_FUTURE = functools.reduce(operator.or_, [getattr(__future__, n).compiler_flag for n in __future__.all_feature_names])
_FRAMES = {"dir", "eval", "exec", "locals", "vars"}
"""Functions that see the variables of the one that calls them."""
_COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)


class Beginning:
    """The first statements of a method, which a graph may stand for. Each one is equal to itself alone.

    Args:
        count: how many there are.
        names: of the variables that have other values after them, and are used later.
    """

    def __init__(self, count: int, names: tuple[str, ...]):
        self.count, self.names = count, names


class _Copy(NamedTuple):
    """What is known of the code of a function, whatever it is called with and whatever variables are around it."""

    code: types.CodeType | None
    """The copy's; None where a copy would be the same."""
    place: int
    """Of the variable `chosen` among those around the copy."""
    may_turn: bool
    """Whether it may be a function for rotary embedding, as its arguments are called."""
    beginning: Beginning | None
    """What of it a graph may stand for. Then the copy has another variable around it, `_BEGIN`."""
    of: Any
    """A weak reference to the code, which takes this away with it."""


_copies: dict[int, _Copy] = {}
"""By the code's identity: its hash is computed of all that it contains. A function of the copy is made at every call, since one
that is kept would keep what is in the variables around it and in its defaults, such as a model."""
_CELLS = (types.CellType(),)


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


_CELLS[0].cell_contents = chosen


def _copied(function: types.FunctionType) -> Any:
    found = _copies.get(id(function.__code__)) or _copy(function)
    if found.may_turn:
        ours = rotary.found(function)
        if ours is not None:
            return ours.call
    if found.code is None:
        return function
    cells, place = function.__closure__, found.place
    if found.beginning is not None:
        around = dict(zip(function.__code__.co_freevars, cells or (), strict=True))
        around |= {_NAME: _CELLS[0], _BEGIN: types.CellType(functools.partial(_begun, function, found.beginning))}
        cells = tuple([around[name] for name in found.code.co_freevars])
    else:
        cells = _CELLS if cells is None else cells[:place] + _CELLS + cells[place:]
    made = types.FunctionType(found.code, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__qualname__ = function.__qualname__
    if function.__kwdefaults__ is not None:
        made.__kwdefaults__ = function.__kwdefaults__
    return made


def _copy(function: types.FunctionType) -> _Copy:
    code = function.__code__
    key = id(code)
    found = _copies.get(key)
    if found is not None:
        return found
    of = weakref.ref(code, lambda _: _copies.pop(key, None))
    made, beginning, may_turn = None, None, False
    if source.is_readable(function):
        (made, beginning), may_turn = _made(function), rotary.may_be(function)
    place = 0 if made is None else made.co_freevars.index(_NAME)
    found = _copies[key] = _Copy(made, place, may_turn, beginning, of)
    return found


def _begun(function: types.FunctionType, first: Beginning, owner: Any, *args: Any) -> tuple[Any, ...] | None:
    """What a copy calls before its first statements: the values of their variables, where a graph stands for them."""
    graphs = vars(owner).get(GRAPHS) if isinstance(owner, nn.Module) else None
    return None if graphs is None else graphs.begun(owner, function, first, args)


# --- the copy -------------------------------------------------------------------------------------------------------------


def _made(function: types.FunctionType) -> tuple[types.CodeType | None, Beginning | None]:
    """The code of a function's copy; None where no call in it is to be looked at, or where its source isn't what runs."""
    try:
        tree = copy.deepcopy(_tree(function))
        sites = [] if tree is None else [*_sites(function, tree)]
        if tree is None or not sites:
            return None, None
        beginning = _beginning(function.__code__, tree, sites)
        return _compiled(function.__code__, tree, sites, beginning), beginning
    except (RecursionError, SyntaxError):  # of a deep expression, or where compile's warnings are errors
        return None, None


def _compiled(
    code: types.CodeType, tree: ast.FunctionDef, sites: Sequence[_Site], beginning: Beginning | None
) -> types.CodeType:
    for node, _, _ in sites:
        node.func = ast.Call(ast.Name(_NAME, ast.Load()), [node.func], [])
    if beginning is not None:
        tree.body = _with_a_graph(code, tree.body, beginning)
    # What is evaluated where a function is defined isn't part of its code. Its own name may be that of a global variable.
    tree.decorator_list, tree.returns, tree.name, tree.lineno = [], None, f"{_NAME}_copy", code.co_firstlineno
    setattr(tree, "type_params", [])  # noqa: B010 (from Python 3.12)
    tree.args.defaults = [ast.Constant(None) for _ in tree.args.defaults]
    tree.args.kw_defaults = [default and ast.Constant(None) for default in tree.args.kw_defaults]
    for argument in ast.walk(tree.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    added = (_NAME,) if beginning is None else (_NAME, _BEGIN)
    around = [ast.arg(name) for name in (*added, *code.co_freevars)]
    empty: Any = dict(posonlyargs=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    outer = ast.FunctionDef("around", ast.arguments(args=around, **empty), [tree], [])
    module = ast.fix_missing_locations(ast.Module([outer], []))
    compiled = compile(module, code.co_filename, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True)
    (inner,) = _codes_in(*_codes_in(compiled))
    return _named_as(inner, code)


def _named_as(made: types.CodeType, code: types.CodeType) -> types.CodeType:
    """Compiled code with the names of another one, of which it is a copy. Functions and classes within are the other's very code:
    no call in them has changed, except in comprehensions, which have a code of their own before Python 3.12."""
    within = iter(_codes_in(code))
    constants = [_within(c, next(within)) if isinstance(c, types.CodeType) else c for c in made.co_consts]
    names: Any = {name: getattr(code, name) for name in ("co_name", "co_qualname") if hasattr(code, name)}
    return made.replace(co_consts=tuple(constants), **names)


def _within(made: types.CodeType, code: types.CodeType) -> types.CodeType:
    return _named_as(made, code) if code.co_name in _COMPREHENSIONS else code


def _codes_in(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def _tree(function: types.FunctionType) -> ast.FunctionDef | None:
    """The syntax tree of a function that may be copied: one that doesn't look at its own variables by another way than
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
    if not isinstance(tree, ast.FunctionDef) or private or names & {_NAME, _BEGIN, _BEGUN, *_FRAMES}:
        return None
    return tree


# --- its first statements -------------------------------------------------------------------------------------------------


def _beginning(code: types.CodeType, tree: ast.FunctionDef, sites: Sequence[_Site]) -> Beginning | None:
    """The statements of a method up to the first one that may call a function for rotary embedding: they compute query, key and
    value. None if there are none that a graph could stand for."""
    turning = {id(s.node) for s in sites if isinstance(s.value, types.FunctionType) and rotary.may_be(s.value)}
    count = next((i for i, s in enumerate(tree.body, 1) if any([id(node) in turning for node in ast.walk(s)])), 0)
    named = code.co_argcount + code.co_kwonlyargcount
    any_number = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    declares = any([isinstance(node, ast.Global | ast.Nonlocal) for node in ast.walk(tree)])
    # What a function has around it would be looked at by the graph, and so be kept.
    if not count or not code.co_argcount or declares or {*code.co_freevars} - {"__class__"}:
        return None
    first, others = tree.body[:count], tree.body[count:]
    if _names(first) & {*code.co_varnames[named : named + any_number]}:
        return None
    used = _names(others)
    return Beginning(count, tuple([name for name in dict.fromkeys(_assigned(first)) if name in used]))


def _names(statements: Sequence[ast.stmt]) -> set[str]:
    return {node.id for statement in statements for node in ast.walk(statement) if isinstance(node, ast.Name)}


def _assigned(nodes: Sequence[ast.AST]) -> Iterator[str]:
    """The names of the function's own variables that are assigned to, or deleted."""
    for node in nodes:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.comprehension):  # has variables of its own
            yield from _assigned([node.iter, *node.ifs])
        elif not isinstance(node, _SCOPES):
            yield from _assigned([*ast.iter_child_nodes(node)])


def _with_a_graph(code: types.CodeType, body: list[ast.stmt], beginning: Beginning) -> list[ast.stmt]:
    """The statements of the copy: the first ones run where no graph stands for them. What the graph gives isn't kept longer than
    the function's own variables keep it."""
    named = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    begun = ast.Name(_BEGUN, ast.Load())
    asked = ast.Call(ast.Name(_BEGIN, ast.Load()), [ast.Name(name, ast.Load()) for name in named], [])
    targets = ast.Tuple([ast.Name(name, ast.Store()) for name in beginning.names], ast.Store())
    ask = ast.Assign([ast.Name(_BEGUN, ast.Store())], asked)
    take: list[ast.stmt] = [
        ast.Assign([targets], begun),
        ast.Assign([ast.Name(_BEGUN, ast.Store())], ast.Constant(None)),
    ]
    is_none = ast.Compare(begun, [ast.Is()], [ast.Constant(None)])
    return [ask, ast.If(is_none, body[: beginning.count], take), *body[beginning.count :]]


# --- its calls ------------------------------------------------------------------------------------------------------------

_VARIABLE, _AROUND, _OWN = "variable", "around", "own"


class _Site(NamedTuple):
    """A call in a function: the node, what kind of name it calls, and what that names now."""

    node: ast.Call
    kind: str | None
    """_VARIABLE: a variable of the function. _AROUND: one of the function around it, as a decorator's function calls the one that
    it stands for. _OWN: an attribute of `self`. None: another one."""
    value: Any
    """The function; of an attribute or a variable, its name."""


def _sites(function: types.FunctionType, tree: ast.FunctionDef) -> Iterator[_Site]:
    """The calls that may lead to a function of ours, those within functions and classes within left out."""
    waiting: list[ast.AST] = [*tree.body]
    while waiting:
        node = waiting.pop()
        waiting += [] if isinstance(node, _SCOPES) else ast.iter_child_nodes(node)
        if isinstance(node, ast.Call):
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
    around = isinstance(called, ast.Name) and called.id in code.co_freevars
    return _Site(node, _AROUND if around else None, _named(function, called, variables))


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
    return (
        isinstance(forward, types.FunctionType) and not _compares_its_class(forward) and _leads(forward, module, set())
    )


def _compares_its_class(function: types.FunctionType) -> bool:
    """Whether a forward would find the generated subclass where it expects its own class."""
    tree = _tree(function)
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)] if tree is not None else []
    sides = [side for node in compared for side in (node.left, *node.comparators)]
    return any([ast.unparse(side) in ("type(self)", "self.__class__") for side in sides])


def _leads(function: types.FunctionType, module: nn.Module | None, seen: set[int]) -> bool:
    if id(function) in seen or not _is_somebodys(function):
        return False
    seen.add(id(function))
    if _copy(function).may_turn and rotary.found(function) is not None:
        return True
    tree = _tree(function)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)] if tree is not None else []
    for _, kind, value in [site for node in functions for site in _sites(function, node)]:
        if kind == _VARIABLE and module is not None:
            if any([_looks_up(function, statement, value) for statement in ast.walk(tree)]):  # type: ignore[arg-type]
                return True
        elif kind == _OWN:
            value = _own(module, value)
            if isinstance(value, property):
                return True
        of = None if kind is None else module  # a decorator's function hands the module on
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
