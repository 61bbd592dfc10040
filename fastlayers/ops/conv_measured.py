"""A convolution of images whose kernel measures what it writes, for a batch normalisation in training behind it: mean and
variance of each channel, which then needn't be read again for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from .. import _kernels
from .._torch import any_autocast
from ..dispatch import autocast
from ..dispatch.support import BadInput, wants_grad
from ..kernels.conv.geometry import Geometry
from ..values import Named, Needs, Out
from .activation import Activation
from .conv import Conv2d, _options

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels.batch_norm.partials import merge
    from ..kernels.batch_norm.planes import Planes
    from ..kernels.batch_norm.whole import fits
    from ..kernels.conv import depthwise
    from ..kernels.epilogues import Partials

__all__: list[str] = []  # there is no function of torch's that it is


class Conv2dMeasured(Conv2d):
    """Also running_mean and running_var (O,), or None -> also mean and rstd (O,): statistics of the rounded result over the
    batch, towards which the running ones move. `factor`, one number or None, stands for a momentum that is a tensor."""

    tensors = (*Conv2d.tensors, "running_mean", "running_var", "factor")
    floats = cast = Conv2d.tensors
    silent = ("running_mean", "running_var")
    mutates_last = True

    class Options(NamedTuple):  # pyright: ignore[reportIncompatibleVariableOverride]
        geometry: Geometry
        activation: Activation | None
        """None: it comes behind the normalisation."""
        channels_last: bool | None
        momentum: float
        eps: float

    def reference(self, input: Any, weight: Any, bias: Any, mean: Any, var: Any, factor: Any, *options: Any) -> Any:
        """The convolution, which alone is ever differentiated."""
        return super().reference(input, weight, bias, *options[:3])

    def unsupported(self, t: Any, options: Any) -> str | None:
        reason = super().unsupported(t, options)
        if reason is not None:
            return reason
        mean, var, eps = t.running_mean, t.running_var, options.eps
        dtype = autocast.dtype_after(self.autocast, t.input) if any_autocast() else t.input.dtype
        if t.input.dim() != 4 or (mean is None) != (var is None) or eps <= 0:
            return BadInput(f"an input with {t.input.dim()} dimensions, statistics or eps {eps}")
        if wants_grad(mean, var):
            return "running statistics that require grad"
        channels = self.channels(t.weight, options.geometry.groups)
        for s in (mean, var):
            if s is not None and (s.shape != (channels,) or s.dtype is not mean.dtype):
                return BadInput("statistics that aren't one number a channel")
            if s is not None and s.dtype not in (dtype, torch.float32 if dtype is not torch.float64 else dtype):
                return BadInput(f"statistics of {s.dtype} for {dtype}")
        if depthwise.takes(t.weight, options.geometry.groups):
            return "a depthwise convolution, which measures nothing"
        out: Any = self.outputs(t, options, None)["output"]
        if out.shape[0] * math.prod(out.shape[2:]) < 2:
            return BadInput("a single value a channel")
        if fits(Planes.of(out), torch.promote_types(dtype, torch.float32)):
            return "a batch that a single launch normalises"
        return None

    def results(self, options: Any) -> int:
        return 3

    def mutates(self, options: Any) -> tuple[str, ...]:
        return ("running_mean", "running_var")

    def outputs(self, t: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        found = super().outputs(t, options, needs)
        channels = self.channels(t.weight, options.geometry.groups)
        statistic = Out((channels,), torch.promote_types(t.input.dtype, torch.float32), differentiable=False)
        return found | {"mean": statistic, "rstd": statistic}

    def forward(self, t: Any, out: Named, options: Any, precision: str, **more: Any) -> None:
        partials = Partials()
        super().forward(t, out, options, precision, partials=partials)
        running = t.running_mean, t.running_var
        merge(partials, out.mean, out.rstd, options.eps, running, options.momentum, t.factor)

    def gradients(self, like: Any, options: Any, needs: Needs) -> tuple[Out | int | str | None, ...]:
        return (*super().gradients(like, options, needs), None, None, None)


_conv2d_measured = Conv2dMeasured()


def conv_measured(
    tensors: Sequence[Any],
    sizes: Sequence[Any],
    channels_last: bool | None,
    running: tuple[torch.Tensor | None, torch.Tensor | None],
    factor: torch.Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """conv2d of input, weight and bias; mean and 1 / sqrt(var + eps) of each channel of the result. None, and nothing is done,
    where the kernels don't measure it, and inside of torch.compile.

    Args:
        sizes: the function's arguments after the tensors.
        channels_last: the result's memory format, where it isn't torch's choice.
        running: mean and variance, which move by `momentum`, or by `factor`.
    """
    if is_dynamo_compiling() or not isinstance(momentum, (int, float)) or not isinstance(eps, (int, float)):
        return None
    options = _options(_conv2d_measured, tensors[1], tuple(sizes), (None, channels_last, float(momentum), float(eps)))
    return None if options is None else _conv2d_measured.run((*tensors, *running, factor), options, joined=True)
