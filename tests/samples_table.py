"""python tests/samples_table.py FILE [AUDIT]: a table of what tests/test_every_sample.py wrote to FILE, and of audited code.

    FASTLAYERS_SAMPLES_FILE=FILE python -m pytest tests/test_every_sample.py
    python -m bench audit --json AUDIT

Of each layer: the samples of torch's databases that passed, by dtype; its largest error in percent of the budget; the bytes that
autograd kept in all of them beside arguments and parameters, ours and torch's; of the kernels named after it on sm_90 the most
registers, the longest main loop in instructions, and the narrowest access to memory in bits, from bench/baseline.json; with
AUDIT, what would limit them on an H200 by the estimate of bench/estimate.py; why samples were torch's or not compared.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fastlayers.catalog import ROWS  # noqa: E402

HEADINGS = (
    "layer", "samples passed", "error, % of the budget", "bytes kept", "torch's", "registers", "loop", "bits",
    "limited on an H200 by", "torch's because",
)  # fmt: skip
FAMILIES = {
    "Linear": "matmul", "Conv2d": "conv", "LayerNorm": "layer norm", "RMSNorm": "rms norm", "Softmax": "softmax",
    "LogSoftmax": "log softmax", "CrossEntropyLoss": "cross entropy", "ReLU": "relu", "GELU": "gelu",
}  # fmt: skip
"""What the audit calls kernels that aren't named after the layer."""


def code(name: str, rows: Iterable[dict[str, Any]]) -> tuple[str, str, str, str]:
    """Registers, instructions of the main loop, and bits, at their worst; and of how many kernels what is the limit."""
    called = (f"{name} ", f"{FAMILIES.get(name, name)} ")
    found = [row for row in rows if row["target"] == "sm_90" and row["kernel"].startswith(called)]
    if not found:
        return "-", "-", "-", "-"
    widths = [int(bits) for row in found for kind in ("loads", "stores") for bits in row[kind] if row[kind]]
    loops = [sum(row["loop"].values()) for row in found]
    limits = Counter(row["estimated ms"]["H200"][1] for row in found if "H200" in row.get("estimated ms", ()))
    return (
        str(max(row["registers"] for row in found)),
        str(max(loops) or "-"),
        str(min(widths, default=0) or "-"),
        ", ".join(f"{unit} ({count})" for unit, count in sorted(limits.items())) or "-",
    )


def table(lines: Iterable[dict[str, Any]], audited: Iterable[dict[str, Any]]) -> str:
    """In Markdown, a row for each layer of the catalog."""
    by_row, audited = defaultdict(list), list(audited)
    for line in lines:
        by_row[line["row"]].append(line)
    written = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    for row in ROWS:
        found = by_row[row.name]
        passed: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for line in found:
            passed[line["dtype"]] += line["passed"]
            reasons.update(line["reasons"])
        samples = ", ".join(f"{count} {dtype}" for dtype, count in sorted(passed.items()))
        none = "none: its numbers are random" if row.random else "none"
        kept = [str(sum(line[key] for line in found)) if found else "-" for key in ("ours", "theirs")]
        share = str(max(line["share"] for line in found)) if found else "-"
        why = "; ".join(f"{reason} ({count})" for reason, count in reasons.items())
        written.append(
            "| " + " | ".join((row.name, samples or none, share, *kept, *code(row.name, audited), why)) + " |"
        )
    return "\n".join(written)


if __name__ == "__main__":
    every = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    if len(sys.argv) > 2:
        rows = [row for row in json.loads(Path(sys.argv[2]).read_text()) if "registers" in row]
    else:
        rows = json.loads((ROOT / "bench" / "baseline.json").read_text())["rows"]
    print(table(every, rows))
