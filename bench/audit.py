"""Compile every kernel at every shipped tile for every target, without a GPU, and read what came out.

    python -m bench.audit [--arch sm_90 ...] [--match softmax] [--jobs 2] [--json FILE]

The launchers themselves run, on meta tensors, with a driver that compiles instead of launching: so the specialisation
(alignment, sizes equal to 1, 64-bit offsets) is that of a real launch, and no argument list is written twice. What the
interpreter accepts and the compiler rejects, a spill, or a tile that does not fit into shared memory ends with exit
status 1. Never in a process with TRITON_INTERPRET=1.
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

    @property
    def label(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _product_cases(target: str) -> Iterator[Case]:
    kinds = {"16": (torch.float16, torch.bfloat16), "tf32": (torch.float32,), "ieee": (torch.float32,), "64": (torch.float64,)}
    for (kind, size), tile in _tiles.products(target).items():
        precision = kind if kind == "tf32" else "ieee"
        for dtype in kinds[kind]:
            name = f"{kind}/{size} {tile.m}x{tile.n}x{tile.k} w{tile.warps}s{tile.stages}"

            def t(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                return _meta(*shape, dtype=dtype)

            def product(odd: int = 0, t: Any = t, precision: str = precision, dtype: torch.dtype = dtype) -> dict[str, Callable[[], object]]:
                m, n, k = 8192 + odd, 4096 + odd, 4096 + odd
                return {
                    "forward": lambda: matmul.matmul(t(m, k), t(n, k).T, bias=t(n), then="relu", precision=precision),
                    "input grad": lambda: matmul.matmul(t(m, n), t(n, k), precision=precision),
                    "input grad, undo": lambda: matmul.matmul(t(m, n), t(n, k), undo=("relu", t(m, k)), column_sums=dtype, precision=precision),
                    "weight grad": lambda: matmul.matmul(t(m, n).T, t(m, k), precision=precision),
                }  # fmt: skip

            def image(t: Any = t, precision: str = precision) -> dict[str, tuple[str, Callable[[], object]]]:
                geometry = dict(stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=1, precision=precision)
                last = torch.channels_last
                x, y, w = t(32, 256, 56, 56).to(memory_format=last), t(32, 256, 28, 28).to(memory_format=last), t(256, 256, 3, 3).to(memory_format=last)
                return {
                    "forward": ("_conv_kernel", lambda: conv.conv2d(x, w, t(256), y, then="relu", **geometry)),
                    "input grad": ("_conv_input_grad_kernel", lambda: conv.conv2d_input_grad(y, w, x, **geometry)),
                    "weight grad": ("_conv_weight_grad_kernel", lambda: conv.conv2d_weight_grad(y, x, w, **geometry)),
                }  # fmt: skip

            for direction, call in product().items():
                if size == "large" and direction.endswith("undo"):
                    continue  # never picked: see _tiles._product
                yield Case(f"matmul {direction} {name}", "_matmul_kernel", dtype, call, dict(product=tile))
            for direction, (kernel, call) in image().items():
                if size == "large" or (size != "small" and direction == "weight grad"):
                    continue
                yield Case(f"conv {direction} {name}", kernel, dtype, call, dict(product=tile))
            if size == "small":
                for direction, call in product(odd=1).items():
                    yield Case(f"matmul odd {direction} {name}", "_matmul_kernel", dtype, call, dict(product=tile))
                geometry = dict(stride=(2, 2), padding=(3, 3), dilation=(1, 1), groups=1, precision=precision)
                x, y, w = t(32, 3, 224, 224), t(32, 64, 112, 112), t(64, 3, 7, 7)
                yield Case(
                    f"conv stem forward {name}", "_conv_kernel", dtype,
                    lambda x=x, y=y, w=w, g=geometry: conv.conv2d(x, w, None, y, **g), dict(product=tile),
                )  # fmt: skip
                yield Case(
                    f"conv stem weight grad {name}", "_conv_weight_grad_kernel", dtype,
                    lambda x=x, y=y, w=w, g=geometry: conv.conv2d_weight_grad(y, x, w, **g), dict(product=tile),
                )  # fmt: skip


def _memory_cases() -> Iterator[Case]:
    """The memory-bound kernels: pointwise, reductions, softmax."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):

        def t(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return _meta(*shape, dtype=dtype)

        accumulate = torch.promote_types(dtype, torch.float32)
        x = t(4096, 4096)
        yield Case("relu", "_pointwise_kernel", dtype, lambda x=x: pointwise.pointwise(x, "relu"), {})
        yield Case("relu grad", "_pointwise_grad_kernel", dtype, lambda x=x: pointwise.pointwise_grad(x, x, "relu"), {})
        for layout, y in (("rows", x[None]), ("columns", x[None].mT)):
            yield Case(
                f"activation grad {layout}", "_activation_grad_kernel", dtype,
                lambda y=y, d=dtype: reduce.activation_grad(y, undo=("relu", y), column_sums=d), {},
            )  # fmt: skip
        for partials in (8, 64):
            yield Case(
                f"sum partials {partials}", "_sum_partials_kernel", dtype,
                lambda p=_meta(partials, 512, 512, dtype=accumulate), o=t(512, 512), b=t(512): reduce.sum_partials(p, o, bias=b, then="relu"), {},
            )  # fmt: skip
        for size in _tiles._SOFTMAX_ROWS:
            x = t(4096, size)
            for gradient in (False, True):
                if _tiles.softmax_rows(size, accumulate, gradient) is not None:
                    yield _softmax_case(f"rows {size}", "rows", x, 1, gradient)
        for label, shape in (("long rows", (64, 131072)), ("few neighbours", (64, 512, 16)), ("short", (64, 32, 4096)), ("tall", (64, 512, 4096)), ("tall, one block", (64, 128, 4096))):  # fmt: skip
            for gradient in (False, True):
                yield _softmax_case(label, "blocks", t(*shape), 1, gradient)


def _softmax_case(label: str, design: str, x: torch.Tensor, dim: int, gradient: bool) -> Case:
    if gradient:
        return Case(
            f"softmax grad {label}", f"_softmax_{design}_grad_kernel", x.dtype,
            lambda: softmax.softmax_grad(x, x, dim, x.dtype), {},
        )  # fmt: skip
    return Case(f"softmax {label}", f"_softmax_{design}_kernel", x.dtype, lambda: softmax.softmax(x, dim, x.dtype), {})


def cases(target: str) -> list[Case]:
    """Every kernel at every tile that can be picked on `target`."""
    return [*_product_cases(target), *_memory_cases()]


@contextlib.contextmanager
def _compiling(target: str, kernel: str, compiled: list[Any]) -> Iterator[None]:
    """Within, launching `kernel` compiles it for `target`, and launching any other does nothing."""

    def launch(launched: Any, programs: int, *args: Any, **meta: Any) -> None:
        if launched.__name__ == kernel and not compiled:
            compiled.append(launched.warmup(*args, grid=(1,), **meta))

    before = _launch.launch, _tiles.device
    driver.set_active(_OfflineDriver(TARGETS[target]))
    _launch.launch, _tiles.device = launch, lambda device: _tiles.Device(target, 132)
    try:
        yield
    finally:
        _launch.launch, _tiles.device = before


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

        wide = [int(bits) for bits in re.findall(r"\bLDG\.E\.(?:\w+\.)*?(64|128)\b", sass)]
        return {
            "registers": number(r"REG:(\d+)", usage),
            "spills": count(r"\b(?:STL|LDL)\b"),
            "matrix": count(r"\b(?:HGMMA|HMMA|UTCHMMA|UTC\w*MMA|DMMA)\b"),
            "async copies": count(r"\bLDGSTS\b"),
            "loads": count(r"\bLDG\b"),
            "128-bit loads": wide.count(128),
        }
    assembly = compiled.asm["amdgcn"]
    return {
        "registers": number(r"\.vgpr_count:\s+(\d+)", assembly),
        "spills": number(r"\.vgpr_spill_count:\s+(\d+)", assembly),
        "matrix": len(re.findall(r"v_mfma", assembly)),
        "async copies": 0,
        "loads": len(re.findall(r"(?:global|buffer)_load", assembly)),
        "128-bit loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)),
    }


def audit(index: int, target: str) -> dict[str, Any]:
    """Compile case number `index` for `target`. A row of the report; "error" says what is wrong, if anything is."""
    case = cases(target)[index]
    row: dict[str, Any] = {"kernel": case.label, "target": target}
    compiled: list[Any] = []
    begin = time.perf_counter()
    try:
        with _tiles.force(**case.force), _compiling(target, case.kernel, compiled):
            case.call()
        row["seconds"] = round(time.perf_counter() - begin, 2)
        shared = compiled[0].metadata.shared
        row |= _read(target, compiled[0]) | {"shared": shared}
        if shared > SHARED_MEMORY[target]:
            row["error"] = f"needs {shared} bytes of shared memory, {target} has {SHARED_MEMORY[target]}"
        elif row["spills"] > 0:
            row["error"] = f"{row['spills']} spills"
    except Exception as error:
        row["error"] = f"does not compile: {type(error).__name__}: {error}"[:500]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.audit", description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--match", default="", help="only kernels whose name matches this regular expression")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    if _launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter's kernels can't be compiled")
    work = [(i, arch) for arch in options.arch for i, case in enumerate(cases(arch)) if re.search(options.match, case.label)]
    rows = []
    print(f"{'kernel':64} {'target':7} {'regs':>4} {'spill':>5} {'shared':>7} {'matrix':>6} {'async':>5} {'128/loads':>9} {'s':>5}")
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for row in pool.map(audit, *zip(*work, strict=True), chunksize=4) if work else ():
            rows.append(row)
            if "registers" in row:
                print(f"{row['kernel']:64} {row['target']:7} {row['registers']:4} {row['spills']:5} {row['shared']:7} {row['matrix']:6} "
                      f"{row['async copies']:5} {row['128-bit loads']:4}/{row['loads']:<4} {row['seconds']:5}", flush=True)  # fmt: skip
            if "error" in row:
                print(f"    ERROR {row['kernel']} {row['target']}: {row['error']}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    errors = sum("error" in row for row in rows)
    print(f"{len(rows) - errors} passed, {errors} failed")
    return 1 if errors or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
