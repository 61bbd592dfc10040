"""Rows of a table by their indices, and sums and means of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from .. import _kernels
from .. import _torch_functional as F
from ..dispatch import support
from ..dispatch.support import BadInput
from ..operation import Operation
from ..values import Named, Needs, Out

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels.embedding import bags as bag_kernels
    from ..kernels.embedding import rows as kernels

__all__ = ["embedding", "embedding_bag"]


class Embedding(Operation):
    """input (*) of indices, weight (ROWS, N) -> (*, N). Saves the indices alone."""

    tensors = ("input", "weight")
    floats = ("weight",)

    class Options(NamedTuple):
        padding_idx: int
        """The row that has no gradient; -1 for none."""
        scale_grad_by_freq: bool

    def reference(self, input: Any, weight: Any, padding_idx: int, scale_grad_by_freq: bool) -> Any:
        row = None if padding_idx == -1 else padding_idx
        return F.embedding(input, weight, row, scale_grad_by_freq=scale_grad_by_freq)

    def unsupported(self, t: Any, options: Options) -> str | None:
        if t.weight is None or t.weight.dim() != 2:
            return BadInput("no weight of two dimensions")
        if t.input.dtype not in (torch.int32, torch.int64):
            return BadInput(f"indices of {t.input.dtype}")
        return "2**31 indices and more" if t.input.numel() >= 2**31 else None

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        return {"output": Out((*t.input.shape, t.weight.shape[1]), t.weight.dtype)}

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        kernels.embedding(t.input, t.weight, out.output)

    def saves(self, t: Any, options: Options, needs: Needs) -> tuple[str, ...]:
        return ("input",)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        indices = saved.input.reshape(saved.input.numel())
        gradient = dy.output.reshape(len(indices), dy.output.shape[-1])
        kernels.embedding_grad(gradient, indices, grads.weight, options.padding_idx, options.scale_grad_by_freq)


class EmbeddingBag(Operation):
    """input (COUNT,) of indices with offsets (BAGS,), or (BAGS + 1,) with include_last_offset, or input (BAGS, LENGTH) without;
    weight (ROWS, N), per_sample_weights as input or None -> (BAGS, N).

    Saves the indices and offsets, the per_sample_weights or the bags' sizes; weight only for the gradient of the former.
    """

    tensors = ("input", "weight", "offsets", "per_sample_weights")
    floats = ("weight", "per_sample_weights")

    class Options(NamedTuple):
        scale_grad_by_freq: bool
        mode: str
        include_last_offset: bool
        padding_idx: int
        """The row that isn't counted; -1 for none."""

    def reference(
        self, input: Any, weight: Any, offsets: Any, per_sample_weights: Any,
        scale_grad_by_freq: bool, mode: str, include_last_offset: bool, padding_idx: int,
    ) -> Any:  # fmt: skip
        return F.embedding_bag(
            input, weight, offsets, scale_grad_by_freq=scale_grad_by_freq, mode=mode, per_sample_weights=per_sample_weights,
            include_last_offset=include_last_offset, padding_idx=None if padding_idx == -1 else padding_idx,
        )  # fmt: skip

    def unsupported(self, t: Any, options: Options) -> str | None:
        x, weight, offsets, factors = t
        if weight is None or weight.dim() != 2:
            return BadInput("no weight of two dimensions")
        fits = offsets is None if x.dim() == 2 else offsets is not None and offsets.dim() == 1
        if x.dim() not in (1, 2) or not fits:
            return BadInput(f"an input of {x.dim()} dimensions, and offsets that don't belong to it")
        for indices in (x, offsets):
            if indices is not None and indices.dtype not in (torch.int32, torch.int64):
                return BadInput(f"indices or offsets of {indices.dtype}")
        if options.mode not in ("sum", "mean", "max"):
            return BadInput(f"mode {options.mode!r}")
        if factors is not None and (factors.shape != x.shape or options.mode != "sum"):
            return BadInput(f"per_sample_weights {tuple(factors.shape)} for {tuple(x.shape)} and mode {options.mode!r}")
        if (x.dim() == 2 and x.shape[1] == 0) or (
            options.include_last_offset and offsets is not None and offsets.shape[0] == 0
        ):
            return BadInput("no indices, or no last offset")
        if options.mode == "max":
            return BadInput("scale_grad_by_freq of maxima") if options.scale_grad_by_freq else "the maximum of a bag"
        return "2**31 indices and more" if x.numel() >= 2**31 else None

    def _bags(self, t: Any, options: Options) -> int:
        return t.input.shape[0] if t.offsets is None else t.offsets.shape[0] - options.include_last_offset

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        bags = self._bags(t, options)
        found: dict[str, Out | str] = {"output": Out((bags, t.weight.shape[1]), t.weight.dtype)}
        if needs is not None and options.mode == "mean":
            found["sizes"] = Out((bags,), torch.int32, differentiable=False)
        return found

    def _words(self, t: Any, options: Options) -> dict[str, Any]:
        """With an input of two dimensions, torch ignores include_last_offset."""
        last = options.include_last_offset and t.offsets is not None
        return dict(include_last=last, padding_index=options.padding_idx)

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        words = self._words(t, options)
        bag_kernels.embedding_bag(
            t.input,
            t.weight,
            t.offsets,
            t.per_sample_weights,
            out.output,
            out.sizes,
            mean=options.mode == "mean",
            **words,
        )

    def saves(self, t: Any, options: Options, needs: Needs) -> tuple[str, ...]:
        names = ["input"] if t.offsets is None else ["input", "offsets"]
        if needs[1] and options.mode == "mean":
            names.append("sizes")
        if needs[1] and t.per_sample_weights is not None:
            names.append("per_sample_weights")
        return (*names, "weight") if needs[3] else tuple(names)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        words = self._words(saved, options)
        if grads.weight is not None:
            bag_kernels.embedding_bag_grad(
                dy.output, saved.input, saved.offsets, saved.per_sample_weights, saved.sizes, grads.weight,
                by_count=options.scale_grad_by_freq, **words,
            )  # fmt: skip
        if grads.per_sample_weights is not None:
            bag_kernels.sample_weights_grad(
                dy.output, saved.input, saved.weight, saved.offsets, grads.per_sample_weights, **words
            )


_embedding, _embedding_bag = Embedding(), EmbeddingBag()


def _elsewhere(function: Callable[..., Any], reason: str, call: Callable[[], Any]) -> Any:
    """torch's own function of arguments that the record has no words for."""
    return call() if is_dynamo_compiling() else support.run_reference(function.__name__, reason, call)


def _elsewhere_because(weight: Any, padding_idx: Any, max_norm: Any, sparse: Any) -> tuple[str | None, int]:
    """Why torch takes a call with these arguments, and the row that isn't counted, -1 for none."""
    if max_norm is not None:
        return "max_norm, which writes into the weight", -1
    if sparse:
        return "a sparse gradient", -1
    if padding_idx is None:
        return None, -1
    if isinstance(weight, torch.Tensor) and weight.dim() > 0:
        if type(padding_idx) is not int or not -weight.shape[0] <= padding_idx < weight.shape[0]:
            return BadInput(f"padding_idx {padding_idx!r}"), -1
        if padding_idx < 0:
            padding_idx += weight.shape[0]
    return None, padding_idx


def embedding(
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    """weight[input], whose gradient is written once and, unlike torch's on a GPU, in a fixed order. As
    torch.nn.functional.embedding.

    Shape: input of indices (*), weight (ROWS, N), any strides; the result (*, N), contiguous.
    Dtype: input int32 or int64, weight float16, bfloat16, float32 or float64; gradients are added up in float32 (float64).
    Runs on Triton when: both tensors are plain ones on one GPU (or Triton interprets), max_norm is None, and sparse is False.
    Raises: what torch raises; but an index that is out of range, for which torch stops the process on a GPU, gives NaN.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.embedding.html
    """
    reason, padding = _elsewhere_because(weight, padding_idx, max_norm, sparse)
    if reason is not None:
        arguments = (input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return _elsewhere(F.embedding, reason, lambda: F.embedding(*arguments))
    return _embedding((input, weight), padding, bool(scale_grad_by_freq))


def embedding_bag(
    input: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """The sum or mean of weight's rows of each bag of indices; of an empty bag zeros. The gradient is written once and in a fixed
    order, as that of `embedding`. As torch.nn.functional.embedding_bag.

    Shape: input of indices (COUNT,) with offsets (BAGS,), where bags begin, or (BAGS + 1,) with include_last_offset; or input
        (BAGS, LENGTH) without offsets; weight (ROWS, N); per_sample_weights as input; any strides; the result (BAGS, N),
        contiguous.
    Dtype: input and offsets each int32 or int64, weight and per_sample_weights float16, bfloat16, float32 or float64, the same;
        all sums are added up in float32 (float64).
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets), mode is "sum" or "mean", max_norm is
        None, and sparse is False.
    Raises: what torch raises; but neither an index out of range nor offsets that descend or leave the input, for which torch
        stops the process on a GPU: such a bag's result is NaN. The first bag begins at 0, whatever its offset is.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.embedding_bag.html
    """
    reason, padding = _elsewhere_because(weight, padding_idx, max_norm, sparse)
    if reason is not None:
        arguments = (
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip
        return _elsewhere(F.embedding_bag, reason, lambda: F.embedding_bag(*arguments))
    return _embedding_bag(
        (input, weight, offsets, per_sample_weights),
        bool(scale_grad_by_freq), mode, bool(include_last_offset), padding,
    )  # fmt: skip
