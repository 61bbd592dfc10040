"""What is timed, and in which order: the speeds of the catalog's rows and whole networks, in every pass and dtype."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastlayers.catalog import ROWS, Case, Floats, Row

from .networks import INFERENCE, TRAINING

if TYPE_CHECKING:
    from fastlayers.reporting.gpus import Work

Pass = Literal["forward", "backward", "both", "step"]

NETWORKS = ("training", "inference")
"""The families of whole networks. Every other family is a row of the catalog, by its name."""

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
    case: Case
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
    def shape(self) -> tuple[int, ...]:
        """The first input's."""
        return self.case.inputs[0].shape

    @property
    def images(self) -> bool:
        """Whether channels_last means anything to it."""
        return any(isinstance(given, Floats) and len(given.shape) == 4 for given in self.case.inputs)

    @property
    def is_network(self) -> bool:
        return self.family in NETWORKS

    @functools.cached_property
    def work(self) -> Work:
        """FLOPs and the fewest bytes. Of a network, FLOPs of its products alone and no bytes: 1, to divide by."""
        if self.is_network:
            return self._work_of_network()
        # Not at the top: a base commit's process, which may be older, asks for no work.
        from fastlayers.reporting.gpus import Work

        from .cost import cost

        found = cost(self.case, self.dtype)
        parts = found if self.direction == "both" else (getattr(found, self.direction),)
        return Work(sum(part.flops for part in parts), sum(part.bytes for part in parts))

    def _work_of_network(self) -> Work:
        from fastlayers.reporting.gpus import Work

        with torch.device("meta"):
            module = self.case.make(torch.nn)
        with FlopCounterMode(display=False) as counter:
            y = module(*self.case.arguments(torch.float32, "meta"))
            if self.direction == "step":
                y.sum().backward()
        return Work(counter.get_total_flops(), 1)


_MODE_RANK = {"bf16": 0.0, "fp32": 2.5, "tf32": 4.5, "fp16": 6.5}
_PASS_RANK = {"step": 0.0, "both": 0.0, "forward": 0.5, "backward": 4.0}


def modes(row: Row) -> list[str]:
    """The modes in which a row is timed. TF32 changes nothing for an operation that doesn't obey torch's switch for it; a
    container's layers may."""
    with precision("tf32"):
        obeys = row.operation is None or row.operation.precision(torch.float32) == "tf32"
    return [mode for mode in MODES if mode != "tf32" or obeys]


def workloads() -> list[Workload]:
    """All of them, the most telling ones first: every family's first shapes, bf16 before the rest, whole passes before
    halves. Stopped at any point, what was measured is what mattered most."""
    found = []
    passes: tuple[Pass, ...] = ("forward", "backward", "both")
    for row in ROWS:
        chosen = modes(row)
        for i, (name, case) in enumerate(row.speeds.items()):
            for mode in chosen:
                for direction in passes:
                    rank = i + _MODE_RANK[mode] + _PASS_RANK[direction]
                    found.append(Workload(row.name, name, case, mode, direction, rank))
    whole: tuple[tuple[Pass, dict[str, Case]], ...] = (("step", TRAINING), ("forward", INFERENCE))
    for family, (direction, networks) in zip(NETWORKS, whole, strict=True):
        for i, (name, case) in enumerate(networks.items()):
            for mode in MODES:
                found.append(Workload(family, name, case, mode, direction, i + _MODE_RANK[mode]))
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
