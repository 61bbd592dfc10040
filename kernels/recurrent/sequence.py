"""A layer's steps in one launch where its recurrent weights fit on the chip, else in one launch each."""

from typing import Any

import torch

from . import resident, steps
from .layout import Layout, Pair


def _contiguous(pair: Pair) -> Pair:
    first, second = [t if t is None else t.contiguous() for t in pair]
    return first, second


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
    """All steps of a layer, from the products of its input.

    Shape, with D directions: x (ROWS, GATES * H) each, contiguous; w (GATES * H, H) each, bias (GATES * H,) each; states and last
        (D, B, H); y (T, B, D * H), (B, T, D * H) or, packed, (ROWS, D * H); cells_before (D, ROWS, H), saved (D, ROWS, 4 * H).
    Dtype: floating, the same for all; precision ("ieee" or "tf32") concerns float32.

    Args:
        kind: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        x: x W_ih^T + b_ih of each direction, the second None if there is one direction.
        states, last: hidden state and an LSTM's cell, before the first step and after the last.
        cells_before, saved: where to write what `backward` needs; None if no gradient is asked for, or where the cell has none.
    """
    rest: Any = (*map(_contiguous, (w, bias, states)), y, last, cells_before, saved, precision)
    tile = resident.tile(layout, y, precision)
    if tile is not None:
        resident.forward(kind, layout, tile, x, *rest)
    else:
        steps.forward(kind, layout, x, *rest)


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
    """The gradients of the gates' shares in all steps, from which all others are products.

    Shape: as in `forward`; dx and da (ROWS, GATES * H), before (ROWS, H), contiguous; dstates (D, B, H), contiguous.
    Dtype: floating, the same for all.

    Args:
        dy, dlast: the gradients of y and of the last states; each may be None.
        dx, da: where to write the gradients of the input's shares and of the hidden state's, of each direction. da is given for
            GRU alone, elsewhere it is dx.
        before: where to write the hidden state before each step, by which W_hh's gradient multiplies; GRU needs it itself.
        dstates: where to write the gradients of the first states; each may be None.
    """
    dlast, (cells_before, saved), (h0, _) = map(_contiguous, (dlast, (cells_before, saved), (h0, None)))
    rest: Any = (dy, dlast, y, cells_before, saved, _contiguous(w), h0, dx, da, before, dstates, precision)
    tile = resident.tile(layout, dx[0], precision)
    if tile is not None:
        resident.backward(kind, layout, tile, *rest)
    else:
        steps.backward(kind, layout, *rest)
