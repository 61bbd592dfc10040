"""One provider at one workload: its sets of inputs, its calls, its errors, its memory."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from fastlayers.catalog import Floats
from fastlayers.testing import budget

from . import clock
from .providers import PROVIDERS, Provider, draw
from .workloads import Workload, precision

Tensors = list[torch.Tensor]


@dataclass
class Set:
    """A layer with its inputs and what comes from above in backward."""

    layer: Callable[..., Any]
    forward: Callable[..., Any]
    inputs: list[Any]
    wanted: Sequence[torch.Tensor]
    """The inputs and parameters whose gradient is asked for."""
    dy: Tensors = field(default_factory=list)
    """The gradients of the results; of a training step, the classes that its loss is told."""
    y: Tensors = field(default_factory=list)
    """The results that `backward` begins from."""
    optimizer: torch.optim.Optimizer | None = None

    @property
    def state(self) -> Tensors:
        """Parameters and buffers."""
        module = self.layer
        return [*module.parameters(), *module.buffers()] if isinstance(module, torch.nn.Module) else []

    def _results(self) -> Tensors:
        return floating(self.forward(*self.inputs))

    def only_forward(self) -> Tensors:
        with torch.no_grad():
            return self._results()

    def prepare_backward(self) -> None:
        """Run the forward that `backward` then goes back through as often as it is called."""
        self.y = self._results()

    def backward(self) -> Tensors:
        return list(torch.autograd.grad(self.y, self.wanted, self.dy, retain_graph=True))

    def both(self) -> Tensors:
        y = self._results()
        return [*y, *torch.autograd.grad(y, self.wanted, self.dy)]

    def step(self) -> torch.Tensor:
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        loss = self._loss()
        loss.backward()
        self.optimizer.step()
        return loss

    def _loss(self) -> torch.Tensor:
        y = self.forward(*self.inputs).flatten(1)
        return F.cross_entropy(y.float() if y.dtype != torch.float64 else y, self.dy[0])

    def results(self, direction: str) -> Tensors:
        """What the errors are read off: the results, or all gradients besides, or the gradients of the loss."""
        if direction == "forward":
            return self.only_forward()
        if direction == "step":
            return list(torch.autograd.grad(self._loss(), self.wanted))
        return self.both()


def floating(results: Any) -> Tensors:
    """The floating tensors among what a layer returns."""
    return [t for t in tree_leaves(results) if isinstance(t, torch.Tensor) and t.is_floating_point()]


@functools.cache
def _like(workload: Workload) -> Tensors:
    """The results, on the meta device."""
    with torch.device("meta"):
        layer = workload.case.make(torch.nn)
    return floating(layer(*workload.case.arguments(torch.float32, "meta")))


def make_set(provider: Provider, workload: Workload, device: torch.device, seed: int, exact: bool = False) -> Set:
    """The same weights and inputs for the same seed, whoever the provider; `exact`: in float64."""
    layer, inputs = provider.layer(workload, device, seed), provider.inputs(workload, device, seed + 1)
    if exact:
        inputs = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs]
        layer = layer.double() if isinstance(layer, torch.nn.Module) else layer
    made = Set(layer, provider.bind(layer, workload), inputs, [])
    if workload.direction == "forward":
        return made
    parameters = [*layer.parameters()] if isinstance(layer, torch.nn.Module) else []
    if workload.direction == "step":
        made.wanted = parameters
        classes = _like(workload)[0].shape[1:].numel()
        generator = torch.Generator(device).manual_seed(seed + 2)
        made.dy = [torch.randint(classes, inputs[0].shape[:1], device=device, generator=generator)]
        made.optimizer = torch.optim.SGD(made.wanted, lr=1e-3)
        return made
    differentiable = [t for given, t in zip(workload.case.inputs, inputs, strict=True) if isinstance(given, Floats)]
    made.wanted = [*[t.requires_grad_() for t in differentiable], *parameters]
    for i, y in enumerate(_like(workload)):
        # As `loss.backward()`: a number near 0 would only make a loss's gradients underflow.
        dy = draw(y.shape, workload.dtype, device, seed + 2 + i) if y.dim() else torch.ones((), device=device)
        made.dy.append(provider.formatted(dy.to(torch.float64 if exact else workload.dtype)))
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
                with clock.saved_bytes(first.state) as saved:
                    y = first.forward(*first.inputs)
                self.row["saved_bytes"] = saved()
                del y
            run = self._prepare(first)
            run()
            with clock.peak_memory() as peak:
                run()
            self.row["peak_bytes"] = peak()

            given = [t for t in (*first.inputs, *first.state) if isinstance(t, torch.Tensor)]
            one = sum(t.numel() * t.element_size() for t in given)
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
            made.prepare_backward()
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
