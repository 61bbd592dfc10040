"""Whole models: a training step and inference of each of `real_models`, in every way to run one.

    python -m bench models --plan [--match REGEX] [--update]     no GPU needed
    python -m bench models [--minutes 20] [--out DIR] [--match REGEX]

`--plan` says what each pass would launch, compute, move and save; with `--match` it names kernels and operators, and says what is
left to torch and why. Exit status 1 where a row isn't as committed in bench/models.json. `--update` makes the rows the committed
ones, and their table that of docs/measured.md. Models whose package isn't installed are named and left out; rows of other
versions of torch, triton and the package aren't compared.

Without it, the passes are timed on this machine's GPU: GPU time and wall time, the share of it that the GPU is idle, peak
memory and saved bytes. Every row is written as soon as it is measured (DIR/models.jsonl), and a table at the end (DIR/models.md).
In a DIR that has rows already it goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import clock, model_plan, run
from .packages import missing
from .providers import forget, seeded
from .real_models import MODELS, PASSES, WAYS, Model, Way

Row = dict[str, Any]

STRAYS = 0.02
"""How far a loss or result may be from eager torch's, relative to it: dropout and rounding apart, all ways compute the same."""


class Running:
    """A model on the GPU, made to run one way: takes the time of the first call and the memory, and then gives samples."""

    def __init__(self, model: Model, way: Way, training: bool, device: torch.device, seed: int):
        self._settings = functools.partial(way.settings, model)
        stream = torch.cuda.Stream()
        with self._settings(), torch.cuda.stream(stream), torch.set_grad_enabled(training):
            with seeded(device, seed):
                whole = model.whole(device).train(training)
                x, classes = model.inputs(device)
            given = (x, classes) if training else (x,)
            known = [*whole.parameters(), *whole.buffers(), *given]
            # The optimizer holds the parameters that stay, whatever `change` does.
            optimizer = torch.optim.SGD(whole.parameters(), lr=1e-5)
            forward = way.change(whole)

            def step() -> None:
                optimizer.zero_grad()
                forward(*given).backward()
                optimizer.step()

            call = step if training else functools.partial(forward, *given)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            result = forward(*given)
            torch.cuda.synchronize()
            self.row: Row = {"first_forward_s": round(time.perf_counter() - begin, 4)}
            self.row["size"] = result.detach().float().square().mean().sqrt().item()
            del result
            if training:
                with clock.saved_bytes(known) as saved:
                    result = forward(*given)
                    self.row["saved_bytes"] = saved()
                del result
            call()
            optimizer.zero_grad()
            with clock.peak_memory() as peak:
                call()
            self.row["peak_bytes"] = peak()
            self._clock = clock.Clock([call], stream)
        self.row["not_captured"] = self._clock.not_captured
        self._training = training

    def sample(self) -> clock.Sample:
        with self._settings(), torch.set_grad_enabled(self._training):
            return self._clock.sample()


def measure(name: str, direction: str, way: str, device: torch.device, seconds: float, seed: int) -> Row:
    """A row; one that says why, if the model can't be run so."""
    row: Row = {"model": name, "pass": direction, "way": way, "void": None, "before": clock.gpu_state()}
    try:
        running = Running(MODELS[name], WAYS[way], direction == "step", device, seed)
        samples = clock.round_robin({way: running.sample}, seconds)[way]
    except Exception as error:  # out of memory, not supported: the others go on
        return row | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    captured = [sample.gpu_ms for sample in samples if sample.gpu_ms is not None]
    wall = clock.summarize([sample.wall_us for sample in samples])
    gpu = clock.summarize(captured) if captured else None
    return row | running.row | {
        "gpu_ms": gpu._asdict() if gpu else None,
        "wall_us": wall._asdict(),
        "idle": max(0.0, 1 - 1e3 * gpu.p50 / wall.p50) if gpu else None,
        "samples": len(samples),
        "after": clock.gpu_state(),
    }  # fmt: skip


def judge(row: Row, others: list[Row]) -> None:
    """`others`: of the same model and pass. A row that computes something else than eager torch has no time."""
    right = next((other["size"] for other in others if other["way"] == "eager" and "size" in other), None)
    if right is not None and "size" in row and not abs(row["size"] - right) <= STRAYS * right:
        row["void"] = f"root mean square {row['size']:.4g}, eager torch's {right:.4g}"


def entries(match: str) -> Iterator[tuple[str, str, list[str]]]:
    """(model, pass, ways), of what can be run here and matches."""
    for name, model in MODELS.items():
        for direction in PASSES:
            ways = [
                way
                for way, how in WAYS.items()
                if how.why_not(name, model) is None and re.search(match, model_plan.label((name, direction, way)))
            ]
            if ways:
                yield name, direction, ways


def table(rows: list[Row]) -> str:
    """In Markdown."""
    heads = ("model", "pass", "way", "GPU ms", "wall ms", "GPU idle", "peak MB", "saved MB", "first forward s")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        where = [row["model"], row["pass"], row["way"]]
        wrong = row.get("failed") or row["void"]
        if wrong:
            cells = [f"no time: {wrong}", *[""] * 5]
        else:
            gpu, idle = row["gpu_ms"], row["idle"]
            cells = [
                f"{gpu['p50']:.2f}" if gpu else f"not captured: {row['not_captured']}",
                f"{row['wall_us']['p50'] / 1e3:.2f}",
                f"{idle:.0%}" if idle is not None else "-",
                f"{row['peak_bytes'] / 1e6:,.0f}",
                f"{row['saved_bytes'] / 1e6:,.0f}" if "saved_bytes" in row else "-",
                f"{row['first_forward_s']:.2f}",
            ]
        lines.append(f"| {' | '.join(where + cells)} |")
    return "\n".join(lines)


def time_all(options: argparse.Namespace, argv: list[str]) -> int:
    """Exit status 0 if something was measured; `clock.LOST` if the GPU is lost to this process."""
    device = torch.device("cuda", torch.cuda.current_device())
    env = run.environment(argv)
    out: Path = options.out or run.folder(env)
    out.mkdir(parents=True, exist_ok=True)
    budget, rows = run.Budget(options.minutes), run.Rows(out / "models.jsonl", env)
    lost = None
    with contextlib.suppress(KeyboardInterrupt):
        for name, direction, ways in run.share(list(entries(options.match)), options.share):
            found = [row for row in rows.rows if (row["model"], row["pass"]) == (name, direction)]
            for way in ways:
                tier = WAYS[way].tier
                if lost or not budget.fits(tier) or any(row["way"] == way for row in found):
                    continue
                with budget.spend(tier):
                    row = measure(name, direction, way, device, options.seconds, options.seed)
                    lost = clock.lost()
                    if not lost:
                        gc.collect()
                        torch.cuda.empty_cache()
                    forget()
                judge(row, found)
                found.append(row)
                rows.add(row)
    text = table(rows.rows)
    (out / "models.md").write_text(f"{env['gpu']}, {env['time'][:10]}, commit {env['commit']}\n\n{text}\n")
    print(f"{text}\nwritten: {out}")
    if lost:
        print(f"the GPU is lost: {lost}", file=sys.stderr)
        return clock.LOST
    return 0 if any("wall_us" in row for row in rows.rows) else 1


def plan(match: str, update: bool) -> int:
    made_with, committed = model_plan.read()
    rows: model_plan.Rows = {}
    wrong: list[str] = []
    for name, model in MODELS.items():
        chosen = [key for key in model_plan.planned() if key[0] == name and re.search(match, model_plan.label(key))]
        reason = missing(model.package) if chosen and model.package else None
        if reason:
            print(f"left out: {name}: {reason}", file=sys.stderr)
        elif chosen:
            found = {model_plan.label(key): model_plan.plan(*key) for key in chosen}
            rows |= found
            here = model_plan.versions(name)
            if update:
                made_with |= here
            elif all(made_with.get(package, version) == version for package, version in here.items()):
                wrong += [
                    f"{key}: {what}"
                    for key, row in found.items()
                    for what in model_plan.compare(row, committed.get(key))
                ]
            else:
                print(
                    f"not compared: {name}: this is {here}, the committed rows were made with {made_with}",
                    file=sys.stderr,
                )
    if not rows:
        print(f"no row of a model that is installed matches {match!r}", file=sys.stderr)
        return 1
    print(model_plan.table(rows))
    if match:
        print(f"\n{model_plan.details(rows)}")
    if update:
        model_plan.write(made_with, committed | rows)
        model_plan.document(model_plan.read()[1])
        print(
            f"wrote {len(rows)} rows into {model_plan.FILE.name}, and the table of all into docs/{model_plan.DOCS.name}"
        )
    for line in wrong:
        print(f"CHANGED {line}")
    if wrong:
        print("Where that is meant: python -m bench models --plan --update")
    return 1 if wrong else 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench models", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--plan", action="store_true", help="what would run, without running it; no GPU needed")
    parser.add_argument("--update", action="store_true", help="with --plan: make these rows the committed ones")
    parser.add_argument("--match", default="", help="only rows `model | pass | way` that match this regular expression")
    parser.add_argument("--minutes", type=float, default=20.0, help="stop after this time")
    parser.add_argument("--seconds", type=float, default=1.0, help="of samples for each row")
    parser.add_argument("--out", type=Path, help="the results' folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", default="0/1", help="I/N: the I-th of N shares of the models' passes")
    options = parser.parse_args(argv)
    if options.plan:
        return plan(options.match, options.update)
    if options.update:
        parser.error("--update goes with --plan")
    if reason := run.why_not():
        print(f"python -m bench models: {reason}\npython -m bench models --plan needs no GPU", file=sys.stderr)
        return 2
    return time_all(options, argv)
