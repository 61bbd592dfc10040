"""Times estimated from machine code: what is counted, what follows from it, and how far published kernels are off."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import assembly, audit, estimate
from bench.cases import cases, representative
from bench.estimate import Counted
from fastlayers.reporting.gpus import GPUS, Work

PRODUCT = """
        /*0010*/                   MOV R1, R2 ;
        /*0020*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/                   FADD R1, R1, R1 ;
        /*0050*/               @P0 BRA 0x20 ;
        /*0060*/                   EXIT ;
"""


def test_a_pass_of_the_main_loop_is_counted() -> None:
    """Four warps make an HGMMA together."""
    counted = estimate.counted(assembly.sass(PRODUCT))
    assert counted == Counted(True, 4, 1, 1, 0, {"16": 2 * 64 * 256 * 16 // 4})
    assert counted.flops == 2 * 64 * 256 * 16 // 4


@pytest.mark.parametrize(
    ("name", "arithmetic", "flops"),
    [
        ("HMMA.16816.F32.BF16", "16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", "tf32", 2 * 16 * 8 * 8),
        ("DMMA.16x8x16", "64", 2 * 16 * 8 * 16),
        ("DMMA.884", "64", 2 * 8 * 8 * 4),
        ("HGMMA.64x128x8.F32.TF32", "tf32", 2 * 64 * 128 * 8 // 4),
    ],
)
def test_flops_are_read_from_the_names_of_matrix_instructions(name: str, arithmetic: str, flops: int) -> None:
    counted = estimate.counted(assembly.sass(f"/*0010*/ {name} R0, R1, R2, R0 ; /*0020*/ EXIT ;"))
    assert counted is not None
    assert counted.tensor == {arithmetic: flops}


def test_an_instruction_that_does_not_say_its_shape_gives_no_estimate() -> None:
    assert estimate.counted(assembly.sass("/*0010*/ UTCHMMA gdesc[UR14], gdesc[UR16] ; /*0020*/ EXIT ;")) is None


def test_tensor_cores_wait_for_the_slowest_of_the_other_units() -> None:
    """8 warps that issue 90 instructions each beside 128x256x64 of products: 1024 clocks of tensor cores and 180 of the rest."""
    flops = 2 * 128 * 256 * 64 // 8
    counted = Counted(True, 90, 0, 0, 0, {"16": flops})
    assert estimate.teraflops(counted, GPUS["H100"]) == pytest.approx(989.4 * 1024 / (1024 + 180))
    special = counted._replace(special=66)  # 66 * 8 warps * 32 lanes / 16
    assert estimate.teraflops(special, GPUS["H100"]) == pytest.approx(989.4 * 1024 / (1024 + 1056))
    work = Work(10**12, 10**6)
    found = estimate.estimate(counted, GPUS["H100"], work, warps=1)
    assert found is not None
    assert found.unit == "arithmetic"
    assert found.milliseconds == pytest.approx(1e12 / estimate.teraflops(counted, GPUS["H100"]) / 1e9)
    several = estimate.estimate(counted, GPUS["H100"], work, warps=1, products=3)
    assert several is not None
    assert several.milliseconds == pytest.approx(3 * found.milliseconds)


def test_float32_has_half_the_lanes_on_an_a100() -> None:
    counted = Counted(True, 1152, 0, 1024, 1024, {})
    assert estimate.teraflops(counted, GPUS["A100"]) == pytest.approx(19.5, rel=1e-3)
    # 128 lanes are as many as 4 instructions a clock, so that every other instruction costs. The clock is that of the tensor
    # cores' peak, 1.83 GHz.
    assert estimate.teraflops(counted, GPUS["H100"]) == pytest.approx(2 * 128 * 132 * 1.83e-3 * 1024 / 1152, rel=1e-3)


def test_a_kernel_without_a_loop_runs_once_for_each_warp() -> None:
    counted = Counted(False, 400, 0, 100, 0, {})
    moved = Work(0, 10**9)
    few = estimate.estimate(counted, GPUS["H100"], moved, warps=1000)
    assert few == estimate.Estimate(pytest.approx(1e12 / 3.35e12), "memory")
    many = estimate.estimate(counted, GPUS["H100"], moved, warps=10**8)
    assert many is not None
    assert many.unit == "arithmetic"
    assert many.milliseconds == pytest.approx(1e3 * 1e8 * 100 / 132 / 1.83e9, rel=1e-3)


def test_nothing_is_estimated_of_a_loop_whose_passes_nothing_tells() -> None:
    assert estimate.estimate(Counted(True, 100, 0, 10, 0, {}), GPUS["H100"], Work(0, 10**9), warps=1000) is None
    assert estimate.estimate(Counted(True, 100, 0, 10, 0, {}), GPUS["H100"], Work(10**9, 10**9), warps=1000) is None


def test_every_published_kernel_has_its_row() -> None:
    for target in ("sm_80", "sm_90"):
        by_label = {case.label: case for case in cases(target)}
        assert estimate.published_rows(target) <= by_label.keys()
        assert all(representative(by_label[row], target) for row in estimate.published_rows(target))
    assert len(estimate.comparison()) == len(estimate.PUBLISHED)


def test_published_kernels_took_longer_than_estimated_and_not_twice_as_long() -> None:
    factors = estimate.factors()
    assert factors is not None
    assert 1 < factors[0] < factors[1] < 2


def test_the_comparison_is_documented() -> None:
    assert estimate.table() in (Path(__file__).parent.parent / "docs" / "measured.md").read_text()


def test_the_audit_prints_a_range_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "factors", lambda: (1.1, 1.6))
    assert audit._range(estimate.Estimate(1.0, "memory")) == "1,100.0 to 1,600.0"
    row = {"kernel": "k", "target": "sm_90", "registers": 1, "spills": 0, "stack": 0, "shared": 0, "matrix": {}, "tma": 0,
           "async": {}, "loads": {}, "stores": {}, "seconds": 1, "loop": {}}  # fmt: skip
    headings = [name for name, _ in audit._HEADINGS]
    column = headings.index("estimated, not measured")
    assert audit._cells(row)[column] == "-"
    row["estimated ms"] = {"H100": estimate.Estimate(1.0, "memory")}
    assert audit._cells(row)[column] == "1,100.0 to 1,600.0 us H100, memory"
