"""`report`: which layers of a model will run on kernels, what they compute and move, and the least time that takes on a GPU.

The model runs on meta tensors, forward and backward. The operations of ours are counted from their records; torch's operators are
seen by a TorchDispatchMode, and counted as torch's FlopCounterMode does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .. import _kernels, convert
from .._torch import tree_map
from ..dispatch import explain as explaining
from ..dispatch.explain import Explanation
from ..dispatch.table import columns
from ..fusion.trace import fuse as fused
from . import gpus
from .gpus import GPUS, Work
from .operators import Attention, Operators, Values, tensors_in


class Line(NamedTuple):
    """What one module, or several that run as one, calls: on kernels of ours, or as torch's operators."""

    module: str
    """Its path within the model; those of joined neighbours are joined by " + "."""
    operation: str
    ours: bool
    why: str
    """The forward's kernels, or why torch's function takes the call."""
    forward: Work
    backward: Work

    @property
    def work(self) -> Work:
        return _sum((self.forward, self.backward))


@dataclass(frozen=True)
class Report:
    """What `report` found. Prints as a table."""

    lines: tuple[Line, ...]
    """In the order of the calls. The last one stands for the operators of torch's backwards."""
    saved: int
    """Bytes that the forward keeps for the backward, parameters and inputs not counted."""
    kernels: dict[str, int]
    """The kernels of ours that a forward and backward launch, and how often."""
    operators: dict[str, int]
    """The same of torch's operators, each of which launches one kernel or several."""
    gpu: str
    arithmetic: str
    conversions: convert.Conversions | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[Line]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def launches(self) -> int:
        """How many kernels of ours a forward and backward launch."""
        return sum(self.kernels.values())

    def milliseconds(self, work: Work) -> float:
        """The least time on the GPU, as `gpus.least_milliseconds`."""
        return gpus.least_milliseconds(work, self.arithmetic, GPUS[self.gpu])

    def least(self, line: Line) -> float:
        """The milliseconds of a line's forward and backward together."""
        return self.milliseconds(line.forward) + self.milliseconds(line.backward)

    def share(self, of: Callable[[Work], float]) -> float:
        """Of all that `of` says of each line's work, the part that runs on kernels of ours."""
        everything = sum(of(part) for line in self for part in (line.forward, line.backward))
        return sum(of(part) for line in self if line.ours for part in (line.forward, line.backward)) / (everything or 1)

    @property
    def flops(self) -> float:
        """The share of the floating-point operations that runs on kernels of ours."""
        return self.share(lambda work: work.flops)

    @property
    def bytes(self) -> float:
        """The same of the bytes moved."""
        return self.share(lambda work: work.bytes)

    def __str__(self) -> str:
        head = ("module", "operation", "path", "GFLOP", "MB", "ms at least", "kernels, or why not")
        rows = [
            (
                line.module or "-",
                line.operation,
                "triton" if line.ours else "torch",
                _number(line.work.flops / 1e9),
                _number(line.work.bytes / 1e6),
                _number(self.least(line)),
                line.why,
            )
            for line in self
        ]
        return columns(head, *rows) + "\n\n" + self.summary()

    def summary(self) -> str:
        """The totals in words."""
        total = _sum(line.work for line in self)
        least = sum(map(self.least, self))
        return (
            f"{_number(total.flops / 1e9)} GFLOP, {self.flops:.0%} of them on kernels; {_number(total.bytes / 1e6)} MB moved, "
            f"{self.bytes:.0%} of them by kernels;\n{_number(self.saved / 1e6)} MB saved for the backward; "
            f"{self.launches} launches of kernels.\n"
            f"One operation after the other takes at least {_number(least)} ms on {self.gpu} at its peak rates\n"
            f"({GPUS[self.gpu].source}). Nothing was measured."
        )


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def report(
    model: torch.nn.Module,
    *args: Any,
    gpu: str = "H100",
    dtype: torch.dtype | None = None,
    accelerate: bool = True,
    fuse: bool = False,
    **kwargs: Any,
) -> Report:
    """Run a copy of `model` on meta tensors, which compute nothing, and say what it would do on a GPU.

    Shape, Dtype: whatever the model takes. A model that looks at values can be reported where they are integers or booleans that
        follow from the inputs (positions, masks), not where they are floating-point numbers, which aren't there.
    Args:
        model: any module. It stays as it is, and on its device; a backward is counted if parameters or inputs require grad.
        gpu: one of `fastlayers.reporting.gpus.GPUS`, for the roofline.
        dtype: convert the copy and its floating-point inputs.
        accelerate: as by `fastlayers.accelerate`; False: as the model is.
        fuse: as by `fastlayers.fuse`, after that.
    Of what is torch's, the operators are those that it runs on meta tensors, but for attention, which counts as the one kernel
    that torch has for it on CUDA.

    Raises:
        ValueError: for another GPU.
        RuntimeError: where triton isn't installed, or the model needs values.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, not {gpu!r}")
    if _kernels.MISSING is not None:
        raise RuntimeError(f"a report needs the kernels: {_kernels.MISSING}")
    from . import dry_run

    model = dry_run.on_meta(model)
    values = Values()
    args, kwargs = tree_map(lambda x: values.on_meta(x, dtype), (args, kwargs))
    if dtype is not None:
        model.to(dtype)
    conversions = convert.accelerate(model) if accelerate else None
    target = fused(model) if fuse else model
    return _run(target, args, kwargs, gpu, conversions, values)


def _run(model: Any, args: Any, kwargs: Any, gpu: str, conversions: Any, values: Values) -> Report:
    from . import dry_run

    state = [*model.parameters(), *model.buffers(), *tensors_in((args, kwargs))]
    given = {t.untyped_storage()._cdata for t in state}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in given:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    results: list[torch.Tensor] = []

    def forward() -> None:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results.extend(t for t in tensors_in(model(*args, **kwargs)) if t.requires_grad)

    try:
        with dry_run.noting(dry_run.device_of(GPUS[gpu]), path="auto") as noted, dry_run.unwatched():
            operators = Operators(noted.calls, dry_run.Call, values)
            with operators, Attention(operators):
                explanation = explaining.explain_within(model, forward)
                operators.backward = True
                if results:
                    wanted = [t for t in state if t.requires_grad]
                    dys = [torch.empty_like(y) for y in results]
                    torch.autograd.grad(results, wanted, dys, allow_unused=True)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise RuntimeError(f"this model can't be run without the values of its tensors: {error}") from error
    dtype = next((t.dtype for t in state if t.is_floating_point()), torch.float32)
    arithmetic = {torch.float32: "ieee", torch.float64: "64"}.get(dtype, "16")
    lines = tuple(_lines(noted.calls, explanation))
    kernels = Counter(_kernels.launch.name_of(launch.kernel) for launch in noted.launches)
    left = Counter(call.label for call in noted.calls if not call.ours)
    return Report(lines, sum(kept.values()), dict(kernels), dict(left), gpu, arithmetic, conversions)


def _lines(calls: list[Any], explanation: Explanation) -> Iterator[Line]:
    """A line for each module and path, in the order of their first calls."""
    grouped: dict[tuple[str, bool], list[Any]] = {}
    for call in calls:
        grouped.setdefault((call.module, call.ours), []).append(call)
    for (module, ours), found in grouped.items():
        decisions = [d for d in explanation if d.module == module and (d.path == "triton") == ours]
        why = [d.reason or ", ".join(d.kernels) for d in decisions]
        yield Line(
            module,
            ", ".join(dict.fromkeys(call.label for call in found)),
            ours,
            "; ".join(dict.fromkeys(filter(None, why))) or ("nothing to do" if ours else "torch's operators"),
            _sum(call.forward for call in found),
            _sum(call.backward for call in found),
        )


def _sum(parts: Iterable[Work]) -> Work:
    each = [*parts]
    return Work(sum(part.flops for part in each), sum(part.bytes for part in each))
