"""Conv2d: every geometry against torch, memory formats, bad input, and what a Sequential makes one call of."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolutions import FORMATS, check, last, pair, r

import fastlayers
import fastlayers.functional as FL
from fastlayers import nn
from fastlayers.testing import assert_within_budget, neighbours

pytestmark = pytest.mark.usefixtures("small_tiles")


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


@pytest.mark.parametrize("i", range(len(FORMATS)))
@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (1, 1, 4, 4), (3, 5, 1, 1), (1, 3, 1, 5), (2, 1, 5, 1), (1, 4, 3, 3)])
def test_memory_formats(shape: tuple[int, ...], i: int, device: torch.device) -> None:
    """Any strides of input and weight; the result's are torch's."""
    x = FORMATS[i](*shape).to(device)
    for format in (torch.contiguous_format, torch.channels_last):
        check(x, r(4, shape[1], 1, 1, device=device).to(memory_format=format), r(4, device=device))
        check(x, r(4, shape[1], 3, 2, device=device).to(memory_format=format), None, padding=(1, 1))


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
def test_bad_input(case: str, device: torch.device, launched: list[str]) -> None:
    """torch's exception, before anything is launched."""
    shapes, kwargs = BAD[case]
    args = [r(s, device=device) for s in shapes]
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.conv2d(*args, **kwargs)
    with fastlayers.policy("auto"), pytest.raises(theirs.type):
        FL.conv2d(*args, **kwargs)
    assert not launched


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
    assert layers(ours, x) == ["0", "1 + 2", "3", "4"], "gradients"


def test_batch_norm_keeps_to_itself_where_it_would_show(device: torch.device) -> None:
    class Mine(torch.nn.BatchNorm2d):
        pass

    x = r(2, 2, 4, 5, device=device)
    separate = ["0", "1", "2"]
    with torch.no_grad():
        ours, theirs = pair(block, device)
        assert layers(ours, x)[:3] == ["0", "1 + 2", "3"], "training"
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


def test_a_weight_that_is_none(device: torch.device) -> None:
    with fastlayers.policy("auto"):
        for space in (nn, torch.nn):
            model = space.Sequential(space.Conv2d(2, 3, 1), space.Conv2d(3, 2, 1)).to(device)
            model[1].weight = None
            with pytest.raises(TypeError, match="conv2d"):
                model(r(1, 2, 3, 3, device=device))
