"""A GPU that compiles and launches nothing, and writes down what it is asked to launch. For tests in a process that does not
interpret (launched.py). Looks inside: at launches, replays and Triton's caches.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import host
from fastlayers.kernels.runtime import launch as _launch
from fastlayers.kernels.runtime import record as _record


class Gpu(host.StubDriver):
    """Writes down every call of the launcher in C, and calls the hooks that it would."""

    def __init__(self) -> None:
        super().__init__()
        self.device, self.stream, self.launches = -1, 0, []
        self.utils.launch = self.launch  # type: ignore[method-assign]
        handles = itertools.count(1)
        self.utils.load_binary = lambda *a: (next(handles), next(handles), 32, 0, 1024)  # type: ignore[method-assign]
        if self.launcher_cls is host._NoLauncher:
            self.launcher_cls = lambda src, metadata: self.launch

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: Any = None) -> int:
        return self.stream

    def launch(self, *args: Any) -> None:
        *fixed, last = args
        flat = [*fixed, *last] if isinstance(last, (tuple, list)) else [*args]
        hooks = [a for a in flat if isinstance(a, triton.knobs.HookChain)]
        for hook in hooks:
            hook(None)
        # No hook, and None for one, are the same to it.
        nothing = (triton.knobs.HookChain, triton.compiler.LazyDict)
        flat = [None if isinstance(a, nothing) else a for a in flat]
        self.launches.append([*map(_address, flat)])


def _address(argument: Any) -> Any:
    if isinstance(argument, TensorDescriptor):
        return _address(argument.base), argument.shape, argument.strides, argument.block_shape, argument.padding
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


def compile(src: Any, target: Any, options: Any, **_: Any) -> CompiledKernel:
    """A kernel that is never run, one for each specialisation that Triton asks for."""
    kernel = object.__new__(CompiledKernel)
    names = ("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align", "shared")
    kernel.metadata = SimpleNamespace(  # type: ignore[assignment]
        **dict.fromkeys(names, 0),
        launch_cooperative_grid=False,
        launch_pdl=False,
        num_warps=4,
        tmem_size=None,
        tensordesc_meta=[
            dict(swizzle=3, elem_size=2, elem_type=6, block_size=kind, fp4_padded=False)
            for kind in src.signature.values()
            if kind.startswith("tensordesc")
        ]
        if host._LAUNCHES_FROM_PYTHON
        else None,
    )
    kernel.src, kernel.name, kernel.kernel, kernel.hash = src, src.fn.__name__, b"", ""  # type: ignore[assignment]
    kernel.packed_metadata = (4, 1, 0)
    kernel.metadata_group = {}
    kernel.module = kernel.function = kernel._run = None
    return kernel


@contextlib.contextmanager
def ordinarily() -> Iterator[None]:
    """Every launch by Triton's own kernel[grid](...)."""
    _launch.trace = []
    try:
        yield
    finally:
        _launch.trace = None


@contextlib.contextmanager
def allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """What is allocated within; kept, so that no address comes twice."""
    made: list[torch.Tensor] = []

    def allocate(size: Any, stride: Any, *, dtype: Any, device: Any) -> torch.Tensor:
        made.append(torch.empty_strided(size, stride, dtype=dtype, device=device))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(_launch, "allocate", allocate)
        patch.setattr(_launch, "allocate_quickly", {})
        yield made


def seen(gpu: Gpu, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """The launches of a call, with what it allocated called by its turn; and what that was."""
    gpu.launches.clear()
    with allocations(monkeypatch) as made:
        call()
        names = {t.data_ptr(): f"allocation {i}" for i, t in enumerate(made)}
        begins = [(t.data_ptr(), t.untyped_storage().nbytes(), f"allocation {i}") for i, t in enumerate(made)]

    def named(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(map(named, argument))
        if not isinstance(argument, int):
            return argument
        if argument in names:
            return names[argument]
        # A view of an allocation that begins elsewhere.
        return next(
            (f"{name} + {argument - begin}" for begin, n, name in begins if begin < argument < begin + n), argument
        )

    launches = [[*map(named, launch)] for launch in gpu.launches]
    return launches, [(t.shape, t.stride(), t.dtype) for t in made]


def same(
    gpu: Gpu, run: Callable[[], Any], counted: list[None], repeat: int, monkeypatch: pytest.MonkeyPatch, passes: int = 2
) -> None:
    """A step of so many passes, replayed from the third time on, launches what it does without replays."""
    before = len(counted)
    got = seen(gpu, run, monkeypatch)
    assert repeat < 2 or len(counted) == before + passes
    with ordinarily():
        assert got == seen(gpu, run, monkeypatch)
    assert got[0]


def plays(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one at every replay."""
    counted: list[None] = []
    play = _record.Recording.play
    monkeypatch.setattr(_record.Recording, "play", lambda *a: (counted.append(None), play(*a))[1])
    return counted


def step(call: Callable[..., torch.Tensor], *leaves: torch.Tensor | None) -> Callable[[], None]:
    """Forward and backward, with a gradient that lies at the same address every time."""
    inputs = [t for t in leaves if t is not None]
    dy = torch.randn_like(call(*leaves))

    def run() -> None:
        torch.autograd.grad(call(*leaves), inputs, dy)

    return run


def odd(t: torch.Tensor) -> torch.Tensor:
    """The same at an address that 16 does not divide."""
    flat = torch.empty(t.numel() + 1, dtype=t.dtype)
    assert flat.data_ptr() % 16 == 0
    return flat[1:].view(t.shape).requires_grad_(t.requires_grad)
