"""Whole sequences in one launch, where the recurrent weights fit on the chip: a program computes all steps of a few sequences.

Tiles are transposed, units by sequences: the blocks of W_hh, one for each gate, are the first operands of a step's products,
which the compiler keeps in shared memory from the first step to the last. The states stay in registers.

Nobody waits for another program. A barrier over the grid would need all programs to be resident at once, and the interpreter,
which runs one program after another, could not run it.
"""

import torch
import triton
import triton.language as tl

from ..runtime import launch, tiles
from ..runtime.tiles import Tile
from . import cells
from .layout import Layout, Pair, biases, of_direction, product, products, step

_RESIDENT = {
    16: Tile(16, 16, warps=4, stages=1),
    32: Tile(16, 32, warps=4, stages=1),
    64: Tile(16, 64, warps=4, stages=1),
    128: Tile(16, 128, warps=8, stages=1),
}
"""m sequences, n units, by the smallest power of two that the units fit into. One stage: with more, the compiler fetches the
gates of the next step by copies of four bytes."""
_RESIDENT_DOUBLE = Tile(16, 16, warps=8, stages=1)
"""The same for float64."""


def _most_units(dtype: torch.dtype, precision: str, architecture: str) -> int:
    """How many units' weights fit on the chip, and how many states into registers."""
    if dtype.itemsize == 2:
        return 128
    if dtype == torch.float64:
        return 16
    return 64 if precision == "tf32" and not architecture.startswith(("gfx", "sm_8")) else 32  # there they spill


def tile(layout: Layout, like: torch.Tensor, precision: str) -> Tile | None:
    """The tile for sequences of `like`'s dtype and device; None where the weights don't fit, or somebody forces single steps."""
    most = _most_units(like.dtype, precision, tiles.device(like.device).architecture)
    if "recurrent_steps" in tiles.forced or layout.h > most:
        return None
    least = max(16, 1 << (layout.h - 1).bit_length())
    picked = _RESIDENT_DOUBLE if like.dtype == torch.float64 else _RESIDENT[least]
    return tiles.ask("recurrent", lambda: (picked,)) or picked


@triton.jit
def _block(w_ptr, gate, H, TRANSPOSED: tl.constexpr, TILE_H: tl.constexpr):
    """A gate's block of W_hh, or that block transposed."""
    i = tl.arange(0, TILE_H)[:, None]
    j = tl.arange(0, TILE_H)[None, :]
    offsets = (j + gate * H) * H + i if TRANSPOSED else (i + gate * H) * H + j
    return tl.load(w_ptr + offsets, mask=(i < H) & (j < H), other=0.0)


@triton.jit
def _blocks(w_ptr, H, GATES: tl.constexpr, TRANSPOSED: tl.constexpr, TILE_H: tl.constexpr):
    first = _block(w_ptr, 0, H, TRANSPOSED, TILE_H)
    if GATES == 1:
        found = (first,)
    else:
        second = _block(w_ptr, 1, H, TRANSPOSED, TILE_H)
        third = _block(w_ptr, 2, H, TRANSPOSED, TILE_H)
        if GATES == 3:
            found = (first, second, third)
        else:
            found = (first, second, third, _block(w_ptr, 3, H, TRANSPOSED, TILE_H))
    return found


@triton.jit
def _resident_kernel(
    y_ptr, hn_ptr, cn_ptr, cells_ptr, saved_ptr, x_ptr, x1_ptr, w_ptr, w1_ptr, bias_ptr, bias1_ptr, h0_ptr, c0_ptr, steps_ptr,
    T, B, H, ROWS, y_t, y_b, x_t, x_b,
    CELL: tl.constexpr, GATES: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, TILE_B: tl.constexpr, TILE_H: tl.constexpr,
):  # fmt: skip
    """One program: all steps of TILE_B sequences in one direction."""
    tiles_b = tl.cdiv(B, TILE_B)
    d = tl.program_id(0) // tiles_b
    b = tl.program_id(0) % tiles_b * TILE_B + tl.arange(0, TILE_B)
    u = tl.arange(0, TILE_H)[:, None]
    x_ptr = of_direction(d, x_ptr, x1_ptr)
    w_ptr = of_direction(d, w_ptr, w1_ptr)
    if bias_ptr is not None:
        bias_ptr = of_direction(d, bias_ptr, bias1_ptr)
    if WIDE:
        d = d.to(tl.int64)
        b = b.to(tl.int64)
    unit = u < H
    w = _blocks(w_ptr, H, GATES, False, TILE_H)
    if bias_ptr is not None:
        bias_ptr += u
    bias = biases(bias_ptr, H, unit, GATES, ACC, TILE_B)
    state = (d * B + b)[None, :] * H + u
    inside = unit & (b < B)[None, :]
    h = tl.load(h0_ptr + state, mask=inside, other=0.0)
    c = tl.zeros((TILE_H, TILE_B), ACC)
    if GATES == 4:
        c = tl.load(c0_ptr + state, mask=inside, other=0.0).to(ACC)
    for i in range(T):
        t = i + d * (T - 1 - 2 * i)
        start, runs = step(steps_ptr, t, b, T, B, PACKED, WIDE)
        hit = unit & runs[None, :]
        row = start * x_t + b * x_b
        x = cells.load(x_ptr + (row[None, :] * (GATES * H) + u), H, hit, GATES, ACC)
        a = products(w, h, bias, PRECISION, GATES)
        if cells_ptr is not None:
            tl.store(cells_ptr + ((d * ROWS + row)[None, :] * H + u), c.to(cells_ptr.dtype.element_ty), mask=hit)
        new, c_new, saved = CELL(x, a, h.to(ACC), c)
        if saved_ptr is not None:
            cells.store(saved_ptr + ((d * ROWS + row)[None, :] * (4 * H) + u), H, saved, hit, 4)
        # Beyond the last unit the states stay 0: by a weight of 0, infinity and NaN would reach all others.
        c = tl.where(hit, c_new, c)
        h = tl.where(hit, new.to(h.dtype), h)
        tl.store(y_ptr + ((start * y_t + b * y_b)[None, :] + (d * H + u)), h, mask=hit)
    tl.store(hn_ptr + state, h, mask=inside)
    if GATES == 4:
        tl.store(cn_ptr + state, c.to(cn_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _resident_grad_kernel(
    dx_ptr, dx1_ptr, da_ptr, da1_ptr, before_ptr, before1_ptr, dh0_ptr, dc0_ptr,
    dy_ptr, dhn_ptr, dcn_ptr, y_ptr, cells_ptr, saved_ptr, w_ptr, w1_ptr, h0_ptr, steps_ptr,
    T, B, H, ROWS, dy_t, dy_b, y_t, y_b, x_t, x_b,
    CELL: tl.constexpr, GATES: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, TILE_B: tl.constexpr, TILE_H: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of TILE_B sequences' gates in one direction, from the last step to the first, and the hidden
    state before each."""
    tiles_b = tl.cdiv(B, TILE_B)
    d = tl.program_id(0) // tiles_b
    b = tl.program_id(0) % tiles_b * TILE_B + tl.arange(0, TILE_B)
    u = tl.arange(0, TILE_H)[:, None]
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
    w = _blocks(w_ptr, H, GATES, True, TILE_H)
    state = (d * B + b)[None, :] * H + u
    inside = unit & (b < B)[None, :]
    dh = tl.zeros((TILE_H, TILE_B), ACC)
    dc = tl.zeros((TILE_H, TILE_B), ACC)
    h = tl.zeros((TILE_H, TILE_B), ACC)
    c = tl.zeros((TILE_H, TILE_B), ACC)
    y = tl.zeros((TILE_H, TILE_B), ACC)
    if dhn_ptr is not None:
        dh = tl.load(dhn_ptr + state, mask=inside, other=0.0).to(ACC)
    if dcn_ptr is not None:
        dc = tl.load(dcn_ptr + state, mask=inside, other=0.0).to(ACC)
    for i in range(T):
        t = T - 1 - i + d * (2 * i - T + 1)
        start, runs = step(steps_ptr, t, b, T, B, PACKED, WIDE)
        hit = unit & runs[None, :]
        row = start * x_t + b * x_b
        whole = dh
        if dy_ptr is not None:
            whole += tl.load(dy_ptr + ((start * dy_t + b * dy_b)[None, :] + (d * H + u)), mask=hit, other=0.0).to(ACC)
        saved = (whole,)
        if GATES == 1:
            y = tl.load(y_ptr + ((start * y_t + b * y_b)[None, :] + (d * H + u)), mask=hit, other=0.0).to(ACC)
        else:
            saved = cells.load(saved_ptr + ((d * ROWS + row)[None, :] * (4 * H) + u), H, hit, 4, ACC)
        if GATES == 4:
            c = tl.load(cells_ptr + ((d * ROWS + row)[None, :] * H + u), mask=hit, other=0.0).to(ACC)
        if before_ptr is not None:
            last, ran = step(steps_ptr, t - 1 + 2 * d, b, T, B, PACKED, WIDE)
            ran = hit & ran[None, :]
            own = tl.load(y_ptr + ((last * y_t + b * y_b)[None, :] + (d * H + u)), mask=ran, other=0.0)
            own = tl.where(ran, own, tl.load(h0_ptr + state, mask=hit & (ran == 0), other=0.0))
            tl.store(before_ptr + (row[None, :] * H + u), own, mask=hit)
            h = own.to(ACC)
        dx, da, rest, dc_new = CELL(whole, dc, saved, h, c, y)
        cells.store(dx_ptr + (row[None, :] * (GATES * H) + u), H, dx, hit, GATES)
        if da_ptr is not None:
            cells.store(da_ptr + (row[None, :] * (GATES * H) + u), H, da, hit, GATES)
        dh_new = rest if GATES == 3 else tl.zeros((TILE_H, TILE_B), ACC)
        for k in tl.static_range(GATES):
            dh_new = product(w[k], da[k].to(w_ptr.dtype.element_ty), dh_new, PRECISION)
        dh = tl.where(hit, dh_new, dh)
        dc = tl.where(hit, dc_new, dc)
    if dh0_ptr is not None:
        tl.store(dh0_ptr + state, dh.to(dh0_ptr.dtype.element_ty), mask=inside)
    if dc0_ptr is not None:
        tl.store(dc0_ptr + state, dc.to(dc0_ptr.dtype.element_ty), mask=inside)


def forward(
    kind: str,
    layout: Layout,
    tile: Tile,
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
    y, y_strides = layout.by_steps(y)
    launch.launch(
        _resident_kernel, layout.directions * tiles.cdiv(layout.b, tile.m),
        y, *last, cells_before, saved, *x, *w, *bias, *states, layout.steps,
        layout.t, layout.b, layout.h, x[0].shape[0], *y_strides, *layout.input_rows,
        CELL=cell.forward, GATES=cell.gates, PACKED=layout.steps is not None,
        PRECISION=precision, ACC=tiles.triton_dtype(accumulate), WIDE=layout.wide or launch.wide(y),
        TILE_B=tile.m, TILE_H=tile.n, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def backward(
    kind: str,
    layout: Layout,
    tile: Tile,
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
    (dy, dy_strides), (y, y_strides) = layout.by_steps(dy), layout.by_steps(y)
    launch.launch(
        _resident_grad_kernel, layout.directions * tiles.cdiv(layout.b, tile.m),
        *dx, *da, *before, *dstates, dy, *dlast, y, cells_before, saved, *w, h0, layout.steps,
        layout.t, layout.b, layout.h, dx[0].shape[0], *dy_strides, *y_strides, *layout.input_rows,
        CELL=cell.gradient, GATES=cell.gates, PACKED=layout.steps is not None,
        PRECISION=precision, ACC=tiles.triton_dtype(accumulate), WIDE=layout.wide or launch.wide(dy, y),
        TILE_B=tile.m, TILE_H=tile.n, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
