"""How long a kernel takes on a GPU, estimated from its machine code: `python -m bench audit` prints it beside the roofline.

Not a measurement. What one warp does in a pass of the main loop is counted (`counted`), and how many passes the whole work takes
follows from its FLOPs; in a kernel without a loop, from the number of its warps. Then:

- a multiprocessor issues 4 instructions a clock and has 16 lanes for special functions, 64 or 128 for float32; its tensor
  cores and the clock follow from the peaks in fastlayers/reporting/gpus.py. Of instruction slots, float32 and special functions
  the slowest decides. The time of tensor cores is added: the loops that Triton makes wait for a product before they go on with
  its result.
- Memory moves the fewest bytes that the work can do with. Whichever is longer, multiprocessors or memory, is the estimate.

Left out: bank conflicts (`python -m bench counters` has them), the L2, the last wave that doesn't fill the GPU, what comes before
and behind the loop, and that clocks fall under load. So real kernels take longer: by what factor, PUBLISHED says, and a time is
printed as a range between the smallest and the largest of these factors only.
"""

from __future__ import annotations

import collections
import functools
import re
from typing import NamedTuple

from fastlayers.reporting.gpus import GPU, GPUS, Work

from . import assembly

_TENSOR_FLOPS = {"sm_80": 2048, "sm_90": 4096}
"""Of a multiprocessor in a clock, in 16 bits, from the whitepapers of A100 and H100. With the peak it gives the clock."""
_FLOAT_LANES = {"sm_80": 64, "sm_90": 128}
_ISSUED, _SPECIAL_LANES, _LANES = 4, 16, 32
ESTIMATED = ("A100", "H100", "H200")
"""The GPUs whose machine code and rates are known well enough."""


class Counted(NamedTuple):
    """What one warp does: in a pass of the main loop, or in a kernel without one."""

    loop: bool
    instructions: int
    special: int
    floats: int
    fused: int
    """Multiplications with additions in float32, each of two FLOPs a lane."""
    tensor: dict[str, int]
    """FLOPs of matrix instructions by kind of arithmetic, as in GPU.teraflops; a warp's share of those that four make."""

    @property
    def flops(self) -> int:
        return sum(self.tensor.values()) or 2 * _LANES * self.fused


class Estimate(NamedTuple):
    """Milliseconds, and what decides: "arithmetic" or "memory"."""

    milliseconds: float
    unit: str


def counted(code: list[assembly.Instruction]) -> Counted | None:
    """None where a matrix instruction's name doesn't say what it computes (sm_100)."""
    body = assembly.main_loop_body(code)
    names = [instruction.name for instruction in body or code]
    kinds = collections.Counter(map(assembly.kind, names))
    tensor: collections.Counter[str] = collections.Counter()
    for name in names:
        if assembly.kind(name) == "matrix":
            if (found := _matrix(name)) is None:
                return None
            tensor[found[0]] += found[1]
    fused = sum(name.split(".")[0] == "FFMA" for name in names)
    return Counted(bool(body), len(names), kinds["special"], kinds["float"], fused, dict(tensor))


def _matrix(name: str) -> tuple[str, int] | None:
    """Kind of arithmetic and FLOPs of a warp. HGMMA.64x256x16.F32.BF16 is made by four warps; HMMA.16816 is 16x8x16."""
    arithmetic = "64" if name.startswith("DMMA") else "tf32" if "TF32" in name else "16"
    found = re.match(r"(?:HG|D)MMA\.(\d+)x(\d+)x(\d+)", name) or re.match(r"[HD]MMA\.(16|8)(8)(16|8|4)\b", name)
    if found is None:
        return None
    m, n, k = map(int, found.groups())
    return arithmetic, 2 * m * n * k // (4 if name.startswith("HGMMA") else 1)


def estimate(counted: Counted, gpu: GPU, work: Work, warps: int, products: int = 1) -> Estimate | None:
    """None where nothing says how often the loop runs.

    Args:
        work: of all launches together.
        warps: of all programs together, for a kernel without a loop.
        products: how many products in lower precision make one of `work` (three of TF32 for strict float32).
    """
    if counted.loop:
        if not (work.flops and counted.flops):
            return None
        passes = products * work.flops / counted.flops
    else:
        passes = warps
    seconds = passes * _clocks(counted, gpu) / gpu.multiprocessors / _clock(gpu)
    memory = work.bytes / (gpu.terabytes * 1e12)
    return Estimate(1e3 * max(seconds, memory), "arithmetic" if seconds > memory else "memory")


def _clock(gpu: GPU) -> float:
    return gpu.teraflops["16"] * 1e12 / gpu.multiprocessors / _TENSOR_FLOPS[gpu.target]


def _clocks(counted: Counted, gpu: GPU) -> float:
    """Of a multiprocessor, for one warp's pass."""

    def rate(arithmetic: str) -> float:
        return gpu.teraflops[arithmetic] * 1e12 / gpu.multiprocessors / _clock(gpu)

    others = max(
        counted.instructions / _ISSUED,
        counted.special * _LANES / _SPECIAL_LANES,
        counted.floats * _LANES / _FLOAT_LANES[gpu.target],
    )
    return others + sum(flops / rate(arithmetic) for arithmetic, flops in counted.tensor.items())


class Published(NamedTuple):
    """A kernel of others, and the row of bench/baseline.json whose tile, dtype and layout are the same."""

    name: str
    row: str
    gpu: str
    teraflops: tuple[float, ...]
    source: str


PUBLISHED = (
    Published(
        "persistent Gluon product with TMA, 8192 x 8192 x 4096 to 16384, float16",
        "matmul tma forward 16 128x256x64 w8s4 bfloat16",
        "H100",
        (640, 662, 670),
        "triton, python/tutorials/gluon/07-persistence.py",
    ),
    Published(
        "tutorial 03's product through pointers, 3072 x 3072 x 3072, float16",
        "matmul forward 16/large 128x256x64 w8s3 bfloat16",
        "H100",
        (525,),
        "github.com/triton-lang/triton/issues/3672",
    ),
    Published(
        "tutorial 03's product through pointers, 2432 x 2432 x 2432, float16",
        "matmul forward 16/large 128x256x32 w8s3 bfloat16",
        "A100",
        (168,),
        "github.com/triton-lang/triton/issues/6523",
    ),
    Published(
        "product in strict float32, 5120 x 4096 x 4096",
        "matmul forward ieee/large 128x128x16 w8s3 float32",
        "A100",
        (17.95,),
        "github.com/Yinghan-Li/YHs_Sample/issues/4",
    ),
    Published(
        "tutorial 06's attention, 128 x 128 of 128 features, 4096 to 16384 tokens, float16",
        "scaled_dot_product_attention attention 128x128x128x128 w8s2, Llama-3-8B, 4096 tokens, causal bfloat16",
        "H100",
        (460, 464, 487),
        "github.com/facebookexperimental/triton/pull/205",
    ),
    Published(
        "attention of 64 features, float16",
        "scaled_dot_product_attention attention 64x64x128x64 w8s3, GPT-2, 8 x 1024 tokens, causal bfloat16",
        "A100",
        (145,),
        "github.com/triton-lang/triton/pull/1917",
    ),
)
"""TFLOP/s that were published for kernels of these shapes, the code that the same tile of ours compiles to beside them."""


def published_rows(target: str) -> frozenset[str]:
    """The audit's rows that are compared with published figures."""
    return frozenset(published.row for published in PUBLISHED if GPUS[published.gpu].target == target)


def teraflops(counted: Counted, gpu: GPU) -> float:
    """What the model gives for endless work that arithmetic decides."""
    return counted.flops / _clocks(counted, gpu) * gpu.multiprocessors * _clock(gpu) / 1e12


@functools.cache
def factors() -> tuple[float, float] | None:
    """How much longer than its estimate a published kernel took: the least and the most. None where bench/baseline.json has no
    reading of a kernel that is compared."""
    compared = comparison()
    found = [ratio for _, _, ratios in compared for ratio in ratios]
    return (min(found), max(found)) if len(compared) == len(PUBLISHED) else None


def comparison() -> list[tuple[Published, float, tuple[float, ...]]]:
    """Each published kernel, its estimate in TFLOP/s, and the estimate over what was published."""
    from .audit import read_baseline

    rows = read_baseline()[1]
    found = []
    for published in PUBLISHED:
        gpu = GPUS[published.gpu]
        if counted := rows.get((published.row, gpu.target), {}).get("pass"):
            estimated = teraflops(Counted(**counted), gpu)
            found.append((published, estimated, tuple(estimated / measured for measured in published.teraflops)))
    return found


def table() -> str:
    """The comparison, for docs/measured.md."""
    lines = ["| Published | GPU | TFLOP/s, published | estimated | factor | Source |", "|---|---|---|---|---|---|"]
    for published, estimated, ratios in comparison():
        measured = ", ".join(f"{value:g}" for value in published.teraflops)
        over = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        source = published.source
        if source.startswith("github.com/"):  # a link, in words that fit a narrow column
            source = f"[{source.split('/', 3)[2]} {source.rsplit('/', 1)[1]}](https://{source})"
        lines.append(f"| {published.name} | {published.gpu} | {measured} | {estimated:.0f} | {over} | {source} |")
    return "\n".join(lines)
