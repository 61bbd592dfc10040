"""Batch, group and instance normalisation: y = f((x - mean) / sqrt(var + eps) * weight + bias), with mean and variance of a
channel over a batch of images, or of some channels of one image.

Three kernels, since a channel of a batch lies all over memory:

- Each program takes some channels of some images, a slice, and writes mean and sum of squared differences to it of each channel.
  It sums x - shift and its square, where the shift is the element of the first tile that is nearest to the tile's mean: so the
  squares are of the variance's size, and little is lost when the square of the mean is taken off. The tile's mean itself may be
  far from all elements but one. The mean is written as the shift and what is beyond it: a mean of 10,000 would otherwise be
  rounded to 0.001 before two of them are subtracted.
- These are merged into mean and rstd, in a fixed order, and the running statistics are moved. A first sum gives the mean up to
  rounding, a second one what the slices' means are beyond that. No element of the input has a say in what they are relative to,
  since an outlier would cost all means their last digits.
- x is read again, and y written.

With running statistics only the last one runs.
"""

import torch
import triton
import triton.language as tl

from .. import epilogues
from ..runtime import launch, tiles
from ..runtime.tiles import Tile, cdiv
from .planes import Planes, is_wide, multiples, offsets, per_channel, strides, vector

_MERGE = (Tile(32, 32), Tile(4, 256))
"""m statistics by n slices of channels. The first is for statistics of single channels, which lie next to each other; the second
for groups of several."""


@triton.jit
def _finite(x):
    """x, or 0 where x is NaN or infinite. Used for what is subtracted from the data, in which NaN and infinities must stay."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _statistics_kernel(
    x_ptr, shift_ptr, rest_ptr, squares_ptr,
    N, C, P, x_n, x_row, IMAGES, PIXELS,
    LAST: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    TILE_C: tl.constexpr, TILE_P: tl.constexpr,
):  # fmt: skip
    """One program: TILE_C channels of a slice, of which the first tile is read twice. Writes three numbers for each of them."""
    C, P = multiples(C, P, LAST, VEC)
    x_n, x_row = x_n // VEC * VEC, x_row // VEC * VEC
    tiles_c, columns = tl.cdiv(C, TILE_C), tl.cdiv(P, PIXELS)
    pid_c, pid_s = tl.program_id(0) % tiles_c, tl.program_id(0) // tiles_c
    c = pid_c * TILE_C + tl.arange(0, TILE_C)
    pixel = tl.arange(0, TILE_P)
    n, p = pid_s // columns * IMAGES, pid_s % columns * PIXELS
    last_n, last_p = tl.minimum(n + IMAGES, N), tl.minimum(p + PIXELS, P)
    if WIDE:
        c, pixel, n = c.to(tl.int64), pixel.to(tl.int64), n.to(tl.int64)
    c_inside = c < C
    inside = c_inside[:, None] & (p + pixel < last_p)[None, :]
    x = tl.load(x_ptr + (n * x_n + offsets(c, p + pixel, x_row, LAST)), mask=inside, other=0.0).to(ACC)
    middle = tl.sum(x, axis=1) / tl.minimum(last_p - p, TILE_P).to(ACC)
    x = x - middle[:, None]
    above = tl.min(tl.where(inside & (x >= 0), x, float("inf")), axis=1)
    below = tl.max(tl.where(inside & (x <= 0), x, float("-inf")), axis=1)
    shift = _finite(middle + tl.where(above < -below, above, below))
    sums = tl.zeros((TILE_C, TILE_P), ACC)
    squares = tl.zeros((TILE_C, TILE_P), ACC)
    for image in range(n, last_n):
        for start in range(p, last_p, TILE_P):
            inside = c_inside[:, None] & (start + pixel < last_p)[None, :]
            x = tl.load(x_ptr + (image * x_n + offsets(c, start + pixel, x_row, LAST)), mask=inside, other=0.0).to(ACC)
            x = tl.where(inside, x - shift[:, None], 0.0)
            sums += x
            squares += x * x
    count = (last_n - n).to(ACC) * (last_p - p).to(ACC)
    rest = tl.sum(sums, axis=1) / count
    square = tl.sum(squares, axis=1) - rest * rest * count
    square = tl.where(square < 0, 0.0, square)  # by rounding, where all elements are equal; keeps NaN
    out = tl.cast(pid_s, tl.int64) * C + c
    tl.store(shift_ptr + out, shift, mask=c_inside)
    tl.store(rest_ptr + out, rest, mask=c_inside)
    tl.store(squares_ptr + out, square, mask=c_inside)


@triton.jit
def _entries(start, q, Q, N, C, P, G, D, SLICES, IMAGES, PIXELS, TILE_E: tl.constexpr):
    """A tile of statistics by the slices that they are merged from: the offset of each entry, how many of the input's elements it
    stands for, and the mask."""
    entry = start + tl.arange(0, TILE_E)
    s, columns = entry // D, tl.cdiv(P, PIXELS)
    count = tl.minimum(N - s // columns * IMAGES, IMAGES) * tl.minimum(P - s % columns * PIXELS, PIXELS)
    base = (q // G).to(tl.int64) * (SLICES * C) + q % G * D
    inside = (q < Q)[:, None] & (entry < SLICES * D)[None, :]
    return base[:, None] + (s.to(tl.int64) * C + entry % D)[None, :], count[None, :], inside


@triton.jit
def _merge_kernel(
    shift_ptr, rest_ptr, squares_ptr, mean_ptr, rstd_ptr, var_ptr, running_mean_ptr, running_var_ptr, factor_ptr,
    Q, N, C, P, G, D, SLICES, IMAGES, PIXELS, mean_step, var_step, MOMENTUM: tl.float64, EPS: tl.float64,
    ACC: tl.constexpr, TILE_Q: tl.constexpr, TILE_E: tl.constexpr,
):  # fmt: skip
    """One program: TILE_Q statistics, from all their slices in order, read twice. `N` is the number of images in one of them.
    Moves running statistics, which are those of a channel over the batch; or writes the unbiased variance."""
    eps = (tl.full((), 0.0, tl.float64) + EPS).to(ACC)  # in the interpreter EPS is a Python number
    q = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    q_inside = q < Q
    total = tl.cast(N, ACC) * tl.cast(P, ACC) * tl.cast(D, ACC)
    sums = tl.zeros((TILE_Q, TILE_E), ACC)
    for start in range(0, SLICES * D, TILE_E):
        entries, count, inside = _entries(start, q, Q, N, C, P, G, D, SLICES, IMAGES, PIXELS, TILE_E)
        shift = tl.load(shift_ptr + entries, mask=inside, other=0.0)
        sums += (shift + tl.load(rest_ptr + entries, mask=inside, other=0.0)) * count.to(ACC)
    rough = _finite(tl.sum(sums, axis=1) / total)
    sums = tl.zeros((TILE_Q, TILE_E), ACC)
    squares = tl.zeros((TILE_Q, TILE_E), ACC)
    for start in range(0, SLICES * D, TILE_E):
        entries, count, inside = _entries(start, q, Q, N, C, P, G, D, SLICES, IMAGES, PIXELS, TILE_E)
        rest = tl.load(shift_ptr + entries, mask=inside, other=0.0) - rough[:, None]
        rest += tl.load(rest_ptr + entries, mask=inside, other=0.0)
        square = tl.load(squares_ptr + entries, mask=inside, other=0.0) + rest * rest * count.to(ACC)
        sums += tl.where(inside, rest * count.to(ACC), 0.0)
        squares += tl.where(inside, square, 0.0)
    beyond = tl.sum(sums, axis=1) / total
    square = tl.sum(squares, axis=1) - beyond * beyond * total
    square = tl.where(square < 0, 0.0, square)  # by rounding, where all elements are equal; keeps NaN
    mean = rough + beyond
    tl.store(mean_ptr + q, mean, mask=q_inside)
    tl.store(rstd_ptr + q, tl.rsqrt(square / total + eps), mask=q_inside)
    if var_ptr is not None:
        tl.store(var_ptr + q, square / (total - 1), mask=q_inside)
    if running_mean_ptr is not None:
        _move(running_mean_ptr + q * mean_step, mean, factor_ptr, MOMENTUM, q_inside)
        _move(running_var_ptr + q * var_step, square / (total - 1), factor_ptr, MOMENTUM, q_inside)


@triton.jit
def _move(running_ptr, new, factor_ptr, MOMENTUM, inside):
    """Running statistics move towards new ones by MOMENTUM, or by a factor that lies in memory."""
    if factor_ptr is not None:
        factor = tl.load(factor_ptr).to(new.dtype)
    else:
        factor = (tl.full((), 0.0, tl.float64) + MOMENTUM).to(new.dtype)
    running = tl.load(running_ptr, mask=inside, other=0.0).to(new.dtype)
    running = running * (1 - factor) + new * factor
    tl.store(running_ptr, running.to(running_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _track_kernel(
    mean_ptr, var_ptr, running_mean_ptr, running_var_ptr, factor_ptr,
    N, C, mean_step, var_step, MOMENTUM: tl.float64,
    ACC: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """One program: running statistics of TILE_C channels move towards the averages of their images' statistics."""
    c = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
    inside = c < C
    means = tl.zeros((TILE_C,), ACC)
    variances = tl.zeros((TILE_C,), ACC)
    for n in range(0, N):
        means += tl.load(mean_ptr + (tl.cast(n, tl.int64) * C + c), mask=inside, other=0.0)
        variances += tl.load(var_ptr + (tl.cast(n, tl.int64) * C + c), mask=inside, other=0.0)
    count = tl.cast(N, ACC)
    _move(running_mean_ptr + c * mean_step, means / count, factor_ptr, MOMENTUM, inside)
    _move(running_var_ptr + c * var_step, variances / count, factor_ptr, MOMENTUM, inside)


@triton.jit
def _normalize_kernel(
    x_ptr, mean_ptr, scale_ptr, weight_ptr, bias_ptr, out_ptr,
    N, C, P, G, D, x_n, x_row, out_n, out_row, EPS: tl.float64,
    VARIANCE: tl.constexpr, ACROSS: tl.constexpr, LAST: tl.constexpr, THEN: tl.constexpr, A: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr, TILE_C: tl.constexpr, TILE_P: tl.constexpr,
):  # fmt: skip
    """One program: TILE_C channels by TILE_P pixels of one image, read once and written once. `scale_ptr` has rstd or, with
    VARIANCE, the variance."""
    C, P = multiples(C, P, LAST, VEC)
    x_n, x_row, out_n, out_row = x_n // VEC * VEC, x_row // VEC * VEC, out_n // VEC * VEC, out_row // VEC * VEC
    eps = (tl.full((), 0.0, tl.float64) + EPS).to(ACC)
    tiles_c, tiles_p = tl.cdiv(C, TILE_C), tl.cdiv(P, TILE_P)
    pid = tl.program_id(0)
    pid_n, pid_c, pid_p = pid // (tiles_c * tiles_p), pid // tiles_p % tiles_c, pid % tiles_p
    if LAST:
        pid_c, pid_p = pid % tiles_c, pid // tiles_c % tiles_p
    if WIDE:
        pid_n, pid_c, pid_p = pid_n.to(tl.int64), pid_c.to(tl.int64), pid_p.to(tl.int64)
    c = pid_c * TILE_C + tl.arange(0, TILE_C)
    p = pid_p * TILE_P + tl.arange(0, TILE_P)
    c_inside = c < C
    inside = c_inside[:, None] & (p < P)[None, :]
    x = tl.load(x_ptr + (pid_n * x_n + offsets(c, p, x_row, LAST)), mask=inside, other=0.0).to(ACC)
    q = c // D
    if not ACROSS:
        q += pid_n * G
    mean = tl.load(mean_ptr + q, mask=c_inside, other=0.0).to(ACC)
    scale = tl.load(scale_ptr + q, mask=c_inside, other=1.0).to(ACC)
    if VARIANCE:
        scale = tl.rsqrt(scale + eps)
    # In the order in which the backward computes it again for an activation, so that both see the same sign.
    y = (x - mean[:, None]) * scale[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + c, mask=c_inside, other=0.0).to(ACC)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=c_inside, other=0.0).to(ACC)[:, None]
    y = y.to(out_ptr.dtype.element_ty)
    if THEN is not None:
        y = THEN(y.to(ACC), A).to(out_ptr.dtype.element_ty)  # of the rounded sum, as of a layer of its own
    tl.store(out_ptr + (pid_n * out_n + offsets(c, p, out_row, LAST)), y, mask=inside)


def statistics(
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    planes: Planes,
    eps: float,
    running: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    momentum: float = 0.0,
    factor: torch.Tensor | None = None,
) -> None:
    """Mean and 1 / sqrt(var + eps), and running statistics moved by `momentum`, or by `factor`, towards mean and unbiased
    variance.

    Shape: x (N, C, *), any strides; mean and rstd `planes.statistics` numbers, contiguous; running mean and variance (C,), any
        strides: over the batch, or, where each channel is a group, averages of all images. `factor` one number.
    Dtype: x, running statistics and factor any floating each; mean and rstd float32 or float64, which is computed in.
    """
    rows, device, accumulate = planes.rows(x), tiles.device(x.device), mean.dtype
    assert rows is not None
    (x_n, x_row), vec = strides(rows), vector(rows)
    tile = planes.tile(accumulate, vec)
    slices = planes.slices(tile, device)
    written = [launch.empty((slices.count, planes.c), dtype=accumulate, device=x.device) for _ in range(3)]
    launch.launch(
        _statistics_kernel, slices.count * cdiv(planes.c, tile.m),
        rows, *written, planes.n, planes.c, planes.p, x_n, x_row, slices.images, slices.pixels,
        LAST=planes.last, ACC=tiles.triton_dtype(accumulate), WIDE=is_wide(planes, rows), VEC=vec,
        TILE_C=tile.m, TILE_P=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    track = running[0] is not None and not planes.across
    var = launch.empty(mean.shape, dtype=accumulate, device=x.device) if track else None
    steps = [0 if r is None else r.stride(0) for r in running]
    picked = _MERGE[planes.depth > 1]
    tile = tiles.ask("batch_norm_merge", lambda: (picked,)) or picked
    launch.launch(
        _merge_kernel, cdiv(planes.statistics, tile.m),
        *written, mean, rstd, var, *((None, None, None) if track else (*running, factor)),
        planes.statistics, planes.n if planes.across else 1, planes.c, planes.p, planes.groups, planes.depth,
        slices.count if planes.across else slices.columns, slices.images, slices.pixels, *steps, momentum, eps,
        ACC=tiles.triton_dtype(accumulate), TILE_Q=tile.m, TILE_E=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    if var is not None:
        track_averages(mean, var, running, momentum, factor, planes)


def track_averages(
    mean: torch.Tensor,
    var: torch.Tensor,
    running: tuple[torch.Tensor | None, torch.Tensor | None],
    momentum: float,
    factor: torch.Tensor | None,
    planes: Planes,
) -> None:
    """Move running statistics towards the averages over all images of their channels' mean and variance.

    Shape: mean and var (N * C,), contiguous; running ones (C,), any strides.
    """
    steps = [0 if r is None else r.stride(0) for r in running]
    launch.launch(
        _track_kernel, cdiv(planes.c, 128),
        mean, var, *running, factor, planes.n, planes.c, *steps, momentum,
        ACC=tiles.triton_dtype(mean.dtype), TILE_C=128, num_warps=4,
    )  # fmt: skip


def apply(
    x: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    planes: Planes,
    variance_eps: float | None = None,
    then: epilogues.Activation | None = None,
) -> None:
    """out = then((x - mean) * scale * weight + bias).

    Shape: x (N, C, *), any strides; mean and scale `planes.statistics` numbers; weight and bias (C,); out as x, contiguous or in
        channels_last, `planes` being its own.
    Dtype: any floating each; computed in float32, or in float64 if x is float64.

    Args:
        variance_eps: None if scale is the rstd that `statistics` writes; what is added to it before the root is taken, if
            it is a variance.
    """
    accumulate = torch.promote_types(x.dtype, torch.float32)
    rows, out_rows = planes.rows(x), planes.rows(out)
    vec = vector(rows, out_rows)
    tile = planes.tile(accumulate, vec)
    function, options = epilogues.tile_function(then)
    launch.launch(
        _normalize_kernel, planes.n * cdiv(planes.c, tile.m) * cdiv(planes.p, tile.n),
        rows, *(per_channel(t) for t in (mean, scale, weight, bias)), out_rows,
        planes.n, planes.c, planes.p, planes.groups, planes.depth, *strides(rows), *strides(out_rows), variance_eps or 0.0,
        VARIANCE=variance_eps is not None, ACROSS=planes.across, LAST=planes.last, THEN=function, A=options,
        ACC=tiles.triton_dtype(accumulate), WIDE=is_wide(planes, rows, out_rows), VEC=vec,
        TILE_C=tile.m, TILE_P=tile.n, num_warps=tile.warps,
    )  # fmt: skip
