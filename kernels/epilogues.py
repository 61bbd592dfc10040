"""Functions on a tile in registers, and their derivatives.

Each activation is a pair: `name(x)` and `name_grad(dy, saved)`, where `saved` is whatever the activation's record says
it saves (its output, for ReLU). The stand-alone kernels, the epilogues of the matrix products and of the convolution,
and their backward passes all call the same pair, so an activation is written once.

A tile comes in its accumulation dtype (float32, or float64), never in 16 bits.
"""

from collections.abc import Callable

import triton
import triton.language as tl


@triton.jit
def relu(x):
    # Not tl.maximum(x, 0) nor tl.where(x > 0, x, 0): both compile to an instruction that turns NaN into 0.
    return tl.where(x < 0, 0.0, x)


@triton.jit
def relu_grad(dy, y):
    # torch's rule: a NaN output passes the gradient on.
    return tl.where(y <= 0, 0.0, dy)


def forward(name: str | None) -> Callable | None:
    """The tile function called `name`; None stays None (no activation)."""
    return None if name is None else globals()[name]


def backward(name: str | None) -> Callable | None:
    """The derivative of the tile function called `name`; None stays None."""
    return None if name is None else globals()[f"{name}_grad"]
