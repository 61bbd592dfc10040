"""What runs of kernels count in the machine, one line of JSON for each kernel of a run: `python -m bench counters` starts this
file, compares its lines with bench/counters.json and prints them.

    python tests/ptx_machine/counting.py [REGULAR EXPRESSION [SHARE]]

Sizes are whole tiles, few of them, and aligned, since what repeats needs no repetition to be counted; layers of the catalog,
whose sizes are odd, follow for the kernels that no telling size is given for. Numbers aren't compared here: kernels.py does.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    ROOT = Path(__file__).parent.parent.parent
    sys.path[:] = [str(ROOT), str(ROOT / "tests"), *sys.path[1:]]  # not this folder, whose names would hide others

import contract
import torch

import fastlayers
import fastlayers.functional as FL
from bench import workloads
from fastlayers.catalog import ROWS, Case
from fastlayers.kernels import reduce
from fastlayers.kernels.matmul import matmul
from fastlayers.kernels.matmul import tiles as matmul_tiles
from fastlayers.kernels.matmul.tiles import Product
from fastlayers.kernels.runtime import tiles
from fastlayers.ops.activation import Activation
from ptx_machine import bridge, kernels
from ptx_machine.report import Report

TARGETS = ("sm_90", "sm_80")
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
LAYOUTS = {"forward": (False, True), "input gradient": (False, False), "weight gradient": (True, False)}
"""Which operands of a product are stored as their transposes."""


class Run(NamedTuple):
    name: str
    arithmetic: str
    target: str
    call: Callable[[], Any]

    @property
    def label(self) -> str:
        return f"{self.name}, {self.arithmetic}, {self.target}"


def _product(product: Product, layout: str, dtype: torch.dtype) -> None:
    tile = product.tile
    m, n, k = tile.m, tile.n, 4 * product.splits * tile.k
    if product.transposed:
        m, n = n, m
    a, b = (torch.randn(shape).to(dtype) for shape in ((m, k), (k, n)))
    a, b = (x.T.contiguous().T if turned else x for x, turned in zip((a, b), LAYOUTS[layout], strict=True))
    with tiles.force(matmul=product):
        matmul.matmul(a, b, precision=product.precision)


def _products(target: str) -> Iterator[Run]:
    """Every tile through pointers in the three layouts of a linear layer, and every tile through descriptors."""
    arithmetics = {"16": ("bf16", torch.bfloat16), "ieee": ("f32", torch.float32), "64": ("f64", torch.float64)}
    rows = []
    for (kind, size), tile in matmul_tiles.products(target).items():
        if size != "gather":
            rows.append((kind, f"product {size}", Product(tile, "ieee" if kind in ("16", "64") else kind)))
    for kind, products in matmul_tiles.descriptor_products(target).items():
        for product in products:
            if not product.programs and product.splits == 1:
                tile = product.tile
                turned = " transposed" * product.transposed + " copied" * product.copied
                rows.append((kind, f"product by descriptors {tile.m}x{tile.n}x{tile.k}{turned}", product))
    for kind, name, product in rows:
        short, dtype = arithmetics.get(kind, (kind, torch.float32))
        for layout in list(LAYOUTS)[product.copied :]:  # a forward product has nothing to copy
            yield Run(f"{name} {layout}", short, target, functools.partial(_product, product, layout, dtype))


def _gradients(function: Callable[..., torch.Tensor], *given: torch.Tensor, **options: Any) -> None:
    """Forward, and the gradients of all that is given."""
    leaves = [t.detach().requires_grad_() for t in given]
    y = function(*leaves, **options)
    # Gradients laid out as the result is, as a network's next layer would make them.
    torch.autograd.grad(y, leaves, torch.randn_like(y))


def _convolution(
    dtype: torch.dtype, last: bool, least: int, x: tuple[int, ...], w: tuple[int, ...], **options: Any
) -> None:
    """Args:
    least: the FLOPs from which boxes are loaded.
    """
    order = torch.channels_last if last else torch.contiguous_format
    given = [torch.randn(shape).to(dtype).to(memory_format=order) for shape in (x, w)]
    with kernels.boxes_from(least):
        _gradients(FL.conv2d, *given, torch.randn(w[0]).to(dtype), **options)


def _convolutions(target: str) -> Iterator[Run]:
    """3x3 with 64 channels by boxes and through pointers, a network's first layer, and a depthwise one, in both formats."""
    shapes: dict[str, tuple[Any, ...]] = {
        "3x3": ((2, 64, 8, 16), (64, 64, 3, 3), dict(padding=1)),
        "stem": ((1, 3, 32, 32), (64, 3, 7, 7), dict(padding=3, stride=2)),
        "depthwise 3x3": ((2, 64, 16, 16), (64, 1, 3, 3), dict(padding=1, groups=64)),
    }
    for name, (x, w, options) in shapes.items():
        for order, last in (("NHWC", True), ("NCHW", False)):
            ways = [("bf16", torch.bfloat16, 10**15), ("f32", torch.float32, 10**15), ("tf32", torch.float32, 10**15)]
            boxes = [("bf16", torch.bfloat16, 0), ("tf32", torch.float32, 0)] if target == "sm_90" else []
            if target == "sm_80" and name == "3x3" and not last:
                boxes = [("bf16", torch.bfloat16, 0), ("f32", torch.float32, 0)]  # which it hasn't
            if name == "depthwise 3x3":
                ways, boxes = ways[:2], []
            for short, dtype, least in ways + boxes:
                how = "through pointers" if least else "copied" if target == "sm_80" else "by boxes"
                call = functools.partial(_convolution, dtype, last, least, x, w, **options)
                yield Run(f"conv {how} {name} {order}", short, target, call)


def _activation_grad(dtype: torch.dtype, tall: bool) -> None:
    """Of (2, 256, 64): channels, which lie next to each other or, in images in NCHW, far apart."""
    dy, saved, dz = (
        (torch.randn(2, 64, 256).to(dtype).mT for _ in range(3)) if tall else torch.randn(3, 2, 256, 64).to(dtype)
    )
    reduce.activation_grad(dy, saved, Activation("relu"), dz, torch.empty(64, dtype=dtype))


def _of_tensors(
    target: str, short: str, name: str, function: Callable[..., Any], *shapes: tuple[int, ...], **options: Any
) -> Run:
    """The run of a function of random tensors, and of its gradients."""

    def call() -> None:
        _gradients(function, *[torch.randn(shape).to(DTYPES[short]) for shape in shapes], **options)

    return Run(name, short, target, call)


def _streams(target: str) -> Iterator[Run]:
    """What memory decides: softmax along rows and columns, a derivative with its bias gradient, norms of rows."""
    softmaxes = {"rows of 1024": ((8, 1024), 1), "columns of 256": ((2, 256, 64), 1), "columns of 32": ((2, 32, 64), 1),
                 "16 neighbours": ((2, 256, 16), 1)}  # fmt: skip
    for short, dtype in DTYPES.items():
        run = functools.partial(_of_tensors, target, short)
        for name, (shape, dim) in softmaxes.items():
            yield run(f"softmax {name}", FL.softmax, shape, dim=dim)
        yield run("rms_norm rows of 1024", lambda x, w: FL.rms_norm(x, (1024,), w), (32, 1024), (1024,))
        yield run(
            "layer_norm rows of 1024", lambda x, w, b: FL.layer_norm(x, (1024,), w, b), (32, 1024), (1024,), (1024,)
        )
        for name, tall in (("rows", False), ("images", True)):
            call = functools.partial(_activation_grad, dtype, tall)
            yield Run(f"activation_grad of {name}", short, target, call)


def _layer(case: Case, dtype: torch.dtype) -> None:
    layer, _ = contract.pair(case, dtype, torch.device("cpu"))
    contract.values(layer, case.arguments(dtype))


def _layers(target: str) -> Iterator[Run]:
    """The first case of each row of the catalog: small and odd, and alike on both targets, of which one is counted."""
    for row in ROWS if target == "sm_90" else ():
        name, case = next(iter(row.cases.items()))
        for short, dtype in DTYPES.items():
            given = case._replace(scale=row.scale, random=row.random)
            yield Run(f"layer {row.name} {name}", short, target, functools.partial(_layer, given, dtype))


FORCED = (
    "AdaptiveAvgPool2d one, bf16", "AdaptiveMaxPool2d one, bf16", "BatchNorm1d plain in parts, bf16",
    "CosineSimilarity vector, bf16", "Embedding common, bf16", "GRU steps by steps, bf16",
    "InstanceNorm2d with running averages, bf16",
    "LayerNorm no_bias in parts, bf16", "LinearCrossEntropyLoss through descriptors, bf16",
    "LinearCrossEntropyLoss through descriptors, tf32", "MultiheadAttention weights, bf16", "PReLU one, bf16",
    "scaled_dot_product_attention bias, bf16", "scaled_dot_product_attention decoding, bf16",
    "second derivatives of attention with dropout, bf16",
    "conv by boxes groups of 32 NCHW, bf16", "conv measured by boxes NHWC, bf16",
    "gated_mlp through descriptors, bf16", "gated_mlp through pointers aligned, bf16", "product specialized both, bf16",
    "rotary_projections through descriptors, bf16", "rotary_projections through pointers aligned, bf16",
)  # fmt: skip
"""Runs of kernels.py that launch the kernels which no other one launches."""


def _forced(target: str) -> Iterator[Run]:
    for run in kernels.RUNS if target == "sm_90" else ():
        name, arithmetic, of = run.label.rsplit(", ", 2)
        if of == target and f"{name}, {arithmetic}" in FORCED:
            yield Run(name, arithmetic, target, run.call)


def runs() -> list[Run]:
    families = (_products, _convolutions, _streams, _layers, _forced)
    return [run for target in TARGETS for family in families for run in family(target)]


def counted(run: Run) -> dict[str, dict[str, float]]:
    """The rows of a run, by its label and the kernel."""
    torch.manual_seed(0)
    precision = "tf32" if run.arithmetic == "tf32" else "ieee"
    with fastlayers.policy("triton"), workloads.precision(precision), bridge.machine(run.target) as reports:
        run.call()
    by_kernel: dict[str, list[Report]] = {}
    for report in reports:
        by_kernel.setdefault(report.kernel, []).append(report)
    return {f"{run.label}, {kernel}": _row(found) for kernel, found in sorted(by_kernel.items())}


def _row(reports: list[Report]) -> dict[str, float]:
    """Of all launches of one kernel; what a kernel hasn't is left out. See bench/counters.py."""

    def total(name: str) -> float:
        return sum(getattr(report, name) for report in reports)

    def instructions(kind: str | None = None) -> int:
        return sum(n for report in reports for k, n in report.instructions.items() if kind in (k, None))

    row = {}
    if total("sectors"):
        row["sector use"] = round(total("useful") / 32 / total("sectors"), 2)
    if total("ideal"):
        row["wavefronts"] = round(total("wavefronts") / total("ideal"), 2)
        row["ways"] = max(report.ways for report in reports)
    if instructions("mma"):
        row["instructions per mma"] = round(instructions() / instructions("mma"), 1)
    warps = sum(report.grid * report.threads // 32 for report in reports)
    row["barriers"] = round(instructions("barrier") / warps, 1)
    row["instructions"] = round(instructions() / warps)
    return row


def main() -> int:
    pattern, share = [*sys.argv[1:], *["", "0/1"][len(sys.argv) - 1 :]]
    first, shares = map(int, share.split("/"))
    chosen = [run for run in runs() if re.search(pattern, run.label)]
    failed = 0
    for run in chosen[first::shares]:
        try:
            rows: Any = counted(run)
        except Exception as error:
            rows, failed = {run.label: {"error": f"{type(error).__name__}: {error}"[:300]}}, 1
        for label, row in rows.items():
            print(json.dumps({"label": label, **row}), flush=True)
    return failed


if __name__ == "__main__":
    if os.environ.get("PTX_MACHINE"):
        sys.exit(main())
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *sys.argv]
        sys.exit(subprocess.run(command, env=bridge.environment(Path(folder)), check=False).returncode)
