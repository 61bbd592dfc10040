"""Matrix product with everything that belongs to its epilogue: c = then(a @ b + bias + add), or c = undo(a @ b, saved).

Operands are read in whichever order they lie in memory, so that x @ W.T, dz @ W and dz.T @ x are one kernel and nothing
is transposed in memory. Sums run in float32 (float64 for float64), in a fixed order.

Two kernels, one epilogue: `_matmul_kernel` takes any strides; `_matmul_tma_kernel` leaves fetching tiles to the tensor
memory accelerator of sm_90 and later, which wants aligned rows, and computes no address in its main loop.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _launch, _tiles, epilogues
from .reduce import activation_grad, sum_partials


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile. Neighbouring programs share rows of a and columns of b in L2: walk GROUP tile rows at a
    time."""
    first_m = tile // (GROUP * tiles_n) * GROUP
    group = min(tiles_m - first_m, GROUP)
    return first_m + tile % (GROUP * tiles_n) % group, tile % (GROUP * tiles_n) // group


@triton.jit
def _share(tiles, K, k_per_split, SHARED: tl.constexpr):
    """Which share of K this program takes, where it begins and where it ends."""
    if SHARED:
        split = tl.program_id(0) // tiles
        begin = split * k_per_split
        end = min(begin + k_per_split, K)
    else:
        split = 0
        begin = 0
        end = K
    return split, begin, end


@triton.jit
def _add_rows(rows, a, ACC: tl.constexpr):
    """Add a's row sums to `rows`: a tile of 16 equal columns if a has 16 bits, else a vector.

    A product with ones leaves a in shared memory, where the other product of the step reads it as well; tl.sum would
    pull it through registers, which for 16 bits is the slower way and for float32 the only exact one.
    """
    if a.dtype.primitive_bitwidth == 16:
        rows = tl.dot(a, tl.full((a.shape[1], 16), 1.0, a.dtype), rows, out_dtype=ACC)
    else:
        rows += tl.sum(a.to(ACC), axis=1)
    return rows


@triton.jit
def _store_rows(rows, rows_ptr, split, first_m, M, TILE_M: tl.constexpr):
    if len(rows.shape) == 2:
        rows = tl.sum(tl.where(tl.arange(0, 16)[None, :] == 0, rows, 0.0), axis=1)
    m = first_m + tl.arange(0, TILE_M)
    offsets = tl.cast(split, tl.int64) * M + m
    tl.store(rows_ptr + offsets, rows.to(rows_ptr.dtype.element_ty), mask=m < M)


@triton.jit
def _finish(
    accumulator, c_ptr, bias_ptr, other_ptr, sums_ptr, first_m, first_n, M, N, c_m, c_n, other_m, other_n,
    THEN: tl.constexpr, UNDO: tl.constexpr, ACC: tl.constexpr, TRANSPOSED: tl.constexpr, HALVES: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of one tile. `other` is what UNDO's activation saved or, without UNDO, what is added. With HALVES, one
    half of its columns after the other: a tile that fills the registers leaves no room for the addresses and the other
    values of all of it."""
    if HALVES:
        HALF: tl.constexpr = TILE_N // 2
        left, right = tl.split(tl.permute(tl.reshape(accumulator, (TILE_M, 2, HALF)), (0, 2, 1)))
        _finish(left, c_ptr, bias_ptr, other_ptr, sums_ptr, first_m, first_n, M, N, c_m, c_n, other_m, other_n,
                THEN, UNDO, ACC, TRANSPOSED, False, TILE_M, HALF)  # fmt: skip
        _finish(right, c_ptr, bias_ptr, other_ptr, sums_ptr, first_m, first_n + HALF, M, N, c_m, c_n, other_m, other_n,
                THEN, UNDO, ACC, TRANSPOSED, False, TILE_M, HALF)  # fmt: skip
    else:
        m = first_m + tl.arange(0, TILE_M)
        n = first_n + tl.arange(0, TILE_N)
        m_inside = m < M
        n_inside = n < N
        inside = m_inside[:, None] & n_inside[None, :]
        if bias_ptr is not None:
            if TRANSPOSED:
                accumulator += tl.load(bias_ptr + m, mask=m_inside, other=0.0).to(ACC)[:, None]
            else:
                accumulator += tl.load(bias_ptr + n, mask=n_inside, other=0.0).to(ACC)[None, :]
        if other_ptr is not None:
            other = tl.load(other_ptr + (m[:, None] * other_m + n[None, :] * other_n), mask=inside, other=0.0).to(ACC)
            accumulator = accumulator + other if UNDO is None else UNDO(accumulator, other)
        if THEN is not None:
            accumulator = THEN(accumulator)
        if sums_ptr is not None:
            sums = tl.sum(tl.where(inside, accumulator, 0.0), axis=0)
            tl.store(sums_ptr + (tl.cast(first_m // TILE_M, tl.int64) * N + n), sums, mask=n_inside)
        tl.store(
            c_ptr + (m[:, None] * c_m + n[None, :] * c_n), accumulator.to(c_ptr.dtype.element_ty), mask=inside
        )  # fmt: skip


@triton.jit
def _sum_products(
    a_ptr, b_ptr, m, n, M, N, begin, end, a_m, a_k, b_k, b_n,
    ROWS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, K_FITS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """a[m, begin:end] @ b[begin:end, n] and, with ROWS, the row sums of that part of a."""
    k = tl.arange(0, TILE_K)
    if WIDE:
        k = k.to(tl.int64)
    accumulator = tl.zeros((TILE_M, TILE_N), ACC)
    if ROWS and a_ptr.dtype.element_ty.primitive_bitwidth == 16:
        rows = tl.zeros((TILE_M, 16), ACC)
    else:
        rows = tl.zeros((TILE_M,), ACC)
    for start in range(begin, end, TILE_K):
        a_inside = (m < M)[:, None]
        b_inside = (n < N)[None, :]
        if not K_FITS:
            k_inside = k < end - start
            a_inside = a_inside & k_inside[None, :]
            b_inside = b_inside & k_inside[:, None]
        a = tl.load(a_ptr + (m[:, None] * a_m + (start + k)[None, :] * a_k), mask=a_inside, other=0.0)
        b = tl.load(b_ptr + ((start + k)[:, None] * b_k + n[None, :] * b_n), mask=b_inside, other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=ACC)
        if ROWS:
            rows = _add_rows(rows, a, ACC)
    return accumulator, rows


@triton.jit
def _matmul_kernel(
    c_ptr, a_ptr, b_ptr, bias_ptr, other_ptr, sums_ptr, rows_ptr,
    M, N, K, a_m, a_k, b_k, b_n, c_m, c_n, other_m, other_n, k_per_split,
    THEN: tl.constexpr, UNDO: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    K_FITS: tl.constexpr, SHARED: tl.constexpr, TRANSPOSED: tl.constexpr, HALVES: tl.constexpr, GROUP: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: one tile of c, over one share of K.

    Reads a tile row of a and a tile column of b; writes a tile of c and, if asked, the tile's column sums and, in the
    first column of tiles, the row sums of a. Where K is SHARED out, c is the workspace (shares, M, N), and the epilogue
    is left to whoever adds the shares up.
    """
    tiles_m = tl.cdiv(M, TILE_M)
    tiles_n = tl.cdiv(N, TILE_N)
    split, begin, end = _share(tiles_m * tiles_n, K, k_per_split, SHARED)
    pid_m, pid_n = _place(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    if WIDE:
        pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)
    m = pid_m * TILE_M + tl.arange(0, TILE_M)
    n = pid_n * TILE_N + tl.arange(0, TILE_N)
    if rows_ptr is not None and pid_n == 0:
        accumulator, rows = _sum_products(a_ptr, b_ptr, m, n, M, N, begin, end, a_m, a_k, b_k, b_n,
                                          True, ACC, PRECISION, WIDE, K_FITS, TILE_M, TILE_N, TILE_K)  # fmt: skip
        _store_rows(rows, rows_ptr, split, pid_m * TILE_M, M, TILE_M)
    else:
        accumulator, _ = _sum_products(a_ptr, b_ptr, m, n, M, N, begin, end, a_m, a_k, b_k, b_n,
                                       False, ACC, PRECISION, WIDE, K_FITS, TILE_M, TILE_N, TILE_K)  # fmt: skip
    if SHARED:
        c_ptr += split.to(tl.int64) * M * N
    _finish(accumulator, c_ptr, bias_ptr, other_ptr, sums_ptr, pid_m * TILE_M, pid_n * TILE_N, M, N,
            c_m, c_n, other_m, other_n, THEN, UNDO, ACC, TRANSPOSED, HALVES, TILE_M, TILE_N)  # fmt: skip


@triton.jit
def _sum_tma_products(
    a, b, first_m, first_n, begin, end,
    ROWS: tl.constexpr, A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """As _sum_products, behind descriptors: outside of a matrix they read zeros, so that nothing is masked."""
    accumulator = tl.zeros((TILE_M, TILE_N), tl.float32)
    if ROWS and a.dtype.primitive_bitwidth == 16:
        rows = tl.zeros((TILE_M, 16), tl.float32)
    else:
        rows = tl.zeros((TILE_M,), tl.float32)
    for k in range(begin, end, TILE_K):
        if A_TRANSPOSED:
            a_tile = a.load([k, first_m]).T
        else:
            a_tile = a.load([first_m, k])
        if B_TRANSPOSED:
            b_tile = b.load([first_n, k]).T
        else:
            b_tile = b.load([k, first_n])
        accumulator = tl.dot(a_tile, b_tile, accumulator, input_precision=PRECISION)
        if ROWS:
            rows = _add_rows(rows, a_tile, tl.float32)
    return accumulator, rows


@triton.jit
def _matmul_tma_kernel(
    c_ptr, a, b, bias_ptr, other_ptr, sums_ptr, rows_ptr,
    M, N, K, c_m, c_n, other_m, other_n, k_per_split,
    THEN: tl.constexpr, UNDO: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, PERSISTENT: tl.constexpr, SHARED: tl.constexpr,
    TRANSPOSED: tl.constexpr, HALVES: tl.constexpr, GROUP: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """As _matmul_kernel, for operands behind descriptors: of a (M, K), or (K, M) with A_TRANSPOSED; likewise b.

    PERSISTENT: one program for each multiprocessor takes one tile after the other, and fetches the first operands of
    the next while it writes the last; K isn't shared out then, and nobody sums rows.
    """
    tiles_m = tl.cdiv(M, TILE_M)
    tiles_n = tl.cdiv(N, TILE_N)
    if PERSISTENT:
        # Flattened, the loops over tiles and over K are one, which the compiler pipelines across tiles.
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
            pid_m, pid_n = _place(tile, tiles_m, tiles_n, GROUP)
            accumulator, _ = _sum_tma_products(a, b, pid_m * TILE_M, pid_n * TILE_N, 0, K, False, A_TRANSPOSED,
                                               B_TRANSPOSED, PRECISION, TILE_M, TILE_N, TILE_K)  # fmt: skip
            if WIDE:
                pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)
            _finish(accumulator, c_ptr, bias_ptr, other_ptr, sums_ptr, pid_m * TILE_M, pid_n * TILE_N, M, N,
                    c_m, c_n, other_m, other_n, THEN, UNDO, tl.float32, TRANSPOSED, HALVES, TILE_M, TILE_N)  # fmt: skip
    else:
        split, begin, end = _share(tiles_m * tiles_n, K, k_per_split, SHARED)
        pid_m, pid_n = _place(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
        if rows_ptr is not None and pid_n == 0:
            accumulator, rows = _sum_tma_products(a, b, pid_m * TILE_M, pid_n * TILE_N, begin, end, True, A_TRANSPOSED,
                                                  B_TRANSPOSED, PRECISION, TILE_M, TILE_N, TILE_K)  # fmt: skip
            _store_rows(rows, rows_ptr, split, pid_m * TILE_M, M, TILE_M)
        else:
            accumulator, _ = _sum_tma_products(a, b, pid_m * TILE_M, pid_n * TILE_N, begin, end, False, A_TRANSPOSED,
                                               B_TRANSPOSED, PRECISION, TILE_M, TILE_N, TILE_K)  # fmt: skip
        if WIDE:
            pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)
        if SHARED:
            c_ptr += split.to(tl.int64) * M * N
        _finish(accumulator, c_ptr, bias_ptr, other_ptr, sums_ptr, pid_m * TILE_M, pid_n * TILE_N, M, N,
                c_m, c_n, other_m, other_n, THEN, UNDO, tl.float32, TRANSPOSED, HALVES, TILE_M, TILE_N)  # fmt: skip


def _fits_a_descriptor(matrix: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can fetch tiles of a matrix or of its transpose: base and rows aligned to 16
    bytes, elements of a row next to each other, nothing empty, and indices of 32 bits."""
    row = 1 if matrix.stride(1) == 1 else 0
    return (
        matrix.stride(row) == 1
        and matrix.stride(1 - row) * matrix.itemsize % 16 == 0
        and 0 < matrix.stride(1 - row) * matrix.itemsize < 2**40
        and matrix.data_ptr() % 16 == 0
        and matrix.numel() > 0
        and max(matrix.shape) < 2**31
    )


def _descriptor(matrix: torch.Tensor, rows: int, columns: int) -> tuple[TensorDescriptor, bool]:
    """A descriptor of tiles of rows x columns, and whether it is one of the transpose."""
    if matrix.stride(1) == 1:
        return TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], [rows, columns]), False
    matrix = matrix.T
    return TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], [columns, rows]), True


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    precision: str,
    bias: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    then: str | None = None,
    undo: tuple[str, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
    column_sums: torch.dtype | None = None,
    operand_sums: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """c = then(a @ b + bias + add), or the gradient of an activation applied to a @ b.

    Shape: a (M, K), b (K, N) and add (M, N), any strides; bias (N,); c (M, N).
    Dtype: float16, bfloat16, float32 or float64, the same for all; precision ("ieee" or "tf32") concerns float32.

    Args:
        then: name of the activation that follows, or None.
        undo: (name of an activation, what it saved): c = name_grad(a @ b, saved). Not together with bias, add or then.
        out: where to write c, any strides; a new contiguous tensor by default.
        column_sums: also return c.sum(0) in this dtype, added up before c is rounded.
        operand_sums: also return a.sum(1) in this dtype: of a weight gradient dz.T @ x, the bias gradient. Not together
            with column_sums.
    """
    (m, k), n = a.shape, b.shape[1]
    if operand_sums is not None and n == 0:  # no tile of c, so nobody to add up the rows of a
        out = _launch.empty((m, n), dtype=a.dtype, device=a.device) if out is None else out
        return out, activation_grad(a.T[None], undo=None, column_sums=operand_sums)[1]
    bias = None if bias is None else bias.contiguous()
    accumulate = torch.promote_types(a.dtype, torch.float32)
    if out is None:
        out = _launch.empty((m, n), dtype=a.dtype, device=a.device)
    name, other = undo if undo is not None else (None, add)
    wide = _launch.wide(a, b, out, other)
    plan = _tiles.matmul(
        m, n, k, a.dtype, precision, _tiles.device(a.device),
        vectors=not wide and _launch.vectors(a) and _launch.vectors(b),
        descriptors=_fits_a_descriptor(a) and _fits_a_descriptor(b),
        plain=other is None and not (column_sums or operand_sums) and out.stride(1) == 1 and _fits_a_descriptor(out),
        wide=wide, column_sums=column_sums is not None, operand_sums=operand_sums is not None,
    )  # fmt: skip
    if plan.specialized:
        from . import matmul_specialized  # Gluon, which nothing else needs

        matmul_specialized.matmul(a, b, out, plan, bias=bias, then=then)
        return out, None
    tile, splits = plan.tile, plan.splits
    c, sums, rows = out, None, None
    if splits > 1:
        c = _launch.empty((splits, m, n), dtype=accumulate, device=a.device)
    if column_sums is not None:
        sums = _launch.empty((_tiles.cdiv(m, tile.m), n), dtype=accumulate, device=a.device)
    if operand_sums is not None:
        shape, dtype = ((m,), operand_sums) if splits == 1 else ((splits, m), accumulate)
        rows = _launch.empty(shape, dtype=dtype, device=a.device)

    c_strides, other_strides = c.stride()[-2:], (0, 0) if other is None else other.stride()
    if plan.transposed:  # c^T = b^T @ a^T
        a, b, m, n = b.T, a.T, n, m
        c_strides, other_strides = c_strides[::-1], other_strides[::-1]
    tiles = _tiles.cdiv(m, tile.m) * _tiles.cdiv(n, tile.n)
    alone = splits == 1  # the shares of a sum leave the epilogue to sum_partials
    pointers = (bias if alone else None, other if alone else None, sums, rows)
    sizes = (*c_strides, *other_strides, _tiles.cdiv(_tiles.cdiv(k, tile.k), splits) * tile.k)
    meta = dict(
        THEN=epilogues.forward(then if alone else None), UNDO=epilogues.backward(name if alone else None),
        PRECISION=plan.precision, WIDE=wide, SHARED=splits > 1, TRANSPOSED=plan.transposed,
        HALVES=tile.fills_registers, GROUP=8,
        TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if plan.descriptors:
        a_tiles, a_transposed = _descriptor(a, tile.m, tile.k)
        b_tiles, b_transposed = _descriptor(b, tile.k, tile.n)
        _launch.launch(
            _matmul_tma_kernel, min(tiles, plan.programs) if plan.programs else tiles * splits,
            c, a_tiles, b_tiles, *pointers, m, n, k, *sizes,
            A_TRANSPOSED=a_transposed, B_TRANSPOSED=b_transposed, PERSISTENT=plan.programs > 0, **meta,
        )  # fmt: skip
    else:
        _launch.launch(
            _matmul_kernel, tiles * splits, c, a, b, *pointers, m, n, k, *a.stride(), *b.stride(), *sizes,
            ACC=_tiles.triton_dtype(accumulate), K_FITS=k % tile.k == 0, **meta,
        )  # fmt: skip

    if splits > 1:
        sum_partials(c, out, bias=bias, add=add, then=then, undo=undo)
    if rows is not None and operand_sums is not None and splits > 1:
        rows = sum_partials(rows, _launch.empty(rows.shape[1:], dtype=operand_sums, device=a.device))
    if sums is not None and column_sums is not None:
        sums = sum_partials(sums, _launch.empty((n,), dtype=column_sums, device=a.device))
    return out, rows if sums is None else sums
