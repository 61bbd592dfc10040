"""Search tiles on this machine's GPU, and print rows for the tables of tiles, each of which stands beside its kernel.

    python -m bench tune [--match 16/] [--minutes 10] [--out FILE]

Every candidate is forced with `_tiles.force`, its result compared with the shipped tile's, and timed on the shapes at
which its size class is picked; the best one is timed again in turn with the shipped one. A row is printed only where it is
faster by more than noise, as the source that goes into the table, with its evidence: to be read, pasted and then compiled
for all targets by the audit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastlayers.kernels import pointwise, softmax
from fastlayers.kernels.matmul import matmul
from fastlayers.kernels.matmul import tiles as matmul_tiles
from fastlayers.kernels.runtime import tiles as _tiles
from fastlayers.kernels.runtime.tiles import Tile

from . import clock
from .audit import SHARED_MEMORY
from .cases import RELU
from .providers import draw
from .run import why_not

GAIN = 1.03
"""How much faster a tile must be, in the geometric mean over its shapes, to replace the shipped one."""


@dataclass(frozen=True)
class Knob:
    """A row of a table: what it is called in the source, the tile that is shipped, what else it might be, which kernels
    `_tiles.force` knows it by, and what to time it on."""

    table: str
    key: Any
    shipped: Tile
    candidates: tuple[Tile, ...]
    forced: str
    calls: tuple[tuple[str, Callable[[torch.device], Callable[[], Any]]], ...]

    @property
    def name(self) -> str:
        return "/".join(self.key) if isinstance(self.key, tuple) else f"{self.table.strip('_').lower()} {self.key}"


_ITEM_SIZE = {"16": 2, "tf32": 4, "ieee": 4, "64": 8}
_DTYPE = {"16": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32, "64": torch.float64}

# The rows, inner length and columns at which each size class is picked (kernels/matmul/tiles.py).
_PRODUCTS = {
    "large": ((8192, 4096, 4096), (4096, 1024, 8192), (4096, 14336, 4096)),
    "medium": ((1024, 4096, 2048), (2048, 1024, 1024), (12608, 768, 512)),
    "small": ((512, 784, 512), (1024, 512, 512), (256, 4096, 256)),
    "skinny": ((1, 4096, 4096), (16, 4096, 14336), (8, 14336, 4096)),
    "gather": ((1023, 1023, 1001), (4097, 1023, 1001)),
}


# Least and most outputs of a tile.
_AREAS = {
    "large": (2**14, 2**16),
    "medium": (2**12, 2**14),
    "small": (2**10, 2**13),
    "skinny": (2**9, 2**12),
    "gather": (2**10, 2**13),
}


def product_tiles(kind: str, size: str, target: str) -> Iterator[Tile]:
    """Tiles worth trying: of the size class, with as much of the sum per step as a few cache lines hold, within shared
    memory, and with an accumulator that leaves room in the registers."""
    item = _ITEM_SIZE[kind]
    least, most = _AREAS[size]
    for m, n, warps, stages in itertools.product((16, 32, 64, 128, 256), (32, 64, 128, 256), (4, 8), (2, 3, 4)):
        registers = m * n // (32 * warps) * (2 if kind == "64" else 1)
        if not least <= m * n <= most or (m == 16) != (size == "skinny") or not 4 <= registers <= 128:
            continue
        for k in (64 // item, 128 // item):
            k = max(k, 16)
            if stages * (m + n) * k * item <= SHARED_MEMORY.get(target, 101_376):
                yield Tile(m, n, k, warps=warps, stages=stages)


def _product_call(kind: str, m: int, k: int, n: int) -> Callable[[torch.device], Callable[[], Any]]:
    def make(device: torch.device) -> Callable[[], Any]:
        a = draw((m, k), _DTYPE[kind], device, 1)
        w = draw((n, k), _DTYPE[kind], device, 2)
        bias = draw((n,), _DTYPE[kind], device, 3)
        precision = "tf32" if kind == "tf32" else "ieee"
        return lambda: matmul.matmul(a, w.T, bias=bias, then=RELU, precision=precision)

    return make


def _filling(like: torch.Tensor, launch: Callable[[torch.Tensor], None]) -> Callable[[], torch.Tensor]:
    """A call that allocates, launches and returns the result."""

    def call() -> torch.Tensor:
        out = torch.empty_like(like)
        launch(out)
        return out

    return call


def _row_call(columns: int, gradient: bool) -> Callable[[torch.device], Callable[[], Any]]:
    def make(device: torch.device) -> Callable[[], Any]:
        x = draw((2**26 // columns, columns), torch.bfloat16, device, 1).softmax(1)
        if gradient:
            dy = draw(tuple(x.shape), torch.bfloat16, device, 2)
            return _filling(x, lambda dx: softmax.softmax_grad(dy, x, dx, 1))
        return _filling(x, lambda y: softmax.softmax(x, y, 1))

    return make


def _relu_call(device: torch.device) -> Callable[[], Any]:
    x = draw((2**26,), torch.bfloat16, device, 1)
    return _filling(x, lambda y: pointwise.pointwise(x, y, RELU))


def knobs(target: str) -> list[Knob]:
    """Everything that can be tuned, 16-bit products first."""
    found = []
    for (kind, size), shipped in matmul_tiles.products(target).items():
        calls = tuple((f"{m}x{k}x{n}", _product_call(kind, m, k, n)) for m, k, n in _PRODUCTS[size])
        candidates = tuple(dict.fromkeys(tile for tile in product_tiles(kind, size, target) if tile != shipped))
        found.append(Knob(f'_PRODUCT_ON["{target}"]', (kind, size), shipped, candidates, "product", calls))
    for columns, shipped in softmax._SOFTMAX_ROWS.items():
        if columns < 16:
            continue
        per_program = {max(1, elements // columns) for elements in (512, 1024, 2048, 4096)}
        tiles = {Tile(m, columns, warps=warps) for m in per_program for warps in (1, 2, 4, 8, 16, 32)}
        # 4 to 64 elements a thread: more spill, fewer leave the memory idle.
        tiles = {tile for tile in tiles if 4 <= tile.m * columns // (32 * tile.warps) <= 64}
        calls = tuple((name, _row_call(columns, name == "backward")) for name in ("forward", "backward"))
        candidates = tuple(sorted(tiles - {shipped}, key=lambda t: (t.m, t.warps)))
        found.append(Knob("_SOFTMAX_ROWS", columns, shipped, candidates, "softmax_rows", calls))
    tiles = tuple(Tile(1, n, warps=warps) for n in (512, 1024, 2048, 4096) for warps in (2, 4, 8))
    flat = tuple(tile for tile in tiles if tile != pointwise._POINTWISE)
    found.append(Knob("_POINTWISE", "", pointwise._POINTWISE, flat, "pointwise", (("relu 2^26", _relu_call),)))
    return found


def source(knob: Knob, tile: Tile, gain: float, gpu: str) -> str:
    """The row as it stands in the table beside its kernel, with its evidence."""
    fields = [str(tile.m), str(tile.n)]
    if tile.k != 1:
        fields.append(str(tile.k))
    fields.append(f"warps={tile.warps}")
    if tile.k != 1:
        fields.append(f"stages={tile.stages}")
    value = f"Tile({', '.join(fields)})"
    comment = f"  # {gain:.2f}x {value_of(knob.shipped)} on {gpu}"
    if knob.key == "":
        return f"{knob.table} = {value}{comment}"
    key = ", ".join(f'"{part}"' for part in knob.key) if isinstance(knob.key, tuple) else str(knob.key)
    return f"{f'({key})' if isinstance(knob.key, tuple) else key}: {value},{comment}"


def value_of(tile: Tile) -> str:
    return f"{tile.m}x{tile.n}x{tile.k} w{tile.warps}s{tile.stages}"


def choose(times: dict[Tile, list[float]], shipped: Tile) -> tuple[Tile, float]:
    """The tile with the smallest geometric mean over the shapes, and by how much it beats the shipped one; the shipped
    one itself unless that is more than noise. `times`: for each tile the same shapes in the same order."""
    gains = {
        tile: clock.geomean([a / b for a, b in zip(times[shipped], mine, strict=True)]) for tile, mine in times.items()
    }
    best = max(gains, key=lambda tile: gains[tile])
    return (best, gains[best]) if gains[best] >= GAIN else (shipped, 1.0)


def search(
    knob: Knob,
    time_of: Callable[[Knob, Tile, int], float | None],
    over: Callable[[], bool] = lambda: False,
) -> tuple[dict[Tile, list[float]], Tile, float]:
    """Times of every candidate on every shape, the best tile, its gain. One that fails or is 1.5 times slower than the
    best on the first shape is dropped at once.

    Args:
        time_of: milliseconds of a knob's call number i with a tile, or None if it can't run or is wrong.
    """
    times: dict[Tile, list[float]] = {}
    fastest = float("inf")
    for tile in (knob.shipped, *knob.candidates):
        if over() and times:
            break
        mine: list[float] = []
        for i in range(len(knob.calls)):
            ms = time_of(knob, tile, i)
            if ms is None or (i == 0 and ms > 1.5 * fastest and tile != knob.shipped):
                break
            mine.append(ms)
        if len(mine) == len(knob.calls):
            times[tile] = mine
            fastest = min(fastest, mine[0])
    if knob.shipped not in times:
        return times, knob.shipped, 1.0
    best, _ = choose(times, knob.shipped)
    if best == knob.shipped:
        return times, best, 1.0
    # Again, in turn: the clocks may have drifted between the first candidate and the last.
    again = {tile: [[] for _ in knob.calls] for tile in (knob.shipped, best)}
    for _, tile, i in itertools.product(range(5), again, range(len(knob.calls))):
        ms = time_of(knob, tile, i)
        if ms is not None:
            again[tile][i].append(ms)
    if not all(all(samples) for samples in again.values()):
        return times, knob.shipped, 1.0
    medians = {tile: [clock.summarize(samples).p50 for samples in each] for tile, each in again.items()}
    return times, *choose(medians, knob.shipped)


def same(result: torch.Tensor, right: torch.Tensor) -> None:
    """
    Raises:
        AssertionError: if they are too far apart to be the same thing.
    """
    torch.testing.assert_close(result, right, rtol=2e-2, atol=2e-2 * right.abs().max().item())


def milliseconds(call: Callable[[], torch.Tensor], right: torch.Tensor) -> float | None:
    """The GPU time of one call by graph replay, None if it can't be captured.

    Raises:
        AssertionError: if its result isn't `right`. Whatever the call raises.
    """
    same(call(), right)
    samples = [clock.Clock([call], torch.cuda.Stream()).sample().gpu_ms for _ in range(3)]
    return min((ms for ms in samples if ms is not None), default=None)


def _on_gpu(device: torch.device) -> Callable[[Knob, Tile, int], float | None]:
    """Times by graph replay, after a comparison with the shipped tile's result."""
    ready: dict[tuple[str, int], tuple[Callable[[], Any], torch.Tensor]] = {}

    def time_of(knob: Knob, tile: Tile, i: int) -> float | None:
        if (knob.name, i) not in ready:
            ready.clear()
            call = knob.calls[i][1](device)
            with _tiles.force(**{knob.forced: knob.shipped}):
                ready[knob.name, i] = call, call().clone()
        call, right = ready[knob.name, i]
        try:
            with _tiles.force(**{knob.forced: tile}):
                return milliseconds(call, right)
        except Exception:  # out of resources, a compiler error, a wrong result: not a tile to ship
            return None

    return time_of


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--match", default="", help="only knobs whose name begins with this: 16/, tf32/large, softmax_rows"
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, help="write all times, row by row, to this file (JSON lines)")
    options = parser.parse_args(argv)
    if reason := why_not():
        print(f"python -m bench tune: {reason}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    end = time.perf_counter() + 60 * options.minutes
    time_of = _on_gpu(device)
    rows: dict[str, list[str]] = {}
    for knob in knobs(_tiles.device(device).architecture):
        if not knob.name.startswith(options.match):
            continue
        if time.perf_counter() > end:
            break
        times, best, gain = search(knob, time_of, lambda: time.perf_counter() > end)
        print(
            f"{knob.name}: {len(times)} tiles, best {value_of(best)}, {gain:.2f}x the shipped {value_of(knob.shipped)}"
        )
        if options.out:
            with options.out.open("a") as file:
                for tile, ms in times.items():
                    row = {
                        "gpu": gpu,
                        "knob": knob.name,
                        "tile": value_of(tile),
                        "shapes": [c[0] for c in knob.calls],
                        "ms": ms,
                    }
                    print(json.dumps(row), file=file, flush=True)
        if best != knob.shipped:
            rows.setdefault(knob.table, []).append(source(knob, best, gain, gpu))
            print(f"    {rows[knob.table][-1]}", flush=True)
    print("\nFor the tables beside the kernels:" if rows else "\nNothing beats what is shipped.")
    for table, lines in rows.items():
        print(f"# {table}\n" + "\n".join(f"    {line}" for line in lines))
    return 0
