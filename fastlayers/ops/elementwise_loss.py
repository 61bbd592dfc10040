"""Losses of one element each, reduced to their mean or their sum. A loss is a value: the name of a function and its options."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from .. import _kernels, _torch
from .. import _torch_functional as F
from .._kernels import is_plain
from ..dispatch import support
from ..dispatch.support import BadInput
from ..operation import Operation
from ..values import Named, Needs, Out, value

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels import elementwise_loss as kernels

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "mse_loss",
    "poisson_nll_loss",
    "smooth_l1_loss",
]

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_BUT_MEAN = ("none", "sum", "batchmean")
_BOTH = ("input", "target")


class Rule(NamedTuple):
    """What is known of a loss. Its tile functions, `name` and `name_grad`, are in kernels/elementwise_loss.py."""

    label: str
    """The name of torch's function."""
    torch: Callable[..., torch.Tensor]
    """torch's function of (input, target, weight, pos_weight, reduction, *options)."""
    of_input: tuple[str, ...] = _BOTH
    """What the derivative by the input is computed from."""
    of_target: Callable[..., tuple[str, ...]] = lambda *args: _BOTH
    """What the derivative by the target is computed from, with these options."""
    keeps_strides: tuple[str, ...] = ()
    """The reductions with which torch's gradients have the strides of the tensors; with others they are contiguous."""


def _kl_div(log_target: bool) -> Callable[..., torch.Tensor]:
    """torch.kl_div, which doesn't warn of "mean" as F.kl_div does."""

    def reference(x: Any, t: Any, w: Any, p: Any, reduction: str) -> torch.Tensor:
        if reduction not in _REDUCTIONS:
            return F.kl_div(x, t, reduction=reduction, log_target=log_target)
        return torch.kl_div(x, t, _REDUCTIONS[reduction], log_target=log_target)

    return reference


def _poisson(log_input: bool) -> Callable[..., torch.Tensor]:
    return lambda x, t, w, p, reduction, full, eps: F.poisson_nll_loss(
        x, t, log_input=log_input, full=bool(full), eps=eps, reduction=reduction
    )


def _of_counts(full: bool, eps: float) -> tuple[str, ...]:
    return _BOTH if full else ("input",)


RULES: dict[str, Rule] = {
    "mse": Rule("mse_loss", lambda x, t, w, p, reduction: F.mse_loss(x, t, reduction=reduction)),
    "l1": Rule("l1_loss", lambda x, t, w, p, reduction: F.l1_loss(x, t, reduction=reduction), keeps_strides=_BUT_MEAN),
    "smooth_l1": Rule(
        "smooth_l1_loss", lambda x, t, w, p, reduction, beta: F.smooth_l1_loss(x, t, reduction=reduction, beta=beta)
    ),
    "huber": Rule("huber_loss", lambda x, t, w, p, reduction, delta: F.huber_loss(x, t, reduction, delta)),
    "binary_cross_entropy": Rule(
        "binary_cross_entropy",
        lambda x, t, w, p, reduction: F.binary_cross_entropy(x, t, w, reduction=reduction),
        of_target=lambda: ("input",),
        keeps_strides=("none", "mean", "sum"),
    ),
    "binary_cross_entropy_with_logits": Rule(
        "binary_cross_entropy_with_logits",
        lambda x, t, w, p, reduction: F.binary_cross_entropy_with_logits(x, t, w, reduction=reduction, pos_weight=p),
        of_target=lambda: ("input",),
        keeps_strides=("none", "mean", "sum"),
    ),
    "kl_div": Rule("kl_div", _kl_div(False), of_input=("target",), keeps_strides=_BUT_MEAN),
    "kl_div_of_logs": Rule("kl_div", _kl_div(True), of_input=("target",), keeps_strides=_BUT_MEAN),
    "poisson": Rule("poisson_nll_loss", _poisson(False), of_target=_of_counts, keeps_strides=_BUT_MEAN),
    "poisson_of_log": Rule("poisson_nll_loss", _poisson(True), of_target=_of_counts, keeps_strides=_BUT_MEAN),
}
"""Every loss by its name."""


@value
class Loss(NamedTuple):
    """A loss, compared, hashed and passed to kernels by value: HuberLoss(delta=1.0) is not HuberLoss(delta=2.0)."""

    function: str
    args: tuple[float, ...] = ()


@functools.cache
def _probe(loss: Loss) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: RULES[loss.function].torch(x, x, None, None, "mean", *loss.args)


@functools.lru_cache(maxsize=4096)
def _strides(shape: tuple[int, ...], *strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides that torch gives the result of a pointwise function of two tensors; None where it is contiguous."""
    result = torch.mul(*[torch.empty_strided(shape, s, device="meta") for s in strides])
    return None if result.is_contiguous() else result.stride()


class ElementwiseLoss(Operation):
    """input and target of one shape, weight and pos_weight that broadcast to it or None -> () or the input's shape.

    One operation for all losses. Saves the tensors that the gradients are computed from, and nothing else.
    """

    tensors = ("input", "target", "weight", "pos_weight")
    widens = True
    compiled = False  # Inductor fuses them with whatever stands around them

    class Options(NamedTuple):
        loss: Loss
        reduction: str
        """Also "batchmean": the sum divided by the size of the first dimension."""
        dtype: torch.dtype | None
        """The result's, where autocast has torch compute in another one than the input's."""

    def reference(self, *args: Any) -> Any:
        *tensors, loss, reduction, dtype = args
        if dtype is not None:
            tensors = [None if t is None else t.to(dtype) for t in tensors]
        sums = "sum" if reduction == "batchmean" else reduction
        result = RULES[loss.function].torch(*tensors, sums, *loss.args)
        return result / len(args[0]) if reduction == "batchmean" else result

    def label(self, options: Options) -> str:
        return RULES[options.loss.function].label

    def probe(self, options: Options) -> Any:
        return _probe(options.loss)

    def unsupported(self, t: Any, options: Options) -> str | None:
        x, target, *weights = t
        if target is None:
            return BadInput("no target")
        if x.shape != target.shape or options.reduction not in (*_REDUCTIONS, "batchmean"):
            return BadInput(f"an input {tuple(x.shape)}, a target {tuple(target.shape)}, {options.reduction!r}")
        for w in weights:
            if w is not None and w.requires_grad:
                return BadInput("a weight that requires grad")
            if w is not None and w.shape != x.shape:
                try:
                    whole = torch.broadcast_shapes(w.shape, x.shape) == x.shape
                except RuntimeError:
                    return BadInput(f"a weight {tuple(w.shape)} for an input {tuple(x.shape)}")
                if not whole:
                    return "a weight with more elements than the input"
        return None

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        dtype = options.dtype or t.input.dtype
        if options.reduction != "none":
            return {"output": Out((), dtype)}
        shape = tuple(t.input.shape)
        return {"output": Out(shape, dtype, _strides(shape, tuple(t.input.stride()), tuple(t.target.stride())))}

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        x, target, weight, pos_weight = t
        kernels.elementwise_loss(x, target, weight, pos_weight, out.output, options.loss, options.reduction)

    def saves(self, t: Any, options: Options, needs: Needs) -> tuple[str, ...]:
        rule = RULES[options.loss.function]
        needed = (rule.of_input if needs[0] else ()) + (rule.of_target(*options.loss.args) if needs[1] else ())
        weights = [name for name in self.tensors[2:] if getattr(t, name) is not None]
        return (*[name for name in _BOTH if name in needed], *weights)

    def gradients(self, like: Any, options: Options, needs: Needs) -> tuple[Out | int | str | None, ...]:
        keeps = options.reduction in RULES[options.loss.function].keeps_strides
        like = [Out.pointwise(o) if keeps else Out(tuple(o.shape), o.dtype) for o in like[:2]]
        return (*[o if need else None for o, need in zip(like, needs, strict=False)], None, None)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        kernels.elementwise_loss_grad(
            dy.output, saved.input, saved.target, saved.weight, saved.pos_weight,
            grads.input, grads.target, options.loss, options.reduction,
        )  # fmt: skip


_elementwise_loss = ElementwiseLoss()

_MSE, _L1, _BCE, _BCE_WITH_LOGITS = (
    Loss(name) for name in ("mse", "l1", "binary_cross_entropy", "binary_cross_entropy_with_logits")
)
_KL_DIV = {False: Loss("kl_div"), True: Loss("kl_div_of_logs")}


def _run(
    loss: Loss, input: torch.Tensor, target: torch.Tensor, reduction: str, weight: Any = None, pos_weight: Any = None
) -> torch.Tensor:
    return _elementwise_loss((input, target, weight, pos_weight), loss, reduction, None)


def _reduction(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    return reduction if size_average is None and reduce is None else _torch.reduction(size_average, reduce)


def _elsewhere(function: Callable[..., torch.Tensor], reason: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    """torch's own function of arguments that the record has no words for."""
    if is_dynamo_compiling():
        return function(*args, **kwargs)
    return support.run_reference(function.__name__, reason, lambda: function(*args, **kwargs))


def _of_one_shape(input: Any, target: Any, warn: bool) -> tuple[Any, Any]:
    """`support.of_one_shape`, with the warning that torch gives where one isn't meant to rely on it, and then torch's error."""
    if warn and is_plain(input) and is_plain(target) and input.shape != target.shape:
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. Please ensure they have the same size.",
            stacklevel=3,
        )
        return tuple(torch.broadcast_tensors(input, target))
    return support.of_one_shape(input, target)


def mse_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """(input - target)^2. As torch.nn.functional.mse_loss.

    Shape: input and target broadcast to one shape, with torch's warning where they differ; the result () or, with reduction
        "none", that shape. Any strides.
    Dtype: float16, bfloat16, float32, float64, all alike; computed and added up in float32 (float64). Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets), and weight is None.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.mse_loss.html
    """
    if weight is not None:
        arguments = dict(size_average=size_average, reduce=reduce, reduction=reduction, weight=weight)
        return _elsewhere(F.mse_loss, "a weight", input, target, **arguments)
    input, target = _of_one_shape(input, target, warn=True)
    return _run(_MSE, input, target, _reduction(reduction, size_average, reduce))


def l1_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """abs(input - target). As torch.nn.functional.l1_loss.

    Shape: input and target broadcast to one shape, with torch's warning where they differ; the result () or, with reduction
        "none", that shape. Any strides.
    Dtype: float16, bfloat16, float32, float64, all alike; computed and added up in float32 (float64). Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets), and weight is None.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.l1_loss.html
    """
    if weight is not None:
        arguments = dict(size_average=size_average, reduce=reduce, reduction=reduction, weight=weight)
        return _elsewhere(F.l1_loss, "a weight", input, target, **arguments)
    input, target = _of_one_shape(input, target, warn=True)
    return _run(_L1, input, target, _reduction(reduction, size_average, reduce))


def smooth_l1_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> torch.Tensor:
    """d^2 / (2 beta) where d = abs(input - target) is less than beta, else d - beta / 2. As torch.nn.functional.smooth_l1_loss.

    Shape: input and target broadcast to one shape, with torch's warning where they differ; the result () or, with reduction
        "none", that shape. Any strides.
    Dtype: float16, bfloat16, float32, float64, all alike; computed and added up in float32 (float64). Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.smooth_l1_loss.html
    """
    if not isinstance(beta, (int, float)) or not beta >= 0:
        arguments = dict(size_average=size_average, reduce=reduce, reduction=reduction, beta=beta)
        return _elsewhere(F.smooth_l1_loss, BadInput(f"beta {beta}"), input, target, **arguments)
    input, target = _of_one_shape(input, target, warn=True)
    loss = _L1 if beta == 0 else Loss("smooth_l1", (float(beta),))
    return _run(loss, input, target, _reduction(reduction, size_average, reduce))


def huber_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """d^2 / 2 where d = abs(input - target) is at most delta, else delta (d - delta / 2). As torch.nn.functional.huber_loss.

    Shape: input and target broadcast to one shape, with torch's warning where they differ; the result () or, with reduction
        "none", that shape. Any strides.
    Dtype: float16, bfloat16, float32, float64, all alike; computed and added up in float32 (float64). Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets), and weight is None.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.huber_loss.html
    """
    if weight is not None:
        return _elsewhere(F.huber_loss, "a weight", input, target, reduction, delta, weight)
    if not isinstance(delta, (int, float)) or not delta > 0:
        return _elsewhere(F.huber_loss, BadInput(f"delta {delta}"), input, target, reduction, delta)
    input, target = _of_one_shape(input, target, warn=True)
    return _run(Loss("huber", (float(delta),)), input, target, reduction)


def binary_cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """-weight (target log input + (1 - target) log(1 - input)), each logarithm at least -100. As
    torch.nn.functional.binary_cross_entropy.

    Shape: input and target the same, any strides, weight one that broadcast to it; the result () or, with reduction "none",
        input's.
    Dtype: float16, bfloat16, float32, float64, all alike; computed and added up in float32 (float64). Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets).
    Raises: what torch raises; but an input that is no probability, for which torch stops the process on a GPU, gives NaN.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.binary_cross_entropy.html
    """
    return _run(_BCE, input, target, _reduction(reduction, size_average, reduce), weight)


def binary_cross_entropy_with_logits(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """-weight (pos_weight target log p + (1 - target) log(1 - p)) with p = sigmoid(input). As
    torch.nn.functional.binary_cross_entropy_with_logits.

    Shape: input and target the same, any strides, weight and pos_weight ones that broadcast to it; the result () or,
        with reduction "none", input's.
    Dtype: float16, bfloat16, float32, float64, all alike; computed and added up in float32 (float64). Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.binary_cross_entropy_with_logits.html
    """
    return _run(_BCE_WITH_LOGITS, input, target, _reduction(reduction, size_average, reduce), weight, pos_weight)


def kl_div(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> torch.Tensor:
    """target (log target - input), or exp(target) (target - input) with log_target. As torch.nn.functional.kl_div.

    Shape: input and target broadcast to one shape; the result () or, with reduction "none", that shape. Any strides.
    Dtype: float16, bfloat16, float32, float64, all alike; computed and added up in float32 (float64). Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.kl_div.html
    """
    if size_average is not None or reduce is not None:
        reduction = _torch.reduction(size_average, reduce)
    elif not (is_plain(input) and is_plain(target)):
        arguments = dict(reduction=reduction, log_target=log_target)
        reason = support.unusable((input, target)) or "a tensor that the kernels can't read"
        return _elsewhere(F.kl_div, reason, input, target, **arguments)
    elif reduction == "mean":
        warnings.warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
            "'mean' will be changed to behave the same as 'batchmean' in the next major release.",
            stacklevel=2,
        )
    loss = _KL_DIV[bool(log_target)]
    if reduction != "batchmean":
        return _run(loss, *_of_one_shape(input, target, warn=False), reduction)
    if input.dim() > 0 and input.shape == target.shape:
        return _run(loss, input, target, "batchmean")
    total = _run(loss, *_of_one_shape(input, target, warn=False), "sum")
    return total / len(input) if input.dim() > 0 else total


def poisson_nll_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """exp(input) - target input, or input - target log(input + eps) without log_input; with `full`, where target > 1,
    Stirling's approximation of log(target!) besides. As torch.nn.functional.poisson_nll_loss.

    Shape: input and target broadcast to one shape; the result () or, with reduction "none", that shape. Any strides.
    Dtype: float16, bfloat16, float32, float64, all alike; computed and added up in float32 (float64). Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.poisson_nll_loss.html
    """
    reduction = _reduction(reduction, size_average, reduce)
    if not isinstance(eps, (int, float)) or reduction not in _REDUCTIONS:
        arguments = dict(log_input=log_input, full=full, eps=eps, reduction=reduction)
        return _elsewhere(F.poisson_nll_loss, BadInput("options"), input, target, **arguments)
    loss = Loss("poisson_of_log" if log_input else "poisson", (bool(full), float(eps)))
    return _run(loss, *_of_one_shape(input, target, warn=False), reduction)
