"""The script that a machine with a GPU runs, bench/on_gpu.sh, and what it records of tests, on a machine without one."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import recorded
from small_workloads import ROOT

SCRIPT = ROOT / "bench" / "on_gpu.sh"


def script(*args: str, python: str = sys.executable, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "TORCHINDUCTOR_"))}
    clean |= {"CUDA_VISIBLE_DEVICES": "", "PYTHON": python, "PATH": "/usr/bin:/bin"} | env
    return subprocess.run(["bash", str(SCRIPT), *args], env=clean, capture_output=True, text=True, check=False)


def test_script_wants_a_folder(tmp_path: Path) -> None:
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
    for text in ("", "--minutes many x", "--minutes 0 x", "--minutes", "--frobnicate x", "--parts nonsense x"):
        arguments = text.split()
        assert script(*(str(tmp_path / a) if a == "x" else a for a in arguments)).returncode == 2, arguments
    assert not list(tmp_path.iterdir())
    assert "RESULTS_DIR" in script("--help").stdout


STUB = """#!{python}
import json, os, pathlib, subprocess, sys
args = sys.argv[1:]
def option(name):
    return args[args.index(name) + 1]
if args[0] == "-c":
    print("/checkout/fastlayers/__init__.py\\nGPU: {gpu}")
elif args[:2] == ["-m", "pytest"]:
    assert os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] == "1"
    record = pathlib.Path(option("--record"))
    name = record.parent.name
    begun = sum("process" in line for line in map(json.loads, record.read_text().splitlines()))
    def write(**line):
        with record.open("a") as file:
            print(json.dumps(line), file=file)
    def test(name, outcome, **more):
        write(test=name)
        write(test=name, outcome=outcome, kernels=["pointwise_kernel"], **more)
    write(process=1)
    if name == "tests" and begun == 0:
        test(f"{{record.stem}} right", "passed")
        test(f"{{record.stem}} lost", "failed", error="E   boom", lost="illegal access")
        sys.exit(3)
    if name == "tests" and begun == 1:
        write(test=f"{{record.stem}} hung")
        sys.exit(1)
    if name == "suite":  # it can't even begin
        sys.exit(4)
    test(f"{{record.stem}} other", "passed")
    write(finished=0)
elif args[0].endswith("recorded.py") or args[:3] == ["-m", "bench", "report"]:
    sys.exit(subprocess.run([{python!r}, *args]).returncode)
elif args[:2] == ["-m", "fastlayers"]:
    sys.exit(1)
elif "--share" in args:
    print("warm", args[2], option("--share"))
elif args[:3] == ["-m", "bench", "ceilings"]:
    print("NVIDIA H200, driver 580")
elif args[:3] == ["-m", "bench", "picks"]:
    assert os.environ["FASTLAYERS_SPECIALIZED"] == "1"
    out = pathlib.Path(option("--out"))
    if not out.exists():
        out.touch()
        sys.exit(3)  # a kernel cost it the GPU
    print("7 of 9 jobs\\nlinear: picks take 1.020x the best way")
elif args[:3] == ["-m", "bench", "models"]:
    out = pathlib.Path(option("--out"))
    out.mkdir(exist_ok=True)
    (out / "models.md").write_text("a table")
elif args[:3] == ["-m", "bench", "run"]:
    out = pathlib.Path(option("--out"))
    out.mkdir(exist_ok=True)
    (out / "rows.jsonl").write_text(open({rows!r}).read())
    sys.exit(137)
else:
    sys.exit(f"unexpected: {{args}}")
"""


def stub(folder: Path, gpu: str = "NVIDIA H200 torch 2.11 triton 3.6") -> str:
    """Python on a machine with a GPU, which writes down results and computes none."""
    spread = {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    row = {
        "workload": "Linear | a | bf16 | forward", "family": "Linear", "shape_name": "a", "shape": [64, 64], "mode": "bf16",
        "direction": "forward", "flops": 8, "bytes": 8, "void": None, "gpu_ms": spread, "wall_us": spread, "host_us": spread,
        "first_call_s": 0.5, "error": 1e-3, "torch_error": 1e-3, "peak_bytes": 1, "entry": 0,
    }  # fmt: skip
    env = {"gpu": "NVIDIA H200", "time": "2030-01-02T03:04:05+00:00", "commit": "abc", "torch": "2.11", "triton": "3.6"}
    rows = [row | {"provider": provider, "kind": kind} for provider, kind in (("eager", "torch"), ("ours", "ours"))]
    text = "\n".join(map(json.dumps, [{"environment": env | {"absent": {}}}, *rows]))
    (folder / "rows.jsonl").write_text(text + '\n{"workload": "cut sh')
    path = folder / "stub"
    path.write_text(STUB.format(python=sys.executable, rows=str(folder / "rows.jsonl"), gpu=gpu))
    path.chmod(0o755)
    return str(path)


def test_script_without_a_gpu(tmp_path: Path) -> None:
    done = script(
        "--minutes",
        "2",
        "--pack",
        str(tmp_path / "packed"),
        str(tmp_path / "results"),
        python=stub(tmp_path, gpu="none"),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    summary = (tmp_path / "packed" / "summary.txt").read_text()
    assert "GPU: none\nso nothing is run" in summary
    assert not (tmp_path / "results" / "tests").exists()


@pytest.mark.slow
def test_script_with_a_gpu(tmp_path: Path) -> None:
    """Every part says how it ended, whatever became of the one before; a second run goes on with what isn't done."""
    results, packed, python = tmp_path / "results", tmp_path / "packed", stub(tmp_path)
    arguments = ("--minutes", "9", "--pack", str(packed), str(results))
    done = script(*arguments, python=python)
    assert done.returncode == 1, done.stdout + done.stderr
    summary = (results / "summary.txt").read_text()
    assert "GPU: NVIDIA H200 torch 2.11 triton 3.6\nNVIDIA H200, driver 580" in summary
    shares = len(list((results / "tests").glob("*.jsonl")))
    assert f"tests: {2 * shares} passed, {shares} failed, {shares} died, 0 skipped" in summary
    assert "FAILED 0 lost: illegal access" in summary and "DIED 0 hung: the process ended" in summary
    assert "picks: a kernel cost the process the GPU (picks.log)" in summary
    assert "picks: 7 of 9 jobs\npicks: linear: picks take 1.020x the best way" in summary
    assert "speed: ended with status 137 (speed.log)" in summary
    assert "speed: 0 of 1 workloads are slower" in summary and (results / "bench" / "results.md").exists()
    assert "models: a table" in summary
    assert "self-check: FAILED with status 1" in summary
    assert "suite: not all were run" in summary
    assert "kernels: 1 of " in summary and "  in failing tests as well: pointwise_kernel" in summary
    assert {path.name for path in (results / "done").iterdir()} == {"ceilings", "tests", "specialized"}
    assert {path.name for path in packed.iterdir()} == {"summary.txt", "results.tar.gz"}
    with tarfile.open(packed / "results.tar.gz") as archive:
        names = archive.getnames()
    assert {"./tests/0.jsonl", "./picks.jsonl", "./bench/results.md", "./done/tests"} <= {*names}
    assert not [name for name in names if "cache" in name or "warm" in name]
    assert (packed / "summary.txt").read_text() == summary

    again = script(*arguments, python=python)
    more = (results / "summary.txt").read_text().removeprefix(summary)
    assert not re.search("^(tests|ceilings|specialized): [0-9]", more, re.MULTILINE)
    assert re.search("^picks: [0-9]+ of [0-9]+ seconds", more, re.MULTILINE), again.stderr

    one = script("--minutes", "0.2", "--parts", "models", str(results), python=python)
    assert "models: left out, too little time" in one.stdout


TESTS = """
import os, time
import pytest
import recorded

@pytest.mark.parametrize("layer", ["A-float32", "A-float64", "B-float32"])
def test_layers(layer, device):
    from fastlayers.kernels.runtime import launch
    for counter in launch.counters:
        counter[f"{layer[0]}_kernel"] += 1

def test_without_a_device():
    assert False

@pytest.mark.slow
def test_slow(device):
    pass

def test_crash(device):
    os._exit(9)

def test_hang(device):
    time.sleep(100)

def test_lost(device):
    recorded._gpu_is_lost = lambda: "AcceleratorError: illegal memory access"
    assert 1 == 2

def test_skipped(device):
    pytest.skip("no")
"""


@pytest.mark.slow
def test_tests_are_recorded(tmp_path: Path) -> None:
    """Process after process, each of which a test ends, until all have been run."""
    (tmp_path / "test_it.py").write_text(TESTS)
    record = tmp_path / "record.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "--hang",
        "2",
        "--record",
        str(record),
    ]
    env = os.environ | {"PYTHONPATH": f"{ROOT}/tests:{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for _ in range(4):
        last = subprocess.run(
            [*command, "test_it.py"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
    lines = recorded.read(record)
    assert lines[-1] == {"finished": 0}, last.stdout + last.stderr
    order = [line["test"].split("::")[1] for line in lines if "outcome" in line or lines.count(line) > 1]
    assert order == [
        "test_layers[A-float32]", "test_layers[B-float32]", "test_lost", "test_skipped", "test_layers[A-float64]", "test_slow"
    ]  # fmt: skip
    found = {name.split("::")[1]: line for name, line in recorded.ended(lines).items()}
    assert len(found) == 8
    assert [name for name, line in found.items() if line["outcome"] == "died"] == ["test_crash", "test_hang"]
    assert (
        found["test_lost"]["lost"].endswith("illegal memory access") and "assert 1 == 2" in found["test_lost"]["error"]
    )
    assert found["test_layers[B-float32]"]["kernels"] == ["B_kernel"]
    assert (
        "time.sleep" in (tmp_path / "record.hangs").read_text()
        or "test_hang" in (tmp_path / "record.hangs").read_text()
    )
    text = recorded.summary(found)
    assert text.startswith("tests: 4 passed, 1 failed, 2 died, 1 skipped")
    assert "FAILED test_it.py::test_lost: AcceleratorError: illegal memory access" in text
    assert "kernels: 0 of " in recorded.kernels(found) and "not launched: " in recorded.kernels(found)
    assert recorded.main([str(record)]) == 1


def test_a_test_that_time_cut_off_is_run_again(tmp_path: Path) -> None:
    begun = [{"process": 1}, {"test": "a"}, {"test": "a", "outcome": "passed", "kernels": []}, {"test": "b"}]
    assert recorded.ended(begun).keys() == {"a"}
    assert recorded.ended([*begun, {"process": 2}])["b"]["outcome"] == "died"
    assert recorded.ended([*begun, {"stopped": True}, {"process": 2}]).keys() == {"a"}
    (tmp_path / "cut.jsonl").write_text("\n".join(map(json.dumps, begun[:3])) + '\n{"test": "c')
    assert recorded.ended(recorded.read(tmp_path / "cut.jsonl")).keys() == {"a"}
    assert recorded.main([str(tmp_path / "cut.jsonl")]) == 0
    assert recorded.main([str(tmp_path / "none.jsonl")]) == 1


@pytest.mark.slow
def test_a_rehearsal_compiles_what_a_gpu_would_run(tmp_path: Path) -> None:
    """Wrong numbers are none of its business; a kernel that doesn't compile is."""
    (tmp_path / "test_it.py").write_text(
        """
import torch, triton, triton.language as tl
from fastlayers import functional as FL
from fastlayers.kernels.runtime import launch

@triton.jit
def _broken_kernel(x):
    tl.store(x, tl.no_such_thing(x))

def test_right(device):
    x = torch.ones(3, device=device)
    assert torch.equal(FL.relu(x), x)

def test_broken(device):
    launch.launch(_broken_kernel, 1, torch.ones(3, device=device))
"""
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {
        "PYTHONPATH": f"{ROOT}/tests:{ROOT}",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "rehearsal",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "test_it.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert "1 failed, 1 passed" in done.stdout and "no_such_thing" in done.stdout, done.stdout + done.stderr
    assert list((tmp_path / "cache").glob("*/_pointwise_kernel.cubin"))


def test_kernels_are_known_by_name() -> None:
    assert {"pointwise_kernel", "conv_box_kernel"} <= recorded.known_kernels()
