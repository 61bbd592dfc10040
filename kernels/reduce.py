"""Sums of what several programs computed, of losses too, and the gradient of an activation with its column sums.

Every sum runs in a fixed order and without atomics, so that the same call always gives the same numbers.
"""

import torch
import triton
import triton.language as tl

from . import epilogues
from .runtime import launch, tiles
from .runtime.tiles import Tile

_SUM_PARTIALS = (Tile(4, 512, warps=4), Tile(32, 64, warps=4))
"""m partials, n elements. The second tile is for more than 32 partials."""
_MANY, _LANES = 512, 128
"""Of more partials than this, so many sums are added up first. A program adds up all partials of its elements one tile after the
other, and few elements make few programs: a bias of 64 channels, for instance, a single one."""
_ACTIVATION_GRAD = (Tile(32, 128, warps=4), Tile(128, 32, warps=4))
"""m rows, n columns. The first tile is for contiguous rows, the second for contiguous columns."""
_ACTIVATION_GRAD_HEAVY = (Tile(16, 128, warps=4), Tile(128, 16, warps=4))
"""The same for derivatives that are computed from the input, as GELU's is, in float64 and for what can't be loaded 128 bits at a
time: they need more registers."""
_SUM_LOSSES = Tile(1, 4096, warps=8)
"""One program adds up n of the others' sums at a time."""


@triton.jit
def _sum_partials_kernel(
    partials_ptr, out_ptr, z_ptr, bias_ptr, other_ptr,
    S, M, N, out_m, out_n, other_m, other_n, A0: tl.float64, A1: tl.float64,
    THEN: tl.constexpr, UNDO: tl.constexpr, WIDE: tl.constexpr,
    TILE_S: tl.constexpr, TILE_L: tl.constexpr,
):  # fmt: skip
    """One program: TILE_L elements of out, read from each of the S partials in order, and written once, to z as well if asked."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    element = pid * TILE_L + tl.arange(0, TILE_L)
    partial = tl.arange(0, TILE_S)
    size = tl.cast(M, tl.int64) * N  # not M.to: M may be the constant 1
    inside = element < size
    total = tl.zeros((TILE_L,), partials_ptr.dtype.element_ty)
    for start in range(0, S, TILE_S):
        s = start + partial
        offsets = s.to(tl.int64)[:, None] * size + element[None, :]
        total += tl.sum(tl.load(partials_ptr + offsets, mask=(s < S)[:, None] & inside[None, :], other=0.0), axis=0)
    A = epilogues.options(A0, A1, total.dtype)
    m = element // N
    n = element % N
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=inside, other=0.0).to(total.dtype)
    if other_ptr is not None:
        other = tl.load(other_ptr + (m * other_m + n * other_n), mask=inside, other=0.0).to(total.dtype)
        total = total + other if UNDO is None else UNDO(total, other, A)
    if THEN is not None:
        if z_ptr is not None:
            tl.store(z_ptr + (m * out_m + n * out_n), total.to(z_ptr.dtype.element_ty), mask=inside)
        total = THEN(total, A)
    tl.store(out_ptr + (m * out_m + n * out_n), total.to(out_ptr.dtype.element_ty), mask=inside)


def in_lanes(count: int) -> int:
    """The number of partials to write for so many: more, by zeros, where `sum_partials` can then share them out."""
    return count if count <= _MANY else tiles.cdiv(count, _LANES) * _LANES


def sum_partials(
    partials: torch.Tensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    then: epilogues.Activation | None = None,
    z: torch.Tensor | None = None,
    undo: tuple[epilogues.Activation, torch.Tensor] | None = None,
) -> None:
    """out = then(z), z = partials.sum(0) + bias + add; or the gradient of an activation applied to the sum.

    Shape: partials (S, M, N) or (S, N), contiguous; out (M, N) or (N,) and add (M, N), any strides; bias (N,).
    Dtype: partials float32 or float64, the others any floating dtype.

    Args:
        z: where to write what comes before `then`; with the strides of out.
        undo: (an activation, what it saved, of out's shape (M, N)), as in `matmul`.
    """
    s, n = partials.shape[0], partials.shape[-1]
    m = partials.shape[1] if partials.dim() == 3 else 1
    if s > _MANY and s % _LANES == 0:
        sums = launch.empty((_LANES, m * n), dtype=partials.dtype, device=partials.device)
        sum_partials(partials.view(s // _LANES, sums.numel()), sums.view(sums.numel()))
        partials, s = sums, _LANES
    out_m, out_n = out.stride() if out.dim() == 2 else (0, out.stride(0))
    undone, other = undo if undo is not None else (None, add)
    forward, options = epilogues.tile_function(then)
    backward, undone_options = epilogues.tile_function(undone, grad=True)
    tile = tiles.ask("sum_partials", lambda: _SUM_PARTIALS) or _SUM_PARTIALS[s > 32]
    launch.launch(
        _sum_partials_kernel, tiles.cdiv(m * n, tile.n),
        partials, out, z, bias, other, s, m, n, out_m, out_n, *((0, 0) if other is None else other.stride()),
        *(options if undone is None else undone_options),
        THEN=forward, UNDO=backward, WIDE=m * n >= 2**31 or launch.wide(out, other),
        TILE_S=tile.m, TILE_L=tile.n, num_warps=tile.warps,
    )  # fmt: skip


@triton.jit
def _activation_grad_kernel(
    dy_ptr, saved_ptr, dz_ptr, sums_ptr,
    ROWS, M, N, dy_b, dy_m, dy_n, saved_b, saved_m, saved_n, dz_b, dz_m, dz_n,
    A0: tl.float64, A1: tl.float64, UNDO: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M of the B*M rows by TILE_N columns of dz, and the sums of its columns.

    Reads a tile of dy and of what the activation saved. Writes a tile of dz if there is an activation, and a row of partial
    column sums if they are asked for.
    """
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
    dz = tl.load(dy_ptr + ((b * dy_b + m * dy_m)[:, None] + (n * dy_n)[None, :]), mask=inside, other=0.0).to(ACC)
    if UNDO is not None:
        offsets = (b * saved_b + m * saved_m)[:, None] + (n * saved_n)[None, :]
        saved = tl.load(saved_ptr + offsets, mask=inside, other=0.0).to(ACC)
        dz = UNDO(dz, saved, epilogues.options(A0, A1, ACC))
        dz = tl.where(inside, dz, 0.0)
        offsets = (b * dz_b + m * dz_m)[:, None] + (n * dz_n)[None, :]
        tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    if sums_ptr is not None:
        tl.store(sums_ptr + (tl.cast(pid_m, tl.int64) * N + n), tl.sum(dz, axis=0), mask=n_inside)


def activation_grad(
    dy: torch.Tensor,
    saved: torch.Tensor | None,
    activation: epilogues.Activation | None,
    dz: torch.Tensor | None,
    sums: torch.Tensor | None,
) -> None:
    """dz = f_grad(dy, saved) and the sums of its columns, in one pass over memory.

    Shape: dy, saved, dz (B, M, N), any strides; sums (N,), which run over B and M.
    Dtype: floating, the same for all.

    Args:
        saved, activation, dz: None if there is no activation; then dy itself is summed.
        sums: where to write dz.sum((0, 1)), which is added up before dz is rounded; None if it isn't needed.
    """
    if activation is None and sums is None:
        return
    batch, m, n = dy.shape
    accumulate = torch.promote_types(dy.dtype, torch.float32)
    tall = dy.stride(1) == 1 and dy.stride(2) != 1
    picked = _ACTIVATION_GRAD[tall]
    heavy = accumulate == torch.float64 or not launch.vectors(dy)
    if heavy and activation is not None and activation.saves == "input":
        picked = _ACTIVATION_GRAD_HEAVY[tall]
    tile = tiles.ask("activation_grad", lambda: (picked,)) or picked
    tiles_m = tiles.cdiv(batch * m, tile.m)
    tiles_m = tiles_m if sums is None else in_lanes(tiles_m)
    partials = None if sums is None else launch.empty((tiles_m, n), dtype=accumulate, device=dy.device)
    strides = [(0, 0, 0) if tensor is None else tensor.stride() for tensor in (saved, dz)]
    function, options = epilogues.tile_function(activation, grad=True)
    launch.launch(
        _activation_grad_kernel, tiles_m * tiles.cdiv(n, tile.n),
        dy, saved, dz, partials, batch * m, m, n, *dy.stride(), *strides[0], *strides[1], *options,
        UNDO=function, ACC=tiles.triton_dtype(accumulate),
        WIDE=tiles_m * tile.m * n >= 2**31 or launch.wide(dy, saved, dz),
        TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    if partials is not None and sums is not None:
        sum_partials(partials, sums)


@triton.jit
def divide(a, b):
    """a / b, correctly rounded: Triton's `/` is off by up to two units in the last place in float32."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _sum_losses_kernel(
    out_ptr, total_ptr, partials_ptr, COUNT, DIVISOR, BY_WEIGHT: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """One program, the only one: out = sum of losses / DIVISOR, or / sum of the targets' weights, which is total."""
    i = tl.arange(0, TILE)
    losses = tl.zeros((TILE,), partials_ptr.dtype.element_ty)
    weights = tl.zeros((TILE,), partials_ptr.dtype.element_ty)
    for start in range(0, COUNT, TILE):
        inside = start + i < COUNT
        losses += tl.load(partials_ptr + start + i, mask=inside, other=0.0)
        if BY_WEIGHT:
            weights += tl.load(partials_ptr + COUNT + start + i, mask=inside, other=0.0)
    loss = tl.sum(losses, axis=0)
    total = tl.sum(weights, axis=0) if BY_WEIGHT else tl.cast(DIVISOR, loss.dtype)
    loss = divide(loss, total)
    if BY_WEIGHT:
        # Torch divides the targets' own losses by total apart from the smoothing's, and 0 / 0 decides.
        loss = tl.where(total == 0, float("nan"), loss)
    tl.store(out_ptr, loss.to(out_ptr.dtype.element_ty))
    if total_ptr is not None:
        tl.store(total_ptr, total.to(total_ptr.dtype.element_ty))


def sum_losses(
    out: torch.Tensor,
    partials: torch.Tensor,
    divisor: int,
    *,
    total: torch.Tensor | None = None,
    by_weight: bool = False,
) -> None:
    """out = the sum of the losses / divisor; or, by_weight, / the sum of their weights.

    Shape: out and total (); partials (2, COUNT), sums of losses and, if they are needed, of weights, contiguous.
    Dtype: partials float32 or float64, the others any floating dtype.

    Args:
        total: where to write what was divided by.
    """
    launch.launch(
        _sum_losses_kernel, 1,
        out, total, partials, partials.shape[1], divisor,
        BY_WEIGHT=by_weight, TILE=_SUM_LOSSES.n, num_warps=_SUM_LOSSES.warps,
    )  # fmt: skip
