"""`python -m bench models`: the small models' plan as it is committed, comparing, and the measuring on a GPU that isn't there."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from small_workloads import fake_gpu
from torch import nn

from bench import model_plan, models, real_models, run
from bench.providers import seeded
from bench.real_models import MODELS, WAYS, Model, Way

__all__ = ["fake_gpu"]  # a fixture


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.package is None])
def test_plan_is_as_committed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """tests/exam/test_plan.py holds the others to it."""
    assert models.main(["--plan", "--match", f"^{name} "]) == 0, "python -m bench models --plan --update"
    assert f"{name} | step | accelerate" in capsys.readouterr().out


def test_a_model_is_committed_whole_and_in_the_docs() -> None:
    """tests/exam/test_plan.py fails for a model that isn't committed at all."""
    made_with, rows = model_plan.read()
    committed = {key.split(" | ")[0] for key in rows}
    assert committed >= {name for name, model in MODELS.items() if model.package is None}
    assert [*rows] == [model_plan.label(key) for key in model_plan.planned() if key[0] in committed]
    assert {*made_with} == {package for name in committed for package in model_plan.versions_of(name)}
    assert model_plan.table(rows) in model_plan.DOCS.read_text(), "python -m bench models --plan --update"


def test_ours_save_no_more_than_torch() -> None:
    _, rows = model_plan.read()
    for key, row in rows.items():
        name, direction, _ = key.split(" | ")
        eager = rows[model_plan.label((name, direction, "eager"))]["saved MB"]
        # Our RMSNorm and attention keep numbers of each row, a thousandth of what the rows are.
        assert row["saved MB"] <= 1.001 * eager, key
        assert (eager > 0) == (direction == "step")


ROW: dict[str, Any] = {
    "GFLOP": 1.0, "FLOPs on kernels": 90.0, "GB": 1.0, "bytes on kernels": 50.0, "saved MB": 3.0,
    "kernels": {"a_kernel": 2, "b_kernel": 1}, "operators": {"add": 3}, "left to torch": {},
}  # fmt: skip


def test_differences_are_said_in_words() -> None:
    assert model_plan.compare(ROW, ROW) == []
    assert model_plan.compare(ROW, None) == ["is new"]
    changed = ROW | {"saved MB": 2.5, "kernels": {"a_kernel": 4}, "left to torch": {"no": 1}}
    assert model_plan.compare(changed, ROW) == [
        "saved MB: 2.5, was 3.0",
        "launches of kernels: 4, were 3: 2 more of 'a_kernel', 1 fewer of 'b_kernel'",
        "modules left to torch: 1, were 0: 1 more of 'no'",
    ]


@pytest.fixture
def one_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A plan of one row, and a file that it is held against."""
    file, docs = tmp_path / "models.json", tmp_path / "measured.md"
    docs.write_text("before\n\n| model | pass |\n|---|---|\n| old | step |\n\nbehind\n")
    monkeypatch.setattr(model_plan, "read", lambda read=model_plan.read: read(file))
    monkeypatch.setattr(model_plan, "write", lambda *args, write=model_plan.write: write(*args, file))
    monkeypatch.setattr(model_plan, "document", lambda rows, write=model_plan.document: write(rows, docs))
    monkeypatch.setattr(model_plan, "plan", lambda *key: ROW)
    return file


def test_update_and_what_follows(
    one_row: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--plan", "--match", r"MLP \| step \| eager"]
    assert models.main(arguments) == 1
    assert "CHANGED MLP | step | eager: is new" in capsys.readouterr().out
    assert models.main([*arguments, "--update"]) == 0
    assert list(json.loads(one_row.read_text())["rows"]) == ["MLP | step | eager"]
    table = model_plan.table({"MLP | step | eager": ROW})
    docs = one_row.with_name("measured.md")
    assert docs.read_text() == f"before\n\n{table}\n\nbehind\n"
    assert models.main([*arguments, "--update"]) == 0
    assert docs.read_text() == f"before\n\n{table}\n\nbehind\n"
    assert models.main(arguments) == 0
    monkeypatch.setattr(model_plan, "plan", lambda *key: ROW | {"GB": 2.0})
    capsys.readouterr()
    assert models.main(arguments) == 1
    assert "CHANGED MLP | step | eager: GB: 2.0, was 1.0" in capsys.readouterr().out
    monkeypatch.setattr(model_plan, "versions", lambda name: {"torch": "0.1"})
    assert models.main(arguments) == 0
    assert "not compared: MLP" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        models.main(["--update"])


def test_a_package_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(MODELS, "ViT-B", MODELS["ViT-B"].__class__(nn.Identity, (1,), 1, package="no_such_pack"))
    assert models.main(["--plan", "--match", "ViT-B"]) == 1
    said = capsys.readouterr()
    assert "left out: ViT-B: no_such_pack isn't installed" in said.err
    assert "no row of a model that is installed matches 'ViT-B'" in said.err
    assert not said.out


def test_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "why_not", lambda: "no GPU")
    assert models.main([]) == 2
    assert "python -m bench models --plan needs no GPU" in capsys.readouterr().err


TINY = Model(lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), (5, 8), 3)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small model, and a compiler that compiles nothing."""
    monkeypatch.setattr(models, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(torch, "compile", lambda whole, dynamic: whole)


@pytest.mark.parametrize("training", [True, False])
def test_ways_compute_the_same(training: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours on the kernels."""
    found = {}
    for name, way in WAYS.items():
        if way.why_not("tiny", TINY) is None and way.tier == 0:
            with way.settings(TINY), seeded(device, 0), torch.set_grad_enabled(training):
                whole = TINY.whole(device).train(training)
                x, classes = TINY.inputs(device)
                found[name] = way.change(whole)(x, classes)
    assert {"eager", "accelerate", "fuse", "patched"} == {*found}
    for name, loss in found.items():
        assert abs(loss.item() - found["eager"].item()) <= models.STRAYS * found["eager"].item(), name


def test_liger_leaves_no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    class Causal:
        def forward(self) -> str:
            return "torch"

    llama = types.ModuleType("llama")
    vars(llama).update(LlamaForCausalLM=Causal, rope="torch")

    def apply() -> None:
        llama.rope = "Liger"  # type: ignore[attr-defined]
        Causal.forward = lambda self: "Liger"  # type: ignore[method-assign]

    monkeypatch.setitem(sys.modules, "transformers.models.llama.modeling_llama", llama)
    liger = types.SimpleNamespace(apply_liger_kernel_to_llama=apply)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    for _ in range(2):
        assert (llama.rope, Causal().forward()) == ("torch", "torch")
        with WAYS["Liger"].settings(TINY):
            assert (llama.rope, Causal().forward()) == ("Liger", "Liger")
    assert (llama.rope, Causal().forward()) == ("torch", "torch")
    assert WAYS["Liger"].why_not("GPT-2", MODELS["GPT-2"]) == "doesn't apply"


def test_a_run(tiny: None, fake_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way that is installed, but that one fails and one computes something else."""

    def fails(whole: Any) -> Any:
        raise RuntimeError("does not fit")

    class Other(real_models.Whole):
        def forward(self, *args: Any) -> torch.Tensor:
            return 2 * super().forward(*args)

    def doubled(whole: Any) -> Any:
        whole.__class__ = Other
        return whole

    ways = {name: WAYS[name] for name in ("eager", "fuse", "accelerate, compile")}
    ways |= {"failing": Way("other", fails), "other": Way("other", doubled), "absent": Way("other", package="no_such")}
    monkeypatch.setattr(models, "WAYS", ways)
    monkeypatch.setattr(run, "environment", lambda argv: {"gpu": "none", "time": "2000-01-01T00:00", "commit": "0"})
    assert models.main(["--out", str(tmp_path), "--seconds", "0"]) == 0
    first, *rows = [json.loads(line) for line in (tmp_path / "models.jsonl").read_text().splitlines()]
    assert first["environment"]["gpu"] == "none"
    by_key = {(row["pass"], row["way"]): row for row in rows}
    assert len(by_key) == len(rows) == 2 * 5
    for (direction, way), row in by_key.items():
        if way == "failing":
            assert row["failed"] == "RuntimeError: does not fit"
        else:
            assert (row["void"] is not None) == (way == "other")
            assert row["peak_bytes"] == 1000 and row["samples"] >= 2 and row["wall_us"]["p50"] > 0
            assert ("saved_bytes" in row) == (direction == "step")
            assert 0 <= row["idle"] <= 1
    for way in ways.keys() - {"absent"}:  # none of it is measured again
        monkeypatch.setitem(ways, way, Way("other", fails))
    assert models.main(["--out", str(tmp_path), "--seconds", "0"]) == 0
    assert len((tmp_path / "models.jsonl").read_text().splitlines()) == 1 + len(rows) + 2
    table = (tmp_path / "models.md").read_text()
    assert "| tiny | step | failing | no time: RuntimeError: does not fit |" in table
    assert "| tiny | inference | other | no time: root mean square" in table


def test_a_run_keeps_to_its_time(tiny: None, fake_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "environment", lambda argv: {"gpu": "none", "time": "2000-01-01T00:00", "commit": "0"})
    assert models.main(["--out", str(tmp_path), "--minutes", "0"]) == 1


def test_what_is_not_captured_has_no_idle_share() -> None:
    row = {
        "model": "m", "pass": "step", "way": "eager", "void": None, "gpu_ms": None, "idle": None, "not_captured": "it waits",
        "wall_us": {"p50": 2000.0}, "peak_bytes": 3_000_000, "saved_bytes": 1_000_000, "first_forward_s": 0.5,
    }  # fmt: skip
    assert models.table([row]).endswith("| m | step | eager | not captured: it waits | 2.00 | - | 3 | 1 | 0.50 |")
