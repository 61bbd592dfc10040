"""What reaches Triton's launcher, with a driver that launches nothing (gpu_stub.py): run by test_host.py in a process of its
own, since the suite's interprets. Compiling is replaced, so that hundreds of specialisations cost nothing; choosing them is
Triton's. Looks inside: at launches, replays and Triton's caches.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from gpu_stub import Gpu, compile, odd, ordinarily, plays, same, seen, step
from layers import LAYERS, REPLAYED, pair
from replays import forget
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

import fastlayers
import fastlayers.functional as FL
from bench import host
from fastlayers import nn
from fastlayers.kernels import pointwise
from fastlayers.kernels.conv import tiles as conv_tiles
from fastlayers.kernels.runtime import launch as _launch
from fastlayers.kernels.runtime import record as _record
from fastlayers.kernels.runtime import replay as _replay
from fastlayers.kernels.runtime import tiles as _tiles
from fastlayers.ops.activation import Activation
from fastlayers.ops.conv import _conv2d, _conv2d_inference, conv_joined

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    monkeypatch.setattr(triton.compiler, "compile", compile)
    with host.stubbed(), fastlayers.policy("triton"):
        gpu = Gpu()
        driver.set_active(gpu)  # type: ignore[arg-type]
        forget()  # what earlier tests left; every test of this file begins so
        yield gpu


def linears(dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Everything that Triton specialises for: sizes of 1 and of 16, strides, alignment, a bias or none."""

    def r(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, requires_grad=True)

    for m, k, n in ((1, 1, 1), (16, 32, 48), (5, 32, 48), (16, 31, 48), (16, 32, 1), (300, 1024, 513), (7, 4096, 64)):
        yield r(m, k), r(n, k), r(n)
        yield r(m, k), r(n, k), None
        yield odd(r(m, k)), r(n, k), r(n)
        yield r(m, k), odd(r(n, k)), r(n)
        yield r(m, k), r(n, k), odd(r(n))
        yield r(k, m).T, r(k, n).T, r(n)
        yield r(m, 2 * k)[:, ::2], r(n, k), r(n)
        yield r(2, m, k), r(n, k), r(n)
        yield r(1, k).expand(m, k), r(n, k), r(n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_replay_launches_what_triton_would(dtype: torch.dtype, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same compiled kernels, grids, streams and arguments, and the same allocations, whatever came before."""
    counted = plays(monkeypatch)
    for repeat in range(3):
        for x, w, b in linears(dtype):
            leaves = [t.detach().requires_grad_() if t is not None and not t.is_leaf else t for t in (x, w, b)]
            run = step(FL.linear, *leaves)
            same(gpu, run, counted, repeat, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_replay_of_other_layers(dtype: torch.dtype, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = plays(monkeypatch)
    shapes = ((3, 5), (16, 64), (1, 1), (4, 40_000), (2, 3, 4, 16))
    for repeat in range(3):
        for shape, unaligned in itertools.product(shapes, (False, True)):
            x = torch.empty(shape, dtype=dtype, requires_grad=True)
            x = odd(x.detach()).requires_grad_() if unaligned else x
            for layer in (FL.relu, lambda x: FL.softmax(x, -1), lambda x: FL.softmax(x, 0)):
                run = step(layer, x)
                same(gpu, run, counted, repeat, monkeypatch)


# torch adds rotary_embedding's two results, so that their gradients come from tensors with new addresses at every call.
@pytest.mark.parametrize("name", [name for name in REPLAYED if name != "rotary_embedding"])
def test_a_replay_of_every_layer(name: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = plays(monkeypatch)
    both = [(pair(LAYERS[name], torch.device("cpu")), dtype) for dtype in (torch.float16, torch.float32)]
    for repeat in range(3):
        for layer, dtype in both:
            same(gpu, step(layer.ours, *layer.draw(dtype, requires_grad=True)), counted, repeat, monkeypatch)


def convolutions(dtype: torch.dtype) -> Iterator[tuple[list[torch.Tensor], dict[str, Any]]]:
    """A kernel each of those that a convolution may come to, the copies before them among them."""
    last = torch.channels_last
    for x_shape, w_shape, geometry in (
        ((2, 32, 8, 8), (48, 32, 3, 3), dict(padding=1)),
        ((2, 32, 9, 8), (48, 32, 3, 3), dict(padding=1, stride=2)),
        ((2, 5, 9, 8), (7, 5, 3, 2), dict(padding=(1, 0), dilation=2)),
        ((2, 32, 8, 8), (48, 32, 1, 1), {}),
        ((2, 3, 16, 16), (16, 3, 7, 7), dict(stride=2, padding=3)),
        ((2, 32, 8, 8), (32, 1, 3, 3), dict(padding="same", groups=32)),
        ((2, 32, 8, 8), (32, 8, 3, 3), dict(padding=1, groups=4)),
        ((2, 64, 8, 8), (64, 4, 3, 3), dict(padding=1, groups=16)),
        ((32, 8, 8), (48, 32, 3, 3), {}),
    ):
        x, w, b = (torch.empty(shape, dtype=dtype) for shape in (x_shape, w_shape, w_shape[:1]))
        for images, weights in itertools.product((False, True), repeat=2):
            leaves = [
                x.contiguous(memory_format=last) if images and x.dim() == 4 else x,
                w.contiguous(memory_format=last) if weights else w,
                b,
            ]
            yield [t.detach().requires_grad_() for t in leaves], geometry


@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_replay_of_convolutions(dtype: torch.dtype, boxes: bool, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies, descriptors and all."""
    monkeypatch.setattr(conv_tiles, "BOX_FLOPS", 0 if boxes else 2**62)
    counted = plays(monkeypatch)
    for repeat in range(3):
        for leaves, geometry in convolutions(dtype):
            run = step(lambda *t, geometry=geometry: FL.conv2d(*t, **geometry), *leaves)
            same(gpu, run, counted, repeat, monkeypatch)


@pytest.mark.parametrize("boxes", [False, True])
def test_a_replay_of_epilogues(boxes: bool, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalised, added to and activated, as in eval."""
    monkeypatch.setattr(conv_tiles, "BOX_FLOPS", 0 if boxes else 2**62)
    counted = plays(monkeypatch)
    for repeat in range(3):
        for leaves, geometry in convolutions(torch.float16):
            x, w, b = (t.detach() for t in leaves)
            statistics = [torch.empty_like(b) for _ in range(4)]
            residual = FL.conv2d(x, w, **geometry)
            for norm in (None, (*statistics, 1e-5)):
                geometry = dict(stride=1, padding=0, dilation=1, groups=1) | geometry
                epilogue = dict(activation=Activation("relu"), norm=norm, residual=residual)
                run = functools.partial(
                    conv_joined, (_conv2d, _conv2d_inference), x, w, b, *geometry.values(), **epilogue
                )
                same(gpu, run, counted, repeat, monkeypatch, passes=1)


def test_tensor_maps_are_made_once_for_an_address(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    if not host._LAUNCHES_FROM_PYTHON:
        pytest.skip("Triton's launcher makes them itself")
    monkeypatch.setattr(conv_tiles, "BOX_FLOPS", 0)
    x, w = (torch.empty(2, 64, 8, 8, dtype=torch.float16).to(memory_format=torch.channels_last) for _ in range(2))
    for _ in range(3):
        FL.conv2d(x, w)
    made: list[Any] = []
    monkeypatch.setattr(gpu.utils, "fill_tma_descriptor_tiled", lambda *args: made.append(args) or args)
    for _ in range(3):
        FL.conv2d(x, w)
    assert not made
    others = [x.clone() for _ in range(2 * _record.MAPS)]
    for other in others:
        FL.conv2d(other, w)
    assert len({args[0] for args in made}) == len(others)
    remembered = [
        len(cell.cell_contents)
        for take in gc.get_objects()
        if type(take) is _record.Recording
        for describe in take.script.__globals__.values()
        for cell in getattr(describe, "__closure__", None) or ()
        if isinstance(cell.cell_contents, dict)
    ]
    assert 1 < max(remembered) <= _record.MAPS


def test_a_chain_is_two_replays(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    run = step(lambda x, *_: net(x), torch.empty(64, 784, requires_grad=True), *net.parameters())
    counted = plays(monkeypatch)
    for _ in range(4):
        got = seen(gpu, run, monkeypatch)
    assert len(counted) >= 4
    with ordinarily():
        assert got == seen(gpu, run, monkeypatch)


@triton.jit
def _copy_kernel(target_ptr, source, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(target_ptr + (i[:, None] * N + i[None, :]), source.load([0, 0]))


def test_descriptors(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor behind a descriptor is a new one behind the same."""

    def work(tensors: Any) -> tuple[torch.Tensor, ...]:
        x = tensors[0]
        y = _launch.empty_like(x)
        z = _launch.empty_like(x)
        for source, target in ((x, y), (y, z)):
            described = TensorDescriptor(source.T, [16, 16], [16, 1], [16, 16])
            _launch.launch(_copy_kernel, 1, target, described, N=16)
        return (z,)

    replayable = _replay.Replayable(work)
    counted = plays(monkeypatch)
    for _ in range(4):
        x = torch.empty(16, 16)
        got = seen(gpu, lambda x=x: replayable((x,)), monkeypatch)
        with ordinarily():
            assert got == seen(gpu, lambda x=x: replayable((x,)), monkeypatch)
    assert len(counted) == 2
    assert len(got[0]) == 2


def test_no_replay_outlives_the_moment(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """An inference chain frees each hidden output as soon as the next one is there, and no tensor is kept."""
    net = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    x = torch.empty(64, 64)
    alive: list[int] = []
    most = 0

    class Watched(torch.Tensor):
        def __del__(self) -> None:
            alive.pop()

    def allocate(size: Any, stride: Any, *, dtype: Any, device: Any) -> torch.Tensor:
        nonlocal most
        alive.append(1)
        most = max(most, len(alive))
        return torch.empty_strided(size, stride, dtype=dtype, device=device).as_subclass(Watched)

    with torch.no_grad():
        for _ in range(3):
            net(x)
        counted = plays(monkeypatch)
        monkeypatch.setattr(_launch, "allocate", allocate)
        monkeypatch.setattr(_launch, "allocate_quickly", {})
        net(x)
    assert len(counted) == 1
    assert most <= 3  # a hidden output, the next one, and a workspace
    assert not alive


def test_hooks_see_every_launch(gpu: Gpu) -> None:
    """A profiler's, Triton's own way."""
    x = torch.empty(16, 16)
    for _ in range(4):
        FL.relu(x)
    calls: list[str] = []
    for kind, chain in (
        ("enter", triton.knobs.runtime.launch_enter_hook),
        ("exit", triton.knobs.runtime.launch_exit_hook),
    ):
        hook = lambda metadata, kind=kind: calls.append(kind)  # noqa: E731
        chain.add(hook)
        FL.relu(x)
        chain.remove(hook)
    assert calls == ["enter", "exit"]
    before, seen_by = triton.knobs.runtime.launch_enter_hook, []
    triton.knobs.runtime.launch_enter_hook = type(before)()
    triton.knobs.runtime.launch_enter_hook.add(seen_by.append)
    FL.relu(x)
    triton.knobs.runtime.launch_enter_hook = before
    assert len(seen_by) == 1
    kernel: Any = pointwise._pointwise_kernel
    kernel.add_pre_run_hook(lambda *a, **k: calls.append("before"))
    FL.relu(x)
    kernel.pre_run_hooks.clear()
    FL.relu(x)
    assert calls == ["enter", "exit", "before"]


def test_the_current_stream_and_device(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(16, 16)
    for _ in range(3):
        FL.relu(x)
    counted = plays(monkeypatch)
    gpu.launches.clear()
    for gpu.stream in (0, 7, 0, 11):
        FL.relu(x)
    assert [launch[3] for launch in gpu.launches] == [0, 7, 0, 11]

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        before, gpu.device = gpu.device, index
        entered.append(index)
        yield
        gpu.device = before

    entered: list[int] = []
    monkeypatch.setattr(torch.cuda, "device", device)
    gpu.device = 3
    FL.relu(x)
    assert entered == [-1]
    assert gpu.device == 3
    assert len(counted) == 6  # the last one within the other device, by itself


def test_another_driver_or_debugging_is_another_matter(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(16, 16)
    for _ in range(3):
        FL.relu(x)
    functions = {launch[4] for launch in gpu.launches}
    assert len(functions) == 1
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    FL.relu(x)
    assert gpu.launches[-1][4] not in functions
    monkeypatch.undo()
    monkeypatch.setattr(triton.compiler, "compile", compile)
    other = Gpu()
    driver.set_active(other)  # type: ignore[arg-type]
    pointwise._pointwise_kernel.device_caches.clear()  # type: ignore[attr-defined]
    count = len(gpu.launches)
    FL.relu(x)
    assert len(gpu.launches) == count
    assert len(other.launches) == 1


def test_unaligned_memory_from_the_allocator(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel compiled for aligned addresses is never given another."""
    x = torch.empty(16, 16)
    for _ in range(3):
        FL.relu(x)
    (aligned,) = {launch[4] for launch in gpu.launches}
    monkeypatch.setattr(_launch, "allocate", lambda size, stride, **k: odd(torch.empty(size, dtype=k["dtype"])))
    monkeypatch.setattr(_launch, "allocate_quickly", {})
    for _ in range(3):
        FL.relu(x)
        assert gpu.launches[-1][4] != aligned
    monkeypatch.undo()


def test_tensors_of_one_storage(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight and bias as slices of one buffer are told apart; one tensor in two places is not replayed."""
    flat = torch.empty(16 * 16 + 16)
    w, b, x = flat[: 16 * 16].view(16, 16), flat[16 * 16 :], torch.empty(16, 16)
    counted = plays(monkeypatch)
    for _ in range(4):
        got = seen(gpu, lambda: FL.linear(x, w, b), monkeypatch)
    assert len(counted) == 2
    with ordinarily():
        assert got == seen(gpu, lambda: FL.linear(x, w, b), monkeypatch)
    forget()
    for _ in range(4):
        got = seen(gpu, lambda: FL.linear(x, x), monkeypatch)
    assert len(counted) == 2
    with ordinarily():
        assert got == seen(gpu, lambda: FL.linear(x, x), monkeypatch)


def test_offline_audit_seam(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever puts a function in the place of `launch` sees every launch."""
    x = torch.empty(16, 16)
    for _ in range(3):
        FL.relu(x)
    launched: list[str] = []
    monkeypatch.setattr(_launch, "launch", lambda kernel, programs, *args, **meta: launched.append(kernel.__name__))
    FL.relu(x)
    assert launched == ["_pointwise_kernel"]
    with _tiles.force(pointwise=_tiles.Tile(1, 64)):
        FL.relu(x)
    assert len(launched) == 2
