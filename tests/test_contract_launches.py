"""What every layer promises of its launches, by its row of the catalog.

Looks inside: at what is launched, and with how wide offsets.
"""

from __future__ import annotations

import pytest
import torch
from contract import CASES, check, floats, pair, results, same, total

import fastlayers.functional as FL
from fastlayers.catalog import Case
from fastlayers.kernels.runtime import launch

# torch makes a padded copy for "same" and says so; we don't.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("small_tiles")
def test_64_bit_offsets(case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for tensors of more than 2**31 elements, on small ones."""
    monkeypatch.setattr(launch, "wide", lambda *tensors, elements=0: True)
    check(case, case.arguments(torch.float32, device))


@pytest.mark.parametrize("name", ["huber_loss", "smooth_l1_loss", "poisson_nll_loss"])
def test_another_number_of_a_loss_needs_no_other_kernel(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kernels are compiled for stays the same, as where a schedule changes delta at every step."""
    seen: list[dict[str, object]] = []
    run = launch.launch

    def watch(kernel: object, programs: int, *args: object, **meta: object) -> None:
        seen.append(meta)
        run(kernel, programs, *args, **meta)

    monkeypatch.setattr(launch, "launch", watch)
    option = {"huber_loss": "delta", "smooth_l1_loss": "beta", "poisson_nll_loss": "eps"}[name]
    each = []
    for number in (0.5, 0.25):
        seen.clear()
        x, target = torch.rand(2, 7, device=device, requires_grad=True), torch.rand(2, 7, device=device)
        getattr(FL, name)(x, target, **{option: number}).backward()
        each.append([*seen])
    assert len(each[0]) >= 3
    assert each[0] == each[1]


@pytest.mark.parametrize("case", CASES)
def test_backward_computes_what_autograd_grad_asks_for(case: Case, device: torch.device, launched: list[str]) -> None:
    """Everything requires a gradient and one is asked for: what is launched is what would be, if that alone required one."""
    ours, theirs = pair(case, torch.float32, device)
    arguments = case.arguments(torch.float32, device)
    inputs = floats(arguments)
    everything = [*inputs, *ours.parameters()]
    for i, wanted in enumerate(everything):
        counts, gradients = [], []
        for alone in (False, True):
            for t in everything:
                t.requires_grad_(t is wanted or not alone)
            y = total(results(ours, arguments))
            launched.clear()
            gradients += torch.autograd.grad(y, wanted)
            counts.append(list(launched))
        assert counts[0] in (counts[1], ["_gate_kernel", *counts[1]])  # what is computed anew rather than saved
        others = [*inputs, *theirs.parameters()]
        same(gradients, torch.autograd.grad(total(results(theirs, arguments)), others[i]) * 2)
