"""Linear: bad input, splitting of long sums, float32's switch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastlayers
import fastlayers.functional as FL
from fastlayers.kernels import _launch, _tiles
from fastlayers.kernels import matmul as matmul_kernels
from fastlayers.kernels._tiles import Device, Tile
from fastlayers.testing import assert_within_budget

r = torch.randn
BAD = {
    "features": lambda: (r(3, 4), r(5, 3)),
    "bias": lambda: (r(3, 4), r(5, 4), r(4)),
    "scalar": lambda: (r(()), r(5, 4)),
    "dtypes": lambda: (r(3, 4), r(5, 4).double()),
    "bias dtype": lambda: (r(3, 4), r(5, 4), r(5).double()),
    "none": lambda: (None, r(5, 4)),
    "no weight": lambda: (r(3, 4), None),
    "list": lambda: ([1.0], r(5, 4)),
    "bias list": lambda: (r(3, 4), r(5, 4), [1.0]),
    "devices": lambda: (r(3, 4), r(5, 4, device="meta"), r(5)),
    "too few": lambda: (r(3, 4),),
    "three dimensions": lambda: (r(3, 4), r(5, 4, 2)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's exception, before anything is launched."""
    args: Any = BAD[case]()
    monkeypatch.setattr(_launch, "launch", lambda *a, **k: pytest.fail("launched"))
    try:
        F.linear(*args)
    except Exception as error:
        with fastlayers.policy("auto"), pytest.raises(type(error)):
            FL.linear(*args)
    else:
        with fastlayers.policy("auto"):
            FL.linear(*args)


@pytest.mark.parametrize(
    "shapes", [((4,), (4,), None), ((3, 4), (5, 4), (1,)), ((3, 4), (5, 4), ()), ((3, 4), (5, 4), (3, 5))]
)
def test_what_torch_takes_and_we_dont(shapes: tuple, device: torch.device) -> None:
    args = [None if s is None else r(s, device=device) for s in shapes]
    with fastlayers.policy("auto"):
        torch.testing.assert_close(FL.linear(*args), F.linear(*args))


@pytest.mark.parametrize("shape", [((3, 0), (5, 0)), ((3, 4), (0, 4)), ((2, 0, 4), (5, 4)), ((0,), (3, 0))])
def test_sizes_of_zero(shape: tuple[tuple[int, ...], tuple[int, int]], device: torch.device) -> None:
    x, w, b = r(shape[0], device=device), r(shape[1], device=device), r(shape[1][0], device=device)
    results = []
    for linear in (FL.linear, F.linear):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        y = linear(*leaves)
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert a.shape == b.shape


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
        assert _tiles.matmul(19, 18, 203, dtype, "ieee", Device("sm_90", 5), vectors=True, light=True)[1] == 3
        out, _ = matmul_kernels.matmul(a, b, bias=c, then="relu", precision="ieee")
        again, _ = matmul_kernels.matmul(a, b, bias=c, then="relu", precision="ieee")
    assert torch.equal(out, again)
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


def test_tf32_is_within_its_own_rounding(device: torch.device) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    x, w = r(33, 65, device=device), r(17, 65, device=device)
    exact = F.linear(x.double(), w.double())
    error = (FL.linear(x, w) - exact).norm() / exact.norm()
    assert 1e-6 < error < 2**-9  # coarser than float32, as asked; no coarser than 10 bits of mantissa
