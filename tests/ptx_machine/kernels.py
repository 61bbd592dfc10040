"""The project's kernels, compiled and run in the machine, forward and backward, against float64: run by test_ptx_machine.py in a
process of its own.

Every case of the catalog brings its runs, in each dtype and for each target; what layers of these sizes don't reach (tensor
descriptors, shares of K, transposed products, boxes) follows it, and whole networks are trained (training.py). coverage.py keeps
which kernels each run has launched.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import contract
import pytest
import torch
from activations import RELU

import fastlayers
import fastlayers.functional as FL
from bench import workloads
from fastlayers.catalog import ROWS, Case, Row
from fastlayers.catalog.gated_mlp import Mlp
from fastlayers.catalog.rotary import Projections
from fastlayers.catalog.row import Classes, Floats, case
from fastlayers.kernels.conv import tiles as conv_tiles
from fastlayers.kernels.matmul import matmul
from fastlayers.kernels.matmul import tiles as matmul_tiles
from fastlayers.kernels.matmul.tiles import Product
from fastlayers.kernels.runtime import tiles
from fastlayers.kernels.runtime.tiles import Tile
from fastlayers.testing import assert_within_budget, neighbours

from . import bridge, coverage, of_rows, training
from .coverage import TARGETS

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16, "f64": torch.float64}
LAST = torch.channels_last
pytestmark = [
    pytest.mark.filterwarnings("ignore:CUDA initialization"),  # by a torch with CUDA, which finds the stub
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]
H100 = tiles.Device("sm_90", 132)


@dataclass(frozen=True)
class Run:
    label: str
    """What runs, in which arithmetic, for which target."""
    call: Callable[[], None]
    """Raises an AssertionError where a number is wrong."""
    quick: bool
    """Whether it is in `make test`."""

    @property
    def target(self) -> str:
        return self.label.rsplit(", ", 1)[1]


def near(got: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor, precision: str) -> None:
    """For sums of float32 products. How far off torch's own sums on the CPU are depends on the CPU; that the kernels' are as good
    is judged elsewhere. In TF32 both factors of each product are cut off to 10 bits.

    Args:
        scale: the sums of the absolute products.
    """
    assert ((got.double() - exact).abs() <= (2**-9 if precision == "tf32" else 2**-20) * scale + 1e-30).all()


def _layer(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    contract.check(case, case.arguments(dtype), dtype=dtype)


def _layer_in_tf32(case: Case, several: bool = False) -> None:
    """By norm, because of layers in a row no scale is known. Args:
    several: whether it consists of a dozen products one after the other, of which each cuts its factors off.
    """
    torch.manual_seed(0)
    arguments = case.arguments(torch.float32)
    with workloads.precision("tf32"):
        ours, theirs = contract.pair(case, torch.float32, torch.device("cpu"))
        dys = [torch.randn_like(y) for y in contract.results(theirs, arguments)]
        mine = contract.values(ours, arguments, dys)
    exact = contract.replaced(arguments, [t.double() for t in contract.floats(arguments)])
    for a, c in zip(mine, contract.values(theirs.double(), exact, [dy.double() for dy in dys]), strict=True):
        assert (a.double() - c).norm() <= (2e-2 if several else 4e-3) * c.norm() + 1e-6


def _layers() -> Iterator[Run]:
    """Every case of the catalog; in `make test` the first of each family, in bfloat16."""
    families: set[str] = set()
    for row in ROWS:
        family = type(row.operation).__module__
        first = family not in families
        families.add(family)
        for i, (name, unscaled) in enumerate(row.cases.items()):
            given = unscaled._replace(scale=row.scale, random=row.random)
            for target in TARGETS:
                for short, dtype in DTYPES.items():
                    if (short, target) == ("f16", "sm_80"):
                        continue  # bfloat16's code with other names in it
                    quick = first and i == 0 and short == "bf16" and target == "sm_90"
                    yield Run(f"{row.name} {name}, {short}, {target}", functools.partial(_layer, given, dtype), quick)
                if "tf32" in workloads.modes(row):
                    call = functools.partial(_layer_in_tf32, given, row.operation is None)
                    yield Run(f"{row.name} {name}, tf32, {target}", call, False)


def _randn(dtype: torch.dtype, *shape: int, transposed: bool = False) -> torch.Tensor:
    return torch.randn(shape[::-1]).to(dtype).T if transposed else torch.randn(shape).to(dtype)


def _product(product: Product, dtype: torch.dtype, a_transposed: bool, b_transposed: bool, odd: int) -> None:
    """Sizes across the edges of a tile, with bias and ReLU, the derivative of a ReLU, and every sum that the way has. Args:
    odd: how far the sizes are from multiples of 16.
    """
    torch.manual_seed(0)
    tile = product.tile
    steps = 5 if product.specialized else 2 * product.splits  # more of them than its ring has buffers
    m, n, k = tile.m + 16 + odd, tile.n + 16 + odd, steps * tile.k + 16 + odd
    a, b = _randn(dtype, m, k, transposed=a_transposed), _randn(dtype, k, n, transposed=b_transposed)
    if product.transposed:
        a, b, m, n = b.T, a.T, n, m
    if product.programs:
        product = replace(product, programs=2)
    bias, saved, A, B = _randn(dtype, n), _randn(dtype, m, n), a.double(), b.double()
    exact, scale = A @ B, A.abs() @ B.abs()

    def check(got: torch.Tensor, right: torch.Tensor, approximate: torch.Tensor, scale: torch.Tensor) -> None:
        if product.precision == "tf32":
            near(got, right, scale, "tf32")
        else:
            assert_within_budget(got, approximate, right)

    def sums(wanted: bool, size: int) -> torch.Tensor | None:
        return torch.full((size,), float("nan"), dtype=dtype) if wanted else None

    rows = sums(not (product.transposed or product.programs or product.specialized), m)
    columns = sums(not (product.transposed or product.splits > 1 or product.specialized), n)
    with tiles.force(matmul=product):
        c = matmul.matmul(a, b, precision=product.precision, bias=bias, then=RELU, operand_sums=rows)
        check(c, (exact + bias.double()).relu(), torch.addmm(bias, a, b).relu(), scale + bias.double().abs())
        if product.specialized:
            return
        c = matmul.matmul(a, b, precision=product.precision, undo=(RELU, saved), column_sums=columns)
    mask = saved > 0
    check(c, exact * mask, (a @ b) * mask, scale)
    if rows is not None:
        assert_within_budget(rows, a.sum(1), A.sum(1))
    if columns is not None:
        check(columns, (exact * mask).sum(0), ((a @ b) * mask).sum(0), (scale * mask).sum(0))


_LAYOUTS = {
    "forward": (False, True), "input gradient": (False, False), "weight gradient": (True, False), "both": (True, True),
}  # fmt: skip
"""Which operands are stored as their transposes."""


def _product_runs(kind: str) -> Iterator[tuple[str, str, int]]:
    """Of each product: a dtype, a layout, and how far the sizes are from multiples of 16."""
    short = "bf16" if kind == "16" else "f32"
    for layout in _LAYOUTS:
        yield short, layout, 8
    yield short, "weight gradient", 0
    if kind == "16":
        yield "f16", "forward", 8


_COPIED_RUNS = (("f32", "weight gradient", 4), ("f32", "input gradient", 0))
"""The same of those whose operands are copied, after which they are a forward product's."""


def _products() -> Iterator[Run]:
    """Every product through descriptors; in `make test` the smallest tile of each way. And TF32 through pointers, whose rows of
    the left operand are summed."""
    for kind, products in matmul_tiles.descriptor_products("sm_90").items():
        seen = set()
        for product in sorted(products, key=lambda p: p.tile.m * p.tile.n):
            way = " persistent" * (product.programs > 0) + " shared" * (product.splits > 1)
            way += " transposed" * product.transposed + " copied" * product.copied
            name = f"product {product.tile.m}x{product.tile.n}x{product.tile.k}{way}"
            runs = _COPIED_RUNS if product.copied else _product_runs(kind)
            for short, layout, odd in runs:
                quick = (kind, short, layout, odd) == ("16", "bf16", "weight gradient", 8) and way not in seen
                if quick:
                    seen.add(way)
                call = functools.partial(_product, product, DTYPES[short], *_LAYOUTS[layout], odd)
                arithmetic = short if kind == "16" else kind
                yield Run(f"{name} {layout}{f' of rows of {odd}' * (odd > 0)}, {arithmetic}, sm_90", call, quick)
    for layout, (a, b) in _LAYOUTS.items():
        call = functools.partial(_product, matmul_tiles.specialized(H100), torch.bfloat16, a, b, 0)
        yield Run(f"product specialized {layout}, bf16, sm_90", call, layout == "forward")
        for target in TARGETS:
            product = Product(matmul_tiles.products(target)["tf32", "medium"], "tf32")
            call = functools.partial(_product, product, torch.float32, a, b, 0)
            quick = layout == "weight gradient" and target == "sm_90"
            yield Run(f"product through pointers {layout}, tf32, {target}", call, quick)


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((2, 64, 9, 7), (64, 64, 3, 3), dict(padding=1)),
    "7x5 dilated": ((1, 64, 5, 6), (128, 64, 7, 5), dict(padding=(6, 4), dilation=2)),
    "3x3 stride 2": ((2, 64, 8, 12), (64, 64, 3, 3), dict(padding=1, stride=2)),
    "4x4 stride 3": ((2, 48, 9, 12), (80, 48, 4, 4), dict(padding=2, stride=3)),
    "stem": ((1, 3, 33, 32), (64, 3, 7, 7), dict(padding=3, stride=2)),
    "72 to 40 channels": ((2, 72, 6, 6), (40, 72, 3, 3), dict(padding=1)),
    "groups of 32": ((2, 64, 6, 6), (64, 32, 3, 3), dict(padding=1, groups=2)),
    "groups packed": ((2, 128, 6, 6), (256, 4, 3, 3), dict(padding=1, groups=32)),
    "large padding": ((1, 64, 4, 5), (64, 64, 3, 3), dict(padding=3)),
}


@contextlib.contextmanager
def boxes_from(least: int) -> Iterator[None]:
    """Within, convolutions of so many FLOPs and more load boxes."""
    before, conv_tiles.BOX_FLOPS = conv_tiles.BOX_FLOPS, least
    try:
        yield
    finally:
        conv_tiles.BOX_FLOPS = before


def _convolution(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    geometry: dict[str, Any],
    dtype: torch.dtype,
    last: bool,
    least: int,
) -> None:
    """Args:
    least: the FLOPs from which boxes are loaded.
    """
    torch.manual_seed(0)
    format = LAST if last else torch.contiguous_format
    given = [torch.randn(shape).to(dtype).to(memory_format=format) for shape in (x_shape, w_shape)]
    given.append(torch.randn(w_shape[0]).to(dtype))
    precision = "tf32" if dtype == torch.float32 and least == 0 else "ieee"

    def values(function: Any, tensors: list[torch.Tensor], dy: torch.Tensor | None) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = function(*leaves, **geometry)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y) if dy is None else dy)]

    reference = torch.nn.functional.conv2d
    dy = torch.randn(reference(*given, **geometry).shape).to(dtype).to(memory_format=format)
    with boxes_from(least), workloads.precision(precision):
        ours = values(FL.conv2d, given, dy)
    exact = values(reference, [t.double() for t in given], dy.double())
    scale = values(reference, [t.double().abs() for t in given], dy.double().abs())
    torchs = zip(*(values(reference, [*close], its) for *close, its in neighbours(*given, dy)), strict=True)
    for got, right, size, approximate in zip(ours, exact, scale, torchs, strict=True):
        if dtype == torch.float32:
            near(got, right, size, precision)
        else:
            assert_within_budget(got, approximate, right)


def _measured(dtype: torch.dtype, last: bool, least: int) -> None:
    """A convolution that measures its result for a batch normalisation in training. Args:
    least: the FLOPs from which boxes are loaded.
    """
    given = case(
        lambda nn: nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()),
        Floats((3, 16, 9, 8), channels_last=last),
    )
    with boxes_from(least):
        _forced(functools.partial(_layer, given._replace(scale=1), dtype), **_IN_PARTS, batch_norm_partials=Tile(4, 4))


def _measured_convolutions() -> Iterator[Run]:
    for order, last in (("NHWC", True), ("NCHW", False)):
        for short in ("bf16", "f32", "f64"):
            for target in TARGETS:
                call = functools.partial(_measured, DTYPES[short], last, 10**15)
                yield Run(f"conv measured through pointers {order}, {short}, {target}", call, False)
        for short in ("bf16", "f16"):
            call = functools.partial(_measured, DTYPES[short], last, 0)
            yield Run(f"conv measured by boxes {order}, {short}, sm_90", call, short == "bf16" and last)


def _convolutions() -> Iterator[Run]:
    """By boxes, and through pointers where sizes allow vectors. In `make test` one of each kernel."""
    for name, (x, w, geometry) in CONVOLUTIONS.items():
        for order, last in (("NHWC", True), ("NCHW", False)):
            for short in ("bf16", "f32", "f16", "f64"):
                call = functools.partial(_convolution, x, w, geometry, DTYPES[short], last)
                if short != "f64":
                    quick = short == "bf16" and last and name in ("3x3 stride 2", "groups packed")
                    arithmetic = "tf32" if short == "f32" else short
                    yield Run(f"conv by boxes {name} {order}, {arithmetic}, sm_90", functools.partial(call, 0), quick)
                for target in TARGETS:
                    quick = short == "bf16" and last and name == "3x3" and target == "sm_90"
                    label = f"conv through pointers {name} {order}, {short}, {target}"
                    yield Run(label, functools.partial(call, 10**15), quick)
                if name == "3x3" and not last:
                    arithmetic = "tf32" if short == "f32" else short
                    label = f"conv through pointers {name} copied {order}, {arithmetic}, sm_80"
                    yield Run(label, functools.partial(call, 0), False)
    for channels in (24, 64):
        for short in DTYPES:
            for target in TARGETS:
                shapes = (2, channels, 10, 9), (channels, 1, 7, 7), dict(padding=3, groups=channels)
                call = functools.partial(_convolution, *shapes, DTYPES[short], True, 10**15)
                quick = short == "bf16" and channels == 24 and target == "sm_90"
                yield Run(f"depthwise 7x7 of {channels} channels, {short}, {target}", call, quick)


def _others() -> Iterator[Run]:
    """Long and aligned rows, and calls that are replayed."""
    for shape, dim in (((3, 1000), 1), ((2, 300, 70), 1), ((2, 40, 5), 1), ((64, 64), 1)):
        for short in DTYPES:
            for target in TARGETS:
                call = functools.partial(of_rows.softmax, shape, dim, DTYPES[short])
                yield Run(f"softmax of {'x'.join(map(str, shape))}, {short}, {target}", call, False)
    for short, target in itertools.product(("bf16", "f32", "f64"), TARGETS):
        label = f"InstanceNorm2d with running averages, {short}, {target}"
        yield Run(label, functools.partial(of_rows.running_averages, DTYPES[short]), False)
    for (name, center), (short, dtype), target in itertools.product(
        dict(layer=True, rms=False).items(), DTYPES.items(), TARGETS
    ):
        call, quick = (
            functools.partial(of_rows.dropped_norm, center, dtype),
            center and short == "bf16" and target == "sm_90",
        )
        yield Run(f"{name} norm of what is dropped from, {short}, {target}", call, quick)
    for keys, (short, dtype), target in itertools.product((64, 160), DTYPES.items(), TARGETS):
        label = f"attention with {keys} of 160 keys masked by a finite number, {short}, {target}"
        yield Run(label, functools.partial(of_rows.masked, keys, dtype), False)
    for short, target in itertools.product(("bf16", "f32", "f64"), TARGETS):
        label = f"second derivatives of attention with dropout, {short}, {target}"
        yield Run(label, functools.partial(of_rows.dropped_twice, DTYPES[short]), False)
        yield Run(
            f"gradient of averaged GELU, {short}, {target}", functools.partial(of_rows.averaged, DTYPES[short]), False
        )
    for target in TARGETS:
        yield Run(f"linear replayed, bf16, {target}", _replayed, target == "sm_90")


_IN_PARTS = dict(
    layer_norm=Tile(2, 16), batch_norm_whole=Tile(1, 0), batch_norm=Tile(2, 16), batch_norm_merge=Tile(4, 8),
)  # fmt: skip
"""Tiles so small that what is normalised together takes several."""


def _forced(call: Callable[[], None], **rows: Any) -> None:
    with tiles.force(**rows):
        call()


def _with_other_tiles() -> Iterator[Run]:
    """What layers of these sizes launch in tiles that would be picked for large ones alone."""
    for row in ROWS:
        if row.name in ("LayerNorm", "RMSNorm", "BatchNorm1d", "BatchNorm2d", "GroupNorm", "InstanceNorm2d"):
            for (name, given), short, target in itertools.product(row.cases.items(), ("bf16", "f32", "f64"), TARGETS):
                layer = functools.partial(_layer, given._replace(scale=row.scale), DTYPES[short])
                quick = short == "bf16" and target == "sm_90" and (row.name, name) in _QUICK_IN_PARTS
                label = f"{row.name} {name} in parts, {short}, {target}"
                yield Run(label, functools.partial(_forced, layer, **_IN_PARTS), quick)
        if row.name in ("LSTM", "GRU", "RNN"):
            name, given = next(iter(row.cases.items()))
            for short, target in itertools.product(("bf16", "f32", "f64"), TARGETS):
                layer = functools.partial(_layer, given, DTYPES[short])
                step = Tile(16, 16, 16, stages=1)
                label = f"{row.name} {name} by steps, {short}, {target}"
                yield Run(label, functools.partial(_forced, layer, recurrent_steps=step), False)
        if row.name == "LinearCrossEntropyLoss":
            given = case(lambda nn: nn.LinearCrossEntropyLoss(64, 200, bias=True), (40, 64), Classes((40,), 200))
            for short in ("bf16", "f16", "tf32"):
                tf32 = short == "tf32"
                layer = functools.partial(*((_layer_in_tf32, given) if tf32 else (_layer, given, DTYPES[short])))
                product = Product(Tile(64, 64, 32), "tf32" if tf32 else "ieee", descriptors=True)
                label = f"{row.name} through descriptors, {short}, sm_90"
                yield Run(label, functools.partial(_forced, layer, matmul=product), short == "bf16")
        if row.name in _TOGETHER:
            yield from _products_together(row)


_TOGETHER = {
    "gated_mlp": (
        "gated_matmul",
        case(lambda nn: Mlp(nn, 64, 96, 64, "silu", True), (40, 64)),
        case(lambda nn: Mlp(nn, 37, 53, 21, "gelu", True), (43, 37)),
    ),
    "rotary_projections": (
        "rotary_matmul",
        case(lambda nn: Projections(nn, (4, 2), 16, 64, True, False, 20, 16), (2, 20, 64)),
        case(lambda nn: Projections(nn, (3, 2), 16, 37, False, False, 21, 8, True), (2, 21, 37)),
    ),
}


def _products_together(row: Row) -> Iterator[Run]:
    """Several products in one kernel, in tiles that go by that name, of aligned operands and of others."""
    table, aligned, odd = _TOGETHER[row.name]
    ways = [("descriptors", aligned, "bf16", "sm_90"), ("descriptors", aligned, "f16", "sm_90")]
    for name, given in (("aligned", aligned), ("odd", odd)):
        ways += [(f"pointers {name}", given, *rest) for rest in itertools.product(("bf16", "f32", "f64"), TARGETS)]
    for way, given, short, target in ways:
        tile = Tile(16, 32, 16) if short == "f64" else Tile(64, 64 if way == "descriptors" else 32, 32)
        layer = functools.partial(_layer, given._replace(scale=row.scale), DTYPES[short])
        call = functools.partial(_forced, layer, **{table: Product(tile, "ieee", descriptors=way == "descriptors")})
        yield Run(f"{row.name} through {way}, {short}, {target}", call, (way, short) == ("descriptors", "bf16"))


_QUICK_IN_PARTS = (("LayerNorm", "rows"), ("BatchNorm2d", "images"))


def _replayed() -> None:
    """The same signature four times, with new tensors, forward and backward."""
    torch.manual_seed(0)
    for _ in range(4):
        x, w, b, dy = (torch.randn(shape).bfloat16() for shape in ((48, 64), (32, 64), (32,), (48, 32)))
        every = []
        linear = torch.nn.functional.linear
        for function, dtype in ((FL.linear, x.dtype), (linear, x.dtype), (linear, torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
            y = function(*leaves)
            every.append([y, *torch.autograd.grad(y, leaves, dy.to(dtype))])
        for ours, torchs, exact in zip(*every, strict=True):
            assert_within_budget(ours, torchs, exact)


def _trained() -> Iterator[Run]:
    """Whole networks; in `make test` two of them."""
    for (name, network), short, target in itertools.product(training.NETWORKS.items(), ("bf16", "f32"), TARGETS):
        quick = (name, short, target) in (("MLP", "bf16", "sm_90"), ("ResNet block", "bf16", "sm_90"))
        call = functools.partial(training.check, network, DTYPES[short])
        yield Run(f"{name} trained, {short}, {target}", call, quick)


_EVERY = (_layers, _products, _convolutions, _measured_convolutions, _others, _with_other_tiles, _trained)
RUNS = [run for runs in _EVERY for run in runs()]


@pytest.fixture(autouse=True)
def strict_float32() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(fastlayers.policy("triton"))
        stack.enter_context(workloads.precision("ieee"))
        yield


def _asked_for() -> Iterator[Any]:
    """All runs or, with FASTLAYERS_COVERAGE=missing, those that coverage.json doesn't have; of these the share i of n, where
    FASTLAYERS_SHARE is "i/n". Neighbours are much alike, so that the shares take about as long."""
    known = coverage.known() if coverage.MODE == "missing" else {}
    share, shares = map(int, os.environ.get("FASTLAYERS_SHARE", "0/1").split("/"))
    for i, run in enumerate(run for run in RUNS if run.label not in known):
        if i % shares == share:
            yield pytest.param(run, id=run.label, marks=() if run.quick else pytest.mark.slow)


@pytest.mark.parametrize("run", [*_asked_for()])
def test_run(run: Run) -> None:
    """Right numbers, although copies arrive as early and products read as late as they may; no race, nothing out of bounds."""
    try:
        with bridge.machine(run.target, adversary=True) as reports:
            run.call()
    except pytest.skip.Exception as reason:
        if coverage.MODE:
            coverage.add({run.label: str(reason)})
        raise
    assert bridge.races(reports) == []
    launched = sorted({report.kernel for report in reports})
    if coverage.MODE:
        coverage.add({run.label: launched})
    else:
        assert coverage.known().get(run.label, launched) == launched, "other kernels than in coverage.json"
