"""Maximum, average and adaptive pooling of signals (N, C, L), images (N, C, H, W) and volumes (N, C, D, H, W), with or without N.

The gradients need no input: a maximum's is the place within its window, one byte in windows of up to 256 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from .. import _kernels
from .. import _torch_functional as F
from .._kernels import is_plain
from ..dispatch.support import BadInput
from ..kernels.pooling.windows import Windows, number_of_windows, triple
from ..operation import Operation
from ..values import Named, Needs, Out, Tensors, image_strides, is_channels_last

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels.pooling import maximum

__all__ = [
    "adaptive_max_pool1d",
    "adaptive_max_pool1d_with_indices",
    "adaptive_max_pool2d",
    "adaptive_max_pool2d_with_indices",
    "adaptive_max_pool3d",
    "adaptive_max_pool3d_with_indices",
    "max_pool1d",
    "max_pool1d_with_indices",
    "max_pool2d",
    "max_pool2d_with_indices",
    "max_pool3d",
    "max_pool3d_with_indices",
]

Size = int | Sequence[int]


def sizes_of(value: Any, dims: int) -> tuple[int, ...] | None:
    """torch's int or int[dims], where a single number stands for all; None for anything else, which torch judges."""
    sizes = (value,) * dims if type(value) is int else tuple(value) if isinstance(value, (tuple, list)) else ()
    sizes = sizes * dims if len(sizes) == 1 else sizes
    return sizes if len(sizes) == dims and all([type(n) is int for n in sizes]) else None


def volumes(x: Any, dims: int) -> Any:
    """A view as (N, C, D, H, W) of what has so many dimensions after the channels; None of None."""
    if x is None:
        return None
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    return x if dims == 3 else x.unsqueeze(2) if dims == 2 else x.unsqueeze(2).unsqueeze(2)


def laid_out(like: Any, sizes: Sequence[int], dtype: torch.dtype, dims: int, keeps: bool = True) -> Out:
    """The description of a result in torch's memory format: channels last if `like`'s are, and torch's function keeps that.

    torch pools signals as images of one row, and only batches of images are ever channels_last.
    """
    shape, strides = tuple(like.shape), tuple(like.stride())
    batched = len(shape) == dims + 2
    if not batched:
        shape, strides = (1, *shape), (shape[0] * strides[0], *strides)
    keeps = keeps and (batched or dims == 3)
    if dims == 1:
        shape, strides = (*shape[:2], 1, shape[2]), (*strides[:2], shape[2] * strides[2], strides[2])
        sizes = (1, *sizes)
    new = (*shape[:2], *sizes)
    laid = image_strides(new, keeps and is_channels_last(shape, strides))
    if dims == 1:
        new, laid = (*new[:2], new[3]), (*laid[:2], laid[3])
    first = 0 if batched else 1
    return Out(new[first:], dtype, laid[first:])


class Pool(Operation):
    """What all kinds have in common."""

    tensors = ("input",)
    compiled = False  # Inductor fuses them with whatever stands around them
    dims: ClassVar[int]

    def sizes(self, image: Sequence[int], options: Any) -> tuple[int, ...]:
        """The sizes of the result."""
        raise NotImplementedError

    def windows(self, image: Sequence[int], options: Any) -> Windows:
        raise NotImplementedError

    def unsupported_image(self, x: Any, first: int) -> str | None:
        """What speaks against the sizes of an input, of which those from the `first` dimension on must not be 0."""
        if x.dim() not in (self.dims + 1, self.dims + 2):
            return BadInput(f"an input with {x.dim()} dimensions")
        if 0 in x.shape[first:]:
            return BadInput(f"an input {tuple(x.shape)}, with a size of 0 other than the batch's")
        return None

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        return ()


class Strided(Pool):
    """Windows at equal distances."""

    def unsupported_windows(self, x: Any, options: Any, dilation: Any) -> str | None:
        kernel, stride, padding = options.kernel_size, options.stride, options.padding
        sizes = (*kernel, *stride, *dilation)
        if min(sizes) < 1 or max(sizes) >= 2**31 or min(padding) < 0:
            return BadInput(f"kernel_size {kernel}, stride {stride}, padding {padding}, dilation {dilation}")
        if any([2 * p > d * (k - 1) + 1 for p, k, d in zip(padding, kernel, dilation, strict=True)]):
            return BadInput(f"a padding {padding} of more than half of the kernel")
        reason = self.unsupported_image(x, -self.dims - 1)
        if reason is None and min(self.sizes(x.shape[-self.dims :], options)) < 1:
            return BadInput(f"an input {tuple(x.shape)} smaller than the kernel")
        return reason


class _MaxPool(Strided):
    class Options(NamedTuple):
        kernel_size: tuple[int, ...]
        stride: tuple[int, ...]
        padding: tuple[int, ...]
        dilation: tuple[int, ...]
        ceil_mode: bool
        return_indices: bool

    def reference(self, input: Any, *options: Any) -> Any:
        return getattr(F, f"max_pool{self.dims}d")(input, *options)

    def sizes(self, image: Sequence[int], options: Any) -> tuple[int, ...]:
        return number_of_windows(image, *options[:5])

    def windows(self, image: Sequence[int], options: Any) -> Windows:
        kernel, stride, padding, dilation = options[:4]
        return Windows(triple(kernel, 1), triple(stride, 1), triple(padding, 0), triple(dilation, 1))

    def unsupported(self, t: Any, options: Any) -> str | None:
        reason = self.unsupported_windows(t.input, options, options.dilation)
        if reason is not None:
            return reason
        each = zip(t.input.shape[-self.dims :], options.padding, options.dilation, strict=True)
        if any([p > 0 and d > n for n, p, d in each]):
            return "a dilation larger than the image, with padding"  # a window may hold nothing
        return None

    def results(self, options: Any) -> int:
        return 2 if options.return_indices else 1

    def outputs(self, t: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        image = tuple(t.input.shape[-self.dims :])
        y = self._result(t.input, self.sizes(image, options))
        found: dict[str, Out | str] = {"output": y}
        if options.return_indices:
            found["indices"] = y._replace(dtype=torch.int64, differentiable=False)
        if needs is not None:
            small = self.windows(image, options).taps <= 256
            found["place"] = y._replace(dtype=torch.uint8 if small else torch.int32, differentiable=False)
        return found

    def _result(self, x: Any, sizes: Sequence[int]) -> Out:
        return laid_out(x, sizes, x.dtype, self.dims)

    def forward(self, t: Any, out: Named, options: Any, precision: str) -> None:
        x, y, place, indices = (volumes(t, self.dims) for t in (t.input, out.output, out.place, out.indices))
        maximum.max_pool(x, y, place, indices, self.windows(t.input.shape[-self.dims :], options))

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        return ("place",)

    def gradients(self, like: Any, options: Any, needs: Needs) -> tuple[Out | int | str | None, ...]:
        return (self._result(like.input, like.input.shape[-self.dims :]),)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        given, place, dx = (volumes(t, self.dims) for t in (dy.output, saved.place, grads.input))
        maximum.max_pool_grad(given, place, dx, self.windows(grads.input.shape[-self.dims :], options))

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Any, needs: Needs) -> Tensors:
        """What each place says belongs to a pixel: the gradient is scattered there, and a second derivative gathered."""
        shape = like[0].shape
        windows = self.windows(shape[-self.dims :], options)
        image, outputs = triple(shape[-self.dims :], 1), triple(saved.place.shape[-self.dims :], 1)
        place = saved.place.long()
        _, rows, columns = windows.kernel
        numbers = (place // (rows * columns), place // columns % rows, place % columns)
        index: Any = 0
        for d, (n, o, number) in enumerate(zip(image, outputs, numbers, strict=True)):
            along = torch.arange(o, device=place.device)
            begin = along * n // o if windows.adaptive else along * windows.stride[d] - windows.padding[d]
            begin = begin.view(-1, *(1,) * (2 - d)) if d >= 3 - self.dims else begin.view(())
            index = index * n + begin + number * windows.dilation[d]
        ahead = tuple(shape[: -self.dims])
        grad = dy.output.new_zeros((*ahead, math.prod(image)))
        if torch.is_grad_enabled():
            grad.requires_grad_()  # torch's gradient can be differentiated even if dy can't: its derivatives are 0
        grad = grad.scatter_add(
            -1, index.reshape((*ahead, math.prod(outputs))), dy.output.reshape((*ahead, math.prod(outputs)))
        )
        return (grad.reshape(tuple(shape)),)


class MaxPool1d(_MaxPool):
    """input (N, C, L) or (C, L)."""

    dims = 1
    autocast = staticmethod(lambda x: F.max_pool1d(x, 1))


class MaxPool2d(_MaxPool):
    """input (N, C, H, W) or (C, H, W)."""

    dims = 2
    autocast = staticmethod(lambda x: F.max_pool2d(x[None], 1))


class MaxPool3d(_MaxPool):
    """input (N, C, D, H, W) or (C, D, H, W)."""

    dims = 3
    autocast = staticmethod(lambda x: F.max_pool3d(x[None, None], 1))


class _AdaptiveMaxPool(_MaxPool):
    class Options(NamedTuple):  # pyright: ignore[reportIncompatibleVariableOverride]
        output_size: tuple[int, ...]
        return_indices: bool

    def reference(self, input: Any, *options: Any) -> Any:
        return getattr(F, f"adaptive_max_pool{self.dims}d")(input, *options)

    def sizes(self, image: Sequence[int], options: Any) -> tuple[int, ...]:
        return options.output_size

    def windows(self, image: Sequence[int], options: Any) -> Windows:
        return Windows.dividing(image, options.output_size)

    def unsupported(self, t: Any, options: Any) -> str | None:
        if min(options.output_size) < 0:
            return BadInput(f"output_size {options.output_size}")
        return self.unsupported_image(t.input, 1)

    def _result(self, x: Any, sizes: Sequence[int]) -> Out:
        return laid_out(x, sizes, x.dtype, self.dims, keeps=self.dims < 3)


class AdaptiveMaxPool1d(_AdaptiveMaxPool):
    """input (N, C, L) or (C, L)."""

    dims = 1
    autocast = staticmethod(lambda x: F.adaptive_max_pool1d(x, 1))


class AdaptiveMaxPool2d(_AdaptiveMaxPool):
    """input (N, C, H, W) or (C, H, W)."""

    dims = 2
    autocast = staticmethod(lambda x: F.adaptive_max_pool2d(x[None], 1))


class AdaptiveMaxPool3d(_AdaptiveMaxPool):
    """input (N, C, D, H, W) or (C, D, H, W)."""

    dims = 3
    autocast = staticmethod(lambda x: F.adaptive_max_pool3d(x[None, None], 1))


_max_pool1d, _max_pool2d, _max_pool3d = MaxPool1d(), MaxPool2d(), MaxPool3d()
_adaptive_max_pool1d, _adaptive_max_pool2d, _adaptive_max_pool3d = (
    AdaptiveMaxPool1d(), AdaptiveMaxPool2d(), AdaptiveMaxPool3d()
)  # fmt: skip


def output_size_of(op: Pool, input: Any, size: Any) -> tuple[int, ...] | None:
    """The sizes of the result of adaptive pooling, where None stands for the input's; None where torch must judge."""
    some = op.dims > 1 and isinstance(size, (tuple, list)) and any([n is None for n in size])
    if some and is_plain(input) and input.dim() > len(size):
        each = zip(size, input.shape[input.dim() - len(size) :], strict=True)
        size = tuple([n if wanted is None else wanted for wanted, n in each])
    return sizes_of(size, op.dims)


def _adaptive_max_pool(op: _AdaptiveMaxPool, input: Any, output_size: Any, return_indices: bool) -> Any:
    size = output_size_of(op, input, output_size)
    if size is None:
        return op.refused((input,), (output_size, return_indices), "an output_size that isn't of ints")
    return op((input,), size, bool(return_indices))


def _max_pool(op: _MaxPool, input: Any, kernel_size: Any, stride: Any, *rest: Any) -> Any:
    padding, dilation, ceil_mode, return_indices = rest
    k, p, d = sizes_of(kernel_size, op.dims), sizes_of(padding, op.dims), sizes_of(dilation, op.dims)
    s = k if stride is None or stride == [] or stride == () else sizes_of(stride, op.dims)
    if k is None or s is None or p is None or d is None or type(ceil_mode) is not bool:
        return op.refused((input,), (kernel_size, stride, *rest), "sizes that aren't ints")
    return op((input,), k, s, p, d, ceil_mode, bool(return_indices))


def max_pool1d(
    input: torch.Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The maximum of each window of a signal, and with `return_indices` where it stands. As torch.nn.functional.max_pool1d.

    Shape, Dtype, Runs on Triton when, Raises: as `max_pool2d`, with input (N, C, L) or (C, L).
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.max_pool1d.html
    """
    return _max_pool(_max_pool1d, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d(
    input: torch.Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The maximum of each window of images, and with `return_indices` where it stands. As torch.nn.functional.max_pool2d.

    Shape: input (N, C, H, W) or (C, H, W) with any strides; the result (N, C, OH, OW) or (C, OH, OW), a batch in channels_last
        if the input is. Each window has a pixel within the image.
    Dtype: float16, bfloat16, float32, float64; indices int64. A NaN is larger than any number.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets), and no padded dimension is smaller than the
        dilation. Keeps the place of each maximum for the backward, one byte, and neither the input nor indices.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.max_pool2d.html
    """
    return _max_pool(_max_pool2d, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool3d(
    input: torch.Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The maximum of each window of volumes, and with `return_indices` where it stands. As torch.nn.functional.max_pool3d.

    Shape, Dtype, Runs on Triton when, Raises: as `max_pool2d`, with input (N, C, D, H, W) or (C, D, H, W).
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.max_pool3d.html
    """
    return _max_pool(_max_pool3d, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool1d_with_indices(
    input: torch.Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`max_pool1d` with return_indices=True. As torch.nn.functional.max_pool1d_with_indices."""
    return _max_pool(_max_pool1d, input, kernel_size, stride, padding, dilation, ceil_mode, True)


def max_pool2d_with_indices(
    input: torch.Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`max_pool2d` with return_indices=True. As torch.nn.functional.max_pool2d_with_indices."""
    return _max_pool(_max_pool2d, input, kernel_size, stride, padding, dilation, ceil_mode, True)


def max_pool3d_with_indices(
    input: torch.Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`max_pool3d` with return_indices=True. As torch.nn.functional.max_pool3d_with_indices."""
    return _max_pool(_max_pool3d, input, kernel_size, stride, padding, dilation, ceil_mode, True)


def adaptive_max_pool1d(input: torch.Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """The maxima of as many windows of a signal as are asked for. As torch.nn.functional.adaptive_max_pool1d.

    Shape, Dtype, Runs on Triton when, Raises: as `adaptive_max_pool2d`, with input (N, C, L) or (C, L).
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.adaptive_max_pool1d.html
    """
    return _adaptive_max_pool(_adaptive_max_pool1d, input, output_size, return_indices)


def adaptive_max_pool2d(input: torch.Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """The maxima of as many windows of images as are asked for. As torch.nn.functional.adaptive_max_pool2d.

    Shape: input (N, C, H, W) or (C, H, W) with any strides, output_size (OH, OW), a number for both, or None for the input's;
        the result (N, C, OH, OW) or (C, OH, OW), a batch in channels_last if the input is.
    Dtype: float16, bfloat16, float32, float64; indices int64. A NaN is larger than any number.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.adaptive_max_pool2d.html
    """
    return _adaptive_max_pool(_adaptive_max_pool2d, input, output_size, return_indices)


def adaptive_max_pool3d(input: torch.Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """The maxima of as many windows of volumes as are asked for. As torch.nn.functional.adaptive_max_pool3d.

    Shape, Dtype, Runs on Triton when, Raises: as `adaptive_max_pool2d`, with input (N, C, D, H, W) or (C, D, H, W).
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.adaptive_max_pool3d.html
    """
    return _adaptive_max_pool(_adaptive_max_pool3d, input, output_size, return_indices)


def adaptive_max_pool1d_with_indices(
    input: torch.Tensor, output_size: Any, return_indices: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`adaptive_max_pool1d` with return_indices=True. As torch.nn.functional.adaptive_max_pool1d_with_indices."""
    return _adaptive_max_pool(_adaptive_max_pool1d, input, output_size, True)


def adaptive_max_pool2d_with_indices(
    input: torch.Tensor, output_size: Any, return_indices: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`adaptive_max_pool2d` with return_indices=True. As torch.nn.functional.adaptive_max_pool2d_with_indices."""
    return _adaptive_max_pool(_adaptive_max_pool2d, input, output_size, True)


def adaptive_max_pool3d_with_indices(
    input: torch.Tensor, output_size: Any, return_indices: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`adaptive_max_pool3d` with return_indices=True. As torch.nn.functional.adaptive_max_pool3d_with_indices."""
    return _adaptive_max_pool(_adaptive_max_pool3d, input, output_size, True)
