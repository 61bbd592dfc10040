"""What has been run in the machine: coverage.json, which may only grow.

The file has a line for each run: the kernels that it launched, or the reason why it can't be made. With FASTLAYERS_COVERAGE in
the environment what passes is written into it: "missing" makes the runs that have no line yet and no others, "update" all that
are asked for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

FILE = Path(__file__).parent / "coverage.json"
KERNELS = Path(__file__).parent.parent.parent / "kernels"
MODE = os.environ.get("FASTLAYERS_COVERAGE", "")
TARGETS = ("sm_90", "sm_80")
_STRICT = ("tf32x3", "bf16x6")
"""Strict float32 as several products of tensor cores, which products through descriptors alone have."""

NEVER: dict[str, str] = {}
"""Kernels that no run launches, and why."""

Launched = dict[str, "list[str] | str"]

_EMPTY = {
    "a": "float16 has the code of bfloat16 with other names in it",
    "b": "the kernel computes no products, so that its float32 is the same",
    "c": "only products through descriptors compute float32 as several products",
    "d": "descriptors (tensor maps) are sm_90's, and used in 16 bits and TF32",
    "e": "only operands in TF32 are transposed",
}
"""Why a kernel has no runs in an arithmetic on a target."""


def _why_empty(kernel: str, target: str, arithmetic: str) -> str:
    if kernel == "_transpose_kernel" and arithmetic != "tf32":
        return "e"
    if arithmetic == "strict":
        return "c"
    of_descriptors = re.search("_tma_|_box_|_specialized_|^_pack_|^_transpose_", kernel)
    if of_descriptors and (target == "sm_80" or arithmetic in ("f32", "f64")):
        return "d"
    reason = {"f16": "a", "tf32": "b"}.get(arithmetic)
    assert reason, f"{kernel} has no runs in {arithmetic} on {target}, and nothing says why"
    return reason


def known() -> Launched:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def add(found: Launched) -> None:
    """Write the lines of these runs."""
    rows = [f"{json.dumps(label)}: {json.dumps(what)}" for label, what in sorted((known() | found).items())]
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def kernels() -> set[str]:
    """The names of all kernels, as they stand in the sources."""
    sources = (path.read_text() for path in KERNELS.rglob("*.py"))
    return {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)}


def faults(labels: Iterable[str]) -> list[str]:
    """What keeps the table from being complete, given the labels of all runs."""
    lines, wanted = known(), {*labels}
    launched = {kernel for what in lines.values() if isinstance(what, list) for kernel in what}
    every = kernels()
    return [
        *(f"was run once, and no longer is: {label}" for label in sorted(lines.keys() - wanted)),
        *(f"was never run: {label}" for label in sorted(wanted - lines.keys())),
        *(f"no run launches {kernel}" for kernel in sorted(every - launched - NEVER.keys())),
        *(f"is launched after all: {kernel}" for kernel in sorted(launched & NEVER.keys())),
    ]


def table() -> str:
    """As README.md shows it: of each kernel, how many runs there are in each arithmetic on each target, or why there are none."""
    counts: dict[str, dict[str, int]] = {}
    for label, launched in known().items():
        _, arithmetic, target = label.rsplit(", ", 2)
        for kernel in launched if isinstance(launched, list) else ():
            cell = f"{target} {'strict' if arithmetic in _STRICT else arithmetic}"
            counts.setdefault(kernel, {})[cell] = counts.setdefault(kernel, {}).get(cell, 0) + 1
    columns = [(target, arithmetic) for target in TARGETS for arithmetic in ("bf16", "f16", "tf32", "f32", "f64")]
    columns.insert(5, ("sm_90", "strict"))
    lines = ["| Kernel | " + " | ".join(map(" ".join, columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    for kernel, found in sorted(counts.items()):
        cells = (str(found.get(" ".join(column)) or _why_empty(kernel, *column)) for column in columns)
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    lines += ["", "No runs, because: " + "; ".join(f"({letter}) {reason}" for letter, reason in _EMPTY.items()) + "."]
    return "\n".join(lines)
