"""The picks: pure functions, so tested alone."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from fastlayers.kernels import dropout, pointwise, softmax
from fastlayers.kernels.conv import tiles as conv_tiles
from fastlayers.kernels.matmul import tiles as matmul_tiles
from fastlayers.kernels.matmul.tiles import Product
from fastlayers.kernels.runtime import launch as _launch
from fastlayers.kernels.runtime import tiles as _tiles
from fastlayers.kernels.runtime.tiles import Device, Tile
from fastlayers.ops.activation import Activation

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx90a")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_pick_is_in_a_table(architecture: str) -> None:
    """What can be picked is what CI compiles."""
    device = Device(architecture, 108)
    shipped = set(matmul_tiles.products(architecture).values())
    behind_descriptors = {
        form(p) for products in matmul_tiles.descriptor_products(architecture).values() for p in products
    }
    sizes = (0, 1, 7, 16, 64, 1000, 8192, 10**6)
    flags = list(itertools.product((False, True), repeat=4))
    for m, n, dtype, precision in itertools.product(sizes, sizes, DTYPES, ("ieee", "tf32")):
        for vectors, descriptors, column_sums, operand_sums in flags:
            product = matmul_tiles.matmul(
                m, n, 4096, dtype, precision, device, vectors=vectors,
                descriptors=descriptors and vectors and m * n > 0, column_sums=column_sums, operand_sums=operand_sums,
            )  # fmt: skip
            if product.descriptors:
                assert form(product) in behind_descriptors
            else:
                assert product.tile in shipped
                assert product.programs == 0 and not product.transposed
                assert product.precision == (precision if dtype == torch.float32 else "ieee")
            assert 1 <= product.splits <= 32
            assert not column_sums or product.splits == 1
            assert not (column_sums or operand_sums) or not product.transposed
            assert not operand_sums or product.programs == 0
        for vectors in (False, True):
            assert conv_tiles.conv(m, n, dtype, precision, device, vectors=vectors) in shipped
            tile, splits = conv_tiles.conv_weight_grad(m, n, 10**6, 2, dtype, precision, device, vectors=vectors)
            assert tile in shipped
            assert splits >= 1


def form(product: Product) -> Product:
    """What of a product its kernel is compiled for."""
    return replace(product, programs=min(product.programs, 1), splits=min(product.splits, 2))


H200 = Device("sm_90", 132)


def pick(
    m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, precision: str = "ieee", **kwargs: bool
) -> Product:
    arguments = {"vectors": True, "descriptors": True, **kwargs}
    return matmul_tiles.matmul(m, n, k, dtype, precision, H200, **arguments)


def test_large_products_take_large_tiles_behind_descriptors() -> None:
    large = Tile(128, 256, 64, warps=8, stages=4)
    assert pick(8192, 8192, 8192) == Product(large, "ieee", descriptors=True)
    assert pick(8192, 8192, 8192, column_sums=True, descriptors=False).tile == Tile(128, 256, 64, warps=8, stages=3)
    assert (
        pick(8192, 8192, 8192, vectors=False, descriptors=False).tile == matmul_tiles.products("sm_90")["16", "gather"]
    )
    assert pick(8192, 8192, 8192, torch.float32, "tf32").descriptors
    for arithmetic in (torch.float64, torch.float32):
        assert not pick(8192, 8192, 8192, arithmetic).descriptors
    # Several tiles for each multiprocessor and a short sum: one program takes them all in turn.
    assert pick(65536, 4096, 1024).programs == 132
    assert pick(65536, 4096, 8192).programs == 0
    assert pick(65536, 4096, 1024, operand_sums=True).programs == 0


def test_small_products_fill_the_gpu() -> None:
    for product, m, n in ((pick(512, 784, 65536), 512, 784), (pick(256, 256, 8192, descriptors=False), 256, 256)):
        programs = product.splits * -(-m // product.tile.m) * -(-n // product.tile.n)
        assert 66 <= programs <= 132
        assert product.splits > 1
    assert pick(512, 784, 65536, column_sums=True).splits == 1
    assert not pick(512, 784, 512).descriptors  # done before the host has made two of them
    assert pick(4, 512, 512).tile.m == 16
    assert pick(10**6, 64, 64, descriptors=False).tile.n == 64


@pytest.mark.parametrize("m", [1, 9, 16])
def test_few_rows_become_columns(m: int) -> None:
    """The weight is the long operand, and its tiles are read once."""
    product = pick(m, 14336, 4096)
    assert product.transposed and product.descriptors
    assert product.tile.n >= m
    assert pick(64, 14336, 4096).tile.m == 64
    assert not pick(m, 14336, 4096, column_sums=True).transposed


def test_strict_float32_on_tensor_cores_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nowhere by default; where its error has been measured, one row switches it on, for strict float32 alone."""
    assert not matmul_tiles.STRICT
    monkeypatch.setitem(matmul_tiles.STRICT, "sm_90", "tf32x3")
    matmul_tiles._through_descriptors.cache_clear()
    assert pick(8192, 8192, 8192, torch.float32).precision == "tf32x3"
    assert pick(8192, 8192, 8192, torch.float32, "tf32").precision == "tf32"
    assert pick(8192, 8192, 8192, torch.float32, descriptors=False).precision == "ieee"
    matmul_tiles._through_descriptors.cache_clear()


def test_softmax_by_length() -> None:
    for d in (1, 5, 64, 256, 1000, 32768):
        tile = softmax.rows_tile(d, torch.float32)
        assert tile is not None
        assert tile.n >= d
        assert tile.m * tile.n <= 32768
    assert softmax.rows_tile(32769, torch.float32) is None
    assert softmax.rows_tile(16385, torch.float32, gradient=True) is None
    most = Device("gfx942", 304).most_warps  # of 64 threads
    assert softmax.rows_tile(32768, torch.float32, most_warps=most) is None
    assert softmax.rows_tile(16384, torch.float32, most_warps=most) == Tile(1, 16384, warps=16)
    for inner in (1, 3, 17, 4096):
        assert softmax.blocks_tile(10**6, inner).m >= 32


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


def test_elements_just_below_2_31_are_counted_in_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program's last step goes beyond them, where a number of 32 bits would wrap and seem to be one of them."""
    seen: list[bool] = []
    monkeypatch.setattr(_launch, "launch", lambda *args, **meta: seen.append(meta["WIDE"]))
    for size in (2**31 - 2**16, 2**20):
        x = torch.empty(size, dtype=torch.float16)  # memory that is never touched
        pointwise.pointwise(x, x, Activation("relu"))
        dropout.dropout_lanes(x, x, torch.zeros(2, dtype=torch.int64), 0.5, (2.0, 0.0, 0.0), 4)
    assert seen == [True, True, False, False]


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


def test_every_row_can_be_asked_for() -> None:
    """What the audit does: it listens to a call, and then answers each question with each of its rows."""
    launched: list[Tile] = []

    def call() -> None:
        launched.append(
            matmul_tiles.matmul(4096, 4096, 4096, torch.float16, "ieee", H200, vectors=True, descriptors=True).tile
        )

    with _tiles.listen() as questions:
        call()
    assert [table for table, _ in questions] == ["matmul", "product"]
    assert {row.tile for row in questions[0][1]} >= {launched.pop()}
    for number, (_, rows) in enumerate(questions):
        assert len(rows) >= 4
        for row in rows:
            with _tiles.listen({number: row}) as again:
                call()
            assert len(again) >= number + 1
            assert launched.pop() == (row.tile if number == 0 else row)
