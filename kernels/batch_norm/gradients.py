"""The gradients of batch, group and instance normalisation, and of an activation behind it.

With h = (x - mean) * rstd, the gradient of weight and bias are the sums of dy * h and of dy over all images and pixels. The
gradient of x is rstd * (g - mean of g - h * mean of g * h), where g = dy * weight, and the means run over what is normalised
together; with running statistics, which x doesn't enter, it is rstd * g.

A first kernel writes both sums for each slice, as in the forward; small ones add them up, in a fixed order; a last one reads x
and dy again and writes the gradient of x. What an activation saw is computed anew from x, so that nothing is saved for it.
"""

import torch
import triton
import triton.language as tl

from .. import epilogues
from ..reduce import sum_partials
from ..runtime import launch, tiles
from ..runtime.tiles import cdiv
from .planes import Planes, is_wide, multiples, offsets, per_channel, strides, vector
from .statistics import _MERGE, _entries
from .whole import fits, whole_grad


@triton.jit
def _parameters(
    c, q, inside, mean_ptr, scale_ptr, weight_ptr, bias_ptr, EPS, VARIANCE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Mean, rstd, weight and bias of some channels. What isn't given is 0 (mean, bias) or 1 (rstd, weight)."""
    mean = tl.full(c.shape, 0.0, ACC)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + q, mask=inside, other=0.0).to(ACC)
    rstd = tl.load(scale_ptr + q, mask=inside, other=1.0).to(ACC)
    if VARIANCE:
        rstd = tl.rsqrt(rstd + (tl.full((), 0.0, tl.float64) + EPS).to(ACC))
    weight = tl.full(c.shape, 1.0, ACC)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(ACC)
    bias = tl.full(c.shape, 0.0, ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(ACC)
    return mean, rstd, weight, bias


@triton.jit
def _undone(
    dy, h, weight, bias, dtype: tl.constexpr, THEN: tl.constexpr, UNDO: tl.constexpr, A: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The gradient of the activation's input, from dy, that of its output."""
    if UNDO is not None:
        saved = (h * weight[:, None] + bias[:, None]).to(dtype).to(ACC)
        if THEN is not None:
            saved = THEN(saved, A)
        dy = UNDO(dy, saved, A)
    return dy


@triton.jit
def _sums_kernel(
    dy_ptr, x_ptr, mean_ptr, scale_ptr, weight_ptr, bias_ptr, sums_ptr, products_ptr,
    N, C, P, G, D, dy_n, dy_row, x_n, x_row, IMAGES, PIXELS, EPS: tl.float64,
    VARIANCE: tl.constexpr, ACROSS: tl.constexpr, LAST: tl.constexpr,
    THEN: tl.constexpr, UNDO: tl.constexpr, A: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr, TILE_C: tl.constexpr, TILE_P: tl.constexpr,
):  # fmt: skip
    """One program: TILE_C channels of a slice, read once. Writes the sums of dy and of dy * h of each of them. Without x_ptr,
    the first alone."""
    C, P = multiples(C, P, LAST, VEC)
    dy_n, dy_row, x_n, x_row = dy_n // VEC * VEC, dy_row // VEC * VEC, x_n // VEC * VEC, x_row // VEC * VEC
    tiles_c, columns = tl.cdiv(C, TILE_C), tl.cdiv(P, PIXELS)
    pid_c, pid_s = tl.program_id(0) % tiles_c, tl.program_id(0) // tiles_c
    c = pid_c * TILE_C + tl.arange(0, TILE_C)
    pixel = tl.arange(0, TILE_P)
    n, p = pid_s // columns * IMAGES, pid_s % columns * PIXELS
    last_n, last_p = tl.minimum(n + IMAGES, N), tl.minimum(p + PIXELS, P)
    if WIDE:
        c, pixel, n = c.to(tl.int64), pixel.to(tl.int64), n.to(tl.int64)
    c_inside = c < C
    q = c // D
    if not ACROSS:  # a slice lies within an image
        q += n * G
    if x_ptr is not None:
        mean, rstd, weight, bias = _parameters(
            c, q, c_inside, mean_ptr, scale_ptr, weight_ptr, bias_ptr, EPS, VARIANCE, ACC
        )  # fmt: skip
    sums = tl.zeros((TILE_C, TILE_P), ACC)
    products = tl.zeros((TILE_C, TILE_P), ACC)
    for image in range(n, last_n):
        for start in range(p, last_p, TILE_P):
            inside = c_inside[:, None] & (start + pixel < last_p)[None, :]
            dy = tl.load(
                dy_ptr + (image * dy_n + offsets(c, start + pixel, dy_row, LAST)), mask=inside, other=0.0
            ).to(ACC)  # fmt: skip
            if x_ptr is not None:
                x = tl.load(
                    x_ptr + (image * x_n + offsets(c, start + pixel, x_row, LAST)), mask=inside, other=0.0
                ).to(ACC)  # fmt: skip
                h = (x - mean[:, None]) * rstd[:, None]
                dy = _undone(dy, h, weight, bias, dy_ptr.dtype.element_ty, THEN, UNDO, A, ACC)
                # Beyond the edges dy is 0, and h is a number unless mean or rstd isn't, when all sums are NaN anyway.
                products += dy * h
            sums += dy
    out = tl.cast(pid_s, tl.int64) * C + c
    tl.store(sums_ptr + out, tl.sum(sums, axis=1), mask=c_inside)
    if products_ptr is not None:
        tl.store(products_ptr + out, tl.sum(products, axis=1), mask=c_inside)


@triton.jit
def _means_kernel(
    sums_ptr, products_ptr, weight_ptr, means_ptr,
    Q, N, C, P, G, D, SLICES, IMAGES, PIXELS,
    ACC: tl.constexpr, TILE_Q: tl.constexpr, TILE_E: tl.constexpr,
):  # fmt: skip
    """One program: for TILE_Q statistics, the means of g and of g * h, from the sums of their slices in order."""
    q = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    total = tl.cast(N, ACC) * tl.cast(P, ACC) * tl.cast(D, ACC)
    sums = tl.zeros((TILE_Q, TILE_E), ACC)
    products = tl.zeros((TILE_Q, TILE_E), ACC)
    for start in range(0, SLICES * D, TILE_E):
        entries, _, inside = _entries(start, q, Q, N, C, P, G, D, SLICES, IMAGES, PIXELS, TILE_E)
        g = tl.load(sums_ptr + entries, mask=inside, other=0.0)
        gh = tl.load(products_ptr + entries, mask=inside, other=0.0)
        if weight_ptr is not None:
            c = (q % G * D)[:, None] + ((start + tl.arange(0, TILE_E)) % D)[None, :]
            weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(ACC)
            g *= weight
            gh *= weight
        sums += g
        products += gh
    tl.store(means_ptr + q, tl.sum(sums, axis=1) / total, mask=q < Q)
    tl.store(means_ptr + Q + q, tl.sum(products, axis=1) / total, mask=q < Q)


@triton.jit
def _input_grad_kernel(
    dy_ptr, x_ptr, mean_ptr, scale_ptr, weight_ptr, bias_ptr, means_ptr, dx_ptr,
    N, C, P, Q, G, D, dy_n, dy_row, x_n, x_row, dx_n, dx_row, EPS: tl.float64,
    VARIANCE: tl.constexpr, ACROSS: tl.constexpr, LAST: tl.constexpr,
    THEN: tl.constexpr, UNDO: tl.constexpr, A: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr, TILE_C: tl.constexpr, TILE_P: tl.constexpr,
):  # fmt: skip
    """One program: TILE_C channels by TILE_P pixels of one image, read once and written once. Without means_ptr, of running
    statistics, which x doesn't enter."""
    C, P = multiples(C, P, LAST, VEC)
    dy_n, dy_row, x_n, x_row = dy_n // VEC * VEC, dy_row // VEC * VEC, x_n // VEC * VEC, x_row // VEC * VEC
    dx_n, dx_row = dx_n // VEC * VEC, dx_row // VEC * VEC
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
    dy = tl.load(dy_ptr + (pid_n * dy_n + offsets(c, p, dy_row, LAST)), mask=inside, other=0.0).to(ACC)
    q = c // D
    if not ACROSS:
        q += pid_n * G
    mean, rstd, weight, bias = _parameters(
        c, q, c_inside, mean_ptr, scale_ptr, weight_ptr, bias_ptr, EPS, VARIANCE, ACC
    )  # fmt: skip
    if x_ptr is not None:
        x = tl.load(x_ptr + (pid_n * x_n + offsets(c, p, x_row, LAST)), mask=inside, other=0.0).to(ACC)
        h = (x - mean[:, None]) * rstd[:, None]
        dy = _undone(dy, h, weight, bias, dy_ptr.dtype.element_ty, THEN, UNDO, A, ACC)
    dx = dy * weight[:, None]
    if means_ptr is not None:
        dx -= tl.load(means_ptr + q, mask=c_inside, other=0.0)[:, None]
        dx -= h * tl.load(means_ptr + Q + q, mask=c_inside, other=0.0)[:, None]
    dx *= rstd[:, None]
    tl.store(dx_ptr + (pid_n * dx_n + offsets(c, p, dx_row, LAST)), dx.to(dx_ptr.dtype.element_ty), mask=inside)


def gradients(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    mean: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    dx: torch.Tensor | None,
    dw: torch.Tensor | None,
    db: torch.Tensor | None,
    planes: Planes,
    variance_eps: float | None = None,
    then: epilogues.Activation | None = None,
) -> None:
    """The gradients of `forward.normalize`, or of `statistics.apply` with running statistics; of x through mean and rstd as
    well, unless these are running statistics.

    A gradient that is None is not computed. x may be None if no sums of products with it are needed: for db alone, and for dx
    with running statistics, both without an activation. Mean, scale and weight may be where db alone is asked for.

    Shape: dy and x (N, C, *), any strides; dx like them, contiguous or in channels_last, in which case `planes` is its own;
        weight, bias, dw and db (C,), dw and db contiguous; mean and scale as `statistics.apply` takes them.
    Dtype: any floating each; computed in float32, or in float64 if dy is float64.

    Args:
        bias: needed for an activation alone.
        variance_eps: as `statistics.apply` takes it. If not None, mean and variance are running statistics.
        then: the activation behind it.
    """
    through = dx is not None and variance_eps is None  # dx needs the sums, too
    if dw is None and not through and then is None and (dx is None or variance_eps is not None):
        x = None
    accumulate = torch.promote_types(dy.dtype, torch.float32)
    measured = x is not None and mean is not None and scale is not None and variance_eps is None
    if measured and fits(planes, accumulate, gradient=True):
        whole_grad(dy, x, mean, scale, weight, bias, dx, dw, db, planes, then)
        return
    mean, scale, weight, bias = (per_channel(t) for t in (mean, scale, weight, bias if then is not None else None))
    dy_rows, x_rows, dx_rows = planes.rows(dy), planes.rows(x), planes.rows(dx)
    vec = vector(dy_rows, x_rows, dx_rows)
    tile, sizes = planes.tile(accumulate, vec), (planes.n, planes.c, planes.p)
    undo, options = epilogues.tile_function(then, grad=True)
    forward = epilogues.tile_function(then)[0] if then is not None and then.saves == "output" else None
    common = dict(
        VARIANCE=variance_eps is not None, ACROSS=planes.across, LAST=planes.last, THEN=forward, UNDO=undo, A=options,
        ACC=tiles.triton_dtype(accumulate), WIDE=is_wide(planes, dy_rows, x_rows, dx_rows), VEC=vec,
        TILE_C=tile.m, TILE_P=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    means = None
    if through or dw is not None or db is not None:
        slices = planes.slices(tile, tiles.device(dy.device))
        partials = [launch.empty((slices.count, planes.c), dtype=accumulate, device=dy.device) for _ in range(2)]
        products = partials[1] if through or dw is not None else None
        launch.launch(
            _sums_kernel, slices.count * cdiv(planes.c, tile.m),
            dy_rows, x_rows, mean, scale, weight, bias, partials[0], products,
            *sizes, planes.groups, planes.depth, *strides(dy_rows), *strides(x_rows), slices.images, slices.pixels,
            variance_eps or 0.0, **common,
        )  # fmt: skip
        for partial, gradient in zip(partials, (db, dw), strict=True):
            if gradient is not None:
                sum_partials(partial, gradient)
        if through:
            means = launch.empty((2, planes.statistics), dtype=accumulate, device=dy.device)
            picked = _MERGE[planes.depth > 1]
            merge = tiles.ask("batch_norm_merge", lambda: (picked,)) or picked
            launch.launch(
                _means_kernel, cdiv(planes.statistics, merge.m),
                *partials, weight, means, planes.statistics, planes.n if planes.across else 1, planes.c, planes.p,
                planes.groups, planes.depth, slices.count if planes.across else slices.columns,
                slices.images, slices.pixels,
                ACC=common["ACC"], TILE_Q=merge.m, TILE_E=merge.n, num_warps=merge.warps,
            )  # fmt: skip
    if dx is not None:
        launch.launch(
            _input_grad_kernel, planes.n * cdiv(planes.c, tile.m) * cdiv(planes.p, tile.n),
            dy_rows, x_rows, mean, scale, weight, bias, means, dx_rows,
            *sizes, planes.statistics, planes.groups, planes.depth,
            *strides(dy_rows), *strides(x_rows), *strides(dx_rows), variance_eps or 0.0, **common,
        )  # fmt: skip
