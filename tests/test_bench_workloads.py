"""What bench times, in which order, what it costs at the least, and what is made of the samples."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_workloads import LOSS, SOFTMAX, STEP, bench
from torch.utils.flop_counter import FlopCounterMode

import fastlayers
from bench import clock, cost, run, workloads
from bench.workloads import MODES, NETWORKS
from fastlayers.catalog import ROWS, Row
from fastlayers.catalog.row import case
from fastlayers.reporting import dry_run

FAMILIES = {*[row.name for row in ROWS if row.speeds], *NETWORKS}


@pytest.mark.parametrize("row", [row for row in ROWS if row.speeds], ids=lambda row: row.name)
def test_speeds(row: Row) -> None:
    """Every one builds its layer. Its FLOPs, which our operations count, are those that torch counts, and it moves its inputs and
    results at the least."""
    assert row.speeds
    for name, speed in row.speeds.items():
        found = cost.cost(speed, torch.float32)
        theirs = cost.Call.of(speed, torch.nn, torch.float32)
        with FlopCounterMode(display=False) as forward:
            results = theirs.forward()
        with FlopCounterMode(display=False) as backward:
            theirs.backward(results)
        for part, counter in zip(found, (forward, backward), strict=True):
            assert part.bytes >= dry_run.size(theirs.arguments) + dry_run.size(results)
            if part is found.backward and any(getattr(m, "groups", 1) > 1 for m in theirs.layer.modules()):
                assert part.flops == 2 * found.forward.flops  # torch counts the groups' products with each other
            elif (row.name == "MultiheadAttention" and (part is found.backward or "with weights" in name)) or (
                row.name == "scaled_dot_product_attention" and part is found.backward
            ):
                # On meta tensors torch runs its formula, which keeps the weights. Ours computes them again.
                assert part.flops > counter.get_total_flops()
            else:
                assert part.flops == counter.get_total_flops()


def test_bytes_of_a_chain() -> None:
    """Input, result and parameters once in forward. In backward the gradients of all of them, and what is saved: the input, both
    weights and the hidden output."""
    chain = case(lambda nn: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (3, 4))
    found, parameters = cost.cost(chain, torch.float32), 4 * 8 + 8 + 8 * 2 + 2
    assert found.forward.bytes == 4 * (3 * 4 + 3 * 2 + parameters)
    assert found.backward.bytes == 4 * (3 * 2 + 3 * 4 + 4 * 8 + 8 * 2 + 3 * 8 + 3 * 4 + parameters)


def test_bytes_without_products() -> None:
    """A softmax reads one tensor and writes one, then reads two and writes one; classes are of 8 bytes, and a loss is one
    number."""
    x, half = 4 * 33 * 2, torch.bfloat16
    assert cost.cost(SOFTMAX.case, half) == ((0, 2 * x), (0, 3 * x))
    loss = cost.cost(LOSS.case, half)
    assert loss.forward == (0, 5 * 7 * 2 + 5 * 8 + 2)
    assert loss.backward.bytes >= 2 * 5 * 7 * 2 + 5 * 8 + 2


def test_noting_leaves_nothing_behind() -> None:
    """Afterwards a meta tensor is no GPU's, and calls are recorded and launched as ever."""
    layer, x = fastlayers.Linear(3, 2, device="meta"), torch.empty(1, 3, device="meta")
    with dry_run.noting(dry_run.ANY) as noted:
        layer(x)
    assert [launch.kernel.__name__ for launch in noted.launches] == ["_matmul_kernel"]
    assert not noted.launches[0].backward
    assert noted.flops == 2 * 3 * 2
    with pytest.raises(fastlayers.NotAccelerated, match="meta"):
        layer(x)


def test_tf32_is_timed_where_products_obey_its_switch() -> None:
    found = {row.name: workloads.modes(row) for row in ROWS}
    assert all("tf32" in found[name] for name in ("Linear", "Conv2d", "Sequential"))
    assert not any("tf32" in found[name] for name in ("ReLU", "Softmax", "CrossEntropyLoss"))
    assert all({"bf16", "fp32", "fp16"} <= set(modes) for modes in found.values())


def test_workloads_are_distinct_and_complete() -> None:
    found = workloads.workloads()
    keys = [workload.key for workload in found]
    assert len(set(keys)) == len(keys)
    assert {workload.family for workload in found} == FAMILIES
    assert {workload.mode for workload in found} == set(MODES)
    assert {workload.direction for workload in found} == {"forward", "backward", "both", "step"}
    columns = {workload.shape[-1] for workload in found if workload.family == "Softmax"}
    assert {64, 262144} <= columns
    names = {workload.shape_name for workload in found}
    for part in ("Llama-8B", "ViT-B", "GPT-2", "MLP", "odd", "ResNet-50", "depthwise", "VGG", "U-Net", "groups"):
        assert any(part in name for name in names), part
    assert {64, 8192} <= {workload.shape[0] for workload in found if "MLP" in workload.shape_name}


def test_the_first_minutes_see_every_family() -> None:
    first = run.plan(workloads.workloads())[: len(FAMILIES)]
    assert {workload.family for workload, _ in first} == FAMILIES
    assert all(workload.mode == "bf16" and tier == 0 for workload, tier in first)


def test_work_of_a_training_step_is_three_times_its_forward() -> None:
    linear = 2 * 5 * (8 * 6 + 6 * 3)
    # But for the gradient of the input, which nobody asks for.
    assert STEP.work.flops == 3 * linear - 2 * 5 * 8 * 6


def test_budget_skips_what_does_not_fit_and_learns() -> None:
    now = 0.0
    budget = run.Budget(1.0, now=lambda: now)
    assert budget.fits(0)
    assert budget.fits(1)
    assert not budget.fits(2)
    with budget.spend(0):
        now += 30
    assert budget.fits(0)
    assert not budget.fits(1)
    now += 5
    assert not budget.fits(0)
    assert budget.over


def test_precision_sets_both_of_torchs_interfaces() -> None:
    switches: Any = torch.backends
    before = switches.cuda.matmul.fp32_precision, switches.cudnn.conv.fp32_precision
    for mode, allowed in (("tf32", True), ("fp32", False), ("bf16", False)):
        with workloads.precision(mode):
            assert switches.cuda.matmul.allow_tf32 == switches.cudnn.allow_tf32 == allowed
            assert (switches.cuda.matmul.fp32_precision == "tf32") == allowed
            assert (switches.cudnn.conv.fp32_precision == "tf32") == allowed
    assert (switches.cuda.matmul.fp32_precision, switches.cudnn.conv.fp32_precision) == before


# Statistics


def test_percentiles() -> None:
    assert clock.summarize([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)
    assert clock.summarize([3.0]) == (3.0, 3.0, 3.0)
    low, median, high = clock.summarize([1.0, 1.0, 1.0, 1.0, 100.0])
    assert (low, median) == (1.0, 1.0)
    assert high < 100
    with pytest.raises(ValueError, match="no samples"):
        clock.summarize([])
    assert clock.geomean([2.0, 0.5]) == pytest.approx(1.0)


@pytest.mark.parametrize("one", [1, 10_000, 1_000_000, 50_000_000, 500_000_000])
def test_sets_exceed_the_cache_three_times_where_they_can(one: int) -> None:
    l2, memory = 60_000_000, 8_000_000_000
    count = clock.set_count(one, l2, memory)
    assert 3 <= count <= 256
    assert count * one > 3 * l2 or count == 256
    assert clock.set_count(10**9, l2, 2 * 10**9) == 2
    assert clock.set_count(10**9, l2, 10) == 1


def test_round_robin_takes_turns() -> None:
    order: list[str] = []
    ticks = itertools.count()

    def sampler(name: str) -> Callable[[], clock.Sample]:
        def sample() -> clock.Sample:
            order.append(name)
            return clock.Sample(1.0, 2.0, 3.0)

        return sample

    samples = clock.round_robin({"a": sampler("a"), "b": sampler("b")}, 20, now=lambda: float(next(ticks)))
    assert order[:6] == ["a", "b", "a", "b", "a", "b"]
    assert len(samples["a"]) == len(samples["b"])
    assert 9 <= len(samples["a"]) <= 50


def test_saved_bytes_counts_every_storage_once() -> None:
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    with clock.saved_bytes(list(layer.parameters())) as saved:
        y = layer(x)
        (y * y).sum()
    assert saved() == x.numel() * 4 + y.numel() * 4


# The host's time


EARLIER = (
    *[f"{name} {what}" for name in ("linear", "relu", "softmax", "conv2d 1x1")
      for what in ("forward", "forward, graph recorded", "forward + backward")],
    *[f"{name} layer {what}" for name in ("Linear", "Conv2d") for what in ("forward", "forward + backward")],
    "linear, autocast, forward, graph recorded", "linear, autocast, forward + backward", "tutorial MLP forward",
    "tutorial MLP forward + backward", "ResNet block in eval, fused", "linear by torch, dispatched by us",
)  # fmt: skip
"""The names under which figures of earlier commits are known."""


@pytest.mark.slow
def test_rows_of_the_hosts_time() -> None:
    """Each row of the catalog as a layer and, if it has one, as a function; and whatever was timed before."""
    code = "from bench import host\nwith host.stubbed():\n    print(*[pair.name for pair in host.pairs()], sep='\\n')"
    done = bench("-c", code)
    names = done.stdout.splitlines()
    assert len(set(names)) == len(names), done.stderr
    assert set(EARLIER) <= set(names), done.stderr
    for row in ROWS:
        assert f"{row.name} layer forward + backward" in names
        # A layer that calls torch's function by another name (torch.sigmoid) is timed as a layer alone. So is a row that has no
        # class in torch.nn.
        source = inspect.getsource(getattr(torch.nn, row.name).forward) if hasattr(torch.nn, row.name) else ""
        if hasattr(F, str(row.function)) and f"F.{row.function}(" in source:
            assert any(name.startswith(str(row.function)) for name in names)
