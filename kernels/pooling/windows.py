"""The sizes that say which pixels a pooling window holds. Every image counts as a volume (D, H, W): of fewer dimensions, the
first ones are of size 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Triple = tuple[int, int, int]

LARGE = 32
"""From so many pixels on a window is shared among threads, and no kernel is compiled for its size."""
_UNROLLED = 8
"""The longest row of a window whose loop is unrolled, so that its loads are under way together."""
_BEYOND = 2**30
"""A stride beyond any image, in the place of that of a single window, which it doesn't move."""


def triple(sizes: Sequence[int], fill: int) -> Triple:
    """The sizes of a volume."""
    return (*(fill,) * (3 - len(sizes)), *sizes)  # type: ignore[return-value]


class Windows(NamedTuple):
    """Window o begins at o * stride - padding and holds every dilation-th of `kernel` pixels. If `adaptive`, it holds those
    from floor(o * I / O) to ceil((o + 1) * I / O), of I pixels for O windows, and `kernel` is the size of the largest."""

    kernel: Triple
    stride: Triple = (1, 1, 1)
    padding: Triple = (0, 0, 0)
    dilation: Triple = (1, 1, 1)
    adaptive: bool = False

    @staticmethod
    def dividing(image: Sequence[int], outputs: Sequence[int]) -> Windows:
        """Those of adaptive pooling."""
        image, outputs = triple(image, 1), triple(outputs, 1)
        if all([o > 0 and i % o == 0 for i, o in zip(image, outputs, strict=True)]):
            kernel = tuple([i // o for i, o in zip(image, outputs, strict=True)])
            return Windows(kernel, kernel)  # type: ignore[arg-type]
        kernel = tuple([_most(i, o) for i, o in zip(image, outputs, strict=True)])
        return Windows(kernel, adaptive=True)  # type: ignore[arg-type]

    @property
    def taps(self) -> int:
        """How many pixels a window holds at most."""
        return math.prod(self.kernel)

    def holders(self, image: Sequence[int], outputs: Sequence[int]) -> Triple:
        """Along each dimension, how many windows at most may hold one pixel, as the kernels count them."""
        if self.adaptive:
            return tuple([_most(o, i) for i, o in zip(image, outputs, strict=True)])  # type: ignore[return-value]
        each = zip(self.kernel, self.stride, self.dilation, strict=True)
        return tuple([-(-k // s) if d == 1 else k for k, s, d in each])  # type: ignore[return-value]

    def gathering(self, image: Sequence[int], outputs: Sequence[int]) -> dict[str, int | bool | Triple | None]:
        """What the kernel of a gradient is compiled for: neither the size of large windows, nor the stride along dimensions
        with a single window, so that pooling of whole images takes one kernel for images of any size."""
        windows = self
        if not self.adaptive:
            each = zip(self.stride, self.padding, image, outputs, strict=True)
            stride = [_BEYOND if o == 1 and n + p < _BEYOND else s for s, p, n, o in each]
            windows = self._replace(stride=tuple(stride))  # type: ignore[arg-type]
        names = [f"{what}_{dim}" for what in ("S", "DILATION", "HOLDERS") for dim in "DHW"]
        sizes = (*windows.stride, *windows.dilation, *windows.holders(image, outputs))
        return dict(zip(names, sizes, strict=True)) | dict(
            KERNEL=self.kernel if self.taps < LARGE else None, ADAPTIVE=self.adaptive, UNROLLED=unrolled(sizes[-1])
        )  # fmt: skip

    def wide(self, image: Sequence[int], outputs: Sequence[int]) -> bool:
        """Whether the products of adaptive windows' bounds need 64 bits."""
        return self.adaptive and any([(i + 1) * (o + 1) >= 2**31 for i, o in zip(image, outputs, strict=True)])

    def constexprs(self) -> dict[str, int | bool]:
        """What a Triton kernel is compiled for."""
        names = [f"{what}_{dim}" for what in ("K", "S", "DILATION") for dim in "DHW"]
        sizes = dict(zip(names, (*self.kernel, *self.stride, *self.dilation), strict=True))
        return sizes | dict(ADAPTIVE=self.adaptive)


def number_of_windows(
    image: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
) -> tuple[int, ...]:
    """How many windows there are along each dimension: in ceil_mode also a last one that isn't whole, if it begins within the
    image or the padding before it."""
    found = []
    for n, k, s, p, d in zip(image, kernel, stride, padding, dilation, strict=True):
        o = (n + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil_mode else 0)) // s + 1
        found.append(o - 1 if ceil_mode and (o - 1) * s >= n + p else o)
    return tuple(found)


def unrolled(size: int) -> bool:
    """Whether the innermost loop, over so many pixels, is unrolled."""
    return size <= _UNROLLED


def _most(count: int, parts: int) -> int:
    """The most of `count` things that one of `parts` overlapping parts has, which begin and end at rounded fractions."""
    if parts == 0 or count % parts == 0:
        return max(count // max(parts, 1), 1)
    return 1 if parts % count == 0 else -(-count // parts) + 1
