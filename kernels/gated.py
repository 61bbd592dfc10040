"""Activations with a second operand: PReLU, whose slope is a parameter, and GLU, whose second half is a gate."""

import torch
import triton
import triton.language as tl

from . import activations
from .pointwise import is_dense, lie_alike
from .reduce import in_lanes, sum_partials
from .runtime import launch, tiles
from .runtime.tiles import Tile

_FLAT = Tile(1, 1024, warps=4)
"""n elements."""
_CHANNELS = (Tile(32, 128, warps=4), Tile(128, 32, warps=4))
"""m pixels, n channels. The first tile is for contiguous channels, the second for contiguous pixels."""
_LANES = 256
"""How many sums the programs of a sum over everything are first reduced to, where they are more."""


@triton.jit
def _prelu_kernel(
    x_ptr, w_ptr, y_ptr, SIZE, CHANNELS, INNER,
    ONE: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: TILE elements that follow each other in memory. With ONE, they share a weight."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    i = pid * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + i, mask=i < SIZE, other=0.0).to(ACC)
    if ONE:
        w = tl.load(w_ptr).to(ACC)
    else:
        w = tl.load(w_ptr + i // INNER % CHANNELS, mask=i < SIZE, other=0.0).to(ACC)
    y = tl.where(x > 0, x, x * w)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < SIZE)


@triton.jit
def _prelu_grad_kernel(
    dy_ptr, x_ptr, w_ptr, dx_ptr, sums_ptr, SIZE,
    ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: TILE elements that share a weight, and what they add to its gradient. dx or sums may be None."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    i = pid * TILE + tl.arange(0, TILE)
    dy = tl.load(dy_ptr + i, mask=i < SIZE, other=0.0).to(ACC)
    x = tl.load(x_ptr + i, mask=i < SIZE, other=0.0).to(ACC)
    if dx_ptr is not None:
        dx = tl.where(x > 0, dy, dy * tl.load(w_ptr).to(ACC))
        tl.store(dx_ptr + i, dx.to(dx_ptr.dtype.element_ty), mask=i < SIZE)
    if sums_ptr is not None:
        tl.store(sums_ptr + pid, tl.sum(tl.where(x > 0, 0.0, dy * x), axis=0))


@triton.jit
def _prelu_channels_grad_kernel(
    dy_ptr, x_ptr, w_ptr, dx_ptr, sums_ptr,
    ROWS, M, N, dy_b, dy_m, dy_n, x_b, x_m, x_n, dx_b, dx_m, dx_n,
    ACC: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M of the B*M pixels by TILE_N channels of dx, and what they add to the weight's gradient. dx or sums may
    be None."""
    tiles_n = tl.cdiv(N, TILE_N)
    pid_n = tl.program_id(0) % tiles_n
    pid_m = tl.program_id(0) // tiles_n
    if WIDE:
        pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)
    row = pid_m * TILE_M + tl.arange(0, TILE_M)
    n = pid_n * TILE_N + tl.arange(0, TILE_N)
    b = row // M
    m = row % M
    n_inside = n < N
    inside = (row < ROWS)[:, None] & n_inside[None, :]
    dy = tl.load(dy_ptr + ((b * dy_b + m * dy_m)[:, None] + (n * dy_n)[None, :]), mask=inside, other=0.0).to(ACC)
    x = tl.load(x_ptr + ((b * x_b + m * x_m)[:, None] + (n * x_n)[None, :]), mask=inside, other=0.0).to(ACC)
    if dx_ptr is not None:
        w = tl.load(w_ptr + n, mask=n_inside, other=0.0).to(ACC)
        dx = tl.where(x > 0, dy, dy * w[None, :])
        offsets = (b * dx_b + m * dx_m)[:, None] + (n * dx_n)[None, :]
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if sums_ptr is not None:
        sums = tl.sum(tl.where(x > 0, 0.0, dy * x), axis=0)
        tl.store(sums_ptr + (tl.cast(pid_m, tl.int64) * N + n), sums, mask=n_inside)


def _like(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x itself if it lies as y does, otherwise a copy that does."""
    return x if lie_alike(x, y) else launch.empty_like(y, x.dtype).copy_(x)


def prelu(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out = x where it is positive, elsewhere weight * x.

    Shape: x and out the same, any strides; weight (C,) for dimension 1, or (1,) or () for all elements.
    Dtype: floating, the same for all.
    """
    dense = out if is_dense(out) else launch.empty_like(out)
    source, size = _like(dense, x), out.numel()
    one = weight.numel() == 1
    tile = tiles.ask("gated", lambda: (_FLAT,)) or _FLAT
    accumulate = torch.promote_types(x.dtype, torch.float32)
    launch.launch(
        _prelu_kernel, tiles.cdiv(size, tile.n),
        source, weight.contiguous(), dense, size, weight.numel(), 1 if one else dense.stride(1),
        ONE=one, ACC=tiles.triton_dtype(accumulate), WIDE=launch.wide(elements=size), TILE=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    if dense is not out:
        out.copy_(dense)


def prelu_grad(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, dx: torch.Tensor | None, dw: torch.Tensor | None
) -> None:
    """dx = dy where x is positive, elsewhere weight * dy; dw = the sum of x * dy where x isn't positive.

    Shape: dy, x, dx the same, any strides; weight and dw as in `prelu`. dx or dw may be None, and weight if dx is.
    Dtype: floating, the same for all.
    """
    parameter = weight if dw is None else dw
    assert parameter is not None
    weight = None if weight is None else weight.contiguous()
    dense = dx if dx is None or is_dense(dx) else launch.empty_like(dx)
    if parameter.numel() == 1:
        _prelu_grad_of_one(dy, x, weight, dense, dw)
    else:
        _prelu_grad_of_channels(dy, x, weight, dense, dw)
    if dx is not None and dense is not None and dense is not dx:
        dx.copy_(dense)


def _prelu_grad_of_one(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, dx: torch.Tensor | None, dw: torch.Tensor | None
) -> None:
    like = dx if dx is not None else x if is_dense(x) else launch.empty_like(x)
    size, accumulate = x.numel(), torch.promote_types(x.dtype, torch.float32)
    tile = tiles.ask("gated", lambda: (_FLAT,)) or _FLAT
    programs, partials = tiles.cdiv(size, tile.n), None
    lanes = _LANES if programs > _LANES else 1
    if dw is not None:  # programs beyond the last element add zeros
        partials = launch.empty((tiles.cdiv(programs, lanes), lanes), dtype=accumulate, device=x.device)
        programs = partials.numel()
    launch.launch(
        _prelu_grad_kernel, programs, _like(like, dy), _like(like, x), weight, dx, partials, size,
        ACC=tiles.triton_dtype(accumulate), WIDE=launch.wide(elements=programs * tile.n), TILE=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    if partials is not None and dw is not None:
        if lanes > 1:
            sums = launch.empty((lanes,), dtype=accumulate, device=x.device)
            sum_partials(partials, sums)
            partials = sums.view(lanes, 1)
        sum_partials(partials, dw.view(1))


def _prelu_grad_of_channels(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, dx: torch.Tensor | None, dw: torch.Tensor | None
) -> None:
    def rows(t: torch.Tensor) -> torch.Tensor:
        """(N, C, ...) as (N, pixels, C): a view where there can be one."""
        return t.reshape(*t.shape[:2], t.shape[2:].numel()).permute(0, 2, 1)

    written = None if dx is None else rows(dx)
    copied = dx is not None and written is not None and written.data_ptr() != dx.data_ptr() and dx.numel() > 0
    dy, x = rows(dy), rows(x)
    batch, m, n = x.shape
    accumulate = torch.promote_types(x.dtype, torch.float32)
    tall = x.stride(1) == 1 and x.stride(2) != 1
    tile = tiles.ask("gated_channels", lambda: (_CHANNELS[tall],)) or _CHANNELS[tall]
    tiles_m = tiles.cdiv(batch * m, tile.m)
    tiles_m = tiles_m if dw is None else in_lanes(tiles_m)
    partials = None if dw is None else launch.empty((tiles_m, n), dtype=accumulate, device=x.device)
    strides = (0, 0, 0) if written is None else written.stride()
    launch.launch(
        _prelu_channels_grad_kernel, tiles_m * tiles.cdiv(n, tile.n),
        dy, x, weight, written, partials, batch * m, m, n, *dy.stride(), *x.stride(), *strides,
        ACC=tiles.triton_dtype(accumulate), WIDE=tiles_m * tile.m * n >= 2**31 or launch.wide(dy, x, written),
        TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    if copied and dx is not None and written is not None:
        dx.copy_(written.permute(0, 2, 1).reshape(dx.shape))
    if partials is not None and dw is not None:
        sum_partials(partials, dw)


# --- GLU ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _glu_kernel(
    x_ptr, y_ptr, SIZE, HALF, ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """One program: TILE elements of y that follow each other in memory. In x, HALF elements are followed by HALF gates."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    i = pid * TILE + tl.arange(0, TILE)
    offsets = i + i // HALF * HALF
    x = tl.load(x_ptr + offsets, mask=i < SIZE, other=0.0).to(ACC)
    gate = tl.load(x_ptr + (offsets + HALF), mask=i < SIZE, other=0.0).to(ACC)
    y = x * activations.sigmoid(gate, None)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < SIZE)


@triton.jit
def _glu_grad_kernel(
    dy_ptr, x_ptr, dx_ptr, SIZE, HALF, ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """One program: TILE elements of dy, and the gradients of as many elements of x and of their gates."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    i = pid * TILE + tl.arange(0, TILE)
    offsets = i + i // HALF * HALF
    dy = tl.load(dy_ptr + i, mask=i < SIZE, other=0.0).to(ACC)
    x = tl.load(x_ptr + offsets, mask=i < SIZE, other=0.0).to(ACC)
    gate = activations.sigmoid(tl.load(x_ptr + (offsets + HALF), mask=i < SIZE, other=0.0).to(ACC), None)
    tl.store(dx_ptr + offsets, (dy * gate).to(dx_ptr.dtype.element_ty), mask=i < SIZE)
    d_gate = dy * x * (gate * (1 - gate))
    tl.store(dx_ptr + (offsets + HALF), d_gate.to(dx_ptr.dtype.element_ty), mask=i < SIZE)


def _halved(x: torch.Tensor, y: torch.Tensor, dim: int) -> bool:
    """Whether x fills a range of memory, and y lies as x does, but for the half of dimension `dim`."""
    step = x.stride(dim)
    for d, (size, of_x, of_y) in enumerate(zip(y.shape, x.stride(), y.stride(), strict=True)):
        if size > 1 and of_y != (of_x // 2 if of_x > step and d != dim else of_x):
            return False
    return is_dense(x)


def _launch_glu(kernel: object, size: int, half: int, *tensors: torch.Tensor) -> None:
    tile = tiles.ask("gated", lambda: (_FLAT,)) or _FLAT
    accumulate = torch.promote_types(tensors[-1].dtype, torch.float32)
    launch.launch(
        kernel, tiles.cdiv(size, tile.n), *tensors, size, half,
        ACC=tiles.triton_dtype(accumulate), WIDE=launch.wide(elements=2 * size), TILE=tile.n, num_warps=tile.warps,
    )  # fmt: skip


def glu(x: torch.Tensor, out: torch.Tensor, dim: int) -> None:
    """out = a / (1 + exp(-b)), a and b being the halves of x along `dim` (0 <= dim < x.dim()).

    Shape: x any, of even size along `dim`; out half of it; any strides. Quickest if both lie alike.
    Dtype: floating, the same.
    """
    if _halved(x, out, dim):
        _launch_glu(_glu_kernel, out.numel(), x.stride(dim) * out.shape[dim], x, out)
        return
    x = x.contiguous()
    dense = out if out.is_contiguous() else launch.empty(out.shape, dtype=out.dtype, device=out.device)
    _launch_glu(_glu_kernel, out.numel(), x.stride(dim) * out.shape[dim], x, dense)
    if dense is not out:
        out.copy_(dense)


def glu_grad(dy: torch.Tensor, x: torch.Tensor, dx: torch.Tensor, dim: int) -> None:
    """The gradient of `glu`.

    Shape: dy half of x, any strides; dx as x, contiguous.
    Dtype: floating, the same for all.
    """
    dy, x = dy.contiguous(), x.contiguous()
    _launch_glu(_glu_grad_kernel, dy.numel(), dx.stride(dim) * dy.shape[dim], dy, x, dx)
