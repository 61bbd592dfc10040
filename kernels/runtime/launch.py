"""The one place where tensors are allocated and kernels are launched.

Every kernel has a one-dimensional grid, because axis 0 may have 2**31 - 1 programs, the other axes only 65,535.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import triton
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources

from ... import _torch

__all__ = ["OutOfResources", "collapse", "empty", "empty_like", "launch", "numbers", "vectors", "wide"]

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether the kernels were decorated under TRITON_INTERPRET=1, so that they run on CPU tensors, one program after another."""

bfloat16_is_exact: bool = not INTERPRETED
"""False in Triton's interpreter, which truncates bfloat16 and computes with its bits as integers. The test suite corrects that
and sets this to True."""

trace: list[str] | None = None
"""A list to which every launch appends a line while `fastlayers.explain` runs."""

counters: tuple[Counter[str], ...] = ()
"""Each counts the launches of every kernel by its name, replayed ones as well, while `fastlayers.patched` is on."""

# The interpreter keeps the running program's index and the patched language in globals, so only one thread may use it.
_interpreter = threading.Lock()
os.register_at_fork(after_in_child=_interpreter._at_fork_reinit)  # its owner may not exist in the child

if INTERPRETED:
    from . import interpreted


def _silent() -> Any:
    """Without NumPy's warnings in this thread, which are errors to some programs: a GPU computes infinities and NaN without
    a word, for elements that are masked out as for others."""
    return interpreted.np.errstate(all="ignore")


allocate: Callable[..., torch.Tensor] = torch.empty_strided
"""The only allocator: (sizes, strides, dtype=, device=) -> an uninitialised tensor. Tests replace it by one that fills tensors
with NaN, and empty `allocate_quickly`."""

allocate_quickly: dict[str, Callable[..., torch.Tensor]] = _torch.empty_strided
"""By device type, an allocator on the current device: (sizes, strides, dtype) -> an uninitialised tensor. Inductor's generated
code calls these functions, which save 0.9 us of argument parsing."""


class Listener(Protocol):
    """Sees what launchers allocate and launch: a `Recorder` (record.py)."""

    paused: bool
    """True while Triton launches, because torch functions that Triton calls are not the launcher's."""

    def allocate(
        self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor: ...

    def numbers(self, tensor: torch.Tensor) -> list[int]: ...

    def launched(
        self, kernel: Any, programs: int, args: tuple[Any, ...], meta: dict[str, Any], compiled: Any
    ) -> None: ...


class _ThreadState(threading.local):
    listener: Listener | None = None


thread = _ThreadState()
"""Per-thread recorder."""


def empty(
    shape: Sequence[int], *, dtype: torch.dtype, device: torch.device, strides: Sequence[int] | None = None
) -> torch.Tensor:
    """An uninitialised output or workspace, contiguous by default. The caller has to write every element."""
    if strides is None:
        strides, step = [], 1
        for size in reversed(shape):
            strides.insert(0, step)
            step *= max(size, 1)
    listener = thread.listener
    if listener is not None:
        return listener.allocate(shape, strides, dtype, device)
    return allocate(shape, strides, dtype=dtype, device=device)


def empty_like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised tensor with the strides that torch gives to the result of a pointwise function of `tensor`."""
    dtype = dtype or tensor.dtype
    if tensor.is_contiguous():
        return empty(tensor.shape, dtype=dtype, device=tensor.device)
    # torch chooses the strides of dimensions of size 1 itself in channels_last, and keeps the tensor's otherwise.
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    format = torch.channels_last if last else torch.preserve_format
    strides = torch.empty_like(tensor, device="meta", memory_format=format).stride()
    return empty(tensor.shape, dtype=dtype, device=tensor.device, strides=strides)


def numbers(tensor: torch.Tensor) -> list[int]:
    """The integers of a small tensor in host memory, to be passed to kernels. They may differ from call to call: a replay reads
    them anew. Nothing else may depend on them."""
    listener = thread.listener
    return tensor.tolist() if listener is None else listener.numbers(tensor)


def wide(*tensors: torch.Tensor | None, elements: int = 0) -> bool:
    """Whether offsets need 64 bits, because an element lies 2**31 or more elements after the first one of its tensor; or because
    programs count that many `elements`: the last step goes beyond them by fewer than 2**24, and a number that wrapped would seem
    to be one of them."""
    return elements >= 2**31 - 2**24 or any(
        tensor is not None and sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) >= 2**31
        for tensor in tensors
    )


def collapse(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The sizes of several tensors of one shape, and the strides of each, with as few dimensions as possible: neighbouring
    dimensions are merged where all tensors can be viewed so."""
    order = sorted([d for d, n in enumerate(shape) if n != 1], key=lambda d: -max(s[d] for s in strides))
    sizes: list[int] = []
    collapsed: list[list[int]] = [[] for _ in strides]
    for d in order:
        if sizes and all(found[-1] == s[d] * shape[d] for found, s in zip(collapsed, strides, strict=True)):
            sizes[-1] *= shape[d]
            for found, s in zip(collapsed, strides, strict=True):
                found[-1] = s[d]
        else:
            sizes.append(shape[d])
            for found, s in zip(collapsed, strides, strict=True):
                found.append(s[d])
    return sizes, collapsed


def vectors(matrix: torch.Tensor) -> bool:
    """Whether a matrix, or a batch of images with contiguous channels, is loaded 128 bits at a time.

    Triton compiles such loads if the pointer, the strides and the size of the contiguous dimension, where its mask ends, are
    divisible by 16. It specialises kernels for no other divisor, so a stride of 24 elements is loaded one element at a time.
    """
    if 1 not in matrix.stride() or matrix.data_ptr() % 16:
        return False
    sizes_and_strides = zip(matrix.shape, matrix.stride(), strict=True)
    return all((n if s == 1 else s) % 16 == 0 for n, s in sizes_and_strides if n > 1)


def launch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    """Run `programs` programs of `kernel` on the device of its first argument and on that device's current stream.

    Triton launches on the *current* device, whatever its arguments are, so the device is switched where they differ. Without
    programs nothing is launched, because the driver rejects an empty grid.
    """
    if programs == 0:
        return
    if trace is not None:
        trace.append(describe(kernel, programs, meta))
    for counter in counters:
        counter[name_of(kernel)] += 1
    grid, index, listener = (programs,), args[0].get_device(), thread.listener
    given = args
    if listener is not None:
        listener.paused = True
        args = tuple([int(a) if isinstance(a, int) and type(a) is not bool else a for a in args])
    if INTERPRETED:
        with _interpreter, _silent():
            compiled = kernel[grid](*args, **meta)
    elif index == driver.active.get_current_device():
        compiled = kernel[grid](*args, **meta)
    else:
        with torch.cuda.device(index):
            compiled = kernel[grid](*args, **meta)
    if listener is not None:
        listener.paused = False
        listener.launched(kernel, programs, given, meta, compiled)


def name_of(kernel: Any) -> str:
    """A kernel's name, for people."""
    return (getattr(kernel, "__name__", None) or kernel.fn.__name__).strip("_")


def describe(kernel: Any, programs: int, meta: dict[str, Any]) -> str:
    """The line that `explain` shows for a launch."""
    tile = "x".join(str(size) for key, size in meta.items() if key.startswith("TILE_"))
    ways = [way.lower() for way in ("PERSISTENT", "SHARED", "TRANSPOSED") if meta.get(way)]
    return f"{name_of(kernel)}[{', '.join([tile, *ways])}] on {programs} program{'s' * (programs != 1)}"
