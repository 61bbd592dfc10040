"""One element in, one element out: y = f(x), dx = f_grad(dy, saved)."""

import torch
import triton
import triton.language as tl

from . import _launch, _tiles, epilogues


@triton.jit
def _pointwise_kernel(x_ptr, y_ptr, SIZE, F: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr):
    """One program: TILE consecutive elements, read once from x and written once to y (which may be x)."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    i = pid * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + i, mask=i < SIZE)
    tl.store(y_ptr + i, F(x.to(ACC)).to(y_ptr.dtype.element_ty), mask=i < SIZE)


@triton.jit
def _pointwise_grad_kernel(
    dy_ptr, saved_ptr, dx_ptr, SIZE, F_GRAD: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr
):
    """One program: TILE consecutive elements of dx, each read once from dy and saved."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    i = pid * TILE + tl.arange(0, TILE)
    dy = tl.load(dy_ptr + i, mask=i < SIZE)
    saved = tl.load(saved_ptr + i, mask=i < SIZE)
    tl.store(dx_ptr + i, F_GRAD(dy.to(ACC), saved.to(ACC)).to(dx_ptr.dtype.element_ty), mask=i < SIZE)


def is_dense(x: torch.Tensor) -> bool:
    """Whether x's elements fill one stretch of memory without gap or overlap, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 0:
            return True
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x itself if it is dense, otherwise a copy with the strides torch gives to a pointwise result."""
    return x if is_dense(x) else _launch.empty_like(x).copy_(x)


def _launch_flat(kernel: object, tensors: tuple[torch.Tensor, ...], **meta: object) -> None:
    out = tensors[-1]
    size, tile = out.numel(), _tiles.pointwise()
    accumulate = torch.promote_types(out.dtype, torch.float32)
    _launch.launch(
        kernel, _tiles.cdiv(size, tile.n), *tensors, size,
        ACC=_tiles.triton_dtype(accumulate), WIDE=size >= 2**31, TILE=tile.n, num_warps=tile.warps, **meta,
    )  # fmt: skip


def pointwise(x: torch.Tensor, name: str, *, inplace: bool = False) -> torch.Tensor:
    """y = name(x).

    Shape: any, any strides; y has the strides torch gives to a pointwise result.
    Dtype: floating, kept.

    Args:
        inplace: write into x and return it. The caller tells autograd: kernels don't bump the version counter.
    """
    source = _dense(x)
    y = source if inplace or source is not x else _launch.empty_like(x)
    _launch_flat(_pointwise_kernel, (source, y), F=epilogues.forward(name))
    if not inplace:
        return y
    return x if source is x else x.copy_(y)


def pointwise_grad(dy: torch.Tensor, saved: torch.Tensor, name: str) -> torch.Tensor:
    """dx = name_grad(dy, saved), laid out as `saved`.

    Shape: both the same, any strides.
    """
    saved = _dense(saved)
    dx = _launch.empty_like(saved)
    if dy.stride() != saved.stride():
        dy = torch.empty_like(saved).copy_(dy)
    _launch_flat(_pointwise_grad_kernel, (dy, saved, dx), F_GRAD=epilogues.backward(name))
    return dx
