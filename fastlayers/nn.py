"""torch.nn with our classes where we have them, and torch's own in every other place."""

import sys
from typing import Any

import torch.nn as _torch
from torch.nn import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary]

from . import functional
from .modules import Conv2d, LazyConv2d, LazyLinear, Linear, ReLU, Sequential, Softmax  # noqa: F401

__all__ = sorted(n for n in dir(_torch) if not n.startswith("_"))  # pyright: ignore[reportUnsupportedDunderAll]

# `import fastlayers.nn.functional as F`, as with torch.nn
sys.modules[f"{__name__}.functional"] = functional


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return __all__
