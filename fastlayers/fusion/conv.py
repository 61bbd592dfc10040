"""Convolutions in a row, each with what follows it: a batch normalisation in eval, a residual, an activation; or a batch
normalisation in training and an activation, for which the convolution measures its result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from .._state import own
from ..ops import conv, conv_transpose
from ..ops.activation import Activation
from ..ops.batch_norm import norm_measured
from ..ops.conv import Statistics, conv_joined, memory_formats
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
    cls = type(norm)
    return own(norm, "running_mean", cls) is not None and own(norm, "running_var", cls) is not None


class _Try(NamedTuple):
    """A convolution and the layers after it that one kernel takes, by their places in the row; 0: there is no such layer."""

    end: int
    norm: int
    add: int
    activation: Activation | None


class _Stage(NamedTuple):
    """A convolution of a row and the layers up to the next one, and what might be done with them, as their values alone say."""

    begin: int
    end: int
    records: tuple[Any, Any]
    """Of the convolution, and of one that normalises or adds."""
    adds: bool
    tries: tuple[_Try, ...]
    """What might run as one, the most layers first."""


def _stages(values: tuple[Value, ...]) -> tuple[_Stage, ...]:
    begins = [i for i, v in enumerate(values) if v.role == "conv"]
    stages = []
    for begin, end in zip(begins, [*begins[1:], len(values)], strict=True):
        records = _RECORDS[values[begin].what]
        tries, norm, add, activation = [_Try(begin + 1, 0, 0, None)], 0, 0, None
        for i in range(begin + 1, end):
            role, what = values[i]
            if role == "batch_norm" and what != records[0].dims:
                break
            norm, add = i if role == "batch_norm" else norm, i if role == "add" else add
            activation = what if role == "activation" else None
            tries.append(_Try(i + 1, norm, add, activation))
        adds = any([v.role == "add" for v in values[begin:end]])
        stages.append(_Stage(begin, end, records, adds, tuple(tries[::-1])))
    return tuple(stages)


_staged = functools.lru_cache(maxsize=4096)(_stages)


def _run(x: torch.Tensor, layers: Sequence[Any], values: Sequence[Value]) -> torch.Tensor:
    """Nobody sees the memory format of what lies between two convolutions: an image in NCHW is converted once."""
    stages = (_stages if is_dynamo_compiling() else _staged)(tuple(values))
    formats: Sequence[bool | None] = (None,) * len(stages)
    # Padding has a memory format of its own, and a sum may be in the residual's.
    if len(stages) > 1 and not any([stage.adds for stage in stages[:-1]]):
        convs = [layers[stage.begin] for stage in stages]
        if all([conv.padding_mode == "zeros" for conv in convs]):
            weights = [own(conv, "weight", type(conv)) for conv in convs]
            formats = memory_formats([s.records[0] for s in stages], x, weights, [conv.groups for conv in convs])
    for stage, format in zip(stages, formats, strict=True):
        x = _run_one(x, layers, values, stage, format)
    return x


def _run_one(
    x: torch.Tensor, layers: Sequence[Any], values: Sequence[Value], stage: _Stage, format: Any
) -> torch.Tensor:
    """A convolution with as many of the layers after it as the kernel takes, and then each of the others alone. Where gradients
    are recorded the kernel knows the derivative of no sum. torch's batch normalisation objects to a single image."""
    begin, end, records, _, tries = stage
    conv = layers[begin]
    arguments = conv._arguments(x, own(conv, "weight", type(conv)), own(conv, "bias", type(conv)))
    if end > begin + 1 and values[begin + 1] == _IN_TRAINING and values[begin].what == "conv2d":
        taken = begin + 3 if end > begin + 2 and values[begin + 2].role == "activation" else begin + 2
        activation = values[taken - 1].what if taken == begin + 3 else None
        y = named(layers[begin:taken], _run_measured, arguments, layers[begin + 1], activation, format)
        if y is not None:
            return y if taken == end else run(layers[taken:end], y)
    recorded, batched = torch.is_grad_enabled(), x.dim() == records[0].dims + 2
    for taken, norm, add, activation in tries:
        if (add and recorded) or (norm and not batched):
            continue
        y = named(
            layers[begin:taken], conv_joined, records, *arguments,
            norm=_statistics(layers[norm]) if norm else None,
            residual=layers[add].tensor if add else None,
            activation=activation, channels_last=format,
        )  # fmt: skip
        if y is not None:
            return y if taken == end else run(layers[taken:end], y)
    raise AssertionError("a convolution alone is always computed")


def _statistics(norm: Any) -> Statistics:
    cls = type(norm)
    mean, var = own(norm, "running_mean", cls), own(norm, "running_var", cls)
    return mean, var, own(norm, "weight", cls), own(norm, "bias", cls), norm.eps


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


PATTERNS = (Pattern("(conv (batch_norm )?(add )?(activation )?)+", _run),)
