"""What a pass through each of `real_models` would launch, compute, move and save on a GPU, without one.

Nothing is computed: the models run on meta tensors, at their full sizes and depths (`fastlayers.report`). The rows are held
against bench/models.json: every difference is one that somebody meant.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fastlayers

from .real_models import DTYPE, MODELS, PASSES, WAYS

Row = dict[str, Any]
Rows = dict[str, Row]

FILE = Path(__file__).parent / "models.json"
DOCS = Path(__file__).parent.parent / "docs" / "measured.md"
GPU = "H200"
"""For which tiles are picked."""
_PLANNED = {name: way for name, way in WAYS.items() if way.planned}
_NUMBERS = ("GFLOP", "FLOPs on kernels", "GB", "bytes on kernels", "saved MB")
_COUNTS = {"kernels": "launches of kernels", "operators": "torch's operators", "left to torch": "modules left to torch"}


def planned() -> Iterator[tuple[str, str, str]]:
    """(model, pass, way) of every row."""
    for name, model in MODELS.items():
        for way in _PLANNED:
            if _PLANNED[way].takes(name, model):
                yield from ((name, direction, way) for direction in PASSES)


def label(key: tuple[str, str, str]) -> str:
    return " | ".join(key)


def plan(name: str, direction: str, way: str) -> Row:
    """A row. FLOPs, bytes and saved bytes of a training step are those of its forward and backward, without the optimizer's."""
    model, training = MODELS[name], direction == "step"
    with _PLANNED[way].settings(model), torch.set_grad_enabled(training):
        whole: Any = _PLANNED[way].change(model.whole("meta").train(training))
        x, classes = model.inputs("cpu")
        given = (x, classes) if training else (x,)
        found = fastlayers.report(whole, *given, gpu=GPU, dtype=DTYPE, accelerate=False)
    reasons = Counter(line.why for line in found if not line.ours and line.why != "torch's operators")
    works = [line.work for line in found]
    return {
        "GFLOP": round(sum(work.flops for work in works) / 1e9, 1),
        "FLOPs on kernels": round(100 * found.flops, 1),
        "GB": round(sum(work.bytes for work in works) / 1e9, 2),
        "bytes on kernels": round(100 * found.bytes, 1),
        "saved MB": round(found.saved / 1e6, 1),
        "kernels": _sorted(found.kernels),
        "operators": _sorted(found.operators),
        "left to torch": _sorted(reasons),
    }


def _sorted(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def versions_of(name: str) -> list[str]:
    """The packages that a model's rows depend on besides this checkout."""
    return ["torch", "triton", *filter(None, [MODELS[name].package])]


def versions(name: str) -> dict[str, str]:
    """Of these packages, those that are installed."""
    return {package: importlib.metadata.version(package).partition("+")[0] for package in versions_of(name)}


def read(path: Path = FILE) -> tuple[dict[str, str], Rows]:
    """The versions that the committed rows were made with, and the rows."""
    found = json.loads(path.read_text()) if path.exists() else {"versions": {}, "rows": {}}
    return found["versions"], found["rows"]


def write(made_with: dict[str, str], rows: Rows, path: Path = FILE) -> None:
    """One row a line."""
    order = [label(key) for key in planned()]
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(rows[key])}" for key in order if key in rows)
    path.write_text(f'{{"versions": {json.dumps(_sorted(made_with))}, "rows": {{\n{lines}\n}}}}\n')  # type: ignore[arg-type]


def document(rows: Rows, path: Path = DOCS) -> None:
    """Put the table in the place of the one in docs/measured.md."""
    before, _, rest = path.read_text().partition("\n| model | pass |")
    after = rest.partition("\n\n")[2]
    path.write_text(f"{before}\n{table(rows)}\n\n{after}")


def compare(row: Row, base: Row | None) -> list[str]:
    """In words, what is different about a row than about the committed one."""
    if base is None:
        return ["is new"]
    found = [f"{name}: {row[name]}, was {base[name]}" for name in _NUMBERS if row[name] != base[name]]
    for name, what in _COUNTS.items():
        now, then = Counter(row[name]), Counter(base[name])
        if now != then:
            more = [f"{n} more of {key!r}" for key, n in sorted((now - then).items())]
            fewer = [f"{n} fewer of {key!r}" for key, n in sorted((then - now).items())]
            found.append(f"{what}: {now.total()}, were {then.total()}: {', '.join(more + fewer)}")
    return found


def table(rows: Rows) -> str:
    """In Markdown: a line for each model and pass, in each cell a number for each way."""
    ways = " / ".join(_PLANNED)
    ours = " / ".join(way for way in _PLANNED if _PLANNED[way].kind == "ours")
    heads = (
        "model", "pass", "GFLOP", f"% of FLOPs on kernels: {ours}", f"% of bytes on kernels: {ours}",
        f"saved MB: {ways}", f"launches of kernels + torch's operators: {ways}",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name in MODELS:
        for direction in PASSES:
            of = {way: rows.get(label((name, direction, way))) for way in _PLANNED}
            if not any(of.values()):
                continue

            def each(what: Any, only_ours: bool, of: dict[str, Row | None] = of) -> str:
                chosen = [of[way] for way in _PLANNED if _PLANNED[way].kind == "ours" or not only_ours]
                return " / ".join("-" if row is None else what(row) for row in chosen)

            cells = (
                f"{name}, {'x'.join(map(str, MODELS[name].shape))}", direction,
                f"{max(row['GFLOP'] for row in of.values() if row):,.0f}",
                each(lambda row: f"{row['FLOPs on kernels']:.0f}", True),
                each(lambda row: f"{row['bytes on kernels']:.0f}", True),
                each(lambda row: f"{row['saved MB']:,.0f}", False),
                each(lambda row: f"{sum(row['kernels'].values())} + {sum(row['operators'].values())}", False),
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def details(rows: Rows) -> str:
    """The kernels and torch's operators by name, and why modules are left to torch."""
    lines = []
    for key, row in rows.items():
        lines.append(key)
        for name, what in _COUNTS.items():
            named = ", ".join(f"{n} {item}" for item, n in row[name].items())
            lines.append(f"    {what}: {named or 'none'}")
    return "\n".join(lines)
