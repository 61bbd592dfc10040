"""Convolutions in a row, each with what follows it: a batch normalisation in eval, a residual, an activation; or a batch
normalisation in training and an activation, for which the convolution measures its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._state import own
from ..ops import conv, conv_transpose
from ..ops.batch_norm import norm_measured
from ..ops.conv import conv_joined, memory_formats
from ..ops.conv_measured import conv_measured
from .plan import Pattern, Value, named, run

__all__ = ["PATTERNS", "applies_statistics", "normalized_dims"]

_IN_TRAINING = Value("batch_norm", 0)
"""A batch normalisation of our own class that is in training, or whose gradients are recorded."""

_RECORDS = {
    "conv1d": (conv._conv1d, conv._conv1d_inference),
    "conv2d": (conv._conv2d, conv._conv2d_inference),
    "conv3d": (conv._conv3d, conv._conv3d_inference),
    "conv_transpose1d": (conv_transpose._conv_transpose1d, conv_transpose._conv_transpose1d_inference),
    "conv_transpose2d": (conv_transpose._conv_transpose2d, conv_transpose._conv_transpose2d_inference),
    "conv_transpose3d": (conv_transpose._conv_transpose3d, conv_transpose._conv_transpose3d_inference),
}
"""By torch's name of a convolution, for which the role "conv" stands: its record, and that of one that normalises or adds."""


def normalized_dims(dims: int) -> Callable[[Any], int]:
    """What the role "batch_norm" stands for: of how many dimensions the images are whose convolution may apply this layer's
    statistics now, or 0."""
    return lambda norm: dims if applies_statistics(norm) else 0


def applies_statistics(norm: Any) -> bool:
    """Whether a batch normalisation only applies its running statistics now, and no gradients are recorded: what a convolution's
    kernel does."""
    if norm.training or torch.is_grad_enabled():
        return False
    return all([own(norm, name, type(norm)) is not None for name in ("running_mean", "running_var")])


def _run(x: torch.Tensor, layers: Sequence[Any], values: Sequence[Value]) -> torch.Tensor:
    """Nobody sees the memory format of what lies between two convolutions: an image in NCHW is converted once."""
    begins = [i for i, v in enumerate(values) if v.role == "conv"]
    formats: list[bool | None] = [None] * len(begins)
    # Padding has a memory format of its own, and a sum may be in the residual's.
    zeros = all([layers[i].padding_mode == "zeros" for i in begins])
    if len(begins) > 1 and zeros and all([v.role != "add" for v in values[: begins[-1]]]):
        formats = memory_formats(
            [_RECORDS[values[i].what][0] for i in begins], x,
            [own(layers[i], "weight", type(layers[i])) for i in begins], [layers[i].groups for i in begins],
        )  # fmt: skip
    for begin, end, format in zip(begins, [*begins[1:], len(values)], formats, strict=True):
        x = _run_one(x, layers[begin:end], values[begin:end], format)
    return x


def _run_one(x: torch.Tensor, layers: Sequence[Any], values: Sequence[Value], format: bool | None) -> torch.Tensor:
    """A convolution with as many of the layers after it as the kernel takes, and then each of the others alone."""
    conv, input = layers[0], x
    arguments = conv._arguments(input, own(conv, "weight", type(conv)), own(conv, "bias", type(conv)))
    if values[0].what == "conv2d" and len(values) > 1 and values[1] == _IN_TRAINING:
        end = 3 if len(values) > 2 and values[2].role == "activation" else 2
        y = named(layers[:end], _run_measured, arguments, layers[1], values[2].what if end == 3 else None, format)
        if y is not None:
            return run(layers[end:], y)
    for end in range(_longest(x, values), 0, -1):
        norm = residual = activation = None
        for layer, value in zip(layers[1:end], values[1:end], strict=True):
            if value.role == "batch_norm":
                names = ("running_mean", "running_var", "weight", "bias")
                norm: Any = (*[own(layer, name, type(layer)) for name in names], layer.eps)
            elif value.role == "add":
                residual = layer.tensor
            else:
                activation = value.what
        more = dict(norm=norm, residual=residual, activation=activation, channels_last=format)
        y = named(layers[:end], conv_joined, _RECORDS[values[0].what], *arguments, **more)
        if y is not None:
            return run(layers[end:], y)
    raise AssertionError("a convolution alone is always computed")


def _run_measured(arguments: Sequence[Any], norm: Any, activation: Any, format: bool | None) -> torch.Tensor | None:
    """A convolution that measures its result, then a batch normalisation in training and the activation behind it. None, and
    nothing is done, where the layers are to run one by one."""
    images: Any = torch.nn.BatchNorm2d
    if not isinstance(norm, images):
        return None  # those of other dimensions object to an image, before anything is written
    mean, var = norm.running_mean, norm.running_var
    if not (norm.training or (mean is None and var is None)):
        return None
    weight, bias = norm.weight, norm.bias
    given = [p for p in (weight, bias) if p is not None]
    if mean is not None and any([p.shape != mean.shape or p.dtype != mean.dtype for p in given]):
        return None  # an error of torch's, which comes before the running statistics move
    momentum, factor = norm.momentum, None
    if norm.training and not norm.track_running_stats:
        mean = var = None
    if momentum is None:
        momentum, count = 0.0, norm.num_batches_tracked
        if mean is not None and count is not None:
            factor = 1.0 / (count + 1).to(torch.promote_types(mean.dtype, torch.float32))
    found = conv_measured(arguments[:3], arguments[3:], format, (mean, var), factor, momentum, norm.eps)
    if found is None:
        return None
    y, mean, rstd = found
    norm._arguments(y)  # which counts the batch
    return norm_measured(y, mean, rstd, weight, bias, norm.eps, activation)


def _longest(x: torch.Tensor, values: Sequence[Value]) -> int:
    """How many of the layers the kernel might take. Where gradients are recorded it knows the derivative of no sum. torch's batch
    normalisation objects to a single image, and to one of other dimensions."""
    recorded, dims = torch.is_grad_enabled(), _RECORDS[values[0].what][0].dims
    for i, v in enumerate(values):
        if v.role == "add" and recorded:
            return i
        if v.role == "batch_norm" and (x.dim() != dims + 2 or v.what != dims):
            return i
    return len(values)


PATTERNS = (Pattern("(conv (batch_norm )?(add )?(activation )?)+", _run),)
