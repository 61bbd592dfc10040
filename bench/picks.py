"""Every way to compute one thing on this machine's GPU, timed beside the way that is picked.

    python -m bench picks [--match forward] [--minutes 8] [--out FILE]

Nothing in the picks between kernels is measured yet: this is what they would be fitted to. Of each product and convolution
it prints how much longer the pick takes than the best way (1.00: it is the best one), and which that would have been;
at the end the geometric mean, and what follows for the estimates in kernels/matmul/tiles.py and kernels/conv/tiles.py:

- the share of the fastest tile's speed that each tile behind descriptors reaches on large products: the values of
  `_DESCRIPTORS`;
- the FLOPs up to which pointers win: the limit in `_through_descriptors`, and `BOX_FLOPS`.

One set of inputs is used again and again: what fits into the L2 is read from there. A way that fails, or disagrees with the
pick, is named with its error. With FASTLAYERS_SPECIALIZED=1 matmul/experimental/specialized.py is among the ways: if it
hangs, on a device that it has not been tried on, so does all of this.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastlayers.kernels.conv import gather as conv
from fastlayers.kernels.conv import tiles as conv_tiles
from fastlayers.kernels.conv.geometry import Geometry
from fastlayers.kernels.matmul import matmul
from fastlayers.kernels.matmul import tiles as matmul_tiles
from fastlayers.kernels.runtime import tiles as _tiles

from . import clock
from .providers import draw
from .run import why_not
from .tune import milliseconds, value_of

PICKED = "picked"


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
    """One thing to compute, and the ways there are. `make` draws its inputs on a device and returns the call."""

    name: str
    flops: int
    make: Callable[[torch.device], Callable[[], torch.Tensor]]
    ways: tuple[Way, ...]


def _product_ways(m: int, n: int, k: int, device: _tiles.Device) -> tuple[Way, ...]:
    """Of bfloat16 (m, k) @ (k, n): pointers in tiles of every size class; descriptors in every tile, alone, persistent,
    shared out as much as the multiprocessors allow, and half as much."""
    ways = [
        Way(f"pointers {size} {value_of(tile)}", dict(product=tile))
        for (kind, size), tile in matmul_tiles.products(device.architecture).items()
        if kind == "16" and size != "gather" and (size != "skinny" or m <= 16)
    ]
    for product in matmul_tiles.descriptor_products(device.architecture).get("16", ()):
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
            how = " transposed" * product.transposed + " persistent" * (product.programs > 0)
            name = f"descriptors {value_of(product.tile)}{how}{f' in {splits} shares' * several}"
            ways.append(Way(name, dict(matmul=replace(product, splits=splits))))
    if device.architecture == "sm_90" and m >= 128 and os.environ.get("FASTLAYERS_SPECIALIZED"):
        product = matmul_tiles.specialized(device)
        ways.append(Way(f"descriptors {value_of(product.tile)} specialized", dict(matmul=product)))
    return (Way(PICKED, {}), *ways)


_FEATURES = ((4096, 4096), (4096, 14336), (14336, 4096), (768, 3072), (3072, 768), (1024, 1024), (784, 512))
_ROWS = (4096, 1024, 16384, 256, 64, 1)


def _products(device: _tiles.Device) -> Iterator[Job]:
    """The three directions of Linear layers: forward of all, gradients of those with many rows."""

    def job(name: str, a: tuple[int, int], b: tuple[int, int], a_transposed: bool, b_transposed: bool) -> Job:
        def make(on: torch.device) -> Callable[[], torch.Tensor]:
            left, right = draw(a, torch.bfloat16, on, 1), draw(b, torch.bfloat16, on, 2)
            left, right = left.T if a_transposed else left, right.T if b_transposed else right
            return lambda: matmul.matmul(left, right, precision="ieee")

        m, k = reversed(a) if a_transposed else a
        n = b[0] if b_transposed else b[1]
        return Job(f"{name} {m}x{k}x{n}", 2 * m * n * k, make, _product_ways(m, n, k, device))

    for rows in _ROWS:
        for k, n in _FEATURES:
            yield job("linear forward", (rows, k), (n, k), False, True)
            if rows >= 1024:
                yield job("linear input grad", (rows, n), (n, k), False, False)
                yield job("linear weight grad", (rows, n), (rows, k), True, False)


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

        def make(
            direction: str, format: torch.memory_format, shapes: Any = shapes, geometry: Any = geometry
        ) -> Callable[[torch.device], Callable[[], torch.Tensor]]:
            def on(device: torch.device) -> Callable[[], torch.Tensor]:
                x, w, y = (
                    draw(shape, torch.bfloat16, device, i).contiguous(memory_format=format)
                    for i, shape in enumerate(shapes)
                )
                launcher, arguments, result = {
                    "forward": (conv.conv2d, (x, w, None, y), y),
                    "input grad": (conv.conv2d_input_grad, (y, w, x), x),
                    "weight grad": (conv.conv2d_weight_grad, (y, x, w), w),
                }[direction]
                return lambda: (launcher(*arguments, **geometry), result)[1]

            return on

        what = f"{n}x{c}x{size}x{size} to {o}, {kernel}x{kernel} stride {stride}"
        if groups > 1:
            what += f" in {groups} groups"
        for direction in ("forward", "input grad", "weight grad"):
            ways = (Way(PICKED, {}), *pointers, *boxes(direction == "weight grad"))
            yield Job(f"conv2d {direction} {what}", flops, make(direction, torch.channels_last), ways)
        ways = (Way(PICKED, {}), *pointers, *boxes(False))
        yield Job(f"conv2d forward NCHW {what}", flops, make("forward", torch.contiguous_format), ways)


def jobs(device: _tiles.Device) -> list[Job]:
    """Products and convolutions in turn, the large ones first."""
    products, convolutions = list(_products(device)), list(_convolutions(device))
    found: list[Job] = []
    for i in range(max(len(products), len(convolutions))):
        found += products[i : i + 1] + convolutions[i : i + 1]
    return found


Times = dict[str, float]
"""Milliseconds by the name of the way; of the pick under PICKED."""
TimeOf = Callable[[Job, Way], "float | None"]


def measure(job: Job, time_of: TimeOf) -> Times:
    """The time of every way that works."""
    found = {way.name: time_of(job, way) for way in job.ways}
    return {name: ms for name, ms in found.items() if ms is not None}


def regret(times: Times) -> tuple[float, str]:
    """How many times as long as the best way the pick takes, and which that is."""
    best = min(times, key=lambda name: (times[name], name != PICKED))
    return times[PICKED] / times[best], best


def shares(measured: Iterable[tuple[Job, Times]], least_flops: float = 2e11) -> dict[str, float]:
    """Of each tile behind descriptors, alone in its way, how fast it is beside the fastest: the geometric mean over the
    products that are large enough for nothing else to matter."""
    ratios: dict[str, list[float]] = {}
    for job, times in measured:
        plain = {name: ms for name, ms in times.items() if name.startswith("descriptors") and len(name.split()) == 3}
        if job.flops >= least_flops:
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


def _on_gpu(device: torch.device) -> TimeOf:
    """By graph replay, after a comparison with the pick's result. The inputs of one job are kept until the next."""
    ready: list[Any] = [None, None, None]

    def time_of(job: Job, way: Way) -> float | None:
        try:
            if ready[0] != job.name:
                ready[:] = None, job.make(device), None
                ready[2] = ready[1]().clone()
                ready[0] = job.name
            _, call, right = ready
            with way.chosen():
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
    for family in ("linear", "conv2d"):
        mine = [(job, times) for job, times in both if job.name.startswith(family)]
        if mine:
            worst = max(mine, key=lambda pair: regret(pair[1])[0])
            mean = clock.geomean([regret(times)[0] for _, times in mine])
            lines.append(
                f"{family}: picks take {mean:.3f}x the best way (worst {regret(worst[1])[0]:.2f}x: {worst[0].name})"
            )
            limit = break_even(mine, "descriptors" if family == "linear" else "boxes")
            if limit is not None:
                lines.append(f"{family}: pointers win up to {limit:.2g} FLOP")
    for name, share in sorted(shares(both).items(), key=lambda item: -item[1]):
        lines.append(f"share of {name}: {share:.2f}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Exit status 0 if something was measured and every pick worked."""
    parser = argparse.ArgumentParser(prog="python -m bench picks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--match", default="", help="only jobs whose name contains this")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, help="write all times, job by job, to this file (JSON lines)")
    options = parser.parse_args(argv)
    if reason := why_not():
        print(f"python -m bench picks: {reason}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    end, time_of = time.perf_counter() + 60 * options.minutes, _on_gpu(device)
    measured: list[tuple[Job, Times]] = []
    failed = 0
    for job in jobs(_tiles.device(device)):
        if options.match not in job.name or time.perf_counter() > end:
            continue
        times = measure(job, time_of)
        if PICKED not in times:
            print(f"{job.name}: the pick FAILED", flush=True)
            failed += 1
            continue
        measured.append((job, times))
        ratio, best = regret(times)
        rate = job.flops / times[PICKED] / 1e9
        print(f"{ratio:5.2f}  {times[PICKED]:9.4f} ms {rate:7.1f} TFLOP/s  {job.name}  (best: {best})", flush=True)
        if options.out:
            row = {"gpu": torch.cuda.get_device_name(device), "job": job.name, "flops": job.flops, "ms": times}
            with options.out.open("a") as file:
                print(json.dumps(row), file=file)
    print(summary(measured))
    return 0 if measured and not failed else 1
