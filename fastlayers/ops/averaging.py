"""Average pooling, with windows at equal distances or adaptive. Nothing is saved: the gradients need sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _kernels
from .. import _torch_functional as F
from ..dispatch.support import BadInput
from ..kernels.pooling.windows import Windows, number_of_windows, triple
from ..values import Named, Needs, Out
from .pooling import Pool, Size, Strided, laid_out, output_size_of, sizes_of, volumes

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels.pooling import average

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
]


class _Average(Pool):
    """What both kinds have in common."""

    def divisor(self, options: Any) -> dict[str, Any]:
        """The launcher's arguments that say by what sums are divided."""
        return {}

    def outputs(self, t: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        x = t.input
        sizes = self.sizes(x.shape[-self.dims :], options)
        return {"output": laid_out(x, sizes, x.dtype, self.dims, keeps=self.keeps_channels_last(options))}

    def keeps_channels_last(self, options: Any) -> bool:
        """Whether torch's result is in channels_last if the input is."""
        return self.dims < 3

    def forward(self, t: Any, out: Named, options: Any, precision: str) -> None:
        x, y = volumes(t.input, self.dims), volumes(out.output, self.dims)
        average.avg_pool(x, y, self.windows(t.input.shape[-self.dims :], options), **self.divisor(options))

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        return ()

    def gradients(self, like: Any, options: Any, needs: Needs) -> tuple[Out | int | str | None, ...]:
        x = like.input
        return (laid_out(x, x.shape[-self.dims :], x.dtype, self.dims, keeps=self.dims < 3),)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        dx = grads.input
        windows = self.windows(dx.shape[-self.dims :], options)
        average.avg_pool_grad(
            volumes(dy.output, self.dims), volumes(dx, self.dims), windows, **self.divisor(options)
        )  # fmt: skip


class _AvgPool(_Average, Strided):
    class Options(NamedTuple):
        kernel_size: tuple[int, ...]
        stride: tuple[int, ...]
        padding: tuple[int, ...]
        ceil_mode: bool
        count_include_pad: bool
        divisor_override: int | None

    def reference(self, input: Any, *options: Any) -> Any:
        return getattr(F, f"avg_pool{self.dims}d")(input, *(options[:5] if self.dims == 1 else options))

    def sizes(self, image: Sequence[int], options: Any) -> tuple[int, ...]:
        kernel, stride, padding = options[:3]
        return number_of_windows(image, kernel, stride, padding, (1,) * self.dims, options.ceil_mode)

    def windows(self, image: Sequence[int], options: Any) -> Windows:
        kernel, stride, padding = options[:3]
        return Windows(triple(kernel, 1), triple(stride, 1), triple(padding, 0))

    def divisor(self, options: Any) -> dict[str, Any]:
        return dict(padded=options.count_include_pad, divisor=options.divisor_override)

    def unsupported(self, t: Any, options: Any) -> str | None:
        if options.divisor_override == 0:
            return BadInput("a divisor of 0")
        return self.unsupported_windows(t.input, options, (1,) * self.dims)


class AvgPool1d(_AvgPool):
    """input (N, C, L) or (C, L)."""

    dims = 1
    autocast = staticmethod(lambda x: F.avg_pool1d(x, 1))


class AvgPool2d(_AvgPool):
    """input (N, C, H, W) or (C, H, W)."""

    dims = 2
    autocast = staticmethod(lambda x: F.avg_pool2d(x[None], 1))


class AvgPool3d(_AvgPool):
    """input (N, C, D, H, W) or (C, D, H, W)."""

    dims = 3
    autocast = staticmethod(lambda x: F.avg_pool3d(x[None, None], 1))


class _AdaptiveAvgPool(_Average):
    class Options(NamedTuple):
        output_size: tuple[int, ...]

    def reference(self, input: Any, *options: Any) -> Any:
        return getattr(F, f"adaptive_avg_pool{self.dims}d")(input, *options)

    def sizes(self, image: Sequence[int], options: Any) -> tuple[int, ...]:
        return options.output_size

    def windows(self, image: Sequence[int], options: Any) -> Windows:
        return Windows.dividing(image, options.output_size)

    def keeps_channels_last(self, options: Any) -> bool:
        return self.dims < 3 or max(options.output_size) == min(options.output_size) == 1

    def gradients(self, like: Any, options: Any, needs: Needs) -> tuple[Out | int | str | None, ...]:
        if max(options.output_size) == min(options.output_size) == 1:  # a mean, whose gradient torch expands
            return (Out(tuple(like.input.shape), like.input.dtype),)
        return super().gradients(like, options, needs)

    def unsupported(self, t: Any, options: Any) -> str | None:
        if min(options.output_size) < 0:
            return BadInput(f"output_size {options.output_size}")
        return self.unsupported_image(t.input, 1)


class AdaptiveAvgPool1d(_AdaptiveAvgPool):
    """input (N, C, L) or (C, L)."""

    dims = 1
    autocast = staticmethod(lambda x: F.adaptive_avg_pool1d(x, 1))


class AdaptiveAvgPool2d(_AdaptiveAvgPool):
    """input (N, C, H, W) or (C, H, W)."""

    dims = 2
    autocast = staticmethod(lambda x: F.adaptive_avg_pool2d(x[None], 1))


class AdaptiveAvgPool3d(_AdaptiveAvgPool):
    """input (N, C, D, H, W) or (C, D, H, W)."""

    dims = 3
    autocast = staticmethod(lambda x: F.adaptive_avg_pool3d(x[None, None], 1))


_avg_pool1d, _avg_pool2d, _avg_pool3d = AvgPool1d(), AvgPool2d(), AvgPool3d()
_adaptive_avg_pool1d, _adaptive_avg_pool2d, _adaptive_avg_pool3d = (
    AdaptiveAvgPool1d(), AdaptiveAvgPool2d(), AdaptiveAvgPool3d()
)  # fmt: skip


def _avg_pool(op: _AvgPool, input: Any, kernel_size: Any, stride: Any, padding: Any, *rest: Any) -> Any:
    k, p = sizes_of(kernel_size, op.dims), sizes_of(padding, op.dims)
    s = k if stride is None or stride == [] or stride == () else sizes_of(stride, op.dims)
    flags = all([type(flag) is bool for flag in rest[:2]]) and (rest[2] is None or type(rest[2]) is int)
    if k is None or s is None or p is None or not flags:
        return op.refused((input,), (kernel_size, stride, padding, *rest), "sizes that aren't ints")
    return op((input,), k, s, p, *rest)


def _adaptive_avg_pool(op: _AdaptiveAvgPool, input: Any, output_size: Any) -> Any:
    size = output_size_of(op, input, output_size)
    if size is None:
        return op.refused((input,), (output_size,), "an output_size that isn't of ints")
    return op((input,), size)


def avg_pool1d(
    input: torch.Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> torch.Tensor:
    """The average of each window of a signal. As torch.nn.functional.avg_pool1d.

    Shape, Dtype, Runs on Triton when, Raises: as `avg_pool2d`, with input (N, C, L) or (C, L).
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.avg_pool1d.html
    """
    return _avg_pool(_avg_pool1d, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


def avg_pool2d(
    input: torch.Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    """The average of each window of images. As torch.nn.functional.avg_pool2d.

    Shape: input (N, C, H, W) or (C, H, W) with any strides; the result (N, C, OH, OW) or (C, OH, OW), a batch in channels_last
        if the input is.
    Dtype: float16, bfloat16, float32, float64; sums in float32 (float64).
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.avg_pool2d.html
    """
    return _avg_pool(_avg_pool2d, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def avg_pool3d(
    input: torch.Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    """The average of each window of volumes. As torch.nn.functional.avg_pool3d.

    Shape, Dtype, Runs on Triton when, Raises: as `avg_pool2d`, with input (N, C, D, H, W) or (C, D, H, W); the result contiguous.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.avg_pool3d.html
    """
    return _avg_pool(_avg_pool3d, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def adaptive_avg_pool1d(input: torch.Tensor, output_size: Any) -> torch.Tensor:
    """The averages of as many windows of a signal as are asked for. As torch.nn.functional.adaptive_avg_pool1d.

    Shape, Dtype, Runs on Triton when, Raises: as `adaptive_avg_pool2d`, with input (N, C, L) or (C, L).
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.adaptive_avg_pool1d.html
    """
    return _adaptive_avg_pool(_adaptive_avg_pool1d, input, output_size)


def adaptive_avg_pool2d(input: torch.Tensor, output_size: Any) -> torch.Tensor:
    """The averages of as many windows of images as are asked for. As torch.nn.functional.adaptive_avg_pool2d.

    Shape: input (N, C, H, W) or (C, H, W) with any strides, output_size (OH, OW), a number for both, or None for the input's;
        the result (N, C, OH, OW) or (C, OH, OW), a batch in channels_last if the input is.
    Dtype: float16, bfloat16, float32, float64; sums in float32 (float64).
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.adaptive_avg_pool2d.html
    """
    return _adaptive_avg_pool(_adaptive_avg_pool2d, input, output_size)


def adaptive_avg_pool3d(input: torch.Tensor, output_size: Any) -> torch.Tensor:
    """The averages of as many windows of volumes as are asked for. As torch.nn.functional.adaptive_avg_pool3d.

    Shape, Dtype, Runs on Triton when, Raises: as `adaptive_avg_pool2d`, with input (N, C, D, H, W) or (C, D, H, W); the result
        contiguous, unless it is one number for each channel.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.adaptive_avg_pool3d.html
    """
    return _adaptive_avg_pool(_adaptive_avg_pool3d, input, output_size)
