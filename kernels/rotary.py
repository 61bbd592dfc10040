"""Rotary position embedding: pairs of features are turned by angles that belong to a position.

    y[a] = x[a] * cos[a] - x[b] * sin[a]
    y[b] = x[b] * cos[b] + x[a] * sin[b]

Of R features the pairs (a, b) are (j, j + R/2) or, interleaved, (2j, 2j + 1), for j < R/2. What lies behind the first R features
is copied. The gradient is the same with the sines' signs changed and exchanged within each pair. Memory decides.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .runtime import launch, tiles
from .runtime.tiles import Tile, cdiv

_ROTARY = Tile(1, 1024, warps=4)
"""n pairs of features, or as many of those that are copied."""


@triton.jit
def _load_pairs(
    rows, stride, hit, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, ACC: tl.constexpr, TILE_N: tl.constexpr
):  # fmt: skip
    """The first and the second features of each row's pairs."""
    if INTERLEAVED:
        d = tl.arange(0, 2 * TILE_N)[None, :]
        both = tl.load(rows[:, None] + d * stride, mask=hit[:, None] & (d < 2 * PAIRS), other=0.0).to(ACC)
        a, b = tl.split(tl.reshape(both, (rows.shape[0], TILE_N, 2)))
    else:
        d = tl.arange(0, TILE_N)[None, :]
        inside = hit[:, None] & (d < PAIRS)
        a = tl.load(rows[:, None] + d * stride, mask=inside, other=0.0).to(ACC)
        b = tl.load(rows[:, None] + (d + PAIRS) * stride, mask=inside, other=0.0).to(ACC)
    return a, b


@triton.jit
def _store_pairs(
    rows, stride, hit, a, b, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, TILE_N: tl.constexpr
):  # fmt: skip
    if INTERLEAVED:
        d = tl.arange(0, 2 * TILE_N)[None, :]
        both = tl.reshape(tl.join(a, b), (rows.shape[0], 2 * TILE_N)).to(rows.dtype.element_ty)
        tl.store(rows[:, None] + d * stride, both, mask=hit[:, None] & (d < 2 * PAIRS))
    else:
        d = tl.arange(0, TILE_N)[None, :]
        inside = hit[:, None] & (d < PAIRS)
        tl.store(rows[:, None] + d * stride, a.to(rows.dtype.element_ty), mask=inside)
        tl.store(rows[:, None] + (d + PAIRS) * stride, b.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    pid, x_ptr, y_ptr, cos_ptr, sin_ptr, ROWS, OUTER, INNER,
    x_b, x_o, x_i, x_d, y_b, y_o, y_i, y_d, cos_b, cos_o, cos_i, sin_b, sin_o, sin_i,
    PAIRS: tl.constexpr, FEATURES: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_REST: tl.constexpr,
):  # fmt: skip
    """TILE_M of the ROWS (b, outer, inner) of x and y."""
    if WIDE:
        pid, x_d, y_d = pid.to(tl.int64), tl.cast(x_d, tl.int64), tl.cast(y_d, tl.int64)
    row = pid * TILE_M + tl.arange(0, TILE_M)
    hit = row < ROWS
    b = row // (OUTER * INNER)
    o = row // INNER % OUTER
    i = row % INNER
    x_rows = x_ptr + (b * x_b + o * x_o + i * x_i)
    y_rows = y_ptr + (b * y_b + o * y_o + i * y_i)
    cos_rows = cos_ptr + (b * cos_b + o * cos_o + i * cos_i)
    sin_rows = sin_ptr + (b * sin_b + o * sin_o + i * sin_i)
    x1, x2 = _load_pairs(x_rows, x_d, hit, PAIRS, INTERLEAVED, ACC, TILE_N)  # pyright: ignore[reportGeneralTypeIssues]
    cos1, cos2 = _load_pairs(cos_rows, 1, hit, PAIRS, INTERLEAVED, ACC, TILE_N)
    sin1, sin2 = _load_pairs(sin_rows, 1, hit, PAIRS, INTERLEAVED, ACC, TILE_N)
    if BACKWARD:
        y1 = x1 * cos1 + x2 * sin2
        y2 = x2 * cos2 - x1 * sin1
    else:
        y1 = x1 * cos1 - x2 * sin1
        y2 = x2 * cos2 + x1 * sin2
    _store_pairs(y_rows, y_d, hit, y1, y2, PAIRS, INTERLEAVED, TILE_N)
    if FEATURES > 2 * PAIRS:
        d = 2 * PAIRS + tl.arange(0, TILE_REST)[None, :]
        inside = hit[:, None] & (d < FEATURES)
        rest = tl.load(x_rows[:, None] + d * x_d, mask=inside, other=0.0)
        tl.store(y_rows[:, None] + d * y_d, rest, mask=inside)


@triton.jit
def _rotary_kernel(
    x_ptr, y_ptr, cos_ptr, sin_ptr, PROGRAMS, ROWS, OUTER, INNER,
    x_b, x_o, x_i, x_d, y_b, y_o, y_i, y_d, cos_b, cos_o, cos_i, sin_b, sin_o, sin_i,
    other_x_ptr, other_y_ptr, OTHER_ROWS, OTHER_OUTER, OTHER_INNER,
    other_x_b, other_x_o, other_x_i, other_x_d, other_y_b, other_y_o, other_y_i, other_y_d,
    other_cos_b, other_cos_o, other_cos_i, other_sin_b, other_sin_o, other_sin_i,
    PAIRS: tl.constexpr, FEATURES: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_REST: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M rows of x, of which the first PROGRAMS take care, or of the other x."""
    pid = tl.program_id(0)
    if pid < PROGRAMS:
        _rotate(pid, x_ptr, y_ptr, cos_ptr, sin_ptr, ROWS, OUTER, INNER,
                x_b, x_o, x_i, x_d, y_b, y_o, y_i, y_d, cos_b, cos_o, cos_i, sin_b, sin_o, sin_i,
                PAIRS, FEATURES, INTERLEAVED, BACKWARD, ACC, WIDE, TILE_M, TILE_N, TILE_REST)  # fmt: skip
    else:
        _rotate(pid - PROGRAMS, other_x_ptr, other_y_ptr, cos_ptr, sin_ptr, OTHER_ROWS, OTHER_OUTER, OTHER_INNER,
                other_x_b, other_x_o, other_x_i, other_x_d, other_y_b, other_y_o, other_y_i, other_y_d,
                other_cos_b, other_cos_o, other_cos_i, other_sin_b, other_sin_o, other_sin_i,
                PAIRS, FEATURES, INTERLEAVED, BACKWARD, ACC, WIDE, TILE_M, TILE_N, TILE_REST)  # fmt: skip


def _walk(x: torch.Tensor, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[int, ...]:
    """Sizes and strides of (batch, outer, inner): of heads and positions, those are inner which lie closer together."""
    heads_inside = x.stride(1) <= x.stride(2)
    order = (0, 2, 1) if heads_inside else (0, 1, 2)
    found = [x.shape[:3].numel(), x.shape[order[1]], x.shape[order[2]]]
    for t in (x, y):
        found += [t.stride(d) for d in (*order, 3)]
    for angles in (cos, sin):
        strides = angles.stride(0), 0, angles.stride(1)
        found += [strides[d] for d in order]
    return tuple(found)


def _power_of_2(n: int) -> int:
    """The next one that isn't less."""
    return 1 << (n - 1).bit_length()


def rotary(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool,
    backward: bool = False,
) -> None:
    """y = x with its first R features turned or, in the backward, the gradient at x of such a result's, for one or two (x, y).

    Shape: each x and y (B, H, L, D), any strides, H its own; cos and sin (B, L, R), any strides, R even and at most D.
    Dtype: floating, the same for all x and y; cos and sin any. Computed in float32 (float64), rounded once.
    """
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    (x, y), (other_x, other_y) = pairs[0], pairs[-1]
    size, features = cos.shape[-1], x.shape[-1]
    tile_n = _power_of_2(max(size // 2, 1))
    tile = tiles.ask("rotary", lambda: (_ROTARY,)) or _ROTARY
    tile_rest = _power_of_2(max(features - size, 1))
    tile_m = min(max(tile.n // max(tile_n, tile_rest // 2), 1), 128)
    programs = [cdiv(x.shape[:3].numel(), tile_m) for x, _ in pairs]
    launch.launch(
        _rotary_kernel, sum(programs), x, y, cos, sin, programs[0], *_walk(x, y, cos, sin),
        other_x, other_y, *_walk(other_x, other_y, cos, sin),
        PAIRS=size // 2, FEATURES=features, INTERLEAVED=interleaved, BACKWARD=backward,
        ACC=tiles.triton_dtype(torch.promote_types(x.dtype, torch.float32)),
        WIDE=launch.wide(*[t for pair in pairs for t in pair], cos, sin),
        TILE_M=tile_m, TILE_N=tile_n, TILE_REST=tile_rest, num_warps=tile.warps,
    )  # fmt: skip
