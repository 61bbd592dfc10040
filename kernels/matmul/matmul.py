"""Matrix product with everything that belongs to its epilogue: c = then(z = a @ b + bias + add), or c = undo(a @ b, saved).

Operands may have any strides, so that x @ W.T, dz @ W and dz.T @ x are the same kernel and nothing is transposed in memory.
Sums run in float32, or in float64 for float64, and in a fixed order.

There are two kernels with the same epilogue. `_matmul_kernel` loads tiles through pointers with any strides.
`_matmul_tma_kernel` lets the tensor memory accelerator of sm_90 and later fetch them, which requires aligned rows and leaves no
addresses to compute in the main loop.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import epilogues
from ..reduce import activation_grad, sum_partials
from ..runtime import launch, tiles
from . import tiles as picks
from . import turned
from .transpose import columns_contiguous


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile. The tiles of GROUP rows are taken column by column, so that programs that run at the same time
    share rows of a and columns of b in the L2 cache."""
    first_m = tile // (GROUP * tiles_n) * GROUP
    group = min(tiles_m - first_m, GROUP)
    return first_m + tile % (GROUP * tiles_n) % group, tile % (GROUP * tiles_n) // group


@triton.jit
def _share(tiles, K, k_per_split, SHARED: tl.constexpr):
    """Which share of K this program sums over, and its begin and end."""
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
    """Add the row sums of a to `rows`, which is a tile of 16 equal columns if a has 16 bits, else a vector.

    In 16 bits they are a product with ones, because that reads a from shared memory, as the step's other product does, while
    tl.sum would load a into registers. In float32 only tl.sum is exact.
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
    accumulator, c_ptr, z_ptr, bias_ptr, other_ptr, sums_ptr, first_m, first_n, M, N, c_m, c_n, other_m, other_n,
    A, THEN: tl.constexpr, UNDO: tl.constexpr, ACC: tl.constexpr, TRANSPOSED: tl.constexpr,
    HALVES: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of one tile. `other` is what UNDO's activation saved or, without UNDO, what is added. z is c before THEN, and
    has the strides of c. The columns are halved HALVES times, and the parts are computed one after the other: a tile that
    fills the registers leaves no room for its addresses and operands."""
    if HALVES:
        HALF: tl.constexpr = TILE_N // 2
        left, right = tl.split(tl.permute(tl.reshape(accumulator, (TILE_M, 2, HALF)), (0, 2, 1)))
        _finish(left, c_ptr, z_ptr, bias_ptr, other_ptr, sums_ptr, first_m, first_n, M, N, c_m, c_n, other_m, other_n,
                A, THEN, UNDO, ACC, TRANSPOSED, HALVES - 1, TILE_M, HALF)  # fmt: skip
        _finish(right, c_ptr, z_ptr, bias_ptr, other_ptr, sums_ptr, first_m, first_n + HALF, M, N, c_m, c_n,
                other_m, other_n, A, THEN, UNDO, ACC, TRANSPOSED, HALVES - 1, TILE_M, HALF)  # fmt: skip
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
            accumulator = accumulator + other if UNDO is None else UNDO(accumulator, other, A)
        if THEN is not None:
            if z_ptr is not None:
                z = accumulator.to(z_ptr.dtype.element_ty)
                tl.store(z_ptr + (m[:, None] * c_m + n[None, :] * c_n), z, mask=inside)
            accumulator = THEN(accumulator, A)
        if sums_ptr is not None:
            sums = tl.sum(tl.where(inside, accumulator, 0.0), axis=0)
            tl.store(sums_ptr + (tl.cast(first_m // TILE_M, tl.int64) * N + n), sums, mask=n_inside)
        tl.store(
            c_ptr + (m[:, None] * c_m + n[None, :] * c_n), accumulator.to(c_ptr.dtype.element_ty), mask=inside
        )  # fmt: skip


@triton.jit
def _sum_products(
    a_ptr, b_ptr, m, n, first_n, M, N, begin, end, a_m, a_k, b_k, b_n,
    ROWS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, K_FITS: tl.constexpr,
    TURNED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """a[m, begin:end] @ b[begin:end, n] and, with ROWS, the row sums of that part of a. n begins at first_n."""
    k = tl.arange(0, TILE_K)
    if WIDE:
        k = k.to(tl.int64)
    if TURNED:
        turned_k, turned_n = turned.places(TILE_K, TILE_N)
        turned_k, turned_n = turned_k.to(k.dtype), first_n + turned_n
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
        if TURNED:
            b_inside = (turned_n < N) & (turned_k < end - start)
            b = turned.load(b_ptr, (start + turned_k) * b_k + turned_n * b_n, b_inside, TILE_K, TILE_N)
        else:
            b = tl.load(b_ptr + ((start + k)[:, None] * b_k + n[None, :] * b_n), mask=b_inside, other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=ACC)
        if ROWS:
            if PRECISION == "tf32":
                # The product reads a from shared memory while the loop goes on. If threads read the same buffer, the compiler
                # makes one buffer too few, and the next fetch overwrites what the product still reads. Another eviction
                # policy keeps the compiler from making one load of two.
                a = tl.load(
                    a_ptr + (m[:, None] * a_m + (start + k)[None, :] * a_k),
                    mask=a_inside, other=0.0, eviction_policy="evict_last",
                )  # fmt: skip
            rows = _add_rows(rows, a, ACC)
    return accumulator, rows


@triton.jit
def _matmul_kernel(
    c_ptr, a_ptr, b_ptr, z_ptr, bias_ptr, other_ptr, sums_ptr, rows_ptr,
    M, N, K, a_m, a_k, b_k, b_n, c_m, c_n, other_m, other_n, k_per_split, A0: tl.float64, A1: tl.float64,
    THEN: tl.constexpr, UNDO: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, K_FITS: tl.constexpr, TURNED: tl.constexpr, SHARED: tl.constexpr, TRANSPOSED: tl.constexpr,
    HALVES: tl.constexpr, GROUP: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program: one tile of c, over one share of K.

    Reads a tile row of a and a tile column of b; writes a tile of c and, if asked, of z, the tile's column sums and, in the
    first column of tiles, the row sums of a. If K is SHARED out, c is the workspace (shares, M, N), and `sum_partials` applies
    the epilogue.
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
        accumulator, rows = _sum_products(a_ptr, b_ptr, m, n, pid_n * TILE_N, M, N, begin, end, a_m, a_k, b_k, b_n,
                                          True, ACC, PRECISION, WIDE, K_FITS, TURNED, TILE_M, TILE_N, TILE_K)  # fmt: skip
        _store_rows(rows, rows_ptr, split, pid_m * TILE_M, M, TILE_M)
    else:
        accumulator, _ = _sum_products(a_ptr, b_ptr, m, n, pid_n * TILE_N, M, N, begin, end, a_m, a_k, b_k, b_n,
                                       False, ACC, PRECISION, WIDE, K_FITS, TURNED, TILE_M, TILE_N, TILE_K)  # fmt: skip
    if SHARED:
        c_ptr += split.to(tl.int64) * M * N
    A = epilogues.options(A0, A1, ACC)
    _finish(accumulator, c_ptr, z_ptr, bias_ptr, other_ptr, sums_ptr, pid_m * TILE_M, pid_n * TILE_N, M, N,
            c_m, c_n, other_m, other_n, A, THEN, UNDO, ACC, TRANSPOSED, HALVES, TILE_M, TILE_N)  # fmt: skip


@triton.jit
def _sum_tma_products(
    a, b, first_m, first_n, begin, end,
    ROWS: tl.constexpr, A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """As _sum_products, through descriptors. These read zeros outside of a matrix, so that no mask is needed."""
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
    c_ptr, a, b, z_ptr, bias_ptr, other_ptr, sums_ptr, rows_ptr,
    M, N, K, c_m, c_n, other_m, other_n, k_per_split, A0: tl.float64, A1: tl.float64,
    THEN: tl.constexpr, UNDO: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, PERSISTENT: tl.constexpr, SHARED: tl.constexpr,
    TRANSPOSED: tl.constexpr, HALVES: tl.constexpr, GROUP: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """As _matmul_kernel, for descriptors of a (M, K), or of (K, M) with A_TRANSPOSED; likewise b.

    PERSISTENT: there is one program for each multiprocessor, which computes one tile after the other and fetches the first
    operands of a tile while it writes the one before. K is never shared out then, and rows of a are not summed.
    """
    tiles_m = tl.cdiv(M, TILE_M)
    tiles_n = tl.cdiv(N, TILE_N)
    A = epilogues.options(A0, A1, tl.float32)
    if PERSISTENT:
        # `flatten` makes one loop of the loops over tiles and over K, which the compiler pipelines across tiles.
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
            pid_m, pid_n = _place(tile, tiles_m, tiles_n, GROUP)
            accumulator, _ = _sum_tma_products(a, b, pid_m * TILE_M, pid_n * TILE_N, 0, K, False, A_TRANSPOSED,
                                               B_TRANSPOSED, PRECISION, TILE_M, TILE_N, TILE_K)  # fmt: skip
            if WIDE:
                pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)
            _finish(accumulator, c_ptr, z_ptr, bias_ptr, other_ptr, sums_ptr, pid_m * TILE_M, pid_n * TILE_N, M, N,
                    c_m, c_n, other_m, other_n, A, THEN, UNDO, tl.float32, TRANSPOSED, HALVES, TILE_M, TILE_N)  # fmt: skip
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
        _finish(accumulator, c_ptr, z_ptr, bias_ptr, other_ptr, sums_ptr, pid_m * TILE_M, pid_n * TILE_N, M, N,
                c_m, c_n, other_m, other_n, A, THEN, UNDO, tl.float32, TRANSPOSED, HALVES, TILE_M, TILE_N)  # fmt: skip


def _fits_a_descriptor(matrix: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can fetch tiles of a matrix or of its transpose: its first element and its rows are
    aligned to 16 bytes, the elements of a row are contiguous, it isn't empty, and 32 bits hold its sizes."""
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
    """A descriptor of tiles of rows x columns, and whether it describes the transpose."""
    if matrix.stride(1) == 1:
        return TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], [rows, columns]), False
    matrix = matrix.T
    return TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], [columns, rows]), True


def _halves(
    tile: tiles.Tile,
    then: epilogues.Activation | None,
    undo: epilogues.Activation | None,
    accumulate: torch.dtype,
    wide: bool,
    vectors: bool,
) -> int:
    """How often the columns of a tile are halved in its epilogue.

    The derivative of an activation that needs its input, GELU's say, leaves room for 32 elements in a thread, for 16 where
    offsets take 64 bits, and for 8 in float64. Where the epilogue reads and writes element by element (`vectors` is false),
    each element has an address, and the tile passes from thread to thread in float32, through the shared memory that the
    operands in flight leave free. Then there is room for 32 elements whatever the function is, and for half as many with such
    a derivative. Otherwise there is room for more elements than any tile but the largest has. The compiler for sm_100 uses
    only 64 registers for tiles of 16 rows, which are too few for GELU on all columns at once.
    """
    enough = int(tile.fills_registers or (tile.m == 16 and then is not None and then.saves == "input"))
    derivative = undo is not None and undo.saves == "input"
    if vectors and not derivative:
        return enough
    room = 8 if accumulate == torch.float64 else 16 if wide else 32
    if derivative and not vectors:
        room //= 2
    return max(enough, (tile.m * tile.n // (32 * tile.warps * room)).bit_length() - 1)


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    precision: str,
    bias: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    then: epilogues.Activation | None = None,
    z: torch.Tensor | None = None,
    undo: tuple[epilogues.Activation, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
    column_sums: torch.Tensor | None = None,
    operand_sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """c = then(z), z = a @ b + bias + add; or the gradient of an activation applied to a @ b. Returns c.

    Shape: a (M, K), b (K, N) and add (M, N), any strides; bias (N,); c (M, N).
    Dtype: float16, bfloat16, float32 or float64, the same for all but c and add; precision ("ieee" or "tf32") concerns float32.

    Args:
        then: the activation that follows, or None.
        z: where to write what comes before `then`; with the strides of c.
        undo: (an activation, what it saved): c = f_grad(a @ b, saved). Not together with bias, add or then.
        out: where to write c, any strides; a new contiguous tensor by default.
        column_sums: where to write c.sum(0) (N,), added up before c is rounded.
        operand_sums: where to write a.sum(1) (M,), contiguous: of a weight gradient dz.T @ x, the bias gradient. Not
            together with column_sums.
    """
    (m, k), n = a.shape, b.shape[1]
    if out is None:
        out = launch.empty((m, n), dtype=a.dtype, device=a.device)
    assert z is None or z.stride() == out.stride()
    if operand_sums is not None and n == 0:  # c has no tile whose program could add up the rows of a
        activation_grad(a.T[None], None, None, None, operand_sums)
        return out
    bias = None if bias is None else bias.contiguous()
    accumulate = torch.promote_types(a.dtype, torch.float32)
    undone, other = undo if undo is not None else (None, add)
    wide = launch.wide(a, b, out, other)
    adds_up = column_sums is not None or operand_sums is not None
    turn = turned.pays(*b.stride(), b.dtype, precision, tiles.device(a.device))
    plan = picks.matmul(
        m, n, k, a.dtype, precision, tiles.device(a.device),
        vectors=not wide and launch.vectors(a) and launch.vectors(b),
        descriptors=_fits_a_descriptor(a) and _fits_a_descriptor(b),
        plain=other is None and z is None and not adds_up and out.dtype == a.dtype and out.stride(1) == 1
        and _fits_a_descriptor(out),
        wide=wide, column_sums=column_sums is not None, operand_sums=operand_sums is not None, turned=turn,
    )  # fmt: skip
    if plan.specialized:
        from .experimental import specialized  # imported here, because nothing else needs Gluon

        specialized.matmul(a, b, out, plan, bias=bias, then=then)
        return out
    (tile, turn), splits = turned.fit(plan.tile, turn and not plan.descriptors), plan.splits
    if operand_sums is not None and plan.descriptors and plan.precision == "tf32" and (a.stride(1) == 1 or plan.copied):
        # Summing in the product would read its buffers, but where a is transposed in the loop (see _sum_products).
        activation_grad(a.T[None], None, None, None, operand_sums)
        operand_sums = None
    a, b = (columns_contiguous(a.T).T, columns_contiguous(b)) if plan.copied else (a, b)
    c, sums, rows = out, None, operand_sums
    if splits > 1:
        c = launch.empty((splits, m, n), dtype=accumulate, device=a.device)
    if column_sums is not None:
        sums = launch.empty((tiles.cdiv(m, tile.m), n), dtype=accumulate, device=a.device)
    if operand_sums is not None and splits > 1:
        rows = launch.empty((splits, m), dtype=accumulate, device=a.device)

    c_strides, other_strides = c.stride()[-2:], (0, 0) if other is None else other.stride()
    if plan.transposed:  # c^T = b^T @ a^T
        a, b, m, n = b.T, a.T, n, m
        c_strides, other_strides = c_strides[::-1], other_strides[::-1]
    count = tiles.cdiv(m, tile.m) * tiles.cdiv(n, tile.n)
    epilogue = dict(bias=bias, add=add, then=then, z=z, undo=undo)
    if splits > 1:  # then sum_partials applies the epilogue
        bias = other = then = z = undone = None
    vectors = all(launch.vectors(t) for t in (out, other) if t is not None)
    forward, options = epilogues.tile_function(then)
    backward, undone_options = epilogues.tile_function(undone, grad=True)
    pointers = (z, bias, other, sums, rows)
    sizes = (*c_strides, *other_strides, tiles.cdiv(tiles.cdiv(k, tile.k), splits) * tile.k)
    sizes = (*sizes, *(options if undone is None else undone_options))
    meta = dict(
        THEN=forward, UNDO=backward, PRECISION=plan.precision, WIDE=wide, SHARED=splits > 1, TRANSPOSED=plan.transposed,
        HALVES=_halves(tile, then, undone, accumulate, wide, vectors), GROUP=8,
        TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if plan.descriptors:
        a_tiles, a_transposed = _descriptor(a, tile.m, tile.k)
        b_tiles, b_transposed = _descriptor(b, tile.k, tile.n)
        launch.launch(
            _matmul_tma_kernel, min(count, plan.programs) if plan.programs else count * splits,
            c, a_tiles, b_tiles, *pointers, m, n, k, *sizes,
            A_TRANSPOSED=a_transposed, B_TRANSPOSED=b_transposed, PERSISTENT=plan.programs > 0, **meta,
        )  # fmt: skip
    else:
        launch.launch(
            _matmul_kernel, count * splits, c, a, b, *pointers, m, n, k, *a.stride(), *b.stride(), *sizes,
            ACC=tiles.triton_dtype(accumulate), K_FITS=k % tile.k == 0, TURNED=turn, **meta,
        )  # fmt: skip

    if splits > 1:
        sum_partials(c, out, **epilogue)
        if rows is not None and operand_sums is not None:
            sum_partials(rows, operand_sums)
    if sums is not None and column_sums is not None:
        sum_partials(sums, column_sums)
    return out
