"""Mean and variance of each channel from what the tiles of a convolution wrote beside its result (`epilogues.Partials`).

The tiles are merged in a fixed order: so many at a time as a program holds in registers, and their results again, until one is
left. Means are given relative to a shift, by which those of two tiles are subtracted before either of them is rounded.

Source: Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983.
"""

import torch
import triton
import triton.language as tl

from ..epilogues import Partials
from ..runtime import launch, tiles
from ..runtime.tiles import Tile, cdiv
from .statistics import _move

_PARTIALS = Tile(32, 128, warps=8)
"""m channels by n tiles of the convolution, of which a program holds the numbers at once."""


@triton.jit
def _merge_partials_kernel(
    partials_ptr, merged_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, factor_ptr,
    TILES, C, mean_step, var_step, MOMENTUM: tl.float64, EPS: tl.float64, ACC: tl.constexpr,
    TILE_C: tl.constexpr, TILE_S: tl.constexpr,
):  # fmt: skip
    """One program: TILE_S tiles of the TILES there are, of TILE_C channels. Writes `merged` of the same form, in which these are
    one tile; or, if they are all, mean and rstd, and moves running statistics."""
    programs_c, programs_s = tl.cdiv(C, TILE_C), tl.cdiv(TILES, TILE_S)
    pid_c, pid_s = tl.program_id(0) % programs_c, tl.program_id(0) // programs_c
    c = pid_c * TILE_C + tl.arange(0, TILE_C)
    s = pid_s * TILE_S + tl.arange(0, TILE_S)
    c_inside, s_inside = c < C, s < TILES
    inside = s_inside[:, None] & c_inside[None, :]
    size = tl.cast(TILES, tl.int64) * C
    place = partials_ptr + s.to(tl.int64)[:, None] * C + c[None, :]
    first = tl.load(partials_ptr + tl.cast(pid_s * TILE_S, tl.int64) * C + c, mask=c_inside, other=0.0)
    means = tl.load(place, mask=inside, other=0.0) - first[None, :] + tl.load(place + size, mask=inside, other=0.0)
    count = tl.load(partials_ptr + 3 * size + s, mask=s_inside, other=0.0)
    total = tl.sum(count)
    mean = tl.sum(tl.where(inside, means * count[:, None], 0.0), axis=0) / total
    rest = means - mean[None, :]
    square = tl.load(place + 2 * size, mask=inside, other=0.0) + rest * rest * count[:, None]
    square = tl.sum(tl.where(inside, square, 0.0), axis=0)
    if merged_ptr is not None:
        size = tl.cast(programs_s, tl.int64) * C
        out = merged_ptr + tl.cast(pid_s, tl.int64) * C + c
        tl.store(out, first, mask=c_inside)
        tl.store(out + size, mean, mask=c_inside)
        tl.store(out + 2 * size, square, mask=c_inside)
        tl.store(merged_ptr + 3 * size + pid_s + 0 * c, total, mask=c == 0)
    else:
        eps = (tl.full((), 0.0, tl.float64) + EPS).to(ACC)  # in the interpreter EPS is a Python number
        mean += first
        tl.store(mean_ptr + c, mean, mask=c_inside)
        tl.store(rstd_ptr + c, tl.rsqrt(square / total + eps), mask=c_inside)
        if running_mean_ptr is not None:
            _move(running_mean_ptr + c * mean_step, mean, factor_ptr, MOMENTUM, c_inside)
            _move(running_var_ptr + c * var_step, square / (total - 1), factor_ptr, MOMENTUM, c_inside)


def merge(
    partials: Partials,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
    running: tuple[torch.Tensor | None, torch.Tensor | None],
    momentum: float,
    factor: torch.Tensor | None,
) -> None:
    """Mean and 1 / sqrt(var + eps) of each channel, and running statistics moved by `momentum`, or by `factor`, towards mean and
    unbiased variance.

    Shape: mean and rstd (C,), contiguous; running mean and variance (C,), any strides; `factor` one number.
    Dtype: mean and rstd that of the partials, float32 or float64; the others any floating each.
    """
    channels, data, count = len(mean), partials.data, partials.tiles
    tile = tiles.ask("batch_norm_partials", lambda: (_PARTIALS,)) or _PARTIALS
    steps = [0 if r is None else r.stride(0) for r in running]
    while True:
        left = cdiv(count, tile.n)
        merged = launch.empty((left * (3 * channels + 1),), dtype=mean.dtype, device=mean.device) if left > 1 else None
        results = (None,) * 5 if left > 1 else (mean, rstd, *running, factor)
        launch.launch(
            _merge_partials_kernel, left * cdiv(channels, tile.m),
            data, merged, *results, count, channels, *steps, momentum, eps,
            ACC=tiles.triton_dtype(mean.dtype), TILE_C=tile.m, TILE_S=tile.n, num_warps=tile.warps,
        )  # fmt: skip
        if merged is None:
            return
        data, count = merged, left
