"""Pooling and resampling: what the catalog's rows can't say. Which of equal pixels is the maximum, windows of many pixels, sizes
whose products need 64 bits, and factors that aren't the ratio of sizes."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from contract import exactly_same, same

import fastlayers
import fastlayers.functional as FL
from fastlayers.kernels.pooling.positions import coordinates
from fastlayers.kernels.runtime import launch
from fastlayers.kernels.runtime.tiles import Tile, force
from fastlayers.testing import assert_within_budget


def both(name: str, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results and the input's gradient, of ours and of torch's function."""
    dy = None
    found = []
    for space in (FL, F):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = getattr(space, name)(leaf, *args, **kwargs)
        ys = [*y] if isinstance(y, tuple) else [y]
        dy = torch.randn_like(ys[0]) if dy is None else dy
        found.append([*ys, *torch.autograd.grad(ys[0], leaf, dy)])
    return found[0], found[1]


@pytest.mark.parametrize("channels_last", [False, True])
def test_which_of_equal_pixels_is_the_maximum(channels_last: bool, device: torch.device) -> None:
    """The first; of NaNs the last; in a window of -inf its first pixel within the image."""
    x = torch.randint(-2, 2, (1, 4, 9, 8), device=device).float()
    x[0, :, 3, 4] = x[0, 1, 3, 5] = x[0, 2, 4, 4] = float("nan")
    x[0, :2, :4, :4] = x[0, 3, 6:, 5:] = float("-inf")
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    for kernel, stride, padding, dilation in (
        (3, 2, 1, 1),
        (2, 2, 0, 1),
        (3, 1, 1, 1),
        (2, 1, 1, 3),
        ((3, 2), 4, 1, 1),
    ):
        for ceil_mode in (False, True):
            mine, others = both("max_pool2d", x, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
            exactly_same(mine[:2], others[:2])
            same(mine[2], others[2])
    exactly_same(*(found[:2] for found in both("adaptive_max_pool2d", x, (4, 3), return_indices=True)))


def test_windows_of_more_pixels_than_a_byte_counts(device: torch.device) -> None:
    same(*both("max_pool1d", torch.randn(1, 2, 520, device=device), 257, return_indices=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_maximum_of_a_window_that_threads_share(
    channels_last: bool, launched: list[str], device: torch.device
) -> None:
    """Its rules are those of smaller windows: the first of equal pixels, the last NaN, the first pixel where all are -inf."""
    x = torch.randint(-3, 3, (2, 5, 20, 18), device=device).float()
    x[0, 0, 3, 4] = x[0, 0, 15, 2] = x[0, 1, 19, 17] = float("nan")
    x[1, 0] = x[1, 1, :9] = x[0, 2, 4:] = float("-inf")
    x[1, 2] = float("nan")
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    with force(pool_large=Tile(16, 32)):
        for options in (
            dict(kernel_size=(20, 18)),
            dict(kernel_size=(7, 6), stride=4, padding=(3, 1)),
            dict(kernel_size=6, stride=(9, 2), padding=3, dilation=3),
            dict(kernel_size=(9, 5), stride=5, padding=2, ceil_mode=True),
        ):
            exactly_same(*(found[:2] for found in both("max_pool2d", x, **options, return_indices=True)))
            same(*both("max_pool2d", x, **options))
        for size in (1, (2, 3), (3, 1)):
            exactly_same(*(found[:2] for found in both("adaptive_max_pool2d", x, size, return_indices=True)))
            same(*both("adaptive_max_pool2d", x, size))
    assert "_max_pool_large_kernel" in launched


def test_folding_windows_of_any_sizes(device: torch.device) -> None:
    """A pixel adds up those windows that hold it, however far they are apart."""
    for kernel, dilation, padding, stride in (
        (7, 1, 2, 4),
        ((5, 4), 1, 1, (2, 5)),
        (3, (2, 3), 2, (3, 2)),
        (2, 4, 3, 2),
    ):
        x = torch.randn(2, 3, 15, 13, device=device)
        same(*both("unfold", x, kernel, dilation, padding, stride))
        columns = F.unfold(x, kernel, dilation, padding, stride)
        same(*both("fold", torch.randn_like(columns), (15, 13), kernel, dilation, padding, stride))


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
def test_numbers_that_32_bits_do_not_hold_are_torchs_error(name: str, device: torch.device) -> None:
    x = torch.randn(1, 2, 5, 5, device=device)
    for stride in (2**31, 2**40):
        for space in (F, FL):
            with pytest.raises(RuntimeError, match=r"overflow|out of range"):
                getattr(space, name)(x, 1, stride)


def test_windows_dilated_along_all_dimensions(device: torch.device) -> None:
    same(*both("max_pool3d", torch.randn(1, 2, 7, 6, 8, device=device), (2, 3, 2), 2, 1, 2, return_indices=True))


@pytest.mark.parametrize("name", ["adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d"])
def test_no_kernel_for_each_size_of_images_that_are_pooled_whole(
    name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """What the kernels of both directions are compiled for doesn't depend on the image."""
    run, compiled = launch.launch, []

    def watch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
        compiled.append((launch.name_of(kernel), meta))
        run(kernel, programs, *args, **meta)

    monkeypatch.setattr(launch, "launch", watch)
    for size in ((9, 11), (9, 23)):
        same(*both(name, torch.randn(1, 2, *size, device=device), 1 if "adaptive" in name else size))
    assert len(compiled) == 4
    assert compiled[:2] == compiled[2:]


@pytest.mark.parametrize("name", ["adaptive_avg_pool1d", "adaptive_max_pool1d"])
def test_bounds_of_windows_beyond_32_bits(name: str, device: torch.device) -> None:
    with force(pool=Tile(32768, 1)):
        same(*both(name, torch.randn(1, 1, 60_001, device=device), 40_000))


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_mean_of_an_image_is_as_exact_as_torchs(channels_last: bool, device: torch.device) -> None:
    """Its pixels are shared among threads: one after another, their sum would be rounded thousands of times."""
    x = torch.rand(2, 5, 64, 64, device=device)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    assert_within_budget(
        FL.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x.double(), 1)
    )


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_gradient_of_a_single_pixel_is_shared_among_threads(
    channels_last: bool, mode: str, launched: list[str], device: torch.device
) -> None:
    """It is the sum over an image, as after the pooled branch of a segmentation's head."""
    dy = torch.rand(2, 5, 24, 20, device=device)
    dy = dy.to(memory_format=torch.channels_last) if channels_last else dy
    found = []
    for space, dtype in ((FL, torch.float32), (F, torch.float32), (F, torch.float64)):
        x = torch.ones(2, 5, 1, 1, device=device, dtype=dtype, requires_grad=True)
        y = space.interpolate(x, size=(24, 20), mode=mode)
        found.append(torch.autograd.grad(y, x, dy.to(dtype))[0])
    assert_within_budget(*found)
    assert "_avg_pool_large_kernel" in launched


@triton.jit
def _coordinates_kernel(out_ptr, first, D, H, W):
    i = tl.arange(0, 4)
    n, d, h, w = coordinates(first + i, D, H, W)
    tl.store(out_ptr + i, n)
    tl.store(out_ptr + 4 + i, d)
    tl.store(out_ptr + 8 + i, h)
    tl.store(out_ptr + 12 + i, w)


def test_images_of_more_pixels_than_32_bits_count(device: torch.device) -> None:
    """The last two pixels of an image of 3 * 2**30, and the first two of the next."""
    d, h, w = 1024, 2048, 1536
    found = torch.empty(4, 4, dtype=torch.int64, device=device)
    _coordinates_kernel[(1,)](found, d * h * w - 2, d, h, w)
    assert found.T.tolist() == [[0, d - 1, h - 1, w - 2], [0, d - 1, h - 1, w - 1], [1, 0, 0, 0], [1, 0, 0, 1]]


def test_a_dilation_larger_than_the_image_is_torchs(device: torch.device) -> None:
    x = torch.randn(1, 2, 2, device=device)
    with pytest.raises(fastlayers.NotAccelerated, match="a dilation larger than the image, with padding"):
        FL.max_pool1d(x, 2, padding=2, dilation=3)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area"])
def test_resampling_by_any_sizes_and_factors(mode: str, device: torch.device) -> None:
    """Up, down and to the same size."""
    dims = {"linear": 1, "bilinear": 2, "trilinear": 3}.get(mode, 2)
    fastlayers.policy("auto")
    choose = random.Random(torch.initial_seed())
    for by_size, dtype in itertools.product((True, False), (torch.float32, torch.float64)):
        image = [choose.randint(1, 5) for _ in range(dims)]
        options: dict[str, Any] = {"mode": mode}
        if by_size:
            options["size"] = [choose.randint(1, 9) for _ in range(dims)]
        else:
            options["scale_factor"] = [choose.choice((1.0, 2.0, 3.0, choose.uniform(1 / n, 2.6))) for n in image]
            options["recompute_scale_factor"] = choose.choice((None, False, True))
        if "linear" in mode:
            options["align_corners"] = choose.choice((None, False, True))
        x = torch.randn(1, 2, *image, device=device, dtype=dtype)
        x = x.to(memory_format=torch.channels_last) if dims == 2 and choose.random() < 0.5 else x
        mine, others = both("interpolate", x, **options)
        torch.testing.assert_close(mine, others, rtol=1e-5, atol=1e-5, msg=f"{tuple(x.shape)} {options}")


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("mode", ["linear", "bilinear", "trilinear"])
def test_resampling_to_the_same_size_is_a_copy(mode: str, align_corners: bool, device: torch.device) -> None:
    """As torch's is on a GPU: a weight of 0 makes NaN of no infinity."""
    image = {"linear": (5,), "bilinear": (4, 5), "trilinear": (3, 1, 4)}[mode]
    x = torch.randn(2, 3, *image, device=device)
    same(*both("interpolate", x, size=image, mode=mode, align_corners=align_corners))
    x[0, 0, ..., 2] = float("inf")
    assert torch.equal(FL.interpolate(x, size=image, mode=mode, align_corners=align_corners), x)


def test_a_factor_that_is_no_number_is_torchs_error(device: torch.device) -> None:
    for factor in (float("inf"), float("nan"), (2.0, float("inf"))):
        for space in (F, FL):
            with pytest.raises(RuntimeError, match=r"overflow|out of range"):
                space.interpolate(torch.randn(1, 1, 3, 3, device=device), scale_factor=factor)


@pytest.mark.parametrize("name", ["upsample", "upsample_nearest", "upsample_bilinear"])
def test_old_names_warn_as_torchs(name: str, device: torch.device) -> None:
    x = torch.randn(1, 2, 3, 4, device=device)
    with pytest.warns(UserWarning, match=f"`nn.functional.{name}` is deprecated") as warned:
        same(*both(name, x, scale_factor=2))
    assert len(warned) == 2
    assert str(warned[0].message) == str(warned[1].message)
    assert {w.filename for w in warned} == {__file__}
