"""Batch, group and instance normalisation: what the catalog's rows can't say. Running statistics, and what moves them; weights in
another dtype; a mean far from 0; activations behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as TF

import fastlayers
import fastlayers.functional as F
from fastlayers import nn
from fastlayers.kernels.runtime import tiles
from fastlayers.kernels.runtime.tiles import Tile
from fastlayers.testing import assert_within_budget

BATCHES = [
    ("BatchNorm1d", {}, (6, 5)),
    ("BatchNorm1d", {"momentum": None}, (3, 5, 7)),
    ("BatchNorm2d", {"momentum": 0.4, "affine": False}, (3, 4, 5, 3)),
    ("BatchNorm3d", {}, (2, 3, 2, 3, 2)),
    ("SyncBatchNorm", {"momentum": None}, (4, 3)),
    ("InstanceNorm1d", {"track_running_stats": True}, (3, 4, 9)),
    ("InstanceNorm2d", {"track_running_stats": True, "momentum": None, "affine": True}, (2, 3, 4, 3)),
]
BY_STATISTICS = pytest.mark.parametrize("whole", [True, False], ids=["one launch", "three launches"])


def forced(whole: bool) -> Any:
    return tiles.force(
        batch_norm_whole=Tile(1, 512 if whole else 0), batch_norm=Tile(4, 4), batch_norm_merge=Tile(2, 4)
    )


@BY_STATISTICS
@pytest.mark.parametrize(("name", "options", "shape"), BATCHES)
def test_running_statistics(
    name: str, options: dict[str, Any], shape: tuple[int, ...], whole: bool, device: torch.device
) -> None:
    """As torch's after some batches, the counter included, and so is what eval makes of them."""
    ours, theirs = (getattr(space, name)(shape[1], **options).to(device) for space in (nn, torch.nn))
    with forced(whole):
        for i in range(3):
            x = torch.randn(shape, device=device) * (i + 1) + i
            torch.testing.assert_close(ours(x), theirs(x))
    assert dict(ours.named_buffers()).keys() == dict(theirs.named_buffers()).keys()
    for (key, mine), other in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other, msg=key)
        if name != "SyncBatchNorm":
            assert mine._version == other._version, key
    x = torch.randn(shape, device=device)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_no_gradients_no_batches_and_a_flag_that_changes(device: torch.device) -> None:
    for space, watch in ((nn, True), (torch.nn, False)):
        torch.manual_seed(0)
        layer = space.BatchNorm1d(4).to(device)
        with torch.no_grad():
            first = layer(torch.randn(5, 4, device=device))
        layer(torch.randn(0, 4, device=device))  # counts, and moves nothing
        layer.track_running_stats = False
        second = layer(torch.randn(5, 4, device=device))  # moves nothing
        third = layer.eval()(torch.randn(5, 4, device=device))
        found = [first, second, third, *layer.buffers()]
        if watch:
            mine = found
    torch.testing.assert_close(mine, found)


def test_the_backward_in_eval_uses_statistics_that_have_moved_since(device: torch.device) -> None:
    """As in torch, which doesn't count their changes."""
    gradients = []
    for space in (nn, torch.nn):
        torch.manual_seed(0)
        layer = space.BatchNorm1d(3).to(device)
        x = torch.randn(4, 3, device=device, requires_grad=True)
        y = layer.eval()(x)
        layer.train()(torch.randn(6, 3, device=device) * 5)
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
    torch.testing.assert_close(*gradients)


def test_momentum_may_be_a_tensor(device: torch.device) -> None:
    """Which isn't waited for: float() of it is never called."""

    x = torch.randn(5, 3, device=device)
    found = []
    for momentum in (0.25, torch.tensor(0.25, device=device)):
        mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "__float__", None)
            patch.setattr(torch.Tensor, "item", None)
            F.batch_norm(x, mean, var, training=True, momentum=momentum)  # type: ignore[arg-type]
        found.append((mean, var))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm", "group_norm"])
def test_16_bits_with_float32_weights(name: str, dtype: torch.dtype, device: torch.device) -> None:
    x, dy = (torch.randn(3, 4, 6, device=device, dtype=dtype) for _ in range(2))
    w, b = (torch.randn(4, device=device) for _ in range(2))
    found = []
    for space, kind in ((F, dtype), (TF, dtype), (TF, torch.float64)):
        tensors = [t.to(kind if kind == torch.float64 else t.dtype).requires_grad_() for t in (x, w, b)]
        running = [t.to(tensors[1].dtype) for t in (torch.zeros(4, device=device), torch.ones(4, device=device))]
        function: Any = getattr(space, name)
        if name == "group_norm":
            y = function(tensors[0], 2, *tensors[1:])
        elif name == "batch_norm":
            y = function(tensors[0], *running, *tensors[1:], training=True)
        else:
            y = function(tensors[0], *running, *tensors[1:])
        found.append([y, *torch.autograd.grad(y, tensors, dy.to(kind)), *running])
    for ours, theirs, exact in zip(*found, strict=True):
        assert_within_budget(ours, theirs, exact)


@BY_STATISTICS
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_mean_far_from_0(whole: bool, channels_last: bool, device: torch.device) -> None:
    """1 / sqrt(var) at a mean of 10,000 standard deviations, which sums of squares would have nothing left of."""
    x = torch.randn(4, 4, 6, 8, device=device) + 1e4
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    mean, var = torch.zeros(4, device=device), torch.zeros(4, device=device)
    with tiles.force(batch_norm_whole=Tile(1, 1024 if whole else 0), batch_norm=Tile(2, 16)):
        F.batch_norm(x, mean, var, training=True, momentum=1.0)
    right = x.double().transpose(0, 1).flatten(1)
    # The sum of 192 numbers is rounded a few times in float32. A unit there is 1.2e-7 of the mean and 1e-3 of the standard
    # deviation. The variance is too large by the square of the mean's error. From sums of squares it would be off by some 100 %.
    torch.testing.assert_close(mean.double(), right.mean(1), rtol=4e-7, atol=0)
    torch.testing.assert_close(var.double(), right.var(1), rtol=2e-5, atol=0)


@BY_STATISTICS
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm", "group_norm"])
def test_an_outlier_comes_first(name: str, whole: bool, device: torch.device) -> None:
    """It costs the means of all others no digits, wherever it lies."""
    x = torch.randn(4, 2, 32, 32, device=device)
    x[0, :, 0, 0] = 3e3
    if name != "batch_norm":
        x[:, :, 0, 0] = 3e3
    found = []
    for space, data in ((F, x), (TF, x), (TF, x.double())):
        mean, var = (torch.zeros(2, device=device, dtype=data.dtype) for _ in range(2))
        with tiles.force(batch_norm_whole=Tile(1, 4096 if whole else 0), batch_norm=Tile(2, 32)):
            if name == "group_norm":
                found.append([space.group_norm(data, 2)])
            elif name == "instance_norm":
                found.append([space.instance_norm(data, mean, var, momentum=1.0), mean, var])
            else:
                found.append([space.batch_norm(data, mean, var, training=True, momentum=1.0), mean, var])
    for ours, theirs, exact in zip(*found, strict=True):
        assert_within_budget(ours, theirs, exact)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@BY_STATISTICS
def test_running_statistics_of_what_is_no_number(value: float, whole: bool, device: torch.device) -> None:
    x = torch.randn(4, 3, 5, device=device)
    x[0, 0, 0] = x[1, 1, 2] = value
    found = []
    for space in (F, TF):
        mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
        with forced(whole):
            found.append((space.batch_norm(x, mean, var, training=True), mean, var))
    torch.testing.assert_close(*found, equal_nan=True)


def test_errors_are_torchs(device: torch.device) -> None:
    """Under every policy."""
    x, w = torch.randn(4, 3, device=device), torch.ones(5, device=device)
    calls: list[Any] = [
        lambda space: space.batch_norm(x[:1], None, None, training=True),
        lambda space: space.batch_norm(x, None, None),
        lambda space: space.batch_norm(x, None, None, training=True, eps=0.0),
        lambda space: space.batch_norm(x, None, None, w, training=True),
        lambda space: space.batch_norm(x, w, w),
        lambda space: space.instance_norm(x),
        lambda space: space.group_norm(x, 2),
        lambda space: space.group_norm(x.new_zeros(1, 3), 3),
        lambda space: space.batch_norm(x.new_zeros(3), None, None, w, training=True),
    ]
    for call in calls:
        with pytest.raises(Exception) as expected:  # noqa: PT011
            call(TF)
        for path in ("auto", "triton", "torch"):
            with fastlayers.policy(path), pytest.raises(type(expected.value)) as found:
                call(F)
            assert str(found.value) == str(expected.value)


def test_sync_batch_norm_converts_to_ours() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm2d(4, affine=False)))
    before = copy.deepcopy(model.state_dict())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[1]) is type(converted[2][0]) is nn.SyncBatchNorm
    assert {k: v.tolist() for k, v in converted.state_dict().items()} == {k: v.tolist() for k, v in before.items()}
    assert type(torch.nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(3))) is torch.nn.SyncBatchNorm


@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d", "GroupNorm"])
def test_an_activation_behind_runs_in_the_same_kernels(name: str, launched: list[str], device: torch.device) -> None:
    layers = [getattr(s, name)(*((2, 4) if name == "GroupNorm" else (4,))) for s in (nn, torch.nn)]
    ours, theirs = (
        nn.Sequential(layers[0], nn.ReLU()).to(device),
        torch.nn.Sequential(layers[1], torch.nn.ReLU()).to(device),
    )
    x = torch.randn(2, 4, 3, 5, device=device)
    found = []
    for model in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()]), *model.buffers()])
    torch.testing.assert_close(*found)
    assert not any("pointwise" in kernel for kernel in launched)


def test_a_convolution_before_it_in_training(launched: list[str], device: torch.device) -> None:
    """The convolution alone, then normalisation and activation together, the batch counted once."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).to(device)
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1)
    )
    theirs.to(device).load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 6, 5, device=device)
    found = []
    for model in (ours, theirs):
        y = model(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [*model.parameters()]), *model.buffers()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert not any("pointwise" in kernel for kernel in launched)
