"""Tiles of a right operand b whose k runs along memory, turned on their way, for products that threads compute themselves.

For strict float32 there are no tensor cores: each thread multiplies what it reads from shared memory, in rows of b's n. A tile
whose k runs along memory arrives there in columns, a row's elements all lie in one or two banks, and a warp reads them 8 or 16
times as slowly as it could. So the tile is copied element by element instead, which threads then hold in an order that has n
first: 32 neighbouring threads take 8 elements of k, which are a whole sector of memory, for each of 4 columns. They write them to
shared memory as rows, with 8 to a bank, but once, where products read them many times.

A tile is loaded as a vector of its elements in that order, because the compiler gives a vector's copy in shared memory no order
of its own.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..runtime.tiles import Device, Tile


def pays(b_k: int, b_n: int, dtype: torch.dtype, precision: str, device: Device) -> bool:
    """Whether tiles of a matrix with these strides are better turned. AMD's matrix cores compute strict float32."""
    strict = dtype == torch.float32 and precision == "ieee" and not device.architecture.startswith("gfx")
    return strict and b_k == 1 and b_n != 1


def fit(tile: Tile, turn: bool) -> tuple[Tile, bool]:
    """The tile with which a product runs, and whether it turns tiles of b, if it should: beside 64 sums a thread has no registers
    for the addresses of single elements, and beside 32 only where there are eight warps."""
    turn = turn and tile.m * tile.n <= 32 * 32 * tile.warps
    return (replace(tile, warps=8) if turn and tile.m * tile.n == 32 * 32 * 4 and tile.warps == 4 else tile), turn


@triton.jit
def places(TILE_K: tl.constexpr, TILE_N: tl.constexpr):
    """k and n of each element, in the order in which threads take them."""
    element = tl.arange(0, TILE_K * TILE_N)
    piece = element // 32
    return piece // (TILE_N // 4) * 8 + element % 32 // 4, piece % (TILE_N // 4) * 4 + element % 4


@triton.jit
def load(b_ptr, offsets, inside, TILE_K: tl.constexpr, TILE_N: tl.constexpr):
    """The tile (TILE_K, TILE_N) of b, whose elements in the order of `places` have these offsets."""
    offsets = tl.max_contiguous(offsets, [1])  # else the compiler would let each thread have 4 elements of k
    b = tl.load(b_ptr + offsets, mask=inside, other=0.0)
    b = tl.permute(tl.reshape(b, (TILE_K // 8, TILE_N // 4, 8, 4)), (0, 2, 1, 3))
    return tl.reshape(b, (TILE_K, TILE_N))
