"""Where the numbers of a sequence lie, and what the kernels of whole sequences share.

Rows are a step of a sequence. The input's rows, those of its products, and those of the gates are in the order in which the input
lies: by steps or, batch_first, by sequences. The output's rows are by steps. Sequences of different lengths are packed: a step
begins at row `first` and has as many rows as sequences run, `count`, the longest first. That is what `steps` says; None where all
are of one length.

The two directions of a layer are two halves of one grid. The backward one goes through its steps from the last to the first.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

Pair = tuple[Any, Any]
"""Two tensors or None: of the forward direction and of the backward one, or a hidden state and an LSTM's cells."""


class Layout(NamedTuple):
    """T steps of B sequences with H units, in one or two directions."""

    t: int
    b: int
    h: int
    directions: int
    batch_first: bool
    steps: torch.Tensor | None
    """(2, T): first and count."""

    @property
    def input_rows(self) -> tuple[int, int]:
        """Rows of the input from a step to the next (in packed ones, from `first` on), and from a sequence to the next."""
        return (1, 1) if self.steps is not None else (1, self.t) if self.batch_first else (self.b, 1)

    @property
    def wide(self) -> bool:
        """Whether offsets into the gates need 64 bits."""
        return self.directions * self.t * self.b * self.h * 4 >= 2**31

    def by_steps(self, t: torch.Tensor | None) -> tuple[torch.Tensor | None, tuple[int, int]]:
        """A tensor in the output's shape with contiguous units, and its strides along steps and sequences."""
        if t is None:
            return None, (0, 0)
        t = t if t.stride(-1) == 1 else t.contiguous()
        if self.steps is not None:
            return t, (t.stride(0), t.stride(0))
        return t, (t.stride(1), t.stride(0)) if self.batch_first else (t.stride(0), t.stride(1))


@triton.jit
def of_direction(d, forward_ptr, backward_ptr):
    """The pointer that direction d takes of these; the second is None where there is one direction."""
    if backward_ptr is None:
        found = forward_ptr
    else:
        found = forward_ptr if d == 0 else backward_ptr
    return found


@triton.jit
def step(steps_ptr, t, b, T, B, PACKED: tl.constexpr, WIDE: tl.constexpr):
    """Of step t, which may be none: where it begins, and which of the sequences b run then."""
    there = (t >= 0) & (t < T)
    if PACKED:
        start = tl.load(steps_ptr + t, mask=there, other=0)
        count = tl.load(steps_ptr + T + t, mask=there, other=0)
        runs = b < count
    else:
        start = tl.cast(t, tl.int64) if WIDE else t
        runs = (b < B) & there
    return start, runs


@triton.jit
def product(w, h, total, PRECISION: tl.constexpr):
    """total + w h."""
    return tl.dot(w, h, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def products(w, h, total, PRECISION: tl.constexpr, GATES: tl.constexpr):
    """Each gate's block of weights times the hidden states, added to its total."""
    first = product(w[0], h, total[0], PRECISION)
    if GATES == 1:
        found = (first,)
    else:
        second = product(w[1], h, total[1], PRECISION)
        third = product(w[2], h, total[2], PRECISION)
        if GATES == 3:
            found = (first, second, third)
        else:
            found = (first, second, third, product(w[3], h, total[3], PRECISION))
    return found


@triton.jit
def biases(pointers, H, inside, GATES: tl.constexpr, ACC: tl.constexpr, TILE_B: tl.constexpr):
    """Each gate's bias for TILE_B sequences; zeros where there is none."""
    none = tl.zeros((inside.shape[0], TILE_B), ACC)
    if pointers is None:
        found = (none, none, none, none)
    else:
        first = tl.load(pointers, mask=inside, other=0.0).to(ACC) + none
        found = (first, first, first, first)
        if GATES > 1:
            second = tl.load(pointers + H, mask=inside, other=0.0).to(ACC) + none
            third = tl.load(pointers + 2 * H, mask=inside, other=0.0).to(ACC) + none
            found = (first, second, third, first)
            if GATES == 4:
                found = (first, second, third, tl.load(pointers + 3 * H, mask=inside, other=0.0).to(ACC) + none)
    return found
