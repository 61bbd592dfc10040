"""Cross entropy of a linear layer's results, which are never written."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from .. import _kernels
from .. import _torch_functional as F
from .._kernels import is_plain
from ..dispatch import autocast, support
from ..dispatch.precision import matmul_precision
from ..dispatch.support import BadInput
from ..operation import Operation
from ..values import Named, Needs, Out, Tensors

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels import linear_cross_entropy as kernels

__all__ = ["linear_cross_entropy"]


def _product(x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, x)


def _losses(x: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x, torch.zeros(1, dtype=torch.int64, device=x.device))


class LinearCrossEntropy(Operation):
    """input (M, K) or (K,), linear_weight (N, K), target (M,) or () of classes, linear_bias and weight (N,) or None -> () or the
    target's shape.

    Saves two numbers a row beside what it is given. The backward computes the logits once more, for a chunk of rows at a time.
    """

    tensors = ("input", "linear_weight", "target", "linear_bias", "weight")
    floats = ("input", "linear_weight", "linear_bias", "weight")
    autocast = staticmethod(_product)

    class Options(NamedTuple):
        ignore_index: int
        reduction: str
        dtype: torch.dtype | None
        """The result's, where autocast has torch compute the loss in another one than the product."""

    def reference(
        self, input: Any, linear_weight: Any, target: Any, linear_bias: Any, weight: Any, *options: Any
    ) -> Any:
        ignore_index, reduction, dtype = options
        logits = F.linear(input, linear_weight, linear_bias)
        if dtype is not None:
            logits, weight = logits.to(dtype), None if weight is None else weight.to(dtype)
        return F.cross_entropy(logits, target, weight, ignore_index=ignore_index, reduction=reduction)

    def unsupported(self, t: Any, options: Options) -> str | None:
        if t.linear_weight.shape[0] == 0:
            return "no classes"
        if t.weight is not None and t.weight.requires_grad:
            return "a weight that requires grad"
        return None

    def prepare(self, tensors: Tensors, options: Options) -> tuple[Tensors, Any]:
        x, w, target, bias, weight = tensors
        x, w, bias = autocast.convert(_product, (x, w, bias))
        dtype = autocast.dtype_after(_losses, x)
        return (x, w, target, bias, weight), options if dtype is x.dtype else self.changed(options, dtype=dtype)

    def precision(self, dtype: torch.dtype) -> str:
        return matmul_precision(dtype)

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        dtype, shape = options.dtype or t.input.dtype, tuple(t.target.shape)
        found: dict[str, Out | str] = {"output": Out(shape if options.reduction == "none" else (), dtype)}
        if needs is None:
            return found
        kept = torch.promote_types(t.input.dtype, torch.float32)
        if options.reduction == "mean":
            found["total"] = Out((), kept, differentiable=False)
        return found | {"statistics": Out((2, math.prod(shape)), kept, differentiable=False)}

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        x, w, target, bias, weight = t
        rows, places = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x, target.reshape(target.numel())
        kernels.linear_cross_entropy(
            rows, w, bias, places, weight, out.output, out.total, out.statistics, precision=precision, **_words(options)
        )

    def saves(self, t: Any, options: Options, needs: Needs) -> tuple[str, ...]:
        given = [name for name in self.tensors if getattr(t, name) is not None]
        return (*given, *(("total",) if options.reduction == "mean" else ()), "statistics")

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        x, target, dx = saved.input, saved.target, grads.input
        if x.dim() == 1:
            x, target, dx = x[None], target[None], None if dx is None else dx[None]
        kernels.linear_cross_entropy_grad(
            dy.output, x, saved.linear_weight, saved.linear_bias, target, saved.weight, saved.total, saved.statistics,
            dx, grads.linear_weight, grads.linear_bias, precision=precision, **_words(options),
        )  # fmt: skip

    def flops(self, like: Any, options: Options, needs: Needs | None) -> int:
        size = 2 * math.prod(like.input.shape) * like.linear_weight.shape[0]
        return size if needs is None else size * (needs[0] + needs[1])


def _words(options: LinearCrossEntropy.Options) -> dict[str, Any]:
    return dict(ignore_index=options.ignore_index, reduction=options.reduction)


_linear_cross_entropy = LinearCrossEntropy()


def _reason_against(
    input: Any, linear_weight: Any, target: Any, linear_bias: Any, weight: Any, reduction: Any, ignore_index: Any,
    label_smoothing: Any, chunked: bool,
) -> str | None:  # fmt: skip
    """What the record has no words for."""
    given = [t for t in (input, linear_weight, target, linear_bias, weight) if t is not None]
    if input is None or linear_weight is None or target is None or not all([is_plain(t) for t in given]):
        return support.unusable(given) or BadInput("no tensor")
    if not 1 <= input.dim() <= 2 or linear_weight.dim() < 2 or input.shape[-1] != linear_weight.shape[-1]:
        return BadInput(f"an input {tuple(input.shape)} for a weight {tuple(linear_weight.shape)}")
    several, classes = linear_weight.dim() > 2, linear_weight.shape[:1]
    if (linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]) or (several and input.dim() == 1):
        return BadInput("an input or a bias that doesn't fit the weight")
    probabilities = target.shape == (*input.shape[:-1], *linear_weight.shape[:-1])
    if probabilities and (ignore_index is not None or not target.is_floating_point()):
        return BadInput("ignore_index beside probabilities, or probabilities of integers")
    if several or probabilities or label_smoothing != 0:
        return "several losses for each row" if several else "label_smoothing" if label_smoothing else "probabilities"
    if target.shape != input.shape[:-1] or (weight is not None and weight.shape != classes):
        return BadInput(f"a target {tuple(target.shape)} for an input {tuple(input.shape)}")
    if type(ignore_index) not in (int, type(None)) or reduction not in ("none", "mean", "sum"):
        return BadInput(f"ignore_index {ignore_index!r} and reduction {reduction!r}")
    if target.dtype != torch.int64 and (target.dtype != torch.uint8 or chunked):
        return BadInput(f"a target of {target.dtype}")
    return None


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> torch.Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target), without the logits in memory. As
    torch.nn.functional.linear_cross_entropy. The options, which say how torch divides the work, change nothing here.

    Shape: input (M, K) or (K,), linear_weight (N, K), target (M,) or (), linear_bias and weight (N,); the result () or, with
        reduction "none", target's. All with any strides.
    Dtype: floating tensors float16, bfloat16, float32 or float64, alike; target int64 or uint8. Logits and sums in float32
        (float64); float32 products obey torch.backends.cuda.matmul.fp32_precision. Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets), there are classes, each row has one loss,
        the target is of classes, label_smoothing is 0, and weight doesn't require grad.
    Raises: what torch raises; but a class that is out of range, for which torch stops the process on a GPU, gives NaN.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.linear_cross_entropy.html; Wijmans et al., "Cut
        Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009, which leaves out small gradients; here none are.
    """
    chunked = options is not None
    reason = _reason_against(
        input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, chunked
    )
    if reason is None:
        index = -100 if ignore_index is None else ignore_index
        return _linear_cross_entropy((input, linear_weight, target, linear_bias, weight), index, reduction, None)

    def call() -> torch.Tensor:
        if not hasattr(F, "linear_cross_entropy"):  # of torch 2.13
            logits = F.linear(input, linear_weight, linear_bias)
            index = -100 if ignore_index is None else ignore_index
            return F.cross_entropy(logits, target, weight, None, index, None, reduction, label_smoothing)
        return F.linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction,
            ignore_index=ignore_index, label_smoothing=label_smoothing, options=options,
        )  # fmt: skip

    return call() if is_dynamo_compiling() else support.run_reference("linear_cross_entropy", reason, call)
