"""Tables and plots from a file of results: losses first.

    python -m bench report FILE [--markdown FILE] [--plots DIR]

FILE is a results.json, or the rows.jsonl of a run that was killed. Needs no GPU; the plots need matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastlayers.catalog import ROWS
from fastlayers.reporting import gpus

from . import clock
from .workloads import NETWORKS

Row = dict[str, Any]
Results = dict[str, Any]

RESULTS = Path(__file__).parent / "results"


def write_results(path: Path, environment: dict[str, Any], rows: Iterable[Row]) -> None:
    """One row a line, through a temporary file: whoever looks finds the old file or the new one."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{{"environment": {json.dumps(environment, indent=1)},\n"rows": [\n{lines}\n]}}\n')
    temporary.replace(path)


def read_results(path: Path) -> Results:
    """A finished file, or what there is of an unfinished one: a last line cut short is left out."""
    text = path.read_text()
    if path.suffix != ".jsonl":
        return json.loads(text)
    environment: dict[str, Any] = {}
    rows = []
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "environment" in found:
            environment = found["environment"]
        else:
            rows.append(found)
    return {"environment": environment, "rows": rows}


def newest(folder: Path = RESULTS) -> Path | None:
    """The committed results of the latest run, whichever GPU it was on."""
    found = sorted(
        folder.glob("*/*/results.json"), key=lambda path: json.loads(path.read_text())["environment"]["time"]
    )
    return found[-1] if found else None


class Comparison:
    """One workload: the rows of its fullest measurement, the best of ours and the best of torch's own providers.

    A workload is measured again with the providers that compile; only rows that were measured in turn are compared.
    """

    def __init__(self, rows: list[Row]):
        last = max(row.get("entry", 0) for row in rows)
        self.rows = [row for row in rows if row.get("entry", 0) == last]
        self.first = self.rows[0]
        self.ours, self.torch, self.base = (self._best(kind) for kind in ("ours", "torch", "base"))

    def _best(self, kind: str, time: str = "gpu_ms") -> Row | None:
        timed = [
            row
            for row in self.rows
            if row["kind"] == kind and not row["void"] and (row.get(time) or row.get("wall_us"))
        ]
        return min(timed, key=_gpu_ms, default=None)

    @property
    def ratio(self) -> float | None:
        """Of torch's best GPU time to ours: above 1, ours is faster. Where either couldn't be captured in a graph, of
        their wall times."""
        if self.ours is None or self.torch is None:
            return None
        return _ratio(self.torch, self.ours, "gpu_ms") or _ratio(self.torch, self.ours, "wall_us")

    @property
    def wall_ratio(self) -> float | None:
        """The same by wall time, each side's best by that clock."""
        sides = [
            [
                row["wall_us"]["p50"]
                for row in self.rows
                if row["kind"] == kind and not row["void"] and row.get("wall_us")
            ]
            for kind in ("torch", "ours")
        ]
        return min(sides[0]) / min(sides[1]) if all(sides) else None

    @property
    def void(self) -> list[Row]:
        return [row for row in self.rows if row["void"]]

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if "failed" in row]


def _gpu_ms(row: Row) -> float:
    return row["gpu_ms"]["p50"] if row.get("gpu_ms") else row["wall_us"]["p50"] / 1000


def _ratio(a: Row, b: Row, time: str) -> float | None:
    return a[time]["p50"] / b[time]["p50"] if a.get(time) and b.get(time) else None


def comparisons(results: Results) -> list[Comparison]:
    """By workload, in the order in which they were measured first."""
    by_workload: dict[str, list[Row]] = {}
    for row in results["rows"]:
        if row["kind"] != "-":
            by_workload.setdefault(row["workload"], []).append(row)
    return [Comparison(rows) for rows in by_workload.values()]


def losses(found: list[Comparison]) -> list[Comparison]:
    """Where torch is faster by either clock, the worst first."""

    def worst(c: Comparison) -> float:
        return min(ratio for ratio in (c.ratio, c.wall_ratio) if ratio is not None)

    return sorted((c for c in found if (c.ratio or c.wall_ratio) and worst(c) < 1), key=worst)


def _x(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _table(headings: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)])


_FAMILY_HEADINGS = ["family", "mode", "GPU time", "wall time", "workloads", "losses", "void", "base"]


def _families(found: list[Comparison]) -> list[list[str]]:
    """Geomeans of the ratios by family and mode."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for c in found:
        groups.setdefault((c.first["family"], c.first["mode"]), []).append(c)

    def mean(ratios: Iterable[float | None]) -> str:
        known = [ratio for ratio in ratios if ratio is not None]
        return _x(clock.geomean(known) if known else None)

    return [
        [
            family, mode, mean(c.ratio for c in group), mean(c.wall_ratio for c in group), str(len(group)),
            str(len(losses(group))), str(sum(any(row["kind"] == "ours" for row in c.void) for c in group)),
            mean(_ratio(c.base, c.ours, "gpu_ms") if c.base and c.ours else None for c in group),
        ]
        for (family, mode), group in sorted(groups.items())
    ]  # fmt: skip


def line(rows: list[Row]) -> str:
    """One workload in one line, for the terminal."""
    if rows[0]["kind"] == "-":
        return f"{rows[0]['workload']}: {rows[0]['failed']}"
    c = Comparison(rows)
    times = ", ".join(
        f"{row['provider']} {_gpu_ms(row):.4g}" for row in c.rows if row.get("gpu_ms") or row.get("wall_us")
    )
    notes = [f"VOID {row['provider']}" for row in c.void] + [
        f"{row['provider']} failed: {row['failed']}" for row in c.failed
    ]
    return "; ".join([f"{c.first['workload']}: {_x(c.ratio)}x GPU, {_x(c.wall_ratio)}x wall (ms: {times})", *notes])


def _loss_lines(found: list[Comparison]) -> list[list[str]]:
    return [
        [c.first["workload"], _x(c.ratio), _x(c.wall_ratio), c.torch["provider"] if c.torch else "-"]
        for c in losses(found)
    ]


def summary(results: Results) -> str:
    """Short enough for a terminal: the ten worst losses, then the geomeans."""
    found = comparisons(results)
    lost = _loss_lines(found)
    lines = [f"{len(lost)} of {len(found)} workloads are slower than torch's best by one clock or the other"]
    lines += [f"  {gpu:>5}x GPU {wall:>5}x wall  {name} ({best})" for name, gpu, wall, best in lost[:10]]
    void = [row for c in found for row in c.void]
    lines += [f"  VOID {row['workload']} by {row['provider']}: {row['void']}" for row in void[:5]]
    widths = (16, 5, 9, 10, 10, 7, 5, 6)
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in
              [_FAMILY_HEADINGS, *_families(found)]]  # fmt: skip
    return "\n".join(lines)


def _mib(row: Row | None, key: str) -> str:
    return "-" if row is None or row.get(key) is None else f"{row[key] / 2**20:.1f}"


def _time(row: Row, key: str) -> str:
    found = row.get(key)
    return f"{found['p50']:.4g} ({found['p20']:.4g}-{found['p80']:.4g})" if found and "p20" in found else "-"


def markdown(results: Results) -> str:
    """Everything a reader needs to judge the run: environment, losses, geomeans, all rows."""
    env, found = results["environment"], comparisons(results)
    lines = [
        f"# {env.get('gpu')}, {env.get('time')}, commit {env.get('commit')}{' with changes' * bool(env.get('changed'))}",
        "",
        f"torch {env.get('torch')}, triton {env.get('triton')}, CUDA {env.get('cuda')}, driver {env.get('driver')}; "
        f"clocks before {env.get('clocks')}, after {env.get('clocks after')}"
        + (f"; base {env['base']}" if env.get("base") else ""),
        "",
        *(f"- {name}: not run, {reason}" for name, reason in env.get("absent", {}).items()),
        "",
        "Ratios are torch's best provider over our best one: above 1, ours is faster. GPU time: CUDA-graph replay over "
        "rotating inputs. Wall time: calls from Python with a short queue.",
        "",
        "## Slower than torch",
        "",
        _table(["workload", "GPU time", "wall time", "torch's best"], _loss_lines(found)),
        "",
        "## Geometric means",
        "",
        _table(_FAMILY_HEADINGS, _families(found)),
        "",
        "## All rows",
        "",
    ]  # fmt: skip
    headings = [
        "workload", "provider", "GPU ms (p20-p80)", "wall us (p20-p80)", "host us", "ratio", "wall ratio", "TFLOP/s",
        "GB/s", "% of roofline", "first call s", "peak MiB", "saved MiB", "error", "torch's error", "note",
    ]  # fmt: skip

    def number(row: Row, key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else "-"

    def note(row: Row) -> str:
        notes = [f"VOID: {row['void']}"] if row["void"] else []
        notes += [row["failed"]] if "failed" in row else []
        notes += [f"no graph: {row['not_captured']}"] if row.get("not_captured") else []
        notes += ["from cache"] if row.get("cold") is False else []
        return "; ".join(notes)

    rows = [
        [
            row["workload"], row["provider"], _time(row, "gpu_ms"), _time(row, "wall_us"),
            f"{row['host_us']['p50']:.1f}" if row.get("host_us") else "-",
            _x(row.get("ratio")), _x(row.get("wall_ratio")), number(row, "tflops", ".1f"), number(row, "gbps", ".0f"),
            number(row, "roofline_percent", ".1f"), number(row, "first_call_s", ".2f"), _mib(row, "peak_bytes"),
            _mib(row, "saved_bytes"), number(row, "error", ".1e"), number(row, "torch_error", ".1e"), note(row),
        ]
        for c in found for row in c.rows if row["kind"] != "roofline"
    ]  # fmt: skip
    return "\n".join([*lines, _table(headings, rows), ""])


_MODES = ("bf16", "fp16", "fp32", "tf32")


def readme_table(path: Path | None = None) -> str:
    """The README's table of speed, from the newest committed results."""
    path = path or newest()
    if path is None:
        return "Speed on a GPU: not measured."
    results = read_results(path)
    env = results["environment"]
    cells: dict[tuple[str, str], str] = {}
    for row in _families(comparisons(results)):
        cells[row[0], row[1]] = f"{row[2]} ({row[3]}), {row[5]} of {row[4]}"
    families = [*[row.name for row in ROWS if row.speeds], *NETWORKS]
    rows = [[family, *(cells.get((family, mode), "not measured") for mode in _MODES)] for family in families]
    return (
        f"{env['gpu']}, {env['time'][:10]}, commit {env['commit']}, torch {env['torch']}, triton {env['triton']}. Geometric "
        "mean of the time of torch's fastest way over ours: GPU time (wall time), and how many workloads are slower than "
        "torch's by either clock.\n\n" + _table(["", "bfloat16", "float16", "float32", "TF32"], rows)
    )


def plots(results: Results, folder: Path) -> list[Path]:
    """Pictures of a run, as PNG: those for which it has data.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = comparisons(results)
    folder.mkdir(parents=True, exist_ok=True)
    env = results["environment"]
    title = f"{env.get('gpu')}, {str(env.get('time'))[:10]}, {env.get('commit')}"
    written: list[Path] = []

    def save(figure: Figure, name: str) -> None:
        path = folder / f"{name}.png"
        FigureCanvasAgg(figure).print_png(str(path))
        written.append(path)

    _ratio_map(found, Figure, title, save)
    _roofline(found, env, Figure, title, save)
    _rates(found, env, Figure, title, save)
    _host(found, Figure, title, save)
    return written


def _found_families(found: list[Comparison]) -> list[str]:
    """Each once, in the order in which they were measured."""
    return list(dict.fromkeys(c.first["family"] for c in found))


def _ratio_map(found: list[Comparison], figure_type: Any, title: str, save: Any) -> None:
    """Shape by provider: torch's best over the provider, blue where it is faster, red where slower. A picture for each
    family, of the most telling rows of a long run."""
    names = list(dict.fromkeys(row["provider"] for c in found for row in c.rows if row.get("ratio")))
    for family in _found_families(found):
        chosen = [c for c in found if c.first["family"] == family and any(row.get("ratio") for row in c.rows)][:120]
        if not chosen:
            continue
        ratios = [{row["provider"]: row["ratio"] for row in c.rows if row.get("ratio")} for c in chosen]
        figure = figure_type(figsize=(4 + 0.8 * len(names), 2 + 0.22 * len(chosen)), layout="constrained")
        axes = figure.add_subplot()
        logs = [[math.log2(row[name]) if name in row else math.nan for name in names] for row in ratios]
        image = axes.imshow(logs, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        for y, row in enumerate(ratios):
            for name, ratio in row.items():
                color = "white" if abs(math.log2(ratio)) > 0.6 else "black"
                axes.text(names.index(name), y, f"{ratio:.2f}", ha="center", va="center", fontsize=6, color=color)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        axes.set_yticks(range(len(chosen)), [c.first["workload"] for c in chosen], fontsize=6)
        axes.set_title(f"GPU time of torch's best / of the provider\n{title}", fontsize=9)
        bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 8 / len(chosen)))
        bar.set_ticks([-1, 0, 1], labels=["0.5", "1", "2"])
        save(figure, f"ratios-{family}")


def _roofline(found: list[Comparison], env: dict[str, Any], figure_type: Any, title: str, save: Any) -> None:
    """TFLOP/s over FLOP/byte, under the roofs of the GPU, of the layers that multiply."""
    known = gpus.by_device_name(env.get("gpu") or "")
    figure = figure_type(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    drawn = False
    families = [family for family in _found_families(found) if family not in NETWORKS]
    for kind, marker in (("ours", "o"), ("torch", "x")):
        for family in families:
            points = [
                (c.first["flops"] / c.first["bytes"], best["tflops"])
                for c in found
                for best in (c.ours if kind == "ours" else c.torch,)
                if c.first["family"] == family and best and best.get("tflops")
            ]
            if points:
                color = f"C{families.index(family)}"
                axes.scatter(*zip(*points, strict=True), s=14, marker=marker, color=color, label=f"{family}, {kind}")
                drawn = True
    if not drawn:
        return
    if known is not None:
        gpu = gpus.GPUS[known]
        for peak in dict.fromkeys(gpu.teraflops.values()):
            names = [f"{name} bit" if name.isdigit() else name for name, rate in gpu.teraflops.items() if rate == peak]
            axes.plot(
                [2**-4, peak / gpu.terabytes, 2**13], [gpu.terabytes / 16, peak, peak], color="0.6", linewidth=0.8
            )
            axes.text(2**13, peak, ", ".join(names), fontsize=7, va="bottom", ha="right")
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="TFLOP/s")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=6, ncols=2)
    save(figure, "roofline")


def _rates(found: list[Comparison], env: dict[str, Any], figure_type: Any, title: str, save: Any) -> None:
    """GB/s over the row length, of what memory decides: the layers without products."""
    memory = [c for c in found if not c.first["flops"] and c.first["shape"]]
    families = [f for f in _found_families(memory) if any(c.first["family"] == f and c.ours for c in memory)]
    if not families:
        return
    figure = figure_type(figsize=(5.5 * len(families), 4.5), layout="constrained")
    known = gpus.by_device_name(env.get("gpu") or "")
    for i, family in enumerate(families):
        axes = figure.add_subplot(1, len(families), i + 1)
        chosen = [
            c
            for c in memory
            if c.first["family"] == family and c.first["mode"] == "bf16" and c.first["direction"] == "forward"
        ]
        for name in dict.fromkeys(row["provider"] for c in chosen for row in c.rows if row.get("gbps")):
            # Of two with rows of one length, the larger.
            rates = {
                c.first["shape"][-1]: row["gbps"]
                for c in sorted(chosen, key=lambda c: c.first["bytes"])
                for row in c.rows
                if row["provider"] == name and row.get("gbps")
            }
            points = sorted(rates.items())
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        if known is not None:
            axes.axhline(1000 * gpus.GPUS[known].terabytes, color="0.6", linewidth=0.8)
        axes.set(xscale="log", xlabel="row length", ylabel="GB/s", ylim=(0, None))
        axes.set_title(f"{family}, bf16, forward\n{title}", fontsize=9)
        if axes.lines:
            axes.legend(fontsize=7)
    save(figure, "rates")


def _host(found: list[Comparison], figure_type: Any, title: str, save: Any) -> None:
    """Host time of a call, of the workloads with the shortest GPU times."""
    chosen = [c for c in found if any(row.get("host_us") and row["kind"] != "base" for row in c.rows)]
    chosen = sorted(chosen, key=lambda c: min(_gpu_ms(row) for row in c.rows if row.get("host_us")))[:12]
    if not chosen:
        return
    names = list(dict.fromkeys(row["provider"] for c in chosen for row in c.rows if row.get("host_us")))
    figure = figure_type(figsize=(9, 1.5 + 0.5 * len(chosen)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        values = [
            next((row["host_us"]["p50"] for row in c.rows if row["provider"] == name and row.get("host_us")), 0.0)
            for c in chosen
        ]
        axes.barh([y + i * height for y in range(len(chosen))], values, height=height, label=name)
    axes.set_yticks([y + 0.4 for y in range(len(chosen))], [c.first["workload"] for c in chosen], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="host time of a call, us")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    save(figure, "host")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--markdown", type=Path, help="write all tables to this file")
    parser.add_argument("--plots", type=Path, help="draw the plots into this folder")
    options = parser.parse_args(argv)
    try:
        results = read_results(options.file)
    except OSError as error:
        parser.error(str(error))
    if options.markdown:
        options.markdown.write_text(markdown(results))
    if options.plots:
        try:
            for path in plots(results, options.plots):
                print(path)
        except ImportError as error:
            print(f"no plots: {error}", file=sys.stderr)
            return 1
    print(summary(results))
    return 0
