"""Convolution of images: x (N, C, H, W), w (O, C/groups, R, S), b (O,) -> y = f(conv(x, w) + b) (N, O, OH, OW);
dz = f'(y) dy, dx and dw by the transposed and the correlated convolution, db = sum of dz over images and pixels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from .. import _dispatch, _dtypes
from .._dispatch import BadInput, accelerated, replayable
from .pointwise import Pointwise

if TYPE_CHECKING or _dispatch.MISSING is None:
    from ..kernels import _launch, epilogues
    from ..kernels import conv as kernels
    from ..kernels._replay import Found, is_plain, something

Tensors = Sequence[torch.Tensor | None]
Size = int | Sequence[int]
Pair = tuple[int, int]
Norm = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, float]
"""Running mean and variance, weight and bias, eps: what torch.nn.functional.batch_norm applies in eval."""


class _Geometry(NamedTuple):
    """`padding` above and to the left, `end` below and to the right: they differ only for "same" with even kernels."""

    stride: Pair
    padding: Pair
    end: Pair
    dilation: Pair
    groups: int

    def output_size(self, image: Sequence[int], kernel: Sequence[int]) -> Pair:
        h, w = (
            (image[i] + self.padding[i] + self.end[i] - self.dilation[i] * (kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in (0, 1)
        )
        return h, w

    def arguments(self) -> dict[str, Any]:
        """What the launchers take."""
        return dict(stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)


def _pair(value: Any, least: int) -> Pair | None:
    """torch's int or int[2], a single number standing for both; None where torch would object."""
    pair = (
        (value, value) if type(value) is int else tuple(value) if isinstance(value, (tuple, list, torch.Size)) else ()
    )
    if len(pair) == 1:
        pair = pair * 2
    if len(pair) != 2 or not all(type(v) is int and v >= least for v in pair):
        return None
    return pair


def _geometry(kernel: Sequence[int], stride: Size, padding: Any, dilation: Size, groups: int) -> _Geometry | None:
    """The geometry in numbers, or None where torch would object to it."""
    s, d = _pair(stride, 1), _pair(dilation, 1)
    if s is None or d is None or type(groups) is not int or groups < 1:
        return None
    if padding == "same" and s == (1, 1):
        total = tuple(d[i] * (kernel[i] - 1) for i in (0, 1))
        start: Pair = (total[0] // 2, total[1] // 2)
        return _Geometry(s, start, (total[0] - start[0], total[1] - start[1]), d, groups)
    p = (0, 0) if padding == "valid" else None if isinstance(padding, str) else _pair(padding, 0)
    return None if p is None else _Geometry(s, p, p, d, groups)


def _images(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 4 else x.unsqueeze(0)


def _is_channels_last(x: torch.Tensor) -> bool:
    """torch's rule (c10::is_channels_last_strides_2d): do the strides alone say NHWC? Ambiguous ones say NCHW."""
    if x.stride(1) == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if x.shape[d] == 0 or x.stride(d) < least or (d == 0 and least == x.stride(1)):
            return False
        least = x.stride(d) * max(x.shape[d], 1)
    return True


def _strides(shape: Sequence[int], channels_last: bool) -> Sequence[int]:
    """Of an image or batch of images."""
    *_, c, h, w = shape
    strides = (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return strides[-len(shape) :]


def _empty(shape: Sequence[int], like: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """An uninitialised image or batch of images, in its final shape and strides: a Function mustn't return a view."""
    strides = _strides(shape, channels_last)
    return _launch.empty(shape, dtype=like.dtype, device=like.device, strides=strides)


def _format(x: torch.Tensor, w: torch.Tensor, g: _Geometry, channels_last: bool | None) -> tuple[Sequence[int], bool]:
    """The result's shape, and whether it is in channels_last: torch's choice unless one is given."""
    size = g.output_size(x.shape[-2:], w.shape[2:])
    if channels_last is None:
        channels_last = x.numel() > 0 and (_is_channels_last(_images(x)) or _is_channels_last(w))
        if x.device.type == "cuda" and x.dtype == torch.float64:
            channels_last = False  # cuDNN has no NHWC for float64, so torch's result is NCHW
    return (*x.shape[:-3], w.shape[0], *size), channels_last


def _output(x: torch.Tensor, w: torch.Tensor, g: _Geometry, channels_last: bool | None) -> torch.Tensor:
    """The uninitialised result."""
    shape, channels_last = _format(x, w, g, channels_last)
    return _empty(shape, x, channels_last)


@replayable
def _forward(
    tensors: Tensors,
    then: Pointwise | None,
    g: _Geometry,
    channels_last: bool | None,
    eps: float | None,
    precision: str,
) -> tuple[torch.Tensor]:
    """Of x, w, b and what is added, and the four tensors of a normalisation if there is an eps."""
    x, w, b, residual, *statistics = tensors
    assert x is not None and w is not None
    y = _output(x, w, g, channels_last)
    norm = None if eps is None else epilogues.Norm(*cast(Any, (*statistics, eps)))
    kernels.conv2d(
        _images(x), w, b, _images(y), then=None if then is None else then.name, norm=norm,
        residual=None if residual is None else _images(residual), precision=precision, **g.arguments(),
    )  # fmt: skip
    return (y,)


def _gradients(
    dy: torch.Tensor, x_shape: torch.Size, w_shape: torch.Size, formats: tuple[bool, bool], needs: Sequence[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dx and dw, uninitialised, as far as needed. `formats`: whether x and w are in channels_last."""
    x_channels_last, w_channels_last = formats
    dx = _empty(x_shape, dy, x_channels_last or w_channels_last) if needs[0] else None
    return dx, _empty(w_shape, dy, w_channels_last) if needs[1] else None


@replayable
def _backward(
    tensors: Tensors,
    then: Pointwise | None,
    g: _Geometry,
    x_shape: torch.Size,
    w_shape: torch.Size,
    formats: tuple[bool, bool],
    needs: tuple[bool, ...],
    precision: str,
) -> tuple[torch.Tensor | None, ...]:
    """dx, dw and db, as far as needed, of dy and what was saved."""
    dy, x, w, y = tensors
    assert dy is not None
    dz, db = kernels.conv2d_output_grad(
        _images(dy), undo=None if y is None or then is None else (then.name, _images(y)),
        channel_sums=dy.dtype if needs[2] else None,
        channels_last=(needs[0] or needs[1]) and kernels.reads_channels_last(dy, w_shape, precision),
    )  # fmt: skip
    dx, dw = _gradients(dy, x_shape, w_shape, formats, needs)
    if dx is not None:
        assert w is not None
        kernels.conv2d_input_grad(dz, w, _images(dx), precision=precision, **g.arguments())
    if dw is not None:
        assert x is not None
        kernels.conv2d_weight_grad(dz, _images(x), dw, precision=precision, **g.arguments())
    return dx, dw, db


class _Plan(NamedTuple):
    """What follows, for forward and backward, from the kind of tensors and the options."""

    then: Pointwise | None
    g: _Geometry
    x_shape: torch.Size
    w_shape: torch.Size
    formats: tuple[bool, bool]
    edges: tuple[int, ...]
    """Of x, w and b; see `_dispatch.edges`."""


class _Conv2d(torch.autograd.Function):
    """x (N, C, H, W) or (C, H, W), w (O, C/groups, R, S), b (O,) -> y. One pass makes dz and db, one kernel each dx, dw."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        b: torch.Tensor | None,
        then: Pointwise | None,
        g: _Geometry,
        channels_last: bool | None,
        found: Found | None,
    ) -> torch.Tensor:
        tensors, needs = (x, w, b, None), ctx.needs_input_grad
        results = found and found[0].play(tensors, found[1])
        (y,) = results or _forward(tensors, then, g, channels_last, None, _precision(x.dtype))
        plan = found and found[0].memo
        if plan is None:
            formats = _is_channels_last(_images(x)), _is_channels_last(w)
            plan = _Plan(then, g, x.shape, w.shape, formats, _dispatch.edges(needs[:3], tensors[:3]))
            if found is not None:  # for whose kind of tensors it is always the same
                found[0].memo = plan
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.save_for_backward(x if needs[1] else None, w if needs[0] else None, None if then is None else y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        *options, edges = plan = ctx.plan
        needs, saved = _dispatch.asked_for(ctx, edges), ctx.saved_tensors
        grads = _dispatch.backward(_backward, (dy, *saved), (*options, needs, _precision(dy.dtype)), dy)
        if grads is None:
            grads = _backward_torch(dy, saved, plan, needs)
        return (*grads, None, None, None, None)


def _precision(dtype: torch.dtype) -> str:
    return _dtypes.conv_precision() if dtype is torch.float32 else "ieee"


def _backward_torch(dy: torch.Tensor, saved: Tensors, plan: _Plan, needs: Sequence[bool]) -> tuple[Any, ...]:
    """The same in differentiable functions of torch."""
    x, w, y = saved
    then, g, x_shape, w_shape, *_ = plan
    with torch.autocast(dy.device.type, enabled=False):
        dz = dy if y is None or then is None else then.torch_grad(dy, y)
        db = dz.sum([d for d in range(dz.dim()) if d != dz.dim() - 3]) if needs[2] else None
        # A tensor that isn't needed only lends its shape.
        x = dy.new_zeros(()).expand(x_shape) if x is None else x
        w = dy.new_zeros(()).expand(w_shape) if w is None else w
        padding = g.padding
        if g.padding != g.end:
            x = F.pad(x, (g.padding[1], g.end[1], g.padding[0], g.end[0]))
            padding = (0, 0)
        dx, dw, _ = torch.ops.aten.convolution_backward(
            _images(dz), _images(x), w, None, g.stride, padding, g.dilation, False, (0, 0), g.groups,
            (needs[0], needs[1], False),
        )  # fmt: skip
        if dx is not None:
            if g.padding != g.end:
                dx = dx.narrow(2, g.padding[0], x_shape[-2]).narrow(3, g.padding[1], x_shape[-1])
            dx = dx.reshape(x_shape)
        return dx, dw, db


def _why_not(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    then: Pointwise | None = None,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    add: Callable[[torch.Tensor], torch.Tensor] | None = None,
    channels_last: bool | None = None,
) -> str | None:
    reason = _dispatch.why_not(input, weight, *(() if bias is None else (bias,)), autocast=_probe)
    if reason is not None:
        return reason
    if input.dim() not in (3, 4) or weight.dim() != 4:
        return BadInput(f"an input with {input.dim()} dimensions and a weight with {weight.dim()}")
    o, c, *kernel = weight.shape
    geometry = _geometry(kernel, stride, padding, dilation, groups)
    if geometry is None:
        return BadInput(f"stride {stride!r}, padding {padding!r}, dilation {dilation!r}, groups {groups!r}")
    if input.shape[-3] != c * groups or o % groups:
        return BadInput(f"{input.shape[-3]} channels for a weight of {tuple(weight.shape)} in {groups} groups")
    if bias is not None and bias.shape != weight.shape[:1]:
        return BadInput(f"a bias of {tuple(bias.shape)} for a weight of {tuple(weight.shape)}")
    if 0 in weight.shape or 0 in input.shape[-3:]:
        return "a dimension of size 0 other than the batch"
    size = geometry.output_size(input.shape[-2:], kernel)
    if min(size) < 1:
        return BadInput("a kernel larger than the padded image")
    return None if norm is None else _why_not_norm(norm, input, weight, bias)


def _why_not_norm(norm: Norm, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """What speaks against normalising in the epilogue, of a convolution that nothing else speaks against."""
    tensors = [t for t in norm[:4] if t is not None]
    if _dispatch.wants_grad(input, weight, bias, *tensors):
        return "gradients through a normalisation in the epilogue"
    dtype = _dtypes.after_autocast(_probe, input)
    for tensor in tensors:
        if not is_plain(tensor):
            return f"{type(tensor).__name__} is a tensor subclass"
        if tensor.shape != weight.shape[:1] or not tensor.is_contiguous() or tensor.device != input.device:
            return BadInput(f"statistics of {tuple(tensor.shape)} on {tensor.device}")
        if tensor.dtype not in (dtype, torch.float32):
            return f"statistics of {tensor.dtype} for {dtype}"
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x[None, None], x[None, None])


def _twin(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    then: Pointwise | None = None,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    add: Callable[[torch.Tensor], torch.Tensor] | None = None,
    channels_last: bool | None = None,
) -> torch.Tensor:
    y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]
    if norm is not None:
        y = F.batch_norm(y, *norm[:4], training=False, eps=norm[4])
    y = _finish(y, then, residual, add)
    # The layer before may have left its result in channels_last, where torch's would have been NCHW.
    return y.contiguous() if channels_last is False else y


def _conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    then: Pointwise | None,
    norm: Norm | None,
    residual: torch.Tensor | None,
    add: Callable[[torch.Tensor], torch.Tensor] | None,
    channels_last: bool | None,
) -> torch.Tensor:
    geometry = _geometry(weight.shape[2:], stride, padding, dilation, groups)
    x, w, b = _dtypes.autocast(_probe, input, weight, bias)
    assert geometry is not None and x is not None and w is not None  # _why_not has seen to it
    if residual is not None and not _fits(residual, x, w, b, geometry, channels_last):
        y = _conv2d(x, w, b, stride, padding, dilation, groups, None, norm, None, None, channels_last)
        return _finish(y, then, residual, add)
    grad = _dispatch.wants_grad(x, w, b)
    if torch.compiler.is_compiling():
        from . import traced  # which imports this file

        return traced.conv2d(x, w, b, then, geometry, channels_last, norm, residual, grad)
    if grad:
        return _Conv2d.apply(x, w, b, then, geometry, channels_last, None)  # type: ignore[return-value]
    statistics, eps = _split(norm)
    return _forward((x, w, b, residual, *statistics), then, geometry, channels_last, eps, _precision(x.dtype))[0]


def _finish(
    y: torch.Tensor,
    then: Pointwise | None,
    residual: torch.Tensor | None,
    add: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """The end of an epilogue in torch's functions."""
    if residual is not None:
        y = y + residual if add is None else add(y)
    return y if then is None else then.torch(y)


def _fits(
    residual: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    g: _Geometry,
    channels_last: bool | None,
) -> bool:
    """Whether it can be added in the epilogue of this convolution. It must lie as the result does, else the sum's memory
    format might be another, and no gradient be asked for: the backward knows nothing of it."""
    if (
        _dispatch.why_not(residual) is not None
        or _dispatch.wants_grad(x, w, b, residual)
        or (residual.device, residual.dtype) != (x.device, x.dtype)
    ):
        return False
    shape, channels_last = _format(x, w, g, channels_last)
    strides = zip(shape, residual.stride(), _strides(shape, channels_last), strict=True)
    return residual.shape == shape and all(a == b for n, a, b in strides if n > 1)


def _split(norm: Norm | None) -> tuple[Tensors, float | None]:
    """Its tensors and eps; none without one."""
    return ((), None) if norm is None else (norm[:4], norm[4])


_apply = _dispatch.applying(_Conv2d)
_known_geometry = functools.lru_cache(_geometry)


def _is_exact(size: Any) -> bool:
    """Whether it is of ints, or a word: to a cache True and 1.0 are 1 as well, but not to torch."""
    kind = type(size)
    return kind is int or kind is str or (kind is tuple and len(size) == 2 and type(size[0]) is type(size[1]) is int)


def _again(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    then: Pointwise | None = None,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    add: Callable[[torch.Tensor], torch.Tensor] | None = None,
    channels_last: bool | None = None,
) -> torch.Tensor | None:
    if not is_plain(input) or not is_plain(weight) or weight.dim() != 4:
        return None
    if residual is not None and not is_plain(residual):
        return None
    if not (_is_exact(stride) and _is_exact(padding) and _is_exact(dilation) and type(groups) is int):
        return None
    g = _known_geometry(weight.shape[2:], stride, padding, dilation, groups)
    statistics, eps = _split(norm)
    tensors: Tensors = (input, weight, bias, residual, *statistics)
    if torch._C._is_any_autocast_enabled():
        dtype = _dtypes.after_autocast(_probe, input)
        plain = all(t is None or is_plain(t) for t in tensors)
        if not plain or not _forward.expects(input, (then, g, channels_last, eps, _precision(dtype))):
            return None
        tensors = (*_dtypes.autocast(_probe, *tensors[:3]), residual, *statistics)
    present = something(tensors)
    found = _forward.find(present, (then, g, channels_last, eps, _precision(present[0].dtype)))
    if found is None:
        return None
    if found[2] and torch.is_grad_enabled():
        alone = norm is None and residual is None
        return _apply(*tensors[:3], then, g, channels_last, found) if alone else None
    results = found[0].play(present, found[1])
    return None if results is None else results[0]


def _conv2d_again(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> torch.Tensor | None:
    return _again(input, weight, bias, stride, padding, dilation, groups)


@accelerated(twin=cast(Any, F.conv2d), why_not=cast(Any, _why_not), again=_conv2d_again, traceable=True)
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
    return _conv2d(input, weight, bias, stride, padding, dilation, groups, None, None, None, None, None)


@accelerated(twin=_twin, why_not=_why_not, again=_again, traceable=True)
def conv2d_then(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    then: Pointwise | None = None,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    add: Callable[[torch.Tensor], torch.Tensor] | None = None,
    channels_last: bool | None = None,
) -> torch.Tensor:
    """A convolution and what follows it, in one kernel. Everything else as `conv2d`.

    Args:
        then: the activation at the end.
        norm: a batch normalisation in eval that comes first; only where no gradients are recorded.
        residual: what is added before the activation; in the kernel if it has the result's shape, strides and dtype and no
            gradients are recorded.
        add: otherwise, what adds it to a result; y + residual by default.
        channels_last: the result's memory format, where it isn't torch's choice: see `conv2d_formats`.
    """
    return _conv2d(input, weight, bias, stride, padding, dilation, groups, then, norm, residual, add, channels_last)


def conv2d_formats(input: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[bool | None]:
    """For convolutions in a row: which results to leave in channels_last so that an NCHW image is converted only once.
    The last one's is torch's choice; what lies in between nobody sees.

    Shape: input (N, C, H, W) or (C, H, W). None stands for torch's choice.
    """
    plain = all(
        isinstance(t, torch.Tensor) and t.layout is torch.strided and not t.is_nested for t in (input, *weights)
    )
    plain = plain and type(input) is torch.Tensor and input.dim() in (3, 4) and input.numel() > 0
    # Of a single channel, or in float64, torch's choice isn't passed on from layer to layer.
    if not plain or input.dtype == torch.float64 or any(w.dim() != 4 or w.shape[0] == 1 for w in weights[:-1]):
        return [None] * len(weights)
    chosen = _is_channels_last(_images(input)) or any(_is_channels_last(w) for w in weights)
    return [*(True for _ in weights[:-1]), chosen]
