"""Resampling of signals (N, C, L), images (N, C, H, W) and volumes (N, C, D, H, W). Nothing is saved: the gradients need sizes
alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _kernels
from .. import _torch_functional as F
from .._kernels import is_plain
from ..dispatch import autocast
from ..dispatch.support import BadInput
from ..operation import Operation
from ..values import Named, Needs, Out
from .averaging import adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d
from .pooling import laid_out, volumes

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels.pooling import resize as kernels

__all__ = ["interpolate", "upsample", "upsample_bilinear", "upsample_nearest"]

Size = int | Sequence[int]
Factor = float | Sequence[float]

_LINEAR = {"linear": 1, "bilinear": 2, "trilinear": 3}
"""The linear modes, and the dimensions of what they take."""
_NEAREST = ("nearest", "nearest-exact")
_SPECIAL = "the same or twice the size by another scale_factor"
_PROBES: dict[str, autocast.Probe] = {
    "nearest": lambda x: F.interpolate(x[None, None], 1),
    "nearest-exact": lambda x: F.interpolate(x[None, None], 1, mode="nearest-exact"),
    "linear": lambda x: F.interpolate(x[None], 1, mode="linear"),
    "bilinear": lambda x: F.interpolate(x[None, None], 1, mode="bilinear"),
    "trilinear": lambda x: F.interpolate(x[None, None, None], 1, mode="trilinear"),
}


def _each(value: Any, dims: int) -> tuple[Any, ...]:
    """A number for each dimension."""
    return value if isinstance(value, tuple) else (value,) * dims


class Interpolate(Operation):
    """input (N, C, ...) -> the same with other sizes."""

    tensors = ("input",)
    compiled = False  # Inductor fuses it with whatever stands around it
    widens = True

    class Options(NamedTuple):
        size: int | tuple[int, ...] | None
        scale_factor: float | tuple[float, ...] | None
        mode: str
        align_corners: bool | None
        recompute_scale_factor: bool | None
        antialias: bool
        dtype: torch.dtype | None
        """The result's, where autocast has torch compute in another one than the input's."""

    def reference(self, input: Any, *options: Any) -> Any:
        *given, dtype = options
        return F.interpolate(input if dtype is None else input.to(dtype), *given)

    def probe(self, options: Options) -> autocast.Probe | None:
        return _PROBES.get(options.mode)

    def unsupported(self, t: Any, options: Options) -> str | None:
        x, mode = t.input, options.mode
        dims = x.dim() - 2
        if dims not in (1, 2, 3) or _LINEAR.get(mode, dims) != dims:
            return BadInput(f"an input with {x.dim()} dimensions in mode {mode!r}")
        if mode in _NEAREST and (options.align_corners is not None or options.antialias):
            return BadInput(f"align_corners or antialias in mode {mode!r}")
        given = options.size if options.scale_factor is None else options.scale_factor
        both = options.size is not None and (options.scale_factor is not None or options.recompute_scale_factor)
        if given is None or both or len(_each(given, dims)) != dims:
            return BadInput(f"size {options.size} and scale_factor {options.scale_factor}")
        if options.antialias or (mode not in _LINEAR and mode not in _NEAREST):
            return "mode bicubic or lanczos, antialias"
        if 0 in x.shape[1:] or min(self._sizes(x.shape[2:], options)) < 1:
            return BadInput(f"an input {tuple(x.shape)} to be resized by {given}")
        each = zip(x.shape[2:], self._sizes(x.shape[2:], options), self._factors(dims, options), strict=True)
        if not options.align_corners and any(
            [factor > 0 and o in (n, 2 * n) and factor != o / n for n, o, factor in each]
        ):
            return _SPECIAL  # torch takes the ratio of the sizes instead of the factor, on some devices and in one direction
        return None

    def _sizes(self, image: Sequence[int], options: Options) -> tuple[int, ...]:
        """The sizes of the result."""
        if options.size is not None:
            return _each(options.size, len(image))
        return tuple(
            [int(n * factor) for n, factor in zip(image, _each(options.scale_factor, len(image)), strict=True)]
        )

    def _factors(self, dims: int, options: Options) -> tuple[float, ...]:
        """The factors that stand for the ratios of the sizes; 0: there is none."""
        factors = options.scale_factor
        return _each(0.0 if factors is None or options.recompute_scale_factor else factors, dims)

    def _scales(self, image: Sequence[int], options: Options) -> tuple[float, float, float]:
        """Along each dimension of a volume, how far neighbouring pixels of the result are apart in the input, as torch computes
        it: by the factor that was given, or by the sizes."""
        dims = len(image)
        found = [1.0] * (3 - dims)
        for n, o, factor in zip(image, self._sizes(image, options), self._factors(dims, options), strict=True):
            if options.mode in _LINEAR and options.align_corners:
                found.append((n - 1) / (o - 1) if o > 1 else 0.0)
            else:
                found.append(1 / factor if factor > 0 else n / o)
        return tuple(found)  # type: ignore[return-value]

    def _how(self, image: Sequence[int], options: Options) -> dict[str, Any]:
        """The launchers' arguments. To its own size, an image is copied, as torch does on GPUs: a neighbour's weight of 0 would
        make NaN of an infinity."""
        linear = options.mode in _LINEAR and self._sizes(image, options) != tuple(image)
        centred = not options.align_corners if linear else options.mode == "nearest-exact"
        scales = self._scales(image, options)
        return dict(scales=scales, dims=len(image), linear=linear, centred=centred)

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        x = t.input
        dims = len(x.shape) - 2
        sizes = self._sizes(x.shape[2:], options)
        return {"output": laid_out(x, sizes, options.dtype or x.dtype, dims, keeps=dims > 1)}

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        image = t.input.shape[2:]
        x, y = volumes(t.input, len(image)), volumes(out.output, len(image))
        kernels.resize(x, y, **self._how(image, options))

    def saves(self, t: Any, options: Options, needs: Needs) -> tuple[str, ...]:
        return ()

    def gradients(self, like: Any, options: Options, needs: Needs) -> tuple[Out | int | str | None, ...]:
        x = like.input
        dims = len(x.shape) - 2
        return (laid_out(x, x.shape[2:], x.dtype, dims, keeps=dims == 2 or (dims == 3 and options.mode in _LINEAR)),)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        image = grads.input.shape[2:]
        given, dx = volumes(dy.output, len(image)), volumes(grads.input, len(image))
        kernels.resize_grad(given, dx, **self._how(image, options))


_interpolate = Interpolate()
_AREA = {3: adaptive_avg_pool1d, 4: adaptive_avg_pool2d, 5: adaptive_avg_pool3d}


def _numbers(value: Any, *kinds: type) -> Any:
    """A number or a tuple of numbers of these types, as it is or from a list; NotImplemented for anything else but None."""
    if isinstance(value, (tuple, list)):
        return tuple(value) if all([type(n) in kinds for n in value]) else NotImplemented
    return value if value is None or type(value) in kinds else NotImplemented


def _floats(value: Any) -> Any:
    """A finite factor, or a tuple of them, as floats."""
    found = _numbers(value, float, int)
    if found is None or found is NotImplemented:
        return found
    floats = tuple([float(n) for n in _each(found, 1)])
    if not all([math.isfinite(n) for n in floats]):
        return NotImplemented
    return floats if isinstance(found, tuple) else floats[0]


def interpolate(
    input: torch.Tensor,
    size: Size | None = None,
    scale_factor: Factor | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> torch.Tensor:
    """The input with other sizes: its nearest pixels, or interpolated or averaged ones. As torch.nn.functional.interpolate.

    Shape: input (N, C, L), (N, C, H, W) or (N, C, D, H, W) with any strides; the result in channels_last if the input is.
    Dtype: float16, bfloat16, float32, float64; computed in float32 (float64). Under autocast, as torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets); modes nearest, nearest-exact, linear,
        bilinear, trilinear and area, without antialias.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.interpolate.html
    """
    sizes, factors = _numbers(size, int), _floats(scale_factor)
    flags = (align_corners, recompute_scale_factor, antialias)
    plain = (
        isinstance(input, torch.Tensor) and isinstance(mode, str) and all([f is None or type(f) is bool for f in flags])
    )
    if sizes is NotImplemented or factors is NotImplemented or not plain or antialias is None:
        values = (size, scale_factor, mode, *flags, None)
        return _interpolate.refused((input,), values, "sizes, factors or flags of other types")
    if mode == "area" and is_plain(input) and input.dim() in _AREA and flags == (None, recompute_scale_factor, False):
        dims = input.dim() - 2
        if factors is None and sizes is not None and not recompute_scale_factor and len(_each(sizes, dims)) == dims:
            return _AREA[input.dim()](input, _each(sizes, dims))
        if sizes is None and factors is not None and len(_each(factors, dims)) == dims:
            each = zip(input.shape[2:], _each(factors, dims), strict=True)
            return _AREA[input.dim()](input, tuple([int(n * factor) for n, factor in each]))
    return _interpolate((input,), sizes, factors, mode, *flags, None)


def upsample(
    input: torch.Tensor,
    size: Size | None = None,
    scale_factor: Factor | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
) -> torch.Tensor:
    """`interpolate` under its old name, with torch's warning. As torch.nn.functional.upsample."""
    _warn("upsample")
    return interpolate(input, size, scale_factor, mode, align_corners)


def upsample_nearest(
    input: torch.Tensor, size: Size | None = None, scale_factor: Factor | None = None
) -> torch.Tensor:  # fmt: skip
    """`interpolate` in mode nearest, with torch's warning. As torch.nn.functional.upsample_nearest."""
    _warn("upsample_nearest")
    return interpolate(input, size, scale_factor, mode="nearest")


def upsample_bilinear(
    input: torch.Tensor, size: Size | None = None, scale_factor: Factor | None = None
) -> torch.Tensor:  # fmt: skip
    """`interpolate` in mode bilinear with align_corners, with torch's warning. As torch.nn.functional.upsample_bilinear."""
    _warn("upsample_bilinear")
    return interpolate(input, size, scale_factor, mode="bilinear", align_corners=True)


def _warn(name: str) -> None:
    """torch's warning that a function is deprecated."""
    text = f"`nn.functional.{name}` is deprecated. Use `nn.functional.interpolate` instead."
    warnings.warn(text, stacklevel=3)
