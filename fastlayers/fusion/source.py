"""The source of a function as a syntax tree: what the interpreter of forwards reads."""

from __future__ import annotations

import ast
import functools
import linecache
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

Function = ast.FunctionDef | ast.Lambda


class NotFound(Exception):
    """There is no source of a function, or it isn't what runs. The message says which."""


def tree(function: FunctionType) -> Function:
    """The syntax tree of a function whose source is known to be what runs.

    Raises:
        NotFound: there is none.
    """
    code = function.__code__
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    if not text:
        raise NotFound("its source can't be found")
    found = _functions(text, code.co_filename)
    if found is None or code not in found.codes:
        raise NotFound("its source isn't what runs")
    name = code.co_name
    nodes = [node for node in found.nodes if _first_line(node) == code.co_firstlineno and _name(node) == name]
    if len(nodes) > 1:
        nodes = [node for node in nodes if _contains(node, code)]
    if len(nodes) != 1:
        raise NotFound("its source is one of several on the line")
    return nodes[0]


def line(function: FunctionType, number: int) -> str:
    """A line of the file that a function is in, without the blanks around it."""
    return linecache.getline(function.__code__.co_filename, number, function.__globals__).strip()


class _Functions:
    """All functions in a file: as compiled anew, to compare with what runs, and as syntax trees."""

    def __init__(self, text: str, filename: str):
        parsed = ast.parse(text)
        compiled = compile(text, filename, "exec", dont_inherit=True)
        self.codes: set[CodeType] = set(codes(compiled))
        self.nodes = [node for node in ast.walk(parsed) if isinstance(node, ast.FunctionDef | ast.Lambda)]


@functools.lru_cache(maxsize=64)
def _functions(text: str, filename: str) -> _Functions | None:
    try:
        return _Functions(text, filename)
    except (SyntaxError, ValueError):
        return None


def codes(code: CodeType) -> Iterator[CodeType]:
    """Those of the functions within."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from codes(constant)


def _first_line(node: Function) -> int:
    decorators = getattr(node, "decorator_list", ())
    return min([node.lineno, *[d.lineno for d in decorators]])


def _name(node: Function) -> str:
    return getattr(node, "name", "<lambda>")


def _contains(node: Function, code: CodeType) -> bool:
    """Whether the code's instructions stand within the node: two lambdas may begin on one line."""
    body = node.body if isinstance(node, ast.Lambda) else node
    begin, end = (body.lineno, body.col_offset), (body.end_lineno or 0, body.end_col_offset or 0)
    positions = getattr(code, "co_positions", lambda: [(None,) * 4])()  # from Python 3.11
    known: list[Any] = [(line, column, last, after) for line, last, column, after in positions if after is not None]
    known = [
        place for place in known if place[:2] < place[2:]
    ]  # of no width: what Python puts before the first instruction
    return bool(known) and all(
        [begin <= (line, column) and (last, after) <= end for line, column, last, after in known]
    )


def is_torchs(function: FunctionType) -> bool:
    return home(function).startswith(("torch.", "fastlayers."))


def home(function: Any) -> str:
    """The module in which it was written, which functools.wraps leaves as it is."""
    if isinstance(function, FunctionType):
        return function.__globals__.get("__name__") or "__main__"
    return type(function).__module__


def is_readable(function: FunctionType) -> bool:
    """Whether it is somebody's own function, or a method of one of torch's layers or ours. Whatever else there is in torch or in
    Python's library isn't looked into."""
    place = home(function)
    if place.startswith(("torch.nn.modules.", "fastlayers.modules.")):
        return place != "torch.nn.modules.module"
    top = place.split(".")[0]
    return top not in ("torch", "fastlayers", "triton", "numpy") and (
        top == "__main__" or top not in sys.stdlib_module_names
    )
