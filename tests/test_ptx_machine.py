"""The compiled kernels, run without a GPU: see tests/ptx_machine/README.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlayers.kernels.runtime import launch as _launch

ROOT = Path(__file__).parent.parent
MACHINE = ROOT / "tests" / "ptx_machine"
SHARES = 8
"""Of the long part: one process each."""
pytestmark = pytest.mark.skipif(
    not _launch.INTERPRETED or shutil.which("gcc") is None,
    reason="for a machine without a GPU, and with a compiler for C",
)


def passes_in_the_machine(file: str, folder: Path, *arguments: str, share: str = "0/1") -> None:
    """Compiled kernels stay in Triton's own cache, so that a second time takes a fraction of the first."""
    from ptx_machine import bridge

    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments, str(MACHINE / file)]
    environment = bridge.environment(folder) | {"FASTLAYERS_SHARE": share}
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_the_machine_sees_planted_faults(tmp_path: Path) -> None:
    passes_in_the_machine("own_tests.py", tmp_path)


def test_kernels_in_the_machine(tmp_path: Path) -> None:
    passes_in_the_machine("kernels.py", tmp_path, "-m", "not slow")


@pytest.mark.long
@pytest.mark.parametrize("share", range(SHARES), ids=lambda share: f"half{share % 2}-{share}")
def test_every_kernel_in_the_machine(share: int, tmp_path: Path) -> None:
    passes_in_the_machine("kernels.py", tmp_path, "-m", "slow", share=f"{share}/{SHARES}")


def run_in_the_machine(folder: Path, *program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(MACHINE), *program]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


PROGRAM = """
import sys, torch, triton, triton.language as tl
import fastlayers.functional as F

@triton.jit
def last(x_ptr):
    tl.store(x_ptr, tl.program_id(0))

x = torch.tensor([-1.0, 2.0], requires_grad=True)
F.relu(x).sum().backward()
print(x.grad.tolist(), sys.argv[1:])
if sys.argv[1] == "0":
    last[(2,)](torch.empty(1))
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("status", [3, pytest.param(0, marks=pytest.mark.slow)], ids=["fails", "races"])
def test_a_program_in_the_machine(status: int, tmp_path: Path) -> None:
    """As Python would run it, but on compiled kernels. Its exit status is the program's, or 1 after a race."""
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run_in_the_machine(tmp_path, "--target", "sm_80", "program.py", str(status))
    assert done.returncode == (status or 1), done.stderr
    assert done.stdout == f"[0.0, 1.0] ['{status}']\n"
    assert f"for sm_80: {3 - status // 3} launches" in done.stderr
    assert " 1 _pointwise_grad_kernel\n" in done.stderr
    assert ("No race" in done.stderr, "Races:" in done.stderr) == (status > 0, status == 0)


@pytest.mark.long
@pytest.mark.parametrize("epochs", [1], ids=["half0-0"])
def test_the_demo_in_the_machine(epochs: int, tmp_path: Path) -> None:
    done = run_in_the_machine(tmp_path, "-m", "fastlayers", "demo", "--epochs", str(epochs))
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert "compiled, in an emulator" in done.stdout
    assert "All networks learned the same" in done.stdout
    assert done.stderr.endswith("No race, nothing out of bounds.\n")


@pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="a torch without some of the table's layers"
)
def test_coverage_only_grows() -> None:
    """Every run that there is has been made or says why it can't be, none was lost, and every kernel is launched by one."""
    from ptx_machine import coverage, kernels

    faults = coverage.faults(run.label for run in kernels.RUNS)
    assert not faults, "\n".join(["`make coverage` makes the runs that are missing", *faults])


def test_coverage_is_shown() -> None:
    from ptx_machine import coverage

    shown = re.search(r"(?s)<!-- coverage -->\n(.*)\n<!-- end -->", (MACHINE / "README.md").read_text())
    assert shown and shown[1] == coverage.table(), "`make coverage` writes it"
