"""Sequences with one launch for each step, where the recurrent weights don't fit on the chip: a program computes a few units of a
few sequences.

The states before a step are read from memory, where the step before has left them: hidden ones from the output, since a program
needs all units of its sequences, an LSTM's cells from where the last ones are returned, each by the program that writes it. The
gradients take the same way back: a step's program begins with the product of the gates' gradients of the step after it.

Launches are replayed (docs/decisions/0008), so that a step costs the host a microsecond or two.
"""

import torch
import triton
import triton.language as tl

from ..runtime import launch, tiles
from ..runtime.tiles import Tile
from . import cells
from .layout import Layout, Pair, biases, of_direction, product, step

_STEPS = {
    16: Tile(16, 32, 64, warps=4, stages=3),
    32: Tile(32, 32, 64, warps=4, stages=3),
    64: Tile(64, 32, 64, warps=8, stages=3),
}
"""m sequences, n units, k of the sum, by the sequences."""
_STEPS_OF_WORDS = Tile(16, 32, 16, warps=4, stages=2)
"""The same for float32 and float64."""
_STEPS_ON_AMD = Tile(32, 32, 32, warps=4, stages=2)
"""In 16 bits on AMD's GPUs, where larger ones spill."""


def _tile(layout: Layout, like: torch.Tensor) -> Tile:
    """The tile for sequences of `like`'s dtype and device."""
    picked = _STEPS[64 if layout.b > 32 else 32 if layout.b > 16 else 16]
    if like.dtype.itemsize > 2:
        picked = _STEPS_OF_WORDS
    elif tiles.device(like.device).architecture.startswith("gfx"):
        picked = _STEPS_ON_AMD
    return tiles.ask("recurrent_steps", lambda: (picked,)) or picked


@triton.jit
def _weights(w_ptr, u, k, H, inside, GATES: tl.constexpr):
    """Of each gate, rows u and columns k of its block of W_hh."""
    at = w_ptr + (u.to(tl.int64) * H + k)
    block = tl.cast(H, tl.int64) * H
    first = tl.load(at, mask=inside, other=0.0)
    if GATES == 1:
        found = (first,)
    else:
        second = tl.load(at + block, mask=inside, other=0.0)
        third = tl.load(at + 2 * block, mask=inside, other=0.0)
        if GATES == 3:
            found = (first, second, third)
        else:
            found = (first, second, third, tl.load(at + 3 * block, mask=inside, other=0.0))
    return found


@triton.jit(do_not_specialize=["i"])
def _step_kernel(
    y_ptr, hn_ptr, cn_ptr, cells_ptr, saved_ptr, x_ptr, x1_ptr, w_ptr, w1_ptr, bias_ptr, bias1_ptr, h0_ptr, c0_ptr, steps_ptr,
    i, T, B, H, ROWS, y_t, y_b, x_t, x_b,
    CELL: tl.constexpr, GATES: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, TILE_B: tl.constexpr, TILE_U: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: TILE_U units of TILE_B sequences at step i, which in the backward direction is the i-th from the end."""
    tiles_u = tl.cdiv(H, TILE_U)
    tiles_b = tl.cdiv(B, TILE_B)
    d = tl.program_id(0) // (tiles_u * tiles_b)
    b = tl.program_id(0) // tiles_u % tiles_b * TILE_B + tl.arange(0, TILE_B)
    u = (tl.program_id(0) % tiles_u * TILE_U + tl.arange(0, TILE_U))[:, None]
    x_ptr = of_direction(d, x_ptr, x1_ptr)
    w_ptr = of_direction(d, w_ptr, w1_ptr)
    if bias_ptr is not None:
        bias_ptr = of_direction(d, bias_ptr, bias1_ptr)
    if WIDE:
        d = d.to(tl.int64)
        b = b.to(tl.int64)
    unit = u < H
    t = i + d * (T - 1 - 2 * i)
    start, runs = step(steps_ptr, t, b, T, B, PACKED, WIDE)
    last, ran = step(steps_ptr, t - 1 + 2 * d, b, T, B, PACKED, WIDE)
    hit = unit & runs[None, :]
    row = start * x_t + b * x_b
    state = (d * B + b)[None, :] * H
    if bias_ptr is not None:
        bias_ptr += u
    a0, a1, a2, a3 = biases(bias_ptr, H, unit, GATES, ACC, TILE_B)
    before = (last * y_t + b * y_b)[None, :] + d * H
    for first in range(0, H, TILE_K):
        k = first + tl.arange(0, TILE_K)
        summed = (k < H)[:, None]
        w = _weights(w_ptr, u, k[None, :], H, unit & (k < H)[None, :], GATES)
        h = tl.load(y_ptr + (before + k[:, None]), mask=summed & (runs & ran)[None, :], other=0.0)
        begun = tl.load(h0_ptr + (state + k[:, None]), mask=summed & (runs & (ran == 0))[None, :], other=0.0)
        h = tl.where(ran[None, :], h, begun)
        a0 = product(w[0], h, a0, PRECISION)
        if GATES > 1:
            a1 = product(w[1], h, a1, PRECISION)
            a2 = product(w[2], h, a2, PRECISION)
        if GATES == 4:
            a3 = product(w[3], h, a3, PRECISION)
    h = tl.zeros((TILE_U, TILE_B), ACC)
    c = tl.zeros((TILE_U, TILE_B), ACC)
    if GATES == 3:
        h = tl.load(y_ptr + (before + u), mask=hit & ran[None, :], other=0.0).to(ACC)
        h += tl.load(h0_ptr + (state + u), mask=hit & (ran == 0)[None, :], other=0.0).to(ACC)
    if GATES == 4:
        c = tl.load(cn_ptr + (state + u), mask=hit & ran[None, :], other=0.0).to(ACC)
        begun = tl.load(c0_ptr + (state + u), mask=hit & (ran == 0)[None, :], other=0.0).to(ACC)
        c = tl.where(ran[None, :], c, begun)
    x = cells.load(x_ptr + (row[None, :] * (GATES * H) + u), H, hit, GATES, ACC)
    if cells_ptr is not None:
        tl.store(cells_ptr + ((d * ROWS + row)[None, :] * H + u), c.to(cells_ptr.dtype.element_ty), mask=hit)
    y, c, saved = CELL(x, (a0, a1, a2, a3), h, c)
    if saved_ptr is not None:
        cells.store(saved_ptr + ((d * ROWS + row)[None, :] * (4 * H) + u), H, saved, hit, 4)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + ((start * y_t + b * y_b)[None, :] + (d * H + u)), y, mask=hit)
    tl.store(hn_ptr + (state + u), y, mask=hit)  # the last step's remains
    if GATES == 4:
        tl.store(cn_ptr + (state + u), c.to(cn_ptr.dtype.element_ty), mask=hit)


@triton.jit(do_not_specialize=["i"])
def _step_grad_kernel(
    dx_ptr, dx1_ptr, da_ptr, da1_ptr, before_ptr, before1_ptr, dh0_ptr, dc0_ptr, dh_ptr, dc_ptr,
    dy_ptr, dhn_ptr, dcn_ptr, y_ptr, cells_ptr, saved_ptr, w_ptr, w1_ptr, h0_ptr, steps_ptr,
    i, T, B, H, ROWS, dy_t, dy_b, y_t, y_b, x_t, x_b,
    CELL: tl.constexpr, GATES: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, TILE_B: tl.constexpr, TILE_U: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of the gates of TILE_U units of TILE_B sequences at the i-th step from the end. At step T, which
    comes after all others, and wherever a sequence has just begun, those of its first states."""
    tiles_u = tl.cdiv(H, TILE_U)
    tiles_b = tl.cdiv(B, TILE_B)
    d = tl.program_id(0) // (tiles_u * tiles_b)
    b = tl.program_id(0) // tiles_u % tiles_b * TILE_B + tl.arange(0, TILE_B)
    u = (tl.program_id(0) % tiles_u * TILE_U + tl.arange(0, TILE_U))[:, None]
    dx_ptr = of_direction(d, dx_ptr, dx1_ptr)
    w_ptr = of_direction(d, w_ptr, w1_ptr)
    if da_ptr is not None:
        da_ptr = of_direction(d, da_ptr, da1_ptr)
    if before_ptr is not None:
        before_ptr = of_direction(d, before_ptr, before1_ptr)
    if WIDE:
        d = d.to(tl.int64)
        b = b.to(tl.int64)
    unit = u < H
    t = T - 1 - i + d * (2 * i - T + 1)
    start, runs = step(steps_ptr, t, b, T, B, PACKED, WIDE)
    next, ran = step(steps_ptr, t + 1 - 2 * d, b, T, B, PACKED, WIDE)
    hit = unit & runs[None, :]
    done = unit & ran[None, :]
    row = start * x_t + b * x_b
    state = (d * B + b)[None, :] * H
    # What comes through the step after this one.
    of_a = dx_ptr
    if GATES == 3:
        of_a = da_ptr
    of_a += (next * x_t + b * x_b)[None, :] * (GATES * H)
    dh = tl.zeros((TILE_U, TILE_B), ACC)
    for first in range(0, GATES * H, TILE_K):
        k = first + tl.arange(0, TILE_K)
        summed = k < GATES * H
        w = tl.load(w_ptr + (k.to(tl.int64)[None, :] * H + u), mask=unit & summed[None, :], other=0.0)
        a = tl.load(of_a + k[:, None], mask=summed[:, None] & ran[None, :], other=0.0)
        dh = product(w, a, dh, PRECISION)
    dc = tl.zeros((TILE_U, TILE_B), ACC)
    if GATES == 3:
        dh += tl.load(dh_ptr + (state + u), mask=done, other=0.0)
    if GATES == 4:
        dc = tl.load(dc_ptr + (state + u), mask=done, other=0.0)
    if dhn_ptr is not None:
        dh += tl.load(dhn_ptr + (state + u), mask=hit & (ran == 0)[None, :], other=0.0).to(ACC)
    if dcn_ptr is not None:
        dc += tl.load(dcn_ptr + (state + u), mask=hit & (ran == 0)[None, :], other=0.0).to(ACC)
    ended = done & (runs == 0)[None, :]
    if dh0_ptr is not None:
        tl.store(dh0_ptr + (state + u), dh.to(dh0_ptr.dtype.element_ty), mask=ended)
    if dc0_ptr is not None:
        tl.store(dc0_ptr + (state + u), dc.to(dc0_ptr.dtype.element_ty), mask=ended)
    if dy_ptr is not None:
        dh += tl.load(dy_ptr + ((start * dy_t + b * dy_b)[None, :] + (d * H + u)), mask=hit, other=0.0).to(ACC)
    h = tl.zeros((TILE_U, TILE_B), ACC)
    c = tl.zeros((TILE_U, TILE_B), ACC)
    y = tl.zeros((TILE_U, TILE_B), ACC)
    saved = (h,)
    if GATES == 1:
        y = tl.load(y_ptr + ((start * y_t + b * y_b)[None, :] + (d * H + u)), mask=hit, other=0.0).to(ACC)
    else:
        saved = cells.load(saved_ptr + ((d * ROWS + row)[None, :] * (4 * H) + u), H, hit, 4, ACC)
    if GATES == 4:
        c = tl.load(cells_ptr + ((d * ROWS + row)[None, :] * H + u), mask=hit, other=0.0).to(ACC)
    if before_ptr is not None:
        last, begun = step(steps_ptr, t - 1 + 2 * d, b, T, B, PACKED, WIDE)
        begun = hit & begun[None, :]
        own = tl.load(y_ptr + ((last * y_t + b * y_b)[None, :] + (d * H + u)), mask=begun, other=0.0)
        own = tl.where(begun, own, tl.load(h0_ptr + (state + u), mask=hit & (begun == 0), other=0.0))
        tl.store(before_ptr + (row[None, :] * H + u), own, mask=hit)
        h = own.to(ACC)
    dx, da, rest, dc = CELL(dh, dc, saved, h, c, y)
    cells.store(dx_ptr + (row[None, :] * (GATES * H) + u), H, dx, hit, GATES)
    if GATES == 3:
        cells.store(da_ptr + (row[None, :] * (GATES * H) + u), H, da, hit, GATES)
        tl.store(dh_ptr + (state + u), rest, mask=hit)
    if GATES == 4:
        tl.store(dc_ptr + (state + u), dc, mask=hit)


def forward(
    kind: str,
    layout: Layout,
    x: Pair,
    w: Pair,
    bias: Pair,
    states: Pair,
    y: torch.Tensor,
    last: Pair,
    cells_before: torch.Tensor | None,
    saved: torch.Tensor | None,
    precision: str,
) -> None:
    """All steps of a layer: what `sequence.forward` describes."""
    cell, accumulate = cells.CELLS[kind], torch.promote_types(y.dtype, torch.float32)
    tile = _tile(layout, y)
    y, y_strides = layout.by_steps(y)
    for i in range(layout.t):
        launch.launch(
            _step_kernel, layout.directions * tiles.cdiv(layout.b, tile.m) * tiles.cdiv(layout.h, tile.n),
            y, *last, cells_before, saved, *x, *w, *bias, *states, layout.steps,
            i, layout.t, layout.b, layout.h, x[0].shape[0], *y_strides, *layout.input_rows,
            CELL=cell.forward, GATES=cell.gates, PACKED=layout.steps is not None,
            PRECISION=precision, ACC=tiles.triton_dtype(accumulate), WIDE=layout.wide or launch.wide(y),
            TILE_B=tile.m, TILE_U=tile.n, TILE_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def backward(
    kind: str,
    layout: Layout,
    dy: torch.Tensor | None,
    dlast: Pair,
    y: torch.Tensor | None,
    cells_before: torch.Tensor | None,
    saved: torch.Tensor | None,
    w: Pair,
    h0: torch.Tensor | None,
    dx: Pair,
    da: Pair,
    before: Pair,
    dstates: Pair,
    precision: str,
) -> None:
    """The gradients of all steps' gates: what `sequence.backward` describes."""
    cell, accumulate = cells.CELLS[kind], torch.promote_types(dx[0].dtype, torch.float32)
    tile, device = _tile(layout, dx[0]), dx[0].device
    (dy, dy_strides), (y, y_strides) = layout.by_steps(dy), layout.by_steps(y)

    def carried(gates: int) -> torch.Tensor | None:
        """The share of a state's gradient that goes from step to step beside the product, not rounded."""
        shape = (layout.directions, layout.b, layout.h)
        return launch.empty(shape, dtype=accumulate, device=device) if cell.gates == gates else None

    dh, dc = carried(3), carried(4)
    asked = any(t is not None for t in dstates)
    for i in range(layout.t + asked):
        launch.launch(
            _step_grad_kernel, layout.directions * tiles.cdiv(layout.b, tile.m) * tiles.cdiv(layout.h, tile.n),
            *dx, *da, *before, *dstates, dh, dc, dy, *dlast, y, cells_before, saved, *w, h0, layout.steps,
            i, layout.t, layout.b, layout.h, dx[0].shape[0], *dy_strides, *y_strides, *layout.input_rows,
            CELL=cell.gradient, GATES=cell.gates, PACKED=layout.steps is not None,
            PRECISION=precision, ACC=tiles.triton_dtype(accumulate), WIDE=layout.wide or launch.wide(dy, y),
            TILE_B=tile.m, TILE_U=tile.n, TILE_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
