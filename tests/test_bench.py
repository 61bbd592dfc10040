"""The GPU suite, as far as it can be tried without a GPU: everything but the times themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import stat
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import base, clock, gpus, networks, picks, providers, report, run, subject, tune, workloads
from bench.providers import PROVIDERS, Provider
from bench.workloads import MODES, Workload
from fastlayers.kernels import _launch, _tiles
from fastlayers.kernels._tiles import Tile
from fastlayers.testing import SPECS

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
BY_NAME = {provider.name: provider for provider in PROVIDERS}


def small(family: str, make: Any, shape: tuple[int, ...], direction: Any = "both", mode: str = "fp32") -> Workload:
    return Workload(family, f"small {family}", make, shape, mode, direction, 0.0)


LINEAR = small("Linear", lambda nn: nn.Linear(17, 9), (5, 17))
CONV = small("Conv2d", lambda nn: nn.Conv2d(3, 4, 3, padding=1), (1, 3, 4, 5))
SOFTMAX = small("Softmax", lambda nn: nn.Softmax(-1), (4, 33))
FUSED = dataclasses.replace(
    small("Sequential", lambda nn: nn.Sequential(nn.Linear(9, 7), nn.ReLU()), (5, 9)), shape_name="Linear+ReLU small"
)
STEP = small(
    "training", lambda nn: nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), (5, 8), "step"
)
EVAL = small("inference", networks.evaluated(lambda nn: networks.bottleneck(nn, 4, 3, 2)), (1, 4, 4, 5), "forward")
SMALL = (LINEAR, CONV, SOFTMAX, FUSED, STEP, EVAL)


# What is measured, and in which order


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_bench_shapes(spec: Any) -> None:
    """Every one builds its layer, and its FLOPs are those that torch itself counts, where torch counts."""
    assert len(spec.bench_shapes) >= 8
    for variant in spec.bench_shapes.values():
        with torch.device("meta"):
            layer, x = variant.make(torch.nn), torch.empty(variant.shape, requires_grad=True)
            with FlopCounterMode(display=False) as forward:
                y = layer(x)
            with FlopCounterMode(display=False) as backward:
                y.sum().backward()
        for direction, counter in (("forward", forward), ("backward", backward)):
            flops, elements = spec.flops(layer, x, direction), spec.elements(layer, x, direction)
            assert elements >= x.numel() + y.numel()
            if getattr(layer, "groups", 1) > 1 and direction == "backward":
                assert flops == 2 * spec.flops(layer, x, "forward")  # torch counts the groups' products with each other
            elif counter.get_total_flops():
                pointwise = flops - counter.get_total_flops()
                assert 0 <= pointwise <= 1e-2 * flops + y.numel()
            else:
                assert flops > 0


def test_elements_of_a_chain() -> None:
    """x, y and the parameters once in forward; in backward dx and their gradients, too, and the hidden output."""
    spec = next(spec for spec in SPECS if spec.name == "Sequential")
    layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    x = torch.empty(3, 4)
    parameters = 4 * 8 + 8 + 8 * 2 + 2
    assert spec.elements(layer, x, "forward") == 3 * 4 + 3 * 2 + parameters
    assert spec.elements(layer, x, "backward") == 2 * 3 * 4 + 3 * 2 + 2 * parameters + 3 * 8


def test_workloads_are_distinct_and_complete() -> None:
    found = workloads.workloads()
    keys = [workload.key for workload in found]
    assert len(set(keys)) == len(keys)
    assert {workload.family for workload in found} == {spec.name for spec in SPECS} | {"training", "inference"}
    assert {workload.mode for workload in found} == set(MODES)
    assert {workload.direction for workload in found} == {"forward", "backward", "both", "step"}
    columns = {workload.shape[-1] for workload in found if workload.family == "Softmax"}
    assert {64, 262144} <= columns
    names = {workload.shape_name for workload in found}
    for part in ("Llama-8B", "ViT-B", "GPT-2", "MLP", "odd", "ResNet-50", "depthwise", "VGG", "U-Net", "groups"):
        assert any(part in name for name in names), part
    assert {64, 8192} <= {workload.shape[0] for workload in found if "MLP" in workload.shape_name}


def test_the_first_minutes_see_every_family() -> None:
    first = run.plan(workloads.workloads())[:12]
    assert {workload.family for workload, _ in first} == {spec.name for spec in SPECS} | {"training", "inference"}
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


# Providers


@pytest.mark.parametrize("workload", SMALL, ids=lambda workload: workload.family)
def test_providers_agree(workload: Workload, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU ours in the interpreter; torch.compile without its code generator."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, dynamic: compile(f, backend="aot_eager", dynamic=dynamic))
    providers._compiled.cache_clear()
    reference = subject.Reference(workload, device, 0)
    seen = []
    for provider in PROVIDERS:
        for direction in (workload.direction,) if workload.is_network else ("forward", "both"):
            this = dataclasses.replace(workload, direction=direction)
            if provider.package is not None or not provider.applies(this):
                continue
            exact, torchs = (r if direction != "forward" else r[:1] for r in (reference.exact, reference.torchs))
            with provider.settings(), workloads.precision(this.mode):
                results = subject.make_set(provider, this, device, 0).results(direction)
            row = subject.error(this, results, torchs, exact)
            assert row["void"] is None, (provider.name, row)
            seen.append(provider.name)
    assert {"eager", "ours", "compile", "compile max-autotune"} <= set(seen)
    assert ("addmm_activation" in seen) == (workload is FUSED)
    assert ("ours channels_last" in seen) == (workload in (CONV, EVAL))


def test_a_wrong_result_is_void() -> None:
    reference = subject.Reference(LINEAR, CPU, 0)
    wrong = [t.clone() for t in reference.torchs]
    wrong[1][0, 0] += 0.01
    row = subject.error(LINEAR, wrong, reference.torchs, reference.exact)
    assert row["void"].startswith("gradient 1")
    assert row["error"] > 2 * row["torch_error"]
    wrong[1][0, 0] = float("nan")
    assert subject.error(LINEAR, wrong, reference.torchs, reference.exact)["void"]


def test_absent_packages_say_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_pack.py").write_text("raise RuntimeError('0 active drivers ([]). There should only be one.')")
    monkeypatch.syspath_prepend(tmp_path)
    assert (
        Provider("x", "other", package="no_such_pack").absent() == "ModuleNotFoundError: No module named 'no_such_pack'"
    )
    assert Provider("x", "other", package="broken_pack").absent() == (
        "RuntimeError: 0 active drivers ([]). There should only be one."
    )
    assert set(providers.absent()) <= {"Liger-Kernel", "attorch", "FlagGems"}


def test_our_provider_raises_instead_of_falling_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastlayers

    with BY_NAME["ours"].settings(), pytest.raises(fastlayers.NotAccelerated):
        fastlayers.Softmax(0)(torch.tensor(1.0))
    with BY_NAME["eager"].settings():
        assert fastlayers.explain(fastlayers.ReLU(), torch.ones(2)).decisions[0].path == "torch"


def test_torch_compile_compiles_once_for_all_sets() -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    call = torch.compile(lambda module, x: module(x), backend=backend, dynamic=False)
    for seed in range(5):
        made = subject.make_set(BY_NAME["eager"], LINEAR, CPU, seed)
        call(made.module, made.x)
    assert len(compiled) == 1


# The whole run, on a GPU, and where there is none, on one that isn't there


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [dataclasses.replace(w, direction=d) for w in (LINEAR, CONV) for d in ("forward", "backward", "both")]
    monkeypatch.setattr(run, "workloads", lambda: [*chosen, STEP])
    assert run.main(["--seconds", "0.01", "--minutes", "5", "--out", str(tmp_path)]) == 0
    rows = report.read_results(tmp_path / "results.json")["rows"]
    for row in rows:
        assert "failed" not in row, row
        assert row["kind"] == "roofline" or (row["gpu_ms"] and row["void"] is None), row
    assert {"eager", "eager channels_last", "ours", "ours channels_last", "compile"} <= {
        row["provider"] for row in rows
    }


class _Event:
    times = itertools.count()

    def __init__(self, enable_timing: bool):
        self.time = 0.0

    def record(self) -> None:
        self.time = float(next(_Event.times))

    def elapsed_time(self, end: _Event) -> float:
        return end.time - self.time


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda in name only: what is asked of it works on the CPU, and a graph replays nothing."""
    if not _launch.INTERPRETED:
        pytest.skip("there is a GPU, which needs no stand-in")
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1100)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**8, 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "NVIDIA H200")
    properties = types.SimpleNamespace(name="NVIDIA H200", multi_processor_count=132, L2_cache_size=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(run, "why_not", lambda: None)
    monkeypatch.setattr(clock, "LEAST_ROUNDS", 2)  # the interpreter's patience
    device = torch.device
    monkeypatch.setattr(torch, "device", _DeviceMeta("device", (), {"real": device}))


class _DeviceMeta(type):
    """torch.device, but for CUDA's, which is the CPU."""

    real: Any

    def __call__(cls, *args: Any) -> Any:
        return cls.real("cpu") if args[0] == "cuda" else cls.real(*args)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.real)


CHEAP = [provider for provider in PROVIDERS if provider.tier == 0]


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.usefixtures("fake_gpu")
def test_a_measured_workload(direction: Any) -> None:
    workload = dataclasses.replace(CONV, direction=direction)
    rows = run.measure(workload, [p for p in CHEAP if p.applies(workload)], CPU, 0.0, None, 0)
    assert [row["provider"] for row in rows] == [
        "eager",
        "eager channels_last",
        "ours",
        "ours channels_last",
        "roofline",
    ]
    json.dumps(rows)
    for row in rows[:-1]:
        assert "failed" not in row, row
        assert row["void"] is None
        assert row["samples"] == 2
        assert row["gpu_ms"]["p20"] == pytest.approx(row["gpu_ms"]["p80"])
        assert row["wall_us"]["p50"] >= row["host_us"]["p50"] > 0
        assert row["peak_bytes"] == 1000
        assert row["sets"] >= 3
        assert row["first_call_s"] >= 0
        assert row["tflops"] == pytest.approx(workload.work.flops / row["gpu_ms"]["p50"] * 1e-9)
        assert ("saved_bytes" in row) == (direction != "forward")
    torchs = min(row["wall_us"]["p50"] for row in rows if row["kind"] == "torch")
    assert rows[2]["wall_ratio"] == pytest.approx(torchs / rows[2]["wall_us"]["p50"])
    assert rows[-1]["gpu_ms"]["p50"] == gpus.least_milliseconds(workload.work, "ieee", gpus.GPUS["H200"])


@pytest.mark.usefixtures("fake_gpu")
def test_a_training_step_and_a_provider_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: Any, workload: Workload) -> Any:
        raise RuntimeError("CUDA error: out of resources\nlong story")

    def wrong(module: Any, workload: Workload) -> Any:
        return lambda x: 1.1 * module(x)

    others = [Provider("broken", "other", bind=broken), Provider("wrong", "torch", bind=wrong)]
    rows = run.measure(STEP, [BY_NAME["eager"], BY_NAME["ours"], *others], CPU, 0.0, None, 0)
    by_name = {row["provider"]: row for row in rows}
    assert by_name["broken"]["failed"] == "RuntimeError: CUDA error: out of resources"
    assert "gpu_ms" not in by_name["broken"]
    assert by_name["wrong"]["void"]
    assert "ratio" not in by_name["wrong"]
    assert by_name["ours"]["void"] is None
    assert "gbps" not in by_name["ours"]


@pytest.fixture
def few_workloads(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [dataclasses.replace(w, direction="forward", rank=float(i)) for i, w in enumerate((LINEAR, SOFTMAX))]
    monkeypatch.setattr(run, "workloads", lambda: chosen)


ARGUMENTS = ["--seconds", "0", "--providers", "eager", "ours"]


@pytest.mark.usefixtures("fake_gpu", "few_workloads")
def test_a_run_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    finished = report.read_results(tmp_path / "results.json")
    assert [row["provider"] for row in finished["rows"]] == ["eager", "ours", "roofline"] * 2
    env = finished["environment"]
    assert env["gpu"] == "NVIDIA H200"
    assert {"torch", "triton", "commit", "time", "clocks", "driver", "absent", "clocks after"} <= set(env)
    assert report.read_results(tmp_path / "rows.jsonl")["rows"] == finished["rows"]
    assert "## Slower than torch" in (tmp_path / "results.md").read_text()
    assert "workloads are slower" in capsys.readouterr().out


@pytest.mark.usefixtures("fake_gpu", "few_workloads")
def test_a_run_that_is_stopped_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, calls = run.measure, itertools.count()

    def stopped(*args: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(run, "measure", stopped)
    assert run.main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    assert len(report.read_results(tmp_path / "results.json")["rows"]) == 3
    # Killed while it wrote a row.
    lines = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "cut.jsonl").write_text(lines[:-20])
    assert len(report.read_results(tmp_path / "cut.jsonl")["rows"]) == 2


@pytest.mark.usefixtures("fake_gpu", "few_workloads")
def test_a_run_goes_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = run.measure

    def failing(workload: Workload, *args: Any) -> Any:
        if workload.family == "Softmax":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(workload, *args)

    monkeypatch.setattr(run, "measure", failing)
    run.main([*ARGUMENTS, "--out", str(tmp_path)])
    rows = report.read_results(tmp_path / "results.json")["rows"]
    assert [row["failed"] for row in rows if "failed" in row] == ["OutOfMemoryError: CUDA out of memory"]
    assert len(rows) == 4


@pytest.mark.usefixtures("fake_gpu", "few_workloads")
def test_no_time_no_rows(tmp_path: Path) -> None:
    assert run.main([*ARGUMENTS, "--minutes", "0", "--out", str(tmp_path)]) == 1


@contextlib.contextmanager
def committed() -> Iterator[Path]:
    if not run._git("rev-parse", "HEAD"):
        pytest.skip("not a git checkout")
    with base.checkout("HEAD") as path:
        yield path


def test_base_commit_brings_its_own_kernels() -> None:
    """fastlayers comes from there, the ruler from here; and what fails there is said here."""
    with committed() as path:
        server = base.Server(path)
        try:
            assert Path(server.where).is_relative_to(path)
            with pytest.raises(RuntimeError, match=r"KeyError|CUDA"):
                base.Remote(server, "no such provider", LINEAR, 0)
            server.drop()
        finally:
            server.close()
    assert not path.exists()


@pytest.mark.usefixtures("fake_gpu")
def test_base_commit_is_measured_in_turn() -> None:
    class Fake:
        def ask(self, *request: Any) -> Any:
            return {"void": None, "error": 0.0} if request[0] == "make" else [4.0, 5.0, 6.0]

        def drop(self) -> None:
            pass

    chosen = [BY_NAME["eager"], BY_NAME["ours"]]
    rows = run.measure(LINEAR, chosen, CPU, 0.0, Fake(), 0)  # type: ignore[arg-type]
    assert [(row["provider"], row["kind"]) for row in rows[:3]] == [
        ("eager", "torch"), ("ours", "ours"), ("base ours", "base")
    ]  # fmt: skip
    assert rows[2]["gpu_ms"]["p50"] == 4.0


def bench(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""} | env
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=clean, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command", [("-m", "bench"), ("-m", "bench", "tune"), ("-m", "bench", "picks"), ("-m", "pytest", "bench")]
)
@pytest.mark.parametrize(("env", "message"), [({}, "no GPU"), ({"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set")])
def test_refuses(command: tuple[str, ...], env: dict[str, str], message: str) -> None:
    done = bench(*command, **env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stdout + done.stderr


def test_commands() -> None:
    assert "audit" in bench("-m", "bench", "--help").stdout
    assert bench("-m", "bench", "nonsense").returncode == 2


# Report


def row(provider: str, kind: str, ms: float, wall: float, family: str = "Linear", name: str = "a", **more: Any) -> dict:
    spread = lambda v: {"p20": 0.9 * v, "p50": v, "p80": 1.1 * v}  # noqa: E731
    return {
        "workload": f"{family} | {name} | bf16 | forward", "family": family, "shape_name": name, "shape": [64, 1024],
        "mode": "bf16", "direction": "forward", "flops": 2**40, "bytes": 2**30, "provider": provider, "kind": kind,
        "void": None, "gpu_ms": spread(ms), "wall_us": spread(wall), "host_us": spread(wall / 2), "first_call_s": 0.5,
        "error": 1e-3, "torch_error": 1e-3, "peak_bytes": 2**20, "saved_bytes": 2**21, "entry": 0, **more,
    }  # fmt: skip


@pytest.fixture
def results() -> dict[str, Any]:
    """As a run would write it."""
    groups = [
        [row("eager", "torch", 2.0, 2000), row("ours", "ours", 1.0, 1000)],
        [row("eager", "torch", 1.0, 100, name="b"), row("ours", "ours", 2.0, 300, name="b")],
        # Measured again, with the compiler: the first measurement no longer counts.
        [
            row("eager", "torch", 1.1, 100, name="b", entry=5),
            row("compile", "torch", 0.5, 100, name="b", entry=5),
            row("ours", "ours", 1.0, 50, name="b", entry=5),
        ],
        [row("eager", "torch", 1.0, 100, "Softmax"), row("ours", "ours", 0.1, 10, "Softmax", void="output 0: wrong")],
        [row("eager", "torch", 1.0, 100, "ReLU"), row("ours", "ours", 0.5, 200, "ReLU")],
    ]
    for group in groups:
        run.finish(group, "16", 2**40, 2**30, "H200")
    env = {"gpu": "NVIDIA H200", "time": "2030-01-02T03:04:05+00:00", "commit": "abc123", "torch": "2.11", "triton": "3.6",
           "absent": {"attorch": "ModuleNotFoundError: No module named 'attorch'"}}  # fmt: skip
    return {"environment": env, "rows": list(itertools.chain(*groups))}


def test_comparisons(results: dict[str, Any]) -> None:
    found = {(c.first["family"], c.first["shape_name"]): c for c in report.comparisons(results)}
    assert found["Linear", "a"].ratio == pytest.approx(2.0)
    assert found["Linear", "b"].ratio == pytest.approx(0.5)
    assert found["Linear", "b"].wall_ratio == pytest.approx(2.0)
    assert found["Softmax", "a"].ratio is None
    lost = report.losses(list(found.values()))
    assert [(c.first["family"], c.first["shape_name"]) for c in lost] == [("Linear", "b"), ("ReLU", "a")]


def test_markdown_says_losses_first(results: dict[str, Any]) -> None:
    text = report.markdown(results)
    lost, means, everything = (text.index(f"## {title}") for title in ("Slower", "Geometric", "All rows"))
    assert lost < means < everything
    assert "Linear / b / bf16 / forward" in text[lost:means]
    assert "Linear / a" not in text[lost:means]
    assert "| Linear | bf16 | 1.00 | 2.00 | 2 | 1 | 0 | - |" in text[means:everything]
    assert "VOID: output 0: wrong" in text[everything:]
    assert "attorch: not run, ModuleNotFoundError" in text
    summary = report.summary(results)
    assert summary.startswith("2 of 4 workloads are slower")
    assert max(map(len, summary.splitlines())) < 120


def test_rates_and_roofline(results: dict[str, Any]) -> None:
    first = results["rows"][1]
    assert first["tflops"] == pytest.approx(2**40 / 1e9)
    assert first["gbps"] == pytest.approx(2**30 / 1e6)
    assert first["roofline_percent"] == pytest.approx(100 * 2**40 / 989.4e12 / 1e-3)
    void = next(row for row in results["rows"] if row["void"])
    assert "tflops" not in void
    assert "ratio" not in void


def test_report_command_and_plots(results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    report.write_results(path, results["environment"], results["rows"])
    assert report.main([str(path), "--markdown", str(tmp_path / "r.md"), "--plots", str(tmp_path / "plots")]) == 0
    assert (tmp_path / "r.md").read_text().startswith("# NVIDIA H200")
    names = {p.name for p in (tmp_path / "plots").iterdir()}
    families = {f"ratios-{family}.png" for family in ("Linear", "Softmax", "ReLU")}
    assert names == families | {"roofline.png", "rates.png", "host.png"}
    for plot in (tmp_path / "plots").iterdir():
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert plot.stat().st_size > 5000
    assert "2 of 4" in capsys.readouterr().out


def test_plots_of_nothing(tmp_path: Path) -> None:
    assert report.plots({"environment": {}, "rows": []}, tmp_path) == []
    assert report.summary({"environment": {}, "rows": []}).startswith("0 of 0")


def test_readme_table(results: dict[str, Any], tmp_path: Path) -> None:
    assert report.readme_table(tmp_path / "none") if report.newest(tmp_path) else True
    for day in ("2030-01-01", "2030-01-02"):
        folder = tmp_path / "nvidia-h200" / day
        folder.mkdir(parents=True)
        env = {**results["environment"], "time": f"{day}T00:00:00+00:00"}
        report.write_results(folder / "results.json", env, results["rows"])
    path = report.newest(tmp_path)
    assert path is not None
    table = report.readme_table(path)
    assert "NVIDIA H200, 2030-01-02, commit abc123" in table
    assert "| Linear | 1.00 (2.00), 1 of 2 | not measured | not measured | not measured |" in table
    assert "| Conv2d | not measured" in table


def test_the_readme_holds_the_table() -> None:
    assert report.readme_table() in (ROOT / "README.md").read_text(), (
        "python -c 'from bench.report import readme_table; print(readme_table())'"
    )


def test_nothing_that_measures_needs_what_a_gpu_machine_may_lack() -> None:
    code = (
        "import sys\n"
        "for name in ('matplotlib', 'rich', 'pytest_benchmark', 'pytest', 'sklearn', 'numpy'): sys.modules[name] = None\n"
        "import bench.run, bench.tune, bench.picks, bench.base, bench.audit\n"
        "print('imported')"
    )
    assert bench("-c", code).stdout.strip() == "imported"


# Tuning


def test_knobs() -> None:
    for knob in tune.knobs("sm_90"):
        assert knob.shipped not in knob.candidates
        assert len(set(knob.candidates)) == len(knob.candidates)
        assert 0 < len(knob.candidates) < 150
        assert knob.calls
    kinds = {knob.key[0] for knob in tune.knobs("sm_90") if knob.forced == "product"}
    assert kinds == {"16", "tf32", "ieee", "64"}
    for tile in tune.product_tiles("16", "large", "sm_80"):
        assert tile.stages * (tile.m + tile.n) * tile.k * 2 <= 166_912
        assert tile.m * tile.n >= 2**14


def knob(*candidates: Tile, calls: int = 2) -> tune.Knob:
    return tune.Knob(
        '_PRODUCT_ON["sm_90"]', ("16", "large"), Tile(128, 256, 64, 8), candidates, "product",
        tuple((str(i), lambda device: lambda: None) for i in range(calls)),
    )  # fmt: skip


A, B, C = Tile(128, 128, 64, 8), Tile(256, 128, 64, 8), Tile(64, 256, 64, 4)


def test_the_best_tile_over_all_shapes_is_chosen() -> None:
    this = knob(A, B, C)
    speeds = {this.shipped: [1.0, 1.0], A: [0.7, 1.9], B: [0.9, 0.8], C: [0.98, 0.98]}
    times, best, gain = tune.search(this, lambda knob, tile, i: speeds[tile][i])
    assert best == B
    assert gain == pytest.approx((1 / 0.72) ** 0.5)
    assert times == speeds


def test_noise_replaces_no_tile() -> None:
    this = knob(A)
    assert tune.search(this, lambda knob, tile, i: 1.0 if tile == this.shipped else 0.98)[1:] == (this.shipped, 1.0)
    # Fast the first time only: the second look, in turn, doesn't bear it out.
    seen: dict[Tile, int] = {}

    def drifting(knob: tune.Knob, tile: Tile, i: int) -> float:
        seen[tile] = seen.get(tile, 0) + 1
        return 0.5 if tile == A and seen[tile] <= 2 else 1.0

    assert tune.search(this, drifting)[1:] == (this.shipped, 1.0)


def test_tiles_that_fail_or_crawl_are_dropped() -> None:
    this = knob(A, B, C)
    asked: list[tuple[Tile, int]] = []

    def time_of(knob: tune.Knob, tile: Tile, i: int) -> float | None:
        asked.append((tile, i))
        return {A: None, B: 5.0}.get(tile, 1.0)

    times, best, _ = tune.search(this, time_of)
    assert set(times) == {this.shipped, C}
    assert best == this.shipped
    assert (B, 1) not in asked


def test_search_stops_when_time_is_up() -> None:
    times, _, gain = tune.search(knob(A, B), lambda knob, tile, i: 1.0, over=lambda: True)
    assert len(times) == 1
    assert gain == 1.0


def test_rows_are_python_of_the_tables() -> None:
    names = {"Tile": Tile}
    line = tune.source(knob(), A, 1.25, "NVIDIA H200")
    assert eval("{" + line.split("#")[0] + "}", names) == {("16", "large"): dataclasses.replace(A, stages=3)}
    assert "1.25x 128x256x64 w8s3 on NVIDIA H200" in line
    rows = next(k for k in tune.knobs("sm_90") if k.key == 4096)
    assert eval("{" + tune.source(rows, Tile(1, 4096, warps=16), 1.1, "x").split("#")[0] + "}", names) == {
        4096: Tile(1, 4096, warps=16)
    }
    flat = next(k for k in tune.knobs("sm_90") if k.table == "_POINTWISE")
    exec(tune.source(flat, Tile(1, 2048, warps=8), 1.1, "x"), names)
    assert names["_POINTWISE"] == Tile(1, 2048, warps=8)  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("name", ["_PRODUCT", "_PRODUCT_ON", "_SOFTMAX_ROWS", "_POINTWISE"])
def test_the_tables_that_rows_are_for_exist(name: str) -> None:
    assert hasattr(_tiles, name)


@pytest.mark.usefixtures("fake_gpu")
def test_tuning_runs_a_candidate_as_forced() -> None:
    """Through the launcher, its result compared with the shipped tile's."""
    this = dataclasses.replace(
        knob(), shipped=Tile(32, 32, 16), calls=(("5x17x9", tune._product_call("ieee", 5, 17, 9)),)
    )  # fmt: skip
    time_of = tune._on_gpu(CPU)
    assert time_of(this, Tile(16, 32, 16), 0) is not None
    # The interpreter, like the compiler, takes powers of two alone.
    assert time_of(this, Tile(24, 32, 16), 0) is None


# Picks

HOPPER = _tiles.Device("sm_90", 132)


def test_every_job_has_every_way() -> None:
    """Pointers and descriptors, pointers and boxes; names that tell them apart; what is forced is what is picked then."""
    found = picks.jobs(HOPPER)
    assert {job.name.split(" ")[0] for job in found[:2]} == {"linear", "conv2d"}
    for job in found:
        names = [way.name for way in job.ways]
        assert names[0] == picks.PICKED
        assert len(set(names)) == len(names)
        kinds = {name.split(" ")[0] for name in names[1:]}
        assert kinds == {"pointers", "descriptors" if job.name.startswith("linear") else "boxes"}, job.name
        assert job.flops > 0
    assert all({name.split(" ")[0] for name in (w.name for w in job.ways[1:])} == {"pointers"} for job in picks.jobs(
        _tiles.Device("sm_80", 108)
    ))  # fmt: skip


def test_a_way_is_chosen_for_a_while() -> None:
    """And leaves nothing behind."""
    for make, ways in (
        (lambda: picks._products(HOPPER), ("pointers small", "descriptors 64x64x64")),
        (lambda: picks._convolutions(HOPPER), ("pointers small", "boxes small")),
    ):
        job = min(make(), key=lambda job: job.flops)
        for prefix in ways:
            way = next(way for way in job.ways if way.name.startswith(prefix))
            with way.chosen():
                if way.boxes is not None:
                    assert _tiles.takes_boxes(job.flops, torch.bfloat16, "ieee", HOPPER) is way.boxes
            assert _tiles.BOX_FLOPS == 500_000_000
            assert not _tiles.forced


def test_a_way_launches_what_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every job at its real size, without memory."""
    launched: list[str] = []
    monkeypatch.setattr(_launch, "launch", lambda kernel, programs, *a, **meta: launched.append(kernel.__name__))
    monkeypatch.setattr(_tiles, "device", lambda device: HOPPER)
    monkeypatch.setattr(
        picks, "draw", lambda shape, dtype, device, seed: torch.empty(shape, dtype=dtype, device=device)
    )
    for this in picks.jobs(HOPPER):
        call, pointwise = this.make(torch.device("meta")), "1x1 stride 1" in this.name
        for way in this.ways:
            launched.clear()
            with way.chosen():
                call()
            assert ("_matmul_specialized_kernel" in launched) is way.name.endswith("specialized")
            tma = any(part in kernel for kernel in launched for part in ("tma", "box", "specialized"))
            assert way.name == picks.PICKED or pointwise or tma is not way.name.startswith("pointers"), (
                this.name,
                way.name,
            )


def job(name: str, flops: int) -> picks.Job:
    return picks.Job(
        name, flops, lambda device: lambda: torch.ones(1), (picks.Way(picks.PICKED, {}), picks.Way("pointers a", {}))
    )


def test_regret_and_what_follows() -> None:
    fast, slow = "descriptors 128x256x64 w8s4", "descriptors 64x64x64 w4s5"
    measured = [
        (
            job("linear large", 10**12),
            {"picked": 1.0, fast: 1.0, slow: 2.0, f"{slow} in 4 shares": 0.1, "pointers a": 3.0},
        ),
        (job("linear larger", 10**13), {"picked": 4.0, fast: 2.0, slow: 2.5, "pointers a": 6.0}),
        (job("linear small", 10**8), {"picked": 1.0, fast: 1.5, slow: 1.0, "pointers a": 0.5}),
        (job("conv2d small", 10**8), {"picked": 1.0, "boxes a": 1.5, "pointers a": 0.5}),
        (job("conv2d other", 10**7), {"picked": 1.0, "pointers a": 1.0}),
    ]
    assert picks.regret(measured[1][1]) == (2.0, fast)
    assert picks.regret(measured[4][1]) == (1.0, picks.PICKED)  # of equals the pick is the best
    shares = picks.shares(measured)
    assert shares == {"128x256x64 w8s4": pytest.approx(1.0), "64x64x64 w4s5": pytest.approx((0.5 * 0.8) ** 0.5)}
    assert picks.break_even(measured[:3], "descriptors") == 10**8
    assert picks.break_even(measured[:2], "descriptors") == 0
    assert picks.break_even(measured[4:], "boxes") is None
    text = picks.summary(measured)
    assert "linear: pointers win up to 1e+08 FLOP" in text
    assert "worst 10.00x: linear large" in text
    assert "share of 64x64x64 w4s5: 0.63" in text
    assert picks.summary([]) == "nothing was measured"


def test_a_way_that_fails_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("out of resources\nshared memory")

    this = picks.Job("linear broken", 1, lambda device: broken, (picks.Way(picks.PICKED, {}),))
    assert picks.measure(this, picks._on_gpu(CPU)) == {}
    assert "linear broken, picked: RuntimeError: ['out of resources']" in capsys.readouterr().out


def test_a_wrong_way_is_no_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Clock:
        def __init__(self, *_: Any):
            pass

        def sample(self) -> clock.Sample:
            return clock.Sample(2.5, 0.0, 0.0)

    monkeypatch.setattr(clock, "Clock", Clock)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    this = picks.Job(
        "linear", 1, lambda device: lambda: torch.ones(3) + bool(_tiles.forced),
        (picks.Way(picks.PICKED, {}), picks.Way("pointers a", dict(product=Tile(16, 16, 16))), picks.Way("pointers b", {})),
    )  # fmt: skip
    assert picks.measure(this, picks._on_gpu(CPU)) == {picks.PICKED: 2.5, "pointers b": 2.5}
    assert "pointers a: AssertionError" in capsys.readouterr().out


# The script

SCRIPT = ROOT / "bench" / "on_gpu.sh"


def script(*args: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHON": python, "PATH": "/usr/bin:/bin"}
    return subprocess.run(["bash", str(SCRIPT), *args], env=env, capture_output=True, text=True, check=False)


def test_script_wants_a_folder(tmp_path: Path) -> None:
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
    assert script().returncode == 2
    assert script("--minutes", "many", str(tmp_path)).returncode == 2
    assert script("--frobnicate", str(tmp_path)).returncode == 2


STUB = """#!{python}
import os, subprocess, sys, time
args = sys.argv[1:]
text = " ".join(args)
if args[:2] == ["-m", "pytest"]:
    print("tests/test_linear.py::test_a PASSED\\n=== 1 passed in 0.1s ===")
elif "is_available" in text or "get_device_name" in text or "import xdist" in text or "import build" in text:
    print("NVIDIA H200")
elif "import sklearn" in text:
    sys.exit(1)
elif args[:2] == ["-m", "fastlayers"]:
    print("self-check")
elif args[:3] == ["-m", "bench", "picks"]:
    print("linear: picks take 1.020x the best way")
elif args[:2] == ["-m", "bench"] and args[2] != "report":
    out = args[args.index("--out") + 1]
    os.makedirs(out)
    open(out + "/rows.jsonl", "w").write(open({rows!r}).read())
    sys.exit(137)
else:
    sys.exit(subprocess.run([{python!r}, *args]).returncode)
"""


def test_script_without_a_gpu_keeps_what_it_has(tmp_path: Path) -> None:
    stub = tmp_path / "stub"
    text = STUB.format(python=sys.executable, rows="").replace('"is_available" in text or ', "")
    stub.write_text(text)
    stub.chmod(0o755)
    done = script("--minutes", "2", str(tmp_path / "results"), python=str(stub))
    assert done.returncode == 1, done.stdout + done.stderr
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert "self-check: passed" in summary
    assert "GPU: none, so nothing else is run" in summary
    assert not (tmp_path / "results" / "tests.log").exists()


def test_script_reports_a_benchmark_that_was_killed(tmp_path: Path, results: dict[str, Any]) -> None:
    """Its rows are there, and a table is made of them; every step has said how it ended."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, [{"environment": results["environment"]}, *results["rows"], "cut"]))[:-4])
    stub = tmp_path / "stub"
    stub.write_text(STUB.format(python=sys.executable, rows=str(rows)))
    stub.chmod(0o755)
    done = script("--minutes", "6", str(tmp_path / "results"), python=str(stub))
    assert done.returncode == 1, done.stdout + done.stderr
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert "GPU: NVIDIA H200" in summary
    assert "tests: without tests/test_demo.py, sklearn is not installed" in summary
    assert re.search(r"specialized products: .*1 passed", summary)
    assert re.search(r"tests-of-the-gpu: .*1 passed", summary)
    assert re.search(r"tests: .*1 passed", summary)
    assert "picks: linear: picks take 1.020x the best way" in summary
    assert "compute-sanitizer: not on this machine" in summary
    assert "benchmark: ended with status 137" in summary
    assert "2 of 4 workloads are slower" in done.stdout
    assert (tmp_path / "results" / "bench" / "results.md").read_text().startswith("# NVIDIA H200")
    assert len(list((tmp_path / "results" / "bench" / "plots").iterdir())) == 6
