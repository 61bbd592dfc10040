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
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastlayers.kernels import _launch, _tiles, conv, matmul, pointwise, reduce, softmax
from fastlayers.kernels._tiles import Tile

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


@dataclass(frozen=True)
class Case:
    """One kernel at one tile: `call` launches it, and only what `kernel` names is compiled."""

    name: str
    kernel: str
    dtype: torch.dtype
    call: Callable[[], object]
    force: dict[str, Tile]
    wide: bool = False
    """Compiled for offsets of 64 bits."""

    @property
    def streams(self) -> bool:
        """Whether memory alone decides the speed, so that every load and store must be 128 bits wide. Rows of up to 8
        elements, which aren't aligned, can't be."""
        return re.match(r"relu|softmax (grad )?(rows \d\d|blocks)", self.name) is not None

    @property
    def label(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}{' wide' * self.wide}"


def _maker(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    return lambda *shape: torch.empty(shape, dtype=dtype, device="meta")


_KINDS = {
    "16": (torch.float16, torch.bfloat16),
    "tf32": (torch.float32,),
    "ieee": (torch.float32,),
    "64": (torch.float64,),
}


def _product_cases(target: str) -> Iterator[Case]:
    """matmul and convolution: three directions each at every tile, and the ways in which small tiles alone are used."""
    for (kind, size), tile in _tiles.products(target).items():
        precision = "tf32" if kind == "tf32" else "ieee"
        name = f"{kind}/{size} {tile.m}x{tile.n}x{tile.k} w{tile.warps}s{tile.stages}"
        for dtype in _KINDS[kind]:
            calls = [("matmul", *call) for call in _matmul_calls(0, dtype, precision)]
            calls += [("conv", *call) for call in _conv_calls(dtype, precision)]
            # What _tiles never picks: a large tile with an epilogue that reads one, or for a convolution.
            if size == "large":
                calls = [c for c in calls if c[0] == "matmul" and "undo" not in c[1]]
            if size in ("medium", "skinny"):
                calls = [c for c in calls if c[0] == "matmul" or c[1] != "weight grad"]
            if size == "gather":
                calls += [("matmul odd", *call) for call in _matmul_calls(1, dtype, precision)]
                calls += [("conv stem", *call) for call in _stem_calls(dtype, precision)]
            for family, direction, kernel, call in calls:
                yield Case(f"{family} {direction} {name}", kernel, dtype, call, dict(product=tile))


Call = tuple[str, str, Callable[[], object]]
"""Direction, kernel, and what launches it."""


def _matmul_calls(odd: int, dtype: torch.dtype, precision: str) -> Iterator[Call]:
    t, product = _maker(dtype), functools.partial(matmul.matmul, precision=precision)
    m, n, k = 8192 + odd, 4096 + odd, 4096 + odd
    kernel = "_matmul_kernel"
    yield "forward", kernel, functools.partial(product, t(m, k), t(n, k).T, bias=t(n), then="relu")
    yield "input grad", kernel, functools.partial(product, t(m, n), t(n, k))
    undo = functools.partial(product, t(m, n), t(n, k), undo=("relu", t(m, k)), column_sums=dtype)
    yield "input grad, undo", kernel, undo
    yield "weight grad", kernel, functools.partial(product, t(m, n).T, t(m, k))


def _conv_calls(dtype: torch.dtype, precision: str) -> Iterator[Call]:
    t, last = _maker(dtype), torch.channels_last
    geometry = _geometry(2, 1, precision)
    x, y = t(32, 256, 56, 56).to(memory_format=last), t(32, 256, 28, 28).to(memory_format=last)
    w = t(256, 256, 3, 3).to(memory_format=last)
    yield "forward", "_conv_kernel", functools.partial(conv.conv2d, x, w, t(256), y, then="relu", **geometry)
    yield "input grad", "_conv_input_grad_kernel", functools.partial(conv.conv2d_input_grad, y, w, x, **geometry)
    yield "weight grad", "_conv_weight_grad_kernel", functools.partial(conv.conv2d_weight_grad, y, x, w, **geometry)


def _stem_calls(dtype: torch.dtype, precision: str) -> Iterator[Call]:
    """NCHW and three channels: loads element by element, steps that straddle taps."""
    t, geometry = _maker(dtype), _geometry(2, 3, precision)
    x, y, w = t(32, 3, 224, 224), t(32, 64, 112, 112), t(64, 3, 7, 7)
    yield "forward", "_conv_kernel", functools.partial(conv.conv2d, x, w, None, y, **geometry)
    yield "input grad", "_conv_input_grad_kernel", functools.partial(conv.conv2d_input_grad, y, w, x, **geometry)
    yield "weight grad", "_conv_weight_grad_kernel", functools.partial(conv.conv2d_weight_grad, y, x, w, **geometry)


def _geometry(stride: int, padding: int, precision: str) -> dict[str, Any]:
    pairs = dict(stride=(stride, stride), padding=(padding, padding), dilation=(1, 1))
    return dict(**pairs, groups=1, precision=precision)


def _memory_cases() -> Iterator[Case]:
    """The memory-bound kernels: pointwise, reductions, softmax."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for name, kernel, call in _memory_calls(dtype):
            yield Case(name, kernel, dtype, call, {})


def _memory_calls(dtype: torch.dtype) -> Iterator[Call]:
    t, accumulate = _maker(dtype), torch.promote_types(dtype, torch.float32)
    x = t(4096, 4096)
    yield "relu", "_pointwise_kernel", functools.partial(pointwise.pointwise, x, "relu")
    yield "relu grad", "_pointwise_grad_kernel", functools.partial(pointwise.pointwise_grad, x, x, "relu")
    for layout, y in (("rows", x[None]), ("columns", x[None].mT)):
        call = functools.partial(reduce.activation_grad, y, undo=("relu", y), column_sums=dtype)
        yield f"activation grad {layout}", "_activation_grad_kernel", call
    for count in (8, 64):
        partials = _maker(accumulate)(count, 512, 512)
        call = functools.partial(reduce.sum_partials, partials, t(512, 512), bias=t(512), then="relu")
        yield f"sum partials {count}", "_sum_partials_kernel", call
        call = functools.partial(reduce.sum_partials, _maker(accumulate)(count, 512), t(512))
        yield f"sum partials {count}, one row", "_sum_partials_kernel", call
    rows = {f"rows {d}": ("rows", t(4096, d)) for d in _tiles._SOFTMAX_ROWS}
    shapes = dict(long=(64, 131072), few=(64, 512, 16), short=(64, 32, 4096), tall=(64, 512, 4096), one=(64, 128, 4096))
    blocks = {f"blocks {name}": ("blocks", t(*shape)) for name, shape in shapes.items()}
    for name, (design, x) in (rows | blocks).items():
        forward = functools.partial(softmax.softmax, x, 1, dtype)
        backward = functools.partial(softmax.softmax_grad, x, x, 1, dtype)
        if design == "blocks" or _tiles.softmax_rows(x.shape[1], accumulate):
            yield f"softmax {name}", f"_softmax_{design}_kernel", forward
        if design == "blocks" or _tiles.softmax_rows(x.shape[1], accumulate, gradient=True):
            yield f"softmax grad {name}", f"_softmax_{design}_grad_kernel", backward


@functools.cache
def cases(target: str) -> list[Case]:
    """Every kernel at every tile that can be picked on `target`."""
    narrow = [*_product_cases(target), *_memory_cases()]
    return narrow + [
        dataclasses.replace(case, wide=True)
        for case in narrow
        if case.dtype in (torch.bfloat16, torch.float32) and (not case.force or "/gather" in case.name)
    ]


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
