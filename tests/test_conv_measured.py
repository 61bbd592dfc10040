"""A convolution before a batch normalisation in training: its kernel measures what it writes.

This file forces tiles, so that small batches are measured at all: what fits into a program is normalised by a single launch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from convolutions import pair

import fastlayers
from fastlayers import nn
from fastlayers.kernels.runtime import launch as _launch
from fastlayers.kernels.runtime import tiles as _tiles
from fastlayers.kernels.runtime.tiles import Tile
from fastlayers.testing import assert_within_budget
from fastlayers.testing.budget import neighbours

MEASURED = "_merge_partials_kernel"
WAYS: dict[str, dict[str, Any]] = {"pointers": {}, "boxes": dict(box=Tile(16, 32, 16))}
LAYERS = {
    "three": (dict(in_channels=5, out_channels=18, kernel_size=3, padding=1), True),
    "strided": (dict(in_channels=3, out_channels=7, kernel_size=(3, 2), stride=2, bias=False), False),
    "one": (dict(in_channels=17, out_channels=5, kernel_size=1), True),
    "grouped": (dict(in_channels=6, out_channels=10, kernel_size=3, groups=2), False),
}
"""A convolution's arguments, and whether a ReLU stands behind the normalisation."""


@pytest.fixture(autouse=True)
def measured(small_tiles: None) -> Iterator[None]:
    """No batch is so small that one launch normalises it, and several are merged."""
    with _tiles.force(batch_norm_whole=Tile(1, 0), batch_norm_partials=Tile(4, 4)):
        yield


def model(layer: str, **norm: Any) -> Any:
    arguments, relu = LAYERS[layer]

    def make(space: Any) -> torch.nn.Module:
        behind = [space.ReLU()] if relu else []
        return space.Sequential(
            space.Conv2d(**arguments), space.BatchNorm2d(arguments["out_channels"], **norm), *behind
        )  # fmt: skip

    return make


def found(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Result, gradients and buffers."""
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    dy = 2 * (torch.arange(y.numel(), dtype=torch.float64) * 1.7).sin().reshape(y.shape).to(y)
    return [y, *torch.autograd.grad(y, [leaf, *model.parameters()], dy), *model.buffers()]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_as_torch(way: str, layer: str, channels_last: bool, device: torch.device, launched: list[str]) -> None:
    ours, theirs = pair(model(layer), device)
    x = torch.randn(3, LAYERS[layer][0]["in_channels"], 7, 6, device=device)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    exact = copy.deepcopy(theirs).double()
    with _tiles.force(**WAYS[way]):
        mine = found(ours, x)
    assert MEASURED in launched
    assert "_statistics_kernel" not in launched, "which reads the result once more"
    assert ("_conv_box_kernel" in launched) == (way == "boxes")
    assert not any("pointwise" in kernel for kernel in launched)
    # Gradients are differences, of which torch's error on a single input is a matter of luck.
    torchs = [found(copy.deepcopy(theirs), moved) for (moved,) in neighbours(x)]
    # The gradient of the convolution's bias is 0, as a sum of numbers that cancel.
    terms = [8.0 * x.numel() if name == "0.bias" else 0.0 for name, _ in ours.named_parameters()]
    scales = [0.0, 0.0, *terms, *[0.0 for _ in ours.buffers()]]
    for a, *others, c, scale in zip(mine, *torchs, found(exact, x.double()), scales, strict=True):
        if a.is_floating_point():
            assert_within_budget(a, others, c, scale=scale)
        else:
            assert torch.equal(a, c), "the number of batches"
    assert mine[0].stride() == torchs[0][0].stride()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_with_float32_weights(dtype: torch.dtype, way: str, device: torch.device, launched: list[str]) -> None:
    """The statistics are those of the rounded result, as torch's."""
    ours, theirs = pair(model("three"), device)
    for network in (ours, theirs):
        network[0].to(dtype)
    x = torch.randn(2, 5, 6, 7, device=device, dtype=dtype)
    rounded = theirs[0](x).detach().double()
    exact = copy.deepcopy(theirs).double()
    exact[1](rounded)
    y, z = theirs(x), exact(x.double())
    with _tiles.force(**WAYS[way]):
        mine = ours(x)
    assert MEASURED in launched
    assert_within_budget(mine, y, z)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours[1], name), getattr(theirs[1], name), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_a_mean_far_from_0(way: str, device: torch.device, launched: list[str]) -> None:
    """By 10,000 deviations. The convolution copies its input, so that nothing but the normalisation rounds."""
    x = torch.randn(4, 16, 9, 7, device=device) + 1e4 + torch.rand(16, 1, 1, device=device)
    ours, theirs = (
        space.Sequential(space.Conv2d(16, 16, 1, bias=False), space.BatchNorm2d(16)) for space in (nn, torch.nn)
    )
    for network in (ours, theirs):
        torch.nn.init.eye_(network[0].weight[:, :, 0, 0])
        network.to(device)
    exact = copy.deepcopy(theirs).double()
    with _tiles.force(**WAYS[way]):
        y = ours(x)
    assert MEASURED in launched
    assert_within_budget(y, theirs(x), exact(x.double()))
    for mine, b, c in zip(ours.buffers(), theirs.buffers(), exact.buffers(), strict=True):
        if mine.is_floating_point():
            assert_within_budget(mine, b, c)


@pytest.mark.parametrize("options", [dict(momentum=None), dict(track_running_stats=False), dict(affine=False)])
def test_running_statistics(options: dict[str, Any], device: torch.device, launched: list[str]) -> None:
    """As torch's after some batches, the counter and versions included, and so is what eval makes of them."""
    ours, theirs = (model("three", **options)(space).to(device) for space in (nn, torch.nn))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        other.data.copy_(mine)
    for i in range(3):
        x = torch.randn(2, 5, 6, 5, device=device) * (i + 1) + i
        launched.clear()
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        assert MEASURED in launched
    for (key, mine), other in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other, msg=key)
        assert mine._version == other._version, key
    launched.clear()
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)
    if ours[1].running_mean is not None:
        assert MEASURED not in launched


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number(value: float, device: torch.device) -> None:
    ours, theirs = pair(model("one"), device)
    x = torch.randn(2, 17, 5, 5, device=device)
    x[1, 3, 2, 2] = value
    torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)
    torch.testing.assert_close(ours[1].running_mean, theirs[1].running_mean, equal_nan=True)
    torch.testing.assert_close(ours[1].running_var, theirs[1].running_var, equal_nan=True)


def test_layers_that_run_one_by_one(device: torch.device, launched: list[str]) -> None:
    """A hook, torch's own class, a depthwise convolution, unbatched images and statistics that fit into one launch."""
    x = torch.randn(2, 5, 6, 5, device=device)
    with _tiles.force(batch_norm_whole=Tile(1, 4096)):
        model("three")(nn).to(device)(x)
    for at in (0, 1):
        hooked = model("three")(nn).to(device)
        seen: list[torch.Tensor] = []
        hooked[at].register_forward_hook(lambda module, inputs, y, seen=seen: seen.append(y))
        hooked(x)
        assert len(seen) == 1
    nn.Sequential(nn.Conv2d(5, 5, 3, groups=5), nn.BatchNorm2d(5)).to(device)(x)
    nn.Sequential(nn.Conv2d(5, 4, 3), torch.nn.BatchNorm2d(4)).to(device)(x)
    assert MEASURED not in launched
    ours, theirs = pair(model("three"), device)
    for bad in (x[0], torch.randn(1, 5, 1, 1, device=device), torch.randn(2, 4, 6, 5, device=device)):
        for network in (ours, theirs):
            with pytest.raises((ValueError, RuntimeError)):
                network(bad)
    ours[1], theirs[1] = (space.BatchNorm2d(3).to(device) for space in (nn, torch.nn))
    for network in (ours, theirs):
        with pytest.raises(RuntimeError):
            network(x)
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(mine, other), "what an error leaves"
    assert MEASURED not in launched


def test_second_derivatives(device: torch.device, launched: list[str]) -> None:
    ours, theirs = (network.double() for network in pair(model("three"), device))
    x = torch.randn(2, 5, 4, 3, device=device, dtype=torch.float64)
    results = []
    for network in (ours, theirs):
        leaf = x.clone().requires_grad_()
        leaves = [leaf, *network.parameters()]
        first = torch.autograd.grad(network(leaf).square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True))
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-7)
    assert MEASURED in launched


def test_saves_no_more_than_torch(device: torch.device, launched: list[str]) -> None:
    counts = []
    x = torch.randn(2, 5, 8, 9, device=device)
    for network in pair(model("three"), device):
        held: dict[int, int] = {}
        inputs = {t.data_ptr() for t in (x, *network.parameters())}

        def pack(t: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = network(x.clone().requires_grad_())
        counts.append(sum(n for address, n in held.items() if address not in inputs))
        del y
    assert counts[0] <= counts[1]
    assert MEASURED in launched


class Block(torch.nn.Module):
    """As in ResNet-18."""

    def __init__(self, nn: Any, channels: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + x)


def test_a_block_in_training(device: torch.device, launched: list[str]) -> None:
    """By `fuse`, several steps beside torch."""
    ours, theirs = pair(lambda nn: Block(nn, 4), device)
    fused = fastlayers.fuse(ours)
    models = [fused, theirs]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in models]
    for _ in range(3):
        x = torch.randn(2, 4, 6, 5, device=device)
        launched.clear()
        for network, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
        assert launched.count("_normalize_kernel") == 2
        assert MEASURED in launched
        assert "_statistics_kernel" not in launched
    for a, b in zip(fused.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_under_autocast(device: torch.device, launched: list[str]) -> None:
    ours, theirs = pair(model("three"), device)
    x = torch.randn(2, 5, 6, 5, device=device)
    exact = copy.deepcopy(theirs).double()(x.double())
    with torch.autocast(device.type, torch.bfloat16):
        mine, other = ours(x), theirs(x)
    assert mine.dtype == other.dtype
    assert_within_budget(mine, other, exact)
    assert MEASURED in launched


def test_a_kernel_that_does_not_fit_gives_way_to_torch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The running statistics move once: only the last launch would have written them."""
    ours, theirs = pair(model("three"), device)
    launch = _launch.launch

    def no_convolution_fits(kernel: Any, *args: Any, **meta: Any) -> None:
        if "conv" in kernel.__name__:
            raise _launch.OutOfResources(262_176, 232_448, "shared memory")
        launch(kernel, *args, **meta)

    monkeypatch.setattr(_launch, "launch", no_convolution_fits)
    x = torch.randn(3, 5, 7, 6, device=device)
    with fastlayers.policy("auto"):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close([*ours.buffers()], [*theirs.buffers()])


def test_a_batch_norm_of_other_dimensions_objects_before_anything_moves(device: torch.device) -> None:
    network = nn.Sequential(nn.Conv2d(5, 4, 3), nn.BatchNorm1d(4)).to(device)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        network(torch.randn(3, 5, 7, 6, device=device))
    assert torch.equal(network[1].running_mean, torch.zeros(4, device=device))
    assert network[1].num_batches_tracked == 0
