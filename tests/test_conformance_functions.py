"""torch's own test database of functions, `op_db`, on ours. tests/test_conformance.py says what must hold."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import BY_VECTOR, one_by_one
from databases import (
    FLOATS,
    MARKS,
    OPS,
    ROW,
    Call,
    comparable,
    first,
    function_of,
    gradients,
    of_dtypes,
    on_kernels,
    size_of,
    some,
)
from torch.utils._pytree import tree_map

import fastlayers
from fastlayers.testing import assert_within_budget, neighbours

pytestmark = MARKS


by_function = pytest.mark.parametrize(
    ("info", "dtype"), of_dtypes(OPS, lambda info: info.dtypes if not torch.cuda.is_available() else info.dtypesIfCUDA)
)


def functions(info: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Ours and torch's. op_db may have another name of the function's, which lacks arguments, and gives the weight of an
    embedding before its indices."""
    name: Any = function_of(info)
    ours, theirs = getattr(fastlayers.functional, name), getattr(torch.nn.functional, name)
    if not name.startswith("embedding"):
        return ours, theirs
    return (lambda w, i, **kwargs: ours(i, w, **kwargs)), (lambda w, i, **kwargs: theirs(i, w, **kwargs))


def call_of(sample: Any) -> Call:
    return Call(*comparable((sample.input, *sample.args), sample.kwargs))


def expanded(t: torch.Tensor) -> torch.Tensor:
    """One of its slices, expanded."""
    return t[:1].expand(t.shape) if t.dim() and len(t) else t


def widened(call: Call) -> Call:
    """In float64, and asking for float64 where a floating dtype is asked for."""

    def wide(t: Any) -> Any:
        return torch.float64 if isinstance(t, torch.dtype) and t.is_floating_point else t

    return Call(*tree_map(wide, call.map(torch.Tensor.double).tree))


@by_function
@pytest.mark.usefixtures("large_tiles")
def test_function(info: Any, dtype: torch.dtype, device: torch.device) -> None:
    """reference_inputs: as they are, with gaps, expanded; forward and every gradient."""
    floating = dtype in FLOATS
    count = Counter()
    every = list(info.reference_inputs(device, dtype, requires_grad=floating))  # as a rule the sample_inputs among them
    least = list(info.sample_inputs(device, dtype, requires_grad=floating))
    every = every + least if len(every) < len(least) else every
    name = ROW[function_of(info)].name
    if device.type == "cpu":  # the interpreter takes long over large ones, and torch over one element at a time
        every = [s for s in every if s.input.numel() <= (2**10 if name in BY_VECTOR else 2**16)]
    every = some(info, every)
    for sample in every:
        ours, theirs = functions(info)
        if name in BY_VECTOR and sample.input.isnan().any():
            theirs = one_by_one(theirs)
        for layout in ("as it is", "gaps", "expanded"):
            if layout == "expanded" and name == "LinearCrossEntropyLoss":
                continue  # with all classes alike, gradients are nothing but what roundings leave
            count[layout] += 1
            row = call_of(sample.noncontiguous() if layout == "gaps" else sample)
            if not floating:
                with fastlayers.policy("auto"):
                    mine, other = (row.of(f) for f in (ours, theirs))
                torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)
                continue

            # Leaves: some of the database's are views that gradients don't reach.
            row = row.map(expanded if layout == "expanded" else lambda t: t)
            try:
                result = row.of(theirs)
            except NotImplementedError:  # antialias in 16 bits, on the CPU
                continue
            except RuntimeError:  # it writes into one of them
                assert layout == "expanded"
                with fastlayers.policy("auto"), pytest.raises(RuntimeError):
                    row.of(ours)
                continue
            y, dy = first(result), torch.randn_like(first(result))
            mine = on_kernels(gradients, functools.partial(row.of, ours), *row.floats, dy=dy)
            others = []
            for *moved, moved_dy in neighbours(*row.floats, dy):
                near = row.having([t.requires_grad_(u.requires_grad) for t, u in zip(moved, row.floats, strict=True)])
                others.append(gradients(functools.partial(near.of, theirs), *near.floats, dy=moved_dy))
            exact = widened(row)
            right = gradients(functools.partial(exact.of, theirs), *exact.floats, dy=dy.double())
            for a, c, *b in zip(mine, right, *others, strict=True):
                scale = ROW[function_of(info)].scale * size_of(*row.floats)
                assert_within_budget(a, b, c, f"{info.full_name} {layout} {sample}", scale)
            assert mine[0].stride() == y.stride() or y.numel() == 0  # there torch's choice differs between devices
            if isinstance(result, tuple):
                rounded = result[1] is not None and result[1].is_floating_point()  # attention's weights, not indices
                with fastlayers.policy("auto"):
                    others = row.of(ours)[1:]
                torch.testing.assert_close(others, result[1:], **({} if rounded else dict(rtol=0, atol=0)))
    assert min(count.values()) == len(every)


@pytest.mark.parametrize("info", [info for info in OPS if info.error_inputs_func], ids=lambda info: info.full_name)
def test_function_errors(info: Any, device: torch.device) -> None:
    """error_inputs: torch's exception with torch's message, under every policy."""
    errors = list(info.error_inputs(device))
    assert errors
    for path, error in itertools.product(("auto", "triton", "torch"), errors):
        with fastlayers.policy(path), pytest.raises(error.error_type, match=error.error_regex):
            call_of(error.sample_input).of(functions(info)[0])


LIKE_CONV2D = {f"nn.functional.{name}" for name in ("conv3d", *[f"conv_transpose{n}d" for n in (1, 2, 3)])}
"""One record computes them all, and gradcheck takes minutes for each: `make slow`."""


@pytest.mark.parametrize(
    "info",
    [
        pytest.param(info, id=info.full_name, marks=pytest.mark.slow if info.name in LIKE_CONV2D else [])
        for info in OPS
        if info.supports_autograd
    ],
)
def test_function_derivatives(info: Any, device: torch.device) -> None:
    """gradcheck with batched gradients and forward mode, gradgradcheck."""
    seen = 0
    for sample in some(info, list(info.sample_inputs(device, torch.float64, requires_grad=True))):
        row = call_of(sample)
        wanted = [t for t in row.floats if t.requires_grad]
        if any(t.numel() == 0 for t in wanted):
            continue  # no derivative to check; test_function compares them with torch's

        def call(*swapped: torch.Tensor, row: Call = row, wanted: Any = wanted) -> torch.Tensor:
            swap = dict(zip(map(id, wanted), swapped, strict=True))
            return first(row.having([swap.get(id(t), t) for t in row.floats]).of(functions(info)[0]))

        with fastlayers.policy("auto"):  # forward mode is torch's own
            assert torch.autograd.gradcheck(
                call, wanted, fast_mode=True, check_batched_grad=True, check_forward_ad=info.supports_forward_ad
            )
        if info.supports_gradgrad:
            assert torch.autograd.gradgradcheck(lambda *t, call=call: on_kernels(call, *t), wanted, fast_mode=True)
        else:
            with pytest.raises(RuntimeError, match="not implemented"):
                torch.autograd.gradgradcheck(lambda *t, call=call: on_kernels(call, *t), wanted, fast_mode=True)
        seen += 1
    assert seen
