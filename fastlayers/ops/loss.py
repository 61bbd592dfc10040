"""Cross entropy of logits and a target of classes or of probabilities, and the negative log likelihood of classes.

With p = softmax(x) along the classes: the loss at a position whose class is t is -w_t log p_t, and its gradient w_t (p - 1_t);
with probabilities q it is -sum_c w_c q_c log p_c.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _kernels, _torch
from .. import _torch_functional as F
from ..dispatch.support import BadInput
from ..operation import Operation
from ..values import Named, Needs, Out

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels import loss as kernels
    from ..kernels import nll_loss as nll_kernels

__all__ = ["cross_entropy", "nll_loss"]


def _positions(x: Any) -> tuple[int, ...]:
    """The shape of logits (N, C, d1, ...) or (C,) without the classes."""
    return (*x.shape[:1], *x.shape[2:]) if len(x.shape) > 1 else ()


class CrossEntropy(Operation):
    """input (N, C, d1, ...) or (C,), target (N, d1, ...) or () of classes, weight (C,) or None -> () or the target's shape.

    Saves the logits and, beyond some number of classes, two numbers a position; the logits are never written into.
    """

    tensors = ("input", "target", "weight")
    floats = ("input", "weight")
    autocast = staticmethod(lambda x: F.cross_entropy(x, torch.zeros(1, dtype=torch.int64, device=x.device)))
    widens = True

    class Options(NamedTuple):
        ignore_index: int
        reduction: str
        label_smoothing: float
        dtype: torch.dtype | None
        """The result's, where autocast has torch compute in another one than the input's."""

    def reference(
        self, input: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, label_smoothing: Any, dtype: Any
    ) -> Any:
        if dtype is not None:
            input = input.to(dtype)
            target = target.to(dtype) if target.is_floating_point() else target
            weight = None if weight is None else weight.to(dtype)
        return F.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )  # fmt: skip

    def label(self, options: Options) -> str:
        return "cross_entropy"

    def unsupported(self, t: Any, options: Options) -> str | None:
        x, target, weight = t
        if target is None:
            return BadInput("no target")
        if x.dim() == 0 or options.reduction not in ("none", "mean", "sum") or not 0 <= options.label_smoothing <= 1:
            return BadInput(f"reduction {options.reduction!r} and label_smoothing {options.label_smoothing}")
        classes = x.shape[0] if x.dim() == 1 else x.shape[1]
        if weight is not None and tuple(weight.shape) != (classes,):
            return BadInput(f"a weight {tuple(weight.shape)} for {classes} classes")
        if classes == 0:
            return "no classes"
        if weight is not None and weight.requires_grad:
            return "a weight that requires grad"
        return self._unsupported_target(x, target, options)

    def _unsupported_target(self, x: Any, target: Any, options: Options) -> str | None:
        if target.dtype != torch.int64 and (target.dtype != torch.uint8 or x.dim() > 2):
            return BadInput(f"a target of {target.dtype}")
        if tuple(target.shape) != _positions(x):
            return BadInput(f"a target {tuple(target.shape)} for an input {tuple(x.shape)}")
        return None

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        x = t.input
        found: dict[str, Out | str] = {
            "output": Out(_positions(x) if options.reduction == "none" else (), options.dtype or x.dtype)
        }
        if needs is None:
            return found
        kept = torch.promote_types(x.dtype, torch.float32)
        if self._divides_by_weights(options):
            found["total"] = Out((), kept, differentiable=False)
        statistics = kernels.statistics_shape(
            x.shape, weighted=t.weight is not None, label_smoothing=options.label_smoothing,
            probabilities=t.target.dtype.is_floating_point,
        )  # fmt: skip
        if statistics is not None:
            found["statistics"] = Out(statistics, kept, differentiable=False)
        return found

    def _divides_by_weights(self, options: Options) -> bool:
        return options.reduction == "mean"

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        x, target, weight = t
        kernels.cross_entropy(x, target, weight, out.output, out.total, out.statistics, **self._keywords(options))

    def _keywords(self, options: Options) -> dict[str, Any]:
        names = ("ignore_index", "reduction", "label_smoothing")
        return dict(zip(names, options[:3], strict=True))

    def saves(self, t: Any, options: Options, needs: Needs) -> tuple[str, ...]:
        outputs = [name for name in self.outputs(t, options, needs) if name != "output"]
        return ("input", "target", *(() if t.weight is None else ("weight",)), *outputs)

    def gradients(self, like: Any, options: Any, needs: Needs) -> tuple[Out | int | str | None, ...]:
        return tuple(Out.pointwise(t) if need else None for t, need in zip(like, needs, strict=True))

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        kernels.cross_entropy_grad(
            dy.output, saved.input, saved.target, saved.weight, saved.total, saved.statistics,
            grads.input, grads.target, **self._keywords(options),
        )  # fmt: skip


class CrossEntropyProbabilities(CrossEntropy):
    """The same of a target of probabilities, in the input's shape, which may ask for a gradient, too."""

    floats = None

    def _unsupported_target(self, x: Any, target: Any, options: Any) -> str | None:
        if tuple(target.shape) != tuple(x.shape) or options.ignore_index >= 0:
            return BadInput(f"a target {tuple(target.shape)} and ignore_index {options.ignore_index}")
        return None

    def _divides_by_weights(self, options: Any) -> bool:
        return False


class NLLLoss(Operation):
    """input (N, C, d1, ...) or (C,), target (N, d1, ...) or () of classes, weight (C,) or None -> () or the target's shape.

    Saves the classes, their weights and what the mean was divided by; of the input its shape is enough.
    """

    tensors = ("input", "target", "weight")
    floats = ("input", "weight")
    autocast = staticmethod(lambda x: F.nll_loss(x, torch.zeros(1, dtype=torch.int64, device=x.device)))
    widens = True

    class Options(NamedTuple):
        ignore_index: int
        reduction: str
        dtype: torch.dtype | None
        """The result's, where autocast has torch compute in another one than the input's."""

    def reference(self, input: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, dtype: Any) -> Any:
        if dtype is not None:
            input, weight = input.to(dtype), None if weight is None else weight.to(dtype)
        return F.nll_loss(input, target, weight, ignore_index=ignore_index, reduction=reduction)

    def label(self, options: Options) -> str:
        return "nll_loss"

    def unsupported(self, t: Any, options: Options) -> str | None:
        x, target, weight = t
        if target is None or x.dim() == 0 or options.reduction not in ("none", "mean", "sum"):
            return BadInput(f"an input {tuple(x.shape)}, reduction {options.reduction!r}")
        classes = x.shape[0] if x.dim() == 1 else x.shape[1]
        if weight is not None and (tuple(weight.shape) != (classes,) or weight.requires_grad):
            return BadInput(f"a weight {tuple(weight.shape)} for {classes} classes, or one that requires grad")
        if target.dtype != torch.int64 and (target.dtype != torch.uint8 or x.dim() > 2):
            return BadInput(f"a target of {target.dtype}")
        if tuple(target.shape) != _positions(x):
            return BadInput(f"a target {tuple(target.shape)} for an input {tuple(x.shape)}")
        return "no classes" if classes == 0 else None

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        x = t.input
        found: dict[str, Out | str] = {
            "output": Out(_positions(x) if options.reduction == "none" else (), options.dtype or x.dtype)
        }
        if needs is None or options.reduction != "mean":
            return found
        return found | {"total": Out((), torch.promote_types(x.dtype, torch.float32), differentiable=False)}

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        x, target, weight = t
        words: dict[str, Any] = dict(ignore_index=options.ignore_index, reduction=options.reduction)
        nll_kernels.nll_loss(x, target, weight, out.output, out.total, **words)

    def saves(self, t: Any, options: Options, needs: Needs) -> tuple[str, ...]:
        weight, total = t.weight is not None, options.reduction == "mean"
        return ("target", *(("weight",) if weight else ()), *(("total",) if total else ()))

    def gradients(self, like: Any, options: Options, needs: Needs) -> tuple[Out | int | str | None, ...]:
        x = like.input  # torch keeps the strides of images
        return (Out.pointwise(x) if len(x.shape) == 4 else Out(tuple(x.shape), x.dtype), None, None)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        nll_kernels.nll_loss_grad(
            dy.output, saved.target, saved.weight, saved.total, grads.input,
            ignore_index=options.ignore_index, reduction=options.reduction,
        )  # fmt: skip


_cross_entropy, _of_probabilities, _nll_loss = CrossEntropy(), CrossEntropyProbabilities(), NLLLoss()


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The cross entropy of logits and a target, of classes or of probabilities. As torch.nn.functional.cross_entropy.

    Shape: input (N, C, d1, ...) or (C,), target of classes (N, d1, ...) or (), of probabilities as input, weight (C,); the
        result () or, with reduction "none", (N, d1, ...) or (). All with any strides.
    Dtype: input, weight and probabilities float16, bfloat16, float32 or float64, all alike; classes int64 or, of an input with
        up to two dimensions, uint8. Computed in float32 (float64), each logit read once. Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets), there are classes, and weight doesn't
        require grad.
    Raises: what torch raises; but a class that is out of range, for which torch stops the process on a GPU, gives NaN.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.cross_entropy.html; the single pass for maximum
        and sum: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.
    """
    if size_average is not None or reduce is not None:
        reduction = _torch.reduction(size_average, reduce)
    op = _of_probabilities if torch.is_tensor(target) and target.is_floating_point() else _cross_entropy
    if type(ignore_index) is not int or not isinstance(label_smoothing, (int, float)) or math.isnan(label_smoothing):
        return op.refused((input, target, weight), (ignore_index, reduction, label_smoothing, None), "options")
    return op((input, target, weight), ignore_index, reduction, float(label_smoothing), None)


def nll_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """The negative log likelihood of classes, given log probabilities. As torch.nn.functional.nll_loss.

    Shape: input (N, C, d1, ...) or (C,), target (N, d1, ...) or (), weight (C,); the result () or, with reduction "none",
        target's. All with any strides.
    Dtype: input and weight float16, bfloat16, float32 or float64, alike; target int64 or, of an input with up to two dimensions,
        uint8. Added up in float32 (float64). Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets), and there are classes.
    Raises: what torch raises; but a class that is out of range, for which torch stops the process on a GPU, gives NaN.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.nll_loss.html
    """
    if size_average is not None or reduce is not None:
        reduction = _torch.reduction(size_average, reduce)
    if type(ignore_index) is not int:
        return _nll_loss.refused((input, target, weight), (ignore_index, reduction, None), "ignore_index")
    return _nll_loss((input, target, weight), ignore_index, reduction, None)
