"""Windows of images as columns, and the sum of windows back into images. Each is the gradient of the other.

    unfold   y[n, (c, r, s), (p, q)] = x[n, c, p*stride - padding + r*dilation, q*stride - padding + s*dilation]
    fold     y[n, c, h, w]           = the sum of x[n, (c, r, s), (p, q)] over all that `unfold` reads from (h, w)

Both gather: a pixel of a folded image adds up its windows in a fixed order, where scattering would need atomic operations, as the
gradient of pooling does. Memory decides about them.
"""

import torch
import triton
import triton.language as tl

from ..runtime import launch, tiles
from ..runtime.tiles import Tile
from .positions import holder
from .windows import Windows, number_of_windows

_FOLD = Tile(4, 256, warps=4)
"""m rows, which for `unfold` are taps of images, for `fold` images, both of one channel; n consecutive elements of each."""


@triton.jit
def _tile(ROWS, COLUMNS, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    """The rows and columns of this program, and which of its elements exist."""
    tiles_n = tl.cdiv(COLUMNS, TILE_N)
    pid_n = tl.program_id(0) % tiles_n
    pid_m = tl.program_id(0) // tiles_n
    if WIDE:
        pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)
    m = pid_m * TILE_M + tl.arange(0, TILE_M)
    n = pid_n * TILE_N + tl.arange(0, TILE_N)
    return m, n, (m < ROWS)[:, None] & (n < COLUMNS)[None, :]


@triton.jit
def _unfold_kernel(
    x_ptr, y_ptr, ROWS, C, H, W, OH, OW, x_n, x_c, x_h, x_w, pad_h, pad_w,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M of the ROWS (n, c, r, s) of y by TILE_N of its windows."""
    m, window, inside = _tile(ROWS, OH * OW, WIDE, TILE_M, TILE_N)
    h = (m // S % R * DILATION_H - pad_h)[:, None] + (window // OW * STRIDE_H)[None, :]
    w = (m % S * DILATION_W - pad_w)[:, None] + (window % OW * STRIDE_W)[None, :]
    channel = m // (R * S)
    hit = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    x = tl.load(x_ptr + ((channel // C * x_n + channel % C * x_c)[:, None] + h * x_h + w * x_w), mask=hit, other=0.0)
    tl.store(y_ptr + (m[:, None] * (OH * OW) + window[None, :]), x, mask=inside)


@triton.jit
def _fold_kernel(
    x_ptr, y_ptr, ROWS, C, H, W, OH, OW, x_n, x_row, x_window, pad_h, pad_w,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, HOLDERS_H: tl.constexpr, HOLDERS_W: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M of the ROWS (n, c) of y by TILE_N pixels, each from the windows that may hold it. A channel has R*S
    rows in x, one for each tap."""
    m, pixel, inside = _tile(ROWS, H * W, WIDE, TILE_M, TILE_N)
    h = pixel // W
    w = pixel % W
    first = (m // C * x_n + m % C * (R * S) * x_row)[:, None]
    total = tl.zeros((TILE_M, TILE_N), ACC)
    for i in range(HOLDERS_H):
        oh, r, row_held = holder(h, i, H, OH, R, STRIDE_H, DILATION_H, pad_h, False)
        for j in tl.range(0, HOLDERS_W, loop_unroll_factor=4):
            ow, s, held = holder(w, j, W, OW, S, STRIDE_W, DILATION_W, pad_w, False)
            offsets = first + ((r * S + s) * x_row + (oh * OW + ow) * x_window)[None, :]
            total += tl.load(x_ptr + offsets, mask=inside & (row_held & held)[None, :], other=0.0).to(ACC)
    tl.store(y_ptr + (m[:, None] * (H * W) + pixel[None, :]), total.to(y_ptr.dtype.element_ty), mask=inside)


def _constexprs(windows: Windows) -> dict[str, int]:
    """The sizes that the kernels are compiled for."""
    names = ("R", "S", "STRIDE_H", "STRIDE_W", "DILATION_H", "DILATION_W")
    return dict(zip(names, (*windows.kernel[1:], *windows.stride[1:], *windows.dilation[1:]), strict=True))


def unfold(x: torch.Tensor, y: torch.Tensor, windows: Windows) -> None:
    """Shape: x (N, C, H, W), any strides; y (N, C*R*S, windows), contiguous. Dtype: the same."""
    n, c, h, w = x.shape
    rows, (_, oh, ow) = n * y.shape[1], number_of_windows((1, h, w), *windows[:4])
    tile = tiles.ask("fold", lambda: (_FOLD,)) or _FOLD
    launch.launch(
        _unfold_kernel, tiles.cdiv(rows, tile.m) * tiles.cdiv(oh * ow, tile.n),
        x, y, rows, c, h, w, oh, ow, *x.stride(), *windows.padding[1:],
        **_constexprs(windows), WIDE=launch.wide(x, y), TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip


def fold(x: torch.Tensor, y: torch.Tensor, windows: Windows) -> None:
    """Shape: x (N, C*R*S, windows), any strides; y (N, C, H, W), contiguous. Dtype: the same; sums in float32 (float64)."""
    n, c, h, w = y.shape
    _, oh, ow = number_of_windows((1, h, w), *windows[:4])
    _, *holders = windows.holders((1, h, w), (1, oh, ow))
    tile = tiles.ask("fold", lambda: (_FOLD,)) or _FOLD
    launch.launch(
        _fold_kernel, tiles.cdiv(n * c, tile.m) * tiles.cdiv(h * w, tile.n),
        x, y, n * c, c, h, w, oh, ow, *x.stride(), *windows.padding[1:],
        **_constexprs(windows), HOLDERS_H=holders[0], HOLDERS_W=holders[1],
        ACC=tiles.triton_dtype(torch.promote_types(x.dtype, torch.float32)),
        WIDE=launch.wide(x, y), TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
    )  # fmt: skip
