"""The ways in which a convolution can be computed, each forced in small tiles.

This file looks inside: at which kernels are launched, at the picks of tiles, and at how images are laid out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolutions import FORMATS, check, last, r, within_budget

import fastlayers
import fastlayers.functional as FL
from fastlayers.kernels.conv import layout
from fastlayers.kernels.conv import tiles as conv_tiles
from fastlayers.kernels.runtime import launch as _launch
from fastlayers.kernels.runtime import tiles as _tiles
from fastlayers.kernels.runtime.tiles import Device, Tile
from fastlayers.ops.conv import _is_channels_last

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.mark.parametrize("wide", [False, True])
def test_more_taps_than_fit_a_word(wide: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit for each tap, in 32 or 64 of them, or none."""
    monkeypatch.setattr(_launch, "wide", lambda *tensors, elements=0: wide)
    for kernel in ((4, 8), (7, 9)):
        x, w = r(1, 16, 3, 2, device=device), r(16, 16, *kernel, device=device)
        check(x, w, None, padding=(3, 4), stride=2)


def test_pixels_spread_over_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "device", lambda device: Device("sm_90", 24))
    with _tiles.force(product=Tile(32, 32, 16), sum_partials=Tile(2, 64)):
        assert (
            conv_tiles.conv_weight_grad(4, 27, 448, 1, torch.float64, "ieee", Device("sm_90", 24), vectors=False)[1]
            == 7
        )
        check(r(2, 3, 16, 16, device=device), r(4, 3, 3, 3, device=device), None)


def test_channels_last_rule_is_torchs() -> None:
    """On every stride pattern of small tensors: torch's own opinion shows in what preserve_format does."""
    from torch._prims_common import suggest_memory_format

    for sizes in itertools.product((1, 2), repeat=4):
        for strides in itertools.product((0, 1, 2, 4, 8), repeat=4):
            x = torch.empty(200).as_strided(sizes, strides)
            assert _is_channels_last(x) == (suggest_memory_format(x) == torch.channels_last), (sizes, strides)


@pytest.fixture
def boxes(launched: list[str]) -> Iterator[None]:
    """Every convolution of the test runs through descriptors, in tiles that small images don't fill."""
    with _tiles.force(box=Tile(16, 32, 16)):
        yield
    assert launched
    assert not {"_conv_kernel", "_conv_input_grad_kernel", "_conv_weight_grad_kernel"} & set(launched)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding", "size"),
    [
        ((1, 1), (1, 1), 1, 1, (5, 3)),
        ((1, 1), (2, 2), 1, 0, (5, 4)),
        ((1, 1), (3, 2), 1, 1, (7, 4)),
        ((2, 3), (1, 1), 1, (0, 1), (5, 6)),
        ((3, 3), (1, 1), 1, 1, (7, 5)),
        ((3, 3), (1, 1), 2, 2, (5, 7)),
        ((3, 3), (2, 2), 1, 1, (6, 8)),
        ((3, 3), (2, 2), 1, 1, (7, 5)),
        ((3, 2), (2, 1), (2, 1), (2, 0), (8, 5)),
        ((3, 3), (3, 3), 1, 0, (9, 6)),
        ((4, 4), (2, 3), 1, (2, 1), (7, 9)),
        ((5, 1), (3, 1), (2, 1), (4, 0), (10, 3)),
        ((1, 5), (1, 2), (1, 3), (0, 6), (2, 9)),
        ((7, 7), (2, 2), 1, 3, (6, 6)),
    ],
)
@pytest.mark.usefixtures("boxes")
def test_boxes(
    kernel: tuple[int, int], stride: Any, dilation: Any, padding: Any, size: tuple[int, int], device: torch.device
) -> None:
    """Taps before and after the image, phases, images that don't fill a phase; channels that don't fill a tile. The weight lies
    otherwise for an input gradient in 16 bits."""
    c, o = (18, 17) if kernel[0] * kernel[1] < 10 else (10, 5)
    given = last(1, c, *size).to(device), last(o, c, *kernel).to(device), r(o, device=device)
    check(*given, stride=stride, dilation=dilation, padding=padding)
    within_budget(*(t.half() for t in given), stride=stride, dilation=dilation, padding=padding)


@pytest.mark.parametrize("i", range(len(FORMATS)))
@pytest.mark.usefixtures("boxes")
def test_boxes_in_any_memory_format(i: int, device: torch.device) -> None:
    """What a descriptor can't read is copied to where it can; the result has torch's strides."""
    for shape, stride in (((3, 16, 4, 6), 1), ((2, 5, 4, 3), 2)):
        x = FORMATS[i](*shape).to(device)
        check(x, r(4, shape[1], 2, 2, device=device), None, stride=stride, padding=1)


@pytest.mark.usefixtures("boxes")
def test_boxes_in_groups(device: torch.device) -> None:
    """Steps of the sum keep to their group."""
    for stride in (1, 2):
        check(
            last(1, 32, 4, 4).to(device), last(32, 16, 3, 3).to(device), r(32, device=device),
            groups=2, stride=stride, padding=1,
        )  # fmt: skip


PACKED = [
    (8, 4, 4, 8), (32, 4, 2, 16), (4, 6, 9, 4), (24, 5, 5, 0), (8, 6, 5, 8), (2, 40, 3, 2), (3, 48, 5, 1),
]  # fmt: skip
"""Groups, channels of x and of y in each, and how many of them are packed into one, forward."""


@pytest.mark.parametrize(("groups", "c", "o", "members"), PACKED)
def test_packed_groups(groups: int, c: int, o: int, members: int) -> None:
    assert conv_tiles.packed_groups(groups, c, o, 16, 1) == members


@pytest.mark.parametrize(("groups", "c", "o", "members"), [case for case in PACKED if case[3] > 1])
@pytest.mark.parametrize(("stride", "dilation", "padding"), [(1, 1, 1), (2, 1, (1, 0)), ((1, 3), (2, 1), 0)])
@pytest.mark.usefixtures("boxes")
def test_boxes_of_packed_groups(
    groups: int, c: int, o: int, members: int, stride: Any, dilation: Any, padding: Any, launched: list[str],
    device: torch.device,
) -> None:  # fmt: skip
    """Groups too small for a step of the sum, in several packed groups and in one, in all three directions."""
    x, w = last(2, groups * c, 5, 4).to(device), r(groups * o, c, 3, 2, device=device)
    check(x, w, r(groups * o, device=device), groups=groups, stride=stride, dilation=dilation, padding=padding)
    assert launched.count("_pack_kernel") == 2, "for both directions that read the weight"


@pytest.mark.parametrize(("groups", "c", "o"), [(8, 20, 20), (16, 4, 12)])
@pytest.mark.usefixtures("boxes")
def test_boxes_of_packed_groups_in_16_bits(
    groups: int, c: int, o: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each packed group must begin at a whole vector. None takes the large tile, in which a second sum would spill."""
    pick, crowded = conv_tiles.conv_box, []
    monkeypatch.setattr(conv_tiles, "conv_box", lambda *a, **k: (crowded.append(k["crowded"]), pick(*a, **k))[1])
    x, w = last(2, groups * c, 4, 4).to(device).half(), r(groups * o, c, 3, 3, device=device).half()
    within_budget(x, w, r(groups * o, device=device).half(), groups=groups, padding=1)
    assert crowded == [True, True]


@pytest.mark.usefixtures("boxes")
def test_packed_groups_keep_infinities_to_themselves(device: torch.device) -> None:
    """Zeros of a packed weight times another group's infinities would be NaN."""
    for stride in (1, 2):
        x, w = last(1, 32, 6, 5).to(device), r(32, 4, 3, 3, device=device)
        x[0, 5, 2, 2], x[0, 17, 4, 3], x[0, 30, 0, 0] = float("inf"), float("nan"), float("-inf")
        w[9, 1, 1, 1] = float("inf")
        dy = torch.randn_like(F.conv2d(x, w, None, stride, 1, 1, 8))
        dy[0, 2, 1, 1], dy[0, 21, 0, 2] = float("inf"), float("nan")
        results = []
        for conv in (FL.conv2d, F.conv2d):
            leaves = [t.double().requires_grad_() for t in (x, w)]
            y = conv(*leaves, None, stride, 1, 1, 8)
            results.append([y, *torch.autograd.grad(y, leaves, dy.double())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
            assert 0 < b.isfinite().sum() < b.numel()


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "size"),
    [(3, 7, 2, (9, 12)), (3, 3, 1, (5, 6)), (1, 5, (1, 2), (7, 5)), (1, (1, 3), 3, (4, 9))],
)
def test_few_channels(
    channels: int, kernel: Any, stride: Any, size: tuple[int, int], launched: list[str], device: torch.device
) -> None:
    """The first layer: a row of taps is one step, in an image whose pixels overlap. In 16 bits, where a pixel of three
    channels is no vector."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    x, w = r(2, channels, *size, device=device).half(), r(5, channels, *kernel, device=device).half()
    geometry = dict(stride=stride, padding=(kernel[0] // 2, kernel[1] // 2))
    with _tiles.force(box=Tile(16, 64, 32)):
        within_budget(x, w, r(5, device=device).half(), **geometry)
    assert "_conv_kernel" not in launched
    assert "_conv_weight_grad_kernel" not in launched


@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        pytest.param(width, dtype, marks=[] if i == int(dtype == torch.float32) else pytest.mark.slow)
        for width, i in ((4, 0), (6, 2), (8, 2), (9, 1), (16, 0))
        for dtype in (torch.float16, torch.float32)
    ],
)
@pytest.mark.usefixtures("boxes")
def test_boxes_in_nchw(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Images in NCHW are read and written in runs of pixels, as long as rows, planes and images allow: those of a larger
    tensor too, whose elements around are NaN."""
    around = torch.full((3, 9, 6, 32), float("nan"), device=device, dtype=dtype)
    for x in (
        around[1:, 1:],
        around[:2, :8, 1:5, :width],
        around[:2, :8, :, 8 : 8 + width],
        around[:2, :8, :, 3 : 3 + width],
    ):
        x = x[..., :width]
        x.copy_(torch.randn_like(x))
        w = r(12, 8, 3, 3, device=device).to(dtype)
        within_budget(x, w, r(12, device=device).to(dtype), padding=1)
        within_budget(x, w, None, padding=1, stride=(2, 1))
        y = layout.channels_last(x, pitch=16, size=(7, width + 5), left=3)
        assert torch.equal(y[:, :8, : x.shape[2], 3 : 3 + width], x)
        assert y.count_nonzero() == x.count_nonzero()
        assert torch.equal(layout.channels_last(x), x)


def test_runs_of_pixels() -> None:
    """As many as a vector of 16 bytes holds, and as rows, planes, images and the start allow."""
    half = torch.empty(2, 3, 56, 56, dtype=torch.float16)
    assert layout.pixels_in_vector(half, 64) == 8
    assert layout.pixels_in_vector(half.float(), 64) == 4
    assert layout.pixels_in_vector(half, 4) == 4
    assert layout.pixels_in_vector(half[..., :28], 64) == 4
    assert layout.pixels_in_vector(half[..., :28, :], 64) == 8
    assert (
        layout.pixels_in_vector(half[..., 2:], 64)
        == layout.pixels_in_vector(half[..., ::2], 64)
        == layout.pixels_in_vector(half[..., :7], 64)
        == 1
    )
    assert layout.pixels_in_vector(half.to(memory_format=torch.channels_last), 64) == 1
    assert layout.pixels_in_vector(torch.empty(1, 1, 1, 8), 64) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("boxes")
def test_boxes_in_16_bits(dtype: torch.dtype, device: torch.device) -> None:
    x, w, b = last(1, 24, 6, 5).to(device, dtype), last(20, 24, 3, 3).to(device, dtype), r(20, device=device).to(dtype)
    within_budget(x, w, b, padding=1)
    within_budget(x, w, b, padding=1, stride=(2, 1))


@pytest.mark.usefixtures("boxes")
def test_boxes_keep_infinities_where_they_are(device: torch.device) -> None:
    """What a box or a step reads too much is never multiplied, not even by zero."""
    for stride, dilation in ((1, 1), (2, 1)):
        x, w = last(1, 18, 5, 7).to(device), last(17, 18, 3, 3).to(device)
        x[0, 3, 2, 2] = x[0, 17, 4, 6] = x[0, 0, 0, 0] = float("inf")
        results = []
        for conv in (FL.conv2d, F.conv2d):
            leaf = w.clone().requires_grad_()
            y = conv(x, leaf, None, stride, 1, dilation)
            results.append([y, *torch.autograd.grad(y, leaf, torch.ones_like(y))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)
    w[1, 2, 0, 0] = float("inf")
    y, z = (conv(x.nan_to_num(posinf=1), w, padding=0) for conv in (FL.conv2d, F.conv2d))
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_no_images(device: torch.device) -> None:
    """A descriptor of nothing doesn't exist."""
    with _tiles.force(box=Tile(16, 32, 16)):
        for groups in (1, 4):
            check(r(0, 4, 5, 5, device=device), r(4, 4 // groups, 3, 3, device=device), None, groups=groups, stride=2)


@pytest.mark.usefixtures("boxes")
def test_boxes_shared_out(device: torch.device, monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """A weight gradient over several programs, each with some of the boxes."""
    monkeypatch.setattr(_tiles, "device", lambda device: Device("sm_90", 24))
    check(last(3, 2, 10, 10).to(device), last(4, 2, 2, 2).to(device), None)
    assert launched.count("_sum_partials_kernel") == 1


def test_a_box_wastes_little() -> None:
    for pixels, n, h, w in itertools.product(
        (64, 128, 256), (1, 7, 256), (1, 7, 14, 28, 55, 56, 112, 224), (7, 56, 57)
    ):
        images, high, wide = conv_tiles.box(pixels, (n, h, w))
        assert images * high * wide == pixels
        covered = -(-n // images) * images * -(-h // high) * high * -(-w // wide) * wide
        assert covered < 2 * max(n * h * w, pixels)
    assert conv_tiles.box(256, (256, 56, 56)) == (4, 8, 8)
    assert conv_tiles.box(256, (256, 14, 14)) == (64, 2, 2)
    assert conv_tiles.box(128, (256, 7, 7)) == (128, 1, 1)
    assert conv_tiles.box(128, (1, 128, 128)) == (1, 1, 128)


@pytest.mark.parametrize("architecture", conv_tiles.BOX_ARCHITECTURES)
def test_every_pick_of_a_box_is_in_the_table(architecture: str) -> None:
    """What can be picked is what CI compiles, with the depth of a step shortened for few channels."""
    tiles, device = conv_tiles.box_tiles(architecture).values(), Device(architecture, 132)
    shipped = {dataclasses.replace(tile, k=k) for tile in tiles for k in (16, 32, 64) if k <= tile.k}
    sizes = ((1, 1, 1), (1, 7, 7), (32, 56, 56), (256, 112, 112))
    for channels, depth, images, (dtype, precision) in itertools.product(
        (1, 16, 64, 65, 512), (3, 16, 48, 72, 512), sizes, ((torch.float16, "ieee"), (torch.float32, "tf32"))
    ):
        for reach, crowded in itertools.product((None, 16 * depth), (False, True)):
            tile, shape = conv_tiles.conv_box(
                channels, depth, images, 4, reach, dtype, precision, device, crowded=crowded
            )
            assert tile in shipped
            assert shape[0] * shape[1] * shape[2] == tile.n
            assert reach is None or reach % tile.k == 0
            assert not crowded or tile.m * tile.n < 128 * 256
        tile, shape, splits = conv_tiles.conv_box_weight_grad(channels, depth, images, 9, dtype, precision, device)
        assert tile in shipped
        assert shape[0] * shape[1] * shape[2] == tile.k
        assert splits >= 1


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding"),
    [
        ((3, 3), (1, 1), (1, 1), 1),
        ((5, 2), (2, 3), (1, 2), (2, 1)),
        ((1, 7), (2, 2), (1, 1), (0, 3)),
        ((3, 3), (3, 2), (2, 2), 2),
    ],
)
def test_depthwise(
    kernel: tuple[int, int], stride: Any, dilation: Any, padding: Any, format: torch.memory_format, device: torch.device,
    launched: list[str],
) -> None:  # fmt: skip
    x, w = r(2, 6, 7, 8, device=device).to(memory_format=format), r(6, 1, *kernel, device=device)
    geometry = dict(stride=stride, dilation=dilation, padding=padding, groups=6)
    with _tiles.force(depthwise=Tile(64, 4)):
        check(x, w, r(6, device=device), **geometry)
    within_budget(x.half(), w.half(), None, **geometry)
    assert {"_depthwise_kernel", "_depthwise_weight_grad_kernel"} < set(launched)
    assert not [name for name in launched if name.startswith("_conv")]


def test_depthwise_shared_out(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "device", lambda device: Device("sm_90", 2))
    with _tiles.force(depthwise=Tile(16, 4)):
        check(last(2, 3, 9, 8).to(device), r(3, 1, 2, 3, device=device), None, groups=3)


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


def test_images_that_are_gathered_often_are_copied(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their weight, from the FLOPs on from which boxes copy theirs, if a group's channels are whole vectors."""
    monkeypatch.setattr(conv_tiles, "BOX_FLOPS", 2 * 9 * 16 * 16 * 3 * 5)
    copied: list[Any] = []
    copy = layout._copy
    monkeypatch.setattr(layout, "_copy", lambda *args: (copied.append(args), copy(*args)))
    for channels, groups, width, count in ((16, 1, 5, 6), (32, 2, 3, 6), (24, 2, 6, 0), (16, 1, 4, 0)):
        copied.clear()
        x, w = r(1, channels, 3, width, device=device), r(channels, channels // groups, 3, 3, device=device)
        check(x, w, None, padding=1, groups=groups)
        assert len(copied) == count
