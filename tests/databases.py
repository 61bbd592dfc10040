"""What the tests of torch's own test databases share: their rows that are about our classes and functions, and calls of them."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import types
import unittest
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_map

import fastlayers
from fastlayers.catalog import CLASSES, ROWS

if importlib.util.find_spec("expecttest") is None:  # torch.testing._internal only derives a class from its
    sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)  # type: ignore[assignment]
# The import would forbid everyone to set torch.backends' switches, and warns that optional packages are missing.
with mock.patch.object(torch.backends, "disable_global_flags"), warnings.catch_warnings(action="ignore"):
    from torch.testing._internal import common_utils
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

# Whenever op_db is asked for samples it searches the whole stack, and reads its source code, for the unittest that asks. There is
# none here, and the search took a fifth of the time of these tests.
common_utils.extract_test_fn = lambda: None


# torch makes a padded copy for "same" and says so; we don't. A lazy module says that it is new, forward
# mode uses torch.jit.script, complex numbers are cast, and losses warn of a "mean" and of sizes that may not be meant.
MARKS = [
    pytest.mark.usefixtures("few_programs"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using a target size:UserWarning"),
    pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored:UserWarning"),
    pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning"),  # in a pattern of the database's
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning"),
]


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MODULES = [info for info in module_db if info.module_cls in CLASSES]
ROW = {row.function: row for row in ROWS if row.function is not None and hasattr(torch.nn.functional, row.function)}
BY_FUNCTION = {name: row for row in ROWS for name in (row.function, *row.functions)}
SCALE = {cls.__name__: row.scale for row in ROWS for cls in CLASSES if cls.__name__.removeprefix("Lazy") == row.name}


def tolerance(module: torch.nn.Module) -> dict[str, float]:
    """For assert_close: that of its default, unless results within are differences of larger numbers."""
    return dict(rtol=1e-4, atol=1e-4) if scale_of(module) else {}


def size_of(*tensors: torch.Tensor) -> float:
    """The largest number in them, at least 1. A row's `scale` is that of arguments of size 1; the databases' reach 9."""
    return max([1.0, *[t.detach().nan_to_num(0, 0, 0).abs().max().item() for t in tensors if t.numel()]])


def scale_of(module: torch.nn.Module) -> float:
    """The largest `scale` of a layer within."""
    return max(SCALE.get(type(m).__name__, 0) for m in module.modules())


def scale_for(module: torch.nn.Module, *arguments: torch.Tensor) -> float:
    """The size of the numbers that results and gradients for these arguments are differences of."""
    return scale_of(module) * size_of(*arguments)


def function_of(info: Any) -> str | None:
    """The name in torch.nn.functional of the function that a row of op_db is about, if that is ours and isn't random."""
    if info.name == "unfold":
        return None  # a tensor's method, which has nothing to do with the function
    name = info.name.removeprefix("nn.functional.")
    return name if name in ROW and not ROW[name].random else None


def comparable(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a call whose result can be compared. Attention without dropout, by which torch drops other weights than we
    do; and with small queries, since weights that are all 0 or 1 have gradients that are nothing but what roundings leave."""
    if "use_separate_proj_weight" in kwargs:  # multi_head_attention_forward's, which is given p by its place
        return [*args[:10], 0.0, *args[11:]], kwargs
    if "dropout_p" not in kwargs:
        return args, kwargs
    query, key, value = args
    query = query.detach() / 16
    if (
        query.dtype.itemsize == 2
    ):  # with fewer than four dimensions torch takes its formula, which stays in float32 throughout
        query, key, value = (x.detach().expand(1, *key.shape[:-2], *x.shape[-2:])[-1:] for x in (query, key, value))
        query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    return [x.detach().requires_grad_(args[0].requires_grad) for x in (query, key, value)], {**kwargs, "dropout_p": 0.0}


OPS = [info for info in op_db if function_of(info) is not None]


def of_dtypes(infos: list[Any], dtypes: Callable[[Any], Any]) -> list[Any]:
    """`make test` has time for one floating dtype. `make slow` runs the others."""
    return [
        pytest.param(
            info,
            dtype,
            id=f"{getattr(info, 'full_name', None) or info.name}-{str(dtype)[6:]}",
            marks=pytest.mark.slow if dtype in (torch.float16, torch.bfloat16, torch.float64) else [],
        )
        for info in infos
        for dtype in sorted(dtypes(info), key=str)
    ]


def explained(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """The result of the call, and why torch computed what it did: the catalog must say so."""
    results: list[Any] = []
    reasons: list[str] = []
    with fastlayers.policy("auto"):
        for decision in fastlayers.explain(lambda: results.append(call(*args, **kwargs))):
            reason = decision.reason
            if decision.op not in BY_FUNCTION and (reason or "").endswith("is not one of our layers"):
                continue  # the database builds some layers of torch.nn's
            if reason is not None:
                said = BY_FUNCTION[decision.op].falls_back
                assert reason in said, f"{decision.op} on torch: {reason}. Its row's falls_back: {said}"
                reasons.append(reason)
    return results[0], reasons


def on_kernels(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of the call, having seen that kernels computed it unless the catalog says otherwise."""
    return explained(call, *args, **kwargs)[0]


def leaves(tree: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def first(result: Any) -> torch.Tensor:
    """A function's result; of several the one that has a gradient, and not the indices beside it."""
    return result[0] if isinstance(result, tuple) else result


def gradients(call: Callable[[], Any], *wanted: torch.Tensor, dy: torch.Tensor | None = None) -> list[Any]:
    """y, and the gradients of what requires one."""
    y = first(call())
    wanted = tuple(t for t in wanted if t.requires_grad)
    if not wanted or not y.requires_grad:
        return [y]
    return [y, *torch.autograd.grad(y, wanted, torch.ones_like(y) if dy is None else dy)]


def few(samples: Sequence[Any], count: int = 8) -> Sequence[Any]:
    """So many at random, other ones in every run; FASTLAYERS_SAMPLES says how many. The databases have up to 1440 rows for a
    function, and the interpreter takes long."""
    count = int(os.environ.get("FASTLAYERS_SAMPLES", count))
    return random.Random(torch.initial_seed()).sample(samples, count) if len(samples) > count else samples


def some(info: Any, samples: Sequence[Any]) -> Sequence[Any]:
    """Few of a function's samples; of those that take the interpreter long, four: pooling and resampling, which go through every
    window pixel by pixel, and attention."""
    return few(samples, 4 if any([word in info.name for word in ("pool", "interpolate", "attention")]) else 8)


class Call:
    """Arguments of a call, of which the floating tensors can be exchanged."""

    def __init__(self, args: Any, kwargs: Any):
        self.tree = (tuple(args), dict(kwargs))
        self.floats = [t for t in leaves(self.tree) if t.is_floating_point()]

    def of(self, function: Callable[..., Any]) -> Any:
        args, kwargs = self.tree
        return function(*args, **kwargs)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        """With every floating tensor changed, as a leaf that requires grad if it did."""

        def changed(t: Any) -> Any:
            if not isinstance(t, torch.Tensor) or not t.is_floating_point():
                return t
            return change(t.detach()).detach().requires_grad_(t.requires_grad)

        return Call(*tree_map(changed, self.tree))

    def having(self, new: Sequence[torch.Tensor]) -> Call:
        """With other floating tensors."""
        swap = dict(zip(map(id, self.floats), new, strict=True))
        return Call(*tree_map(lambda t: swap.get(id(t), t), self.tree))
