"""What kernels count in the emulator: a few rows as they are committed, every kernel among them, and comparing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import triton

from bench import counters
from fastlayers.kernels.runtime import launch as _launch

ROOT = Path(__file__).parent.parent
QUICK = (
    r"^(product small forward, f32, sm_80|product by descriptors 64x64x32 forward, tf32, sm_90"
    r"|softmax columns of 32, bf16, sm_90)"
)


@pytest.mark.skipif(
    not _launch.INTERPRETED or shutil.which("gcc") is None,
    reason="for a machine without a GPU, and with a compiler for C",
)
def test_counts_are_as_committed() -> None:
    """Of another version of Triton there are no committed rows, but the runs must pass."""
    rows, (version, committed) = counters.count(QUICK), counters.read()
    assert len(rows) >= 4
    assert [row["error"] for row in rows.values() if "error" in row] == []
    if version == triton.__version__:
        assert {label: committed[label] for label in rows} == rows, "python -m bench counters --update"


def test_every_kernel_is_counted() -> None:
    from ptx_machine import coverage

    _, committed = counters.read()
    launched = {label.rsplit(", ", 1)[1] for label in committed}
    assert coverage.kernels() - launched == set()


def test_what_is_worse_is_said() -> None:
    base = {"sector use": 0.5, "wavefronts": 1.0, "ways": 1.0, "instructions per mma": 20.0, "barriers": 4.0}
    assert counters.compare(base, base) == []
    assert counters.compare(base | {"sector use": 1.0, "barriers": 2.0}, base) == []
    assert counters.compare(base | {"wavefronts": 1.04}, base) == []
    assert counters.compare(base | {"wavefronts": 1.1}, base) == ["wavefronts 1.1, was 1.0"]
    assert counters.compare(base | {"sector use": 0.4}, base) == ["sector use 0.4, was 0.5"]
    lost = {name: value for name, value in base.items() if name != "instructions per mma"}
    assert counters.compare(lost, base) == ["instructions per mma None, was 20.0"]


def test_rows_are_written_as_they_are_read(tmp_path: Path) -> None:
    rows = {"b, _kernel": {"wavefronts": 1.5}, "a, _kernel": {"barriers": 0.0}}
    counters.write(rows, tmp_path / "counters.json")
    assert counters.read(tmp_path / "counters.json") == (triton.__version__, rows)
    assert re.search(r"a, .*\n.*b, ", (tmp_path / "counters.json").read_text())


def test_the_worst_are_read_and_not_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing is to be run")

    monkeypatch.setattr(counters.subprocess, "run", run)
    rows = {f"softmax {i}, _kernel": {"wavefronts": float(i)} for i in range(4)} | {
        "gelu, _kernel": {"wavefronts": 9.0}
    }
    monkeypatch.setattr(counters, "read", lambda: (None, rows))
    assert counters.main(["--worst", "2", "--match", "softmax"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["softmax 3", "softmax 2"]
    assert counters.main(["--worst", "2", "--match", "no such run"]) == 1
