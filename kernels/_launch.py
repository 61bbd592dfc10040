"""The one place where outputs are allocated and kernels are launched.

Every kernel has a one-dimensional grid: axis 0 reaches 2**31 - 1 programs, the other axes only 65,535.
"""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import triton
from triton.runtime.driver import driver

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""True if the kernels were decorated under TRITON_INTERPRET=1 and so run on CPU tensors, program by program."""

bfloat16_is_exact: bool = not INTERPRETED
"""The interpreter truncates bfloat16 and computes with its bits as integers; the test suite mends it and says so here."""

trace: list[str] | None = None
"""While `fastlayers.explain` listens: one line for every launch."""

# The interpreter keeps the running program's index and the patched language in globals.
_interpreter = threading.Lock()
os.register_at_fork(after_in_child=_interpreter._at_fork_reinit)  # whoever held it isn't there

allocate: Callable[..., torch.Tensor] = torch.empty_strided
"""The only allocator: (sizes, strides, dtype=, device=) -> an uninitialised tensor. Tests put one here that fills with NaN,
and empty the other table."""

allocate_quickly: dict[str, Callable[..., torch.Tensor]] = {
    device: function
    for device in ("cpu", "cuda")
    if (function := getattr(torch._C._dynamo.guards, f"_empty_strided_{device}", None)) is not None
}
"""The same by kind of device, (sizes, strides, dtype) -> a tensor on the current one: what Inductor's code calls, 0.9 us
less of torch's own argument parsing."""


class Listener(Protocol):
    """Whoever writes down what a launcher does (see _replay.py)."""

    quiet: bool
    """Whether Triton is at work, whose own use of torch is none of the launcher's."""

    def allocate(
        self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor: ...

    def launched(
        self, kernel: Any, programs: int, args: tuple[Any, ...], meta: dict[str, Any], compiled: Any
    ) -> None: ...


class _Here(threading.local):
    listener: Listener | None = None


here = _Here()
"""What is going on in this thread."""


def empty(
    shape: Sequence[int], *, dtype: torch.dtype, device: torch.device, strides: Sequence[int] | None = None
) -> torch.Tensor:
    """An uninitialised output or workspace, contiguous unless told otherwise. Whoever allocates must write every element."""
    if strides is None:
        strides, step = [], 1
        for size in reversed(shape):
            strides.insert(0, step)
            step *= max(size, 1)
    listener = here.listener
    if listener is not None:
        return listener.allocate(shape, strides, dtype, device)
    return allocate(shape, strides, dtype=dtype, device=device)


def empty_like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised tensor with torch's own rule for the strides of a pointwise result."""
    dtype = dtype or tensor.dtype
    if tensor.is_contiguous():
        return empty(tensor.shape, dtype=dtype, device=tensor.device)
    # Strides of dimensions of size 1 are torch's own where it recognises a format, and the tensor's elsewhere.
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    format = torch.channels_last if last else torch.preserve_format
    strides = torch.empty_like(tensor, device="meta", memory_format=format).stride()
    return empty(tensor.shape, dtype=dtype, device=tensor.device, strides=strides)


def wide(*tensors: torch.Tensor | None) -> bool:
    """Whether some element lies 2**31 or more elements after its tensor's first: offsets then need 64 bits."""
    return any(
        tensor is not None and sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) >= 2**31
        for tensor in tensors
    )


def vectors(matrix: torch.Tensor) -> bool:
    """Whether a matrix, or a batch of images with contiguous channels, is loaded 128 bits at a time.

    Triton compiles for that if it knows the pointer, the strides, and the length that the mask of the contiguous dimension
    ends at, to be divisible by 16; of a stride of 24, say, it knows nothing.
    """
    if 1 not in matrix.stride() or matrix.data_ptr() % 16:
        return False
    sizes_and_strides = zip(matrix.shape, matrix.stride(), strict=True)
    return all((n if s == 1 else s) % 16 == 0 for n, s in sizes_and_strides if n > 1)


def launch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    """Run `programs` programs of `kernel` on the device of its first argument and on that device's current stream.

    Triton launches on the *current* device, whatever its arguments, hence the guard. No program, no launch: the driver
    rejects an empty grid.
    """
    if programs == 0:
        return
    if trace is not None:
        trace.append(_describe(kernel, programs, meta))
    grid, index, listener = (programs,), args[0].get_device(), here.listener
    if listener is not None:
        listener.quiet = True
    if INTERPRETED:
        with _interpreter:
            compiled = kernel[grid](*args, **meta)
    elif index == driver.active.get_current_device():
        compiled = kernel[grid](*args, **meta)
    else:
        with torch.cuda.device(index):
            compiled = kernel[grid](*args, **meta)
    if listener is not None:
        listener.quiet = False
        listener.launched(kernel, programs, args, meta, compiled)


def _describe(kernel: Any, programs: int, meta: dict[str, Any]) -> str:
    name = getattr(kernel, "__name__", None) or kernel.fn.__name__
    tile = "x".join(str(size) for key, size in meta.items() if key.startswith("TILE_"))
    ways = [way.lower() for way in ("PERSISTENT", "SHARED", "TRANSPOSED") if meta.get(way)]
    return f"{name.strip('_')}[{', '.join([tile, *ways])}] on {programs} program{'s' * (programs != 1)}"
