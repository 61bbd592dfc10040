"""The one place where outputs are allocated and kernels are launched.

Every kernel has a one-dimensional grid: axis 0 reaches 2**31 - 1 programs, the other axes only 65,535.
"""

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
import triton

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""True if the kernels were decorated under TRITON_INTERPRET=1 and so run on CPU tensors, program by program."""

bfloat16_is_exact: bool = not INTERPRETED
"""The interpreter truncates bfloat16 and computes with its bits as integers; the test suite mends it and says so here."""

trace: list[str] | None = None
"""While `fastlayers.explain` listens: one line for every launch."""

# The interpreter keeps the running program's index and the patched language in globals.
_interpreter = threading.Lock()


def empty(
    shape: Sequence[int], *, dtype: torch.dtype, device: torch.device, strides: Sequence[int] | None = None
) -> torch.Tensor:
    """An uninitialised output or workspace. Tests fill it with NaN: whoever allocates must write every element."""
    if strides is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def empty_like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised tensor with torch's own rule for the strides of a pointwise result."""
    # What is contiguous whatever the strides of its dimensions of size 1 gets ordinary ones.
    strides = torch.contiguous_format if tensor.is_contiguous() else torch.preserve_format
    return torch.empty_like(tensor, dtype=dtype, memory_format=strides)


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
    device = args[0].device
    if INTERPRETED:
        guard = _interpreter
    elif device.index != torch.cuda.current_device():
        guard = torch.cuda.device(device)
    else:
        guard = contextlib.nullcontext()
    with guard:
        kernel[(programs,)](*args, **meta)


def _describe(kernel: Any, programs: int, meta: dict[str, Any]) -> str:
    name = getattr(kernel, "__name__", None) or kernel.fn.__name__
    tile = "x".join(str(size) for key, size in meta.items() if key.startswith("TILE_"))
    return f"{name.strip('_')}[{tile}] on {programs} program{'s' * (programs != 1)}"
