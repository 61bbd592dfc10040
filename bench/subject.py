"""One provider at one workload: its sets of inputs, its calls, its errors, its memory."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastlayers.testing import budget

from . import clock
from .providers import PROVIDERS, Provider, draw
from .workloads import Workload, precision

Tensors = list[torch.Tensor]


@dataclass
class Set:
    """A module with an input and what comes from above in backward; `run` is one call of the workload's pass."""

    module: torch.nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]
    x: torch.Tensor
    wanted: Tensors
    dy: torch.Tensor | None = None
    y: torch.Tensor | None = None
    optimizer: torch.optim.Optimizer | None = None

    def only_forward(self) -> torch.Tensor:
        with torch.no_grad():
            return self.forward(self.x)

    def backward(self) -> tuple[torch.Tensor, ...]:
        assert self.y is not None
        return torch.autograd.grad(self.y, self.wanted, self.dy, retain_graph=True)

    def both(self) -> tuple[torch.Tensor, ...]:
        y = self.forward(self.x)
        return (y, *torch.autograd.grad(y, self.wanted, self.dy))

    def step(self) -> torch.Tensor:
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        loss = self._loss()
        loss.backward()
        self.optimizer.step()
        return loss

    def _loss(self) -> torch.Tensor:
        y = self.forward(self.x).flatten(1)
        assert self.dy is not None
        return F.cross_entropy(y.float() if y.dtype != torch.float64 else y, self.dy)

    def results(self, direction: str) -> Tensors:
        """What the errors are read off: the output, or all gradients besides, or the gradients of the loss."""
        if direction == "forward":
            return [self.only_forward()]
        if direction == "step":
            return list(torch.autograd.grad(self._loss(), self.wanted))
        return list(self.both())


@functools.cache
def _output_shape(workload: Workload) -> torch.Size:
    with torch.device("meta"):
        return workload.make(torch.nn)(torch.empty(workload.shape)).shape


def make_set(provider: Provider, workload: Workload, device: torch.device, seed: int, exact: bool = False) -> Set:
    """The same weights and inputs for the same seed, whoever the provider; `exact`: in float64."""
    module = provider.module(workload, device, seed)
    x = provider.input(workload, device, seed + 1)
    if exact:
        module, x = module.double(), x.double()
    step = workload.direction == "step"
    x.requires_grad_(not step and workload.direction != "forward")
    if workload.direction == "forward":
        return Set(module, provider.bind(module, workload), x, [])
    wanted: Tensors = [*module.parameters()] if step else [x, *module.parameters()]
    made = Set(module, provider.bind(module, workload), x, wanted)
    y_shape = _output_shape(workload)
    if step:
        generator = torch.Generator(device).manual_seed(seed + 2)
        made.dy = torch.randint(y_shape[1:].numel(), y_shape[:1], device=device, generator=generator)
        made.optimizer = torch.optim.SGD(wanted, lr=1e-3)
    else:
        made.dy = draw(y_shape, workload.dtype, device, seed + 2).to(x.dtype)
        if provider.channels_last and made.dy.dim() == 4:
            made.dy = made.dy.contiguous(memory_format=torch.channels_last)
    return made


def error(workload: Workload, ours: Tensors, torchs: Tensors, exact: Tensors) -> dict[str, Any]:
    """Errors against float64, relative to its root mean square, of a provider and of torch's eager; `void` says which
    result is beyond the budget, which is that of the tests: twice torch's own error and a few roundings.

    A training step is judged by all its gradients at once, and every network by the mean alone: in a deep one single
    results stray.
    """
    step = workload.direction == "step"
    if step:
        scales = [c.square().mean().sqrt().clamp_min(1e-30) for c in exact]
        ours, torchs, exact = ([_joined(tensors, scales)] for tensors in (ours, torchs, exact))
    row: dict[str, Any] = {"error": 0.0, "torch_error": 0.0, "void": None}
    for i, (a, b, c) in enumerate(zip(ours, torchs, exact, strict=True)):
        found = budget.errors(a, [b], c)
        scale = c.square().mean().sqrt().item() or 1.0
        row["error"] = max(row["error"], found.ours[1] / scale)
        row["torch_error"] = max(row["torch_error"], found.torchs[1] / scale)
        within = found.ours[1] <= found.allowed[1] if workload.is_network else found.within
        if not within and row["void"] is None:
            name = "output" if i == 0 and not step else "gradient"
            row["void"] = f"{name} {i}: (max, rms) error {found.ours}, torch's {found.torchs}, allowed {found.allowed}"
    return row


def _joined(tensors: Tensors, scales: Tensors) -> torch.Tensor:
    """All in one, in their own dtype, each divided by the root mean square that it should have."""
    joined = torch.cat([(t.double() / scale).flatten() for t, scale in zip(tensors, scales, strict=True)])
    return joined.to(tensors[0].dtype)


class Reference:
    """float64's results and torch's eager ones for a workload, computed once for all its providers."""

    def __init__(self, workload: Workload, device: torch.device, seed: int):
        eager = PROVIDERS[0]
        with eager.settings():
            with precision("ieee"):
                self.exact = make_set(eager, workload, device, seed, exact=True).results(workload.direction)
            with precision(workload.mode):
                self.torchs = make_set(eager, workload, device, seed).results(workload.direction)


class Subject:
    """Makes the sets, takes the time of the first call, the errors and the memory, and then gives samples."""

    def __init__(self, provider: Provider, workload: Workload, device: torch.device, seed: int, reference: Reference):
        self.provider, self.workload = provider, workload
        self.row: dict[str, Any] = {}
        stream = torch.cuda.Stream()
        with self._settings(), torch.cuda.stream(stream):
            first = make_set(provider, workload, device, seed)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            results = first.results(workload.direction)
            torch.cuda.synchronize()
            self.row["first_call_s"] = round(time.perf_counter() - begin, 4)
            self.row |= error(workload, results, reference.torchs, reference.exact)
            del results
            if workload.direction != "forward":
                with clock.saved_bytes(list(first.module.parameters())) as saved:
                    y = first.forward(first.x)
                self.row["saved_bytes"] = saved()
                del y
            run = self._prepare(first)
            run()
            with clock.peak_memory() as peak:
                run()
            self.row["peak_bytes"] = peak()

            one = sum(t.numel() * t.element_size() for t in (first.x, *first.module.parameters()) if t is not None)
            properties = torch.cuda.get_device_properties(device)
            l2 = getattr(properties, "L2_cache_size", 0)
            free = torch.cuda.mem_get_info(device)[0] // 8
            # A set's outputs, gradients and what is saved take several times its inputs.
            count = clock.set_count(one, l2, free // 4)
            runs = [run, *(self._prepare(make_set(provider, workload, device, seed + 7 * i)) for i in range(1, count))]
            self.row |= {"sets": count, "cold": count * one > 3 * l2}
            self._clock = clock.Clock(runs, stream)
        self.row["not_captured"] = self._clock.not_captured

    def _prepare(self, made: Set) -> Callable[[], object]:
        if self.workload.direction == "forward":
            return made.only_forward
        if self.workload.direction == "backward":
            made.y = made.forward(made.x)
        return getattr(made, self.workload.direction)

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        with self.provider.settings(), precision(self.workload.mode):
            yield

    def sample(self) -> clock.Sample:
        with self._settings():
            return self._clock.sample()

    def calls(self) -> None:
        """A few dozen calls, and the wait for them."""
        with self._settings():
            self._clock.calls()
