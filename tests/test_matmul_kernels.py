"""The matrix product in every way that it can be computed, each forced in small tiles, and what Linear launches.

This file looks inside: at launchers, at the kernels that are launched, and at the arguments that they are compiled for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from activations import RELU

import fastlayers
import fastlayers.functional as FL
from fastlayers.kernels.matmul import matmul as matmul_kernels
from fastlayers.kernels.matmul import tiles as matmul_tiles
from fastlayers.kernels.matmul.tiles import Product
from fastlayers.kernels.runtime import launch as _launch
from fastlayers.kernels.runtime import tiles as _tiles
from fastlayers.kernels.runtime.tiles import Device, Tile
from fastlayers.testing import assert_within_budget

r = torch.randn


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_sums_spread_over_programs(
    bias: bool, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few tiles and a long K: shares of the sum in float32, added up in order, then bias and activation."""
    a, b = r(19, 203, device=device, dtype=dtype), r(203, 18, device=device, dtype=dtype)
    c = r(18, device=device, dtype=dtype) if bias else None
    monkeypatch.setattr(_tiles, "device", lambda device: Device("sm_90", 5))
    with _tiles.force(product=Tile(32, 32, 16), sum_partials=Tile(2, 64)):
        assert matmul_tiles.matmul(19, 18, 203, dtype, "ieee", Device("sm_90", 5), vectors=True).splits == 3
        out = matmul_kernels.matmul(a, b, bias=c, then=RELU, precision="ieee")
        second = matmul_kernels.matmul(a, b, bias=c, then=RELU, precision="ieee")
    assert torch.equal(out, second)
    exact = (a.double() @ b.double() + (0 if c is None else c.double())).relu()
    reference = (torch.mm(a, b) if c is None else torch.addmm(c, a, b)).relu()
    assert_within_budget(out, reference, exact)


def test_float32_obeys_torchs_switch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strict means strict, in forward and in backward; TF32 only where torch would use it."""
    seen = []
    launch = _launch.launch
    monkeypatch.setattr(_launch, "launch", lambda *a, **k: (seen.append(k.get("PRECISION")), launch(*a, **k))[1])
    x = r(5, 6, device=device, requires_grad=True)
    layer = fastlayers.Linear(6, 7).to(device)

    def precisions() -> set[str]:
        seen.clear()
        layer(x).sum().backward()
        return {p for p in seen if p}

    for value, expected in (("ieee", "ieee"), ("tf32", "tf32")):
        torch.backends.cuda.matmul.fp32_precision = value
        assert precisions() == {expected}
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    for value, expected in (("highest", "ieee"), ("high", "tf32"), ("highest", "ieee")):
        torch.set_float32_matmul_precision(value)
        assert precisions() == {expected}


LAYOUTS = {"forward": (False, True), "input grad": (False, False), "weight grad": (True, False), "both": (True, True)}


WAYS = {
    "pointers": Product(Tile(32, 16, 16), "ieee"),
    "pointers, halves": Product(Tile(64, 64, 16, warps=1), "ieee"),
    "pointers, shared": Product(Tile(32, 16, 16), "ieee", splits=3),
    "pointers, transposed": Product(Tile(32, 16, 16), "ieee", transposed=True),
    "descriptors": Product(Tile(32, 16, 16), "ieee", descriptors=True),
    "descriptors, halves": Product(Tile(64, 64, 16, warps=1), "ieee", descriptors=True),
    "descriptors, shared": Product(Tile(16, 32, 32), "ieee", descriptors=True, splits=3),
    "descriptors, persistent": Product(Tile(32, 32, 32), "ieee", descriptors=True, programs=3),
    "descriptors, persistent halves": Product(Tile(64, 64, 32, warps=1), "ieee", descriptors=True, programs=2),
    "descriptors, transposed": Product(Tile(64, 16, 32), "ieee", descriptors=True, transposed=True),
    "descriptors, transposed, shared": Product(Tile(32, 16, 32), "ieee", descriptors=True, transposed=True, splits=2),
}
"""Every way in which the pick can have a product done, in small tiles."""


def operands(layout: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """a (m, k) and b (k, n), one or both stored as their transposes."""
    shapes = ((m, k), (k, n))
    return [
        r(shape[::-1], device=device, dtype=dtype).T if transposed else r(shape, device=device, dtype=dtype)
        for shape, transposed in zip(shapes, LAYOUTS[layout], strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_every_layout(
    way: str, layout: str, dtype: torch.dtype, device: torch.device, launched: list[str]
) -> None:
    """Sizes across every edge of a tile; every epilogue the way can have."""
    product, beyond = WAYS[way], 16 // dtype.itemsize
    m, n = product.tile.m * (1 if product.tile.m > 32 else 2) + beyond, product.tile.n + beyond
    m, n = (n, m) if product.transposed else (m, n)
    k = product.tile.k * max(product.splits, 2) + beyond
    a, b = operands(layout, m, n, k, dtype, device)
    bias, saved, d = r(n, device=device, dtype=dtype), r(n, m, device=device, dtype=dtype).T, [a.double(), b.double()]
    kernel = "_matmul_tma_kernel" if product.descriptors else "_matmul_kernel"

    def run(**kwargs: Any) -> Any:
        with _tiles.force(matmul=product, sum_partials=Tile(2, 256)):
            launched.clear()
            result = matmul_kernels.matmul(a, b, precision="ieee", **kwargs)
        assert launched[0] == kernel
        return result

    c = run(bias=bias, then=RELU)
    assert_within_budget(c, torch.addmm(bias, a, b).relu(), (d[0] @ d[1] + bias.double()).relu())
    undone = torch.where(saved <= 0, 0.0, d[0] @ d[1])
    out = torch.empty(n, m, device=device, dtype=dtype).fill_(float("nan")).T
    c = run(undo=(RELU, saved), out=out)
    assert c is out
    assert_within_budget(c, torch.where(saved <= 0, 0.0, a @ b), undone)
    if product.splits == 1 and not product.transposed:
        sums = torch.empty(n, device=device, dtype=dtype).fill_(float("nan"))
        run(undo=(RELU, saved), column_sums=sums)
        assert_within_budget(sums, torch.where(saved <= 0, 0.0, (a @ b)).sum(0), undone.sum(0))
    if not product.programs and not product.transposed:
        sums = torch.empty(m, device=device, dtype=dtype).fill_(float("nan"))
        c = run(operand_sums=sums)
        assert_within_budget(c, a @ b, d[0] @ d[1])
        assert_within_budget(sums, a.sum(1), d[0].sum(1))


def test_tf32_row_sums_apart_from_the_product(device: torch.device, launched: list[str]) -> None:
    """Threads may not read the buffers of a product under way, so where it reads a from shared memory, another kernel sums."""
    tile = Tile(64, 16, 16, warps=4, stages=2)
    for layout, apart in (("forward", True), ("weight grad", False)):
        a, b = operands(layout, 72, 20, 40, torch.float32, device)
        sums = torch.empty(72, device=device).fill_(float("nan"))
        launched.clear()
        with _tiles.force(matmul=Product(tile, "tf32", descriptors=True)):
            c = matmul_kernels.matmul(a, b, precision="tf32", operand_sums=sums)
        assert ("_activation_grad_kernel" in launched) == apart
        torch.testing.assert_close(c, a @ b, atol=0.1, rtol=0.1)
        assert_within_budget(sums, a.sum(1), a.double().sum(1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [24, 22, 21])
def test_operands_are_copied_so_that_k_is_contiguous(
    columns: int, layout: str, device: torch.device, launched: list[str]
) -> None:
    """Each that isn't so yet, once. k isn't a multiple of the copies' vectors, and rows of b may have any length."""
    a, b = operands(layout, 72, 24, 43 if layout == "weight grad" else 44, torch.float32, device)
    a, b, sums = a, b[:, :columns], torch.empty(72, device=device).fill_(float("nan"))
    with _tiles.force(matmul=Product(Tile(32, 16, 16), "ieee", descriptors=True, copied=True)):
        c = matmul_kernels.matmul(a, b, precision="ieee", operand_sums=sums)
    assert launched.count("_transpose_kernel") == (a.stride(1) != 1) + (b.stride(0) != 1)
    assert_within_budget(c, a @ b, a.double() @ b.double())
    assert_within_budget(sums, a.sum(1), a.double().sum(1))


def test_what_one_tile_reads_is_not_copied() -> None:
    """A copy costs more than the transposition of each tile, unless the tiles are read several times."""

    def pick(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> Product:
        device = Device("sm_90", 132)
        return matmul_tiles.matmul(m, n, k, dtype, "tf32", device, vectors=True, descriptors=True)

    assert pick(8192, 4096, 4096).copied
    assert not pick(64, 4096, 65536).copied
    assert not pick(8192, 64, 65536).copied
    assert not pick(8192, 4096, 4096, torch.bfloat16).copied


@pytest.mark.parametrize("way", ["pointers", "descriptors", "descriptors, persistent"])
def test_offsets_of_64_bits(way: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """c's rows lie 2**31 elements apart, the last of which aren't there: the check that nothing wraps sees them."""
    a, b = operands("forward", 33, 24, 24, torch.float16, device)
    monkeypatch.setattr(_launch, "wide", lambda *tensors, elements=0: True)
    with _tiles.force(matmul=WAYS[way]):
        c = matmul_kernels.matmul(a, b, precision="ieee")
        first = torch.empty_strided((1, 24), (2**31 + 8, 1), dtype=torch.float16, device=device)
        matmul_kernels.matmul(a[:1], b, precision="ieee", out=first)
    assert_within_budget(c, a @ b, a.double() @ b.double())
    assert torch.equal(first, c[:1])


@pytest.mark.parametrize("way", ["pointers", "descriptors", "descriptors, shared", "descriptors, persistent"])
def test_nan_and_infinities_in_a_product(way: str, device: torch.device) -> None:
    """They stay in their rows and columns; what is read beyond an edge is zero and multiplies with zeros alone."""
    a, b = operands("forward", 40, 40, 40, torch.float16, device)
    a[3, 5], a[39, 39], b[7, 11], b[39, 0] = float("nan"), float("inf"), float("-inf"), float("inf")
    with _tiles.force(matmul=WAYS[way], sum_partials=Tile(2, 256)):
        sums = None if WAYS[way].programs else torch.empty(40, device=device, dtype=a.dtype)
        c = matmul_kernels.matmul(a, b, precision="ieee", operand_sums=sums)
    assert_within_budget(c, a @ b, a.double() @ b.double())
    if sums is not None:
        assert_within_budget(sums, a.sum(1), a.double().sum(1))


def test_what_fits_a_descriptor() -> None:
    fits = matmul_kernels._fits_a_descriptor
    x = torch.empty(64, 64, dtype=torch.float16)
    assert fits(x) and fits(x.T) and fits(x[1:3]) and fits(x[:, :5]) and fits(x[:, 8:]) and fits(x[::2])
    assert fits(torch.empty(64, 24, dtype=torch.float16))  # 48 bytes: too few for vectors, enough for a descriptor
    assert fits(torch.empty(1, 8, dtype=torch.float16))
    assert not fits(x[:, 1:])  # begins at 2 bytes
    assert not fits(x[:, ::2])
    assert not fits(torch.empty(64, 63, dtype=torch.float16))
    assert not fits(torch.empty(64, 2, dtype=torch.float32))
    assert not fits(x[:0])
    assert not fits(x[:1].expand(64, 64))
    assert not fits(torch.empty(2**31, 8, dtype=torch.float16, device="meta"))


def test_bias_gradient_without_columns(device: torch.device) -> None:
    """No features in: dW is empty, db is not."""
    dz = r(7, 5, device=device)
    db = torch.empty(5, device=device)
    dw = matmul_kernels.matmul(dz.T, r(7, 0, device=device), precision="ieee", operand_sums=db)
    assert dw.shape == (5, 0)
    torch.testing.assert_close(db, dz.sum(0))


def test_weight_gradient_carries_the_bias_gradient(device: torch.device, launched: list[str]) -> None:
    layer = fastlayers.Linear(6, 7).to(device)
    x = r(5, 6, device=device)
    layer(x).backward(torch.ones(5, 7, device=device))
    assert launched == ["_matmul_kernel", "_matmul_kernel"]  # forward, and dW with db
    layer.weight.requires_grad_(False)
    launched.clear()
    layer(x).backward(torch.ones(5, 7, device=device))
    assert launched == ["_matmul_kernel", "_activation_grad_kernel", "_sum_partials_kernel"]


def test_a_gradient_alone_is_a_product(device: torch.device, launched: list[str]) -> None:
    layer = fastlayers.Linear(37, 19).to(device)
    x = r(21, 37, device=device, requires_grad=True)
    for wanted in (x, layer.weight):
        y = layer(x).sum()
        launched.clear()
        torch.autograd.grad(y, wanted)
        assert len(launched) == 1


def test_explain_names_kernel_and_tile(device: torch.device) -> None:
    with _tiles.force(matmul=Product(Tile(16, 32, 16), "ieee", descriptors=True, programs=2)):
        (decision,) = fastlayers.explain(FL.linear, r(64, 16, device=device), r(32, 16, device=device))
    assert decision.kernels == ("matmul_tma_kernel[16x32x16, persistent] on 2 programs",)


STRICT = Product(Tile(32, 16, 16), "tf32x3", descriptors=True)


DATA = {
    "normal": lambda *shape: r(*shape),
    "uniform": lambda *shape: torch.rand(*shape),
    "wide": lambda *shape: r(*shape) * (3 * r(*shape)).exp(),
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("k", [64, 520])
def test_tf32x3_has_the_error_of_float32(k: int, data: str, device: torch.device) -> None:
    """The scheme, in the interpreter's float32 sums. What a tensor core's coarser sums do, only a GPU can say."""
    a, b = DATA[data](40, k).to(device), DATA[data](24, k).to(device).T
    with _tiles.force(matmul=STRICT):
        c = matmul_kernels.matmul(a, b, precision="ieee")
    assert_within_budget(c, a @ b, a.double() @ b.double())


def test_what_keeps_tf32x3_from_being_the_default(device: torch.device) -> None:
    """Infinite and NaN factors come out right. A finite factor within 2**-12 of the maximum rounds to an infinite one, and
    below 2**-114 or so the second part of a factor underflows."""

    def error(least: float, most: float, other: float) -> float:
        a = least + (most - least) * torch.rand(16, 32, device=device)
        b = other * torch.rand(16, 32, device=device).T
        with _tiles.force(matmul=STRICT):
            c = matmul_kernels.matmul(a, b, precision="ieee")
        exact = a.double() @ b.double()
        return ((c - exact).norm() / exact.norm()).item()

    a, b = r(16, 32, device=device), r(16, 32, device=device).T
    a[3, 5], a[4, 6], a[5, 7], b[8, 9] = float("inf"), float("nan"), float("-inf"), float("inf")
    with _tiles.force(matmul=STRICT):
        c = matmul_kernels.matmul(a, b, precision="ieee")
    assert_within_budget(c, a @ b, a.double() @ b.double())
    maximum = torch.finfo(torch.float32).max
    assert error(maximum / 2, maximum * (1 - 2**-11), 1e-6) < 1e-6
    assert not error(maximum * (1 - 2**-13), maximum, 1e-6) < 1
    assert error(2.0**-111, 2.0**-110, 2.0**100) < 1e-6
    assert error(2.0**-131, 2.0**-130, 2.0**100) > 1e-5
