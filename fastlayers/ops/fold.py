"""Windows of images as columns, and the sum of windows back into images: each is the gradient of the other. Nothing is saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _kernels
from .. import _torch_functional as F
from ..dispatch.support import BadInput
from ..kernels.pooling.windows import Windows, number_of_windows, triple
from ..operation import Operation
from ..values import Named, Needs, Out

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels.pooling import fold as kernels

__all__ = ["fold", "unfold"]

Size = int | Sequence[int]
Pair = tuple[int, int]


class _Sizes(NamedTuple):
    """What says which pixels of an image are in which window, in torch's order."""

    kernel: Pair
    dilation: Pair
    padding: Pair
    stride: Pair

    def exist(self) -> bool:
        """Whether the numbers are such that there may be windows, and 32 bits hold them."""
        sizes = (*self.kernel, *self.dilation, *self.stride)
        return min(sizes) >= 1 and min(self.padding) >= 0 and max(*sizes, *self.padding) < 2**31

    def counts(self, image: Sequence[int]) -> tuple[int, ...]:
        """How many windows there are along each dimension of an image."""
        return number_of_windows(image, self.kernel, self.stride, self.padding, self.dilation)

    def windows(self) -> Windows:
        """As the kernels take them."""
        return Windows(
            triple(self.kernel, 1), triple(self.stride, 1), triple(self.padding, 0), triple(self.dilation, 1)
        )


def _batch(x: torch.Tensor, dims: int) -> torch.Tensor:
    """A batch, of what may be without one."""
    return x if x.dim() == dims else x.unsqueeze(0)


class Unfold(Operation):
    """input (N, C, H, W) or (C, H, W) -> (N, C*R*S, windows) or (C*R*S, windows), contiguous."""

    tensors = ("input",)
    compiled = False  # Inductor fuses it with whatever stands around it

    class Options(NamedTuple):
        kernel_size: Pair
        dilation: Pair
        padding: Pair
        stride: Pair

    def reference(self, input: Any, *options: Any) -> Any:
        return F.unfold(input, *options)

    def unsupported(self, t: Any, options: Any) -> str | None:
        x, sizes = t.input, _Sizes(*options)
        if x.dim() not in (3, 4) or 0 in x.shape[-3:] or not sizes.exist():
            return BadInput(f"{tuple(options)} for an input {tuple(x.shape)}")
        if min(sizes.counts(x.shape[-2:])) < 1:
            return BadInput(f"an input {tuple(x.shape)} smaller than a window")
        return None

    def outputs(self, t: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        *batch, c, h, w = t.input.shape
        windows = math.prod(_Sizes(*options).counts((h, w)))
        return {"output": Out((*batch, c * math.prod(options.kernel_size), windows), t.input.dtype)}

    def forward(self, t: Any, out: Named, options: Any, precision: str) -> None:
        kernels.unfold(_batch(t.input, 4), _batch(out.output, 3), _Sizes(*options).windows())

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        return ()

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        kernels.fold(_batch(dy.output, 3), _batch(grads.input, 4), _Sizes(*options).windows())


class Fold(Operation):
    """input (N, C*R*S, windows) or (C*R*S, windows) -> (N, C, H, W) or (C, H, W), contiguous."""

    tensors = ("input",)
    compiled = False  # Inductor fuses it with whatever stands around it

    class Options(NamedTuple):
        output_size: Pair
        kernel_size: Pair
        dilation: Pair
        padding: Pair
        stride: Pair

    def reference(self, input: Any, *options: Any) -> Any:
        return F.fold(input, *options)

    def unsupported(self, t: Any, options: Any) -> str | None:
        x, image, sizes = t.input, options.output_size, _Sizes(*options[1:])
        wrong = x.dim() not in (2, 3) or 0 in x.shape[-2:] or min(image) < 1 or not sizes.exist()
        if wrong or x.shape[-2] % math.prod(options.kernel_size):
            return BadInput(f"{tuple(options)} for an input {tuple(x.shape)}")
        counts = sizes.counts(image)
        if min(counts) < 1 or math.prod(counts) != x.shape[-1]:
            return BadInput(f"{x.shape[-1]} windows for an image {image} of {counts}")
        return None

    def outputs(self, t: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        *batch, rows, _ = t.input.shape
        return {"output": Out((*batch, rows // math.prod(options.kernel_size), *options.output_size), t.input.dtype)}

    def forward(self, t: Any, out: Named, options: Any, precision: str) -> None:
        kernels.fold(_batch(t.input, 3), _batch(out.output, 4), _Sizes(*options[1:]).windows())

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        return ()

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        kernels.unfold(_batch(dy.output, 4), _batch(grads.input, 3), _Sizes(*options[1:]).windows())


_fold, _unfold = Fold(), Unfold()


def _pairs(sizes: Sequence[Any]) -> list[Pair] | None:
    """torch's int or int[2] each, where a single number stands for both; None for anything else, which torch judges."""
    pairs = [(n, n) if type(n) is int else tuple(n) if isinstance(n, (tuple, list)) else () for n in sizes]
    exact = all([len(p) == 2 and type(p[0]) is type(p[1]) is int for p in pairs])
    return pairs if exact else None  # type: ignore[return-value]


def _run(op: Operation, input: torch.Tensor, sizes: Sequence[Any]) -> torch.Tensor:
    pairs = _pairs(sizes)
    return op.refused((input,), sizes, f"sizes {tuple(sizes)}") if pairs is None else op((input,), *pairs)


def unfold(
    input: torch.Tensor, kernel_size: Size, dilation: Size = 1, padding: Size = 0, stride: Size = 1
) -> torch.Tensor:
    """The windows of images as columns: im2col. As torch.nn.functional.unfold.

    Shape: input (N, C, H, W) or (C, H, W) with any strides; the result (N, C*R*S, windows) or (C*R*S, windows), contiguous.
    Dtype: float16, bfloat16, float32, float64; the result as the input.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets). Saves nothing for the backward.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.unfold.html
    """
    return _run(_unfold, input, (kernel_size, dilation, padding, stride))


def fold(
    input: torch.Tensor,
    output_size: Size,
    kernel_size: Size,
    dilation: Size = 1,
    padding: Size = 0,
    stride: Size = 1,
) -> torch.Tensor:
    """Images whose pixels are the sums of all windows that hold them: col2im. As torch.nn.functional.fold.

    Shape: input (N, C*R*S, windows) or (C*R*S, windows) with any strides; the result (N, C, H, W) or (C, H, W), contiguous.
    Dtype: float16, bfloat16, float32, float64; the result as the input, sums in float32 (float64) and in a fixed order.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets). Saves nothing for the backward.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.fold.html
    """
    return _run(_fold, input, (output_size, kernel_size, dilation, padding, stride))
