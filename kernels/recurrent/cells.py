"""The cells of recurrent layers, as functions of tiles in registers, and what they compute of one step's products.

A step has two products: x W_ih^T + b_ih of its input and h W_hh^T + b_hh of the hidden state before it. A cell is a pair of tile
functions of these. Its gates are tuples of as many tiles as W has blocks of H rows:

    cell(x, a, h, c) -> h', c', saved
    cell_grad(dh, dc, saved, h, c, h') -> gradients of x, of a, of h but for that through a, and of c

x and a are the gates' shares of the input and of the hidden state; h, c and h', c' the states before and after the step. Only
LSTM has a c. `saved` is what the gradient needs beside the states: nothing for RNN, four tiles for the others.

    LSTM: i, f, o = sigmoid(x + a), g = tanh(x + a),  c' = f c + i g,  h' = o tanh(c')
    GRU:  r, z = sigmoid(x + a), n = tanh(x + r a),   h' = n + z (h - n)
    RNN:  h' = tanh(x + a), or relu
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .. import activations
from ..runtime import launch, tiles
from ..runtime.tiles import Tile

_CELL = Tile(1, 512, warps=4)
"""n units of one step."""


@triton.jit
def lstm(x, a, h, c):
    i = activations.sigmoid(x[0] + a[0], None)
    f = activations.sigmoid(x[1] + a[1], None)
    g = activations.tanh(x[2] + a[2], None)
    o = activations.sigmoid(x[3] + a[3], None)
    c = f * c + i * g
    return o * activations.tanh(c, None), c, (i, f, g, o)


@triton.jit
def lstm_grad(dh, dc, saved, h, c, y):
    i, f, g, o = saved
    t = activations.tanh(f * c + i * g, None)  # the cell's new state is computed again, which saves keeping it
    dc += dh * o * (1 - t * t)
    da = (dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * t * o * (1 - o))
    return da, da, dh, dc * f


@triton.jit
def gru(x, a, h, c):
    r = activations.sigmoid(x[0] + a[0], None)
    z = activations.sigmoid(x[1] + a[1], None)
    n = activations.tanh(x[2] + r * a[2], None)
    return n + z * (h - n), c, (r, z, n, a[2])


@triton.jit
def gru_grad(dh, dc, saved, h, c, y):
    r, z, n, a = saved
    dn = dh * (1 - z) * (1 - n * n)
    dr = dn * a * r * (1 - r)
    dz = dh * (h - n) * z * (1 - z)
    return (dr, dz, dn), (dr, dz, dn * r), dh * z, dc


@triton.jit
def rnn_tanh(x, a, h, c):
    return activations.tanh(x[0] + a[0], None), c, (h,)


@triton.jit
def rnn_tanh_grad(dh, dc, saved, h, c, y):
    da = (activations.tanh_grad(dh, y, None),)
    return da, da, dh, dc


@triton.jit
def rnn_relu(x, a, h, c):
    return activations.relu(x[0] + a[0], None), c, (h,)


@triton.jit
def rnn_relu_grad(dh, dc, saved, h, c, y):
    da = (activations.relu_grad(dh, y, None),)
    return da, da, dh, dc


class Cell(NamedTuple):
    """A kind of cell. Kernels know by the number of its gates which states it has: 1 RNN, 3 GRU, 4 LSTM."""

    gates: int
    forward: Callable[..., Any]
    gradient: Callable[..., Any]

    @property
    def saved(self) -> int:
        """How many tiles the gradient needs beside the states."""
        return 0 if self.gates == 1 else 4


CELLS = {
    "lstm": Cell(4, lstm, lstm_grad),
    "gru": Cell(3, gru, gru_grad),
    "rnn_tanh": Cell(1, rnn_tanh, rnn_tanh_grad),
    "rnn_relu": Cell(1, rnn_relu, rnn_relu_grad),
}


@triton.jit
def load(pointers, step, inside, COUNT: tl.constexpr, ACC: tl.constexpr):
    """A tuple of so many tiles, `step` elements apart."""
    first = tl.load(pointers, mask=inside, other=0.0).to(ACC)
    if COUNT == 1:
        found = (first,)
    else:
        second = tl.load(pointers + step, mask=inside, other=0.0).to(ACC)
        third = tl.load(pointers + 2 * step, mask=inside, other=0.0).to(ACC)
        if COUNT == 3:
            found = (first, second, third)
        else:
            found = (first, second, third, tl.load(pointers + 3 * step, mask=inside, other=0.0).to(ACC))
    return found


@triton.jit
def store(pointers, step, values, inside, COUNT: tl.constexpr):
    """A tuple of so many tiles, `step` elements apart."""
    for k in tl.static_range(COUNT):
        tl.store(pointers + k * step, values[k].to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def _cell_kernel(
    x_ptr, a_ptr, h_ptr, c_ptr, y_ptr, cy_ptr, saved_ptr, SIZE, H, h_b, h_u, c_b, c_u, y_b, y_u,
    CELL: tl.constexpr, GATES: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: TILE units of the batch's SIZE."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    i = pid * TILE + tl.arange(0, TILE)
    inside = i < SIZE
    b = i // H
    u = i % H
    gates = b * (GATES * H) + u
    x = load(x_ptr + gates, H, inside, GATES, ACC)
    a = load(a_ptr + gates, H, inside, GATES, ACC)
    h = tl.zeros((TILE,), ACC)
    c = tl.zeros((TILE,), ACC)
    if GATES == 3:
        h = tl.load(h_ptr + (b * h_b + u * h_u), mask=inside, other=0.0).to(ACC)
    if GATES == 4:
        c = tl.load(c_ptr + (b * c_b + u * c_u), mask=inside, other=0.0).to(ACC)
    y, cy, saved = CELL(x, a, h, c)
    tl.store(y_ptr + (b * y_b + u * y_u), y.to(y_ptr.dtype.element_ty), mask=inside)
    if GATES == 4:
        tl.store(cy_ptr + i, cy.to(cy_ptr.dtype.element_ty), mask=inside)
    if saved_ptr is not None:
        store(saved_ptr + (b * (4 * H) + u), H, saved, inside, 4)


@triton.jit
def _cell_grad_kernel(
    dx_ptr, da_ptr, dh_ptr, dc_ptr, dy_ptr, dcy_ptr, saved_ptr, h_ptr, c_ptr, y_ptr,
    SIZE, H, dy_b, dy_u, dcy_b, dcy_u, h_b, h_u, c_b, c_u, y_b, y_u,
    CELL: tl.constexpr, GATES: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of TILE units' gates and states. da is None where it is the same as dx."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    i = pid * TILE + tl.arange(0, TILE)
    inside = i < SIZE
    b = i // H
    u = i % H
    gates = b * (GATES * H) + u
    dh = tl.zeros((TILE,), ACC)
    dc = tl.zeros((TILE,), ACC)
    h = tl.zeros((TILE,), ACC)
    c = tl.zeros((TILE,), ACC)
    y = tl.zeros((TILE,), ACC)
    saved = (h,)
    if dy_ptr is not None:
        dh = tl.load(dy_ptr + (b * dy_b + u * dy_u), mask=inside, other=0.0).to(ACC)
    if dcy_ptr is not None:
        dc = tl.load(dcy_ptr + (b * dcy_b + u * dcy_u), mask=inside, other=0.0).to(ACC)
    if GATES == 1:
        y = tl.load(y_ptr + (b * y_b + u * y_u), mask=inside, other=0.0).to(ACC)
    else:
        saved = load(saved_ptr + (b * (4 * H) + u), H, inside, 4, ACC)
    if GATES == 3:
        h = tl.load(h_ptr + (b * h_b + u * h_u), mask=inside, other=0.0).to(ACC)
    if GATES == 4:
        c = tl.load(c_ptr + (b * c_b + u * c_u), mask=inside, other=0.0).to(ACC)
    dx, da, dh, dc = CELL(dh, dc, saved, h, c, y)
    store(dx_ptr + gates, H, dx, inside, GATES)
    if da_ptr is not None:
        store(da_ptr + gates, H, da, inside, GATES)
    if dh_ptr is not None:
        tl.store(dh_ptr + i, dh.to(dh_ptr.dtype.element_ty), mask=inside)
    if dc_ptr is not None:
        tl.store(dc_ptr + i, dc.to(dc_ptr.dtype.element_ty), mask=inside)


def _strides(*states: torch.Tensor | None) -> list[int]:
    """Of each state, along the batch and along the units."""
    return [stride for state in states for stride in ((0, 0) if state is None else state.stride())]


def cell(
    kind: str,
    x: torch.Tensor,
    a: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor | None,
    y: torch.Tensor,
    cy: torch.Tensor | None,
    saved: torch.Tensor | None,
) -> None:
    """The states after one step: y, and cy of an LSTM.

    Shape: x and a (B, GATES * H), saved (B, 4 * H), cy (B, H), contiguous; h, c and y (B, H), any strides.
    Dtype: floating, the same for all.

    Args:
        kind: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        saved: where to write what `cell_grad` needs; None if no gradient is asked for, or for RNN.
    """
    cell, accumulate = CELLS[kind], torch.promote_types(y.dtype, torch.float32)
    tile = tiles.ask("cell", lambda: (_CELL,)) or _CELL
    launch.launch(
        _cell_kernel, tiles.cdiv(y.numel(), tile.n),
        x, a, h, c, y, cy, saved, y.numel(), y.shape[1], *_strides(h, c, y),
        CELL=cell.forward, GATES=cell.gates, ACC=tiles.triton_dtype(accumulate),
        WIDE=launch.wide(h, c, y, elements=4 * y.numel()), TILE=tile.n, num_warps=tile.warps,
    )  # fmt: skip


def cell_grad(
    kind: str,
    dy: torch.Tensor | None,
    dcy: torch.Tensor | None,
    saved: torch.Tensor | None,
    h: torch.Tensor | None,
    c: torch.Tensor | None,
    y: torch.Tensor | None,
    dx: torch.Tensor,
    da: torch.Tensor | None,
    dh: torch.Tensor | None,
    dc: torch.Tensor | None,
) -> None:
    """The gradients of what `cell` was given: dx, da, dc, and of dh what doesn't go through a.

    Shape: dx and da (B, GATES * H), dh and dc (B, H), contiguous; saved as `cell`'s; dy, dcy, h, c, y (B, H), any strides.
    Dtype: floating, the same for all.

    Args:
        dy, dcy: one of them may be None.
        h, c, y: those that the cell needs: h for GRU, c for LSTM, y for RNN.
        da, dh: for GRU alone. Elsewhere da is dx, and all of h's gradient goes through it.
    """
    cell, accumulate = CELLS[kind], torch.promote_types(dx.dtype, torch.float32)
    tile = tiles.ask("cell", lambda: (_CELL,)) or _CELL
    units = dx.shape[1] // cell.gates
    size = dx.shape[0] * units
    saved = None if saved is None else saved.contiguous()
    launch.launch(
        _cell_grad_kernel, tiles.cdiv(size, tile.n),
        dx, da, dh, dc, dy, dcy, saved, h, c, y, size, units, *_strides(dy, dcy, h, c, y),
        CELL=cell.gradient, GATES=cell.gates, ACC=tiles.triton_dtype(accumulate),
        WIDE=launch.wide(dy, dcy, h, c, y, elements=4 * size), TILE=tile.n, num_warps=tile.warps,
    )  # fmt: skip
