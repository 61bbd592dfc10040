"""Normalisation over the last dimensions.

layer_norm: y = (x - mean) / sqrt(var + eps) * weight + bias, of x or of x + residual
rms_norm:   y = x / sqrt(mean of x^2 + eps) * weight
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _kernels
from .. import _torch_functional as F
from ..dispatch import autocast
from ..dispatch.support import BadInput
from ..operation import Operation
from ..values import Named, Needs, Out, Tensors

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels import norm as kernels

__all__ = ["layer_norm", "rms_norm"]


def _statistic(x: Any, shape: tuple[int, ...]) -> Out:
    """A number for each row of x that is normalised."""
    rows = math.prod(x.shape[: x.dim() - len(shape)])
    return Out((rows,), torch.promote_types(x.dtype, torch.float32), differentiable=False)


class LayerNorm(Operation):
    """input (*, *shape), weight and bias (*shape) or None -> output as input."""

    tensors = ("input", "weight", "bias")
    floats = ("input",)  # torch takes a 16-bit input with float32 weights
    autocast = staticmethod(lambda x: F.layer_norm(x, (1,)))
    widens = True

    class Options(NamedTuple):
        shape: tuple[int, ...]
        eps: float
        dtype: torch.dtype | None
        """The result's, where autocast has torch compute in another one than the input's."""

    def reference(self, input: Any, weight: Any, bias: Any, shape: Any, eps: float, dtype: torch.dtype | None) -> Any:
        if dtype is not None:
            input, weight, bias = (None if t is None else t.to(dtype) for t in (input, weight, bias))
        return F.layer_norm(input, shape, weight, bias, eps)

    def unsupported(self, t: Any, options: Options) -> str | None:
        x, n, params = t.input, len(options.shape), [p for p in (t.weight, t.bias) if p is not None]
        if n == 0 or tuple(x.shape[-n:]) != options.shape:
            return BadInput(f"an input {tuple(x.shape)} that doesn't end in {options.shape}")
        for p in params:
            if tuple(p.shape) != options.shape:
                return BadInput(f"a weight or bias {tuple(p.shape)}, not {options.shape}")
            if p.dtype != params[0].dtype or p.dtype not in (x.dtype, torch.float32):
                return BadInput(f"an input of {x.dtype} with weights of {', '.join(str(q.dtype) for q in params)}")
            if p.dtype == torch.float32 and x.dtype == torch.float64:
                return BadInput("an input of float64 with weights of float32")
        return None

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        found: dict[str, Out | str] = {"output": Out(tuple(t.input.shape), options.dtype or t.input.dtype)}
        return found | self._statistics(t.input, options, needs)

    def _statistics(self, x: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        """Mean and rstd for the backward, unless the bias alone asks for a gradient, which is a sum of dy."""
        if not needs or not any(needs[:-1]):
            return {}
        statistic = _statistic(x, options.shape)
        return {"mean": statistic, "rstd": statistic}

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        size = math.prod(options.shape)
        kernels.layer_norm(
            t.input, None, t.weight, t.bias, out.output, None, out.mean, out.rstd, size, options.eps
        )  # fmt: skip

    def saves(self, t: Any, options: Options, needs: Needs) -> tuple[str, ...]:
        if not any(needs[:-1]):
            return ()
        # The normalised input, which dx and dw are made of, follows from the input; the weight is a factor of dx alone.
        return ("input", *(("weight",) if needs[0] and t.weight is not None else ()), "mean", "rstd")

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        kernels.layer_norm_grad(
            dy.output, None, saved.input, saved.weight, saved.mean, saved.rstd,
            grads.input, grads.weight, grads.bias, math.prod(options.shape),
        )  # fmt: skip


class RMSNorm(Operation):
    """input (*, *shape), weight (*shape) or None -> output as input."""

    tensors = ("input", "weight")
    floats = ("input",)  # torch takes any weight
    autocast = staticmethod(lambda x: F.rms_norm(x, (1,)))
    widens = True

    class Options(NamedTuple):
        shape: tuple[int, ...]
        eps: float | None
        dtype: torch.dtype | None
        """The result's, where autocast has torch compute in another one than the input's."""

    def reference(self, input: Any, weight: Any, shape: Any, eps: float | None, dtype: torch.dtype | None) -> Any:
        if dtype is not None:
            input, weight = (None if t is None else t.to(dtype) for t in (input, weight))
        return F.rms_norm(input, shape, weight, eps)

    def unsupported(self, t: Any, options: Options) -> str | None:
        x, w, n = t.input, t.weight, len(options.shape)
        if n == 0 or tuple(x.shape[-n:]) != options.shape:
            return BadInput(f"an input {tuple(x.shape)} that doesn't end in {options.shape}")
        if w is not None:
            if tuple(w.shape) != options.shape:
                return BadInput(f"a weight {tuple(w.shape)}, not {options.shape}")
            if autocast.dtype_after(self.autocast, w) is not autocast.dtype_after(self.autocast, x):
                return "a weight of another dtype than the input's"
        if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            return "an input in channels_last"  # which torch's result keeps, on some devices
        return None

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        found: dict[str, Out | str] = {"output": Out(tuple(t.input.shape), options.dtype or t.input.dtype)}
        return found | {"rstd": _statistic(t.input, options.shape)} if needs else found

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        kernels.layer_norm(
            t.input, None, t.weight, None, out.output, None, None, out.rstd,
            math.prod(options.shape), _eps(options, t.input), center=False,
        )  # fmt: skip

    def saves(self, t: Any, options: Options, needs: Needs) -> tuple[str, ...]:
        return ("input", *(("weight",) if needs[0] and t.weight is not None else ()), "rstd")

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        kernels.layer_norm_grad(
            dy.output, None, saved.input, saved.weight, None, saved.rstd,
            grads.input, grads.weight, None, math.prod(options.shape), center=False,
        )  # fmt: skip


class RMSNormExpression(RMSNorm):
    """RMSNorm as models write it out of torch's functions, whose result is rounded more than once: here it is once."""

    autocast = None  # autocast doesn't change the dtypes of such an expression

    class Options(NamedTuple):  # pyright: ignore[reportIncompatibleVariableOverride]
        shape: tuple[int, ...]
        eps: float
        dtype: torch.dtype | None
        """Always None."""
        widens: bool
        """Whether the input is converted to float32 first."""
        scales_input: bool
        """Whether it is the input itself, rather than what it is converted to, that is scaled."""
        cast: str
        """Whether the result is converted "before" it is multiplied with the weight, or "after"; "" if it isn't."""
        to: torch.dtype | None
        """To which dtype; None: the input's."""

    def label(self, options: Any) -> str:
        return "rms_norm"

    def reference(self, input: Any, weight: Any, *options: Any) -> Any:
        _, eps, _, widens, scales_input, cast, to = options
        wide = input.to(torch.float32) if widens else input
        y = (input if scales_input else wide) * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        y = y.to(to or input.dtype) if cast == "before" else y
        y = y if weight is None else weight * y
        return y.to(to or input.dtype) if cast == "after" else y

    def unsupported(self, t: Any, options: Any) -> str | None:
        x, w = t.input, t.weight
        if x.dim() == 0 or not x.is_contiguous():
            return "an input whose strides the result would have"
        wide = options.widens and x.dtype != torch.float32
        if (wide and not options.cast) or options.to not in (None, x.dtype):
            return "a result of another dtype than the input's"
        if w is not None:
            if w.shape != x.shape[-1:]:
                return "a weight that isn't a row"
            if w.dtype != x.dtype and not (options.cast == "after" and w.dtype == torch.float32 and wide):
                return "a weight of another dtype than the input's"
        return None


def _eps(options: Any, x: Any) -> float:
    """Without one, torch's."""
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if options.eps is None else options.eps


_layer_norm, _rms_norm, _rms_norm_expression = LayerNorm(), RMSNorm(), RMSNormExpression()


class AddNorm(Operation):
    """input and residual (*, *shape) -> the normalised sum, and the sum: both may have other consumers. RMSNorm has no bias."""

    tensors = ("input", "residual", "weight", "bias")
    floats = ("input", "residual")
    widens = True

    class Options(NamedTuple):
        shape: tuple[int, ...]
        eps: float | None
        dtype: torch.dtype | None
        """As LayerNorm's."""
        center: bool
        """False for RMSNorm."""

    def reference(self, *args: Any) -> Any:
        raise NotImplementedError("a joined call, which is never made of torch's functions")

    def _norm(self, options: Any) -> Operation:
        """What the sum goes into. Its options are the first ones."""
        return _layer_norm if options.center else _rms_norm

    def probe(self, options: Any) -> autocast.Probe | None:
        return self._norm(options).autocast

    def unsupported(self, t: Any, options: Any) -> str | None:
        if t.residual.shape != t.input.shape:
            return "a residual that is broadcast"
        if not (t.input.is_contiguous() and t.residual.is_contiguous()):
            return "a sum whose strides torch would choose by those of its terms"
        if autocast.dtype_after(self._norm(options).autocast, t.input) is not t.input.dtype:
            return "autocast, which concerns the normalisation and not the sum"
        return self._norm(options).unsupported(t, options)

    def label(self, options: Any) -> str:
        return self._norm(options).label(options)

    def results(self, options: Any) -> int:
        return 2

    def outputs(self, t: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        like = Out(tuple(t.input.shape), t.input.dtype)
        found: dict[str, Out | str] = {"output": like, "sum": like}
        return found | dict.fromkeys(_statistics(options, needs or ()), _statistic(t.input, options.shape))

    def forward(self, t: Any, out: Named, options: Any, precision: str) -> None:
        self._launch_forward(t, out, options, None)

    def _launch_forward(self, t: Any, out: Named, options: Any, drop: Any) -> None:
        kernels.layer_norm(
            t.input, t.residual, t.weight, t.bias, out.output, out.sum, out.mean, out.rstd,
            math.prod(options.shape), _eps(options, t.input), options.center, drop,
        )  # fmt: skip

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        statistics = _statistics(options, needs)
        through = needs[0] or needs[1]
        return ("sum", *(("weight",) if through and t.weight is not None else ()), *statistics) if statistics else ()

    def gradients(self, like: Any, options: Any, needs: Needs) -> tuple[Out | int | str | None, ...]:
        dx, dr, *rest = super().gradients(like, options, needs)
        return dx, 0 if dx is not None and dr is not None else dr, *rest  # both terms of a sum have its gradient

    def reached(self, given: Sequence[str], needs: Needs) -> Needs:
        return needs if "output" in given else (*needs[:2], *[False] * len(needs[2:]))

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        dx = grads.input if grads.input is not None else grads.residual
        self._launch_backward(grads, dx, dy, saved, options, None)

    def _launch_backward(self, grads: Any, dx: Any, dy: Named, saved: Named, options: Any, drop: Any) -> None:
        kernels.layer_norm_grad(
            dy.output, dy.sum, saved.sum, saved.weight, saved.mean, saved.rstd,
            dx, grads.weight, grads.bias, math.prod(options.shape), options.center, drop,
        )  # fmt: skip

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Any, needs: Needs) -> Tensors:
        """From the sum, which was saved; what it is made of wasn't."""
        total, through = dy.sum, needs[0] or needs[1]
        dx = dw = db = None
        if dy.output is not None:
            norm, last = self._norm(options), 4 if options.center else 3
            alone, of_sum = Named(output=dy.output), Named(saved, input=saved.sum)
            likes, asked = (like[0], *like[2:last]), (through, *needs[2:last])
            dx, dw, *bias = norm.differentiate(
                alone, of_sum, likes, norm.Options(*options[: len(norm.Options._fields)]), asked
            )
            db = bias[0] if bias else None
        dx = total if dx is None else dx if total is None else dx + total
        return dx if needs[0] else None, dx if needs[1] else None, dw, db


class AddRMSNormExpression(AddNorm):
    """The same of an RMSNorm that a model writes out, which has no bias."""

    class Options(NamedTuple):  # pyright: ignore[reportIncompatibleVariableOverride]
        shape: tuple[int, ...]
        eps: float
        dtype: torch.dtype | None
        widens: bool
        scales_input: bool
        cast: str
        to: torch.dtype | None
        """All as RMSNormExpression's."""
        center: bool = False

    def _norm(self, options: Any) -> Operation:
        return _rms_norm_expression


def _statistics(options: Any, needs: Sequence[bool]) -> tuple[str, ...]:
    """What the gradients are made of beside the sum: nothing, if that of the bias alone is asked for, which is a sum of dy."""
    return () if not any(needs[:3]) else ("mean", "rstd") if options.center else ("rstd",)


_add_norm, _add_rms_norm_expression = AddNorm(), AddRMSNormExpression()


def _are_sizes(shape: Any) -> bool:
    """Whether torch takes this for a normalized_shape."""
    return isinstance(shape, (tuple, list)) and all([isinstance(n, int) for n in shape])


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """(input - mean) / sqrt(var + eps) * weight + bias, mean and biased variance over the last dimensions. As
    torch.nn.functional.layer_norm.

    Shape: input (*, *normalized_shape) with any strides, weight and bias normalized_shape; the result contiguous.
    Dtype: float16, bfloat16, float32, float64; weight and bias alike, of the input's dtype or, with a 16-bit input, float32.
        Computed in float32 (float64). Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.layer_norm.html; Ba, Kiros and Hinton, "Layer
        Normalization", arXiv:1607.06450.
    """
    if not _are_sizes(normalized_shape) or not isinstance(eps, (int, float)):
        return _layer_norm.refused((input, weight, bias), (normalized_shape, eps, None), "normalized_shape or eps")
    return _layer_norm((input, weight, bias), tuple(normalized_shape), float(eps), None)


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """input / sqrt(mean(input^2) + eps) * weight, the mean over the last dimensions. As torch.nn.functional.rms_norm.

    Shape: input (*, *normalized_shape) with any strides but channels_last's, weight normalized_shape; the result contiguous.
    Dtype: float16, bfloat16, float32, float64, the weight's the same; others are torch's. Computed in float32 (float64), whose
        smallest step above 1 is the default of eps. Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.rms_norm.html; Zhang and Sennrich, "Root Mean
        Square Layer Normalization", arXiv:1910.07467.
    """
    if not _are_sizes(normalized_shape) or not (eps is None or isinstance(eps, (int, float))):
        return _rms_norm.refused((input, weight), (normalized_shape, eps, None), "normalized_shape or eps")
    return _rms_norm((input, weight), tuple(normalized_shape), None if eps is None else float(eps), None)


def add_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float | None,
    center: bool,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """layer_norm(input + residual), without `center` rms_norm, and the sum, in one pass over memory; None where the kernels don't
    take both, or autocast would compute the two in different dtypes."""
    eps = None if eps is None else float(eps)
    return _add_norm((input, residual, weight, bias), tuple(normalized_shape), eps, None, center, joined=True)


def rms_norm_expression(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    widens: bool,
    scales_input: bool,
    cast: str,
    to: torch.dtype | None,
) -> torch.Tensor:
    """RMSNorm over the last dimension, as a model writes it out (`RMSNormExpression`)."""
    return _rms_norm_expression((input, weight), tuple(input.shape[-1:]), eps, None, widens, scales_input, cast, to)


def add_rms_norm_expression(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, *options: Any
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """rms_norm_expression(input + residual, weight, *options), and the sum, in one pass over memory; None where the kernels don't
    take both."""
    tensors = (input, residual, weight, None)
    eps, *how = options
    return _add_rms_norm_expression(tensors, tuple(input.shape[-1:]), eps, None, *how, joined=True)
