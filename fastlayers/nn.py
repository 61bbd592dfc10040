"""torch.nn with our classes where we have them, and torch's own in every other place, submodules included."""

import importlib
import sys
import types
from typing import Any

import torch.nn as _torch
from torch.nn import *  # pyright: ignore[reportWildcardImportFromLibrary]

from . import _namespace, functional, modules
from .modules import *

__all__ = sorted(n for n in dir(_torch) if not n.startswith("_"))  # pyright: ignore[reportUnsupportedDunderAll]
__path__: list[str] = []  # a package to Python's imports: see _namespace.py

for _ours, _theirs in ((modules, _torch), (functional, _torch.functional)):
    for _name, _value in list(vars(_ours).items()):
        if callable(_value) and _value is not getattr(_theirs, _name, _value):
            _namespace.replace(getattr(_theirs, _name), _value)
_namespace.replace(_torch.functional, functional)
_namespace.install()
# `import fastlayers.nn.functional as F`, as with torch.nn
sys.modules[f"{__name__}.functional"] = functional
for _name, _value in list(vars(_torch).items()):
    if isinstance(_value, types.ModuleType) and _value.__name__ == f"torch.nn.{_name}":
        globals()[_name] = importlib.import_module(f"{__name__}.{_name}")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return __all__
