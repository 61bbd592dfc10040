"""What one call costs on the CPU, against torch's: dispatch, autograd.Function, launcher, everything but the driver.

    python -m bench host [--match linear] [--rounds 60] [--json FILE]

Needs no GPU. Kernels are compiled for sm_90 and launched by Triton's own Python, down to the call into the CUDA driver,
which does nothing here; the tensors lie in the CPU's memory and nothing is computed for ours. torch's calls run on the
same small CPU tensors and do compute: a few hundred nanoseconds of arithmetic that its CUDA calls don't have, in place of
the cuBLAS heuristics and the driver's launches that they do have and that are missing here for both. So compare the
ratios of one machine, and don't take the microseconds for those of a GPU.

All calls of a table are timed in one process, in turns, in batches of many calls, by the thread's CPU time; a cell is
the median of the batches with their 20th and 80th percentile, a ratio the median of those of neighbouring batches: a busy
machine slows both.
"""

import argparse
import contextlib
import functools
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

import fastlayers
import fastlayers.functional as FL
from fastlayers import nn
from fastlayers._torch import unseen
from fastlayers.catalog import ROWS, Case, Floats
from fastlayers.catalog.row import case
from fastlayers.dispatch import support
from fastlayers.kernels.runtime import launch as _launch
from fastlayers.kernels.runtime import tiles as _tiles
from fastlayers.ops import linear as linear_op

from . import networks

_LAUNCHES_FROM_PYTHON = hasattr(nvidia, "PyKernelArg")


class _NoLauncher:
    """Where Triton (3.6) would compile a launcher in C for each kernel, which needs CUDA's library."""

    def __init__(self, src: Any, metadata: Any):
        pass

    def __call__(self, *args: Any) -> None:
        pass


class _Utils:
    """What Triton's launcher calls of its C: everything but the last call is its own."""

    def load_binary(self, *args: Any) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132}

    def build_signature_metadata(self, signature: Any) -> bytes:
        return b""

    def launch(self, *args: Any) -> None:
        pass

    def fill_tma_descriptor_tiled(self, *args: Any) -> tuple[Any, ...]:
        return args

    fill_tma_descriptor = fill_tma_descriptor_tiled  # triton 3.6's name


class StubDriver:
    """A Hopper GPU that is the CPU: its tensors are the CPU's, its launches do nothing."""

    def __init__(self) -> None:
        self.utils = _Utils()
        self.launcher_cls: Any = nvidia.CudaLauncher if _LAUNCHES_FROM_PYTHON else _NoLauncher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1  # what a CPU tensor's get_device() says

    def get_current_stream(self, device: Any = None) -> int:
        return 0


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """Within, the kernels take CPU tensors, compile for sm_90, and are launched into the void."""
    if _launch.INTERPRETED:
        raise RuntimeError("under TRITON_INTERPRET=1 there is no launch to time")
    annotation = getattr(nvidia, "PyKernelArg", None)  # a class in C, loaded with CUDA's library
    before = support.unsupported_device, _tiles.device, driver._active
    support.unsupported_device = lambda device: None
    _tiles.device = lambda device: _tiles.Device("sm_90", 132)  # type: ignore[assignment]
    nvidia.PyKernelArg = lambda **_: None  # type: ignore[assignment]
    driver.set_active(StubDriver())  # type: ignore[arg-type]
    try:
        yield
    finally:
        support.unsupported_device, _tiles.device, driver._active = before
        nvidia.PyKernelArg = annotation


@dataclass(frozen=True)
class Pair:
    """The same work by torch and by us, and how often torch's time ours may be (None: no goal)."""

    name: str
    theirs: Callable[[], object]
    ours: Callable[[], object]
    goal: float | None = None


def _no_grad(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def _backward(call: Callable[[], Any], leaves: Sequence[torch.Tensor]) -> Callable[[], object]:
    """Forward and backward, from all results (a recurrent layer's states, a rotated query and key)."""

    def results() -> list[torch.Tensor]:
        returned = call()
        if isinstance(returned, torch.Tensor):  # without the cost of looking for others
            return [returned]
        return [y for y in tree_leaves(returned) if isinstance(y, torch.Tensor) and y.requires_grad]

    dy = [torch.randn_like(y) for y in results()]

    def step() -> None:
        torch.autograd.backward(results(), dy)
        for leaf in leaves:
            leaf.grad = None

    return step


def _arguments(case: Case, grad: bool) -> list[Any]:
    """The inputs, those of random numbers as leaves of autograd's graph if `grad`."""
    arguments = case.arguments(torch.float32)
    for given, argument in zip(case.inputs, arguments, strict=True):
        if grad and isinstance(given, Floats):
            argument.requires_grad_()
    return arguments


def _call_within(case: Case, function: str) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments with which torch.nn's layer calls torch.nn.functional's `function`; None if it doesn't call it."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    original = getattr(F, function)

    def note(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return original(*args, **kwargs)

    setattr(F, function, note)
    try:
        case.make(torch.nn)(*_arguments(case, grad=True))
    finally:
        setattr(F, function, original)
    return seen[0] if seen else None


def _function(name: str, case: Case, function: str) -> list[Pair]:
    """Forward without and with a graph, forward and backward of the function that a layer calls."""
    found = _call_within(case, function)
    if found is None:
        return []
    args, kwargs = found

    def with_leaves(grad: bool) -> tuple[list[Any], dict[str, Any], list[torch.Tensor]]:
        leaves: list[torch.Tensor] = []

        def leaf(given: Any) -> Any:
            if not (isinstance(given, torch.Tensor) and given.requires_grad):
                return given
            leaves.append(given.detach().clone().requires_grad_(grad))
            return leaves[-1]

        return [leaf(given) for given in args], {key: leaf(given) for key, given in kwargs.items()}, leaves

    def calls(grad: bool) -> tuple[Callable[[], Any], Callable[[], Any], list[torch.Tensor]]:
        given, named, leaves = with_leaves(grad)
        theirs, ours = getattr(F, function), getattr(FL, function)
        return functools.partial(theirs, *given, **named), functools.partial(ours, *given, **named), leaves

    plain, recorded = calls(False), calls(True)
    steps = [_backward(call, recorded[2]) for call in recorded[:2]]
    return [
        Pair(f"{name} forward", *plain[:2], goal=1.3),
        Pair(f"{name} forward, graph recorded", *recorded[:2], goal=1.3),
        Pair(f"{name} forward + backward", *steps, goal=1.2),
    ]


def _layer(name: str, case: Case) -> list[Pair]:
    """The same of a layer, as most call it. Only its parameters have gradients, or its inputs if it has none."""

    def made(space: Any, grad: bool) -> tuple[Callable[[], Any], Sequence[torch.Tensor]]:
        layer = case.make(space)
        parameters = [*layer.parameters()] if isinstance(layer, torch.nn.Module) else []
        for parameter in parameters:
            parameter.requires_grad_(grad)
        arguments = _arguments(case, grad and not parameters)
        leaves = parameters or [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
        return functools.partial(layer, *arguments), leaves

    frozen = [made(space, False)[0] for space in (torch.nn, nn)]
    steps = [_backward(*made(space, True)) for space in (torch.nn, nn)]
    return [
        Pair(f"{name} layer forward", *frozen, goal=1.3),
        Pair(f"{name} layer forward + backward", *steps, goal=1.2),
    ]


_SIZES = {
    "Linear": ("linear", case(lambda space: space.Linear(16, 16), (8, 16))),
    "Conv2d": ("conv2d 1x1", case(lambda space: space.Conv2d(4, 4, 1), (2, 4, 4, 4))),
    "ReLU": ("relu", case(lambda space: space.ReLU(), (8, 16))),
    "Softmax": ("softmax", case(lambda space: space.Softmax(-1), (8, 16))),
}
"""Names and sizes that earlier commits have been timed with, so that figures can be compared. Of every other row of the catalog
the first case is timed."""


def _mlp(space: Any, *widths: int) -> torch.nn.Module:
    a, b, c, d = widths
    return space.Sequential(space.Linear(a, b), space.ReLU(), space.Linear(b, c), space.ReLU(), space.Linear(c, d))


def pairs() -> list[Pair]:
    """What is timed: each row of the catalog as a function and as a layer, and what rows can't say."""
    found: list[Pair] = []
    functions = set()  # several layers may call the same one
    for row in ROWS:
        name, small = _SIZES.get(row.name, (row.function, next(iter(row.cases.values()))))
        if hasattr(F, str(row.function)) and row.function not in functions:
            functions.add(row.function)
            found += _function(str(name), small, str(row.function))
        found += _layer(row.name, small)
    return found + _special()


def _special() -> list[Pair]:
    """Autocast, a network, a fused block, and a call that is left to torch. The tutorial MLP: ours at its real sizes, torch's at
    sizes that the CPU computes in no time."""
    found, r = [], torch.randn
    tensors = [r(8, 16), *(torch.nn.Parameter(r(shape)) for shape in ((16, 16), (16,)))]

    def autocast(function: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(*tensors)

        return call

    recorded = [autocast(function) for function in (F.linear, FL.linear)]
    steps = [_backward(call, tensors[1:]) for call in recorded]
    found.append(Pair("linear, autocast, forward, graph recorded", recorded[0], recorded[1], 1.3))
    found.append(Pair("linear, autocast, forward + backward", steps[0], steps[1], 1.2))
    theirs, ours = _mlp(torch.nn, 16, 16, 16, 8), _mlp(nn, 784, 512, 512, 10)
    x, y = r(8, 16), r(64, 784)
    found.append(
        Pair("tutorial MLP forward", _no_grad(lambda: theirs(x)), _no_grad(lambda: ours(y)), 1.0),
    )
    block, fused = (networks.bottleneck(space, 16, 4, 1).eval() for space in (torch.nn, nn))
    fused, image = fastlayers.fuse(fused), r(1, 16, 2, 2)
    found.append(Pair("ResNet block in eval, fused", _no_grad(lambda: block(image)), _no_grad(lambda: fused(image))))
    steps = [_backward(lambda m=m, v=v: m(v), list(m.parameters())) for m, v in ((theirs, x), (ours, y))]
    found.append(Pair("tutorial MLP forward + backward", steps[0], steps[1], 1.0))
    plain = r(8, 16), r(16, 16), r(16)

    def refused() -> torch.Tensor:
        with fastlayers.policy("torch"):
            return FL.linear(*plain)

    found.append(Pair("linear by torch, dispatched by us", lambda: F.linear(*plain), refused))
    return found


def parts() -> dict[str, Callable[[], object]]:
    """What `linear forward` is made of: the pieces, each called as the call itself does."""
    x, w, b = torch.randn(8, 16), torch.randn(16, 16), torch.randn(16)
    tensors = (x, w, b)
    for _ in range(3):
        FL.linear(*tensors)
    options = (linear_op._ALONE, True, "ieee")
    forward = linear_op._linear._forward
    find, check = forward.find, forward.signatures[x.shape, options][0].check
    found = find(tensors, options)
    assert found is not None
    recording, addresses, _ = found
    allocate = _launch.allocate_quickly["cpu"]
    return {
        "the whole call": lambda: FL.linear(*tensors),
        "does anybody watch?": unseen,
        "recognising the tensors": lambda: find(tensors, options),
        "of that, the guards": lambda: check(*tensors),
        "allocating the output": lambda: allocate((8, 16), (16, 1), torch.float32),
        "that and the launch, Triton's C stubbed": lambda: recording.script(allocate, 0, tensors, addresses),
        "the replay, with both": lambda: recording.play(tensors, addresses),
        "a call of an empty function (in each row)": lambda: None,
        "for comparison: the launch without a replay": lambda: forward.work(tensors, *options),
    }


@dataclass(frozen=True)
class Time:
    """Microseconds a call, batch by batch."""

    batches: tuple[float, ...]

    @property
    def p20(self) -> float:
        return statistics.quantiles(self.batches, n=5, method="inclusive")[0]

    @property
    def median(self) -> float:
        return statistics.median(self.batches)

    @property
    def p80(self) -> float:
        return statistics.quantiles(self.batches, n=5, method="inclusive")[3]

    def over(self, other: "Time") -> float:
        return statistics.median(a / b for a, b in zip(self.batches, other.batches, strict=True))

    def summary(self) -> dict[str, float]:
        return {"p20": self.p20, "median": self.median, "p80": self.p80}

    def __str__(self) -> str:
        return f"{self.median:7.2f} ({self.p20:.2f} - {self.p80:.2f})"


def measure(calls: list[Callable[[], object]], rounds: int, milliseconds: float = 2.0) -> list[Time]:
    """The time of each call, all taking turns `rounds` times in batches of about so many milliseconds."""
    clock, batches = time.thread_time_ns, []
    for call in calls:
        for _ in range(20):
            call()
        begin = clock()
        for _ in range(20):
            call()
        batches.append(max(1, int(20 * milliseconds * 1e6 / (clock() - begin))))
    samples: list[list[float]] = [[] for _ in calls]
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for call, count, times in zip(calls, batches, samples, strict=True):
                begin = clock()
                for _ in range(count):
                    call()
                times.append((clock() - begin) / count / 1e3)
            gc.collect(0)
    finally:
        if was_enabled:
            gc.enable()
    return [Time(tuple(times)) for times in samples]


def main(argv: list[str]) -> int:
    """Print both tables. Exit status 0 whatever the figures are: a shared machine is no judge."""
    parser = argparse.ArgumentParser(prog="python -m bench host", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=60, help="at least 2")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(argv)
    if _launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: there is no launch to time")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with stubbed(), fastlayers.policy("auto"):
            chosen = [pair for pair in pairs() if options.match in pair.name]
            times = measure([call for pair in chosen for call in (pair.theirs, pair.ours)], max(options.rounds, 2))
            pieces = parts()
            piece_times = dict(zip(pieces, measure(list(pieces.values()), max(options.rounds, 2)), strict=True))
    finally:
        torch.set_num_threads(threads)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"us a call, median (p20 - p80)\n{'':40} {'torch':>24} {'ours':>24}  ratio  goal")
    rows = []
    for pair, theirs, ours in zip(chosen, times[::2], times[1::2], strict=True):
        ratio = ours.over(theirs)
        goal = "" if pair.goal is None else f"{pair.goal:.1f}"
        print(f"{pair.name:40} {theirs!s:>24} {ours!s:>24}  {ratio:5.2f}  {goal:>4}")
        rows.append(
            {"case": pair.name, "torch": theirs.summary(), "ours": ours.summary(), "ratio": ratio, "goal": pair.goal}
        )
    print("\nwhat `linear forward` is made of")
    for name, spent in piece_times.items():
        print(f"{name:46} {spent}")
    if options.json:
        environment = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
        made_of = {name: spent.summary() for name, spent in piece_times.items()}
        everything = {"environment": environment, "cases": rows, "parts": made_of}
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
