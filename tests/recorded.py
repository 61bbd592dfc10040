"""Tests on a GPU that no kernel has run on yet, where one test can end the process of many: each is written down as it begins and
as it ends.

`pytest --record FILE` runs the tests that need a GPU or take a `device`, the most different ones first, and leaves out those that
FILE has. A kernel that reads where there is no memory costs its process the GPU, and one that waits for ever costs the time: the
process ends then, and the next one that is begun with the same FILE goes on with the other tests. `bench/on_gpu.sh` does that,
with a process and a FILE for each of several shares of the tests. `python tests/recorded.py [--kernels] FILE...` says what is in
them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ptx_machine import coverage

Line = dict[str, Any]

LOST = 3
"""The exit status of a process that can't use the GPU any more."""


def read(path: Path) -> list[Line]:
    """The lines of a file, but for one that was cut off."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def ended(lines: Iterable[Line]) -> dict[str, Line]:
    """By test, how it ended. One of whose end there is no line before another process began has ended its own process: it hung
    for too long, or crashed. Where {"stopped": ...} says that time was up, it is to be run again."""
    found: dict[str, Line] = {}
    begun: str | None = None
    for line in lines:
        if "process" in line and begun is not None:
            found[begun] = {
                "test": begun,
                "outcome": "died",
                "error": "the process ended: a hang or a crash",
                "kernels": [],
            }
        if "process" in line or "stopped" in line:
            begun = None
        elif "outcome" in line:
            found[line["test"]], begun = line, None
        elif "test" in line:
            begun = line["test"]
    return found


def _gpu_is_lost() -> str | None:
    """What the GPU says of what it was asked to do so far. After an illegal access, every later call fails."""
    import torch

    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


class Recorder:
    """Of one process: a plugin of pytest."""

    def __init__(self, path: Path, seconds: float):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._done = ended([*read(path), {"process": None}])
        self._file = path.open("a", buffering=1)
        self._hangs = path.with_suffix(".hangs").open("a")
        self._seconds = seconds
        self._reports: list[pytest.TestReport] = []
        self._write({"process": os.getpid()})

    def _write(self, line: Line) -> None:
        self._file.write(json.dumps(line) + "\n")

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """The first of each function and layer, then the second of each, and so on; those marked slow after all others."""
        count: Counter[tuple[str, str]] = Counter()
        rank: dict[pytest.Item, tuple[bool, int]] = {}
        for item in items:
            what = item.nodeid.split("[")[0], item.name.partition("[")[2].split("-")[0]
            rank[item] = "slow" in item.keywords, count[what]
            count[what] += 1
        wanted = [i for i in items if "device" in getattr(i, "fixturenames", ()) or "gpu" in i.keywords]
        wanted = [i for i in wanted if i.nodeid not in self._done]
        config.hook.pytest_deselected(items=[i for i in items if i not in set(wanted)])
        items[:] = sorted(wanted, key=rank.__getitem__)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._write({"test": item.nodeid})
        self._reports = []
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._hangs)
        begin = time.perf_counter()
        with _counted() as kernels:
            try:
                return (yield)
            finally:
                lost = _gpu_is_lost()
                faulthandler.cancel_dump_traceback_later()
                wrong = next((r for r in self._reports if r.failed), None)
                skipped = any(r.skipped for r in self._reports)
                line = {
                    "test": item.nodeid,
                    "outcome": "failed" if wrong or lost else "skipped" if skipped else "passed",
                }
                line |= {"seconds": round(time.perf_counter() - begin, 3), "kernels": sorted(kernels)}
                if wrong or lost:
                    line["error"] = "\n".join([wrong.longreprtext[-4000:] if wrong else "", lost or ""]).strip()
                if lost:
                    line["lost"] = lost
                self._write(line)
                if lost:
                    os._exit(LOST)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            self._write({"finished": int(exitstatus)})


@contextlib.contextmanager
def _counted() -> Iterator[Counter[str]]:
    """Within, the kernels that are launched, replayed ones as well."""
    from fastlayers.kernels.runtime import launch

    counter: Counter[str] = Counter()
    before = launch.counters
    launch.counters = (*before, counter)
    try:
        yield counter
    finally:
        launch.counters = before


def known_kernels() -> set[str]:
    """The names of all kernels, as `launch.name_of` has them."""
    return {name.strip("_") for name in coverage.kernels()}


def _why(line: Line) -> str:
    """The line of a traceback that says what was wrong."""
    text = line.get("error", "").splitlines()
    said = [part[1:].strip() for part in text if part.startswith("E ")]
    return (line.get("lost") or next(iter(said or text[-1:]), "")).splitlines()[0][:200]


def tests_of(files: Iterable[Path]) -> dict[str, Line]:
    """By test, how it ended, of all files."""
    return {name: line for path in files for name, line in ended(read(path)).items()}


def summary(found: dict[str, Line], most: int = 40) -> str:
    """How many ended how, and why each of those that failed did."""
    outcomes = Counter(line["outcome"] for line in found.values())
    wrong = [line for line in found.values() if line["outcome"] in ("failed", "died")]
    lines = [f"tests: {', '.join(f'{outcomes[o]} {o}' for o in ('passed', 'failed', 'died', 'skipped'))}"]
    lines += [f"  {line['outcome'].upper()} {line['test']}: {_why(line)}" for line in wrong[:most]]
    if len(wrong) > most:
        lines.append(f"  and {len(wrong) - most} more")
    return "\n".join(lines)


def kernels(found: dict[str, Line]) -> str:
    """Which were launched, and in tests that ended how."""
    launched = {kernel for line in found.values() for kernel in line["kernels"]}
    right = {kernel for line in found.values() if line["outcome"] == "passed" for kernel in line["kernels"]}
    wrong = {kernel for line in found.values() if line["outcome"] == "failed" for kernel in line["kernels"]}
    known = known_kernels()
    lines = [
        f"kernels: {len(launched & known)} of {len(known)} launched, {len(right & known)} of them in tests that passed"
    ]
    for what, names in (
        ("in failing tests alone", wrong - right),
        ("in failing tests as well", wrong & right),
        ("not launched", known - launched),
    ):
        if names:
            lines.append(f"  {what}: {', '.join(sorted(names))}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Exit status 1 if a test failed, or none passed."""
    found = tests_of(Path(argument) for argument in arguments if argument != "--kernels")
    print(kernels(found) if "--kernels" in arguments else summary(found))
    outcomes = Counter(line["outcome"] for line in found.values())
    return 1 if outcomes["failed"] or outcomes["died"] or not outcomes["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
