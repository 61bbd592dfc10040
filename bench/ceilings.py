"""What is installed here, and what this machine's GPU reaches at best: bytes a second in a copy, FLOPs in torch's products.

    python -m bench ceilings [--out FILE] [--gigabytes 4]

One row, with the environment that every other command notes too. Kernels are held against these numbers rather than against a
data sheet: random data take more power than zeros, and neither clocks nor cooling are the vendor's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.runtime import cache

from . import clock, run
from .providers import draw
from .workloads import precision

PRODUCTS = {"bf16": (torch.bfloat16, "ieee"), "tf32": (torch.float32, "tf32"), "fp32": (torch.float32, "ieee")}


def _milliseconds(call: Callable[[], Any]) -> float:
    samples = clock.Clock([call], torch.cuda.Stream())
    return clock.summarize([ms for _ in range(5) if (ms := samples.sample().gpu_ms) is not None]).p50


def measure(device: torch.device, bytes: int, size: int) -> run.Row:
    """A copy counts the bytes that are read and those that are written."""
    source = draw((bytes // 4,), torch.float32, device, 0)
    target = torch.empty_like(source)
    row: run.Row = {"copy GB/s": 2 * source.nbytes / _milliseconds(lambda: target.copy_(source)) * 1e-6}
    for name, (dtype, mode) in PRODUCTS.items():
        a, b = (draw((size, size), dtype, device, seed) for seed in (1, 2))
        with precision(mode):
            row[f"{name} TFLOP/s"] = 2 * size**3 / _milliseconds(lambda a=a, b=b: a @ b) * 1e-9
    return row


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench ceilings", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="write it to this file (JSON)")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="how much is copied")
    parser.add_argument("--size", type=int, default=8192, help="of the square matrices")
    options = parser.parse_args(argv)
    if reason := run.why_not():
        print(f"python -m bench ceilings: {reason}", file=sys.stderr)
        return 2
    env = run.environment(argv)
    # Compiled kernels are found again in a cache only by a Triton whose files are the same to the byte.
    env["triton key"] = hashlib.sha256(cache.triton_key().encode()).hexdigest()
    if options.out:  # before anything is launched
        options.out.write_text(json.dumps({"environment": env}) + "\n")
    device = torch.device("cuda", torch.cuda.current_device())
    row = measure(device, int(options.gigabytes * 1e9), options.size)
    env["clocks after"] = clock.gpu_state()
    if options.out:
        options.out.write_text(json.dumps({"environment": env, "ceilings": row}) + "\n")
    versions = f"driver {env['driver']}, torch {env['torch']}, triton {env['triton']}"
    print(f"{env['gpu']}, {versions}, commit {env['commit']}, {env['time']}")
    print(f"SM clock {env['clocks'].get('clocks.sm')} MHz before, {env['clocks after'].get('clocks.sm')} MHz after")
    print(", ".join(f"{name.replace(' ', f' {value:,.0f} ', 1)}" for name, value in row.items()))
    return 0
