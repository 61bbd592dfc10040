"""kernels/runtime/replay.py by itself: what is written down, what is not, and what is forgotten. Looks inside."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from activations import RELU
from triton.tools.tensor_descriptor import TensorDescriptor

import fastlayers.functional as F
from fastlayers.kernels import pointwise as kernels
from fastlayers.kernels.runtime import launch as _launch
from fastlayers.kernels.runtime import replay as _replay

Work = Callable[[Any], tuple[torch.Tensor, ...]]


def double(x: torch.Tensor) -> torch.Tensor:
    y = _launch.empty_like(x)
    kernels.pointwise(x, y, RELU)
    return y


@pytest.mark.parametrize(
    "work",
    [
        lambda ts: (double(ts[0].clone()),),
        lambda ts: (double(ts[0]).mul_(2),),
        lambda ts: (double(ts[0]) + 1,),
        lambda ts: (double(ts[0]) if ts[0].sum() > 0 else double(-ts[0]),),
        lambda ts: (double(ts[0]).fill_(ts[0].max().item()),),
        lambda ts: (double(ts[0])[:2],),
        lambda ts: (torch.empty_like(ts[0]).copy_(double(ts[0])),),
        lambda ts: (ts[0],),
    ],
    ids=["copies", "edits", "computes", "looks", "fills", "returns a view", "allocates", "idles"],
)
def test_what_else_than_launching_is_not_replayed(work: Work, plays: list[None], device: torch.device) -> None:
    """Found out while it is written down; from then on the ordinary way."""
    replayable = _replay.Replayable(work)
    for _ in range(5):
        x = torch.randn(4, 5, device=device)
        for a, b in zip(replayable((x,)), work((x,)), strict=True):
            assert torch.equal(a, b)
    assert not plays
    assert [kind.recording for kinds in replayable.signatures.values() for kind in kinds] == [False]


def test_views_that_begin_elsewhere_are_replayed(plays: list[None], device: torch.device) -> None:
    """Of what is given and of what is allocated, written into one after the other."""

    def work(tensors: Any) -> tuple[torch.Tensor, ...]:
        (x,) = tensors
        y = _launch.empty_like(x)
        kernels.pointwise(x[:4], y[:4], RELU)
        kernels.pointwise(x[4:], y[4:], RELU)
        kernels.pointwise(y[4:], z := _launch.empty_like(x[4:]), RELU)
        return y, z

    replayable = _replay.Replayable(work)
    for _ in range(4):
        x = torch.randn(3 * 8, 5, device=device)[8:16]  # which itself begins elsewhere than its memory
        y, z = replayable((x,))
        assert torch.equal(y, x.relu())
        assert torch.equal(z, x[4:].relu())
    assert len(plays) == 2


def test_a_view_that_begins_where_another_tensor_does_is_not_taken_for_it(device: torch.device) -> None:
    """The second half of x begins where y begins. In later calls y is somewhere else."""

    def work(tensors: Any) -> tuple[torch.Tensor, ...]:
        x, y = tensors
        out = _launch.empty_like(y)
        kernels.pointwise(x[4:], out, RELU)
        kernels.pointwise(y, other := _launch.empty_like(y), RELU)
        return out, other

    replayable = _replay.Replayable(work)
    for together in (True, True, True, False, False):
        x = torch.randn(8, 5, device=device)
        y = x[4:] if together else torch.randn(4, 5, device=device)
        out, other = replayable((x, y))
        assert torch.equal(out, x[4:].relu())
        assert torch.equal(other, y.relu())


def test_results_and_options_are_told_apart(plays: list[None], device: torch.device) -> None:
    """Inputs, allocations and None among the results; options that change what is done."""

    def work(tensors: Any, swapped: bool) -> tuple[torch.Tensor | None, ...]:
        x, y, none = tensors
        first, second = double(x), double(y)
        return (second, none, x, first) if swapped else (first, second, y, none)

    replayable = _replay.Replayable(work)
    for _ in range(4):
        x, y = torch.randn(4, 5, device=device), torch.randn(3, device=device)
        for swapped in (False, True):
            got = replayable((x, y, None), swapped)
            want = (y.relu(), None, x, x.relu()) if swapped else (x.relu(), y.relu(), y, None)
            assert len(got) == 4
            for a, b in zip(got, want, strict=True):
                assert a is b if b is None or b is x or b is y else torch.equal(a, b)  # type: ignore[arg-type]
    assert len(plays) == 4
    assert len(replayable.signatures) == 2


@triton.jit
def _copy_kernel(target_ptr, source, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(target_ptr + (i[:, None] * N + i[None, :]), source.load([0, 0]))


def test_descriptors(plays: list[None], device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a tensor memory accelerator")

    def work(tensors: Any) -> tuple[torch.Tensor, ...]:
        y = _launch.empty_like(tensors[0])
        _launch.launch(_copy_kernel, 1, y, TensorDescriptor.from_tensor(tensors[0], [16, 16]), N=16)
        return (y,)

    replayable = _replay.Replayable(work)
    for _ in range(4):
        x = torch.randn(16, 16, device=device)
        assert torch.equal(replayable((x,))[0], x)
    assert len(plays) == 2


def test_forgets_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(_replay, "LIMIT", 5)
    replayable = _replay.Replayable(lambda ts: (double(ts[0]),))
    for n in range(1, 20):
        x = torch.randn(n, device=device)
        for _ in range(3):
            assert torch.equal(replayable((x,))[0], x.relu())
        assert len(replayable.signatures) <= 5


def test_more_kinds_than_are_remembered_take_turns(
    device: torch.device, plays: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few too many must not drive out each other; and what was driven out is not counted."""
    monkeypatch.setattr(_replay, "PER_BUCKET", 16)  # `plays` makes it a thousand
    replayable = _replay.Replayable(lambda ts: (double(ts[1]),))
    first = torch.randn(3, device=device)
    others = [torch.randn(n, device=device) for n in range(1, _replay.PER_BUCKET + 4)]
    for _ in range(10):
        plays.clear()
        for other in others:
            assert torch.equal(replayable((first, other))[0], other.relu())
    assert len(plays) > _replay.PER_BUCKET / 2
    assert replayable.count == sum(map(len, replayable.signatures.values())) == _replay.PER_BUCKET


def test_an_empty_tensor_is_not_taken_for_none(device: torch.device) -> None:
    """A bias of no elements, in torch's default dtype and on the CPU, is an error, whatever was called without a bias before."""
    x, weight = torch.randn(4, 5, device=device), torch.randn(3, 5, device=device)
    for _ in range(3):
        F.linear(x, weight)
    with pytest.raises(RuntimeError):
        F.linear(x, weight, torch.empty(0))


def test_forgotten_scripts_are_gone(device: torch.device) -> None:
    replayable = _replay.Replayable(lambda ts: (double(ts[0]),))
    x = torch.randn(3, device=device)
    for _ in range(3):
        replayable((x,))
    (((kind,),)) = replayable.signatures.values()
    script = weakref.ref(kind.recording.script)  # type: ignore[union-attr]
    gc.disable()
    try:
        del kind
        replayable.signatures.clear()
        assert script() is None
    finally:
        gc.enable()


def test_recording_is_the_threads_own_affair(device: torch.device) -> None:
    """torch keeps in globals whether a mode is on: threads that record at the same time would leave them set."""
    modes: list[bool] = []

    def work(tensors: Any) -> tuple[torch.Tensor, ...]:
        modes.append(torch.utils._python_dispatch.is_in_torch_dispatch_mode())
        return (double(tensors[0]),)

    replayable = _replay.Replayable(work)
    x = torch.randn(4, device=device)
    for _ in range(3):
        replayable((x,))
    assert modes == [False, False], "played the third time"
    assert torch._C._len_torch_dispatch_stack() == 0


def test_an_error_leaves_no_recording_behind(device: torch.device) -> None:
    x, calls = torch.randn(4, device=device), []

    def work(tensors: Any) -> tuple[torch.Tensor, ...]:
        calls.append(None)
        if len(calls) == 2:
            raise ZeroDivisionError
        return (double(tensors[0]),)

    replayable = _replay.Replayable(work)
    replayable((x,))
    with pytest.raises(ZeroDivisionError):
        replayable((x,))
    assert _launch.thread.listener is None
    assert torch._C._len_torch_dispatch_stack() == 0
    for _ in range(3):
        assert torch.equal(replayable((x,))[0], x.relu())
