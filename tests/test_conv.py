"""Conv2d: every geometry against torch, memory formats, bad input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastlayers
import fastlayers.functional as FL
from fastlayers.kernels import _launch, _tiles
from fastlayers.kernels._tiles import Device, Tile
from fastlayers.ops.conv import _is_channels_last

pytestmark = pytest.mark.usefixtures("small_tiles")
r = torch.randn


def check(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, **geometry: Any) -> None:
    """Against torch in float64, where only the order of sums differs."""
    x, w, b = x.double(), w.double(), None if b is None else b.double()
    dy = torch.randn_like(F.conv2d(x, w, b, **geometry))
    results = []
    for conv in (FL.conv2d, F.conv2d):
        leaves = [t.clone().requires_grad_() for t in (x, w, b) if t is not None]
        y = conv(*leaves, **geometry)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert results[0][0].stride() == results[1][0].stride()


@pytest.mark.parametrize(("stride", "dilation", "kernel"), list(itertools.product((1, 2, 3), (1, 2, 3), (1, 2, 3))))
def test_geometry(stride: int, dilation: int, kernel: int, device: torch.device) -> None:
    """Strides that share a factor with the dilation, and that don't: classes with and without taps."""
    for padding in (0, (2, 1)):
        other = kernel % 3 + 1
        check(
            r(1, 2, 9, 8, device=device), r(3, 2, kernel, other, device=device), r(3, device=device),
            stride=(stride, stride % 2 + 1), padding=padding, dilation=(dilation, 1),
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # torch makes a copy, we don't
@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 4), (4, 3), (5, 1), (7, 7)])
def test_same_and_valid(kernel: tuple[int, int], device: torch.device) -> None:
    for padding in ("same", "valid"):
        check(r(2, 3, 7, 8, device=device), r(4, 3, *kernel, device=device), None, padding=padding)
    check(r(2, 3, 7, 8, device=device), r(4, 3, *kernel, device=device), None, padding="same", dilation=(1, 2))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups(groups: int, device: torch.device) -> None:
    check(r(2, 6, 5, 4, device=device), r(12, 6 // groups, 3, 2, device=device), r(12, device=device), groups=groups)


@pytest.mark.parametrize("channels", [16, 32, 48])
def test_one_tap_per_step(channels: int, device: torch.device) -> None:
    """Channels that divide into the tile: the loop that reads a single tap at a time."""
    x = r(1, channels, 5, 4, device=device)
    for format in (torch.contiguous_format, torch.channels_last):
        w = r(channels, channels, 3, 3, device=device)
        check(x.to(memory_format=format), w, r(channels, device=device), padding=1, stride=(1, 2))


def test_pixels_spread_over_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "device", lambda device: Device("sm_90", 24))
    with _tiles.force(product=Tile(32, 32, 16), sum_partials=Tile(2, 64)):
        assert _tiles.conv_weight_grad(4, 27, 448, 1, torch.float64, "ieee", Device("sm_90", 24), vectors=False)[1] == 7
        check(r(2, 3, 16, 16, device=device), r(4, 3, 3, 3, device=device), None)


FORMATS = [
    lambda *s: r(s),
    lambda *s: r(s).to(memory_format=torch.channels_last),
    lambda *s: r(s[0], s[2], s[3], s[1] + 2).permute(0, 3, 1, 2)[:, 1:-1],
    lambda *s: r(s[0], s[1], s[2] + 1, s[3] * 2)[:, :, 1:, ::2],
    lambda *s: r(s[3], s[2], s[1], s[0]).permute(3, 2, 1, 0),
    lambda *s: r(1, *s[1:]).expand(s),
    lambda *s: r(s[0], 1, *s[2:]).expand(s),
]


@pytest.mark.parametrize("i", range(len(FORMATS)))
@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (1, 1, 4, 4), (3, 5, 1, 1), (1, 3, 1, 5), (2, 1, 5, 1), (1, 4, 3, 3)])
def test_memory_formats(shape: tuple[int, ...], i: int, device: torch.device) -> None:
    """Any strides of input and weight; the result's are torch's."""
    x = FORMATS[i](*shape).to(device)
    for format in (torch.contiguous_format, torch.channels_last):
        check(x, r(4, shape[1], 1, 1, device=device).to(memory_format=format), r(4, device=device))
        check(x, r(4, shape[1], 3, 2, device=device).to(memory_format=format), None, padding=(1, 1))


def test_channels_last_rule_is_torchs() -> None:
    """On every stride pattern of small tensors: torch's own opinion shows in what preserve_format does."""
    from torch._prims_common import suggest_memory_format

    for sizes in itertools.product((1, 2), repeat=4):
        for strides in itertools.product((0, 1, 2, 4, 8), repeat=4):
            x = torch.empty(200).as_strided(sizes, strides)
            assert _is_channels_last(x) == (suggest_memory_format(x) == torch.channels_last), (sizes, strides)


def test_unbatched(device: torch.device) -> None:
    for x in (r(3, 5, 4, device=device), r(5, 4, 3, device=device).permute(2, 0, 1)):
        for format in (torch.contiguous_format, torch.channels_last):
            check(x, r(4, 3, 3, 3, device=device).to(memory_format=format), r(4, device=device), padding=1)


BAD: dict[str, tuple[tuple, dict]] = {
    "channels": (((2, 3, 8, 8), (4, 2, 3, 3)), {}),
    "two dimensions": (((8, 8), (4, 3, 3, 3)), {}),
    "five dimensions": (((1, 2, 3, 8, 8), (4, 3, 3, 3)), {}),
    "kernel": (((2, 3, 8, 8), (4, 3, 9, 9)), {}),
    "stride 0": (((2, 3, 8, 8), (4, 3, 3, 3)), {"stride": 0}),
    "negative padding": (((2, 3, 8, 8), (4, 3, 3, 3)), {"padding": -1}),
    "three paddings": (((2, 3, 8, 8), (4, 3, 3, 3)), {"padding": (1, 2, 3)}),
    "float stride": (((2, 3, 8, 8), (4, 3, 3, 3)), {"stride": 1.5}),
    "groups": (((2, 3, 8, 8), (4, 3, 3, 3)), {"groups": 2}),
    "no groups": (((2, 3, 8, 8), (4, 3, 3, 3)), {"groups": 0}),
    "odd groups": (((2, 4, 8, 8), (3, 2, 3, 3)), {"groups": 2}),
    "same with stride": (((2, 3, 8, 8), (4, 3, 3, 3)), {"stride": 2, "padding": "same"}),
    "unknown padding": (((2, 3, 8, 8), (4, 3, 3, 3)), {"padding": "full"}),
    "bias": (((2, 3, 8, 8), (4, 3, 3, 3), (3,)), {}),
    "dilation 0": (((2, 3, 8, 8), (4, 3, 3, 3)), {"dilation": 0}),
    "empty image": (((2, 3, 0, 8), (4, 3, 1, 1)), {}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's exception, before anything is launched."""
    shapes, kwargs = BAD[case]
    args = [r(s, device=device) for s in shapes]
    monkeypatch.setattr(_launch, "launch", lambda *a, **k: pytest.fail("launched"))
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.conv2d(*args, **kwargs)
    with fastlayers.policy("auto"), pytest.raises(theirs.type):
        FL.conv2d(*args, **kwargs)


def test_float32_obeys_cudnns_switch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    launch = _launch.launch
    monkeypatch.setattr(_launch, "launch", lambda *a, **k: (seen.append(k.get("PRECISION")), launch(*a, **k))[1])
    layer = fastlayers.Conv2d(2, 3, 3).to(device)
    x = r(1, 2, 5, 5, device=device, requires_grad=True)
    for value in ("ieee", "tf32"):
        torch.backends.cudnn.conv.fp32_precision = value
        seen.clear()
        layer(x).sum().backward()
        assert {p for p in seen if p} == {value}
