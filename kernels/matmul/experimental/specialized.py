"""c = then(a @ b + bias) in Gluon, for sm_90, by warps with different jobs: one warp fetches tiles through TMA, and two groups
of four warps each multiply half of a tile and write it, while the operands of the next tile are being fetched.

    producer       wait until a stage is free -> fetch both halves of the a tile, and the b tile, into it -> next stage
    two consumers  wait until a stage is ready -> multiply their half of a by b -> the stage before is free -> ...
                   after the last step: bias, activation, and the half of the c tile through shared memory and TMA

Each program computes one tile after the other, so that writing a tile overlaps with fetching the next one. It is written in
Gluon because Triton ignores `warp_specialize` on sm_90 with 8 warps, and wrong results were reported with 4 (issue 8311).

No device has run this kernel, and nothing picks it: `SPECIALIZED` in matmul/tiles.py stays empty until it has passed
tests/test_gpu.py and `python -m bench picks` finds it faster. tests/emulated_gluon.py checks how its warps wait for each other,
the audit compiles it, and tests/ptx_machine runs what is compiled.

Source: Triton's Gluon tutorials 07-persistence and 08-warp-specialization; NVIDIA PTX ISA, mbarrier and wgmma.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ... import epilogues
from ...runtime import launch, tiles
from ..matmul import _descriptor as _plain_descriptor
from ..matmul import _place
from ..tiles import Product

# Triton 3.8 renames them.
_fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_write = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _produce(
    a, b, a_ring, b_ring, ready, free, M, N, K,
    A_TRANSPOSED: gl.constexpr, B_TRANSPOSED: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    TILE_M: gl.constexpr, TILE_N: gl.constexpr, TILE_K: gl.constexpr,
):  # fmt: skip
    """The job of the producer: fill one stage after the other, each as soon as both consumers have used what was in it."""
    HALF: gl.constexpr = TILE_M // 2
    tiles_m = gl.cdiv(M, TILE_M)
    tiles_n = gl.cdiv(N, TILE_N)
    stage = 0
    phase = 1  # the phase before a barrier's first counts as complete, so that all stages are free at the start
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        pid_m, pid_n = _place(tile, tiles_m, tiles_n, GROUP)
        m = pid_m * TILE_M
        n = pid_n * TILE_N
        for k in range(0, K, TILE_K):
            mbarrier.wait(free.index(stage), phase)
            full = ready.index(stage)
            mbarrier.expect(full, 2 * (TILE_M + TILE_N) * TILE_K)  # bytes, including those outside of the matrix
            for i in gl.static_range(2):
                if A_TRANSPOSED:
                    _fetch(a, [k, m + i * HALF], full, a_ring.index(2 * stage + i))
                else:
                    _fetch(a, [m + i * HALF, k], full, a_ring.index(2 * stage + i))
            if B_TRANSPOSED:
                _fetch(b, [n, k], full, b_ring.index(stage))
            else:
                _fetch(b, [k, n], full, b_ring.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _consume(
    PART: gl.constexpr, c, a_ring, b_ring, c_tile, ready, free, bias_ptr, M, N, K,
    THEN: gl.constexpr, A: gl.constexpr, A_TRANSPOSED: gl.constexpr, B_TRANSPOSED: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, TILE_M: gl.constexpr, TILE_N: gl.constexpr, TILE_K: gl.constexpr,
):  # fmt: skip
    """The job of one consumer: compute half PART of every tile."""
    HALF: gl.constexpr = TILE_M // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_N, 16])
    tiles_m = gl.cdiv(M, TILE_M)
    tiles_n = gl.cdiv(N, TILE_N)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        pid_m, pid_n = _place(tile, tiles_m, tiles_n, GROUP)
        n = pid_n * TILE_N
        accumulator = gl.zeros((HALF, TILE_N), gl.float32, LAYOUT)
        for k in range(0, K, TILE_K):
            mbarrier.wait(ready.index(stage), phase)
            a_tile = a_ring.index(2 * stage + PART)
            b_tile = b_ring.index(stage)
            if A_TRANSPOSED:
                a_tile = a_tile.permute((1, 0))
            if B_TRANSPOSED:
                b_tile = b_tile.permute((1, 0))
            accumulator = hopper.warpgroup_mma(a_tile, b_tile, accumulator, is_async=True)
            accumulator = hopper.warpgroup_mma_wait(1, deps=(accumulator,))
            # All products but that of this step are complete. The stage before is computed and not kept, because the compiler
            # takes a variable that gets, in a loop, the value with which it began for one that the loop doesn't change.
            mbarrier.arrive(free.index((stage + STAGES - 1) % STAGES), pred=k > 0)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        accumulator = hopper.warpgroup_mma_wait(0, deps=(accumulator,))
        mbarrier.arrive(free.index((stage + STAGES - 1) % STAGES))
        if bias_ptr is not None:
            column = n + gl.arange(0, TILE_N, gl.SliceLayout(0, LAYOUT))
            bias = gl.load(bias_ptr + column, mask=column < N, other=0.0).to(gl.float32)
            accumulator += gl.expand_dims(bias, 0)
        if THEN is not None:
            accumulator = THEN(accumulator, A)
        tma.store_wait(0)  # until the tile before has been copied out of c_tile
        c_tile.store(accumulator.to(c.dtype))
        hopper.fence_async_shared()
        _write(c, [pid_m * TILE_M + PART * HALF, n], c_tile)
    tma.store_wait(0)


@gluon.jit
def _matmul_specialized_kernel(
    c_ptr, c, a, b, bias_ptr, M, N, K,
    THEN: gl.constexpr, A: gl.constexpr, A_TRANSPOSED: gl.constexpr, B_TRANSPOSED: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, TILE_M: gl.constexpr, TILE_N: gl.constexpr, TILE_K: gl.constexpr,
):  # fmt: skip
    """One program: one tile of c after the other.

    a, b and c are descriptors: a of half the rows of a tile (columns, if transposed), b of a whole tile, c of half a tile. c_ptr
    isn't read: its tensor tells `launch` the device.
    """
    a_ring = gl.allocate_shared_memory(a.dtype, [2 * STAGES] + a.block_type.shape, a.layout)
    b_ring = gl.allocate_shared_memory(b.dtype, [STAGES] + b.block_type.shape, b.layout)
    upper = gl.allocate_shared_memory(c.dtype, c.block_type.shape, c.layout)
    lower = gl.allocate_shared_memory(c.dtype, c.block_type.shape, c.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    gl.warp_specialize(
        [
            (_consume, (gl.constexpr(0), c, a_ring, b_ring, upper, ready, free, bias_ptr, M, N, K,
                        THEN, A, A_TRANSPOSED, B_TRANSPOSED, GROUP, STAGES, TILE_M, TILE_N, TILE_K)),
            (_consume, (gl.constexpr(1), c, a_ring, b_ring, lower, ready, free, bias_ptr, M, N, K,
                        THEN, A, A_TRANSPOSED, B_TRANSPOSED, GROUP, STAGES, TILE_M, TILE_N, TILE_K)),
            (_produce, (a, b, a_ring, b_ring, ready, free, M, N, K,
                        A_TRANSPOSED, B_TRANSPOSED, GROUP, STAGES, TILE_M, TILE_N, TILE_K)),
        ],
        [4, 1],  # warps of the second and the third job; the first job has the kernel's num_warps
        [240, 24],  # registers of their threads
    )  # fmt: skip


def _descriptor(matrix: torch.Tensor, rows: int, columns: int) -> tuple[TensorDescriptor, bool]:
    """A descriptor of tiles of rows x columns, and whether it describes the transpose."""
    plain, transposed = _plain_descriptor(matrix, rows, columns)
    dtype = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[matrix.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(plain.block_shape, dtype)
    return TensorDescriptor(plain.base, plain.shape, plain.strides, plain.block_shape, layout), transposed


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    product: Product,
    *,
    bias: torch.Tensor | None,
    then: epilogues.Activation | None,
) -> None:
    """out = then(a @ b + bias).

    Shape: a (M, K), b (K, N), out (M, N), rows or columns contiguous, out's rows; all fit for descriptors
        (`matmul._fits_a_descriptor`); bias (N,), contiguous.
    Dtype: float16 or bfloat16, the same for all.
    """
    tile = product.tile
    half = tile.m // 2
    a_tiles, a_transposed = _descriptor(a, half, tile.k)
    b_tiles, b_transposed = _descriptor(b, tile.k, tile.n)
    c_tiles, _ = _descriptor(out, half, tile.n)
    (m, k), n = a.shape, b.shape[1]
    function, options = epilogues.tile_function(then)
    count = tiles.cdiv(m, tile.m) * tiles.cdiv(n, tile.n)
    launch.launch(
        _matmul_specialized_kernel, min(count, product.programs),
        out, c_tiles, a_tiles, b_tiles, bias, m, n, k,
        THEN=function, A=options, A_TRANSPOSED=a_transposed, B_TRANSPOSED=b_transposed, GROUP=8,
        STAGES=tile.stages, TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, num_warps=tile.warps,
    )  # fmt: skip
