"""The functions of torch and of Python that are known to be traced rightly: what they compute depends on their arguments (and on
torch's generator) alone, and they write into nothing but tensors that they are given. Calls of any other function are refused."""

from __future__ import annotations

import builtins
import functools
import math
import operator
from collections import OrderedDict
from typing import Any

import torch

from .. import _torch_functional as F
from .. import functional

_FACTORIES = (
    "arange", "as_tensor", "bartlett_window", "blackman_window", "can_cast", "empty", "empty_strided", "eye", "finfo", "full",
    "hamming_window", "hann_window", "iinfo", "kaiser_window", "linspace", "logspace", "normal", "ones", "promote_types", "rand",
    "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "result_type", "scalar_tensor", "tensor",
    "tril_indices", "triu_indices", "vander", "zeros", "Size",
)  # fmt: skip
"""Those in torch that torch.overrides doesn't name, since they take no tensor, or may take none."""

BUILTINS = (
    "abs", "all", "any", "bool", "complex", "dict", "divmod", "enumerate", "float", "frozenset", "int", "len", "list", "max",
    "min", "pow", "range", "repr", "reversed", "round", "set", "slice", "sorted", "str", "sum", "tuple", "zip",
)  # fmt: skip
"""Of Python's. isinstance, hasattr, getattr, callable and super, which look at objects, the interpreter knows itself."""


@functools.cache
def _torch_functions() -> dict[int, tuple[str, Any]]:
    """Each function's path and itself, by its id."""
    takes_tensors = {id(f) for group in torch.overrides.get_overridable_functions().values() for f in group}
    found: dict[int, tuple[str, Any]] = {}

    def add(path: str, value: Any) -> None:
        if callable(value):
            found.setdefault(id(value), (path, value))

    for path, space in (
        ("torch.nn.functional", F), ("torch", torch), ("torch.linalg", torch.linalg), ("torch.fft", torch.fft),
        ("torch.special", torch.special), ("torch.Tensor", torch.Tensor),
    ):  # fmt: skip
        for name in dir(space):
            if name.startswith("_"):
                continue
            value = getattr(space, name, None)
            without = getattr(space, name.removesuffix("_"), None)
            if id(value) in takes_tensors or (name.endswith("_") and id(without) in takes_tensors):
                add(f"{path}.{name}", value)
    for name in _FACTORIES:
        add(f"torch.{name}", getattr(torch, name, None))
    for name in ("celu_", "elu_", "hardtanh_", "leaky_relu_", "relu_", "rrelu_", "selu_", "threshold_"):
        add(f"torch.nn.functional.{name}", getattr(F, name, None))
    for name in ("hardsigmoid", "hardswish", "sigmoid", "tanh", "upsample", "upsample_bilinear", "upsample_nearest"):
        add(f"torch.nn.functional.{name}", getattr(F, name, None))
    for name in functional.__all__:
        value = getattr(functional, name)
        if callable(value) and (getattr(value, "__module__", None) or "").startswith("fastlayers.ops."):
            add(f"fastlayers.functional.{name}", value)
    return found


_PYTHON = {
    id(value): value
    for value in (
        OrderedDict,
        *[getattr(builtins, name) for name in BUILTINS],
        *[getattr(math, name) for name in dir(math) if not name.startswith("_") and callable(getattr(math, name))],
        *[getattr(operator, name) for name in operator.__all__ if name not in ("attrgetter", "itemgetter", "methodcaller")],
    )
}  # fmt: skip


def is_torch_function(function: Any) -> bool:
    """Whether a call of it may be noted, to be made at every call of the graph."""
    return id(function) in _torch_functions()


def is_python_function(function: Any) -> bool:
    """Whether it may be called at once with what is known, and noted where it is given what isn't."""
    return id(function) in _PYTHON


def path_of(function: Any) -> str | None:
    """Where one of torch's functions, or of ours, is found: some of them can't be pickled."""
    found = _torch_functions().get(id(function))
    return None if found is None else found[0]


def named(path: str) -> Any:
    """The function of this path."""
    for name, function in _torch_functions().values():
        if name == path:
            return function
    raise ValueError(f"this version of torch has no {path}")
