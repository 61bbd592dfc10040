"""The sizes that say which pixels a pooling window holds. Every image counts as a volume (D, H, W): of fewer dimensions, the
first ones are of size 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Triple = tuple[int, int, int]

_UNROLLED = 8
"""The longest row of a window whose loop is unrolled, so that its loads are under way together."""


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

    def wide(self, image: Sequence[int], outputs: Sequence[int]) -> bool:
        """Whether the products of adaptive windows' bounds need 64 bits."""
        return self.adaptive and any([(i + 1) * (o + 1) >= 2**31 for i, o in zip(image, outputs, strict=True)])

    def constexprs(self) -> dict[str, int | bool]:
        """What a Triton kernel is compiled for."""
        names = [f"{what}_{dim}" for what in ("K", "S", "DILATION") for dim in "DHW"]
        sizes = dict(zip(names, (*self.kernel, *self.stride, *self.dilation), strict=True))
        return sizes | dict(ADAPTIVE=self.adaptive)


def unrolled(size: int) -> bool:
    """Whether the innermost loop, over so many pixels, is unrolled."""
    return size <= _UNROLLED


def _most(count: int, parts: int) -> int:
    """The most of `count` things that one of `parts` overlapping parts has, which begin and end at rounded fractions."""
    if parts == 0 or count % parts == 0:
        return max(count // max(parts, 1), 1)
    return 1 if parts % count == 0 else -(-count // parts) + 1
