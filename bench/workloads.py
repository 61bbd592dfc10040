"""What is timed, and in which order: the Specs' bench shapes and whole networks, in every pass and dtype."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastlayers.testing import SPECS
from fastlayers.testing.specs import Make

from .gpus import Work
from .networks import INFERENCE, TRAINING

Pass = Literal["forward", "backward", "both", "step"]

MODES = {
    "bf16": (torch.bfloat16, "16"),
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp16": (torch.float16, "16"),
}
"""dtype and kind of arithmetic: float32 comes with TF32 off and on."""


@dataclass(frozen=True)
class Workload:
    """One layer or network on one shape, in one mode and pass. `step`: forward, loss, backward and an SGD update."""

    family: str
    shape_name: str
    make: Make
    shape: tuple[int, ...]
    mode: str
    direction: Pass
    rank: float
    """The lower, the sooner."""

    @property
    def key(self) -> str:
        return f"{self.family} | {self.shape_name} | {self.mode} | {self.direction}"

    @property
    def dtype(self) -> torch.dtype:
        return MODES[self.mode][0]

    @property
    def arithmetic(self) -> str:
        return MODES[self.mode][1]

    @property
    def images(self) -> bool:
        """Whether channels_last means anything to it."""
        return len(self.shape) == 4

    @property
    def is_network(self) -> bool:
        return self.family in ("training", "inference")

    @functools.cached_property
    def work(self) -> Work:
        """FLOPs and the fewest bytes. Of a network, FLOPs of its products alone and no bytes: 1, to divide by."""
        with torch.device("meta"):
            module = self.make(torch.nn)
            x = torch.empty(self.shape)
        if self.is_network:
            with FlopCounterMode(display=False) as counter:
                y = module(x)
                if self.direction == "step":
                    y.sum().backward()
            return Work(counter.get_total_flops(), 1)
        spec = next(spec for spec in SPECS if spec.name == self.family)
        parts = ("forward", "backward") if self.direction == "both" else (self.direction,)
        flops = sum(spec.flops(module, x, part) for part in parts)  # type: ignore[arg-type]
        elements = sum(spec.elements(module, x, part) for part in parts)  # type: ignore[arg-type]
        return Work(flops, elements * self.dtype.itemsize)


_MODE_RANK = {"bf16": 0.0, "fp32": 2.5, "tf32": 4.5, "fp16": 6.5}
_PASS_RANK = {"step": 0.0, "both": 0.0, "forward": 0.5, "backward": 4.0}


def workloads() -> list[Workload]:
    """All of them, the most telling ones first: every family's first shapes, bf16 before the rest, whole passes before
    halves. Stopped at any point, what was measured is what mattered most."""
    found = []
    for spec in SPECS:
        # Without a product, TF32 changes nothing.
        modes = [mode for mode in MODES if mode != "tf32" or spec.name not in ("ReLU", "Softmax")]
        for i, (name, variant) in enumerate(spec.bench_shapes.items()):
            for mode in modes:
                for direction in ("forward", "backward", "both"):
                    rank = i + _MODE_RANK[mode] + _PASS_RANK[direction]
                    found.append(Workload(spec.name, name, variant.make, variant.shape, mode, direction, rank))
    whole: list[tuple[str, Pass, Any]] = [("training", "step", TRAINING), ("inference", "forward", INFERENCE)]
    for family, direction, networks in whole:
        for i, (name, (make, shape)) in enumerate(networks.items()):
            for mode in MODES:
                found.append(Workload(family, name, make, shape, mode, direction, i + _MODE_RANK[mode]))
    return sorted(found, key=lambda workload: workload.rank)


@contextlib.contextmanager
def precision(mode: str) -> Iterator[None]:
    """torch's switches for float32. The older ones, which set along the newer ones, which the kernels read; set the other
    way around, torch.compile finds them at odds and refuses to work. What was there before is read and restored through
    the newer ones, which can always be read."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    before = matmul.fp32_precision, cudnn.conv.fp32_precision
    matmul.allow_tf32 = cudnn.allow_tf32 = mode == "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision, cudnn.conv.fp32_precision = before
