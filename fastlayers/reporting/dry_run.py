"""Runs layers on meta tensors, which have no memory, as they would run on a GPU: launches are noted instead of made."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .. import _torch, operation
from ..autograd import Plan
from ..dispatch import explain, policy, support
from ..kernels.runtime import launch as _launch
from ..kernels.runtime import tiles as _tiles
from ..kernels.runtime.replay import Replayable
from .gpus import GPU, Work

ANY = _tiles.Device("sm_90", 132)
"""A GPU for questions whose answer is the same for all."""


class Launch(NamedTuple):
    """A launch that was noted."""

    kernel: Any
    args: tuple[Any, ...]
    meta: dict[str, Any]
    backward: bool
    """Whether an operation's backward made it."""
    questions: range
    """The numbers of the questions for tiles that were asked for it."""


class Call(NamedTuple):
    """An operation's forward that was noted, or an operator of torch."""

    label: str
    module: str
    """The path of the module that called it, within `explain`."""
    ours: bool
    forward: Work
    backward: Work
    """Of the gradients that are asked for; of torch's operators in a backward."""


@dataclass
class Noted:
    """What our layers did within `noting`."""

    launches: list[Launch] = field(default_factory=list)
    questions: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    """The tables of tiles that were asked, and their rows."""
    calls: list[Call] = field(default_factory=list)
    flops: int = 0
    backward: bool = False
    """Whether the last call of an operation was its backward."""


def device_of(gpu: GPU) -> _tiles.Device:
    """As the tables of tiles know it."""
    return _tiles.Device(gpu.target, gpu.multiprocessors)


def size(tensors: Iterable[Any]) -> int:
    """The bytes of tensors or their descriptions together."""
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors if hasattr(t, "shape"))


@contextlib.contextmanager
def _replaced(*new: tuple[Any, str, Any]) -> Iterator[None]:
    """Within, attributes have other values."""
    before = [getattr(owner, name) for owner, name, _ in new]
    for owner, name, value in new:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(new, before, strict=True):
            setattr(owner, name, value)


_noted: Noted | None = None
"""While `noting`."""


def _call(self: Replayable, tensors: Any, *options: Any) -> Any:
    """What a Replayable does when it is called, if nothing is to be replayed or recorded."""
    op: Any = self.work.__self__  # type: ignore[attr-defined]
    if _noted is None:
        return self.work(tensors, *options)
    _noted.backward = self is op._backward
    if _noted.backward:
        plan, needs, _ = options
        _noted.flops += op.flops(op.named(plan.like), plan.options, needs)
        return self.work(tensors, *options)
    flops = op.flops(op.named(tensors), options[0], None)
    _noted.flops += flops
    outputs = self.work(tensors, *options)
    backward = _backward_of(op, tensors, options[0], options[1])
    module = explain.recorder.module if explain.recorder is not None else ""
    forward = Work(flops, size(tensors) + size(outputs))
    _noted.calls.append(Call(op.label(options[0]), module, True, forward, backward))
    return outputs


def _backward_of(op: Any, tensors: Any, options: Any, grad: Any) -> Work:
    """What the backward of a call computes, reads and writes: the gradients of the results, what was saved, and the gradients."""
    needs = tuple([t is not None and t.requires_grad for t in tensors]) if grad is True else grad
    if not needs or not any(needs):
        return Work(0, 0)
    plan: Plan = op.plan(tensors, options, needs)
    specs = op.outputs(op.named(tensors), options, needs)
    pool = (*tensors, *[getattr(op.named(tensors), s) if isinstance(s, str) else s for s in specs.values()])
    results = [o for o in [*specs.values()][: plan.results] if getattr(o, "differentiable", True)]
    moved = size(results) + size([pool[i] for i in plan.places])
    moved += size(op.gradients(op.named(plan.like), options, needs))
    return Work(op.flops(op.named(plan.like), options, needs), moved)


@contextlib.contextmanager
def meta_is_gpu(path: policy.Path = "triton") -> Iterator[None]:
    """Within, our layers take meta tensors for a GPU's, under this policy. No call is replayed or recorded. Launches are not
    prevented."""
    with (
        policy.policy(path),
        _replaced(
            (_launch, "bfloat16_is_exact", True),
            (support, "unsupported_device", lambda _: None),
            (Replayable, "find", lambda *_: None),
            (Replayable, "__call__", _call),
        ),
    ):
        yield


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Within, our layers take no notice of a TorchDispatchMode or TorchFunctionMode, which see what is torch's alone."""
    modes = (_torch, "dispatch_modes", lambda: 0), (_torch, "function_mode", lambda: False)
    with _replaced(*modes, (_torch, "unseen", lambda: True), (operation, "unseen", lambda: True)):
        yield


@contextlib.contextmanager
def noting(
    device: _tiles.Device, answers: Mapping[int, Any] | None = None, path: policy.Path = "triton"
) -> Iterator[Noted]:
    """Within, our layers take meta tensors for those of this GPU, and launches are noted instead of made.

    Args:
        answers: tiles to use instead of the picks, by the number of the question.
        path: the policy.
    """

    def launch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
        since = noted.launches[-1].questions.stop if noted.launches else 0
        asked = range(since, len(noted.questions))
        if programs and _launch.trace is not None:
            _launch.trace.append(_launch.describe(kernel, programs, meta))
        noted.launches.append(Launch(kernel, args, meta, noted.backward, asked))

    with _tiles.listen(answers) as questions:
        noted = Noted(questions=questions)
        ours = (
            (_launch, "launch", launch),
            (_tiles, "device", lambda _: device),
            (sys.modules[__name__], "_noted", noted),
        )
        with meta_is_gpu(path), _replaced(*ours):
            yield noted


def on_meta(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model with all tensors on the meta device, which takes no memory."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        found = [*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values()]
        for t in found:
            if isinstance(t, torch.Tensor) and id(t) not in memo:
                with torch.no_grad():
                    memo[id(t)] = _meta(t)
    return copy.deepcopy(model, memo)


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    new: torch.Tensor = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new.requires_grad_(tensor.requires_grad) if tensor.is_leaf else new
