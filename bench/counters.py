"""What one run of each kernel counts, as a profiler would, in the emulator of PTX; no GPU needed.

    python -m bench counters [--match softmax] [--jobs 2] [--update]
    python -m bench counters --worst 20 [--match softmax]

Of each kernel of a run (tests/ptx_machine/counting.py says which there are):

- sector use: of the bytes in the sectors of global memory that loads, stores and cp.async ask for, the part that is used; more
  than 1 where lanes ask for the same bytes;
- wavefronts: of shared memory, as a multiple of what they were without conflicts between banks; ways: the same of the worst
  access alone;
- instructions per mma: instructions of a warp for each instruction of a tensor core;
- barriers and instructions: of a warp.

Exit status 1 where a row is worse than its committed one in bench/counters.json by more than a twentieth, or a run fails.
`--update` rewrites the rows that were run. `--worst` runs nothing: it prints committed rows. The counts depend on the kernels
and on the version of Triton alone: addresses are what is counted, not time. What tensor maps and wgmma do to shared memory
isn't counted.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton

Row = dict[str, Any]
Rows = dict[str, Row]

ROOT = Path(__file__).parent.parent
FILE = Path(__file__).parent / "counters.json"
_COUNTING = ROOT / "tests" / "ptx_machine" / "counting.py"
_HEADINGS = ("sector use", "wavefronts", "ways", "instructions per mma", "barriers", "instructions")
_MORE_IS_BETTER = ("sector use",)


def count(match: str, share: str = "0/1") -> Rows:
    """Run what matches a regular expression, or a share of it; rows by label, with "error" in one whose run failed.

    Raises:
        RuntimeError: the process ended otherwise than by a run that failed.
    """
    command = [sys.executable, str(_COUNTING), match, share]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode and not any("error" in row for row in rows):
        raise RuntimeError(done.stderr[-4000:])
    return {row.pop("label"): row for row in rows}


def compare(row: Row, base: Row) -> list[str]:
    """What is worse about a row than about the committed one, by more than a twentieth."""
    found = []
    for name in _HEADINGS:
        now, then = row.get(name), base.get(name)
        if now is None or then is None:
            worse = name == "instructions per mma" and then is not None  # no product by tensor cores any more
        else:
            worse = now < then / 1.05 - 0.005 if name in _MORE_IS_BETTER else now > 1.05 * then + 0.005
        if worse:
            found.append(f"{name} {now}, was {then}")
    return found


def read(path: Path = FILE) -> tuple[str | None, Rows]:
    """The version of Triton that the committed rows were compiled with, and the rows by label."""
    if not path.exists():
        return None, {}
    found = json.loads(path.read_text())
    return found["triton"], found["rows"]


def write(rows: Rows, path: Path = FILE) -> None:
    """One row a line, sorted."""
    lines = ",\n".join(f"{json.dumps(label)}: {json.dumps(row)}" for label, row in sorted(rows.items()))
    path.write_text(f'{{"triton": "{triton.__version__}", "rows": {{\n{lines}\n}}}}\n')


def table(rows: Iterable[tuple[str, Row]]) -> str:
    rows = [*rows]
    width = max((len(label) for label, _ in rows), default=0)
    lines = ["  ".join(["".ljust(width), *_HEADINGS])]
    for label, row in rows:
        cells = [str(row.get(name, "-")).rjust(len(name)) for name in _HEADINGS]
        lines.append("  ".join([label.ljust(width), *cells]))
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench counters", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--match", default="", help="only runs whose label matches this regular expression")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--worst", type=int, metavar="N", help="print the N committed rows with the most conflicts")
    parser.add_argument("--update", action="store_true", help="make these rows the committed ones")
    options = parser.parse_args(argv)
    version, committed = read()
    if options.worst is not None:
        if options.update:
            parser.error("--worst runs nothing that --update could write")
        matching = [row for row in committed.items() if re.search(options.match, row[0])]
        print(table(sorted(matching, key=lambda row: -row[1].get("wavefronts", 0))[: options.worst]))
        return 0 if matching else 1
    comparable = version == triton.__version__
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        shares = [f"{i}/{options.jobs}" for i in range(options.jobs)]
        found = {k: v for rows in pool.map(count, [options.match] * options.jobs, shares) for k, v in rows.items()}
    rows = {label: row for label, row in sorted(found.items()) if "error" not in row}
    errors = [f"{label}: {row['error']}" for label, row in found.items() if "error" in row]
    if not found:
        parser.error(f"no run's label matches {options.match!r}")
    print(table(rows.items()))
    if options.update:
        # Of a run that was made, the rows of kernels that it no longer launches go.
        whole = not (comparable and options.match)
        kept = {k: v for k, v in committed.items() if not (whole or re.search(options.match, run_of(k)))}
        write(kept | rows)
        print(f"wrote {FILE.name}: {len(kept | rows)} rows")
    elif not comparable:
        print(f"not compared: the committed rows were compiled by Triton {version}, this is {triton.__version__}")
    else:
        for label, row in rows.items():
            errors += [f"{label}: {what}" for what in compare(row, committed.get(label, {}))]
        new = len(rows.keys() - committed.keys())
        print(f"{new} rows not in {FILE.name}")
    for error in errors:
        print(f"ERROR {error}")
    return 1 if errors or not rows else 0


def run_of(label: str) -> str:
    """The run that a row belongs to: its label without the kernel."""
    return label.rsplit(", ", 1)[0]
