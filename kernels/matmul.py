"""Matrix product with everything that belongs to its epilogue: c = then(a @ b + bias), or c = undo(a @ b, saved).

Operands are read through their strides, so that x @ W.T, dz @ W and dz.T @ x are one kernel and nothing is transposed
in memory. Sums run in float32 (float64 for float64), in a fixed order.
"""

import torch
import triton
import triton.language as tl

from . import _launch, _tiles, epilogues
from .reduce import sum_partials


@triton.jit
def _matmul_kernel(
    a_ptr, b_ptr, c_ptr, bias_ptr, saved_ptr, sums_ptr,
    M, N, K, a_m, a_k, b_k, b_n, c_m, c_n, saved_m, saved_n, k_per_split,
    THEN: tl.constexpr, UNDO: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    K_FITS: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: one tile of c, over one share of K.

    Reads a tile row of a and a tile column of b; writes a tile of c and, if asked, the tile's column sums. With
    SPLITS > 1, c is the workspace (SPLITS, M, N) and the epilogue is left to whoever adds the shares up.
    """
    tiles_m = tl.cdiv(M, TILE_M)
    tiles_n = tl.cdiv(N, TILE_N)
    split = tl.program_id(0) // (tiles_m * tiles_n)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    # Neighbouring programs share rows of a and columns of b in L2: walk GROUP tile rows at a time.
    first_m = tile // (GROUP * tiles_n) * GROUP
    group = min(tiles_m - first_m, GROUP)
    pid_m = first_m + tile % (GROUP * tiles_n) % group
    pid_n = tile % (GROUP * tiles_n) // group

    k = tl.arange(0, TILE_K)
    if WIDE:
        pid_m, pid_n, k = pid_m.to(tl.int64), pid_n.to(tl.int64), k.to(tl.int64)
    m = pid_m * TILE_M + tl.arange(0, TILE_M)
    n = pid_n * TILE_N + tl.arange(0, TILE_N)
    m_inside = m < M
    n_inside = n < N
    begin = split * k_per_split
    end = min(begin + k_per_split, K)

    accumulator = tl.zeros((TILE_M, TILE_N), ACC)
    for start in range(begin, end, TILE_K):
        a_inside = m_inside[:, None]
        b_inside = n_inside[None, :]
        if not K_FITS:
            k_inside = k < end - start
            a_inside = a_inside & k_inside[None, :]
            b_inside = b_inside & k_inside[:, None]
        a = tl.load(a_ptr + (m[:, None] * a_m + (start + k)[None, :] * a_k), mask=a_inside, other=0.0)
        b = tl.load(b_ptr + ((start + k)[:, None] * b_k + n[None, :] * b_n), mask=b_inside, other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=ACC)

    inside = m_inside[:, None] & n_inside[None, :]
    if SPLITS > 1:
        c_ptr += split.to(tl.int64) * M * N
    else:
        if bias_ptr is not None:
            accumulator += tl.load(bias_ptr + n, mask=n_inside, other=0.0).to(ACC)[None, :]
        if THEN is not None:
            accumulator = THEN(accumulator)
        if UNDO is not None:
            saved = tl.load(saved_ptr + (m[:, None] * saved_m + n[None, :] * saved_n), mask=inside, other=0.0)
            accumulator = UNDO(accumulator, saved.to(ACC))
        if sums_ptr is not None:
            sums = tl.sum(tl.where(inside, accumulator, 0.0), axis=0)
            tl.store(sums_ptr + (pid_m.to(tl.int64) * N + n), sums, mask=n_inside)
    tl.store(
        c_ptr + (m[:, None] * c_m + n[None, :] * c_n), accumulator.to(c_ptr.dtype.element_ty), mask=inside
    )  # fmt: skip


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    precision: str,
    bias: torch.Tensor | None = None,
    then: str | None = None,
    undo: tuple[str, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
    column_sums: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """c = then(a @ b + bias), or the gradient of an activation applied to a @ b.

    Shape: a (M, K) and b (K, N), any strides; bias (N,); c (M, N).
    Dtype: float16, bfloat16, float32 or float64, the same for all; precision ("ieee" or "tf32") concerns float32.

    Args:
        then: name of the activation that follows, or None.
        undo: (name of an activation, what it saved): c = name_grad(a @ b, saved). Not together with bias or then.
        out: where to write c, any strides; a new contiguous tensor by default.
        column_sums: also return c.sum(0) in this dtype, added up before c is rounded.
    """
    (m, k), n = a.shape, b.shape[1]
    bias = None if bias is None else bias.contiguous()
    accumulate = torch.promote_types(a.dtype, torch.float32)
    if out is None:
        out = _launch.empty((m, n), dtype=a.dtype, device=a.device)
    saved = None if undo is None else undo[1]
    wide = _launch.wide(a, b, out, saved)
    tile, splits = _tiles.matmul(
        m, n, k, a.dtype, precision, _tiles.device(a.device),
        vectors=not wide and _launch.vectors(a) and _launch.vectors(b), light=undo is None and column_sums is None,
    )  # fmt: skip
    tiles_m, tiles_n = _tiles.cdiv(m, tile.m), _tiles.cdiv(n, tile.n)
    k_per_split = _tiles.cdiv(_tiles.cdiv(k, tile.k), splits) * tile.k
    sums = None
    if column_sums is not None:
        sums = _launch.empty((tiles_m, n), dtype=accumulate, device=a.device)
    c = out if splits == 1 else _launch.empty((splits, m, n), dtype=accumulate, device=a.device)
    _launch.launch(
        _matmul_kernel, tiles_m * tiles_n * splits,
        a, b, c, bias if splits == 1 else None, saved, sums,
        m, n, k, *a.stride(), *b.stride(), *c.stride()[-2:], *(saved.stride() if saved is not None else (0, 0)),
        k_per_split,
        THEN=epilogues.forward(then), UNDO=epilogues.backward(undo[0] if undo else None),
        ACC=_tiles.triton_dtype(accumulate), PRECISION=precision, WIDE=wide, K_FITS=k % tile.k == 0, SPLITS=splits, GROUP=8,
        TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        sum_partials(c, out, bias=bias, then=then)
    if sums is None or column_sums is None:
        return out, None
    total = _launch.empty((n,), dtype=column_sums, device=a.device)
    return out, sum_partials(sums, total)
