"""Convolution of images and what follows it: x (N, C, H, W), w (O, C/groups, R, S), b (O,) -> y = f(norm(conv(x, w) + b) + r).
dz = f'(y) dy; dx and dw by the transposed and the correlated convolution; db = sum of dz over images and pixels.

A signal (N, C, L) is an image of a single row; volumes (N, C, D, H, W) have kernels of their own."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from .. import _kernels
from .. import _torch_functional as F
from ..dispatch import autocast
from ..dispatch.precision import conv_precision
from ..dispatch.support import BadInput, run_reference, wants_grad
from ..kernels.conv.geometry import Geometry, filled
from ..operation import Operation
from ..values import Named, Needs, Out, Tensors, image_strides, is_channels_last, value
from .activation import Activation

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels.conv import gather as kernels
    from ..kernels.conv import output_grad, volume
    from ..kernels.epilogues import Norm

__all__ = ["conv1d", "conv2d", "conv3d"]

value(Geometry)

Size = int | Sequence[int]
Statistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, float]
"""Running mean and variance, weight and bias, eps: what torch.nn.functional.batch_norm applies in eval."""


def _images(x: Any, dims: int) -> Any:
    """A view as a batch of images (N, C, H, W) or volumes (N, C, D, H, W), of what may be unbatched, signals or None."""
    if x is None:
        return None
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    return x if dims > 1 else x.unsqueeze(2)


def _is_channels_last(t: Any, dims: int = 2) -> bool:
    """torch's rule (c10::is_channels_last_strides_2d and _3d): do the strides alone say NHWC? Ambiguous ones say NCHW."""
    shape, strides = tuple(t.shape), tuple(t.stride())
    if len(shape) == dims + 1:
        shape, strides = (1, *shape), (shape[0] * strides[0], *strides)
    if dims == 1:
        shape, strides = (*shape[:2], 1, shape[2]), (*strides[:2], shape[2] * strides[2], strides[2])
    return is_channels_last(shape, strides)


def _laid_out(shape: Sequence[int], dtype: torch.dtype, channels_last: bool, dims: int) -> Out:
    """The description of an image or a signal, or a batch of them, in either memory format."""
    shape = tuple(shape)
    batch = shape if len(shape) == dims + 2 else (1, *shape)
    return Out(shape, dtype, image_strides(batch, channels_last)[-len(shape) :])


class Conv2d(Operation):
    """input (N, C, H, W) or (C, H, W) -> (N, O, OH, OW) or (O, OH, OW), in channels_last where torch's is or it is asked for."""

    tensors = ("input", "weight", "bias")
    autocast = staticmethod(lambda x: F.conv2d(x[None, None], x[None, None]))
    dims: ClassVar[int] = 2
    function: ClassVar[str] = "conv2d"

    class Options(NamedTuple):
        geometry: Geometry
        activation: Activation | None
        channels_last: bool | None
        """The result's memory format; None: torch's choice."""

    def reference(self, input: Any, weight: Any, bias: Any, g: Geometry, activation: Any, channels_last: Any) -> Any:
        stride, padding, dilation = (sizes[-self.dims :] for sizes in (g.stride, g.padding, g.dilation))
        if g.padding != g.end:
            pads = [n for pad in zip(g.padding[::-1], g.end[::-1], strict=True) for n in pad]
            input, padding = F.pad(input, pads[: 2 * self.dims]), (0,) * self.dims
        y = getattr(F, self.function)(input, weight, bias, stride, padding, dilation, g.groups)
        y = y if activation is None else activation(y)
        # The layer before may have left its result in channels_last, where torch's would have been NCHW.
        return y.contiguous() if channels_last is False else y

    def label(self, options: Options) -> str:
        return self.function

    def geometry(self, kernel: Sequence[int], *sizes: Any) -> Geometry | None:
        """From torch's arguments, in torch's order; None where torch would object."""
        return Geometry.of(kernel, *sizes)

    def sizes(self, x: Any, w: Any, g: Geometry) -> tuple[int, ...]:
        """Those of the result: the height and width of images, the length of signals."""
        dims = self.dims
        return g.sizes(filled(x.shape[-dims:], 1), filled(w.shape[2:], 1))[-dims:]

    def launchers(self) -> tuple[Any, Any, Any]:
        """Of the convolution and its two gradients."""
        return kernels.conv2d, kernels.conv2d_input_grad, kernels.conv2d_weight_grad

    def met(self, x: Any, w: Any, g: Geometry) -> tuple[int, ...]:
        """The sizes of what each tap of the weight meets in an image: as many pixels as the result has."""
        return self.sizes(x, w, g)

    def unsupported(self, t: Any, options: Any) -> str | None:
        g, x, w, b = options.geometry, t.input, t.weight, t.bias
        first = -self.dims - 1  # the channels' dimension
        if x.dim() not in (-first, 1 - first) or w.dim() != 1 - first:
            return BadInput(f"an input with {x.dim()} dimensions and a weight with {w.dim()}")
        if x.shape[first] != self.channels_in(w, g.groups) or w.shape[0] % g.groups:
            return BadInput(f"{x.shape[first]} channels for a weight of {tuple(w.shape)} in {g.groups} groups")
        if b is not None and b.shape != (self.channels(w, g.groups),):
            return BadInput(f"a bias of {tuple(b.shape)} for a weight of {tuple(w.shape)}")
        if 0 in w.shape or 0 in x.shape[first:]:
            return "a dimension of size 0 other than the batch"
        if min(self.sizes(x, w, g)) < 1:
            return BadInput("a result without pixels")
        return None

    def precision(self, dtype: torch.dtype) -> str:
        return conv_precision(dtype)

    def outputs(self, t: Any, options: Any, needs: Needs | None) -> dict[str, Out | str]:
        x, w, channels_last = t.input, t.weight, options.channels_last
        if channels_last is None:
            channels_last = math.prod(x.shape) > 0 and self._chooses_channels_last(x, w)
            if x.dtype is torch.float64 and (self.dims == 3 or x.device.type == "cuda"):
                channels_last = False  # cuDNN has no NHWC for float64, so torch's result is NCHW
        shape = (
            *x.shape[: -self.dims - 1],
            self.channels(w, options.geometry.groups),
            *self.sizes(x, w, options.geometry),
        )
        out = _laid_out(shape, x.dtype, channels_last, self.dims)
        kept = needs is not None and self._kept(options) == "z"
        return {"output": out, "z": out} if kept else {"output": out}

    def channels(self, w: Any, groups: int) -> int:
        """Those of the result."""
        return w.shape[0]

    def channels_in(self, w: Any, groups: int) -> int:
        """Those of the input."""
        return w.shape[1] * groups

    def _chooses_channels_last(self, x: Any, w: Any) -> bool:
        """Whether torch's results are in channels_last. A signal it makes contiguous first."""
        return (self.dims > 1 and _is_channels_last(x, self.dims)) or _is_channels_last(w, self.dims)

    def _images(self, *tensors: Any) -> tuple[Any, ...]:
        return tuple([_images(t, self.dims) for t in tensors])

    def _kept(self, options: Any) -> str | None:
        """What the activation's derivative needs: "z", which is what comes before it, or the output."""
        f = options.activation
        return None if f is None else "z" if f.saves == "input" else "output"

    def forward(self, t: Any, out: Named, options: Any, precision: str, **more: Any) -> None:
        x, w, y, z = self._images(t.input, t.weight, out.output, out.z)
        self.launchers()[0](
            x, w, t.bias, y, options.geometry, precision=precision, then=options.activation, z=z, **more
        )

    def saves(self, t: Any, options: Any, needs: Needs) -> tuple[str, ...]:
        kept = self._kept(options)
        names = (("input", needs[1]), ("weight", needs[0]), (kept, kept is not None))
        return tuple([name for name, needed in names if needed])  # type: ignore[misc]

    def gradients(self, like: Any, options: Any, needs: Needs) -> tuple[Out | int | str | None, ...]:
        x, w, b = like[:3]
        dims, last = self.dims, self._chooses_channels_last(x, w)
        return (
            _laid_out(x.shape, x.dtype, last, dims) if needs[0] else None,
            _laid_out(w.shape, w.dtype, _is_channels_last(w, dims), dims) if needs[1] else None,
            Out(b.shape, b.dtype) if needs[2] else None,
        )

    def backward(self, grads: Any, dy: Named, saved: Named, options: Any, precision: str) -> None:
        g, db, kept = options.geometry, grads.bias, saved.z if saved.output is None else saved.output
        dx, dw, x, w, given, kept = self._images(grads.input, grads.weight, saved.input, saved.weight, dy.output, kept)
        shape = dw.shape if dw is not None else w.shape if dx is not None else None
        dz = output_grad.conv2d_output_grad(
            given, kept, options.activation, db,
            channels_last=self.dims < 3 and shape is not None and output_grad.reads_channels_last(given, shape, precision),
        )  # fmt: skip
        _, input_grad, weight_grad = self.launchers()
        if dx is not None:
            input_grad(dz, w, dx, g, precision=precision)
        if dw is not None:
            weight_grad(dz, x, dw, g, precision=precision)

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Any, needs: Needs) -> Tensors:
        kept = self._kept(options)
        if kept is not None:  # from what was saved: `reference` might lack the input
            dz = dy.z
            if dy.output is not None:
                with torch.autocast(dy.output.device.type, enabled=False):
                    d = options.activation.differentiate(dy.output, saved[kept])
                dz = d if dz is None else dz + d
            dy, options = Named(output=dz), options._replace(activation=None)
        return super().differentiate(dy, saved, like, options, needs)

    def flops(self, like: Any, options: Any, needs: Needs | None) -> int:
        x, w = like.input, like.weight
        once = (
            2 * math.prod(x.shape[: -self.dims - 1]) * math.prod(self.met(x, w, options.geometry)) * math.prod(w.shape)
        )
        return once * (1 if needs is None else needs[0] + needs[1])


class Conv1d(Conv2d):
    """input (N, C, L) or (C, L) -> (N, O, OL) or (O, OL)."""

    autocast = staticmethod(lambda x: F.conv1d(x[None], x[None]))
    dims = 1
    function = "conv1d"


class Conv3d(Conv2d):
    """input (N, C, D, H, W) or (C, D, H, W) -> (N, O, OD, OH, OW) or (O, OD, OH, OW)."""

    autocast = staticmethod(lambda x: F.conv3d(x[None, None, None], x[None, None, None]))
    dims = 3
    function = "conv3d"

    def launchers(self) -> tuple[Any, Any, Any]:
        return volume.conv3d, volume.conv3d_input_grad, volume.conv3d_weight_grad


class Conv2dInference(Conv2d):
    """With a batch normalisation in eval, and a residual, before the activation: where no gradients are recorded."""

    tensors = (*Conv2d.tensors, "residual", "running_mean", "running_var", "norm_weight", "norm_bias")
    floats = cast = Conv2d.tensors

    class Options(NamedTuple):  # pyright: ignore[reportIncompatibleVariableOverride]
        geometry: Geometry
        activation: Activation | None
        channels_last: bool | None
        eps: float | None
        """None: no normalisation."""

    def reference(self, *args: Any) -> Any:
        raise NotImplementedError("a joined call, which is never made of torch's functions")

    def unsupported(self, t: Any, options: Any) -> str | None:
        if wants_grad(*t):
            return "gradients through a normalisation or a residual"
        reason = super().unsupported(t, options)
        if reason is not None:
            return reason
        dtype = autocast.dtype_after(self.autocast, t.input)
        channels = self.channels(t.weight, options.geometry.groups)
        for s in t[4:]:
            if s is not None and (s.shape != (channels,) or s.stride() != (1,)):
                return BadInput("statistics that aren't one number a channel")
            if s is not None and s.dtype not in (dtype, torch.float32):
                return f"statistics of {s.dtype} for {dtype}"
        if t.residual is None:
            return None
        out: Any = self.outputs(t, options, None)["output"]
        if t.residual.shape != out.shape or t.residual.dtype != dtype:
            return f"a residual of {t.residual.dtype} {tuple(t.residual.shape)}"
        # Else the sum's memory format might be another than the result's.
        if any([n > 1 and a != b for n, a, b in zip(out.shape, t.residual.stride(), out.strides, strict=True)]):
            return "a residual that lies in memory otherwise than the result"
        return None

    def forward(self, t: Any, out: Named, options: Any, precision: str, **more: Any) -> None:
        norm = None if options.eps is None else Norm._make((*t[4:], options.eps))
        super().forward(t, out, options, precision, norm=norm, residual=_images(t.residual, self.dims))


class Conv1dInference(Conv2dInference, Conv1d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """The same of signals."""


class Conv3dInference(Conv2dInference, Conv3d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """The same of volumes."""


_conv1d, _conv1d_inference = Conv1d(), Conv1dInference()
_conv2d, _conv2d_inference = Conv2d(), Conv2dInference()
_conv3d, _conv3d_inference = Conv3d(), Conv3dInference()


def _is_exact(size: Any) -> bool:
    """Whether it consists of ints, or is a word: for a cache True and 1.0 equal 1, but not for torch."""
    cls = type(size)
    if cls is not tuple:
        return cls is int or cls is str
    count = len(size)
    return 0 < count < 4 and type(size[0]) is type(size[count // 2]) is type(size[-1]) is int


def _made(op: Conv2d, kernel: tuple[int, ...], sizes: tuple[Any, ...], more: tuple[Any, ...]) -> Any:
    geometry = op.geometry(kernel, *sizes) if len(kernel) == op.dims else None
    if geometry is None:
        return None
    return (op.Options if is_dynamo_compiling() else op.options)(geometry, *more)


_known: dict[Any, tuple[tuple[Any, ...], Any]] = {}
"""By the arguments of `_options`, the sizes themselves and the result."""


def _options(op: Conv2d, weight: Any, sizes: tuple[Any, ...], more: tuple[Any, ...]) -> Any:
    """Always the same object for the same arguments; None where torch would object."""
    kernel = tuple(weight.shape)[2:] if isinstance(weight, torch.Tensor) else ()
    if is_dynamo_compiling():
        return _made(op, kernel, sizes, more)
    key = op, kernel, sizes, more
    try:
        found = _known.get(key)
    except TypeError:  # a list
        return _made(op, kernel, sizes, more)
    if found is not None and all(map(operator.is_, found[0], sizes)):  # a layer's are the same objects at every call
        return found[1]
    if not all([_is_exact(size) for size in sizes]):
        return _made(op, kernel, sizes, more)
    if found is None:
        if len(_known) >= 4096:
            _known.clear()
        found = _known[key] = sizes, _made(op, kernel, sizes, more)
    return found[1]


def convolve(op: Conv2d, tensors: Tensors, sizes: tuple[Any, ...]) -> torch.Tensor:
    """A convolution by itself, of torch's arguments."""
    options = _options(op, tensors[1], sizes, (None, None))
    return _refused(op, tensors, sizes) if options is None else op.run(tensors, options)


def _refused(op: Conv2d, tensors: Tensors, sizes: tuple[Any, ...]) -> Any:
    theirs = getattr(F, op.function)
    return run_reference(op.function, BadInput(f"sizes {sizes}"), lambda: theirs(*tensors, *sizes))


def conv1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> torch.Tensor:
    """The cross-correlation of signals with a filter bank, plus bias. As torch.nn.functional.conv1d.

    Shape: input (N, C, L) or (C, L), weight (O, C/groups, S), bias (O,); the result (N, O, OL) or (O, OL), contiguous unless the
        weight's channels are. All with any strides.
    Dtype, Runs on Triton when, Raises: as `conv2d`.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.conv1d.html
    """
    return convolve(_conv1d, (input, weight, bias), (stride, padding, dilation, groups))


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> torch.Tensor:
    """The cross-correlation of images with a filter bank, plus bias. As torch.nn.functional.conv2d.

    Shape: input (N, C, H, W) or (C, H, W), weight (O, C/groups, R, S), bias (O,); the result (N, O, OH, OW) or
        (O, OH, OW), in channels_last where torch's is. All with any strides.
    Dtype: float16, bfloat16, float32, float64, the same for all; sums in float32 (float64). float32 obeys
        torch.backends.cudnn.conv.fp32_precision, which allows TF32 by default. Under autocast, as torch.
    Runs on Triton when: all tensors are plain ones on one GPU (or Triton interprets) and only the batch is of size 0.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.conv2d.html; implicit matrix product:
        Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", arXiv:1410.0759.
    """
    return convolve(_conv2d, (input, weight, bias), (stride, padding, dilation, groups))


def conv3d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> torch.Tensor:
    """The cross-correlation of volumes with a filter bank, plus bias. As torch.nn.functional.conv3d.

    Shape: input (N, C, D, H, W) or (C, D, H, W), weight (O, C/groups, T, R, S), bias (O,); the result (N, O, OD, OH, OW) or
        (O, OD, OH, OW), in channels_last_3d where torch's is. All with any strides.
    Dtype, Runs on Triton when, Raises: as `conv2d`.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.conv3d.html
    """
    return convolve(_conv3d, (input, weight, bias), (stride, padding, dilation, groups))


def conv_joined(
    records: tuple[Conv2d, Conv2d],
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *sizes: Any,
    norm: Statistics | None = None,
    residual: torch.Tensor | None = None,
    activation: Activation | None = None,
    channels_last: bool | None = None,
) -> torch.Tensor | None:
    """A convolution and what follows it as one call; None where the kernels don't take it whole. A convolution alone is always
    computed, by torch if need be.

    Args:
        records: of the convolution, and of one that also normalises or adds.
        sizes: the function's arguments after the tensors.
        norm: a batch normalisation in eval, which comes first.
        residual: what is added before the activation.
        channels_last: the result's memory format, where it isn't torch's choice: see `memory_formats`.
    """
    plain, inference = records
    op, tensors, more = plain, (input, weight, bias), (activation, channels_last)
    if norm is not None or residual is not None:
        *statistics, eps = norm or (None,) * 5
        op, tensors, more = inference, (input, weight, bias, residual, *statistics), (*more, eps)
    options = _options(op, weight, sizes, more)
    alone = op is plain and activation is None
    if options is None:
        return _refused(op, tensors, sizes) if alone else None
    return op.run(tensors, options, joined=not alone)


def memory_formats(
    records: Sequence[Conv2d], input: torch.Tensor, weights: Sequence[torch.Tensor], groups: Sequence[int]
) -> Sequence[bool | None]:
    """For convolutions in a row: which results to leave in channels_last, so that an NCHW image is converted only once. The last
    one's is torch's choice; what lies between two of them nobody sees. None stands for torch's choice.

    Args:
        records, weights, groups: of each convolution.
        input: of the first one.
    """
    nothing = [None] * len(records)
    tensors = (input, *weights)
    plain = all([isinstance(t, torch.Tensor) and t.layout is torch.strided and not t.is_nested for t in tensors])
    if not plain or type(input) is not torch.Tensor:
        return nothing
    formats = _formats if is_dynamo_compiling() else _cached_formats
    sizes = tuple([(t.shape, t.stride()) for t in tensors])
    return formats(tuple(records), input.dtype, sizes, tuple(groups)) or nothing


def _formats(records: Any, dtype: torch.dtype, sizes: Any, groups: Any) -> Sequence[bool | None] | None:
    """The same as a function of sizes and strides; None: all are torch's choice."""
    dims = records[0].dims
    input, *weights = [Out(shape, dtype, strides) for shape, strides in sizes]
    if len(input.shape) not in (dims + 1, dims + 2) or 0 in input.shape:
        return None
    if any([op.dims != dims or len(w.shape) != dims + 2 for op, w in zip(records, weights, strict=True)]):
        return None
    # Of a single channel, or in float64, torch's choice isn't passed on from layer to layer.
    channels = [op.channels(w, n) for op, w, n in zip(records, weights, groups, strict=True)]
    if dtype == torch.float64 or 1 in channels[:-1]:
        return None
    chosen = _is_channels_last(weights[-1], dims)
    if dims > 1:
        chosen = _is_channels_last(input, dims) or any([_is_channels_last(w, dims) for w in weights])
    return (*[True for _ in weights[:-1]], chosen)


_cached_formats = functools.lru_cache(maxsize=4096)(_formats)
