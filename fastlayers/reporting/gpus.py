"""Peak rates of the GPUs that the kernels are compiled for, and the least time that work can take on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class GPU:
    """Peaks as the vendor gives them, without sparsity: TFLOP/s by kind of arithmetic (as in kernels/matmul/tiles.py: "16",
    "tf32", "ieee", "64"; the faster of vector and matrix units where both can), and TB/s of device memory."""

    target: str
    multiprocessors: int
    teraflops: dict[str, float]
    terabytes: float
    source: str


GPUS = {
    "A100": GPU(
        "sm_80",
        108,
        {"16": 312.0, "tf32": 156.0, "ieee": 19.5, "64": 19.5},
        2.039,
        "NVIDIA A100 Tensor Core GPU datasheet, 80 GB SXM",
    ),
    "RTX A6000": GPU(
        "sm_86",
        84,
        {"16": 154.8, "tf32": 77.4, "ieee": 38.7, "64": 0.6},
        0.768,
        "NVIDIA RTX A6000 datasheet and GA102 whitepaper; float64 is a 64th of float32",
    ),
    "L40S": GPU(
        "sm_89",
        142,
        {"16": 362.0, "tf32": 183.0, "ieee": 91.6, "64": 1.4},
        0.864,
        "NVIDIA L40S datasheet; float64 is a 64th of float32",
    ),
    "H100": GPU(
        "sm_90",
        132,
        {"16": 989.4, "tf32": 494.7, "ieee": 66.9, "64": 66.9},
        3.35,
        "NVIDIA H100 Tensor Core GPU Architecture whitepaper, SXM5",
    ),
    "H200": GPU(
        "sm_90",
        132,
        {"16": 989.4, "tf32": 494.7, "ieee": 66.9, "64": 66.9},
        4.8,
        "NVIDIA H200 Tensor Core GPU datasheet, SXM; the rates are the H100's",
    ),
    "B200": GPU(
        "sm_100",
        148,
        {"16": 2250.0, "tf32": 1125.0, "ieee": 75.0, "64": 37.0},
        8.0,
        "NVIDIA HGX B200 specifications, divided by its eight GPUs",
    ),
    "MI300X": GPU(
        "gfx942",
        304,
        {"16": 1307.4, "tf32": 653.7, "ieee": 163.4, "64": 163.4},
        5.3,
        "AMD Instinct MI300X accelerator data sheet",
    ),
}


class Work(NamedTuple):
    """Floating-point operations, and bytes that must be moved, each once."""

    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes


def least_milliseconds(work: Work, arithmetic: str, gpu: GPU) -> float:
    """The roofline: no program is faster, whichever of arithmetic and memory is the slower one."""
    return 1e3 * max(work.flops / (gpu.teraflops[arithmetic] * 1e12), work.bytes / (gpu.terabytes * 1e12))


def by_device_name(name: str) -> str | None:
    """The name here of what CUDA or HIP calls "NVIDIA H200" or "AMD Instinct MI300X"; None for an unknown GPU, and for
    variants (PCIe, NVL, 40 GB) whose peaks are others."""
    for known in GPUS:
        if known in name and not any(variant in name for variant in ("PCIE", "PCIe", "NVL", "40GB")):
            return known
    return None
