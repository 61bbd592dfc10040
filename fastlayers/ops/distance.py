"""Cosine similarity along one dimension: sum x1 x2 / (max(|x1|, eps) max(|x2|, eps))."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _kernels
from .. import _torch_functional as F
from ..dispatch import autocast
from ..dispatch.support import BadInput, of_one_shape, unsupported_dtype
from ..operation import Operation
from ..values import Named, Needs, Out, Tensors

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels import distance as kernels

__all__ = ["cosine_similarity"]


class CosineSimilarity(Operation):
    """x1 and x2 of one shape -> that shape without `dim`. Saves both and, for each pair of vectors, three numbers."""

    tensors = ("x1", "x2")
    floats = ("x1",)  # torch promotes
    autocast = staticmethod(lambda x: F.cosine_similarity(x, x))
    widens = True

    class Options(NamedTuple):
        dim: int
        eps: float
        dtype: torch.dtype | None
        """In which autocast has torch compute, where it isn't that of one of the tensors."""

    def reference(self, x1: Any, x2: Any, dim: int, eps: float, dtype: torch.dtype | None) -> Any:
        if dtype is not None:
            x1, x2 = (t.to(torch.promote_types(t.dtype, dtype)) for t in (x1, x2))
        return F.cosine_similarity(x1, x2, dim, eps)

    def unsupported(self, t: Any, options: Options) -> str | None:
        x1, x2, dims = t.x1, t.x2, t.x1.dim()
        if x2 is None or x1.shape != x2.shape:
            return BadInput("tensors that don't broadcast")
        if not -dims <= options.dim < max(dims, 1):
            return BadInput(f"dim {options.dim} of a tensor with {dims}")
        if not 0 <= options.eps < math.inf:
            return BadInput(f"eps {options.eps}")
        if dims == 0:
            return "a tensor without dimensions"
        return unsupported_dtype(x2.dtype)

    def prepare(self, tensors: Tensors, options: Options) -> tuple[Tensors, Options]:
        """Autocast may widen either tensor."""
        for t in tensors:
            after = autocast.dtype_after(self.autocast, t)
            if after is not t.dtype:
                return tensors, self.changed(options, dtype=after)
        return tensors, options

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        shape, dim = list(t.x1.shape), options.dim
        del shape[dim]
        dtype = torch.promote_types(*self._dtypes(t, options))
        found: dict[str, Out | str] = {"output": Out(tuple(shape), dtype)}
        if not needs:
            return found
        accumulate = torch.promote_types(torch.promote_types(t.x1.dtype, t.x2.dtype), torch.float32)
        statistic = Out(tuple(shape), accumulate, differentiable=False)
        return found | {"norm1": statistic, "norm2": statistic, "cosine": statistic}

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        kernels.cosine_similarity(
            t.x1, t.x2, out.output, out.norm1, out.norm2, out.cosine, *self._numbers(t, options)
        )  # fmt: skip

    def saves(self, t: Any, options: Options, needs: Needs) -> tuple[str, ...]:
        return "x1", "x2", "norm1", "norm2", "cosine"

    def gradients(self, like: Any, options: Options, needs: Needs) -> tuple[Out | int | str | None, ...]:
        return tuple([Out.pointwise(o) if need else None for o, need in zip(like, needs, strict=True)])

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        kernels.cosine_similarity_grad(
            dy.output, saved.x1, saved.x2, saved.norm1, saved.norm2, saved.cosine,
            grads.x1, grads.x2, *self._numbers(saved, options),
        )  # fmt: skip

    def _dtypes(self, t: Any, options: Options) -> list[torch.dtype]:
        """Those in which torch has the norms of x1 and of x2."""
        return [torch.promote_types(x.dtype, options.dtype or x.dtype) for x in (t.x1, t.x2)]

    def _numbers(self, t: Any, options: Options) -> tuple[int, float, float]:
        """What the launchers take: the dimension, and eps as each of the norms is compared with it, which makes 0 of 1e-8 in
        float16."""
        eps1, eps2 = (_rounded(options.eps, dtype) for dtype in self._dtypes(t, options))
        return options.dim % t.x1.dim(), eps1, eps2


@functools.lru_cache(maxsize=4096)
def _rounded(number: float, dtype: torch.dtype) -> float:
    """Remembered, because a call that asks a tensor for its number can't be replayed."""
    return torch.tensor(number, dtype=dtype).item()


_cosine_similarity = CosineSimilarity()


def cosine_similarity(x1: torch.Tensor, x2: torch.Tensor, dim: int = 1, eps: float = 1e-8) -> torch.Tensor:
    """sum x1 x2 / (max(|x1|, eps) max(|x2|, eps)) along `dim`. As torch.nn.functional.cosine_similarity.

    Shape: x1 and x2 broadcast to one shape, any strides; the result is that without `dim`, contiguous.
    Dtype: float16, bfloat16, float32, float64, promoted as torch does; others are torch's. Computed in float32 (float64).
        As in torch, eps is rounded to the dtype of each tensor: in float16 the default is 0, so that a vector of zeros gives
        NaN. Where the squares of a vector overflow, torch gives 0, and this function 0 or NaN. Under autocast, as torch.
    Runs on Triton when: both tensors are plain ones on one GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.cosine_similarity.html
    """
    if type(dim) is not int or not isinstance(eps, (int, float)):
        return _cosine_similarity.refused((x1, x2), (dim, eps, None), f"dim {dim!r} or eps {eps!r}")
    x1, x2 = of_one_shape(x1, x2)
    return _cosine_similarity((x1, x2), dim, float(eps), None)
