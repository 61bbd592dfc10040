"""Models that other people wrote, accelerated and fused, trained beside themselves untouched, and restored.

`make exam` runs all of it; `make test` the models of torch alone and, where transformers is installed, three of its.
"""

from __future__ import annotations

import copy
import json
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import EXAMS, Exam, available
from torch.overrides import TorchFunctionMode

import fastlayers
from fastlayers.testing import assert_within_budget

CORE = ("llama", "bert", "vit", "unet", "lstm_tagger", "transformer")
"""Those of `make test`."""
STEPS = 2
TWINS = 4
FLOORS = pathlib.Path(__file__).with_name("floors.json")
"""Of each model, the shares of FLOPs and of bytes in percent that run on kernels: accelerated, fused, and within `patched`. They
only rise: `python tests/exam/update_floors.py` writes what is higher than what stands there."""


def names(only: Callable[[str], bool] = lambda name: True) -> list[Any]:
    found = [name for name in EXAMS if only(name)]
    return [pytest.param(name, marks=[] if name in CORE else pytest.mark.exam) for name in found]


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    """As users have it: what the kernels can't take goes to torch. How much they take is what the floors are for."""
    with fastlayers.policy("auto"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these packages' own
        yield


@pytest.fixture
def exam(request: pytest.FixtureRequest) -> Exam:
    found = EXAMS[request.param]
    reason = available(found)
    if reason is not None:
        pytest.skip(reason)
    return found


class Exact(TorchFunctionMode):
    """Within, what a model widens to float32 (norms, softmax, rotary embeddings) it widens to float64: it is the judge."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wider(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        if function is torch.Tensor.float:
            return args[0].double()
        return function(*map(wider, args), **{name: wider(value) for name, value in (kwargs or {}).items()})


def train(exam: Exam, model: torch.nn.Module, batch: dict[str, torch.Tensor], call: Any = None) -> list[dict[str, Any]]:
    """A few steps of SGD: of each the output, the loss and every gradient, those of pictures and sounds too."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    steps = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        inputs = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in batch.items()}
        loss, output = exam.loss((call or model)(**inputs))
        loss.backward()
        found = dict(loss=loss.detach(), output=output.detach())
        found |= {f"d {name}": x.grad.clone() for name, x in inputs.items() if x.grad is not None}
        found |= {f"d {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        steps.append(found)
        optimizer.step()
    return steps


def exactly(exam: Exam, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """The same in float64."""
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    wide: Any = copy.deepcopy(model).double()
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")  # torch's grouped product doesn't take float64
    with Exact():
        return train(exam, wide, batch)


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """A copy with every parameter moved to the next number up or down: float32 can't tell it from the model, and what torch makes
    of it says how large torch's error is without luck."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p in moved.parameters():
            away = torch.where(torch.rand_like(p) < 0.5, float("inf"), float("-inf"))
            p.copy_(torch.where((p == 0) | (p == 1), p, torch.nextafter(p, away)))
    return moved


def judge(ours: list[dict[str, Any]], torchs: list[list[dict[str, Any]]], exact: list[dict[str, Any]]) -> None:
    for i, step in enumerate(exact):
        assert ours[i].keys() == step.keys() == torchs[0][i].keys()
        # A gradient that is a sum which cancels (of a bias before a norm, of a key's bias) keeps the rounding of its terms, which
        # are as large as the gradients of the same model that don't cancel.
        scale = max(x.abs().max().item() for name, x in step.items() if name.startswith("d "))
        for name, value in step.items():
            assert_within_budget(
                ours[i][name],
                [each[i][name] for each in torchs],
                value,
                f"step {i}, {name}",
                scale if name[:2] == "d " else 0.0,
            )


def drawn(exam: Exam, device: torch.device) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    return exam.model().to(device), {name: x.to(device) for name, x in exam.batch().items()}


def classes(model: torch.nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def same_bits(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]), name


@pytest.mark.parametrize("exam", names(), indirect=True)
def test_accelerated(exam: Exam, device: torch.device, launched: list[str]) -> None:
    """Trained on the kernels within the budget, fused or not, and restored: classes, state and what it then computes, bit for
    bit."""
    model, batch = drawn(exam, device)
    torchs = [train(exam, copy.deepcopy(m), batch) for m in (model, *[twin(model) for _ in range(TWINS)])]
    exact = exactly(exam, model, batch)
    for fuse in (False, True):
        ours, before = copy.deepcopy(model), classes(model)
        launched.clear()
        with fastlayers.accelerate(ours, fuse=fuse) as report:
            assert report.changed
            same_bits(ours.state_dict(), model.state_dict())
            on_kernels = train(exam, ours, batch)
        assert launched
        judge(on_kernels, torchs, exact)

        assert classes(ours) == before
        untouched = copy.deepcopy(model)
        untouched.load_state_dict(ours.state_dict())
        launched.clear()
        for one, other in zip(train(exam, ours, batch), train(exam, untouched, batch), strict=True):
            same_bits(one, other)
        assert not launched


SHARES = ("accelerated FLOPs", "accelerated bytes", "fused FLOPs", "fused bytes", "patched FLOPs", "patched bytes")


def shares(exam: Exam) -> dict[str, float]:
    """In percent, in bfloat16, of a forward and backward."""
    model, batch = exam.model(), exam.batch()
    batch.pop("attention_mask", None)  # whether all of it is 1 is asked for, which meta tensors don't know
    accelerated = fastlayers.report(model, dtype=torch.bfloat16, **batch)
    joined = copy.deepcopy(model)
    fastlayers.accelerate(joined, fuse=True)
    fused = fastlayers.report(joined, dtype=torch.bfloat16, **batch)
    with fastlayers.patched():
        patched = fastlayers.report(model, dtype=torch.bfloat16, **batch)
    found = [share for report in (accelerated, fused, patched) for share in (report.flops, report.bytes)]
    return {name: round(100 * share, 1) for name, share in zip(SHARES, found, strict=True)}


@pytest.mark.parametrize("exam", names(), indirect=True)
def test_shares(exam: Exam) -> None:
    """As much runs on the kernels as ever did."""
    name = next(name for name, other in EXAMS.items() if other is exam)
    found, floors = shares(exam), json.loads(FLOORS.read_text())
    print(name, found)  # python -m pytest -s shows it
    assert {what: share for what, share in found.items() if share < floors[name][what]} == {}
