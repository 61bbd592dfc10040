"""Normalisation of channels: y = (x - mean) / sqrt(var + eps) * weight + bias, with a weight and a bias for each channel.

batch_norm:    mean and variance of a channel over the batch, or running statistics
instance_norm: of a channel of one image, or running statistics
group_norm:    of several channels of one image
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _kernels
from .. import _torch_functional as F
from .._kernels import is_plain
from ..dispatch.support import BadInput, wants_grad
from ..operation import Operation
from ..values import Named, Needs, Out
from .activation import Activation

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels.batch_norm.forward import normalize
    from ..kernels.batch_norm.gradients import gradients
    from ..kernels.batch_norm.planes import Planes
    from ..kernels.batch_norm.statistics import apply

__all__ = ["batch_norm", "group_norm", "instance_norm"]


def _is_channels_last(t: Any) -> bool:
    """torch's rule (c10::is_channels_last_strides): do the strides alone say NHWC, or NDHWC? Ambiguous ones don't."""
    shape, strides = t.shape, t.stride()
    if len(shape) not in (4, 5) or strides[1] == 0:
        return False
    least = 0
    for d in (1, *range(len(shape) - 1, 1, -1), 0):
        if shape[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * max(shape[d], 1)
    return True


def _image(t: Any, dtype: torch.dtype, keeps_format: bool) -> Out:
    """The description of a result: contiguous, or in channels_last where the input is and the function keeps that."""
    shape = tuple(t.shape)
    if not (keeps_format and _is_channels_last(t)):
        return Out(shape, dtype)
    inner = [math.prod(shape[i:]) * shape[1] for i in range(3, len(shape) + 1)]
    return Out(shape, dtype, (inner[0] * shape[2], 1, *inner))


def _against_parameters(x: Any, *parameters: Any) -> str | None:
    """What speaks against weights and statistics of these shapes and dtypes."""
    given = [p for p in parameters if p is not None]
    for p in given:
        if p.dim() != 1 or p.shape[0] != x.shape[1]:
            return BadInput(f"a weight, bias or statistic {tuple(p.shape)} for {x.shape[1]} channels")
        if p.dtype != given[0].dtype or p.dtype not in (x.dtype, torch.float32):
            return BadInput(f"an input of {x.dtype} with weights of {', '.join(str(q.dtype) for q in given)}")
        if p.dtype == torch.float32 and x.dtype == torch.float64:
            return BadInput("an input of float64 with weights of float32")
    return None


def _zero(*gradients: Any) -> None:
    """Sums over an empty batch."""
    for gradient in gradients:
        if gradient is not None:
            gradient.zero_()


class GroupNorm(Operation):
    """input (N, C, *), weight and bias (C,) or None -> output as input."""

    tensors = ("input", "weight", "bias")
    floats = ("input",)  # torch takes a 16-bit input with float32 weights
    autocast = staticmethod(lambda x: F.group_norm(x.expand(1, 2), 1))
    widens = True

    class Options(NamedTuple):
        groups: int
        eps: float
        keeps_format: bool
        """Whether a result in channels_last follows such an input: on a GPU, torch's is always contiguous."""
        activation: Activation | None
        dtype: torch.dtype | None
        """The result's, where autocast has torch compute in another one than the input's."""

    def reference(
        self, input: Any, weight: Any, bias: Any, groups: int, eps: float, keeps: bool, activation: Any, dtype: Any
    ) -> Any:
        if dtype is not None:
            input, weight, bias = (None if t is None else t.to(dtype) for t in (input, weight, bias))
        y = F.group_norm(input, groups, weight, bias, eps)
        return y if activation is None else activation(y)

    def unsupported(self, t: Any, options: Options) -> str | None:
        x, groups = t.input, options.groups
        if x.dim() < 2 or groups < 1 or x.shape[1] % groups:
            return BadInput(f"an input {tuple(x.shape)} in {groups} groups")
        if x.shape[0] * x.shape[1] // groups * math.prod(x.shape[2:]) == 1:
            return BadInput("a single value")
        return _against_parameters(x, t.weight, t.bias)

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        x, activation = t.input, options.activation
        found: dict[str, Out | str] = {"output": _image(x, options.dtype or x.dtype, options.keeps_format)}
        if not needs or not (any(needs[:2]) or activation is not None):
            return found
        statistic = Out(
            (x.shape[0] * options.groups,), torch.promote_types(x.dtype, torch.float32), differentiable=False
        )  # fmt: skip
        return found | {"mean": statistic, "rstd": statistic}

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        if t.input.numel() > 0:
            planes = Planes.of(out.output, options.groups)
            normalize(
                t.input, t.weight, t.bias, out.output, out.mean, out.rstd, planes, options.eps, then=options.activation
            )  # fmt: skip

    def saves(self, t: Any, options: Options, needs: Needs) -> tuple[str, ...]:
        behind = options.activation is not None
        if not (any(needs[:2]) or behind):
            return ()
        weight = t.weight is not None and (needs[0] or behind)
        bias = t.bias is not None and behind
        return ("input", *(("weight",) if weight else ()), *(("bias",) if bias else ()), "mean", "rstd")

    def gradients(self, like: Any, options: Options, needs: Needs) -> tuple[Out | int | str | None, ...]:
        dx = _image(like.input, like.input.dtype, options.keeps_format) if needs[0] else None
        return (dx, *super().gradients(like, options, (False, *needs[1:]))[1:])

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        if dy.output.numel() == 0:
            return _zero(*grads)
        planes = Planes.of(dy.output if grads.input is None else grads.input, options.groups)
        gradients(
            dy.output, saved.input, saved.mean, saved.rstd, saved.weight, saved.bias,
            grads.input, grads.weight, grads.bias, planes, then=options.activation,
        )  # fmt: skip


class BatchNorm(Operation):
    """input (N, C, *), running_mean, running_var, weight and bias (C,) or None -> output as input. `factor`, one number or None,
    stands for momentum where that is a tensor, so that the host needn't wait for its value."""

    tensors = ("input", "running_mean", "running_var", "weight", "bias", "factor")
    floats = ("input",)
    silent = ("running_mean", "running_var")

    class Options(NamedTuple):
        measure: bool
        """Whether mean and variance are the input's own, towards which the running ones move; else they are the running ones."""
        momentum: float
        eps: float
        activation: Activation | None

    function: Any = staticmethod(F.batch_norm)
    """torch's."""

    def reference(
        self, input: Any, mean: Any, var: Any, weight: Any, bias: Any, factor: Any,
        measure: bool, momentum: float, eps: float, activation: Any,
    ) -> Any:  # fmt: skip
        if factor is not None and mean is not None:
            momentum = float(factor)
        y = self.function(input, mean, var, weight, bias, measure, momentum, eps)
        return y if activation is None else activation(y)

    def unsupported(self, t: Any, options: Any) -> str | None:
        x, mean, var = t.input, t.running_mean, t.running_var
        if x.dim() < 2:
            return "an empty vector" if x.shape == (0,) else BadInput(f"an input with {x.dim()} dimensions")
        if (mean is None) != (var is None) or (mean is None and not options.measure):
            return BadInput("no running mean or no running variance")
        if wants_grad(mean, var):
            return "running statistics that require grad"
        if t.factor is not None and (t.factor.numel() != 1 or not t.factor.is_floating_point()):
            return BadInput(f"a momentum of {t.factor.dtype} {tuple(t.factor.shape)}")
        return self._against_sizes(x, options) or _against_parameters(x, mean, var, t.weight, t.bias)

    def _against_sizes(self, x: Any, options: Any) -> str | None:
        if options.eps < 0 or (options.measure and options.eps == 0):
            return BadInput(f"eps {options.eps}")
        if options.measure and x.shape[0] * math.prod(x.shape[2:]) == 1:
            return BadInput("a single value a channel")
        return None

    def mutates(self, options: Any) -> tuple[str, ...]:
        return ("running_mean", "running_var") if options.measure else ()

    def _image(self, x: Any) -> Out:
        """The description of a result: an empty batch keeps its strides whatever they are."""
        return Out(tuple(x.shape), x.dtype, tuple(x.stride())) if 0 in x.shape else _image(x, x.dtype, True)

    def _groups(self, x: Any) -> int | None:
        """For `Planes.of`: into how many groups of channels an image is divided; None: statistics are of the batch."""
        return None

    def outputs(self, t: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        x = t.input
        found: dict[str, Out | str] = {"output": self._image(x)}
        if not (options.measure and needs and self._reads_input(options, needs)):
            return found
        groups = self._groups(x)
        count = x.shape[1] if groups is None else x.shape[0] * groups
        statistic = Out((count,), torch.promote_types(x.dtype, torch.float32), differentiable=False)
        return found | {"mean": statistic, "rstd": statistic}

    def _reads_input(self, options: Any, needs: Needs) -> bool:
        """Whether the gradients that are asked for depend on the input."""
        dx, _, _, dw, *_ = needs
        return dw or (dx and options.measure) or options.activation is not None

    def forward(self, t: Any, out: Named, options: Any, precision: str) -> None:
        x, running, then = t.input, (t.running_mean, t.running_var), options.activation
        if x.numel() == 0:
            return
        if options.measure:
            normalize(
                x, t.weight, t.bias, out.output, out.mean, out.rstd, Planes.of(out.output, self._groups(x)), options.eps,
                running, options.momentum, t.factor, then,
            )  # fmt: skip
        else:
            apply(x, *running, t.weight, t.bias, out.output, Planes.of(out.output), options.eps, then)

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        reads, behind, dx = self._reads_input(options, needs), options.activation is not None, needs[0]
        mean, scale = ("mean", "rstd") if options.measure else ("running_mean", "running_var")
        each = (
            ("input", reads),
            ("weight", t.weight is not None and (dx or behind)),
            ("bias", t.bias is not None and behind),
            (mean, reads),
            (scale, reads or dx),
        )
        return tuple([name for name, needed in each if needed])

    def gradients(self, like: Any, options: Any, needs: Needs) -> tuple[Out | int | str | None, ...]:
        dx = self._image(like.input) if needs[0] else None
        return (dx, *super().gradients(like, options, (False, *needs[1:]))[1:])

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        results = grads.input, grads.weight, grads.bias
        if dy.output.numel() == 0:
            return _zero(*results)
        like = dy.output if grads.input is None else grads.input
        if options.measure:
            planes, eps = Planes.of(like, self._groups(like)), None
            mean, scale = saved.mean, saved.rstd
        else:
            planes, eps = Planes.of(like), options.eps
            mean, scale = saved.running_mean, saved.running_var
        gradients(
            dy.output, saved.input, mean, scale, saved.weight, saved.bias, *results, planes, eps, options.activation
        )  # fmt: skip


class BatchNormMeasured(BatchNorm):
    """The same with the input's own statistics, `mean` and `rstd` (C,), from the convolution that wrote it, which moved the
    running ones, too. The gradients are those of `BatchNorm`: what passes through the statistics is a part of the input's."""

    tensors = (*BatchNorm.tensors, "mean", "rstd")

    def label(self, options: Any) -> str:
        return "batch_norm"

    def reference(self, *args: Any) -> Any:
        *tensors, _mean, _rstd = args[: len(self.tensors)]
        return super().reference(*tensors, *args[len(self.tensors) :])

    def mutates(self, options: Any) -> tuple[str, ...]:
        return ()

    def outputs(self, t: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        return {"output": self._image(t.input)}

    def forward(self, t: Any, out: Named, options: Any, precision: str) -> None:
        apply(t.input, t.mean, t.rstd, t.weight, t.bias, out.output, Planes.of(out.output), then=options.activation)


class InstanceNorm(BatchNorm):
    """The same with statistics of each image alone, towards the averages of which the running ones move; and its result is
    contiguous."""

    silent = ()
    function = staticmethod(F.instance_norm)

    def _against_sizes(self, x: Any, options: Any) -> str | None:
        if options.measure and math.prod(x.shape[2:]) == 1:
            return BadInput("a single pixel")
        return None

    def unsupported(self, t: Any, options: Any) -> str | None:
        if t.input.dim() > 1 and t.input.shape[0] == 0 and (t.weight is not None or t.bias is not None):
            return BadInput("no images")
        if t.running_mean is not None and options.measure and 0 in t.input.shape:
            return "running statistics of no images"
        return super().unsupported(t, options)

    def _image(self, x: Any) -> Out:
        return Out(tuple(x.shape), x.dtype)

    def _groups(self, x: Any) -> int | None:
        return x.shape[1]


_group_norm, _batch_norm, _instance_norm = GroupNorm(), BatchNorm(), InstanceNorm()
_batch_norm_measured = BatchNormMeasured()


def _grouped(tensors: Sequence[Any], groups: int, eps: float, activation: Activation | None = None) -> Any:
    """group_norm of input, weight and bias, and an activation behind it; None where the kernels don't take both."""
    keeps_format = not (is_plain(tensors[0]) and tensors[0].is_cuda)
    if not isinstance(groups, int) or not isinstance(eps, (int, float)):
        return _group_norm.refused(tensors, (groups, eps, keeps_format, activation, None), "num_groups or eps")
    options = groups, float(eps), keeps_format, activation, None
    return _group_norm(tensors, *options, joined=activation is not None)


def _normalized(
    op: BatchNorm,
    tensors: Sequence[Any],
    measure: bool,
    momentum: float | torch.Tensor,
    eps: float,
    activation: Activation | None = None,
) -> Any:
    """batch_norm or instance_norm of input, running mean and variance, weight and bias, and an activation behind it; None where
    the kernels don't take both."""
    factor = None
    if isinstance(momentum, torch.Tensor):
        factor, momentum = momentum if measure and tensors[1] is not None else None, 0.0
    if type(measure) is not bool or not isinstance(momentum, (int, float)) or not isinstance(eps, (int, float)):
        return op.refused((*tensors, factor), (measure, momentum, eps, activation), "training, momentum or eps")
    options = measure, float(momentum), float(eps), activation
    return op((*tensors, factor), *options, joined=activation is not None)


def group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """(input - mean) / sqrt(var + eps) * weight + bias, mean and biased variance of num_groups groups of channels in each image.
    As torch.nn.functional.group_norm.

    Shape: input (N, C, *) with any strides, weight and bias (C,); the result contiguous, on a CPU in channels_last where the
        input is, as torch's.
    Dtype: float16, bfloat16, float32, float64; weight and bias alike, of the input's dtype or, with a 16-bit input, float32.
        Computed in float32 (float64). Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.group_norm.html; Wu and He, "Group Normalization",
        arXiv:1803.08494.
    """
    return _grouped((input, weight, bias), num_groups, eps)


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """(input - mean) / sqrt(var + eps) * weight + bias, mean and biased variance of each channel over the batch, towards which,
    with the unbiased variance, the running ones move; or the running ones, unless `training`. As torch.nn.functional.batch_norm.

    Shape: input (N, C, *) with any strides, the others (C,); the result contiguous, or in channels_last where the input is.
        `momentum` may be a tensor of one number, which isn't waited for.
    Dtype: float16, bfloat16, float32, float64; the others alike, of the input's dtype or, with a 16-bit input, float32.
        Computed in float32 (float64).
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets), and running statistics require no grad.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.batch_norm.html; Ioffe and Szegedy, "Batch
        Normalization", arXiv:1502.03167; sums of squares: Chan, Golub and LeVeque, "Algorithms for Computing the Sample
        Variance", 1983.
    """
    return _normalized(_batch_norm, (input, running_mean, running_var, weight, bias), training, momentum, eps)


def instance_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """(input - mean) / sqrt(var + eps) * weight + bias, mean and biased variance of each channel of each image, towards whose
    averages, with unbiased variances, the running ones move; or the running ones, unless `use_input_stats`. As
    torch.nn.functional.instance_norm.

    Shape: input (N, C, *) with any strides, the others (C,); the result contiguous.
    Dtype: float16, bfloat16, float32, float64; the others alike, of the input's dtype or, with a 16-bit input, float32.
        Computed in float32 (float64).
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets), running statistics require no grad, and
        where they move there is at least one image.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.instance_norm.html; Ulyanov, Vedaldi and
        Lempitsky, "Instance Normalization", arXiv:1607.08022.
    """
    tensors = input, running_mean, running_var, weight, bias
    return _normalized(_instance_norm, tensors, use_input_stats, momentum, eps)


def norm_joined(function: str, activation: Activation, *arguments: Any) -> torch.Tensor | None:
    """One of these functions, and an activation behind it, as one call; None where the kernels don't take both."""
    if function == "group_norm":
        input, groups, weight, bias, eps = arguments
        return _grouped((input, weight, bias), groups, eps, activation)
    op = _batch_norm if function == "batch_norm" else _instance_norm
    *tensors, measure, momentum, eps = arguments
    return _normalized(op, tensors, measure, momentum, eps, activation)


def norm_measured(
    input: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: Activation | None,
) -> torch.Tensor:
    """batch_norm in training of an input whose statistics are known, and an activation behind it: see `conv_measured`."""
    return _batch_norm_measured((input, None, None, weight, bias, None, mean, rstd), True, 0.0, eps, activation)
