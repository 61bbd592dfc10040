"""bench's tables and plots."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from small_workloads import ROOT, bench

from bench import report, run
from fastlayers.catalog import ROWS

FLOPS = {"Linear": 2**40}
"""By family; the others have no products."""


def row(provider: str, kind: str, ms: float, wall: float, family: str = "Linear", name: str = "a", **more: Any) -> dict:
    spread = lambda v: {"p20": 0.9 * v, "p50": v, "p80": 1.1 * v}  # noqa: E731
    return {
        "workload": f"{family} | {name} | bf16 | forward", "family": family, "shape_name": name, "shape": [64, 1024],
        "mode": "bf16", "direction": "forward", "flops": FLOPS.get(family, 0), "bytes": 2**30, "provider": provider, "kind": kind,
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
        run.finish(group, "16", group[0]["flops"], 2**30, "H200")
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
    memory = results["rows"][-1]
    assert memory["gbps"] == pytest.approx(2 * 2**30 / 1e6)
    assert "tflops" not in memory
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


def test_report_of_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        report.main([str(tmp_path / "missing.json")])
    assert (left.value.code, "No such file or directory" in capsys.readouterr().err) == (2, True)


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
    assert all((f"\n| {row.name} |" in table) == bool(row.speeds) for row in ROWS)


def test_the_readme_holds_the_table() -> None:
    assert report.readme_table() in (ROOT / "README.md").read_text(), (
        "python -c 'from bench.report import readme_table; print(readme_table())'"
    )


@pytest.mark.slow
def test_nothing_that_measures_needs_what_a_gpu_machine_may_lack() -> None:
    code = (
        "import sys\n"
        "for name in ('matplotlib', 'rich', 'pytest_benchmark', 'pytest', 'sklearn', 'numpy'): sys.modules[name] = None\n"
        "import bench.run, bench.tune, bench.picks, bench.base, bench.audit\n"
        "print('imported')"
    )
    assert bench("-c", code).stdout.strip() == "imported"
