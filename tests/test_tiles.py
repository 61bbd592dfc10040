"""The picks: pure functions, so tested alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastlayers.kernels import _launch, _tiles
from fastlayers.kernels._tiles import Device, Tile

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx90a")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_pick_is_in_a_table(architecture: str) -> None:
    """What can be picked is what CI compiles."""
    device = Device(architecture, 108)
    shipped = set(_tiles.products(architecture).values())
    sizes = (0, 1, 7, 16, 64, 1000, 8192, 10**6)
    for m, n, dtype, precision in itertools.product(sizes, sizes, DTYPES, ("ieee", "tf32")):
        for vectors, light in itertools.product((False, True), repeat=2):
            tile, splits = _tiles.matmul(m, n, 4096, dtype, precision, device, vectors=vectors, light=light)
            assert tile in shipped
            assert 1 <= splits <= 32
            assert light or splits == 1
            assert _tiles.conv(m, n, dtype, precision, device, vectors=vectors) in shipped
            tile, splits = _tiles.conv_weight_grad(m, n, 10**6, 2, dtype, precision, device, vectors=vectors)
            assert tile in shipped
            assert splits >= 1


def test_large_products_take_large_tiles_and_small_ones_fill_the_gpu() -> None:
    device = Device("sm_90", 132)

    def pick(m: int, n: int, k: int, **kwargs: bool) -> tuple[Tile, int]:
        arguments = {"vectors": True, "light": True, **kwargs}
        return _tiles.matmul(m, n, k, torch.bfloat16, "ieee", device, **arguments)

    assert pick(8192, 8192, 8192) == (Tile(128, 256, 64, warps=8, stages=3), 1)
    assert pick(8192, 8192, 8192, light=False)[0].n == 128
    assert pick(8192, 8192, 8192, vectors=False)[0] == _tiles.products("sm_90")["16", "gather"]
    tile, splits = pick(512, 784, 65536)
    assert splits * -(-512 // tile.m) * -(-784 // tile.n) <= 132
    assert splits > 1
    assert pick(4, 4096, 4096)[0].m == 16


def test_softmax_by_length() -> None:
    for d in (1, 5, 64, 256, 1000, 32768):
        tile = _tiles.softmax_rows(d, torch.float32)
        assert tile is not None
        assert tile.n >= d
        assert tile.m * tile.n <= 32768
    assert _tiles.softmax_rows(32769, torch.float32) is None
    assert _tiles.softmax_rows(16385, torch.float32, gradient=True) is None
    for inner in (1, 3, 17, 4096):
        assert _tiles.softmax_blocks(10**6, inner, torch.float32).m >= 32


def test_forcing_is_undone() -> None:
    with pytest.raises(ZeroDivisionError), _tiles.force(product=Tile(16, 16, 16)):
        _ = 1 / 0
    assert not _tiles.forced


def test_wide_tells_offsets_that_need_64_bits() -> None:
    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float16, device="meta")

    assert not _launch.wide(meta(2**31), None)
    assert _launch.wide(meta(2**31 + 1))
    assert _launch.wide(meta(3), meta(2, 2**31))
    assert not _launch.wide(meta(1, 2**31))
    assert _launch.wide(meta(2**16, 2**16)[:, ::2])
    assert not _launch.wide(meta(1).expand(2**20, 2**20))


def test_vectors_needs_alignment() -> None:
    x = torch.empty(64, 64, dtype=torch.float16)
    assert _launch.vectors(x)
    assert _launch.vectors(x.t())
    assert not _launch.vectors(x[:, ::2])
    assert not _launch.vectors(x[:, 1:])
    assert not _launch.vectors(torch.empty(64, 63, dtype=torch.float16))
    assert not _launch.vectors(torch.empty(64, 24, dtype=torch.float16))
    assert not _launch.vectors(x[:, :63])
    assert _launch.vectors(x[:3, :48])
    assert _launch.vectors(torch.empty(2, 32, 5, 5).to(memory_format=torch.channels_last))
    assert not _launch.vectors(torch.empty(2, 24, 5, 5).to(memory_format=torch.channels_last))
