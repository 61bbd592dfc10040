"""Functions of one element: y = f(x), and dx = f_grad(dy, saved)."""

import torch
import triton
import triton.language as tl

from . import epilogues
from .runtime import launch, tiles
from .runtime.tiles import Tile

_POINTWISE = Tile(1, 1024, warps=4)
"""n elements."""


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
    dy_ptr, saved_ptr, dx_ptr, SIZE, A0: tl.float64, A1: tl.float64,
    F_GRAD: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: TILE consecutive elements of dx, each read once from dy and saved."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    i = pid * TILE + tl.arange(0, TILE)
    dy = tl.load(dy_ptr + i, mask=i < SIZE)
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


def _launch_flat(kernel: object, *tensors: torch.Tensor, options: epilogues.Options, **meta: object) -> None:
    """Launch over tensors of the same sizes and strides, all dense, of which the last one is written."""
    out = tensors[-1]
    size, tile = out.numel(), tiles.ask("pointwise", lambda: (_POINTWISE,)) or _POINTWISE
    accumulate = torch.promote_types(out.dtype, torch.float32)
    launch.launch(
        kernel, tiles.cdiv(size, tile.n), *tensors, size, *options,
        ACC=tiles.triton_dtype(accumulate), WIDE=launch.wide(elements=size), TILE=tile.n, num_warps=tile.warps, **meta,
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

    Shape: all the same, any strides; quickest if dx is dense and the others have its strides.
    Dtype: floating, the same.

    Args:
        of: whether `saved` is the activation's "input" or "output", where it isn't what the activation says.
    """
    function, options = epilogues.tile_function(activation, grad=True, of=of)
    dense = dx if is_dense(dx) else launch.empty_like(dx)
    dy, saved = _laid_out_as(dense, dy), _laid_out_as(dense, saved)
    _launch_flat(_pointwise_grad_kernel, dy, saved, dense, options=options, F_GRAD=function)
    if dense is not dx:
        dx.copy_(dense)
