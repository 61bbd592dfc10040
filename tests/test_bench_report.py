"""bench's tables and plots, and the script that a machine with a GPU runs."""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
import subprocess
import sys
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
elif args[:3] == ["-m", "bench", "models"]:
    out = args[args.index("--out") + 1]
    os.makedirs(out)
    open(out + "/models.md", "w").write("a table")
elif args[:2] == ["-m", "bench"] and args[2] != "report":
    out = args[args.index("--out") + 1]
    os.makedirs(out)
    open(out + "/rows.jsonl", "w").write(open({rows!r}).read())
    sys.exit(137)
else:
    sys.exit(subprocess.run([{python!r}, *args]).returncode)
"""


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert "whole models: a table" in summary
    assert "compute-sanitizer: not on this machine" in summary
    assert "benchmark: ended with status 137" in summary
    assert "2 of 4 workloads are slower" in done.stdout
    assert (tmp_path / "results" / "bench" / "results.md").read_text().startswith("# NVIDIA H200")
    assert len(list((tmp_path / "results" / "bench" / "plots").iterdir())) == 6
