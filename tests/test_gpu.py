"""What only a GPU can answer. Skipped without one. Looks inside: at replays, launchers and shipped tiles."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from activations import RELU

import fastlayers
import fastlayers.functional as FL
from fastlayers import nn
from fastlayers.catalog import ROWS, Row
from fastlayers.kernels.conv import tiles as conv_tiles
from fastlayers.kernels.matmul import tiles as matmul_tiles
from fastlayers.kernels.matmul.matmul import matmul
from fastlayers.kernels.matmul.tiles import Product
from fastlayers.kernels.runtime import launch as _launch
from fastlayers.kernels.runtime import record as _record
from fastlayers.kernels.runtime import tiles as _tiles

pytestmark = pytest.mark.gpu

QUICKLY = _launch.allocate_quickly  # before the suite's NaN-filling takes its place


def model(device: torch.device) -> torch.nn.Module:
    layers = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
        nn.Softmax(1),
    )
    return nn.Sequential(*layers).to(device)


def step(net: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y = net(x)
    return [y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))]


def expected(net: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with fastlayers.policy("torch"):
        return step(net, x)


def test_another_device_than_the_current_one() -> None:
    """Triton launches on the current device, whatever its arguments."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    device = torch.device("cuda", 1)
    with torch.cuda.device(0):
        net, x = model(device), torch.randn(4, 3, 6, 6, device=device)
        torch.testing.assert_close(step(net, x), expected(net, x))
        assert torch.cuda.current_device() == 0


def test_side_stream(device: torch.device) -> None:
    """Kernels run on the stream that is current, after what was queued there before."""
    net = model(device)
    x = torch.zeros(64, 3, 6, 6, device=device)
    want = expected(net, torch.ones_like(x))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1)
        got = step(net, x)
    stream.synchronize()
    torch.testing.assert_close(got, want)


def test_cuda_graph(device: torch.device) -> None:
    """Forward and backward captured and replayed on new data: no synchronisation, nothing that depends on data."""
    net, x = model(device), torch.randn(16, 3, 6, 6, device=device)
    step(net, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(net, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(net, x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(captured, expected(net, x))


def test_replays(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third call on, through Triton's launcher with addresses alone: the right numbers, on whatever stream, with
    parameters that are trained, replaced and moved."""
    plays = []
    play = _record.Recording.play
    monkeypatch.setattr(_record.Recording, "play", lambda *a: (plays.append(play(*a)), plays[-1])[1])
    monkeypatch.setattr(_launch, "allocate_quickly", QUICKLY)
    net = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    stream = torch.cuda.Stream()
    for i in range(12):
        x = torch.randn(64, 784, device=device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream if i % 2 else torch.cuda.current_stream()):
            torch.testing.assert_close(step(net, x), expected(net, x), rtol=1e-4, atol=1e-5)
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        torch.cuda.synchronize()
        if i == 6:
            net[0].weight = torch.nn.Parameter(net[0].weight.detach().T.contiguous().T * 2)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    assert len(plays) > 10
    assert all(results is not None for results in plays)


@pytest.mark.parametrize("train", [False, True])
def test_capture(train: bool, device: torch.device) -> None:
    """A graph gives what the module gives, for new data, in training as parameters change."""
    net, x = model(device), torch.randn(16, 3, 6, 6, device=device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with torch.set_grad_enabled(train):
        captured = fastlayers.capture(net, x)
    for _ in range(4):
        x = torch.randn_like(x)
        y = captured(x)
        assert y.requires_grad == train
        torch.testing.assert_close(y, net(x))
        if train:
            dy = torch.randn_like(y)
            got = torch.autograd.grad(y, list(net.parameters()), dy)
            torch.testing.assert_close(got, torch.autograd.grad(net(x), list(net.parameters()), dy))
            optimizer.zero_grad()
            captured(x).square().sum().backward()
            optimizer.step()
    with pytest.raises(ValueError, match="captured for"):
        captured(x[:3])
    net.double()
    with pytest.raises(RuntimeError, match="capture again"):
        captured(x)


def test_memory_does_not_grow(device: torch.device) -> None:
    net, x = model(device), torch.randn(16, 3, 6, 6, device=device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def train(steps: int) -> int:
        for _ in range(steps):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = train(10)
    assert train(1000) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("m", [1, 16, 100, 1024, 4097])
@pytest.mark.parametrize(("k", "n"), [(784, 512), (512, 10), (1023, 1000), (4096, 4096)])
def test_shipped_tiles_of_linear(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> None:
    """The tiles that users get, not the small ones that the contract forces."""
    layer = nn.Linear(k, n).to(device, dtype)
    x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
    inputs = (x, *layer.parameters())
    y = layer(x)
    dy = torch.randn_like(y)
    mine = [y, *torch.autograd.grad(y, inputs, dy)]
    with fastlayers.policy("torch"):
        z = layer(x)
        other = [z, *torch.autograd.grad(z, inputs, dy)]
    d = [t.detach().double() for t in (x, layer.weight, layer.bias, dy)]
    exact = [d[0] @ d[1].T + d[2], d[3] @ d[1], d[3].T @ d[0], d[3].sum(0)]
    for a, b, c in zip(mine, other, exact, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm() + torch.finfo(dtype).eps * c.norm()


def products(device: torch.device) -> list[Product]:
    return [
        p
        for products in matmul_tiles.descriptor_products(_tiles.device(device).architecture).values()
        for p in products
    ]


@pytest.mark.parametrize("share", range(12))  # of a hundred kernels, which take a process minutes to compile
@pytest.mark.parametrize("layout", ["forward", "input grad", "weight grad"])
def test_every_product_behind_descriptors(layout: str, share: int, device: torch.device) -> None:
    """Every tile in every way that can be picked on this GPU, across the edges of the tile, with every epilogue."""
    if not products(device):
        pytest.skip("no products behind descriptors on this GPU")
    m, n, k = 1000, 1112, 520
    for product in products(device)[share::12]:
        tf32 = product.precision == "tf32"
        for dtype in (torch.float16, torch.bfloat16) if product.precision == "ieee" else (torch.float32,):
            a, b, saved = (torch.randn(s, device=device, dtype=dtype) for s in ((m, k), (k, n), (m, n)))
            a = a.T.contiguous().T if layout == "weight grad" else a
            b = b.T.contiguous().T if layout == "forward" else b
            plain = not product.transposed and not product.programs
            with _tiles.force(matmul=product):
                sums = torch.empty(m, device=device, dtype=dtype) if plain else None
                c = matmul(a, b, precision="ieee", operand_sums=sums)
                undone = matmul(a, b, precision="ieee", undo=(RELU, saved))
            exact = a.double() @ b.double()
            band = 2**-9 if tf32 else torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 16)
            for got, want in ((c, exact), (undone, torch.where(saved <= 0, 0.0, exact))):
                assert (got - want).norm() <= band * want.norm(), product
            if sums is not None:
                want = a.double().sum(1)
                assert (sums - want).norm() <= 2 * torch.finfo(dtype).eps * want.norm(), product


STRICT_DATA = {
    "normal": lambda x: x,
    "uniform": lambda x: (x / 8).sigmoid(),
    "wide": lambda x: x * (3 * torch.randn_like(x)).exp(),
    "infinite and nan": lambda x: x.index_fill(1, torch.tensor([5], device=x.device), float("inf")),
    "subnormal": lambda x: x * 2.0**-130,
    "near the maximum": lambda x: torch.finfo(x.dtype).max * (1 - x.abs() * 2**-16),
}


@pytest.mark.parametrize("k", [1024, 16384])
@pytest.mark.parametrize("data", STRICT_DATA)
@pytest.mark.parametrize("precision", ["tf32x3", "bf16x6"])
def test_strict_float32_on_tensor_cores(
    precision: str, data: str, k: int, device: torch.device, record_property: Callable[[str, object], None]
) -> None:
    """The error against float64 is at most twice that of cuBLAS in strict float32: what matmul_tiles.STRICT asks for."""
    product = next((p for p in products(device) if p.precision == precision), None)
    if product is None:
        pytest.skip("no products behind descriptors on this GPU")
    if data in ("subnormal", "near the maximum"):
        pytest.xfail("the parts of a split factor underflow, or round to infinity: docs/decisions/0006")
    a = STRICT_DATA[data](torch.randn(512, k, device=device))
    b = torch.randn(512, k, device=device).T * (1e-6 if data == "near the maximum" else 1)
    with _tiles.force(matmul=product):
        ours = matmul(a, b, precision="ieee")
    torchs, exact = a @ b, a.double() @ b.double()
    if data == "infinite and nan":
        assert torch.equal(ours.isnan(), exact.isnan())
        assert torch.equal(ours.isinf(), exact.isinf())
        return
    errors = [((c - exact).norm() / exact.norm()).item() for c in (ours, torchs)]
    record_property("relative error, ours and cuBLAS", errors)
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "out", "kernel", "kwargs"),
    [
        ((8, 3, 64, 64), 64, 7, dict(stride=2, padding=3)),
        ((8, 64, 28, 28), 128, 3, dict(padding=1)),
        ((8, 128, 28, 28), 128, 3, dict(padding=1, stride=2)),
        ((8, 256, 14, 14), 512, 1, {}),
        ((8, 256, 14, 14), 512, 1, dict(stride=2)),
        ((8, 64, 28, 28), 64, 3, dict(padding=1, groups=64)),
        ((8, 64, 28, 28), 128, 3, dict(padding=2, groups=4, dilation=2)),
        ((32, 128, 56, 56), 128, 3, dict(padding=1, groups=32)),
        ((32, 256, 28, 28), 256, 3, dict(padding=1, groups=32, stride=2)),
    ],
)  # fmt: skip
def test_shipped_tiles_of_conv2d(
    shape: tuple[int, ...],
    out: int,
    kernel: int,
    kwargs: dict,
    channels_last: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    format = torch.channels_last if channels_last else torch.contiguous_format
    layer = nn.Conv2d(shape[1], out, kernel, **kwargs).to(device, dtype, memory_format=format)
    x = torch.randn(shape, device=device, dtype=dtype).to(memory_format=format).requires_grad_()
    inputs = (x, *layer.parameters())
    y = layer(x)
    dy = torch.randn_like(y)
    mine = [y, *torch.autograd.grad(y, inputs, dy)]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    arguments = (layer.stride, layer.padding, layer.dilation, layer.groups)
    with fastlayers.policy("torch"):
        z = layer(x)
        other = [z, *torch.autograd.grad(z, inputs, dy)]
        exact = F.conv2d(*doubles, *arguments)
        right = [exact, *torch.autograd.grad(exact, doubles, dy.double())]
    for a, b, c in zip(mine, other, right, strict=True):
        assert a.stride() == b.stride()
        assert (a - c).norm() <= 2 * (b - c).norm() + torch.finfo(dtype).eps * c.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transposed", [(False, True), (False, False), (True, False), (True, True)], ids=str)
def test_specialized_products(dtype: torch.dtype, transposed: tuple[bool, bool], device: torch.device) -> None:
    """By warps with a job each, in all layouts: over the edge of a tile, few steps and many, several tiles for a program."""
    if _tiles.device(device).architecture != "sm_90":
        pytest.skip("needs a Hopper GPU")
    product = matmul_tiles.specialized(_tiles.device(device))
    for m, n, k in ((128, 256, 64), (200, 520, 72), (8, 16, 1000), (4096, 8192, 136), (3000, 1000, 4096)):
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        left, right = (t.T.contiguous().T if flag else t for t, flag in zip((a, b), transposed, strict=True))
        bias = torch.randn(n, device=device, dtype=dtype)
        exact = a.double() @ b.double()
        for repeat in range(3):
            with _tiles.force(matmul=product):
                c = matmul(left, right, precision="ieee")
                d = matmul(left, right, bias=bias, then=RELU, precision="ieee")
            for got, want in ((c, exact), (d, (exact + bias.double()).relu())):
                assert (got - want).norm() <= 2 * torch.finfo(dtype).eps * want.norm(), (m, n, k, repeat)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "geometry"),
    [
        # Coordinates before the start of an image and after its end: a box whose corner lies far outside.
        pytest.param((1, 64, 9, 7), (64, 64, 3, 3), dict(padding=1), id="negative coordinates"),
        pytest.param((3, 64, 5, 6), (128, 64, 7, 5), dict(padding=(6, 4), dilation=2), id="far outside"),
        # A view of rank 5, and of several images, none of which may read its neighbour.
        pytest.param((5, 64, 8, 12), (64, 64, 3, 3), dict(padding=1, stride=2), id="phases"),
        pytest.param((2, 48, 9, 12), (80, 48, 4, 4), dict(padding=2, stride=3), id="three phases"),
        pytest.param((2, 64, 7, 9), (64, 64, 3, 3), dict(padding=1, stride=2), id="no whole phases"),
        # Pixels that overlap, in a row of taps; with stride 2, in phases of rows as well.
        pytest.param((2, 3, 16, 18), (64, 3, 3, 3), dict(padding=1), id="overlapping"),
        pytest.param((2, 3, 33, 32), (64, 3, 7, 7), dict(padding=3, stride=2), id="overlapping, phases"),
        # Channels that fill neither a step of the sum nor a tile.
        pytest.param((2, 72, 6, 6), (40, 72, 3, 3), dict(padding=1), id="channels"),
        pytest.param((2, 64, 6, 6), (64, 32, 3, 3), dict(padding=1, groups=2), id="groups"),
        pytest.param((2, 64, 6, 6), (128, 4, 3, 3), dict(padding=1, groups=16), id="packed groups"),
        pytest.param((3, 80, 7, 8), (80, 40, 3, 3), dict(padding=1, stride=2, groups=2), id="all groups packed"),
    ],
)
def test_descriptors_of_convolutions(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    geometry: dict,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What of tiled tensor descriptors the convolutions rely on, against torch in float64 on the CPU: this is no place for
    another GPU kernel's opinion. NaN beyond the image shows a read where there should be none."""
    if _tiles.device(device).architecture not in conv_tiles.BOX_ARCHITECTURES:
        pytest.skip("needs a GPU with TMA")
    monkeypatch.setattr(conv_tiles, "BOX_FLOPS", 0)
    n, c, h, w = x_shape
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    around = torch.full((n + 2, h, w, c), float("nan"), device=device, dtype=dtype)
    x = around[1:-1].permute(0, 3, 1, 2)
    x.copy_(torch.randn(x_shape, device=device))
    weight = torch.randn(w_shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    (decision,) = fastlayers.explain(FL.conv2d, *leaves, **geometry)
    assert any(kernel.startswith("conv_box_kernel") for kernel in decision.kernels)
    y = FL.conv2d(*leaves, **geometry)
    dy = torch.randn_like(y)
    mine = [y, *torch.autograd.grad(y, leaves, dy)]
    doubles = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    exact = F.conv2d(*doubles, **geometry)
    right = [exact, *torch.autograd.grad(exact, doubles, dy.double().cpu())]
    eps = 2**-10 if dtype == torch.float32 else torch.finfo(dtype).eps
    for name, a, b in zip(("y", "dx", "dw"), mine, right, strict=True):
        assert (a.double().cpu() - b).norm() <= 4 * eps * b.norm(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("stride", [1, 2])
def test_packed_groups_keep_infinities_to_themselves(
    dtype: torch.dtype, stride: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a packed group's sum has a NaN, its members are summed up alone: a branch that finite data never take."""
    if _tiles.device(device).architecture not in conv_tiles.BOX_ARCHITECTURES:
        pytest.skip("needs a GPU with TMA")
    monkeypatch.setattr(conv_tiles, "BOX_FLOPS", 0)
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    geometry = dict(stride=stride, padding=1, groups=32)
    x = torch.randn(4, 128, 17, 15, device=device).to(dtype, memory_format=torch.channels_last)
    w = torch.randn(128, 4, 3, 3, device=device, dtype=dtype)
    dy = torch.randn_like(F.conv2d(x, w, **geometry))
    for t in (x, dy):
        t[0, 5, 2, 2], t[1, 17, 4, 3], t[3, 127, 0, 0] = float("inf"), float("nan"), float("-inf")
    (decision,) = fastlayers.explain(FL.conv2d, x, w, **geometry)
    assert any(kernel.startswith("conv_box_kernel") for kernel in decision.kernels)
    x.requires_grad_()
    y = FL.conv2d(x, w, **geometry)
    double = x.detach().double().cpu().requires_grad_()
    exact = F.conv2d(double, w.double().cpu(), **geometry)
    (dx,), (right,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(exact, double, dy.double().cpu())
    eps = 2**-10 if dtype == torch.float32 else torch.finfo(dtype).eps
    for a, b in ((y.double().cpu(), exact), (dx.double().cpu(), right)):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isinf(), b.isinf())
        assert (a - b)[b.isfinite()].norm() <= 4 * eps * b[b.isfinite()].norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("length", [1, 5, 64, 256, 1000, 8192, 32768, 50257, 262144, 1_000_003])
def test_shipped_tiles_of_softmax(length: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(7, length, device=device, dtype=dtype, requires_grad=True)
    y = FL.softmax(x, 1)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = x.detach().double().softmax(1)
    right = exact * (dy.double() - (dy.double() * exact).sum(1, keepdim=True))
    z = torch.softmax(x, 1)
    (dz,) = torch.autograd.grad(z, x, dy)
    for a, b, c in ((y, z, exact), (dx, dz, right)):
        assert (a - c).norm() <= 2 * (b - c).norm() + torch.finfo(dtype).eps * c.norm()


def test_more_than_two_to_the_31_elements(device: torch.device) -> None:
    """Offsets past 2**31 in every kind of kernel; the end of each tensor is where a wrapped offset shows."""
    if torch.cuda.get_device_properties(device).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB")
    x = torch.randn(2**31 // 4096 + 5, 4096, device=device, dtype=torch.bfloat16)
    tail = x[-7:].clone()
    torch.testing.assert_close(FL.relu(x)[-7:], F.relu(tail))
    torch.testing.assert_close(FL.softmax(x, 1)[-7:], F.softmax(tail, 1))
    w = torch.randn(64, 4096, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = FL.linear(x, w)
    torch.testing.assert_close(y[-7:], F.linear(tail, w), rtol=0.02, atol=0.5)
    dy = torch.zeros_like(y)
    dy[-1] = 1
    (dw,) = torch.autograd.grad(y, w, dy)
    torch.testing.assert_close(dw, x[-1].expand_as(dw))
    images = x.view(-1, 4, 32, 32)
    k = torch.randn(3, 4, 3, 3, device=device, dtype=torch.bfloat16)
    torch.testing.assert_close(FL.conv2d(images, k)[-2:], F.conv2d(images[-2:], k), rtol=0.02, atol=0.1)


def test_more_programs_than_65535(device: torch.device) -> None:
    x = torch.randn(70_000 * 1024 + 3, device=device)
    assert torch.equal(FL.relu(x), F.relu(x))
    y = torch.randn(70_001, 1025, device=device)
    torch.testing.assert_close(FL.softmax(y, 1), F.softmax(y, 1))
    z = torch.randn(70_001 * 32, 17, device=device)
    w = torch.randn(5, 17, device=device)
    torch.testing.assert_close(FL.linear(z, w), F.linear(z, w))


def test_autocast_and_grad_scaler(device: torch.device) -> None:
    net, x = model(device), torch.randn(8, 3, 6, 6, device=device)
    before = [p.detach().clone() for p in net.parameters()]
    scaler = torch.amp.GradScaler()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype):
            loss = net(x).float().square().sum()
            with fastlayers.policy("torch"):
                assert net(x).dtype == torch.float32  # softmax is on autocast's float32 list
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_first_call_is_not_a_benchmark(row: Row, device: torch.device) -> None:
    """A new shape costs a compilation at most, never a search: seconds, not minutes."""
    begin = time.perf_counter()
    for case in row.cases.values():
        case.make(nn).to(device)(*case.arguments(torch.float32, device))
    torch.cuda.synchronize()
    assert time.perf_counter() - begin < 60


SHAPES = {"dropout1d": (5, 6, 7), "dropout2d": (3, 5, 4, 6), "dropout3d": (2, 3, 4, 5, 2)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["dropout", "alpha_dropout", "feature_alpha_dropout", *SHAPES])
def test_dropout_draws_torchs_mask(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Bit for bit, and torch's generator has moved as far. Of sizes that vectors divide and of odd ones, of addresses that aren't
    aligned, in one turn of torch's threads and in several."""
    whole = torch.randn(2**22 + 1, device=device).to(dtype)
    flat = [whole[:4096], whole[1:4097], whole[:999], whole[:-1].view(1024, -1), whole]
    images = torch.randn(SHAPES.get(name, (9, 7, 3)), device=device).to(dtype)
    for x in [images] if name in SHAPES or name.startswith("feature") else [images, *flat]:
        found = []
        for space in (F, FL):
            torch.manual_seed(3)
            found.append((getattr(space, name)(x + 4, 0.3, True), torch.cuda.get_rng_state(device)))
        (theirs, after_theirs), (ours, after_ours) = found
        # torch rounds 1 / (1 - p) to the dtype for some of them; an element that one of us dropped would be off by 4.
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
        assert torch.equal(after_theirs, after_ours)
