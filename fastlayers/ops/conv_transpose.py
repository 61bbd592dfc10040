"""Transposed convolution, and what follows it: x (N, C, H, W), w (C, O/groups, R, S), b (O,) -> y = f(norm(x * w + b) + r), where
x * w is the gradient of a convolution with respect to its input: the one with weight w, whose result has x's sizes.

So the kernels are those of that convolution: its input gradient gives y; of dz = f'(y) dy, it gives dx itself and, with x in the
place of its result's gradient, dw; and db is the sum of dz over images and pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import _kernels
from .. import _torch_functional as F
from ..kernels.conv.geometry import Geometry, filled
from ..values import Named
from .conv import Conv2d, Conv2dInference, Conv3d, Size, convolve

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels.conv import output_grad

__all__ = ["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]


class ConvTranspose2d(Conv2d):
    """input (N, C, H, W) or (C, H, W) -> (N, O, OH, OW) or (O, OH, OW), in channels_last where torch's is or it is asked for."""

    autocast = staticmethod(lambda x: F.conv_transpose2d(x[None, None], x[None, None]))
    function = "conv_transpose2d"

    def reference(self, input: Any, weight: Any, bias: Any, g: Geometry, activation: Any, channels_last: Any) -> Any:
        stride, padding, end, dilation = (sizes[-self.dims :] for sizes in (g.stride, g.padding, g.end, g.dilation))
        more = tuple([p - e for p, e in zip(padding, end, strict=True)])
        y = getattr(F, self.function)(input, weight, bias, stride, padding, more, g.groups, dilation)
        y = y if activation is None else activation(y)
        return y.contiguous() if channels_last is False else y

    def geometry(self, kernel: Sequence[int], *sizes: Any) -> Geometry | None:
        return Geometry.transposed(kernel, *sizes)

    def sizes(self, x: Any, w: Any, g: Geometry) -> tuple[int, ...]:
        dims = self.dims
        return g.transposed_sizes(filled(x.shape[-dims:], 1), filled(w.shape[2:], 1))[-dims:]

    def channels(self, w: Any, groups: int) -> int:
        return w.shape[1] * groups

    def channels_in(self, w: Any, groups: int) -> int:
        return w.shape[0]

    def met(self, x: Any, w: Any, g: Geometry) -> tuple[int, ...]:
        return tuple(x.shape[-self.dims :])

    def forward(self, t: Any, out: Named, options: Any, precision: str, **more: Any) -> None:
        x, w, y, z = self._images(t.input, t.weight, out.output, out.z)
        _, input_grad, _ = self.launchers()
        input_grad(x, w, y, options.geometry, precision=precision, bias=t.bias, then=options.activation, z=z, **more)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        g, db, kept = options.geometry, grads.bias, saved.z if saved.output is None else saved.output
        dx, dw, x, w, given, kept = self._images(grads.input, grads.weight, saved.input, saved.weight, dy.output, kept)
        small, filters = x if dx is None else dx, w if dw is None else dw
        # Both gradients read dz as the image of a convolution whose result has x's sizes.
        dz = output_grad.conv2d_output_grad(
            given, kept, options.activation, db,
            channels_last=self.dims < 3
            and small is not None
            and output_grad.reads_channels_last(small, (given.shape[1], *filters.shape[1:]), precision),
        )  # fmt: skip
        convolution, _, weight_grad = self.launchers()
        if dx is not None:
            convolution(dz, w, None, dx, g, precision=precision)
        if dw is not None:
            weight_grad(x, dz, dw, g, precision=precision)


class ConvTranspose1d(ConvTranspose2d):
    """input (N, C, L) or (C, L) -> (N, O, OL) or (O, OL)."""

    autocast = staticmethod(lambda x: F.conv_transpose1d(x[None], x[None]))
    dims = 1
    function = "conv_transpose1d"


class ConvTranspose3d(ConvTranspose2d, Conv3d):
    """input (N, C, D, H, W) or (C, D, H, W) -> (N, O, OD, OH, OW) or (O, OD, OH, OW)."""

    autocast = staticmethod(lambda x: F.conv_transpose3d(x[None, None, None], x[None, None, None]))
    function = "conv_transpose3d"


class ConvTranspose2dInference(Conv2dInference, ConvTranspose2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """With a batch normalisation in eval, and a residual, before the activation: where no gradients are recorded."""


class ConvTranspose1dInference(Conv2dInference, ConvTranspose1d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """The same of signals."""


class ConvTranspose3dInference(Conv2dInference, ConvTranspose3d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """The same of volumes."""


_conv_transpose1d, _conv_transpose1d_inference = ConvTranspose1d(), ConvTranspose1dInference()
_conv_transpose2d, _conv_transpose2d_inference = ConvTranspose2d(), ConvTranspose2dInference()
_conv_transpose3d, _conv_transpose3d_inference = ConvTranspose3d(), ConvTranspose3dInference()


def conv_transpose1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> torch.Tensor:
    """The transposed convolution of signals with a filter bank, plus bias. As torch.nn.functional.conv_transpose1d.

    Shape: input (N, C, L) or (C, L), weight (C, O/groups, S), bias (O,); the result (N, O, OL) or (O, OL), contiguous unless the
        weight's channels are. All with any strides.
    Dtype, Runs on Triton when, Raises: as `conv_transpose2d`.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.conv_transpose1d.html
    """
    sizes = (stride, padding, output_padding, groups, dilation)
    return convolve(_conv_transpose1d, (input, weight, bias), sizes)


def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> torch.Tensor:
    """The transposed convolution of images with a filter bank, plus bias. As torch.nn.functional.conv_transpose2d.

    Shape: input (N, C, H, W) or (C, H, W), weight (C, O/groups, R, S), bias (O,); the result (N, O, OH, OW) or (O, OH, OW), in
        channels_last where torch's is. All with any strides.
    Dtype: float16, bfloat16, float32, float64, the same for all; sums in float32 (float64). float32 obeys
        torch.backends.cudnn.conv.fp32_precision, which allows TF32 by default. Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets) and only the batch is of size 0.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.conv_transpose2d.html
    """
    sizes = (stride, padding, output_padding, groups, dilation)
    return convolve(_conv_transpose2d, (input, weight, bias), sizes)


def conv_transpose3d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> torch.Tensor:
    """The transposed convolution of volumes with a filter bank, plus bias. As torch.nn.functional.conv_transpose3d.

    Shape: input (N, C, D, H, W) or (C, D, H, W), weight (C, O/groups, T, R, S), bias (O,); the result (N, O, OD, OH, OW) or
        (O, OD, OH, OW), in channels_last_3d where torch's is. All with any strides.
    Dtype, Runs on Triton when, Raises: as `conv_transpose2d`.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.conv_transpose3d.html
    """
    sizes = (stride, padding, output_padding, groups, dilation)
    return convolve(_conv_transpose3d, (input, weight, bias), sizes)
