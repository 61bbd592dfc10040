"""Functions of one element: y = f(x), and dx = f_grad(dy, saved)."""

import math

import torch
import triton
import triton.language as tl

from . import epilogues
from .runtime import launch, tiles
from .runtime.tiles import Tile

_POINTWISE = Tile(1, 1024, warps=4)
"""n elements."""


@triton.jit
def offsets(i, N1, N2, s0, s1, s2, FLAT: tl.constexpr):
    """Where element i of a tensor of sizes (N0, N1, N2) lies; FLAT: the elements lie one after the other."""
    if FLAT:
        return i
    else:
        return i // N2 // N1 * s0 + i // N2 % N1 * s1 + i % N2 * s2


@triton.jit
def _pointwise_kernel(
    x_ptr, y_ptr, SIZE, A0: tl.float64, A1: tl.float64,
    F: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: TILE consecutive elements, read once from x and written once to y (which may be x)."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    i = pid * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + i, mask=i < SIZE)
    y = F(x.to(ACC), epilogues.options(A0, A1, ACC))
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < SIZE)


@triton.jit
def _pointwise_grad_kernel(
    dy_ptr, saved_ptr, dx_ptr, SIZE, N1, N2, dy_0, dy_1, dy_2, A0: tl.float64, A1: tl.float64,
    F_GRAD: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: TILE consecutive elements of dx, each read once from dy and saved. FLAT: dy lies as they do."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    i = pid * TILE + tl.arange(0, TILE)
    dy = tl.load(dy_ptr + offsets(i, N1, N2, dy_0, dy_1, dy_2, FLAT), mask=i < SIZE)
    saved = tl.load(saved_ptr + i, mask=i < SIZE)
    dx = F_GRAD(dy.to(ACC), saved.to(ACC), epilogues.options(A0, A1, ACC))
    tl.store(dx_ptr + i, dx.to(dx_ptr.dtype.element_ty), mask=i < SIZE)


def is_dense(x: torch.Tensor) -> bool:
    """Whether x's elements fill a range of memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 0:
            return True
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def lie_alike(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors of the same shape have the same strides, apart from dimensions of size 1."""
    each = zip(x.shape, x.stride(), y.stride(), strict=True)
    return x.stride() == y.stride() or all(n == 1 or a == b for n, a, b in each)


def _laid_out_as(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x itself if it lies as y does, otherwise a copy that does."""
    return x if lie_alike(x, y) else launch.empty_like(y, x.dtype).copy_(x)


def _expanded(dy: torch.Tensor, dense: torch.Tensor) -> tuple[int, ...] | None:
    """Two sizes and three strides by which `offsets` finds the elements of an expanded tensor, as the gradient of a mean is, in
    the order of dense's memory. None if they don't say it, or for a tensor that isn't expanded."""
    sizes, (of_dense, of_dy) = launch.collapse(dense.shape, [dense.stride(), dy.stride()])
    in_order = of_dense == [math.prod(sizes[d + 1 :]) for d in range(len(sizes))]
    if 0 not in of_dy or not in_order or len(sizes) > 3:
        return None
    missing = 3 - len(sizes)  # sizes of 1 in the middle, by which nothing is divided
    return *[1] * missing, *sizes[1:], of_dy[0], *[0] * missing, *of_dy[1:]


def _launch_flat(
    kernel: object, *tensors: torch.Tensor, options: tuple[float, ...], **meta: object
) -> None:  # fmt: skip
    """Launch over tensors of the same sizes and strides, all dense, of which the last one is written."""
    out = tensors[-1]
    size, tile = out.numel(), tiles.ask("pointwise", lambda: (_POINTWISE,)) or _POINTWISE
    accumulate = torch.promote_types(out.dtype, torch.float32)
    launch.launch(
        kernel, tiles.cdiv(size, tile.n), *tensors, size, *options,
        ACC=tiles.triton_dtype(accumulate), WIDE=launch.wide(*tensors, elements=size), TILE=tile.n, num_warps=tile.warps, **meta,
    )  # fmt: skip


def pointwise(x: torch.Tensor, out: torch.Tensor, activation: epilogues.Activation) -> None:
    """out = f(x).

    Shape: both the same, any strides; `out` may be x itself, but must not overlap it otherwise. The quickest `out` is dense
        and has x's strides, as `launch.empty_like` gives a dense x.
    Dtype: floating, the same.
    """
    function, options = epilogues.tile_function(activation)
    dense = out if is_dense(out) else launch.empty_like(out)
    source = x if lie_alike(x, dense) else dense.copy_(x)
    _launch_flat(_pointwise_kernel, source, dense, options=options, F=function)
    if dense is not out:
        out.data.copy_(dense)  # .data: no launcher touches the version counter, which is the caller's to increment


def pointwise_grad(
    dy: torch.Tensor, saved: torch.Tensor, dx: torch.Tensor, activation: epilogues.Activation, of: str | None = None
) -> None:
    """dx = f_grad(dy, saved).

    Shape: all the same, any strides; quickest if dx is dense and the others have its strides, or dy is expanded.
    Dtype: floating, the same.

    Args:
        of: whether `saved` is the activation's "input" or "output", where it isn't what the activation says.
    """
    function, options = epilogues.tile_function(activation, grad=True, of=of)
    dense = dx if is_dense(dx) else launch.empty_like(dx)
    places = None if lie_alike(dy, dense) else _expanded(dy, dense)
    if places is None:
        dy = _laid_out_as(dense, dy)
    _launch_flat(
        _pointwise_grad_kernel, dy, _laid_out_as(dense, saved), dense,
        options=(*(places or (1, 1, 0, 0, 0)), *options), F_GRAD=function, FLAT=places is None,
    )  # fmt: skip
    if dense is not dx:
        dx.copy_(dense)
