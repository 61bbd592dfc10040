"""Compile every kernel at every shipped tile for every target, without a GPU, and read what came out.

    python -m bench.audit [--arch sm_90 ...] [--match softmax] [--jobs 2] [--json FILE]

The launchers themselves run, on meta tensors, with a driver that compiles instead of launching: so the specialisation
(alignment, sizes equal to 1, 64-bit offsets) is that of a real launch, and no argument list is written twice. Exit status
1 for what the interpreter accepts and the compiler rejects, for a spill, for a tile that does not fit into shared memory,
and on NVIDIA for an access narrower than 128 bits in a kernel that memory decides. Never in a process with
TRITON_INTERPRET=1.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastlayers.kernels import _launch, _tiles

from .cases import Case, cases

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes one program may use. Source: CUDA programming guide, table of compute capabilities; AMD CDNA3 ISA (64 KB LDS)."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _OfflineDriver:
    """Everything that compiling needs to know of a GPU that isn't there."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> Any:
        return self.target.arch  # keeps the targets apart in the JIT's cache

    def get_current_stream(self, device: Any = None) -> int:
        return 0


@contextlib.contextmanager
def _compiling(target: str, case: Case, compiled: list[Any]) -> Iterator[None]:
    """Within, launching the case's kernel compiles it for `target`, and launching any other does nothing."""

    def launch(launched: Any, programs: int, *args: Any, **meta: Any) -> None:
        if launched.__name__ == case.kernel and not compiled:
            compiled.append(launched.warmup(*args, grid=(1,), **meta))

    before = _launch.launch, _launch.wide, _tiles.device
    driver.set_active(_OfflineDriver(TARGETS[target]))  # type: ignore[arg-type]
    _launch.launch, _tiles.device = launch, lambda device: _tiles.Device(target, 132)
    if case.wide:
        _launch.wide = lambda *tensors: True
    try:
        yield
    finally:
        _launch.launch, _launch.wide, _tiles.device = before


def _run(tool: str, *args: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *args], capture_output=True, text=True, check=True).stdout


def _read(target: str, compiled: Any) -> dict[str, int]:
    """Registers, spills, shared memory and the instructions that decide about speed."""

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else -1

    if target.startswith("sm_"):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = _run("cuobjdump", "--dump-resource-usage", file.name)
            sass = _run("cuobjdump", "-sass", file.name)

        def count(pattern: str) -> int:
            return len(re.findall(pattern, sass))

        return {
            "registers": number(r"REG:(\d+)", usage),
            "spills": count(r"\b(?:STL|LDL)\b"),
            "matrix": count(r"\b(?:HGMMA|HMMA|UTCHMMA|UTC\w*MMA|DMMA)\b"),
            "async copies": count(r"\bLDGSTS\b"),
            "loads": count(r"\bLDG\b"),
            "128-bit loads": count(r"\bLDG\.E\.(?:\w+\.)*128\b"),
            "stores": count(r"\bSTG\b"),
            "128-bit stores": count(r"\bSTG\.E\.(?:\w+\.)*128\b"),
        }
    assembly = compiled.asm["amdgcn"]
    return {
        "registers": number(r"\.vgpr_count:\s+(\d+)", assembly),
        "spills": number(r"\.vgpr_spill_count:\s+(\d+)", assembly),
        "matrix": len(re.findall(r"v_mfma", assembly)),
        "async copies": 0,
        "loads": len(re.findall(r"(?:global|buffer)_load", assembly)),
        "128-bit loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)),
        "stores": len(re.findall(r"(?:global|buffer)_store", assembly)),
        "128-bit stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", assembly)),
    }


def audit(index: int, target: str) -> dict[str, Any]:
    """Compile case number `index` for `target`. A row of the report; "error" says what is wrong, if anything is."""
    case = cases(target)[index]
    row: dict[str, Any] = {"kernel": case.label, "target": target}
    compiled: list[Any] = []
    begin = time.perf_counter()
    try:
        with _tiles.force(**case.force), _compiling(target, case, compiled):
            case.call()
        row["seconds"] = round(time.perf_counter() - begin, 2)
        shared = compiled[0].metadata.shared
        row |= _read(target, compiled[0]) | {"shared": shared}
        if shared > SHARED_MEMORY[target]:
            row["error"] = f"needs {shared} bytes of shared memory, {target} has {SHARED_MEMORY[target]}"
        elif row["spills"] > 0:
            row["error"] = f"{row['spills']} spills"
        elif (
            case.streams
            and target.startswith("sm_")
            and (row["loads"] > row["128-bit loads"] or row["stores"] > row["128-bit stores"])
        ):
            row["error"] = f"narrow loads or stores: {row}"
    except Exception as error:
        row["error"] = f"does not compile: {type(error).__name__}: {error}"[:500]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.audit", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--match", default="", help="only kernels whose name matches this regular expression")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    if _launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter's kernels can't be compiled")
    work = [
        (i, arch) for arch in options.arch for i, case in enumerate(cases(arch)) if re.search(options.match, case.label)
    ]
    columns = ("registers", "spills", "shared", "matrix", "async copies", "loads", "128-bit loads", "stores", "seconds")
    print(f"{'kernel':64} {'target':7} " + " ".join(columns))
    rows = []
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for row in pool.map(audit, *zip(*work, strict=True), chunksize=4) if work else ():
            rows.append(row)
            if "registers" in row:
                cells = (str(row[column]).rjust(len(column)) for column in columns)
                print(f"{row['kernel']:64} {row['target']:7} " + " ".join(cells), flush=True)
            if "error" in row:
                print(f"    ERROR {row['kernel']} {row['target']}: {row['error']}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    errors = sum("error" in row for row in rows)
    print(f"{len(rows) - errors} passed, {errors} failed")
    return 1 if errors or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
