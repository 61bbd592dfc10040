"""Conv2d: every geometry against torch, memory formats, bad input."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastlayers
import fastlayers.functional as FL
from fastlayers import nn
from fastlayers.kernels import _launch, _tiles, conv_box
from fastlayers.kernels import conv as kernels
from fastlayers.kernels._tiles import Device, Product, Tile
from fastlayers.ops.conv import _is_channels_last
from fastlayers.testing import assert_within_budget, neighbours

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


@pytest.mark.parametrize("wide", [False, True])
def test_more_taps_than_fit_a_word(wide: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit for each tap, in 32 or 64 of them, or none."""
    monkeypatch.setattr(_launch, "wide", lambda *tensors: wide)
    for kernel in ((4, 8), (7, 9)):
        x, w = r(1, 16, 3, 2, device=device), r(16, 16, *kernel, device=device)
        check(x, w, None, padding=(3, 4), stride=2)


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


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched so far."""
    names: list[str] = []
    launch = _launch.launch

    def watch(kernel: Any, *args: Any, **meta: Any) -> None:
        names.append(getattr(kernel, "__name__", None) or kernel.fn.__name__)
        launch(kernel, *args, **meta)

    monkeypatch.setattr(_launch, "launch", watch)
    return names


@pytest.fixture
def boxes(launched: list[str]) -> Iterator[None]:
    """Every convolution of the test runs through descriptors, in tiles that small images don't fill."""
    with _tiles.force(box=Tile(16, 32, 16)):
        yield
    assert launched
    assert not {"_conv_kernel", "_conv_input_grad_kernel", "_conv_weight_grad_kernel"} & set(launched)


def last(*shape: int) -> torch.Tensor:
    return r(shape).to(memory_format=torch.channels_last)


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
    """Taps before and after the image, phases, images that don't fill a phase; channels that don't fill a tile."""
    c, o = (18, 17) if kernel[0] * kernel[1] < 10 else (10, 5)
    check(
        last(1, c, *size).to(device), last(o, c, *kernel).to(device), r(o, device=device),
        stride=stride, dilation=dilation, padding=padding,
    )  # fmt: skip


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
    assert _tiles.packed_groups(groups, c, o, 16, 1) == members


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
    pick, crowded = _tiles.conv_box, []
    monkeypatch.setattr(_tiles, "conv_box", lambda *a, **k: (crowded.append(k["crowded"]), pick(*a, **k))[1])
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


def within_budget(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, **geometry: Any) -> None:
    """Result and gradients against torch in float64, within the budget of their dtype."""
    inputs = [t for t in (x, w, b) if t is not None]
    dy = torch.randn_like(F.conv2d(*inputs, **geometry))
    results = []
    for conv, dtype in ((FL.conv2d, x.dtype), (F.conv2d, x.dtype), (F.conv2d, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        y = conv(*leaves, **geometry)
        results.append([y, *torch.autograd.grad(y, leaves, dy.to(dtype))])
    for ours, torchs, exact in zip(*results, strict=True):
        assert_within_budget(ours, torchs, exact)
    assert results[0][0].stride() == results[1][0].stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("width", [4, 6, 8, 9, 16])
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
        y = conv_box.channels_last(x, pitch=16, size=(7, width + 5), left=3)
        assert torch.equal(y[:, :8, : x.shape[2], 3 : 3 + width], x)
        assert y.count_nonzero() == x.count_nonzero()
        assert torch.equal(conv_box.channels_last(x), x)


def test_runs_of_pixels() -> None:
    """As many as a vector of 16 bytes holds, and as rows, planes, images and the start allow."""
    half = torch.empty(2, 3, 56, 56, dtype=torch.float16)
    assert conv_box._run(half, 64) == 8
    assert conv_box._run(half.float(), 64) == 4
    assert conv_box._run(half, 4) == 4
    assert conv_box._run(half[..., :28], 64) == 4
    assert conv_box._run(half[..., :28, :], 64) == 8
    assert (
        conv_box._run(half[..., 2:], 64) == conv_box._run(half[..., ::2], 64) == conv_box._run(half[..., :7], 64) == 1
    )
    assert conv_box._run(half.to(memory_format=torch.channels_last), 64) == 1
    assert conv_box._run(torch.empty(1, 1, 1, 8), 64) == 4


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
        images, high, wide = _tiles.box(pixels, (n, h, w))
        assert images * high * wide == pixels
        covered = -(-n // images) * images * -(-h // high) * high * -(-w // wide) * wide
        assert covered < 2 * max(n * h * w, pixels)
    assert _tiles.box(256, (256, 56, 56)) == (4, 8, 8)
    assert _tiles.box(256, (256, 14, 14)) == (64, 2, 2)
    assert _tiles.box(128, (256, 7, 7)) == (128, 1, 1)
    assert _tiles.box(128, (1, 128, 128)) == (1, 1, 128)


@pytest.mark.parametrize("architecture", _tiles.BOX_ARCHITECTURES)
def test_every_pick_of_a_box_is_in_the_table(architecture: str) -> None:
    """What can be picked is what CI compiles, with the depth of a step shortened for few channels."""
    tiles, device = _tiles.box_tiles(architecture).values(), Device(architecture, 132)
    shipped = {dataclasses.replace(tile, k=k) for tile in tiles for k in (16, 32, 64) if k <= tile.k}
    sizes = ((1, 1, 1), (1, 7, 7), (32, 56, 56), (256, 112, 112))
    for channels, depth, images, (dtype, precision) in itertools.product(
        (1, 16, 64, 65, 512), (3, 16, 48, 72, 512), sizes, ((torch.float16, "ieee"), (torch.float32, "tf32"))
    ):
        for reach, crowded in itertools.product((None, 16 * depth), (False, True)):
            tile, shape = _tiles.conv_box(channels, depth, images, 4, reach, dtype, precision, device, crowded=crowded)
            assert tile in shipped
            assert shape[0] * shape[1] * shape[2] == tile.n
            assert reach is None or reach % tile.k == 0
            assert not crowded or tile.m * tile.n < 128 * 256
        tile, shape, splits = _tiles.conv_box_weight_grad(channels, depth, images, 9, dtype, precision, device)
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


@pytest.mark.parametrize("way", ["pointers", "boxes", "one tap", "depthwise"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_normalised_in_the_epilogue(way: str, dtype: torch.dtype, device: torch.device) -> None:
    groups, kernel = (6, 3) if way == "depthwise" else (1, 1 if way == "one tap" else 3)
    x = r(2, 6, 5, 4, device=device, dtype=dtype)
    w, b = r(6, 6 // groups, kernel, kernel, device=device, dtype=dtype), r(6, device=device, dtype=dtype)
    mean, var, weight, bias = (t.to(device, dtype) for t in (r(6), r(6).square(), r(6), r(6)))
    for norm in ((mean, var, weight, bias, 1e-3), (mean, var, None, None, 0.1)):
        results = []
        for t in (dtype, torch.float64):
            y = F.conv2d(x.to(t), w.to(t), b.to(t), groups=groups)
            results.append(F.batch_norm(y, *[None if n is None else n.to(t) for n in norm[:4]], eps=norm[4]).relu())
        with _tiles.force(**({"box": Tile(16, 32, 16)} if way == "boxes" else {})):
            y = FL.conv2d_then(x, w, b, groups=groups, then=nn.ReLU.pointwise, norm=norm)
        assert_within_budget(y, *results)


RESIDUAL = {
    "pointers": (3, 6, 1, {}),
    "boxes": (3, 6, 1, dict(box=Tile(16, 32, 16))),
    "packed boxes": (3, 10, 2, dict(box=Tile(16, 32, 16))),
    "depthwise": (3, 6, 6, {}),
    "product": (1, 6, 1, {}),
    "product in shares": (1, 18, 1, dict(matmul=Product(Tile(32, 16, 16), "ieee", splits=2))),
    "product transposed": (1, 6, 1, dict(matmul=Product(Tile(32, 16, 16), "ieee", transposed=True))),
    "product, halves": (1, 6, 1, dict(matmul=Product(Tile(64, 64, 16, warps=1), "ieee"))),
}
"""Size of the kernel, channels, groups, tiles."""


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("way", RESIDUAL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_added_in_the_epilogue(
    dtype: torch.dtype, way: str, normalised: bool, device: torch.device, launched: list[str]
) -> None:
    kernel, c, groups, forced = RESIDUAL[way]
    x = r(2, c, 5, 4, device=device, dtype=dtype)
    w, b = r(6, c // groups, kernel, kernel, device=device, dtype=dtype), r(6, device=device, dtype=dtype)
    norm = (r(6), r(6).square(), r(6), r(6)) if normalised else ()
    size = F.conv2d(x, w, groups=groups).shape
    for format in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=format)
        for residual in (r(size), r(size).to(memory_format=torch.channels_last), r(1, *size[1:]).expand(size)):
            residual = residual.to(device, dtype)
            for then in (None, nn.ReLU.pointwise):
                results = []
                for t in (dtype, torch.float64):
                    y = F.conv2d(x.to(t), w.to(t), b.to(t), groups=groups)
                    y = F.batch_norm(y, *[n.to(device, t) for n in norm], eps=0.1) if normalised else y
                    y = y + residual.to(t)
                    results.append(y if then is None else y.relu())
                statistics = (*[n.to(device, dtype) for n in norm], 0.1) if normalised else None
                launched.clear()
                with _tiles.force(**forced):
                    y = FL.conv2d_then(x, w, b, groups=groups, then=then, norm=statistics, residual=residual)
                assert len(launched) <= 3, "nothing but copies of a weight or an image, or shares to add up"
                assert_within_budget(y, *results)
                assert y.stride() == results[0].contiguous(memory_format=format).stride()


def test_what_is_added_elsewhere(device: torch.device) -> None:
    """Whatever a kernel can't add is torch's sum, with its broadcasting, promotion, gradients and errors."""
    x, w = r(2, 3, 5, 4, device=device), r(4, 3, 3, 3, device=device)
    y = FL.conv2d(x, w)
    cases = [r(y.shape, dtype=torch.float64), r(4, 1, 1), r(()), r(y.shape).requires_grad_(), torch.ones(y.shape).int()]
    with fastlayers.policy("auto"):
        for residual in (case.to(device) for case in cases):
            for _ in range(3):
                ours = FL.conv2d_then(x, w, residual=residual)
                torch.testing.assert_close(ours, y + residual)
                assert ours.requires_grad == residual.requires_grad
        x.requires_grad_()
        (ours,) = torch.autograd.grad(FL.conv2d_then(x, w, residual=cases[0].float().to(device)).sum(), x)
        torch.testing.assert_close(ours, torch.autograd.grad(F.conv2d(x, w).sum(), x)[0])
        with pytest.raises(RuntimeError, match="must match the size"):
            FL.conv2d_then(x, w, residual=r(2, 4, 5, 4, device=device))
        residual = r(y.shape, device=device)
        for dtype in (torch.bfloat16, torch.float32):
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                for _ in range(3):
                    ours = FL.conv2d_then(x, w, residual=residual.to(dtype))
                    assert ours.dtype == dtype
                    torch.testing.assert_close(ours, F.conv2d(x, w) + residual.to(dtype), rtol=0.02, atol=0.1)
        same = r(2, 4, 5, 4, device=device)
        with torch.no_grad():
            one = r(4, 4, 1, 1, device=device)
            for _ in range(3):
                torch.testing.assert_close(FL.conv2d_then(same, one, residual=same), F.conv2d(same, one) + same)


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


def pair(make: Any, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same model of our layers and of torch's, with statistics as after some training."""
    ours, theirs = make(nn).to(device), make(torch.nn).to(device)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def block(space: Any, **norm: Any) -> torch.nn.Module:
    return space.Sequential(
        space.Conv2d(2, 4, 3, padding=1, bias=False), space.BatchNorm2d(4, **norm), space.ReLU(),
        space.Conv2d(4, 3, 1), space.BatchNorm2d(3, **norm),
    )  # fmt: skip


def layers(model: torch.nn.Module, x: torch.Tensor) -> list[str]:
    with fastlayers.policy("auto"):
        return [decision.module for decision in fastlayers.explain(model, x)]


def test_batch_norm_in_eval_is_part_of_the_convolution(device: torch.device) -> None:
    ours, theirs = pair(block, device)
    x = r(2, 2, 4, 5, device=device)
    ours.eval()
    theirs.eval()
    exact = copy.deepcopy(theirs).double()
    with torch.no_grad():
        assert layers(ours, x) == ["0 + 1 + 2", "3 + 4"]
        assert_within_budget(ours(x), [theirs(t) for (t,) in neighbours(x)], exact(x.double()))
        # Nothing is remembered: statistics edited, loaded, or updated in training count at once.
        ours[1].running_mean.add_(1)
        theirs[1].running_mean.add_(1)
        ours[4].eps = theirs[4].eps = 0.5
        torch.testing.assert_close(ours(x), theirs(x))
        ours[1].weight.data = theirs[1].weight.data = r(4, device=device)
        torch.testing.assert_close(ours(x), theirs(x))
    assert layers(ours, x) == ["0", "1", "2", "3", "4"], "gradients"


def test_batch_norm_keeps_to_itself_where_it_would_show(device: torch.device) -> None:
    class Mine(torch.nn.BatchNorm2d):
        pass

    x = r(2, 2, 4, 5, device=device)
    separate = ["0", "1", "2"]
    with torch.no_grad():
        ours, theirs = pair(block, device)
        assert layers(ours, x)[:3] == separate, "training"
        theirs(x)
        with fastlayers.policy("auto"):
            torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        ours.eval()
        handle = ours[1].register_forward_hook(lambda *_: None)
        assert layers(ours, x)[:3] == separate, "a hook"
        handle.remove()
        assert layers(ours, x)[0] == "0 + 1 + 2"
        norm = Mine(4).to(device).eval()
        for other in (norm, torch.nn.BatchNorm2d(4, track_running_stats=False).to(device).eval()):
            ours[1] = other
            assert layers(ours, x)[:3] == separate
        ours[1] = torch.nn.BatchNorm2d(5).to(device).eval()
        with fastlayers.policy("auto"), pytest.raises(RuntimeError):
            ours(x)


def test_batch_norm_of_one_image_is_torchs_error(device: torch.device) -> None:
    for model in pair(block, device):
        with torch.no_grad(), fastlayers.policy("auto"), pytest.raises(ValueError, match="expected 4D input"):
            model.eval()(r(2, 4, 5, device=device))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_batch_norm_traced_with_gradients(device: torch.device) -> None:
    """torch.jit checks its trace without gradients, where eager calls would fuse."""
    ours, theirs = (model.eval() for model in pair(block, device))
    x = r(2, 2, 4, 5, device=device)
    with fastlayers.policy("auto"):
        torch.testing.assert_close(torch.jit.trace(ours, (x,))(x), theirs(x))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_has_a_memory_format_of_its_own(mode: str, device: torch.device) -> None:
    x = last(2, 2, 4, 5).to(device)
    ours, theirs = pair(
        lambda s: s.Sequential(s.Conv2d(2, 3, 3, padding=1, padding_mode=mode), s.ReLU(), s.Conv2d(3, 2, 1)), device
    )
    torch.testing.assert_close(ours(x), theirs(x), check_stride=True)


def three(space: Any) -> torch.nn.Module:
    return space.Sequential(
        space.Conv2d(2, 3, 3, padding=1), space.ReLU(), space.Conv2d(3, 5, 2), space.Conv2d(5, 4, 1), space.ReLU()
    )


def test_between_convolutions_images_stay_in_channels_last(
    device: torch.device, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCHW comes in and goes out; it is converted once. Results, gradients and strides are torch's."""
    formats = []
    conv2d = kernels.conv2d
    monkeypatch.setattr(
        kernels, "conv2d", lambda x, *a, **k: (formats.append(_is_channels_last(x)), conv2d(x, *a, **k))[1]
    )
    ours, theirs = pair(three, device)
    for x in (r(2, 2, 4, 5, device=device), last(2, 2, 4, 5).to(device)):
        for weight in (torch.contiguous_format, torch.channels_last):
            ours[2].weight.data = ours[2].weight.data.contiguous(memory_format=weight)
            theirs[2].weight.data = theirs[2].weight.data.contiguous(memory_format=weight)
            formats.clear()
            results = []
            for model in (ours, theirs):
                leaf = x.clone().requires_grad_()
                y = model(leaf)
                results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])])
            assert formats == [_is_channels_last(x), True, True]
            assert results[0][0].stride() == results[1][0].stride()
            torch.testing.assert_close(*results)
    with fastlayers.policy("torch"):
        assert ours(r(2, 2, 4, 5, device=device)).is_contiguous(memory_format=torch.channels_last)


def test_a_weight_that_is_none(device: torch.device) -> None:
    with fastlayers.policy("auto"):
        for space in (nn, torch.nn):
            model = space.Sequential(space.Conv2d(2, 3, 1), space.Conv2d(3, 2, 1)).to(device)
            model[1].weight = None
            with pytest.raises(TypeError, match="conv2d"):
                model(r(1, 2, 3, 3, device=device))
