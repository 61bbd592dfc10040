"""Adding up what several programs computed, always in the same order: sums here are deterministic, no atomics."""

import torch
import triton
import triton.language as tl

from . import _launch, _tiles, epilogues


@triton.jit
def _sum_partials_kernel(
    partials_ptr, out_ptr, bias_ptr, other_ptr,
    S, M, N, out_m, out_n, other_m, other_n,
    THEN: tl.constexpr, UNDO: tl.constexpr, WIDE: tl.constexpr, TILE_S: tl.constexpr, TILE_L: tl.constexpr,
):  # fmt: skip
    """One program: TILE_L elements of out. Reads them from each of the S partials, in order, and writes them once."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    element = pid * TILE_L + tl.arange(0, TILE_L)
    partial = tl.arange(0, TILE_S)
    size = tl.cast(M, tl.int64) * N  # M may be the constant 1, which has no .to
    inside = element < size
    total = tl.zeros((TILE_L,), partials_ptr.dtype.element_ty)
    for start in range(0, S, TILE_S):
        s = start + partial
        offsets = s.to(tl.int64)[:, None] * size + element[None, :]
        total += tl.sum(tl.load(partials_ptr + offsets, mask=(s < S)[:, None] & inside[None, :], other=0.0), axis=0)
    m = element // N
    n = element % N
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=inside, other=0.0).to(total.dtype)
    if other_ptr is not None:
        other = tl.load(other_ptr + (m * other_m + n * other_n), mask=inside, other=0.0).to(total.dtype)
        total = total + other if UNDO is None else UNDO(total, other)
    if THEN is not None:
        total = THEN(total)
    tl.store(out_ptr + (m * out_m + n * out_n), total.to(out_ptr.dtype.element_ty), mask=inside)


def sum_partials(
    partials: torch.Tensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    then: str | None = None,
    undo: tuple[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """out = then(partials.sum(0) + bias + add), or the gradient of an activation applied to the sum; written into `out`.

    Shape: partials (S, M, N) or (S, N), contiguous; out (M, N) or (N,) and add (M, N), any strides; bias (N,).
    Dtype: partials float32 or float64, the others any floating dtype.

    Args:
        undo: (name of an activation, what it saved, of out's shape (M, N)), as in `matmul`.
    """
    s, n = partials.shape[0], partials.shape[-1]
    m = partials.shape[1] if partials.dim() == 3 else 1
    out_m, out_n = out.stride() if out.dim() == 2 else (0, out.stride(0))
    name, other = undo if undo is not None else (None, add)
    tile = _tiles.sum_partials(s)
    _launch.launch(
        _sum_partials_kernel, _tiles.cdiv(m * n, tile.n),
        partials, out, bias, other, s, m, n, out_m, out_n, *((0, 0) if other is None else other.stride()),
        THEN=epilogues.forward(then), UNDO=epilogues.backward(name), WIDE=m * n >= 2**31 or _launch.wide(out, other),
        TILE_S=tile.m, TILE_L=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    return out


@triton.jit
def _activation_grad_kernel(
    dy_ptr, saved_ptr, dz_ptr, sums_ptr,
    ROWS, M, N, dy_b, dy_m, dy_n, saved_b, saved_m, saved_n, dz_b, dz_m, dz_n,
    UNDO: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_M of the B*M rows by TILE_N columns of dz, and the sums of its columns.

    Reads a tile of dy and of what the activation saved; writes dz, unless there is no activation to undo, and one row
    of partial column sums, unless nobody asked.
    """
    tiles_n = tl.cdiv(N, TILE_N)
    pid_n = tl.program_id(0) % tiles_n
    pid_m = tl.program_id(0) // tiles_n
    if WIDE:
        pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)
    row = pid_m * TILE_M + tl.arange(0, TILE_M)
    n = pid_n * TILE_N + tl.arange(0, TILE_N)
    b = row // M
    m = row % M
    n_inside = n < N
    inside = (row < ROWS)[:, None] & n_inside[None, :]
    dz = tl.load(dy_ptr + ((b * dy_b + m * dy_m)[:, None] + (n * dy_n)[None, :]), mask=inside, other=0.0).to(ACC)
    if UNDO is not None:
        offsets = (b * saved_b + m * saved_m)[:, None] + (n * saved_n)[None, :]
        dz = UNDO(dz, tl.load(saved_ptr + offsets, mask=inside, other=0.0).to(ACC))
        dz = tl.where(inside, dz, 0.0)
        offsets = (b * dz_b + m * dz_m)[:, None] + (n * dz_n)[None, :]
        tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    if sums_ptr is not None:
        tl.store(sums_ptr + (tl.cast(pid_m, tl.int64) * N + n), tl.sum(dz, axis=0), mask=n_inside)


def activation_grad(
    dy: torch.Tensor,
    *,
    undo: tuple[str, torch.Tensor] | None,
    out: torch.Tensor | None = None,
    column_sums: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dz = name_grad(dy, saved) and its column sums, in one pass over memory.

    Shape: dy, saved, out (B, M, N), any strides; the sums (N,) run over B and M.

    Args:
        undo: (name of the activation, what it saved); None: dz is dy itself, and only the sums are computed.
        out: where to write dz; by default a tensor with dy's sizes and saved's strides if those are dense.
        column_sums: also return dz.sum((0, 1)) in this dtype, added up before dz is rounded.
    """
    batch, m, n = dy.shape
    accumulate = torch.promote_types(dy.dtype, torch.float32)
    name, saved = undo if undo is not None else (None, None)
    if saved is not None and out is None:
        out = _launch.empty_like(saved, dy.dtype)
    tile = _tiles.activation_grad(rows_are_contiguous=dy.stride(1) == 1 and dy.stride(2) != 1)
    tiles_m = _tiles.cdiv(batch * m, tile.m)
    sums = None
    if column_sums is not None:
        sums = _launch.empty((tiles_m, n), dtype=accumulate, device=dy.device)
    if saved is not None or sums is not None:
        none = (0, 0, 0)
        wide = dy.numel() >= 2**31 or _launch.wide(dy, saved, out)
        _launch.launch(
            _activation_grad_kernel, tiles_m * _tiles.cdiv(n, tile.n),
            dy, saved, out, sums,
            batch * m, m, n, *dy.stride(),
            *(none if saved is None else saved.stride()), *(none if out is None else out.stride()),
            UNDO=epilogues.backward(name), ACC=_tiles.triton_dtype(accumulate), WIDE=wide,
            TILE_M=tile.m, TILE_N=tile.n, num_warps=tile.warps,
        )  # fmt: skip
    dz = dy if out is None else out
    if sums is None or column_sums is None:
        return dz, None
    return dz, sum_partials(sums, _launch.empty((n,), dtype=column_sums, device=dy.device))
