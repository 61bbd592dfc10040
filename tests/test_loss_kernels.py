"""The kernels of cross entropy through their launchers: this file looks inside, at tiles, statistics and workspaces."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastlayers
import fastlayers.functional as FL
from fastlayers.kernels import linear_cross_entropy, loss
from fastlayers.kernels.runtime import launch as _launch
from fastlayers.kernels.runtime import tiles as _tiles
from fastlayers.kernels.runtime.tiles import Device, Tile
from fastlayers.testing import assert_within_budget, neighbours

INF, NAN = float("inf"), float("nan")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("none", "mean", "sum")
SMALL = dict(cross_entropy=Tile(8, 8, 4), cross_entropy_grad=Tile(8, 64))
"""Tiles that small shapes cross the edges of."""


def poisoned(shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full(tuple(shape), NAN, dtype=dtype, device=device)


def ours(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    dy: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    saved: bool = True,
) -> tuple[torch.Tensor, ...]:
    """The loss, and the gradients of the logits and, if the target is floating, of the target. All outputs start as NaN."""
    options: dict[str, Any] = dict(ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
    probabilities, accumulate = target.is_floating_point(), torch.promote_types(x.dtype, torch.float32)
    positions = x.shape[:1] + x.shape[2:] if x.dim() > 1 else ()
    out = poisoned(positions if reduction == "none" else (), x.dtype, x.device)
    total = poisoned((), accumulate, x.device) if reduction == "mean" and not probabilities else None
    shape = loss.statistics_shape(
        x.shape, weighted=weight is not None, label_smoothing=label_smoothing, probabilities=probabilities
    )
    statistics = poisoned(shape, accumulate, x.device) if saved and shape else None
    before = x.clone()
    loss.cross_entropy(x, target, weight, out, total, statistics, **options)
    dx = poisoned(x.shape, x.dtype, x.device)
    dtarget = poisoned(x.shape, target.dtype, x.device) if probabilities else None
    dy = torch.ones_like(out) if dy is None else dy
    loss.cross_entropy_grad(dy, x, target, weight, total, statistics, dx, dtarget, **options)
    assert torch.equal(torch.nan_to_num(x), torch.nan_to_num(before))
    return (out, dx) if dtarget is None else (out, dx, dtarget)


def torchs(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, dy: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, ...]:
    """The same by torch."""
    leaves = [x.detach().requires_grad_()]
    if target.is_floating_point():
        leaves.append(target := target.detach().requires_grad_())
    out = F.cross_entropy(leaves[0], target, weight, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, dy)


def check(x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None, **options: Any) -> None:
    """Values and gradients are within twice torch's own error."""
    saved = options.pop("saved", True)
    dy = torch.randn_like(F.cross_entropy(x, target, weight, **options))

    def double(t: torch.Tensor | None) -> torch.Tensor | None:
        return t.double() if t is not None and t.is_floating_point() else t

    exact = torchs(x.double(), double(target), None if weight is None else weight.double(), dy.double(), **options)  # type: ignore[arg-type]
    found = ours(x, target, weight, dy, **options, saved=saved)
    each = [torchs(moved, target, weight, dy, **options) for (moved,) in neighbours(x)]
    for name, a, c, *b in zip(("loss", "dx", "dtarget"), found, exact, *each, strict=False):
        assert_within_budget(a, b, c, name, scale=1)


def classes(shape: tuple[int, ...], count: int, device: torch.device) -> torch.Tensor:
    """Random classes, a fifth of them ignored, but not the first."""
    target = torch.randint(count, shape, device=device)
    ignored = torch.rand(shape, device=device) < 0.2
    ignored.view(-1)[:1] = False
    return target.masked_fill(ignored, -100)


def probabilities(x: torch.Tensor) -> torch.Tensor:
    return torch.rand(x.shape, device=x.device).softmax(1 if x.dim() > 1 else 0).to(x.dtype)


SHAPES = ((9, 7), (2, 19, 3, 2), (37,), (2, 1, 3), (3, 131), (2, 130, 2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("of_probabilities", [False, True])
def test_all_arguments(
    shape: tuple[int, ...], weighted: bool, smoothing: float, of_probabilities: bool, device: torch.device
) -> None:
    count = shape[0] if len(shape) == 1 else shape[1]
    for reduction in REDUCTIONS:
        x = torch.randn(shape, device=device) * 3
        positions = shape[:1] + shape[2:] if len(shape) > 1 else ()
        target = probabilities(x) if of_probabilities else classes(positions, count, device)
        weight = torch.rand(count, device=device) + 0.1 if weighted else None
        with _tiles.force(**({} if reduction == "sum" else SMALL)):
            check(x, target, weight, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 37), (3, 200), (3, 203), (2, 21, 17), (2, 136, 3)], ids=str)
def test_dtypes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = (torch.randn(shape, device=device) * 3).to(dtype)
    weight = (torch.rand(shape[1], device=device) + 0.1).to(dtype)
    check(x, classes(shape[:1] + shape[2:], shape[1], device), weight, label_smoothing=0.1)
    check(x, probabilities(x), weight)


@pytest.mark.parametrize("tile", [(1, 16, 8), (8, 4, 8), (8, 1, 32)])
def test_long_rows_walk_in_blocks(tile: tuple[int, int, int], device: torch.device) -> None:
    """Every row of several blocks and every gradient of several tiles, with and without what the forward keeps."""
    with _tiles.force(cross_entropy=Tile(*tile), cross_entropy_grad=Tile(4, 128)):
        for count in (136, 201):
            x = torch.randn(5, count, device=device).cumsum(1)  # so that the maximum moves
            check(x, classes((5,), count, device), label_smoothing=0.1)
            check(x, classes((5,), count, device), saved=False)
            check(x, probabilities(x), torch.rand(count, device=device), saved=count == 201)


def test_shipped_tiles_of_a_vocabulary(device: torch.device) -> None:
    for count in (30522, 8200):
        x = torch.randn(2, count, device=device, dtype=torch.bfloat16) * 3
        check(x, torch.tensor([count - 1, 0], device=device))


def test_an_offset_costs_no_digits(device: torch.device) -> None:
    x = torch.randn(4, 300, device=device) + 1000
    check(x, classes((4,), 300, device), label_smoothing=0.1)
    check(x, probabilities(x))


def test_strides(device: torch.device) -> None:
    def same(x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, **options: Any) -> None:
        dense = (x.contiguous(), target.contiguous(), weight.contiguous())
        for a, b in zip(ours(x, target, weight, **options), ours(*dense, **options), strict=True):
            torch.testing.assert_close(a, b)

    weight = torch.rand(2 * 24, device=device)[::2]
    images = torch.randn(2, 24, 3, 5, device=device)
    labels = classes((2, 5, 3), 24, device).mT
    soft = probabilities(images).to(memory_format=torch.channels_last)
    same(images.to(memory_format=torch.channels_last), soft, weight, reduction="sum")
    for x in (
        images.to(memory_format=torch.channels_last),
        images.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
        torch.randn(2, 24, 6, 7, device=device)[:, :, ::2, 1:6],
        torch.randn(2, 24, 3, 1, device=device).expand(2, 24, 3, 5),
    ):
        same(x, labels, weight, label_smoothing=0.1)
    rows = classes((16,), 24, device)[::2]
    for x in (
        torch.randn(24, 8, device=device).T,
        torch.randn(8, 40, device=device)[:, 8:32],
        torch.randn(8, 25, device=device)[:, 1:],
        torch.randn(8, 48, device=device)[:, ::2],
    ):
        with _tiles.force(**SMALL):
            same(x, rows, weight, reduction="none", dy=torch.randn((), device=device).expand(8))


@pytest.mark.parametrize("of_probabilities", [False, True])
@pytest.mark.parametrize("strides", [(2**31, 1, 8), (8, 1, 2**31)], ids=str)
def test_logits_2_31_elements_apart(strides: tuple[int, ...], of_probabilities: bool, device: torch.device) -> None:
    """Of the memory, only the pages around the logits are ever touched."""

    def apart(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(2**31 + 64, dtype=t.dtype, device=device).as_strided(t.shape, strides).copy_(t)

    x = torch.randn(2, 8, 2, device=device, dtype=torch.float16)
    target = probabilities(x) if of_probabilities else classes((2, 2), 8, device)
    results = []
    for logits, wanted in ((x, target), (apart(x), apart(target) if of_probabilities else target)):
        logits.requires_grad_()
        with fastlayers.policy("triton"):
            y = FL.cross_entropy(logits, wanted, reduction="none")
        results.append((y, *torch.autograd.grad(y.sum(), logits)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("count", [7, 140])
def test_inf_and_nan(count: int, smoothing: float, device: torch.device) -> None:
    rows = torch.randn(9, count, device=device)
    rows[0, 3] = -INF
    rows[1] = -INF
    rows[2, 5] = INF
    rows[3, 4] = NAN
    rows[4, :2] = -INF  # the target itself
    rows[5, 2:] = torch.finfo(torch.float32).min
    rows[6, 3] = torch.finfo(torch.float32).max
    rows[7] = NAN
    rows[8, :-1] = -INF
    rows = rows.repeat(3, 1)
    targets = torch.tensor([1, count - 1, -100], device=device).repeat_interleave(9)
    for small, target in ((True, targets), (False, targets), (True, probabilities(rows.nan_to_num(0, 0, 0)))):
        options: dict[str, Any] = dict(reduction="none", label_smoothing=smoothing)
        dy = torch.rand(27, device=device) + 0.5
        with _tiles.force(**(SMALL if small else {})):
            found = ours(rows, target, None, dy, **options)
        for a, b in zip(found, torchs(rows, target, None, dy, **options), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("count", [7, 140])
def test_ignored_positions(count: int, smoothing: float, device: torch.device) -> None:
    """A NaN among the logits of an ignored position, nothing but ignored ones, and nothing but weights of 0."""
    x = torch.randn(4, count, device=device)
    x[2, 3] = NAN
    weight = torch.rand(count, device=device)
    weight[3] = 0
    for target, ignore in (([0, 3, -100, 2], -100), ([5] * 4, 5), ([3] * 4, 5)):
        targets = torch.tensor(target, device=device)
        for reduction, w in (("none", weight), ("mean", weight), ("mean", None), ("sum", None)):
            options: dict[str, Any] = dict(reduction=reduction, label_smoothing=smoothing, ignore_index=ignore)
            dy = torch.randn_like(F.cross_entropy(x, targets, w, **options))
            for a, b in zip(ours(x, targets, w, dy, **options), torchs(x, targets, w, dy, **options), strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("bad", [-1, 7, 2**40, -(2**62)])
def test_a_target_that_is_no_class(bad: int, device: torch.device) -> None:
    """NaN in its own row, and nothing is read out of bounds, which the sanitizer would see."""
    x, weight = torch.randn(3, 7, device=device), torch.rand(7, device=device)
    targets = torch.tensor([2, bad, 4], device=device)
    for smoothing in (0.0, 0.1):
        options: dict[str, Any] = dict(reduction="none", label_smoothing=smoothing)
        out, dx = ours(x, targets, weight, **options)
        good = torch.tensor([0, 2], device=device)
        expected, expected_dx = ours(x[good], targets[good], weight, **options)
        assert out[1].isnan()
        assert dx[1].isnan().all()
        assert torch.equal(out[good], expected)
        assert torch.equal(dx[good], expected_dx)
        assert ours(x, targets, weight, label_smoothing=smoothing)[0].isnan()


def test_uint8_targets(device: torch.device) -> None:
    x = torch.randn(4, 7, device=device)
    target = torch.tensor([0, 6, 2, 255], device=device)
    for a, b in zip(ours(x, target.to(torch.uint8), ignore_index=255), ours(x, target, ignore_index=255), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5, 3, 4)], ids=str)
def test_uint8_targets_of_images_are_torchs_error(
    shape: tuple[int, ...], smoothing: float, device: torch.device
) -> None:
    target = torch.zeros(shape[0], *shape[2:], dtype=torch.uint8, device=device)
    for function in (F.cross_entropy, FL.cross_entropy):
        with pytest.raises(RuntimeError, match="expected scalar type Long but found Byte"):
            function(torch.randn(shape, device=device), target, label_smoothing=smoothing)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_positions(reduction: str, device: torch.device) -> None:
    x = torch.empty(0, 7, device=device)
    for target in (torch.empty(0, dtype=torch.int64, device=device), x):
        out, dx, *_ = ours(x, target, reduction=reduction)
        torch.testing.assert_close(out, F.cross_entropy(x, target, reduction=reduction), equal_nan=True)
        assert dx.shape == x.shape


def test_one_gradient_of_two(device: torch.device) -> None:
    x = torch.randn(3, 9, device=device)
    target = probabilities(x)
    options: dict[str, Any] = dict(ignore_index=-100, reduction="sum", label_smoothing=0.0)
    both = ours(x, target, reduction="sum")
    for i in range(2):
        out = poisoned(x.shape, x.dtype, device)
        given = (out, None) if i == 0 else (None, out)
        loss.cross_entropy_grad(torch.ones((), device=device), x, target, None, None, None, *given, **options)
        assert torch.equal(out, both[1 + i])


def test_many_programs_leave_many_sums(device: torch.device) -> None:
    with _tiles.force(cross_entropy=Tile(1, 2, 4), cross_entropy_grad=Tile(64, 4)):
        check(torch.randn(20, 3, device=device), classes((20,), 3, device), torch.rand(3, device=device))


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (3, 2, 0, 1), (0, 3, 2, 1)], ids=str)
@pytest.mark.parametrize("of_probabilities", [False, True])
def test_gradients_lie_as_their_tensors_do(
    order: tuple[int, ...], of_probabilities: bool, device: torch.device
) -> None:
    """In memory, not only in their values; also where no three dimensions describe them."""

    def laid_out(t: torch.Tensor) -> torch.Tensor:
        inverse = [order.index(d) for d in range(4)]
        return t.permute(order).contiguous().permute(inverse).detach()

    x = torch.randn(2, 6, 3, 5, device=device)
    target = probabilities(x) if of_probabilities else classes((2, 3, 5), 6, device)
    results = []
    for function, move in ((FL.cross_entropy, laid_out), (F.cross_entropy, torch.Tensor.contiguous)):
        leaves = [move(t).requires_grad_() for t in (x, target) if t.is_floating_point()]
        given = leaves if of_probabilities else (*leaves, target)
        gradients = torch.autograd.grad(function(*given), leaves)
        if function is FL.cross_entropy:
            assert [g.stride() for g in gradients] == [t.stride() for t in leaves]
        results.append(gradients)
    torch.testing.assert_close(*results)


def test_one_position_a_sample_is_a_matrix(device: torch.device) -> None:
    """As many programs, whether or not there is a dimension of size 1."""
    x, target = torch.randn(64, 10, device=device, requires_grad=True), classes((64,), 10, device)
    explained = []
    for more in ((), (1,), (1, 1)):
        logits, wanted = x.view(64, 10, *more), target.view(64, *more)
        explained.append(str(fastlayers.explain(lambda x, t: FL.cross_entropy(x, t).backward(), logits, wanted)))
    assert "cross_entropy_kernel" in explained[0]
    assert explained[0] == explained[1] == explained[2]


def test_every_thread_has_whole_lanes() -> None:
    """What a turn of the forward reduces over lies within one thread: no barrier in the loop."""
    for count, positions, itemsize in itertools.product((1, 10, 1000, 50257, 262144), (1, 100, 10**6), (2, 4, 8)):
        tile = loss._forward_tile((1, count, positions), itemsize, True, Device("sm_90", 132))
        assert tile.k * itemsize == 16
        assert tile.m * tile.n >= 32 * tile.warps
        tile = loss._forward_tile((1, count, positions), itemsize, False, Device("sm_90", 132))
        assert tile.n == 1
        assert tile.m * itemsize >= 32 * tile.warps * 16 or tile.m >= positions


def test_the_workspace_of_a_linear_cross_entropy_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many tokens and a large vocabulary; nothing is computed."""
    rows, classes = 32768, 262144
    sizes: list[int] = []

    def allocate(shape: Any, strides: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        found = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        sizes.append(found.numel() * found.itemsize)
        return found

    monkeypatch.setattr(_launch, "launch", lambda *args, **meta: None)
    monkeypatch.setattr(_launch, "allocate", allocate)
    x, w = torch.empty(rows, 8, dtype=torch.float16), torch.empty(classes, 8, dtype=torch.float16)
    target, out = torch.zeros(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float16)
    linear_cross_entropy.linear_cross_entropy(
        x, w, None, target, None, out, None, None, ignore_index=-100, reduction="none", precision="ieee"
    )
    assert max(sizes) <= 2**27
