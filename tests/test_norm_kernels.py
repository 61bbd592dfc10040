"""The kernels of kernels/norm.py by themselves, through their launchers and in tiles that no caller can ask for.

This file looks inside: it is about what the public functions can't show, such as rows that are longer than a tile, outputs
that nobody asked for, and how the sums for weight and bias are shared out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from fastlayers.kernels import dropout, norm
from fastlayers.kernels.runtime import launch, tiles
from fastlayers.kernels.runtime.tiles import Device, Tile
from fastlayers.testing import assert_within_budget, neighbours

EPS = 1e-5
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
Results = dict[str, "torch.Tensor | None"]


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


class Case:
    """One layer's tensors, run by our launchers, and by torch in any dtype."""

    def __init__(
        self,
        x: torch.Tensor,
        size: int,
        *,
        residual: torch.Tensor | None = None,
        weight: torch.dtype | None = torch.float32,
        bias: torch.dtype | None = torch.float32,
        out: torch.dtype | None = None,
        center: bool = True,
    ) -> None:
        self.x, self.residual, self.size, self.center, self.device = x, residual, size, center, x.device
        bias = bias if center else None
        self.weight = None if weight is None else torch.randn(size, device=x.device).to(weight)
        self.bias = None if bias is None else torch.randn(size, device=x.device).to(bias)
        self.total = x if residual is None else x + residual
        self.out_dtype = out or self.total.dtype
        self.statistic = torch.promote_types(self.total.dtype, torch.float32)
        self.rows = x.numel() // size

    def new(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return poisoned(*shape, dtype=dtype, device=self.device)

    def ours(self, dy: torch.Tensor | None, dtotal: torch.Tensor | None = None, wanted: str = "xwb") -> Results:
        """Every result by name; of the gradients those of what is `wanted`."""
        out = self.new(self.out_dtype, *self.x.shape)
        total = None if self.residual is None else self.new(self.total.dtype, *self.x.shape)
        mean = self.new(self.statistic, self.rows) if self.center else None
        rstd = self.new(self.statistic, self.rows)
        norm.layer_norm(
            self.x, self.residual, self.weight, self.bias, out, total, mean, rstd, self.size, EPS, self.center
        )
        dx = self.new(self.total.dtype, *self.x.shape) if "x" in wanted else None
        dw = None if self.weight is None or "w" not in wanted else self.new(self.weight.dtype, self.size)
        db = None if self.bias is None or "b" not in wanted else self.new(self.bias.dtype, self.size)
        saved = (None,) * 3 if wanted == "b" else (self.x if total is None else total, mean, rstd)
        x, mean_, rstd_ = saved
        norm.layer_norm_grad(dy, dtotal, x, self.weight, mean_, rstd_, dx, dw, db, self.size, self.center)
        return {"out": out, "total": total, "mean": mean, "rstd": rstd, "dx": dx, "dw": dw, "db": db}

    def torchs(self, dtype: torch.dtype, total: torch.Tensor, dy: torch.Tensor, dtotal: torch.Tensor | None) -> Results:
        """The same of rows `total` by torch's own functions, in `dtype`."""
        x = total.to(dtype, copy=True).requires_grad_()
        w, b = (None if t is None else t.to(dtype, copy=True).requires_grad_() for t in (self.weight, self.bias))
        y = F.layer_norm(x, (self.size,), w, b, EPS) if self.center else F.rms_norm(x, (self.size,), w, EPS)
        found: Results = {"out": y.detach(), "total": total, "dx": None, "dw": None, "db": None}
        asked = {name: leaf for name, leaf in (("dx", x), ("dw", w), ("db", b)) if leaf is not None}
        found |= dict(zip(asked, torch.autograd.grad(y, [*asked.values()], dy.to(dtype)), strict=True))
        if dtotal is not None:
            found["dx"] = found["dx"] + dtotal.to(dtype)
        x = x.detach().to(torch.promote_types(dtype, torch.float32))
        variance = x.var(1, correction=0) if self.center else x.square().mean(1)
        return found | {"rstd": (variance + EPS).rsqrt(), "mean": x.mean(1)}

    def check(self, *, dtotal: bool = False, wanted: str = "xwb") -> Results:
        """Ours against torch's: at most twice its error, judged by float64."""
        dy = torch.randn(self.x.shape, device=self.device).to(self.out_dtype)
        extra = torch.randn(self.x.shape, device=self.device).to(self.total.dtype) if dtotal else None
        ours = self.ours(dy, extra, wanted)
        total, dy = self.total.reshape(self.rows, self.size), dy.reshape(self.rows, self.size)
        extra = None if extra is None else extra.reshape(self.rows, self.size)
        exact = self.torchs(torch.float64, total, dy, extra)
        judged = [self.torchs(total.dtype, *moved, extra) for moved in neighbours(total, dy)]
        for name, result in ours.items():
            if result is None:
                continue
            right = exact[name].reshape(result.shape)
            theirs = [found[name].reshape(result.shape).to(result.dtype) for found in judged]
            if name == "mean":  # the terms may cancel, and are as exact as their own size lets them be
                most = torch.finfo(result.dtype).eps * total.abs().max().item()
                torch.testing.assert_close(result.double(), right, rtol=0, atol=4 * most)
            else:
                assert_within_budget(result, theirs, right, name, scale=1)
        return ours


@pytest.fixture(params=[Tile(2, 32, stages=1), Tile(2, 16, stages=2)], ids=["rows", "blocks"])
def small(request: pytest.FixtureRequest) -> Iterator[Tile]:
    """Rows of 17 to 32 elements: two in a tile, or each in two blocks."""
    with tiles.force(layer_norm=request.param, sum_partials=Tile(2, 32)):
        yield request.param


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_designs(small: Tile, dtype: torch.dtype, center: bool, device: torch.device) -> None:
    Case(torch.randn(5, 29, device=device).to(dtype), 29, weight=dtype, bias=dtype, center=center).check()


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_is_normalised_as_it_was_rounded(
    small: Tile, dtype: torch.dtype, center: bool, device: torch.device
) -> None:
    x, residual = (torch.randn(3, 2, 24, device=device).to(dtype) for _ in range(2))
    case = Case(x, 24, residual=residual, weight=dtype, bias=dtype, center=center)
    ours = case.check(dtotal=True)
    assert torch.equal(ours["total"], x + residual)
    # Where nobody asks for the sum it is rounded all the same.
    out = case.new(dtype, *x.shape)
    norm.layer_norm(x, residual, case.weight, case.bias, out, None, None, None, 24, EPS, center)
    assert torch.equal(out, ours["out"])


@pytest.mark.parametrize("size", [1, 3, 17, 100, 520, 1025])
def test_shipped_tiles(size: int, device: torch.device) -> None:
    Case(torch.randn(3, size, device=device), size).check()


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 20000), (torch.float64, 16385)])
def test_rows_too_long_for_registers(dtype: torch.dtype, size: int, device: torch.device) -> None:
    Case(torch.randn(2, size, device=device).to(dtype), size, weight=dtype, bias=dtype).check(dtotal=True)


@pytest.mark.parametrize(("weight", "bias"), [(None, None), (torch.float32, None), (None, torch.float32)])
def test_without_weight_or_bias(
    small: Tile, weight: torch.dtype | None, bias: torch.dtype | None, device: torch.device
) -> None:
    Case(torch.randn(5, 24, device=device), 24, weight=weight, bias=bias).check()


@pytest.mark.parametrize("wanted", ["", "x", "w", "b", "xw", "xb", "wb"])
def test_only_what_is_asked_for(small: Tile, wanted: str, device: torch.device) -> None:
    """The same numbers as if all were asked for; for the gradient of the bias alone nothing was saved."""
    case = Case(torch.randn(5, 24, device=device), 24)
    dy = torch.randn_like(case.x)
    everything, some = case.ours(dy), case.ours(dy, wanted=wanted)
    for name in ("x", "w", "b"):
        result = some[f"d{name}"]
        assert (result is not None) == (name in wanted)
        if result is not None:
            assert torch.equal(result, everything[f"d{name}"])


def test_statistics_need_not_be_written(small: Tile, device: torch.device) -> None:
    case = Case(torch.randn(5, 24, device=device), 24)
    out = torch.full_like(case.x, float("nan"))
    norm.layer_norm(case.x, None, case.weight, case.bias, out, None, None, None, 24, EPS)
    assert torch.equal(out, case.ours(torch.randn_like(out))["out"])


@pytest.mark.parametrize("dtotal", [False, True])
def test_no_gradient_of_the_output(dtotal: bool, device: torch.device) -> None:
    case = Case(torch.randn(5, 24, device=device), 24)
    extra = torch.randn(5, 24, device=device) if dtotal else None
    ours = case.ours(None, extra)
    assert torch.equal(ours["dx"], torch.zeros_like(case.x) if extra is None else extra)
    assert not ours["dw"].any() and not ours["db"].any()
    assert case.ours(None, extra, "w")["dx"] is None


@pytest.mark.parametrize("center", [True, False])
def test_mixed_dtypes(small: Tile, center: bool, device: torch.device) -> None:
    """float32 weights below a 16-bit input, the reverse, and a result that autocast widens."""
    x = torch.randn(5, 24, device=device)
    half, full = torch.bfloat16, torch.float32
    for case in (
        Case(x.to(half), 24, weight=full, bias=full, center=center),
        Case(x, 24, weight=half, bias=half, center=center),
        Case(x.to(half), 24, weight=half, bias=full, out=full, center=center),
        Case(x.to(half), 24, residual=x, weight=full, bias=half, out=half, center=center),
    ):
        case.check(dtotal=True)


def test_strides(small: Tile, device: torch.device) -> None:
    """Rows with gaps, rows that can't be seen as a matrix, columns as rows, one row for all, several last dimensions."""
    wide = torch.randn(2, 3, 40, device=device)
    for x in (
        wide[..., 8:32],
        wide[:, :, 3:27].transpose(0, 1),
        torch.randn(24, 3, device=device).t(),
        torch.randn(1, 24, device=device).expand(3, 24),
        torch.randn(3, 2, 3, 4, device=device).permute(0, 3, 1, 2),
    ):
        Case(x, 24, residual=torch.randn(*x.shape[:-1], 30, device=device)[..., : x.shape[-1]]).check()
    x, dy, dtotal = torch.randn(3, 24, device=device), *torch.randn(2, 3, 48, device=device)
    case = Case(x, 24)
    plain = case.ours(dy[:, ::2].contiguous(), dtotal[:, 3:27].contiguous())
    case.weight = torch.stack([case.weight, case.weight], 1)[:, 0]
    for name, result in case.ours(dy[:, ::2], dtotal[:, 3:27]).items():
        torch.testing.assert_close(result, plain[name])


def test_a_mean_far_from_zero(small: Tile, device: torch.device) -> None:
    """mean / std = 10,000: what E[x^2] - E[x]^2 would have nothing left of."""
    Case(torch.randn(6, 29, device=device) + 1e4, 29).check()


def test_a_first_block_unlike_the_rest(device: torch.device) -> None:
    """The shift of a long row is the mean of its first block. Where that says little about the row, little is lost."""
    x = torch.randn(3, 61, device=device) + 1e4
    x[:, :16] = torch.randn(3, 16, device=device)
    with tiles.force(layer_norm=Tile(1, 16, stages=1)):
        Case(x, 61).check()


def test_nan_inf_and_constant_rows(small: Tile, device: torch.device) -> None:
    x = torch.randn(8, 24, device=device)
    x[0, 3] = float("nan")
    x[2, 5] = float("inf")
    x[3, 20] = float("-inf")
    x[5] = 0
    x[6] = 1.1
    for center in (True, False):
        case = Case(x, 24, weight=None, bias=None, center=center)
        dy = torch.randn_like(x)
        ours, torchs = case.ours(dy), case.torchs(x.dtype, x, dy, None)
        for name in ("out", "dx"):
            # Of a constant row the variance is rounding alone, and its root is divided by.
            torch.testing.assert_close(ours[name], torchs[name], equal_nan=True, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_from_in_the_same_kernel(
    dtype: torch.dtype, center: bool, device: torch.device, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of a dropout and a norm by themselves, where torch's threads take several turns, also within a row; with and
    without the residual's gradient and the sum's. Rows that are longer than a tile take a launch more each way."""
    x, residual, dy, dtotal = torch.randn(4, 140, 40, device=device).to(dtype)
    w, b = torch.randn(2, 40, device=device).to(dtype)
    drop = dropout.Drop(torch.tensor([2**40 + int(x[0, 0] * 1000), 8]), 0.3, 1 / 0.7, 16 // dtype.itemsize)

    def run(dtotal: torch.Tensor | None, of_residual: bool) -> list[torch.Tensor | None]:
        new = [poisoned(140, 40, dtype=dtype, device=device) for _ in range(4)]
        out, total, dx, dropped = new
        statistic = torch.promote_types(dtype, torch.float32)
        mean, rstd = (poisoned(140, dtype=statistic, device=device) for _ in range(2))
        norm.layer_norm(x, residual, w, b if center else None, out, total, mean, rstd, 40, EPS, center, drop)
        dw, db = (poisoned(40, dtype=dtype, device=device) for _ in range(2))
        given = dy, dtotal, total, w, mean if center else None, rstd, dx if of_residual else None, dw
        norm.layer_norm_grad(*given, db if center else None, 40, center, (drop, dropped))
        return [out, total, dx if of_residual else None, dropped, dw]

    for arguments in ((dtotal, True), (None, True), (dtotal, False)):
        launched.clear()
        one = run(*arguments)
        assert not [name for name in launched if "dropout" in name]
        kept = one[3] != 0
        assert 0.6 < kept.double().mean() < 0.8
        with monkeypatch.context() as patched:
            patched.setattr(dropout.Drop, "fits", lambda *args: False)
            two = run(*arguments)
        assert launched.count("_dropout_chunks_kernel") == 2
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    launched.clear()
    with tiles.force(layer_norm=Tile(1, 16, stages=1)):
        in_blocks = run(dtotal, True)
    assert launched.count("_dropout_chunks_kernel") == 2
    assert torch.equal(in_blocks[1], two[1])


@pytest.mark.parametrize("multiprocessors", [1, 2, 100])
def test_sums_over_rows_are_shared_out(
    small: Tile, multiprocessors: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By fewer programs than there are tiles of rows, as many, and no more; twice the same bits."""
    monkeypatch.setattr(tiles, "device", lambda device: Device("interpreter", multiprocessors))
    monkeypatch.setitem(norm._WARPS, torch.float32, 8)
    programs, run = [], launch.launch

    def counting(kernel: object, count: int, *args: object, **meta: object) -> None:
        if kernel is norm._layer_norm_grad_kernel:
            programs.append(count)
        run(kernel, count, *args, **meta)

    monkeypatch.setattr(launch, "launch", counting)
    case = Case(torch.randn(11, 24, device=device), 24)
    dy = torch.randn_like(case.x)
    first, second = case.ours(dy), case.ours(dy)
    assert all(torch.equal(first[name], second[name]) for name in ("dx", "dw", "db"))
    blocks = 24 // small.n + 1 if small.n < 24 else 1
    assert programs == [blocks * min(6, max(1, 2 * multiprocessors // blocks))] * 2


def test_64_bit_offsets(small: Tile, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "wide", lambda *tensors, elements=0: True)
    x, residual = torch.randn(5, 24, device=device), torch.randn(5, 24, device=device)
    Case(x, 24, residual=residual).check(dtotal=True)


@pytest.mark.parametrize("shape", [(0, 24), (3, 0)])
def test_nothing_to_normalise(shape: tuple[int, int], device: torch.device) -> None:
    rows, size = shape
    x = torch.empty(shape, device=device)
    dw = poisoned(size, dtype=x.dtype, device=device)
    statistics = torch.zeros(rows, device=device)
    norm.layer_norm(x, None, None, None, x.clone(), None, statistics, statistics, size, EPS)
    norm.layer_norm_grad(x, None, x, None, statistics, statistics, x.clone(), dw, dw.clone(), size)
    assert not dw.any()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_picks(architecture: str) -> None:
    """Whole rows as far as a table goes, blocks beyond, and a workgroup that AMD's 64 lanes a warp can launch."""
    device = Device(architecture, 100)
    for gradient, dtype in ((g, d) for g in (False, True) for d in (torch.float32, torch.float64)):
        table = (norm._ROWS_GRAD if gradient else norm._ROWS)[dtype]
        for size, vector in itertools.product((1, 16, 17, 100, 1024, table[-1].n), (1, 8)):
            tile = norm._tile(size, dtype, vector, device, gradient)
            whole = size <= tile.n < 2 * max(size, 16)
            assert (whole or (vector == 1 and tile.n == norm._BLOCKS[dtype].n)) and tile.warps <= 16
        assert norm._tile(table[-1].n + 1, dtype, 8, device, gradient) == norm._BLOCKS[dtype]
