"""The compiled kernels, run without a GPU: see tests/ptx_machine/README.md."""

from __future__ import annotations

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
