"""bench's providers and its whole run, as far as they can be tried without a GPU: everything but the times themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_workloads import BY_NAME, CONV, CPU, EVAL, FUSED, LINEAR, LOSS, SMALL, SOFTMAX, STEP, bench, fake_gpu

from bench import base, ceilings, clock, providers, report, run, subject, workloads
from bench.providers import PROVIDERS, Provider
from bench.workloads import Workload
from fastlayers.reporting import gpus

__all__ = ["fake_gpu"]  # a fixture

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
        call(made.layer, *made.inputs)
    assert len(compiled) == 1


def test_a_layer_of_two_inputs_and_a_scalar_result() -> None:
    """The gradients are those of the inputs of random numbers alone; the loss is differentiated as `backward()` does it."""
    made = subject.make_set(BY_NAME["eager"], LOSS, CPU, 0)
    assert [t.dtype for t in made.inputs] == [torch.float32, torch.int64]
    assert len(made.wanted) == 1 and made.wanted[0] is made.inputs[0]
    loss, gradient = made.results("both")
    assert loss.shape == ()
    expected = (made.inputs[0].detach().softmax(1) - torch.nn.functional.one_hot(made.inputs[1], 7)) / 5
    torch.testing.assert_close(gradient, expected)
    exact = subject.make_set(BY_NAME["eager"], LOSS, CPU, 0, exact=True)
    assert exact.inputs[0].dtype == torch.float64
    assert torch.equal(exact.inputs[0].float(), made.inputs[0]) and torch.equal(exact.inputs[1], made.inputs[1])


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


CHEAP = [provider for provider in PROVIDERS if provider.tier == 0]


@pytest.mark.parametrize("direction", ["forward", pytest.param("backward", marks=pytest.mark.slow), "both"])
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
def test_a_run_goes_on_where_one_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In shares; by another process where the GPU was lost to one, but without what was under way then."""
    measure, measured = run.measure, []

    def noted(workload: Workload, *args: Any) -> Any:
        measured.append(workload.family)
        return measure(workload, *args)

    monkeypatch.setattr(run, "measure", noted)
    arguments = [*ARGUMENTS, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(clock, "lost", lambda: "CUDA error: an illegal memory access was encountered")
        assert run.main(arguments) == clock.LOST
    assert not (tmp_path / "results.json").exists()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"workload": "cut sh')
    assert run.main([*arguments, "--share", "0/2"]) == 0
    assert measured == ["Linear"]
    assert run.main(arguments) == 0
    assert measured == ["Linear", "Softmax"]
    rows = report.read_results(tmp_path / "results.json")["rows"]
    assert [(row["family"], row["entry"]) for row in rows] == [("Linear", 0)] * 3 + [("Softmax", 1)] * 3
    assert report.read_results(tmp_path / "rows.jsonl")["rows"] == rows


@pytest.mark.usefixtures("fake_gpu", "few_workloads")
def test_no_time_no_rows(tmp_path: Path) -> None:
    assert run.main([*ARGUMENTS, "--minutes", "0", "--out", str(tmp_path)]) == 1


@contextlib.contextmanager
def committed() -> Iterator[Path]:
    if not run._git("rev-parse", "HEAD"):
        pytest.skip("not a git checkout")
    with base.checkout("HEAD") as path:
        yield path


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.usefixtures("fake_gpu")
def test_ceilings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ceilings.json"
    assert ceilings.main(["--gigabytes", "0.00001", "--size", "16", "--out", str(file)]) == 0
    found = json.loads(file.read_text())
    assert {"gpu", "commit", "clocks", "clocks after", "triton key"} <= found["environment"].keys()
    assert found["ceilings"].keys() == {"copy GB/s", "bf16 TFLOP/s", "tf32 TFLOP/s", "fp32 TFLOP/s"}
    assert "bf16 0 TFLOP/s" in capsys.readouterr().out
