"""What the tests of every layer share: the catalog's cases, and how a layer of ours is run beside torch's.

A case may have several inputs, some of them of integers, and a layer several results, some without a gradient. The values of
a call are its results and then the gradients of all floating inputs and all parameters, in order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import random_layers
import torch
from layers import LEADING
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

import fastlayers
from fastlayers.catalog import ROWS, Case
from fastlayers.testing import assert_within_budget, neighbours

_OF_ROWS = [
    (row, {name: case._replace(scale=row.scale, random=row.random) for name, case in row.cases.items()}) for row in ROWS
]


def _cases(every_layer: bool, most: int = 100) -> list[Any]:
    """`make test` has time for two cases of each of sixty layers, or of those that lead. `make slow` runs the others."""
    return [
        pytest.param(
            case,
            id=f"{row.name}-{name}" if most > 1 else row.name,
            marks=[] if i < 2 and (every_layer or row.name in LEADING) else pytest.mark.slow,
        )
        for row, cases in _OF_ROWS
        for i, (name, case) in enumerate(cases.items())
        if i < most
    ]


OF_EVERY_LAYER, CASES, FIRST = _cases(True), _cases(False), _cases(False, most=1)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def pair(
    case: Case, dtype: torch.dtype, device: torch.device, as_it_is: bool = False
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch's, initialised with the same numbers. Where they draw random numbers both drop the same elements, unless
    torch's must be `as_it_is`."""
    # Not the first state, from which the inputs were drawn: gradients drawn after this would be equal to them.
    state = torch.get_rng_state()
    ours = case.make(fastlayers.nn).to(device, dtype)
    torch.set_rng_state(state)
    theirs = case.make(torch.nn).to(device, dtype)
    for mine, other in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert mine[0] == other[0]
        assert torch.equal(mine[1], other[1])
    if case.random and as_it_is:
        random_layers.seeded(ours)
    elif case.random:
        random_layers.tie(ours, theirs)
    return ours, theirs


BY_VECTOR = {"CELU", "ELU", "Hardshrink", "Hardswish", "Hardtanh", "ReLU6", "SELU", "Softshrink"}
"""Layers whose kernels in torch give NaN another gradient on a CPU where they compute a vector at a time than in the elements
that remain, for which they do what they do on a GPU."""


def one_by_one(function: Any) -> Any:
    """A function of one element, called with each by itself."""
    return lambda x, *args, **kwargs: torch.stack([function(t, *args, **kwargs) for t in x.reshape(-1)]).view(x.shape)


def by_formula() -> Any:
    """Within, torch's attention is a formula of its other functions. On a CPU its fused kernel gives 0 for a query of NaN, and
    has no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def tensors(arguments: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)]


def floats(arguments: Any) -> list[torch.Tensor]:
    """The tensors that can have a gradient."""
    return [t for t in tensors(arguments) if t.is_floating_point()]


def replaced(arguments: Sequence[Any], new: Iterable[torch.Tensor]) -> list[Any]:
    """The arguments with other floating tensors."""
    found = iter(new)
    return [next(found) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]


def results(module: torch.nn.Module, arguments: Sequence[Any]) -> list[torch.Tensor]:
    return tensors(module(*arguments))


def output_gradients(module: torch.nn.Module, arguments: Sequence[Any]) -> list[torch.Tensor]:
    """Random gradients for the results of a call."""
    return [torch.randn_like(y) for y in floats(results(module, arguments))]


def values(
    module: torch.nn.Module, arguments: Sequence[Any], dys: Sequence[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """The results, and every gradient; by default, of the sum of the results and of their squares."""
    leaves = [t.detach().requires_grad_() for t in floats(arguments)]
    ys = results(module, replaced(arguments, leaves))
    if dys is None:
        outputs: Any = total(ys)
    else:
        outputs = floats(ys)
    return [*ys, *torch.autograd.grad(outputs, [*leaves, *module.parameters()], dys)]


def total(ys: Sequence[torch.Tensor]) -> torch.Tensor:
    """A number whose gradient depends on the results."""
    return torch.stack([y.sum() + y.square().sum() for y in floats(ys)]).sum()


def memory(saved: list[torch.Tensor], given: list[torch.Tensor]) -> tuple[int, int, int]:
    """Bytes of what autograd keeps: of all tensors, of the memory they lie in, and of that beside what was given."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    own = {t.untyped_storage().data_ptr() for t in given}
    added = sum(size for address, size in storages.items() if address not in own)
    return sum(t.nbytes for t in saved), sum(storages.values()), added


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


def exactly_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def check(
    case: Case,
    arguments: Sequence[Any],
    dys: Sequence[torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Results and every gradient within the budget, with torch's strides; what is given stays as it is.

    Args:
        dtype: the parameters', where all arguments are integers.
    """
    inputs = floats(arguments)
    ours, theirs = pair(case, inputs[0].dtype if inputs else dtype, tensors(arguments)[0].device)
    exact = copy.deepcopy(theirs).double()
    before = [t.clone() for t in (*tensors(arguments), *ours.parameters())]
    try:
        dys = output_gradients(theirs, arguments) if dys is None else dys
    except NotImplementedError as error:
        pytest.skip(f"nothing to compare with: {error}")
    mine = values(ours, arguments, dys)
    others = [
        values(theirs, replaced(arguments, near[: len(inputs)]), near[len(inputs) :])
        for near in neighbours(*inputs, *dys)
    ]
    right = values(exact, replaced(arguments, [t.double() for t in inputs]), [dy.double() for dy in dys])
    count = len(mine) - len(inputs) - len(list(ours.parameters()))
    names = [
        *[f"result {i}" for i in range(count)],
        *[f"gradient of input {i}" for i in range(len(inputs))],
        *[f"gradient of {name}" for name, _ in ours.named_parameters()],
    ]
    for i, (name, a, c, *b) in enumerate(zip(names, mine, right, *others, strict=True)):
        if a.is_floating_point():
            assert_within_budget(a, b, c, name, case.scale)
        else:
            assert torch.equal(a, b[0]), name
        assert i >= count or a.stride() == b[0].stride(), name
    exactly_same([*tensors(arguments), *ours.parameters()], before)
