"""The product by warps with a job each: what it computes and how it waits, emulated; how it is chosen; not its speed."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

emulated_gluon = pytest.importorskip("emulated_gluon")  # Gluon comes with triton 3.6

from activations import RELU  # noqa: E402

from fastlayers.kernels.matmul import matmul  # noqa: E402
from fastlayers.kernels.matmul import tiles as matmul_tiles  # noqa: E402
from fastlayers.kernels.runtime import launch as _launch  # noqa: E402
from fastlayers.kernels.runtime import tiles as _tiles  # noqa: E402

HOPPER = _tiles.Device("sm_90", 132)


def relu(x: Any, options: tuple[float, ...] = ()) -> Any:
    return np.maximum(x, 0)


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("transposed", list(itertools.product((False, True), repeat=2)))
def test_emulated(stages: int, transposed: tuple[bool, bool]) -> None:
    """In all layouts of the operands: one step and many, tiles over the edge in each dimension, several tiles for a program
    and none, more stages than steps."""
    rng = np.random.default_rng(int(torch.randint(2**31, ()).item()))
    for (m, n, k), programs in (((8, 6, 4), 1), ((23, 14, 21), 2), ((9, 20, 3), 7), ((40, 5, 9), 1), ((1, 1, 1), 1)):
        a, b, bias = (rng.standard_normal(shape) for shape in ((m, k), (k, n), (n,)))
        for with_bias, then in ((None, None), (bias, relu)):
            c = emulated_gluon.matmul(
                a, b, with_bias, then, (8, 6, 4),
                stages=stages, programs=programs, transposed=transposed, seed=int(rng.integers(2**31)),
            )  # fmt: skip
            right = a @ b + (0 if with_bias is None else bias)
            np.testing.assert_allclose(c, right if then is None else relu(right), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("broken", [dict(free_count=1), dict(stores_wait=False)], ids=str)
def test_the_emulation_sees_what_it_is_for(broken: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage given back by one consumer alone, a tile overwritten before it is read: wrong, or a job that hangs."""
    monkeypatch.setattr(emulated_gluon, "SECONDS", 1)
    a, b = np.arange(64.0)[:, None] * np.ones((64, 40)), np.ones((40, 12))

    def is_wrong(seed: int) -> bool:
        options: dict[str, Any] = dict(stages=2, programs=1, transposed=(False, True), seed=seed)
        try:
            c = emulated_gluon.matmul(a, b, None, None, (8, 6, 4), **options, **broken)
        except (AssertionError, TimeoutError):
            return True
        return not np.allclose(c, a @ b)

    assert any(is_wrong(seed) for seed in range(20))


def test_nobody_picks_it_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device has run it. Once it is let in: large products in 16 bits alone, with nothing but a bias to their results."""

    def pick(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> matmul_tiles.Product:
        options = {"plain": True} | options
        return matmul_tiles.matmul(m, n, k, dtype, "tf32", HOPPER, vectors=True, descriptors=True, **options)

    assert matmul_tiles.SPECIALIZED == ()
    assert not pick(8192, 8192, 4096).specialized
    monkeypatch.setattr(matmul_tiles, "SPECIALIZED", ("sm_90",))
    matmul_tiles._through_descriptors.cache_clear()
    try:
        assert pick(8192, 8192, 4096) == matmul_tiles.specialized(HOPPER)
        assert not pick(8192, 8192, 4096, torch.float32).specialized
        assert not pick(8192, 8192, 4096, plain=False).specialized
        assert not pick(16, 8192, 4096).specialized
        assert not pick(512, 784, 65536).specialized
    finally:
        matmul_tiles._through_descriptors.cache_clear()


def test_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """matmul hands over what has nothing but a bias and an activation, to be written in rows; the rest goes its old way."""
    launched: list[Any] = []
    monkeypatch.setattr(
        _launch, "launch", lambda kernel, programs, *args, **meta: launched.append((kernel, programs, args, meta))
    )
    monkeypatch.setattr(_tiles, "device", lambda device: HOPPER)
    monkeypatch.setattr(matmul_tiles, "SPECIALIZED", ("sm_90",))
    matmul_tiles._through_descriptors.cache_clear()
    try:
        t = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")  # noqa: E731
        a, b, bias = t(8192, 4096), t(8192, 4096).T, t(8192)
        matmul.matmul(a, b, bias=bias, then=RELU, precision="ieee")
        ((kernel, programs, args, meta),) = launched
        assert kernel.__name__ == "_matmul_specialized_kernel"
        assert programs == 132
        c_tiles, a_tiles, b_tiles = args[1:4]
        assert (c_tiles.block_shape, a_tiles.block_shape, b_tiles.block_shape) == ([64, 256], [64, 64], [256, 64])
        assert args[4] is bias
        assert (meta["A_TRANSPOSED"], meta["B_TRANSPOSED"], meta["STAGES"]) == (False, True, 3)
        for options in (
            dict(undo=(RELU, t(8192, 8192))), dict(column_sums=t(8192)), dict(operand_sums=t(8192)),
            dict(out=t(8192, 8192).T), dict(out=t(8192, 8195)[:, :8192]),
        ):  # fmt: skip
            launched.clear()
            matmul.matmul(a, b, precision="ieee", **options)  # type: ignore[arg-type]
            assert launched[0][0].__name__ == "_matmul_tma_kernel", options
    finally:
        matmul_tiles._through_descriptors.cache_clear()
