"""Batch, group and instance normalisation where all that is normalised together fits into the registers of a program: one launch,
which reads and writes memory once, with the variance from differences to the mean.

What is normalised together is `depth` rows of pixels: the channels of a group, or, of a batch, the images. A tile is TILE_Q
statistics by TILE_D of these by TILE_P pixels, the last two being powers of two that are large enough.
"""

import torch
import triton
import triton.language as tl

from .. import epilogues
from ..reduce import sum_partials
from ..runtime import launch, tiles
from ..runtime.tiles import Tile, cdiv
from .planes import Planes, is_wide, multiples, per_channel, strides, vector
from .statistics import _move, track_averages

# n elements a program. A thread holds 16 of each tensor, 32 in the forward's largest tiles, and half as many in float64.
_WHOLE = {
    torch.float32: (Tile(1, 2048), Tile(1, 4096), Tile(1, 8192, warps=8), Tile(1, 16384, warps=16)),
    torch.float64: (Tile(1, 1024), Tile(1, 2048), Tile(1, 4096, warps=8), Tile(1, 8192, warps=16)),
}
_WHOLE_GRAD = {
    torch.float32: (Tile(1, 2048), Tile(1, 4096, warps=8), Tile(1, 8192, warps=16)),
    torch.float64: (Tile(1, 1024), Tile(1, 2048, warps=8), Tile(1, 4096, warps=16)),
}


@triton.jit
def _places(
    pid, Q, N, C, P, G, D,
    ACROSS: tl.constexpr, WIDE: tl.constexpr, TILE_Q: tl.constexpr, TILE_D: tl.constexpr, TILE_P: tl.constexpr,
):  # fmt: skip
    """What a tile covers: the indices of its statistics, image and channel of each row of pixels, and the masks of statistics,
    rows and elements."""
    q, d = pid * TILE_Q + tl.arange(0, TILE_Q), tl.arange(0, TILE_D)
    if WIDE:
        q, d = q.to(tl.int64), d.to(tl.int64)
    if ACROSS:
        n, c = 0 * q[:, None] + d[None, :], q[:, None] + 0 * d[None, :]
        rows_inside = (q < Q)[:, None] & (d < N)[None, :]
    else:
        n, c = (q // G)[:, None] + 0 * d[None, :], (q % G * D)[:, None] + d[None, :]
        rows_inside = (q < Q)[:, None] & (d < D)[None, :]
    inside = rows_inside[:, :, None] & (tl.arange(0, TILE_P) < P)[None, None, :]
    return q, n, c, q < Q, rows_inside, inside


@triton.jit
def _elements(n, c, t_n, t_row, LAST: tl.constexpr, WIDE: tl.constexpr, TILE_P: tl.constexpr):
    """Offsets of a tile's elements in a tensor with these strides."""
    p = tl.arange(0, TILE_P)
    if WIDE:
        p = p.to(tl.int64)
    if LAST:
        found = (n * t_n + c)[:, :, None] + (p * t_row)[None, None, :]
    else:
        found = (n * t_n + c * t_row)[:, :, None] + p[None, None, :]
    return found


@triton.jit
def _whole_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, mean_ptr, rstd_ptr, var_ptr, running_mean_ptr, running_var_ptr, factor_ptr,
    Q, N, C, P, G, D, x_n, x_row, out_n, out_row, mean_step, var_step, MOMENTUM: tl.float64, EPS: tl.float64,
    ACROSS: tl.constexpr, LAST: tl.constexpr, THEN: tl.constexpr, A: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_D: tl.constexpr, TILE_P: tl.constexpr,
):  # fmt: skip
    """One program: all elements of which TILE_Q statistics are computed."""
    C, P = multiples(C, P, LAST, VEC)
    x_n, x_row, out_n, out_row = x_n // VEC * VEC, x_row // VEC * VEC, out_n // VEC * VEC, out_row // VEC * VEC
    eps = (tl.full((), 0.0, tl.float64) + EPS).to(ACC)  # in the interpreter EPS is a Python number
    q, n, c, q_inside, rows_inside, inside = _places(
        tl.program_id(0), Q, N, C, P, G, D, ACROSS, WIDE, TILE_Q, TILE_D, TILE_P
    )  # fmt: skip
    x = tl.load(x_ptr + _elements(n, c, x_n, x_row, LAST, WIDE, TILE_P), mask=inside, other=0.0).to(ACC)
    total = tl.cast(P, ACC) * tl.cast(N if ACROSS else D, ACC)
    mean = tl.sum(tl.sum(x, axis=2), axis=1)
    # In float32 `/` may be off by two units in the last place, which a mean far from 0 would show.
    if ACC == tl.float64:  # noqa: SIM300
        mean /= total
    else:
        mean = tl.div_rn(mean, total)
    x -= mean[:, None, None]
    # tl.where, because a product must not be summed directly: `_whole_grad_kernel` says why.
    square = tl.sum(tl.sum(tl.where(inside, x * x, 0.0), axis=2), axis=1)
    rstd = tl.rsqrt(square / total + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + q, mean, mask=q_inside)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + q, rstd, mask=q_inside)
    if var_ptr is not None:
        tl.store(var_ptr + q, square / (total - 1), mask=q_inside)
    if running_mean_ptr is not None:
        _move(running_mean_ptr + q * mean_step, mean, factor_ptr, MOMENTUM, q_inside)
        _move(running_var_ptr + q * var_step, square / (total - 1), factor_ptr, MOMENTUM, q_inside)
    y = x * rstd[:, None, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + c, mask=rows_inside, other=0.0).to(ACC)[:, :, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=rows_inside, other=0.0).to(ACC)[:, :, None]
    y = y.to(out_ptr.dtype.element_ty)
    if THEN is not None:
        y = THEN(y.to(ACC), A).to(out_ptr.dtype.element_ty)  # of the rounded sum, as of a layer of its own
    tl.store(out_ptr + _elements(n, c, out_n, out_row, LAST, WIDE, TILE_P), y, mask=inside)


@triton.jit
def _whole_grad_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, dx_ptr, sums_ptr, products_ptr,
    Q, N, C, P, G, D, dy_n, dy_row, x_n, x_row, dx_n, dx_row,
    ACROSS: tl.constexpr, LAST: tl.constexpr, THEN: tl.constexpr, UNDO: tl.constexpr, A: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_D: tl.constexpr, TILE_P: tl.constexpr,
):  # fmt: skip
    """One program: all elements of which TILE_Q statistics are computed. Writes dx, and for each channel of each image the sums
    of dy and of dy times the normalised x."""
    C, P = multiples(C, P, LAST, VEC)
    dy_n, dy_row, x_n, x_row = dy_n // VEC * VEC, dy_row // VEC * VEC, x_n // VEC * VEC, x_row // VEC * VEC
    dx_n, dx_row = dx_n // VEC * VEC, dx_row // VEC * VEC
    q, n, c, q_inside, rows_inside, inside = _places(
        tl.program_id(0), Q, N, C, P, G, D, ACROSS, WIDE, TILE_Q, TILE_D, TILE_P
    )  # fmt: skip
    dy = tl.load(dy_ptr + _elements(n, c, dy_n, dy_row, LAST, WIDE, TILE_P), mask=inside, other=0.0).to(ACC)
    x = tl.load(x_ptr + _elements(n, c, x_n, x_row, LAST, WIDE, TILE_P), mask=inside, other=0.0).to(ACC)
    mean = tl.load(mean_ptr + q, mask=q_inside, other=0.0)[:, None, None]
    rstd = tl.load(rstd_ptr + q, mask=q_inside, other=0.0)[:, None, None]
    h = (x - mean) * rstd
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=rows_inside, other=0.0).to(ACC)
    else:
        weight = tl.full((TILE_Q, TILE_D), 1.0, ACC)
    if UNDO is not None:
        saved = h * weight[:, :, None]
        if bias_ptr is not None:
            saved += tl.load(bias_ptr + c, mask=rows_inside, other=0.0).to(ACC)[:, :, None]
        saved = saved.to(dy_ptr.dtype.element_ty).to(ACC)
        if THEN is not None:  # the derivative needs the output
            saved = THEN(saved, A)
        dy = tl.where(inside, UNDO(dy, saved, A), 0.0)
    # What is summed between the threads of a warp must not be a product, which the compiler would join with the first addition:
    # each thread would round another product than its neighbour, and have another sum. `tl.where` stands between them.
    sums, products = tl.sum(dy, axis=2), tl.sum(tl.where(inside, dy * h, 0.0), axis=2)
    out = n.to(tl.int64) * C + c
    if sums_ptr is not None:
        tl.store(sums_ptr + out, sums, mask=rows_inside)
    if products_ptr is not None:
        tl.store(products_ptr + out, products, mask=rows_inside)
    if dx_ptr is not None:
        total = tl.cast(P, ACC) * tl.cast(N if ACROSS else D, ACC)
        mean_g = (tl.sum(tl.where(rows_inside, sums * weight, 0.0), axis=1) / total)[:, None, None]
        mean_gh = (tl.sum(tl.where(rows_inside, products * weight, 0.0), axis=1) / total)[:, None, None]
        dx = (dy * weight[:, :, None] - mean_g - h * mean_gh) * rstd
        dx = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + _elements(n, c, dx_n, dx_row, LAST, WIDE, TILE_P), dx, mask=inside)


def _power(size: int) -> int:
    """The least power of two that isn't smaller."""
    return 1 << (size - 1).bit_length()


def _tile(planes: Planes, accumulate: torch.dtype, gradient: bool) -> tuple[Tile, int, int, int] | None:
    """The tile's elements and warps, and its sizes, if all that is normalised together fits into one."""
    depth, pixels = _power(planes.n if planes.across else planes.depth), _power(planes.p)
    table = (_WHOLE_GRAD if gradient else _WHOLE)[accumulate]
    # Where channels lie next to each other, a tile of fewer than so many would read a part of each sector of memory.
    channels = min(16, planes.c) if planes.across and planes.last else 1
    fitting = [tile for tile in table if depth * pixels * channels <= tile.n][:1]
    tile = tiles.ask("batch_norm_whole", lambda: fitting) or (fitting[0] if fitting else None)
    if tile is None or depth * pixels > tile.n:
        return None
    return tile, min(tile.n // (depth * pixels), _power(planes.statistics)), depth, pixels


def fits(planes: Planes, accumulate: torch.dtype, gradient: bool = False) -> bool:
    """Whether `whole` (or `whole_grad`) can be used: all that is normalised together fits into one program."""
    return _tile(planes, accumulate, gradient) is not None


def _common(planes: Planes, accumulate: torch.dtype, sizes: tuple[Tile, int, int, int]) -> dict[str, object]:
    tile, q, d, p = sizes
    return dict(
        ACROSS=planes.across, LAST=planes.last, ACC=tiles.triton_dtype(accumulate),
        TILE_Q=q, TILE_D=d, TILE_P=p, num_warps=tile.warps,
    )  # fmt: skip


def whole(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    planes: Planes,
    eps: float,
    running: tuple[torch.Tensor | None, torch.Tensor | None],
    momentum: float,
    factor: torch.Tensor | None,
    then: epilogues.Activation | None,
) -> None:
    """`forward.normalize`, where it `fits`. Mean and rstd aren't written if they are None."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    sizes = _tile(planes, accumulate, gradient=False)
    assert sizes is not None
    rows, out_rows = planes.rows(x), planes.rows(out)
    function, options = epilogues.tile_function(then)
    track = running[0] is not None and not planes.across
    var = launch.empty((planes.statistics,), dtype=accumulate, device=x.device) if track else None
    if track and mean is None:
        mean = launch.empty((planes.statistics,), dtype=accumulate, device=x.device)
    steps = [0 if r is None else r.stride(0) for r in running]
    launch.launch(
        _whole_kernel, cdiv(planes.statistics, sizes[1]),
        rows, per_channel(weight), per_channel(bias), out_rows, mean, rstd, var,
        *((None, None, None) if track else (*running, factor)),
        planes.statistics, planes.n, planes.c, planes.p, planes.groups, planes.depth, *strides(rows), *strides(out_rows),
        *steps, momentum, eps,
        THEN=function, A=options, WIDE=is_wide(planes, rows, out_rows), VEC=vector(rows, out_rows),
        **_common(planes, accumulate, sizes),
    )  # fmt: skip
    if mean is not None and var is not None:
        track_averages(mean, var, running, momentum, factor, planes)


def whole_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    dx: torch.Tensor | None,
    dw: torch.Tensor | None,
    db: torch.Tensor | None,
    planes: Planes,
    then: epilogues.Activation | None,
) -> None:
    """`gradients`, where it `fits`."""
    accumulate = mean.dtype
    sizes = _tile(planes, accumulate, gradient=True)
    assert sizes is not None
    dy_rows, x_rows, dx_rows = planes.rows(dy), planes.rows(x), planes.rows(dx)
    undo, options = epilogues.tile_function(then, grad=True)
    forward = epilogues.tile_function(then)[0] if then is not None and then.saves == "output" else None
    partials = [
        None if gradient is None else launch.empty((planes.n, planes.c), dtype=accumulate, device=dy.device)
        for gradient in (db, dw)
    ]
    launch.launch(
        _whole_grad_kernel, cdiv(planes.statistics, sizes[1]),
        dy_rows, x_rows, mean, rstd, per_channel(weight), per_channel(bias), dx_rows, *partials,
        planes.statistics, planes.n, planes.c, planes.p, planes.groups, planes.depth,
        *strides(dy_rows), *strides(x_rows), *strides(dx_rows),
        THEN=forward, UNDO=undo, A=options, WIDE=is_wide(planes, dy_rows, x_rows, dx_rows),
        VEC=vector(dy_rows, x_rows, dx_rows), **_common(planes, accumulate, sizes),
    )  # fmt: skip
    for partial, gradient in zip(partials, (db, dw), strict=True):
        if partial is not None and gradient is not None:
            sum_partials(partial, gradient)
