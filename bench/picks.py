"""Every way to compute one thing on this machine's GPU, timed beside the way that is picked.

    python -m bench picks [--match forward] [--minutes 8] [--out FILE] [--once] [--share 0/8]

Nothing in the picks between kernels is measured yet: this is what they would be fitted to. Of each product and convolution
it prints how much longer the pick takes than the best way (1.00: it is the best one), which that would have been, and how
long torch takes, by cuBLAS or cuDNN as they come; at the end the geometric means, and what follows for the estimates in
kernels/matmul/tiles.py and kernels/conv/tiles.py:

- the share of the fastest tile's speed that each tile behind descriptors reaches on large products: the values of
  `_DESCRIPTORS`;
- the FLOPs up to which pointers win: the limit in `_through_descriptors`, and `BOX_FLOPS`.

With a FILE that is there already, a run that was stopped goes on: its jobs aren't done again. One set of inputs is used
again and again: what fits into the L2 is read from there. A way that fails, or disagrees with the pick, is named with its
error. `--once` only calls every way, which compiles it: several processes can do that at a time, a share of the jobs each.
With FASTLAYERS_SPECIALIZED=1 matmul/experimental/specialized.py is among the ways: if it hangs, on a device that it has
not been tried on, so does all of this.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastlayers.kernels.conv import gather as conv
from fastlayers.kernels.conv import tiles as conv_tiles
from fastlayers.kernels.conv.geometry import Geometry
from fastlayers.kernels.matmul import matmul
from fastlayers.kernels.matmul import tiles as matmul_tiles
from fastlayers.kernels.runtime import tiles as _tiles

from . import clock
from .providers import draw
from .run import Rows, environment, share, why_not
from .tune import milliseconds, same, value_of
from .workloads import precision

PICKED, TORCH = "picked", "torch"


@dataclass(frozen=True)
class Way:
    """`force`: what `_tiles.force` is given; `boxes`: whether a convolution may load boxes, None where it is no question."""

    name: str
    force: dict[str, Any]
    boxes: bool | None = None

    @contextlib.contextmanager
    def chosen(self) -> Iterator[None]:
        before = conv_tiles.BOX_FLOPS
        conv_tiles.BOX_FLOPS = before if self.boxes is None else 0 if self.boxes else sys.maxsize
        try:
            with _tiles.force(**self.force):
                yield
        finally:
            conv_tiles.BOX_FLOPS = before


@dataclass(frozen=True)
class Job:
    """One thing to compute, and the ways there are. `make` draws its inputs on a device and returns the call; `torchs` returns
    torch's call for the same. `mode`: "tf32" where float32 may be rounded to it."""

    name: str
    flops: int
    make: Callable[[torch.device], Callable[[], torch.Tensor]]
    ways: tuple[Way, ...]
    torchs: Callable[[torch.device], Callable[[], torch.Tensor]] | None = None
    mode: str = "ieee"


_THROUGH_DESCRIPTORS = {"16": ("16",), "tf32": ("tf32",), "ieee": ("tf32x3", "bf16x6")}
"""The arithmetic behind descriptors that may stand for that of a product."""


def _product_ways(m: int, n: int, k: int, device: _tiles.Device, arithmetic: str = "16") -> tuple[Way, ...]:
    """Of (m, k) @ (k, n): pointers in tiles of every size class; descriptors in every tile, alone, persistent, shared out
    as much as the multiprocessors allow, and half as much."""
    ways = [
        Way(f"pointers {size} {value_of(tile)}", dict(product=tile))
        for (kind, size), tile in matmul_tiles.products(device.architecture).items()
        if kind == arithmetic and size != "gather" and (size != "skinny" or m <= 16)
    ]
    products = matmul_tiles.descriptor_products(device.architecture)
    for product in (product for kind in _THROUGH_DESCRIPTORS[arithmetic] for product in products.get(kind, ())):
        if product.transposed and m > 64:
            continue
        if product.programs:
            product = replace(product, programs=device.multiprocessors)
        several = product.splits > 1
        shares = [1]
        if several:
            rows, columns = (n, m) if product.transposed else (m, n)
            programs = _tiles.cdiv(rows, product.tile.m) * _tiles.cdiv(columns, product.tile.n)
            most = matmul_tiles.shares(programs, _tiles.cdiv(k, product.tile.k), device)
            shares = sorted({_tiles.cdiv(most, 2), most} - {1})
        for splits in shares:
            how = (
                " transposed" * product.transposed + " persistent" * (product.programs > 0) + " copied" * product.copied
            )
            how = f" {product.precision}" * (arithmetic == "ieee") + how
            name = f"descriptors {value_of(product.tile)}{how}{f' in {splits} shares' * several}"
            ways.append(Way(name, dict(matmul=replace(product, splits=splits))))
    if arithmetic == "16" and device.architecture == "sm_90" and m >= 128 and os.environ.get("FASTLAYERS_SPECIALIZED"):
        product = matmul_tiles.specialized(device)
        ways.append(Way(f"descriptors {value_of(product.tile)} specialized", dict(matmul=product)))
    return (Way(PICKED, {}), *ways)


_FEATURES = ((4096, 4096), (4096, 14336), (14336, 4096), (768, 3072), (3072, 768), (1024, 1024), (784, 512))
_ROWS = (4096, 1024, 16384, 256, 64, 1)


_FLOAT32 = ((4096, 4096, 4096), (4096, 1024, 1024), (1024, 784, 512), (16384, 768, 3072))


def _products(device: _tiles.Device) -> Iterator[Job]:
    """The three directions of Linear layers in bfloat16: forward of all, gradients of those with many rows."""
    for rows in _ROWS:
        for k, n in _FEATURES:
            directions = list(_directions("linear", rows, k, n, device, "16"))
            yield from directions if rows >= 1024 else directions[:1]


def _float32_products(device: _tiles.Device) -> Iterator[Job]:
    """A few in float32, strictly and in TF32."""
    for (rows, k, n), (name, arithmetic) in itertools.product(_FLOAT32, (("float32", "ieee"), ("tf32", "tf32"))):
        yield from _directions(name, rows, k, n, device, arithmetic)


def _directions(name: str, rows: int, k: int, n: int, device: _tiles.Device, arithmetic: str) -> Iterator[Job]:
    """Forward, input gradient and weight gradient of a layer of k features to n."""
    dtype, mode = torch.bfloat16 if arithmetic == "16" else torch.float32, "tf32" if arithmetic == "tf32" else "ieee"

    def job(name: str, a: tuple[int, int], b: tuple[int, int], a_transposed: bool, b_transposed: bool) -> Job:
        def operands(on: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
            left, right = draw(a, dtype, on, 1), draw(b, dtype, on, 2)
            return left.T if a_transposed else left, right.T if b_transposed else right

        def make(on: torch.device) -> Callable[[], torch.Tensor]:
            left, right = operands(on)
            return lambda: matmul.matmul(left, right, precision=mode)

        def torchs(on: torch.device) -> Callable[[], torch.Tensor]:
            left, right = operands(on)
            return lambda: left @ right

        m, k = reversed(a) if a_transposed else a
        n = b[0] if b_transposed else b[1]
        ways = _product_ways(m, n, k, device, arithmetic)
        return Job(f"{name} {m}x{k}x{n}", 2 * m * n * k, make, ways, torchs, mode)

    yield job(f"{name} forward", (rows, k), (n, k), False, True)
    yield job(f"{name} input grad", (rows, n), (n, k), False, False)
    yield job(f"{name} weight grad", (rows, n), (rows, k), True, False)


# Images, channels, height and width, result's channels, kernel, stride, groups.
_CONVOLUTIONS = (
    (64, 64, 56, 64, 3, 1, 1), (64, 128, 28, 128, 3, 1, 1), (64, 256, 14, 256, 3, 1, 1), (64, 512, 7, 512, 3, 1, 1),
    (64, 128, 56, 128, 3, 2, 1), (64, 256, 56, 512, 1, 2, 1), (64, 3, 224, 64, 7, 2, 1), (4, 320, 64, 320, 3, 1, 1),
    (32, 128, 56, 128, 3, 1, 32), (32, 512, 14, 512, 3, 1, 32),
    (1, 64, 56, 64, 3, 1, 1), (1, 256, 14, 256, 3, 1, 1), (8, 16, 32, 16, 3, 1, 1), (128, 16, 32, 16, 3, 1, 1),
    (64, 32, 16, 32, 3, 1, 1),
)  # fmt: skip


def _convolutions(device: _tiles.Device) -> Iterator[Job]:
    """ResNet's layers, a U-Net's, ResNeXt's, and small ones: in channels_last, and forward in NCHW too."""
    pointers = [
        Way(f"pointers {size} {value_of(tile)}", dict(product=tile), boxes=False)
        for (kind, size), tile in matmul_tiles.products(device.architecture).items()
        if kind == "16" and size in ("medium", "small", "gather")
    ]

    def boxes(weight_grad: bool) -> list[Way]:
        return [
            Way(f"boxes {size} {value_of(tile)}", dict(box=tile), boxes=True)
            for (kind, size), tile in conv_tiles.box_tiles(device.architecture).items()
            if kind == "16" and size.startswith("weight") == weight_grad
        ]

    for n, c, size, o, kernel, stride, groups in _CONVOLUTIONS:
        padding, out = kernel // 2, (size + 2 * (kernel // 2) - kernel) // stride + 1
        geometry: dict[str, Any] = dict(
            geometry=Geometry((stride, stride), (padding, padding), (padding, padding), (1, 1), groups),
            precision="ieee",
        )
        flops = 2 * n * out * out * o * c // groups * kernel * kernel
        shapes = (n, c, size, size), (o, c // groups, kernel, kernel), (n, o, out, out)

        def job(
            name: str,
            direction: str,
            format: torch.memory_format,
            ways: tuple[Way, ...],
            shapes: Any = shapes,
            geometry: Any = geometry,
            flops: int = flops,
        ) -> Job:
            def tensors(device: torch.device) -> Iterator[torch.Tensor]:
                for i, shape in enumerate(shapes):
                    yield draw(shape, torch.bfloat16, device, i).contiguous(memory_format=format)

            def make(device: torch.device) -> Callable[[], torch.Tensor]:
                x, w, y = tensors(device)
                launcher, arguments, result = {
                    "forward": (conv.conv2d, (x, w, None, y), y),
                    "input grad": (conv.conv2d_input_grad, (y, w, x), x),
                    "weight grad": (conv.conv2d_weight_grad, (y, x, w), w),
                }[direction]
                return lambda: (launcher(*arguments, **geometry), result)[1]

            def torchs(device: torch.device) -> Callable[[], torch.Tensor]:
                x, w, y = tensors(device)
                how = geometry["geometry"]
                if direction == "forward":
                    return lambda: F.conv2d(x, w, None, how.stride, how.padding, how.dilation, how.groups)
                wanted = (direction == "input grad", direction == "weight grad", False)
                settings = how.stride, how.padding, how.dilation, False, (0, 0), how.groups, wanted
                return lambda: torch.ops.aten.convolution_backward(y, x, w, None, *settings)[wanted.index(True)]

            return Job(name, flops, make, ways, torchs)

        what = f"{n}x{c}x{size}x{size} to {o}, {kernel}x{kernel} stride {stride}"
        if groups > 1:
            what += f" in {groups} groups"
        for direction in ("forward", "input grad", "weight grad"):
            ways = (Way(PICKED, {}), *pointers, *boxes(direction == "weight grad"))
            yield job(f"conv2d {direction} {what}", direction, torch.channels_last, ways)
        ways = (Way(PICKED, {}), *pointers, *boxes(False))
        yield job(f"conv2d forward NCHW {what}", "forward", torch.contiguous_format, ways)


def jobs(device: _tiles.Device) -> list[Job]:
    """Products, convolutions and products in float32 in turn. Every third of each first, so that a run that is short has
    seen all kinds and sizes; of these the large ones first."""
    kinds = [list(make(device)) for make in (_products, _convolutions, _float32_products)]
    mixed = [found[::3] + found[1::3] + found[2::3] for found in kinds]
    return [job for jobs in itertools.zip_longest(*mixed) for job in jobs if job is not None]


Times = dict[str, float]
"""Milliseconds by the name of the way; of the pick under PICKED, of torch under TORCH."""
TimeOf = Callable[[Job, Way], "float | None"]


def measure(job: Job, time_of: TimeOf) -> Times:
    """The time of every way that works."""
    found = {way.name: time_of(job, way) for way in (*job.ways, *[Way(TORCH, {})] * (job.torchs is not None))}
    return {name: ms for name, ms in found.items() if ms is not None}


def regret(times: Times) -> tuple[float, str]:
    """How many times as long as the best way the pick takes, and which that is."""
    best = min(times.keys() - {TORCH}, key=lambda name: (times[name], name != PICKED, name))
    return times[PICKED] / times[best], best


def shares(measured: Iterable[tuple[Job, Times]], least_flops: float = 2e11) -> dict[str, float]:
    """Of each tile behind descriptors, alone in its way, how fast it is beside the fastest: the geometric mean over the
    products that are large enough for nothing else to matter."""
    ratios: dict[str, list[float]] = {}
    for job, times in measured:
        plain = {name: ms for name, ms in times.items() if name.startswith("descriptors") and len(name.split()) == 3}
        if job.flops >= least_flops and job.name.startswith("linear"):
            for name, ms in plain.items():
                ratios.setdefault(name.removeprefix("descriptors "), []).append(min(plain.values()) / ms)
    return {name: clock.geomean(found) for name, found in ratios.items()}


def break_even(measured: Iterable[tuple[Job, Times]], others: str) -> float | None:
    """The FLOPs that part the jobs best into those that pointers win and those that the `others` do, by the time that is
    lost on the wrong side; None if there are no jobs with both."""
    pairs: list[tuple[int, float]] = []
    for job, times in measured:
        ours = [ms for name, ms in times.items() if name.startswith("pointers")]
        theirs = [ms for name, ms in times.items() if name.startswith(others)]
        if ours and theirs:
            pairs.append((job.flops, math.log(min(ours) / min(theirs))))
    if not pairs:
        return None
    limits = sorted({flops for flops, _ in pairs} | {0})

    def lost(limit: int) -> float:
        return sum(max(ratio, 0) if flops <= limit else max(-ratio, 0) for flops, ratio in pairs)

    return float(min(limits, key=lost))


def _on_gpu(device: torch.device, once: bool = False) -> TimeOf:
    """By graph replay, after a comparison with the pick's result. The inputs of one job are kept until the next.

    Args:
        once: each way is called and compared, and no time taken.
    """
    ready: list[Any] = [None, None, None]

    def time_of(job: Job, way: Way) -> float | None:
        try:
            if ready[0] != job.name:
                ready[:] = None, job.make(device), None
                ready[2] = ready[1]().clone()
                ready[0] = job.name
            _, call, right = ready
            if way.name == TORCH and job.torchs is not None:
                call = job.torchs(device)
            with way.chosen(), precision(job.mode):
                if once:
                    same(call(), right)
                    return 1.0
                return milliseconds(call, right)
        except Exception as error:  # out of resources, a compiler error, a wrong result: worth knowing, each of them
            print(
                f"    {job.name}, {way.name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}", flush=True
            )
            return None

    return time_of


def summary(measured: Sequence[tuple[Job, Times]]) -> str:
    """What all of it says of the picks."""
    both = [(job, times) for job, times in measured if PICKED in times]
    if not both:
        return "nothing was measured"
    lines = []
    for family in ("linear", "conv2d", "tf32", "float32"):
        mine = [(job, times) for job, times in both if job.name.startswith(family)]
        if mine:
            worst = max(mine, key=lambda pair: regret(pair[1])[0])
            mean = clock.geomean([regret(times)[0] for _, times in mine])
            lines.append(
                f"{family}: picks take {mean:.3f}x the best way (worst {regret(worst[1])[0]:.2f}x: {worst[0].name})"
            )
            torchs = {job.name: times[TORCH] / times[PICKED] for job, times in mine if TORCH in times}
            if torchs:
                worst_name = min(torchs, key=lambda name: torchs[name])
                lines.append(
                    f"{family}: torch takes {clock.geomean([*torchs.values()]):.3f}x as long as the picks in {len(torchs)} jobs "
                    f"(least {torchs[worst_name]:.2f}x: {worst_name})"
                )
            limit = break_even(mine, "boxes" if family == "conv2d" else "descriptors")
            if limit is not None:
                lines.append(f"{family}: pointers win up to {limit:.2g} FLOP")
    for name, ratio in sorted(shares(both).items(), key=lambda item: -item[1]):
        lines.append(f"share of {name}: {ratio:.2f}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Exit status 0 if something was measured and every pick worked; `clock.LOST` if the GPU is lost to this process."""
    parser = argparse.ArgumentParser(prog="python -m bench picks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--match", default="", help="only jobs whose name contains this")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, help="write all times, job by job, to this file (JSON lines)")
    parser.add_argument("--once", action="store_true", help="call every way once, which compiles it, and take no times")
    parser.add_argument("--share", default="0/1", help="I/N: the I-th of N shares of the jobs")
    options = parser.parse_args(argv)
    if reason := why_not():
        print(f"python -m bench picks: {reason}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    end, time_of = time.perf_counter() + 60 * options.minutes, _on_gpu(device, options.once)
    rows = Rows(options.out, environment(argv))
    times_of: dict[str, Times] = {row["job"]: row["ms"] for row in rows.rows}
    every = [job for job in jobs(_tiles.device(device)) if options.match in job.name]
    failed = done = 0
    lost = None
    for job in share(every, options.share):
        if job.name in times_of:
            continue
        if lost or time.perf_counter() > end:
            break
        times, done = measure(job, time_of), done + 1
        if lost := clock.lost():
            print(f"{job.name}: the GPU is lost: {lost}", flush=True)
        rows.add({"job": job.name, "flops": job.flops, "ms": times})
        times_of[job.name] = times
        if PICKED not in times:
            print(f"{job.name}: the pick FAILED", flush=True)
            failed += 1
            continue
        ratio, best = regret(times)
        rate = job.flops / times[PICKED] / 1e9
        beside = f", torch {times[TORCH]:.4f} ms" if TORCH in times else ""
        print(
            f"{ratio:5.2f}  {times[PICKED]:9.4f} ms {rate:7.1f} TFLOP/s  {job.name}  (best: {best}{beside})", flush=True
        )
    print(f"{len(times_of)} of {len(every)} jobs")
    if lost:
        return clock.LOST
    measured = [(job, times_of[job.name]) for job in every if job.name in times_of]
    if not options.once:
        print(summary(measured))
    return 0 if measured and not failed else 1
