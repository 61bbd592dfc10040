"""What a row of the catalog consists of."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..fusion.plan import Role
from ..operation import Operation


class Floats(NamedTuple):
    """An input of random numbers, in the dtype that is asked for, whose gradient is asked for."""

    shape: tuple[int, ...]
    channels_last: bool = False
    """Whether it is a batch of images in that memory format."""

    def make(self, dtype: torch.dtype, device: Any) -> torch.Tensor:
        drawn = torch.randn(self.shape, device=device).to(dtype)
        return drawn.to(memory_format=torch.channels_last) if self.channels_last else drawn


class Between(Floats):
    """As Floats, of numbers between 0.1 and 0.9."""

    def make(self, dtype: torch.dtype, device: Any) -> torch.Tensor:
        return (0.1 + 0.8 * torch.rand(self.shape, device=device)).to(dtype)


class Classes(NamedTuple):
    """An input of class indices from 0 to `count` - 1, as int64."""

    shape: tuple[int, ...]
    count: int

    def make(self, dtype: torch.dtype, device: Any) -> torch.Tensor:
        return torch.randint(self.count, self.shape, device=device)


class Offsets(NamedTuple):
    """Where bags of indices begin, as int64."""

    begins: tuple[int, ...]

    def make(self, dtype: torch.dtype, device: Any) -> torch.Tensor:
        return torch.tensor(self.begins, device=device)


class Probabilities(NamedTuple):
    """An input of probabilities that add up to 1 along dimension 1, in the dtype that is asked for."""

    shape: tuple[int, ...]

    def make(self, dtype: torch.dtype, device: Any) -> torch.Tensor:
        return torch.randn(self.shape, device=device).softmax(1).to(dtype)


Input = Floats | Classes | Offsets | Probabilities
Make = Callable[[Any], Callable[..., Any]]
"""Of torch.nn or fastlayers.nn, a module or a function."""


class Case(NamedTuple):
    """One way to build and call a layer: `make(nn)` is called with the inputs."""

    make: Make
    inputs: tuple[Any, ...]
    """Each an Input, or an argument as it is."""
    scale: float = 0.0
    """The row's."""
    random: bool = False
    """The row's."""

    def arguments(self, dtype: torch.dtype, device: Any = "cpu") -> list[Any]:
        """The inputs, drawn afresh."""
        return [i.make(dtype, device) if isinstance(i, Input) else i for i in self.inputs]


def case(make: Make, *inputs: Any) -> Case:
    """A tuple among the inputs is the shape of a `Floats`."""
    return Case(make, tuple([Floats(i) if type(i) is tuple else i for i in inputs]))


class Function(torch.nn.Module):
    """A function of torch.nn.functional as a module without state, for rows of functions that no class of torch.nn stands for."""

    def __init__(self, function: Callable[..., Any], **options: Any):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *args: Any) -> Any:
        return self.function(*args, **self.options)


class Row(NamedTuple):
    """One layer. From its row follow `accelerate`, the self-check, the README's table, the contract and conformance tests,
    the benchmark's families and the audit."""

    name: str
    """The class's in torch.nn, or the name of a function that none stands for."""
    supports: str
    """What the kernels take, in the README's words."""
    falls_back: str
    """What torch's own function takes."""
    cases: dict[str, Case]
    """Small and odd, for tests: sizes just above one or two of the tiles that the tests force."""
    speeds: dict[str, Case]
    """What is measured and audited, the most telling ones first. Without any, another row stands for this one: its kernels are
    compiled, but not measured."""
    operation: Operation | None = None
    """None for a container, and for a layer that is composed of other rows' operations."""
    function: str | None = None
    """The name in torch.nn.functional; in torch, where a layer calls a function that isn't there."""
    functions: tuple[str, ...] = ()
    """Further functions there that are ours with this row."""
    role: Role | None = None
    """What such a layer stands for where layers are joined; None: it never is."""
    scale: float = 0.0
    """Size of the numbers that results and gradients are differences of, for the error budget: a small loss is one of two
    large numbers, and as exact as their rounding lets it be."""
    random: bool = False
    """Whether the layer draws random numbers, so that two calls agree only under one seed, and with torch's only on a GPU."""
    lazy: bool = False
    """Whether torch.nn has a class that learns its sizes from its first input, too: "Lazy" and the name."""


Cases = dict[str, Case]


def round_robin(*groups: Cases) -> Cases:
    """One of each group, then a second one of each, and so on."""
    turns = itertools.zip_longest(*(group.items() for group in groups))
    return dict(item for turn in turns for item in turn if item is not None)


COLUMNS = (4096, 256, 1024, 16384, 65536, 64, 50257, 262144, 1000)


def rows_of(make: Make) -> Cases:
    """Row lengths for what memory decides, 2^27 elements at a time: 256 MB in 16 bits, several times any L2 cache. And once
    what stays in it."""
    sizes = {f"{2**27 // d} x {d}": (2**27 // d, d) for d in COLUMNS} | {"1024 x 4096": (1024, 4096)}
    return {name: case(make, shape) for name, shape in sizes.items()}
