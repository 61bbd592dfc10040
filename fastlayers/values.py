"""What operations are described in: descriptions of tensors, tensors by name, and options written as an operator's arguments."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch.compiler import is_dynamo_compiling

from ._kernels import launch

Tensors = Sequence[Any]
"""Tensors or None."""
Needs = tuple[bool, ...]
"""Of each tensor argument, whether its gradient is asked for."""

VALUES: dict[str, Callable[..., Any]] = {"tuple": lambda *items: items}
"""The classes that options may contain, by name."""


_Class = TypeVar("_Class", bound=type)


def value(cls: _Class) -> _Class:
    """Decorates a NamedTuple that options may contain."""
    VALUES[cls.__name__] = cls
    return cls


class Numbers:
    """The numbers of a call, in the order in which they were met. An operator takes them apart from the text, since under
    torch.compile with dynamic sizes they may be symbols, which can't be written down."""

    def __init__(self, ints: Sequence[int] = (), floats: Sequence[float] = ()):
        self.ints: list[Any] = list(ints)
        self.floats: list[Any] = list(floats)


def encode(item: Any, numbers: Numbers) -> str:
    """The source of a Python literal that describes `item`: None, a bool, a string, a number, a dtype, a `value`, or a tuple of
    such. Numbers are added to `numbers` and stand in the text by their place."""
    if item is None or isinstance(item, (bool, str)):
        return repr(item)
    if isinstance(item, (int, torch.SymInt)):
        numbers.ints.append(item)
        return f"('int', {len(numbers.ints) - 1})"
    if isinstance(item, (float, torch.SymFloat)):
        numbers.floats.append(item)
        return f"('float', {len(numbers.floats) - 1})"
    if isinstance(item, torch.dtype):
        return f"('dtype', '{str(item).removeprefix('torch.')}')"
    name = type(item).__name__ if hasattr(item, "_fields") else "tuple"
    return f"('{name}', " + "".join([encode(i, numbers) + ", " for i in item]) + ")"


_parsed = functools.lru_cache(maxsize=4096)(ast.literal_eval)


def decode(text: str, numbers: Numbers) -> Any:
    """What `encode` described."""

    def fill(node: Any) -> Any:
        if not isinstance(node, tuple):
            return node
        name, *rest = node
        if name == "int":
            return numbers.ints[rest[0]]
        if name == "float":
            return numbers.floats[rest[0]]
        return getattr(torch, rest[0]) if name == "dtype" else VALUES[name](*map(fill, rest))

    return fill(_parsed(text))


@value
class Out(NamedTuple):
    """The description of a tensor that `outputs` or `gradients` want allocated, whether eagerly, in a replay, or as a fake
    tensor. Also of an argument, for a backward that no longer has it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] | None = None
    """None: contiguous."""
    differentiable: bool = True
    """False for indices, statistics, random numbers: no gradient passes through it."""

    @staticmethod
    def pointwise(t: Any, dtype: torch.dtype | None = None) -> Out:
        """The result of a function that is applied to each element of a tensor (or of what is described), with the strides
        that torch gives it."""
        strides = _strides_asked if is_dynamo_compiling() else _pointwise_strides  # Dynamo warns of caches
        return Out(tuple(t.shape), dtype or t.dtype, strides(tuple(t.shape), tuple(t.stride())))

    @staticmethod
    def like(tensor: Any) -> Out | None:
        """The description of a tensor; None of None."""
        return None if tensor is None else Out(tuple(tensor.shape), tensor.dtype, tuple(tensor.stride()))

    def stride(self) -> tuple[int, ...]:
        """As a tensor's, of a description made by `like`."""
        assert self.strides is not None
        return self.strides

    def empty(self, device: torch.device) -> torch.Tensor:
        """The tensor, uninitialised."""
        return launch.empty(self.shape, dtype=self.dtype, device=device, strides=self.strides)


def is_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """torch's rule (c10::is_channels_last_strides_2d and _3d): do the strides of a batch of images (N, C, H, W) or volumes
    (N, C, D, H, W) alone say that the channels come last? Ambiguous ones say that they don't."""
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, *range(len(shape) - 1, 1, -1), 0):
        if shape[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * max(shape[d], 1)
    return True


def image_strides(shape: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """The strides of a batch of images (N, C, ...) in either memory format, as torch gives them to a new tensor."""
    order = (1, *range(len(shape) - 1, 1, -1), 0) if channels_last else range(len(shape) - 1, -1, -1)
    strides, step = [0] * len(shape), 1
    for d in order:
        strides[d] = step
        step *= max(shape[d], 1)
    return tuple(strides)


def _strides_asked(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """None where the tensor is contiguous. Elsewhere torch is asked; where it recognises channels_last, strides of dimensions of
    size 1 are that format's, not the tensor's."""
    tensor = torch.empty_strided(shape, strides, device="meta")
    if tensor.is_contiguous():
        return None
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    format = torch.channels_last if last else torch.preserve_format
    return torch.empty_like(tensor, memory_format=format).stride()


_pointwise_strides = functools.lru_cache(maxsize=4096)(_strides_asked)


class Named(dict):
    """Tensors by name, as items or as attributes; None for a name that isn't there."""

    def __missing__(self, name: str) -> None:
        return None

    __getattr__: Callable[[str], Any] = dict.get  # type: ignore[assignment]
