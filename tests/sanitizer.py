"""Watches the memory accesses of every kernel that Triton's interpreter runs.

The interpreter reads and writes wherever it is told to, one program after another, so that neither an access beyond a
tensor nor a race between programs shows in its results. `install` makes them errors.

A kernel may touch the elements of the tensors in its arguments: of the views, neither the rest of their storage nor the
gaps between their strides. Two blind spots: a stray access that hits an element of another argument goes unnoticed, and
atomics are checked for their address only (a kernel whose programs wait for each other through them looks like a race).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

Builder: Any = interpreter.InterpreterBuilder
Executor: Any = interpreter.GridExecutor


class KernelMemoryError(AssertionError):
    """A program of a kernel touched memory that it must not touch."""


@functools.cache
def install() -> None:
    """Watch every kernel that the interpreter runs, for the rest of this process."""
    Executor._init_args_hst = _watching(Executor._init_args_hst)
    Executor.__call__ = _unwrapping(Executor.__call__)
    for name, pointers, mask, check in (
        ("create_masked_load", 0, 1, _Launch.load),
        ("create_masked_store", 0, 2, _Launch.store),
        ("create_atomic_rmw", 1, 3, _Launch.atomic),
        ("create_atomic_cas", 0, None, _Launch.atomic),
    ):
        setattr(Builder, name, _checking(getattr(Builder, name), pointers, mask, check))


NOBODY, SEVERAL = 0, -1


class _Launch:
    """The elements that one launch may touch, and which of its programs read and wrote them.

    An element is known by its address. The addresses are sorted, and its place among them finds what else is known of
    it: so the gaps of a view cost nothing, however wide. Programs count from 1.
    """

    def __init__(self, kernel: str, arguments: list[tuple[str, torch.Tensor]]) -> None:
        self.kernel = kernel
        # Where arguments overlap, np.unique keeps the first: the widest.
        arguments = sorted(arguments, key=lambda argument: -argument[1].element_size())
        addresses = [_addresses(tensor) for _, tensor in arguments]
        widths = [tensor.element_size() for _, tensor in arguments]
        self.bounds = [
            (name, int(part[0]), int(part[-1]) + width)
            for (name, _), part, width in zip(arguments, addresses, widths, strict=True)
        ]
        # An element of no width at address 0, so that every address lies at or after one.
        order = sorted(range(len(addresses)), key=lambda i: addresses[i][0])
        self.addresses = np.concatenate([np.zeros(1, np.int64), *[addresses[i] for i in order]])
        self.widths = np.repeat([0, *[widths[i] for i in order]], [1, *[len(addresses[i]) for i in order]])
        if not _ascending(self.addresses):  # arguments overlap, or a view overlaps itself
            self.addresses, first = np.unique(np.concatenate([np.zeros(1, np.int64), *addresses]), return_index=True)
            self.widths = np.repeat([0, *widths], [1, *map(len, addresses)])[first]
        self.reader = np.zeros(len(self.addresses), np.int32)
        self.writer = np.zeros(len(self.addresses), np.int32)

    def load(self, program: int, elements: np.ndarray) -> str | None:
        """What is wrong if this program reads these elements, or None."""
        if self._others(self.writer, program, elements):
            return "reads what another program wrote"
        readers = self.reader[elements]
        self.reader[elements] = np.where((readers == NOBODY) | (readers == program), program, SEVERAL)
        return None

    def store(self, program: int, elements: np.ndarray) -> str | None:
        """What is wrong if this program writes these elements, or None."""
        if not _ascending(elements) and len(np.unique(elements)) != len(elements):
            return "two lanes of one store write to one address"
        if self._others(self.writer, program, elements):
            return "overwrites what another program wrote"
        if self._others(self.reader, program, elements):
            return "overwrites what another program read"
        self.writer[elements] = program
        return None

    def atomic(self, program: int, elements: np.ndarray) -> None:
        """Nothing: whoever else touches an element, an atomic is meant for that."""

    @staticmethod
    def _others(who: np.ndarray, program: int, elements: np.ndarray) -> bool:
        return bool(((who[elements] != NOBODY) & (who[elements] != program)).any())

    def elements(self, addresses: np.ndarray, width: int) -> tuple[np.ndarray, str | None]:
        """The elements at these addresses, and what is wrong if there is none."""
        elements = np.searchsorted(self.addresses, addresses, side="right") - 1
        stray = (self.addresses[elements] != addresses) | (self.widths[elements] < width)
        if not stray.any():
            return elements, None
        address = int(addresses[stray][0])
        kind = "misaligned" if address % width else "out of bounds"
        return elements, f"{kind} in {stray.sum()} of {len(stray)} lanes, first {self._place(address)}"

    def _place(self, address: int) -> str:
        """The address in terms of the nearest argument."""
        if not self.bounds:
            return "without any tensor to touch"
        name, start, end = min(self.bounds, key=lambda bounds: max(bounds[1] - address, address - bounds[2] + 1, 0))
        if address < start:
            return f"{start - address} bytes before {name}"
        if address >= end:
            return f"{address - end} bytes past the end of {name}"
        return f"{address - start} bytes into {name}, not at an element of it"


def _ascending(numbers: np.ndarray) -> bool:
    """Whether each is larger than the one before it. Most blocks are, which saves sorting them."""
    return bool((numbers[1:] > numbers[:-1]).all())


def _addresses(tensor: torch.Tensor) -> np.ndarray:
    """The address of every element of a tensor that has some; in order, unless the view overlaps itself."""
    offsets = np.zeros(1, np.int64)
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True):
        if stride > 0:
            offsets = (offsets[:, None] + stride * np.arange(size)).ravel()
    return tensor.data_ptr() + tensor.element_size() * offsets


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, tuple):
        for part in argument:
            yield from _tensors(part)
    elif isinstance(argument, TensorDescriptor):
        yield from _tensors(argument.base)
    elif hasattr(argument, "data_ptr"):
        tensor = interpreter._unwrap_tensor(argument)
        if tensor.numel():
            yield tensor


def _watching(method: Callable) -> Callable:
    """`method`, which brings a launch's arguments to the host, and a new launch to watch with them."""

    @functools.wraps(method)
    def watch(self, args, kwargs):
        args, kwargs = method(self, args, kwargs)
        arguments = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        tensors = [(name, tensor) for name, argument in arguments for tensor in _tensors(argument)]
        Builder.launch = _Launch(self.fn.__name__, tensors)
        return args, kwargs

    return watch


def _unwrapping(method: Callable) -> Callable:
    """`method`, which launches, raising the fault itself instead of the interpreter's words about it."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except InterpreterError as error:
            fault = error
            while fault is not None and not isinstance(fault, KernelMemoryError):
                fault = fault.__cause__
            if fault is None:
                raise
        raise fault

    return call


def _checking(method: Callable, pointers: int, mask: int | None, check: Callable) -> Callable:
    """`method`, an access to memory with its pointers and its mask at these places, once it is found in order."""

    @functools.wraps(method)
    def access(self, *args, **kwargs):
        # Blocks behind a descriptor bring their mask as a plain array, whose data is a buffer.
        addresses = args[pointers].data
        inside = np.asarray(True if mask is None else args[mask].data, dtype=bool)
        addresses = addresses[np.broadcast_to(inside, addresses.shape)].astype(np.int64)
        if len(addresses):
            width = max(1, args[pointers].get_element_ty().primitive_bitwidth // 8)
            (x, y, z), (_, ny, nz) = self.grid_idx, self.grid_dim
            elements, fault = self.launch.elements(addresses, width)
            fault = fault or check(self.launch, (x * ny + y) * nz + z + 1, elements)
            if fault is not None:
                raise KernelMemoryError(f"{self.launch.kernel}, program {(x, y, z)}: {check.__name__}: {fault}")
        return method(self, *args, **kwargs)

    return access
