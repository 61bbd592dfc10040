"""Rows of a table by their indices."""

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
    from ..kernels import embedding as kernels

__all__ = ["embedding"]


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


_embedding = Embedding()


def _elsewhere(function: Callable[..., Any], reason: str, call: Callable[[], Any]) -> Any:
    """torch's own function of arguments that the record has no words for."""
    return call() if is_dynamo_compiling() else support.run_reference(function.__name__, reason, call)


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
    reason = None
    if max_norm is not None:
        reason = "max_norm, which writes into the weight"
    elif sparse:
        reason = "a sparse gradient"
    elif padding_idx is not None and isinstance(weight, torch.Tensor) and weight.dim() > 0:
        if type(padding_idx) is not int or not -weight.shape[0] <= padding_idx < weight.shape[0]:
            reason = BadInput(f"padding_idx {padding_idx!r}")
        elif padding_idx < 0:
            padding_idx += weight.shape[0]
    if reason is not None:
        arguments = (input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return _elsewhere(F.embedding, reason, lambda: F.embedding(*arguments))
    return _embedding((input, weight), -1 if padding_idx is None else padding_idx, bool(scale_grad_by_freq))
