"""torch.nn.functional's names and signatures, on Triton kernels where we have them and torch's own otherwise.

import fastlayers.functional as F
"""

from typing import Any

import torch.nn.functional as _torch
from torch.nn.functional import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary]

from .ops import traced as _traced  # noqa: F401  # torch's registry of operators
from .ops.conv import conv2d, conv2d_formats, conv2d_then  # noqa: F401
from .ops.linear import linear, linear_chain  # noqa: F401
from .ops.pointwise import relu  # noqa: F401
from .ops.softmax import softmax  # noqa: F401

_OURS = {"conv2d", "conv2d_formats", "conv2d_then", "linear", "linear_chain", "relu", "softmax"}
__all__ = sorted(_OURS | {n for n in dir(_torch) if not n.startswith("_")})  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch)})
