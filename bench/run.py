"""Time everything on this machine's GPU, the most telling rows first.

    python -m bench [--minutes 10] [--out DIR] [--match REGEX] [--base COMMIT]

Writes every row as soon as it is measured (DIR/rows.jsonl); at the end, or when stopped, all of them with the environment
in one file (results.json) and a table (results.md). By default DIR is bench/results/<gpu>/<time>-<commit>. In a DIR that has
rows already it goes on with those that are missing. Nothing but torch, triton and this checkout is needed; `python -m bench
report` draws the plots, there or elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from fastlayers.kernels.runtime import launch as _launch
from fastlayers.reporting import gpus

from . import base, clock, report
from .providers import PROVIDERS, Provider, absent, forget
from .subject import Reference, Subject
from .workloads import Workload, workloads

Row = dict[str, Any]
T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"
_TIER_RANK = (0.0, 3.0, 12.0)
_TIER_SECONDS = (6.0, 45.0, 150.0)
"""How much later a workload is run again with those who must be compiled, or searched for, first; and for how long an
entry is thought to take before one has been seen."""


def why_not() -> str | None:
    """What speaks against measuring here."""
    if _launch.INTERPRETED:
        return "TRITON_INTERPRET is set: timing the interpreter says nothing about the kernels"
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is false (python -m bench --help says which commands need none)"
    return None


def plan(found: Iterable[Workload]) -> list[tuple[Workload, int]]:
    """(workload, tier) in the order of their value."""
    entries = []
    for workload in found:
        for tier, later in enumerate(_TIER_RANK):
            # A compiled backward alone is compiled with its forward; it is in "both".
            if tier == 0 or workload.direction != "backward":
                entries.append((workload.rank + later, workload, tier))
    entries.sort(key=lambda entry: entry[0])
    return [(workload, tier) for _, workload, tier in entries]


class Budget:
    """Which entries still fit into the time. Guesses from the median of those of their tier so far."""

    def __init__(self, minutes: float, now: Callable[[], float] = time.perf_counter):
        self._now, self._end = now, now() + 60 * minutes
        self._seen: dict[int, list[float]] = {}

    def fits(self, tier: int) -> bool:
        seen = self._seen.get(tier)
        return self._now() + (statistics.median(seen) if seen else _TIER_SECONDS[tier]) <= self._end

    @property
    def over(self) -> bool:
        """Not even the shortest entry fits."""
        return not any(self.fits(tier) for tier in range(len(_TIER_RANK)))

    @contextlib.contextmanager
    def spend(self, tier: int) -> Iterator[None]:
        begin = self._now()
        yield
        self._seen.setdefault(tier, []).append(self._now() - begin)


class Rows:
    """The rows of a run, written into a file as soon as they are known. Where there is such a file, that run was stopped, and
    this one goes on."""

    def __init__(self, path: Path | None, env: dict[str, Any]):
        self.rows: list[Row] = report.read_results(path)["rows"] if path is not None and path.exists() else []
        self._path = path
        # A line that was cut short stays alone.
        self._write(("\n" if self.rows else "") + json.dumps({"environment": env}) + "\n")

    def _write(self, text: str) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())

    def add(self, *rows: Row) -> None:
        self.rows += rows
        self._write("".join(json.dumps(row) + "\n" for row in rows))


def share(found: list[T], which: str) -> list[T]:
    """`which`: "I/N", for the I-th of N shares, each of which has something of all."""
    first, step = map(int, which.split("/"))
    return found[first::step]


def finish(rows: list[Row], arithmetic: str, flops: int, bytes: int, gpu: str | None) -> None:
    """Add to an entry's rows what follows from the times: rates, percent of the roofline, ratios to the best of torch's
    own providers. A void row has none, and is nobody's standard."""
    for row in rows:
        ms = row["gpu_ms"]["p50"] if row.get("gpu_ms") else None
        if ms is None or row["void"]:
            continue
        if flops:
            row["tflops"] = flops / ms * 1e-9
        if bytes > 1:  # of a network nobody counts them
            row["gbps"] = bytes / ms * 1e-6
        if gpu is not None:
            least = gpus.least_milliseconds(gpus.Work(flops, bytes), arithmetic, gpus.GPUS[gpu])
            row["roofline_percent"] = 100 * least / ms
    for time_, ratio in (("gpu_ms", "ratio"), ("wall_us", "wall_ratio")):
        timed = [row for row in rows if row.get(time_) and not row["void"]]
        torchs = [row[time_]["p50"] for row in timed if row["kind"] == "torch"]
        for row in timed if torchs else ():
            row[ratio] = min(torchs) / row[time_]["p50"]


def measure(
    workload: Workload,
    providers: list[Provider],
    device: torch.device,
    seconds: float,
    server: base.Server | None,
    seed: int,
) -> list[Row]:
    """All the providers on one workload, in turn. A provider that fails is a row that says so."""
    state = clock.gpu_state()
    common: Row = {
        "workload": workload.key, "family": workload.family, "shape_name": workload.shape_name,
        "shape": list(workload.shape), "mode": workload.mode, "direction": workload.direction,
        "flops": workload.work.flops, "bytes": workload.work.bytes,
    }  # fmt: skip
    rows: list[Row] = []
    samplers: dict[str, Callable[[], clock.Sample]] = {}
    reference = Reference(workload, device, seed)
    makers: list[tuple[str, str, Callable[[], Subject | base.Remote]]] = []
    for p in providers:
        makers.append((p.name, p.kind, functools.partial(Subject, p, workload, device, seed, reference)))
        if p.kind == "ours" and server is not None:
            makers.append((f"base {p.name}", "base", functools.partial(base.Remote, server, p.name, workload, seed)))
    for name, kind, make in makers:
        row: Row = {**common, "provider": name, "kind": kind, "void": None}
        try:
            subject = make()
            row |= subject.row
            samplers[name] = subject.sample
        except Exception as error:  # out of memory, not supported: the others go on
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        rows.append(row)
    taken = clock.round_robin(samplers, seconds * len(samplers))
    after = clock.gpu_state()
    for row in rows:
        row |= {"before": state, "after": after}
        samples = taken.get(row["provider"])
        if samples:
            captured = [sample.gpu_ms for sample in samples if sample.gpu_ms is not None]
            row["gpu_ms"] = clock.summarize(captured)._asdict() if captured else None
            row["wall_us"] = clock.summarize([sample.wall_us for sample in samples])._asdict()
            row["host_us"] = clock.summarize([sample.host_us for sample in samples])._asdict()
            row["samples"] = len(samples)
    gpu = gpus.by_device_name(torch.cuda.get_device_name(device))
    finish(rows, workload.arithmetic, workload.work.flops, workload.work.bytes, gpu)
    if gpu is not None:
        least = gpus.least_milliseconds(workload.work, workload.arithmetic, gpus.GPUS[gpu])
        rows.append({**common, "provider": "roofline", "kind": "roofline", "gpu_ms": {"p50": least}, "void": None})
    samplers.clear()
    if server is not None:
        server.drop()
    return rows


def _git(*args: str) -> str:
    command = ["git", "-C", str(base.ROOT), *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a copy without its history
        return ""


def environment(argv: list[str]) -> dict[str, Any]:
    """Where and with what a run was made."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "driver": next(iter(clock.query("driver_version")), None),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "host": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "commit": _git("rev-parse", "--short=12", "HEAD") or os.environ.get("FASTLAYERS_COMMIT"),
        "changed": bool(_git("status", "--porcelain")),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": argv,
        "clocks": clock.gpu_state(),
        "absent": absent(),
    }


def folder(env: dict[str, Any]) -> Path:
    """Where the results of a run go that says nothing else."""
    gpu = re.sub(r"[^a-z0-9]+", "-", env["gpu"].lower()).strip("-")
    return RESULTS / gpu / f"{env['time'][:16].replace(':', '')}-{env['commit'] or 'unknown'}"


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="stop after this time, having done the most telling rows"
    )
    parser.add_argument("--out", type=Path, help="the results' folder")
    parser.add_argument("--match", default="", help="only workloads whose key matches this regular expression")
    parser.add_argument("--providers", nargs="+", choices=[provider.name for provider in PROVIDERS])
    parser.add_argument("--seconds", type=float, default=0.25, help="of samples for each provider and workload")
    parser.add_argument("--base", metavar="COMMIT", help="measure this commit's kernels as well, in turn with these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", default="0/1", help="I/N: the I-th of N shares of the workloads")
    parser.add_argument("--list", action="store_true", help="print what would be run, in order, and stop")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Exit status 0 if there are rows; `clock.LOST` if the GPU is lost to this process."""
    options = _options(argv)
    entries = share([entry for entry in plan(workloads()) if re.search(options.match, entry[0].key)], options.share)
    if options.list:
        print("\n".join(f"{workload.key} | tier {tier}" for workload, tier in entries))
        return 0
    if reason := why_not():
        print(f"python -m bench: {reason}", file=sys.stderr)
        return 2

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    env = environment(argv)
    out: Path = options.out or folder(env)
    out.mkdir(parents=True, exist_ok=True)
    status = 0
    with contextlib.ExitStack() as stack:
        # Empty caches: a first call is then what its user waits for.
        cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastlayers-bench-", ignore_cleanup_errors=True))
        env["caches"] = os.environ.setdefault("TRITON_CACHE_DIR", f"{cache}/triton")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{cache}/inductor")
        server = None
        if options.base:
            server = base.Server(stack.enter_context(base.checkout(options.base)))
            stack.callback(server.close)
            env["base"] = _git("rev-parse", "--short=12", options.base)
        rows = Rows(out / "rows.jsonl", env)
        try:
            status = _measure_all(entries, options, env, server, rows)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
    if status == clock.LOST:
        return status
    env["clocks after"] = clock.gpu_state()
    report.write_results(out / "results.json", env, rows.rows)
    text = report.markdown({"environment": env, "rows": rows.rows})
    (out / "results.md").write_text(text)
    print(report.summary({"environment": env, "rows": rows.rows}))
    print(f"written: {out}")
    return 0 if rows.rows else 1


def _measure_all(
    entries: list[tuple[Workload, int]],
    options: argparse.Namespace,
    env: dict[str, Any],
    server: base.Server | None,
    rows: Rows,
) -> int:
    """What fits into the time of what `rows` hasn't got; `clock.LOST` where no more can be measured."""
    available = [provider for provider in PROVIDERS if provider.name not in env["absent"]]
    if options.providers:
        available = [provider for provider in available if provider.name in options.providers]
    device = torch.device("cuda", torch.cuda.current_device())
    budget = Budget(options.minutes)
    seen = {(row["workload"], row.get("tier")): row["entry"] for row in rows.rows}
    number, done = max(seen.values(), default=-1) + 1, 0
    for workload, tier in entries:
        if budget.over:
            break
        chosen = [p for p in available if p.tier <= tier and p.applies(workload)]
        if not budget.fits(tier) or (tier > 0 and not any(p.tier == tier for p in chosen)):
            continue
        if (workload.key, tier) in seen:
            continue
        with budget.spend(tier):
            try:
                found = measure(workload, chosen, device, options.seconds, server, options.seed)
            except Exception as error:  # the reference itself didn't fit, say
                found = [{"workload": workload.key, "provider": "-", "kind": "-", "void": None,
                          "failed": f"{type(error).__name__}: {error}"[:300]}]  # fmt: skip
            lost = clock.lost()
            if not lost:
                gc.collect()
                torch.cuda.empty_cache()
            if tier > 0:
                forget()
        rows.add(*[row | {"entry": number + done, "tier": tier} for row in found])
        done += 1
        print(report.line(found), flush=True)
        if lost:
            print(f"the GPU is lost: {lost}", file=sys.stderr)
            return clock.LOST
    print(f"{done} of {len(entries)} entries in {options.minutes:g} minutes" + f", {len(seen)} before" * bool(seen))
    return 0
