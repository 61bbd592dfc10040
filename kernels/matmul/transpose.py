"""Copies of operands in which k runs along memory, for products that tensor cores compute in TF32.

Tensor cores read TF32 from shared memory with k contiguous alone. A tile that arrives otherwise is transposed in the main loop,
through registers, and the stores of neighbouring threads fall into the same two banks: they take four times as long as the
products. A copy moves eight bytes of memory for each element, once, where the loop transposes an element for each tile of c that
it contributes to.
"""

import math

import torch
import triton
import triton.language as tl

from ..runtime import launch, tiles
from ..runtime.tiles import Tile

_TILE = Tile(64, 64, warps=8)


@triton.jit
def _transpose_kernel(
    x_ptr, y_ptr, ROWS, COLUMNS, x_row, y_row,
    RUN: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M rows of x (ROWS, COLUMNS) by TILE_N columns, which become rows of y, y_row elements apart and zero
    beyond ROWS. RUN elements of a row are loaded at once, and 4 are stored."""
    # So the compiler sees what divides them.
    x_row, COLUMNS, y_row = x_row // 4 * 4, COLUMNS // RUN * RUN, y_row // 4 * 4
    tiles_n = tl.cdiv(COLUMNS, TILE_N)
    pid_n = tl.program_id(0) % tiles_n
    pid_m = tl.program_id(0) // tiles_n
    if WIDE:
        pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)
    m = pid_m * TILE_M + tl.arange(0, TILE_M)
    n = pid_n * TILE_N + tl.arange(0, TILE_N)
    inside = (m < ROWS)[:, None] & (n < COLUMNS)[None, :]
    x = tl.load(x_ptr + (m[:, None] * x_row + n[None, :]), mask=inside, other=0.0)
    tl.store(y_ptr + (n[:, None] * y_row + m[None, :]), x.T, mask=(n < COLUMNS)[:, None] & (m < y_row)[None, :])


def columns_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it, with contiguous columns, which begin at multiples of 16 bytes.

    Shape: x (M, N), which a descriptor can read: columns or rows are contiguous, and begin at multiples of 16 bytes.
    Dtype: float32.
    """
    if x.stride(0) == 1:
        return x
    rows, columns = x.shape
    y = launch.empty((columns, tiles.cdiv(rows, 4) * 4), dtype=x.dtype, device=x.device)
    launch.launch(
        _transpose_kernel, tiles.cdiv(rows, _TILE.m) * tiles.cdiv(columns, _TILE.n),
        x, y, rows, columns, x.stride(0), y.stride(0),
        RUN=math.gcd(columns, 4), WIDE=launch.wide(x, y), TILE_M=_TILE.m, TILE_N=_TILE.n, num_warps=_TILE.warps,
    )  # fmt: skip
    return y[:, :rows].T
