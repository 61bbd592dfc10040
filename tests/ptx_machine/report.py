"""What one launch did: instructions, memory accesses, races, and what else was noticed."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass, field

from .parser import Block, Instruction

_SPECIAL = ("ex2", "rcp", "lg2", "sqrt", "rsqrt", "div", "tanh", "sin", "cos")
_FLOATS = ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")


def kind(x: Instruction) -> str:
    """What sort of instruction it is, for counting."""
    op, parts = x.parts[0], x.parts
    if op in ("mma", "wgmma"):
        return "mma" if op == "mma" or parts[1] == "mma_async" else "wgmma sync"
    if op in ("ld", "st"):
        return f"{op}.{'shared' if any(s.startswith('shared') for s in parts) else parts[1]}"
    if op == "cp":
        return "tma" if "tensor" in parts else "cp.async"
    if op in ("bar", "barrier"):
        return "barrier"
    if op in ("ldmatrix", "stmatrix", "shfl", "bra", "selp", "setp", "cvt", "mbarrier", "elect", "mov"):
        return op
    return ("special" if op in _SPECIAL else "float") if parts[-1] in _FLOATS else "int"


@dataclass
class Report:
    kernel: str
    grid: int
    threads: int
    target: str
    shared: int
    """Bytes of shared memory."""
    races: list[str] = field(default_factory=list)
    notes: collections.Counter[str] = field(default_factory=collections.Counter)
    """What is no fault, but worth a look."""
    instructions: collections.Counter[str] = field(default_factory=collections.Counter)
    """By kind, as warps execute them."""
    flops: int = 0
    """Of tensor cores."""
    tma_bytes: int = 0
    sectors: float = 0.0
    """Sectors of 32 bytes of global memory that warps ask for, and the bytes of these that they use."""
    useful: float = 0.0
    wavefronts: float = 0.0
    """Of accesses to shared memory, and what they were without conflicts."""
    ideal: float = 0.0
    ways: float = 1.0
    """Of the access to shared memory that conflicts worst: its wavefronts over what they were without."""
    seconds: float = 0.0

    def count(self, blocks: Iterable[Block]) -> None:
        """Sum up what was counted at each instruction; of memory accesses the first few were looked at."""
        for block in blocks:
            for x in block.code:
                self.instructions[kind(x)] += block.runs
                if not x.samples:
                    continue
                scale = max(1.0, block.runs / x.samples)
                if x.useful:
                    self.sectors += x.ideal * scale
                    self.useful += x.useful * scale
                else:
                    self.wavefronts += (x.ideal + x.extra) * scale
                    self.ideal += x.ideal * scale
                    self.ways = max(self.ways, round((x.ideal + x.extra) / x.ideal, 1))
