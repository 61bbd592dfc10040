"""Tiles: how large a part of the result one program of a kernel computes, with how many warps and loads in flight.

Every kernel has a table of tiles, which stands beside it, and a pure function that picks a row of it from sizes, dtype and GPU
model. Nothing is tuned at run time, so that the first call costs no benchmark and the same call always computes the same
numbers. No GPU has been asked yet whether the picks are the fastest ones: they follow from what compiles without spills and
from filling the multiprocessors.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv is the same, for kernels too, and 6 us a call for it."""
    return -(-a // b)


@dataclass(frozen=True)
class Tile:
    """m x n outputs at a time, k of the sum per step; `warps` warps; `stages` of loads in flight."""

    m: int
    n: int
    k: int = 1
    warps: int = 4
    stages: int = 3

    @property
    def fills_registers(self) -> bool:
        """Whether a float32 accumulator of m x n takes half of all registers a thread may have, or more."""
        return self.m * self.n >= 128 * 32 * self.warps


@dataclass(frozen=True)
class Device:
    """What a pick needs to know of a GPU. `architecture`: "sm_90", "gfx942" ... or "interpreter"."""

    architecture: str
    multiprocessors: int

    @property
    def most_warps(self) -> int:
        """The warps of 1024 threads, which is the most that a program may have. AMD's CDNA has 64 threads in each."""
        return 16 if self.architecture.startswith("gfx9") else 32


@functools.lru_cache
def device(device: torch.device) -> Device:
    """The Device a tensor lives on. Asked at a launch, never at import."""
    if device.type == "cpu":
        return Device("interpreter", 1)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Device(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """The Triton dtype of an accumulator."""
    return {torch.float32: tl.float32, torch.float64: tl.float64}[dtype]


forced: dict[str, Any] = {}
"""Rows by the name of their table that are used instead of the picks: what `force` sets."""


@contextlib.contextmanager
def force(**rows: Any) -> Iterator[None]:
    """Use these rows, by the names of their tables, instead of the picks; `matmul` takes a Product, all others a Tile. For
    tests and tuning."""
    before = dict(forced)
    forced.update(rows)
    try:
        yield
    finally:
        forced.clear()
        forced.update(before)


Question = tuple[str, tuple[Any, ...]]
"""The name of a table, and all of its rows that are right for the launch."""


class _Listener:
    def __init__(self, answers: Mapping[int, Any]):
        self.answers = answers
        self.questions: list[Question] = []


_listener: _Listener | None = None


@contextlib.contextmanager
def listen(answers: Mapping[int, Any] | None = None) -> Iterator[list[Question]]:
    """Note which tables are asked, in order. With this every row that a call might use can be compiled: listen to the call
    once, then once more for each row of each question, with that row as the answer.

    Args:
        answers: rows to use instead of the picks, by the number of the question.
    """
    global _listener
    before, _listener = _listener, _Listener(answers or {})
    try:
        yield _listener.questions
    finally:
        _listener = before


def ask(table: str, rows: Callable[[], Iterable[Any]]) -> Any | None:
    """The row that a launch has to use because somebody forces it; None if the caller may pick one.

    Args:
        rows: all rows of the table that are right for this launch.
    """
    if _listener is not None:
        number = len(_listener.questions)
        _listener.questions.append((table, tuple(dict.fromkeys(rows()))))
        if number in _listener.answers:
            return _listener.answers[number]
    return forced.get(table)
