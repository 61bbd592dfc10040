"""The same models under torch.compile, and models whose layers are ours by an import: trained beside themselves untouched."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import models
import pytest
import torch
from models import EXAMS, Exam, available
from test_exam import TWINS, _auto, classes, drawn, exactly, judge, train, twin  # noqa: F401
from torch._dynamo.utils import counters

import fastlayers

BY_IMPORT = ("unet", "lstm_tagger")
"""Models that this folder writes, from whatever `nn` is there."""
COMPILED = [
    pytest.param(name, marks=[] if name == "lstm_tagger" else pytest.mark.exam)
    for name in ("gpt2", "llama", "bert", "vit", "lstm_tagger")
]


def compiled(exam: Exam, model: torch.nn.Module, batch: dict[str, torch.Tensor], backend: str) -> tuple[Any, int, int]:
    """What training it compiled gives, and how often Dynamo made a graph and left one."""
    torch._dynamo.reset()
    counters.clear()
    call = torch.compile(model, backend=backend).__call__  # a bound method: the model itself has no truth
    found = train(exam, model, batch, call)
    return found, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def ours_by_import(name: str, model: torch.nn.Module) -> torch.nn.Module:
    with mock.patch.object(models, "nn", fastlayers.nn):
        ours = EXAMS[name].model()
    ours.load_state_dict(model.state_dict())
    assert any([cls.__module__.startswith("fastlayers") for cls in classes(ours)])
    return ours


def within_budget(exam: Exam, found: Any, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """As the untouched model in eager, step for step."""
    twins = [twin(model) for _ in range(TWINS)]
    judge(found, [train(exam, copy.deepcopy(m), batch) for m in (model, *twins)], exactly(exam, model, batch))


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str, device: torch.device, launched: list[str]) -> None:
    """In no more graphs, and with no more breaks, than the untouched model's."""
    exam = EXAMS[name]
    reason = available(exam)
    if reason is not None:
        pytest.skip(reason)
    model, batch = drawn(exam, device)
    ours = copy.deepcopy(model)
    assert fastlayers.accelerate(ours).changed
    _, theirs_graphs, theirs_breaks = compiled(exam, copy.deepcopy(model), batch, "eager")
    launched.clear()
    found, graphs, breaks = compiled(exam, ours, batch, "aot_eager")
    assert launched
    assert graphs
    if theirs_graphs:  # Dynamo leaves the whole of a model alone that has torch's LSTM
        assert graphs <= theirs_graphs
        assert breaks <= theirs_breaks
    within_budget(exam, found, model, batch)


@pytest.mark.parametrize("name", BY_IMPORT)
def test_by_import(name: str, device: torch.device, launched: list[str]) -> None:
    model, batch = drawn(EXAMS[name], device)
    ours = ours_by_import(name, model).to(device)
    found = train(EXAMS[name], ours, batch)
    assert launched
    within_budget(EXAMS[name], found, model, batch)
