"""Launches through Triton's own launcher in C, down to a stub of CUDA's driver (libcuda.c): run by test_host.py, which
builds it, in a process of its own. Kernels are compiled for sm_90 as they would be for a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gpu_stub
import pytest
import torch
import torch.nn.functional as F
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

import fastlayers
import fastlayers.functional as FL
from bench import host
from fastlayers import nn
from fastlayers.kernels.conv import tiles as conv_tiles
from fastlayers.kernels.matmul import matmul
from fastlayers.kernels.matmul import tiles as matmul_tiles
from fastlayers.kernels.runtime import launch as _launch
from fastlayers.kernels.runtime import tiles as _tiles

LAST = torch.channels_last


@pytest.fixture
def cuda() -> Iterator[Any]:
    """The stub, as a library."""
    library = ctypes.CDLL("libcuda.so.1")
    library.stub_argument.restype = library.stub_function.restype = ctypes.c_ulonglong
    library.stub_broken_rule.restype = ctypes.c_char_p
    with host.stubbed(), fastlayers.policy("triton"):
        active: Any = driver.active
        active.utils = nvidia.CudaUtils()
        yield library


@pytest.fixture
def plays(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    return gpu_stub.plays(monkeypatch)


def test_a_replay_reaches_cuda_as_triton_does(cuda: Any, plays: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same function, grid and number of launches, and the address of what is returned."""
    monkeypatch.setattr(conv_tiles, "BOX_FLOPS", 0)
    r = torch.empty
    images = [
        r(2, 64, 8, 8, dtype=torch.half).to(memory_format=LAST),
        r(64, 64, 3, 3, dtype=torch.half).to(memory_format=LAST),
    ]
    calls = {
        "linear": (FL.linear, [r(8, 16), r(16, 16), r(16)], {}),
        "relu": (FL.relu, [r(5, 7)], {}),
        "softmax": (lambda x: FL.softmax(x, -1), [r(4, 100)], {}),
        "conv2d by boxes": (FL.conv2d, images, dict(padding=1)),
        "conv2d by pointers": (FL.conv2d, [r(2, 4, 8, 8, dtype=torch.double), r(8, 4, 3, 3, dtype=torch.double)], {}),
        "linear by descriptors": (FL.linear, [r(4096, 2048, dtype=torch.half), r(4096, 2048, dtype=torch.half)], {}),
    }
    for name, (function, tensors, options) in calls.items():
        seen = []
        for repeat in range(5):
            before = cuda.stub_launches()
            y = function(*tensors, **options)
            where = cuda.stub_argument(0), cuda.stub_argument(1)
            assert tensors[0].data_ptr() in where, name
            assert y.data_ptr() in where or name == "conv2d by pointers"  # whose fourth argument that is
            seen.append((cuda.stub_launches() - before, cuda.stub_function(), cuda.stub_grid()))
            assert len(plays) == max(0, repeat - 1), name
        assert len(set(seen)) == 1, name
        plays.clear()


def test_training_reaches_cuda(cuda: Any, plays: list[None]) -> None:
    net = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    x, launches = torch.randn(64, 784), []
    for _ in range(5):
        before = cuda.stub_launches()
        net(x).sum().backward()
        launches.append(cuda.stub_launches() - before)
    assert len(plays) == 2 * 3
    assert len(set(launches)) == 1


CONVOLUTIONS = [
    ((2, 64, 9, 7), (64, 64, 3, 3), dict(padding=1)),
    ((3, 64, 5, 6), (128, 64, 7, 5), dict(padding=(6, 4), dilation=2)),
    ((5, 64, 8, 12), (64, 64, 3, 3), dict(padding=1, stride=2)),
    ((2, 48, 9, 12), (80, 48, 4, 4), dict(padding=2, stride=3)),
    ((2, 3, 33, 32), (64, 3, 7, 7), dict(padding=3, stride=2)),
    ((2, 72, 6, 6), (40, 72, 3, 3), dict(padding=1)),
    ((2, 64, 6, 6), (64, 32, 3, 3), dict(padding=1, groups=2)),
    ((2, 128, 6, 6), (256, 4, 3, 3), dict(padding=1, groups=32)),
    ((3, 60, 7, 8), (60, 15, 3, 3), dict(padding=1, stride=2, groups=4)),
]


@pytest.mark.parametrize(("x_shape", "w_shape", "geometry"), CONVOLUTIONS)
def test_cuda_takes_our_tensor_maps_of_images(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    geometry: dict[str, Any],
    cuda: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of both directions and of both gradients: negative coordinates, phases, pixels that overlap, few channels, groups."""
    monkeypatch.setattr(conv_tiles, "BOX_FLOPS", 0)
    before = cuda.stub_launches()
    leaves = [torch.empty(s, dtype=torch.half).to(memory_format=LAST).requires_grad_() for s in (x_shape, w_shape)]
    y = FL.conv2d(*leaves, **geometry)
    y.backward(torch.empty_like(y))
    (decision,) = fastlayers.explain(FL.conv2d, *leaves, **geometry)
    assert any(kernel.startswith("conv_box_kernel") for kernel in decision.kernels), decision
    assert y.shape == F.conv2d(*(leaf.to("meta") for leaf in leaves), **geometry).shape
    assert cuda.stub_launches() - before >= 3


@pytest.mark.parametrize(
    "name", [name for name in conv_tiles.box_tiles("sm_90") if not name[1].startswith("weight")], ids="/".join
)
def test_cuda_takes_the_tensor_maps_of_every_box(name: tuple[str, str], cuda: Any) -> None:
    dtype = torch.float32 if name[0] == "tf32" else torch.half
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    for shape in ((300, 64, 7, 7), (4, 64, 56, 56)):
        x, w = (torch.empty(s, dtype=dtype).to(memory_format=LAST) for s in (shape, (64, 64, 3, 3)))
        with _tiles.force(box=conv_tiles.box_tiles("sm_90")[name]):
            FL.conv2d(x, w, padding=1)


@pytest.mark.parametrize("kind", ["16", "tf32"])
def test_cuda_takes_the_tensor_maps_of_every_product(kind: str, cuda: Any) -> None:
    """Of operands as they lie, and transposed."""
    dtype = torch.float32 if kind == "tf32" else torch.half
    a, b = torch.empty(256, 512, dtype=dtype), torch.empty(384, 512, dtype=dtype)
    before, count = cuda.stub_launches(), 0
    specialized = [replace(matmul_tiles.specialized(_tiles.Device("sm_90", 132)), programs=0)] * (kind == "16")
    for product in matmul_tiles.descriptor_products("sm_90")[kind] + specialized:
        if product.programs or product.splits > 1 or product.copied:
            continue  # the same maps
        product = replace(product, programs=4) if product.specialized else product
        with _tiles.force(matmul=product):
            for left, right in ((a, b.T), (a.T.contiguous().T, b.T.contiguous())):
                matmul.matmul(left, right, precision=product.precision)
                count += 1
    assert cuda.stub_launches() - before == count > 8


def test_the_stub_minds_the_rules(cuda: Any) -> None:
    """What CUDA would refuse is refused: the tests above could fail."""
    utils: Any = driver.active.utils
    good = dict(address=4096, swizzle=3, size=2, type=6, box=[64, 64], shape=[100, 128], strides=[128, 1], fill=0)
    utils.fill_tma_descriptor_tiled(*good.values())
    for change, rule in (
        (dict(address=4104), "address"), (dict(box=[512, 64]), "256"), (dict(box=[64, 128]), "swizzle"),
        (dict(strides=[100, 1]), "16 bytes"), (dict(shape=[0, 128]), "sizes"), (dict(box=[64, 4]), "inner dimension"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            utils.fill_tma_descriptor_tiled(*(good | change).values())
        assert rule in cuda.stub_broken_rule().decode()
    assert _launch.INTERPRETED is False
