"""Time on a GPU, by two clocks, and what a set of samples says.

- GPU time: a CUDA graph of many calls over several sets of inputs is replayed, between two events. No host in it.
- Wall time: the calls are made from Python, as a program would, with the queue never longer than a few dozen; and how
  long of that Python itself was busy.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

LEAST_ROUNDS, MOST_ROUNDS = 9, 50


class Summary(NamedTuple):
    """Median and the percentiles around it."""

    p20: float
    p50: float
    p80: float


def summarize(samples: Sequence[float]) -> Summary:
    """Percentiles, interpolated between neighbours.

    Raises:
        ValueError: without samples.
    """
    if not samples:
        raise ValueError("no samples")
    if len(samples) == 1:
        return Summary(samples[0], samples[0], samples[0])
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return Summary(tenths[1], tenths[4], tenths[7])


def geomean(ratios: Sequence[float]) -> float:
    """The mean of ratios: twice as fast and half as fast make 1."""
    return statistics.geometric_mean(ratios)


def set_count(bytes_of_one: int, l2: int, memory: int) -> int:
    """How many sets of inputs to rotate among: at least three, and more than three times the L2 together, so that a call
    finds nothing in it that an earlier one left; but within `memory` bytes and 256 sets, whose making costs time."""
    enough = max(3, 3 * l2 // max(bytes_of_one, 1) + 1)
    return max(1, min(enough, 256, memory // max(bytes_of_one, 1)))


class Sample(NamedTuple):
    """Of one call: milliseconds of GPU time (None if it couldn't be captured), microseconds of wall and of host time."""

    gpu_ms: float | None
    wall_us: float
    host_us: float


class Clock:
    """Measures one provider's calls; made once, then asked for samples in turn with the other providers' clocks.

    Args:
        calls: one for each set of inputs, which do the same work.
        stream: where their forward passes ran, as a captured backward must run where its forward did.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], stream: torch.cuda.Stream):
        self._calls, self._stream = calls, stream
        self.not_captured: str | None = None
        with torch.cuda.stream(stream):
            for call in calls:
                call()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for call in calls[:3]:
                call()
            torch.cuda.synchronize()
            once = max((time.perf_counter() - begin) / len(calls[:3]), 1e-6)
            self._wall_calls = max(3, min(50, int(0.01 / once)))
            rounds = max(1, min(int(1e-3 / (once * len(calls))), 512 // len(calls)))
            self._graph_calls = rounds * len(calls)
            self._graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self._graph, stream=stream):
                    for _ in range(rounds):
                        for call in calls:
                            call()
            except Exception as error:  # a provider that synchronises or allocates oddly: its wall time still counts
                self.not_captured = f"{type(error).__name__}: {error}"[:200]
                torch.cuda.synchronize()
        self.sample()

    def sample(self) -> Sample:
        """One sample by each clock. Of a stretch of calls, for a single one is below what events resolve."""
        gpu = None
        with torch.cuda.stream(self._stream):
            if self.not_captured is None:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                self._graph.replay()
                end.record()
                torch.cuda.synchronize()
                gpu = start.elapsed_time(end) / self._graph_calls
        return Sample(gpu, *self.calls())

    def calls(self) -> tuple[float, float]:
        """Microseconds of wall and of host time, each of one call among a few dozen."""
        with torch.cuda.stream(self._stream):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for i in range(self._wall_calls):
                self._calls[i % len(self._calls)]()
            issued = time.perf_counter()
            torch.cuda.synchronize()
            done = time.perf_counter()
        return 1e6 * (done - begin) / self._wall_calls, 1e6 * (issued - begin) / self._wall_calls


def round_robin(
    subjects: dict[str, Callable[[], Sample]], seconds: float, now: Callable[[], float] = time.perf_counter
) -> dict[str, list[Sample]]:
    """Samples of every subject in turn, so that what drifts (clocks, temperature, neighbours) hits all alike: at least
    nine rounds, at most fifty, as many as the seconds allow."""
    samples: dict[str, list[Sample]] = {name: [] for name in subjects}
    begin = now()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and now() - begin > seconds:
            break
        for name, sample in subjects.items():
            samples[name].append(sample())
    return samples


def query(*names: str) -> list[str]:
    """What nvidia-smi says of the current GPU; empty where it can't."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    command = [tool, f"--id={index}", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (subprocess.SubprocessError, OSError):
        return []
    return [value.strip() for value in done.stdout.strip().split(",")]


_STATE = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def gpu_state() -> dict[str, float]:
    """MHz, W and degrees Celsius as they are now, as far as they can be read: by NVIDIA's library, where its package is
    installed, for nvidia-smi may take a second, which every row would pay twice."""
    state: dict[str, float] = {}
    with contextlib.suppress(Exception):  # the package may be missing, or may not find the library
        state["clocks.sm"] = float(torch.cuda.clock_rate())
        state["power.draw"] = torch.cuda.power_draw() / 1e3
        state["temperature.gpu"] = float(torch.cuda.temperature())
        return state
    for name, value in zip(_STATE, query(*_STATE), strict=False):
        with contextlib.suppress(ValueError):  # "[N/A]"
            state[name] = float(value)
    return state


LOST = 3
"""The exit status of a process that can't use the GPU any more, while another one could."""


def lost() -> str | None:
    """Why nothing will work from now on: after an illegal access, say, every call of this process fails."""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Within, and after it: the bytes allocated beyond those that were there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    def peak() -> int:
        return torch.cuda.max_memory_allocated() - before

    yield peak
    torch.cuda.synchronize()


@contextlib.contextmanager
def saved_bytes(known: Sequence[torch.Tensor]) -> Iterator[Callable[[], int]]:
    """Within: the bytes that autograd keeps for backward, each storage once, without those of `known`, which are there
    anyway."""
    skip = {tensor.untyped_storage().data_ptr() for tensor in known}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage: Any = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(found.values())
