"""The sizes that say which pixels of an image are in which window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Pair = tuple[int, int]


class Windows(NamedTuple):
    """torch's arguments of `unfold`, in torch's order."""

    kernel: Pair
    dilation: Pair
    padding: Pair
    stride: Pair

    def exist(self) -> bool:
        """Whether the numbers are such that there may be windows."""
        return min(*self.kernel, *self.dilation, *self.stride) >= 1 and min(self.padding) >= 0

    def counts(self, image: Sequence[int]) -> Pair:
        """How many there are along each dimension of an image."""
        down, across = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in zip(image, *self, strict=True)
        ]  # fmt: skip
        return down, across

    def constexprs(self) -> dict[str, int]:
        """The sizes that a Triton kernel is compiled for."""
        (r, s), (dilation_h, dilation_w), _, (stride_h, stride_w) = self
        return dict(
            R=r, S=s, STRIDE_H=stride_h, STRIDE_W=stride_w, DILATION_H=dilation_h, DILATION_W=dilation_w
        )  # fmt: skip
