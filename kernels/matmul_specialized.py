"""c = then(a @ b + bias) by warps with a job each (Gluon, for sm_90): one fetches tiles through TMA, two groups of four
multiply the halves of a tile and write it, while the next one's operands are already on their way.

    producer       wait until a stage is free -> fetch both halves of the a tile, and the b tile, into it -> next stage
    two consumers  wait until a stage is ready -> multiply their half of a by b -> the stage before is free -> ...
                   after the last step: bias, activation, and the half of the c tile through shared memory and TMA

Each program takes one tile after the other, so that what is written hides behind what the next tile fetches. tl.range's own
`warp_specialize` is ignored on sm_90 with 8 warps and was reported wrong with 4 (triton issue 8311), hence Gluon.

No device has run this kernel, and no pick chooses it: `_tiles.SPECIALIZED` is empty until one has (tests/test_gpu.py) and
`python -m bench picks` finds it faster. Its protocol is checked by tests/emulated_gluon.py, its code by the audit.

Source: Triton's Gluon tutorials 07-persistence and 08-warp-specialization; NVIDIA PTX ISA, mbarrier and wgmma.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import _launch, _tiles, epilogues
from .matmul import _descriptor as _plain_descriptor
from .matmul import _place

# Triton 3.8 renames them.
_fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_write = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _produce(
    a, b, a_ring, b_ring, ready, free, M, N, K,
    A_TRANSPOSED: gl.constexpr, B_TRANSPOSED: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    TILE_M: gl.constexpr, TILE_N: gl.constexpr, TILE_K: gl.constexpr,
):  # fmt: skip
    """Fill the stages in turn, each as soon as both consumers are done with what was in it."""
    HALF: gl.constexpr = TILE_M // 2
    tiles_m = gl.cdiv(M, TILE_M)
    tiles_n = gl.cdiv(N, TILE_N)
    stage = 0
    phase = 1  # of a barrier that nothing has passed yet, the phase before counts as over: all stages are free
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        pid_m, pid_n = _place(tile, tiles_m, tiles_n, GROUP)
        m = pid_m * TILE_M
        n = pid_n * TILE_N
        for k in range(0, K, TILE_K):
            mbarrier.wait(free.index(stage), phase)
            full = ready.index(stage)
            mbarrier.expect(full, 2 * (TILE_M + TILE_N) * TILE_K)  # bytes, those outside of the matrix too
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
    THEN: gl.constexpr, A_TRANSPOSED: gl.constexpr, B_TRANSPOSED: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, TILE_M: gl.constexpr, TILE_N: gl.constexpr, TILE_K: gl.constexpr,
):  # fmt: skip
    """Half PART of every tile."""
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
        before = stage
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
            mbarrier.arrive(free.index(before), pred=k > 0)  # every product but this step's is done
            before = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        accumulator = hopper.warpgroup_mma_wait(0, deps=(accumulator,))
        mbarrier.arrive(free.index(before))
        if bias_ptr is not None:
            column = n + gl.arange(0, TILE_N, gl.SliceLayout(0, LAYOUT))
            bias = gl.load(bias_ptr + column, mask=column < N, other=0.0).to(gl.float32)
            accumulator += gl.expand_dims(bias, 0)
        if THEN is not None:
            accumulator = THEN(accumulator)
        tma.store_wait(0)  # until the tile before has been read from where this one goes
        c_tile.store(accumulator.to(c.dtype))
        hopper.fence_async_shared()
        _write(c, [pid_m * TILE_M + PART * HALF, n], c_tile)
    tma.store_wait(0)


@gluon.jit
def _matmul_specialized_kernel(
    c_ptr, c, a, b, bias_ptr, M, N, K,
    THEN: gl.constexpr, A_TRANSPOSED: gl.constexpr, B_TRANSPOSED: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, TILE_M: gl.constexpr, TILE_N: gl.constexpr, TILE_K: gl.constexpr,
):  # fmt: skip
    """One program: one tile of c after the other. a, b, c are descriptors: of half a tile's rows, or columns if it lies
    transposed; of a whole tile; of half a tile. c_ptr only says on which device."""
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
                        THEN, A_TRANSPOSED, B_TRANSPOSED, GROUP, STAGES, TILE_M, TILE_N, TILE_K)),
            (_consume, (gl.constexpr(1), c, a_ring, b_ring, lower, ready, free, bias_ptr, M, N, K,
                        THEN, A_TRANSPOSED, B_TRANSPOSED, GROUP, STAGES, TILE_M, TILE_N, TILE_K)),
            (_produce, (a, b, a_ring, b_ring, ready, free, M, N, K,
                        A_TRANSPOSED, B_TRANSPOSED, GROUP, STAGES, TILE_M, TILE_N, TILE_K)),
        ],
        [4, 1],  # warps of the second and the third job; the first has the kernel's own
        [240, 24],  # registers of their threads
    )  # fmt: skip


def _descriptor(matrix: torch.Tensor, rows: int, columns: int) -> tuple[TensorDescriptor, bool]:
    """A descriptor of tiles of rows x columns, and whether it is one of the transpose."""
    tiles, transposed = _plain_descriptor(matrix, rows, columns)
    dtype = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[matrix.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(tiles.block_shape, dtype)
    return TensorDescriptor(tiles.base, tiles.shape, tiles.strides, tiles.block_shape, layout), transposed


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    product: _tiles.Product,
    *,
    bias: torch.Tensor | None,
    then: str | None,
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
    tiles = _tiles.cdiv(m, tile.m) * _tiles.cdiv(n, tile.n)
    _launch.launch(
        _matmul_specialized_kernel, min(tiles, product.programs),
        out, c_tiles, a_tiles, b_tiles, bias, m, n, k,
        THEN=epilogues.forward(then), A_TRANSPOSED=a_transposed, B_TRANSPOSED=b_transposed, GROUP=8,
        STAGES=tile.stages, TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, num_warps=tile.warps,
    )  # fmt: skip
