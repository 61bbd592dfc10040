"""torch.nn's submodules under fastlayers.nn: `import fastlayers.nn.utils.rnn`, `from fastlayers.nn.modules.linear import Linear`.

Each stands for torch's module and looks its attributes up there, at every access. What is found is torch's own object, or ours
where we have one: the same object by every path.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

_ROOTS = ("fastlayers.nn", "torch.nn")
_replaced: dict[int, Any] = {}
"""Our object for each of torch's, by the id of torch's, which lives as long as the process."""


def replace(theirs: Any, ours: Any) -> None:
    """Say that `ours` stands wherever torch.nn has `theirs`."""
    _replaced[id(theirs)] = ours


class Namespace(types.ModuleType):
    """Stands for one of torch's modules."""

    def __init__(self, name: str, reference: types.ModuleType):
        super().__init__(name, reference.__doc__)
        self.__path__ = []  # a package to Python's imports, without files of its own
        self._reference = reference

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._reference, name)
        if isinstance(value, types.ModuleType) and value.__name__.startswith(f"{_ROOTS[1]}."):
            return importlib.import_module(_ROOTS[0] + value.__name__.removeprefix(_ROOTS[1]))
        return _replaced.get(id(value), value)

    def __dir__(self) -> list[str]:
        return dir(self._reference)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds fastlayers.nn.X where there is a torch.nn.X."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{_ROOTS[0]}."):
            return None
        try:
            importlib.import_module(_ROOTS[1] + fullname.removeprefix(_ROOTS[0]))
        except ModuleNotFoundError:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Namespace(spec.name, sys.modules[_ROOTS[1] + spec.name.removeprefix(_ROOTS[0])])

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    """Let Python find the submodules of fastlayers.nn."""
    # One of an earlier import of this package would find that one's classes.
    sys.meta_path[:] = [f for f in sys.meta_path if (type(f).__module__, type(f).__name__) != (__name__, "_Finder")]
    sys.meta_path.append(_Finder())
