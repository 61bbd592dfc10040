"""Compile every kernel at every shipped tile for every target, without a GPU, and read what came out.

    python -m bench audit [--arch sm_90 ...] [--match softmax] [--full] [--jobs 2] [--json FILE] [--update]

The launchers themselves run, on meta tensors, with a driver that compiles instead of launching: so the specialisation
(alignment, sizes equal to 1, 64-bit offsets) is that of a real launch, and no argument list is written twice.

Exit status 1 for what the interpreter accepts and the compiler rejects, for a spill (with another Triton than the one that
compiled the committed rows: for more than 32), for a tile that does not fit into shared memory, on NVIDIA for an access
narrower than 128 bits in a kernel that memory decides, and for a row that is worse than the committed one in
bench/baseline.json: a new spill, lost matrix instructions or asynchronous copies, narrower accesses, a main loop longer by more
than a tenth. `--update` rewrites that file.

Without `--full`, a representative part (`cases.representative`), which CI can afford. Never in a process with
TRITON_INTERPRET=1. What comes out depends on the kernels and on the version of Triton alone, which brings its compiler
along; it is compiled into an empty cache, so that the seconds are those of a first call.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastlayers.kernels.runtime import launch as _launch
from fastlayers.kernels.runtime import tiles as _tiles
from fastlayers.reporting import gpus

from . import assembly, estimate
from .cases import TARGETS, Case, cases, representative

Row = dict[str, Any]

BASELINE = Path(__file__).parent / "baseline.json"
SHARED_MEMORY = {
    "sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536,
}  # fmt: skip
"""Bytes one program may use. Source: CUDA programming guide, table of compute capabilities; AMD CDNA3 ISA (64 KB LDS)."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _OfflineDriver:
    """Everything that compiling needs to know of a GPU that isn't there."""

    def __init__(self, target: str):
        is_cuda = target.startswith("sm_")
        self.target = GPUTarget("cuda", int(target[3:]), 32) if is_cuda else GPUTarget("hip", target, 64)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> Any:
        return self.target.arch  # keeps the targets apart in the JIT's cache

    def get_current_stream(self, device: Any = None) -> int:
        return 0


@contextlib.contextmanager
def _compiling(target: str, case: Case, compiled: list[Any]) -> Iterator[None]:
    """Within, launching the case's kernel compiles it for `target`, and launching any other does nothing. `compiled` becomes
    what was compiled and the number of its programs."""
    to_skip = case.before

    def launch(launched: Any, programs: int, *args: Any, **meta: Any) -> None:
        nonlocal to_skip
        if launched.__name__ != case.kernel or compiled:
            return
        if to_skip:
            to_skip -= 1
            return
        if case.wide:
            meta["WIDE"] = True  # some launchers ask for sizes that no case has
        compiled[:] = launched.warmup(*args, grid=(1,), **meta), programs

    before = _launch.launch, _launch.wide, _tiles.device
    driver.set_active(_OfflineDriver(target))  # type: ignore[arg-type]
    _launch.launch, _tiles.device = launch, lambda device: _tiles.Device(target, 132)
    if case.wide:
        _launch.wide = lambda *tensors, elements=0: True
    try:
        yield
    finally:
        _launch.launch, _launch.wide, _tiles.device = before


def _run(tool: str, *args: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *args], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else -1


def _read(target: str, compiled: Any) -> Row:
    """Registers, spills, shared memory and the instructions that decide about speed."""
    if target.startswith("sm_"):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = _run("cuobjdump", "--dump-resource-usage", file.name)
            # Half the time of cuobjdump -sass, and most of it without analysing the flow of data.
            code = assembly.sass(_run("nvdisasm", "-c", "-ndf", file.name))
        kinds = [assembly.kind(instruction.name) for instruction in code]
        resources = {
            "registers": _number(r"REG:(\d+)", usage),
            "spills": kinds.count("local"),
            "stack": _number(r"STACK:(\d+)", usage),
        }
    else:
        text = compiled.asm["amdgcn"]
        code = assembly.amdgcn(text)
        kinds = [assembly.kind(instruction.name) for instruction in code]
        resources = {
            "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
            "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", text),
            "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        }
    return resources | {
        "threads": compiled.metadata.num_warps * compiled.metadata.warp_size,
        "shared": compiled.metadata.shared,
        "matrix": assembly.matrix(code),
        "tma": kinds.count("tma"),
        "async": assembly.widths(code, "async copy"),
        "loads": assembly.widths(code, "global load"),
        "stores": assembly.widths(code, "global store"),
        "loop": assembly.main_loop(code),
        "pass": found._asdict() if (found := estimate.counted(code)) and target.startswith("sm_") else None,
    }


def audit(index: int, target: str) -> Row:
    """Compile case number `index` for `target`. A row of the report; "error" says what is wrong, if anything is."""
    case = cases(target)[index]
    row: Row = {"kernel": case.label, "target": target}
    compiled: list[Any] = []
    begin = time.perf_counter()
    try:
        with _tiles.force(**case.force), _compiling(target, case, compiled):
            case.call()
        seconds = round(time.perf_counter() - begin, 2)
        row |= _read(target, compiled[0]) | {"seconds": seconds}
        error = _wrong(case, row)
        if twice := assembly.operands_read_twice(compiled[0].asm.get("ttgir", "")):
            error = f"a product under way and threads read the same buffers: {', '.join(twice)}"
        if error is not None:
            row["error"] = error
    except Exception as error:
        row["error"] = f"does not compile: {type(error).__name__}: {error}"[:500]
    row |= {"flops": case.work.flops, "bytes": case.work.bytes, "intensity": round(case.work.intensity, 2)}
    row["least ms"] = {
        name: float(f"{gpus.least_milliseconds(case.work, case.arithmetic, gpu):.3g}")
        for name, gpu in gpus.GPUS.items()
        if gpu.target == target
    }
    if row.get("pass") and case.alone and estimate.factors():
        row["estimated ms"] = {
            name: found
            for name in estimate.ESTIMATED
            if gpus.GPUS[name].target == target and (found := _estimated(row, case, gpus.GPUS[name], compiled[1]))
        }
    return row


def _estimated(row: Row, case: Case, gpu: gpus.GPU, programs: int) -> estimate.Estimate | None:
    """Strict float32 is three products in TF32, or six in bfloat16, where a kernel computes it on tensor cores."""
    counted = estimate.Counted(**row["pass"])
    several = (
        {"tf32": 3, "16": 6} if "tf32x3" in case.label or "bf16x6" in case.label or case.arithmetic == "ieee" else {}
    )
    products = several.get(next(iter(counted.tensor), ""), 1)
    return estimate.estimate(counted, gpu, case.work, programs * row["threads"] // 32, products)


@functools.cache
def _most_spills() -> int:
    """None with the Triton that compiled the committed rows. Another one's ptxas gives registers out in its own way, and a few
    loads and stores more are no fault of the kernel."""
    return 0 if read_baseline()[0] == triton.__version__ else 32


def _wrong(case: Case, row: Row) -> str | None:
    """What no kernel may do, whatever it did before."""
    limit = SHARED_MEMORY[row["target"]]
    if row["threads"] > 1024:
        return f"has {row['threads']} threads, of which a program may have 1024"
    if row["shared"] > limit:
        return f"needs {row['shared']} bytes of shared memory, {row['target']} has {limit}"
    if row["spills"] > _most_spills():
        return f"{row['spills']} spills"
    if case.streams and row["target"].startswith("sm_") and set(row["loads"]) | set(row["stores"]) != {"128"}:
        return f"accesses narrower than 128 bits: loads {row['loads']}, stores {row['stores']}"
    return None


def compare(row: Row, base: Row) -> list[str]:
    """What is worse about a row than about the committed one."""

    def families(row: Row) -> set[str]:
        return {name.split(".")[0].removesuffix("_e64") for name in row["matrix"]}

    found = [f"{key} {row[key]}, was {base[key]}" for key in ("spills", "stack") if row[key] > base[key]]
    # AMD's names hold the shape, so only losing all of them is a loss; NVIDIA's generations have names of their own.
    lost = families(base) - families(row) if row["target"].startswith("sm_") else set()
    if lost or (base["matrix"] and not row["matrix"]):
        found.append(
            f"lost {', '.join(sorted(lost)) or 'its matrix instructions'}: {row['matrix']}, was {base['matrix']}"
        )
    if base["tma"] and not row["tma"]:
        found.append(f"lost its {base['tma']} TMA instructions")
    if base["async"] and not row["async"] and not row["tma"]:
        found.append("lost its asynchronous copies")
    for key in ("async", "loads", "stores"):
        now, then = (min(map(int, r[key]), default=1024) for r in (row, base))
        if now < then and base[key]:
            found.append(f"{key} of {now} bits, were {then}")
    now, then = sum(row["loop"].values()), sum(base["loop"].values())
    if then and now > 1.1 * then:
        more = {kind: n - base["loop"].get(kind, 0) for kind, n in row["loop"].items() if n > base["loop"].get(kind, 0)}
        found.append(f"main loop of {now} instructions, was {then}: more {more}")
    return found


_KEPT = (
    "kernel",
    "target",
    "registers",
    "spills",
    "stack",
    "shared",
    "matrix",
    "tma",
    "async",
    "loads",
    "stores",
    "loop",
    "pass",
)


def read_baseline(path: Path = BASELINE) -> tuple[str | None, dict[tuple[str, str], Row]]:
    """The version of Triton that the committed rows were compiled with, and the rows by kernel and target."""
    if not path.exists():
        return None, {}
    found = json.loads(path.read_text())
    return found["triton"], {(row["kernel"], row["target"]): row for row in found["rows"]}


def _is_read(row: Row, key: str) -> bool:
    """Whether somebody reads it: what a pass does, of kernels that are compared with published figures alone."""
    return key != "pass" or row["kernel"] in estimate.published_rows(row["target"])


def write_baseline(rows: Iterable[Row], path: Path = BASELINE) -> None:
    """One row a line, sorted, without what differs from run to run: a change shows as the lines it concerns."""
    kept = [{key: row[key] for key in _KEPT if key in row and _is_read(row, key)} for row in rows if "registers" in row]
    kept.sort(key=lambda row: (TARGETS.index(row["target"]), row["kernel"]))
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in kept)
    path.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')


def _cells(row: Row) -> list[str]:
    def widths(found: dict[str, int]) -> str:
        return " ".join(f"{count}x{bits}" for bits, count in found.items()) or "-"

    matrix = " ".join(f"{count} {name.removesuffix('.BF16')}" for name, count in row["matrix"].items()) or "-"
    loop = row["loop"]
    kinds = " ".join(f"{n} {kind}" for kind, n in sorted(loop.items(), key=lambda item: -item[1]))
    least = " ".join(f"{1000 * ms:,.1f} us {gpu}" for gpu, ms in row.get("least ms", {}).items()) or "-"
    # Where arithmetic takes longer than memory, the kernel has more instructions than memory's speed leaves time for.
    estimated = (
        "; ".join(f"{_range(found)} us {gpu}, {found.unit}" for gpu, found in row.get("estimated ms", {}).items())
        or "-"
    )
    return [
        row["kernel"], row["target"], str(row["registers"]), str(row["spills"]), str(row["stack"]), str(row["shared"]),
        matrix, str(row["tma"]), widths(row["async"]), widths(row["loads"]), widths(row["stores"]),
        str(row.get("intensity", "-")), least, estimated, str(row["seconds"]),
        f"{sum(loop.values())}: {kinds}" if loop else "none",
    ]  # fmt: skip


def _range(found: estimate.Estimate) -> str:
    """Between what the fastest and the slowest of the published kernels took, in estimates."""
    return " to ".join(f"{1000 * factor * found.milliseconds:,.1f}" for factor in estimate.factors() or ())


_HEADINGS = (
    ("kernel", 62), ("target", 7), ("regs", 4), ("spills", 6), ("stack", 5), ("shared", 6), ("matrix", 30), ("tma", 3),
    ("async", 7), ("loads", 12), ("stores", 12), ("FLOP/B", 7), ("least time", 31),
    ("estimated, not measured", 62), ("s", 5), ("main loop", 0),
)  # fmt: skip


def _print(cells: Iterable[str]) -> None:
    print("  ".join(cell.ljust(width) for cell, (_, width) in zip(cells, _HEADINGS, strict=True)).rstrip(), flush=True)


def _compile(work: list[tuple[int, str]], jobs: int | None) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="fastlayers-audit-") as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
            yield from pool.map(audit, *zip(*work, strict=True), chunksize=4)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench audit", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--match", default="", help="only kernels whose name matches this regular expression")
    parser.add_argument(
        "--full", action="store_true", help="every dtype and tile on every target: half an hour on 2 cores"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--update", action="store_true", help="make these rows the committed ones, if nothing is wrong")
    options = parser.parse_args(argv)
    if _launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter's kernels can't be compiled")

    begin = time.perf_counter()
    version, baseline = read_baseline()
    if comparable := version == triton.__version__:
        print(f"compared with {len(baseline)} committed rows", flush=True)
    elif not options.update:
        print(f"not compared: the committed rows were compiled by Triton {version}, this is {triton.__version__}")
    print("gathering every layer's launches, which takes longer than to compile a few", flush=True)
    named = [
        (i, arch) for arch in options.arch for i, case in enumerate(cases(arch)) if re.search(options.match, case.label)
    ]
    work = [(i, arch) for i, arch in named if options.full or representative(cases(arch)[i], arch)]
    if not work:
        parser.error(
            f"{options.match!r} names {len(named)} kernels" + (", all of which --full compiles" if named else "")
        )
    _print(heading for heading, _ in _HEADINGS)
    rows: list[Row] = []
    new = 0
    for row in _compile(work, options.jobs):
        rows.append(row)
        base = baseline.get((row["kernel"], row["target"]))
        new += base is None
        if "registers" in row:
            _print(_cells(row))
            if comparable and base is not None and not options.update and (worse := compare(row, base)):
                row.setdefault("error", "worse than committed: " + "; ".join(worse))
        if row.get("spills") and "error" not in row:
            print(f"    NOTE {row['kernel']} {row['target']}: {row['spills']} spills", flush=True)
            if options.update:
                row["error"] = "spills, which a committed row may not"
        if "error" in row:
            print(f"    ERROR {row['kernel']} {row['target']}: {row['error']}", flush=True)
    errors = [row for row in rows if "error" in row]
    known = {(case.label, arch) for arch in options.arch for case in cases(arch)}
    vanished = sorted(key for key in set(baseline) - known if key[1] in options.arch)
    for kernel, target in vanished:
        print(f"    GONE {kernel} {target}: committed, but no longer compiled")
    if errors and len(rows) > 20:
        print("\nWhat is wrong, again:")
        for row in errors:
            print(f"    ERROR {row['kernel']} {row['target']}: {row['error']}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.update and not errors:
        compiled = {(row["kernel"], row["target"]): row for row in rows}
        keep = {
            key: row
            for key, row in baseline.items()
            if comparable and (key[1] not in options.arch or (key in known and _in_scope(key, options.full)))
        }
        write_baseline((keep | compiled).values())
        print(f"wrote {BASELINE.name}: {len(keep | compiled)} rows")
    print(f"{new} rows not in {BASELINE.name}, {len(vanished)} gone; {time.perf_counter() - begin:.0f} s")
    print(f"{len(rows) - len(errors)} passed, {len(errors)} failed")
    return 1 if errors else 0


def _in_scope(key: tuple[str, str], full: bool) -> bool:
    """Whether a committed row that wasn't compiled now stays: the committed ones are the representative ones."""
    return full or any(case.label == key[0] and representative(case, key[1]) for case in cases(key[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
