"""Every sample that torch's own test databases have of our classes and functions, in every floating dtype, once.

tests/test_conformance.py and test_conformance_functions.py do more with a few of them, drawn anew in every run.
FASTLAYERS_SAMPLES_FILE names a file to which each test adds a line with its figures; `python tests/samples_table.py FILE` makes a
table of them.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from contract import BY_VECTOR, memory, one_by_one
from databases import (
    FLOATS,
    MARKS,
    MODULES,
    OPS,
    ROW,
    Call,
    explained,
    first,
    function_of,
    gradients,
    leaves,
    scale_for,
    size_of,
)
from test_conformance import samples
from test_conformance_functions import call_of, functions, widened

import fastlayers
from fastlayers.testing import assert_within_budget, neighbours
from fastlayers.testing.budget import Errors, errors

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"), pytest.mark.slow]

NAMED = {row.name: row for row in ROW.values()}
ONE_BY_ONE = 2**10
"""So many elements torch can be asked about one at a time."""


class Subject(NamedTuple):
    """One sample: a call of ours, of torch's, and of torch's in float64."""

    call: Call
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    exact: Callable[..., Any]
    exact_call: Call


def of_module(info: Any, dtype: torch.dtype, device: torch.device) -> Iterator[Subject]:
    for s in samples(info, device, dtype, pick=list):
        yield Subject(s.call, s.ours, s.theirs, copy.deepcopy(s.theirs).double(), s.call.map(torch.Tensor.double))


def of_function(info: Any, dtype: torch.dtype, device: torch.device) -> Iterator[Subject]:
    ours, theirs = functions(info)
    every = list(info.reference_inputs(device, dtype, requires_grad=True))  # as a rule the sample_inputs among them
    least = list(info.sample_inputs(device, dtype, requires_grad=True))
    for sample in every if len(every) >= len(least) else every + least:
        call = call_of(sample).map(lambda t: t)
        yield Subject(call, ours, theirs, theirs, widened(call))


def run(function: Any, call: Call, dy: torch.Tensor) -> list[Any]:
    """The result, and the gradients of floating arguments and of parameters."""
    parameters = function.parameters() if isinstance(function, torch.nn.Module) else ()
    return gradients(functools.partial(call.of, function), *call.floats, *parameters, dy=dy)


def kept(function: Any, call: Call, dy: torch.Tensor) -> tuple[Any, int]:
    """The same, and how many bytes of memory autograd kept for it beside arguments and parameters, which are there anyway."""
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = run(function, call, dy)
    parameters = [*function.parameters()] if isinstance(function, torch.nn.Module) else []
    return found, memory(saved, leaves(call.tree) + parameters)[2]


def judge(subject: Subject, name: str, figures: Counter[str], reasons: Counter[str]) -> None:
    """Whether ours is within the budget.

    Args:
        figures: to which is added how many samples passed, the bytes saved and the largest share of the budget.
        reasons: those for which torch computed a sample, counted.
    """
    call, theirs, exact = subject.call, subject.theirs, subject.exact
    is_layer = isinstance(theirs, torch.nn.Module)
    scale = scale_for(theirs, *call.floats) if is_layer else NAMED[name].scale * size_of(*call.floats)
    if name in BY_VECTOR and any([bool(t.isnan().any()) for t in call.floats]):
        if call.floats[0].numel() > ONE_BY_ONE:
            reasons["NaN in a large tensor, of which torch on a CPU would have to be asked one by one"] += 1
            return
        theirs, exact = one_by_one(theirs), one_by_one(exact)
    try:
        dy = torch.randn_like(first(call.of(theirs)))
    except NotImplementedError:  # antialias in 16 bits
        reasons["nothing to compare with: torch doesn't compute it on a CPU"] += 1
        return
    (mine, ours_kept), why = explained(kept, subject.ours, call, dy)
    try:
        right = run(exact, subject.exact_call, dy.double())
    except RuntimeError as error:
        if "acc_dtype" not in str(error):
            raise
        reasons["nothing to compare with: torch's function doesn't take float64"] += 1
        return

    def torchs(count: int) -> Iterator[tuple[list[Any], int]]:
        """torch's results, and the bytes kept: of the sample, and of so many neighbours."""
        for *moved, moved_dy in neighbours(*call.floats, dy, count=count):
            near = [t.detach().requires_grad_(u.requires_grad) for t, u in zip(moved, call.floats, strict=True)]
            yield kept(theirs, call.having(near), moved_dy)

    def judged(others: list[list[Any]]) -> list[Errors]:
        return [
            errors(a.detach(), [t.detach() for t in b], c.detach(), scale)
            for a, c, *b in zip(mine, right, *others, strict=True)
        ]

    found = [*torchs(4)]
    others, theirs_kept = [results for results, _ in found], found[0][1]
    if not all([e.within for e in judged(others)]):
        # Of some thousand samples torch is lucky in one, also in what is next to it: it is asked about more.
        others += [results for results, _ in torchs(64)]
    for a, c, *b in zip(mine, right, *others, strict=True):
        assert_within_budget(a, b, c, f"{name} {call.tree}", scale)
    shares = [x / y for e in judged(others) for x, y in zip(e.ours, e.allowed, strict=True) if y]
    figures["share"] = max(figures["share"], round(100 * max(shares, default=0.0)))
    figures.update(passed=1, ours=ours_kept, theirs=theirs_kept)
    reasons.update({*why})


def judge_all(row: str, dtype: torch.dtype, subjects: Iterator[Subject]) -> None:
    figures: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with fastlayers.policy("auto"):
        for subject in subjects:
            judge(subject, row, figures, reasons)
    assert figures["passed"]
    path = os.environ.get("FASTLAYERS_SAMPLES_FILE")
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(dict(row=row, dtype=str(dtype)[6:], **figures, reasons=reasons)) + "\n")


def of_floats(infos: list[Any], dtypes: Callable[[Any], Any]) -> list[Any]:
    return [
        pytest.param(info, dtype, id=f"{getattr(info, 'full_name', info.name)}-{str(dtype)[6:]}")
        for info in infos
        for dtype in FLOATS
        if dtype in dtypes(info)
    ]


@pytest.mark.parametrize(("info", "dtype"), of_floats(MODULES, lambda info: info.dtypes))
def test_modules(info: Any, dtype: torch.dtype, device: torch.device) -> None:
    name = info.module_cls.__name__
    judge_all(name.removeprefix("Lazy"), dtype, of_module(info, dtype, device))


@pytest.mark.parametrize(
    ("info", "dtype"), of_floats(OPS, lambda info: info.dtypesIfCUDA if torch.cuda.is_available() else info.dtypes)
)
@pytest.mark.usefixtures("large_tiles")
def test_functions(info: Any, dtype: torch.dtype, device: torch.device) -> None:
    judge_all(ROW[function_of(info)].name, dtype, of_function(info, dtype, device))
