"""The sizes that say which pixels a convolution multiplies with which taps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Pair = tuple[int, int]


def _sizes(value: Any, count: int, least: int) -> tuple[int, ...] | None:
    """torch's int or int[count], where a single number stands for all; None where torch would object."""
    sizes = (value,) * count if type(value) is int else tuple(value) if isinstance(value, (tuple, list)) else ()
    sizes = sizes * count if len(sizes) == 1 else sizes
    return sizes if len(sizes) == count and all([type(n) is int and n >= least for n in sizes]) else None


def filled(sizes: Sequence[int], fill: int) -> Any:
    """The sizes of an image or a volume, of which there are two or three. A signal is an image of a single row."""
    return (fill, *sizes) if len(sizes) == 1 else tuple(sizes)


class Geometry(NamedTuple):
    """`padding` above and to the left, `end` below and to the right. They differ for "same" with even kernels, and where the
    result of a transposed convolution is larger by an output padding. Signals count as images of a single row. For volumes, each
    has three numbers."""

    stride: Pair
    padding: Pair
    end: Pair
    dilation: Pair
    groups: int

    @staticmethod
    def of(kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: Any) -> Geometry | None:
        """From torch's arguments and the sizes of the kernel, one to three; None where torch would object."""
        dims = len(kernel)
        s, d = _sizes(stride, dims, 1), _sizes(dilation, dims, 1)
        if s is None or d is None or dims not in (1, 2, 3) or type(groups) is not int or groups < 1:
            return None
        if padding == "same" and max(s) == 1:
            total = [n * (k - 1) for n, k in zip(d, kernel, strict=True)]
            p, e = [n // 2 for n in total], [n - n // 2 for n in total]
        else:
            p = e = (0,) * dims if padding == "valid" else _sizes(padding, dims, 0)  # type: ignore[assignment]
        return None if p is None else Geometry(filled(s, 1), filled(p, 0), filled(e, 0), filled(d, 1), groups)

    @staticmethod
    def transposed(
        kernel: Sequence[int], stride: Any, padding: Any, output_padding: Any, groups: Any, dilation: Any
    ) -> Geometry | None:
        """The convolution whose input gradient is the transposed convolution with these arguments; None where torch would object.
        An output padding is what `end` has less than `padding`: the last pixels of the result are read by fewer taps."""
        g, more = Geometry.of(kernel, stride, padding, dilation, groups), _sizes(output_padding, len(kernel), 0)
        if g is None or more is None or isinstance(padding, str):
            return None
        more = filled(more, 0)
        if any([n >= max(s, d) for n, s, d in zip(more, g.stride, g.dilation, strict=True)]):
            return None
        end: Any = tuple([p - n for p, n in zip(g.padding, more, strict=True)])
        return g._replace(end=end)

    def sizes(self, image: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Those of the result, as many as the image has."""
        return tuple(
            (n + p + e - d * (k - 1) - 1) // s + 1
            for n, k, s, p, e, d in zip(
                image, kernel, self.stride, self.padding, self.end, self.dilation, strict=True
            )
        )  # fmt: skip

    def transposed_sizes(self, image: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Those of the transposed convolution's result, where the image has those of the convolution's."""
        return tuple(
            (n - 1) * s - p - e + d * (k - 1) + 1
            for n, k, s, p, e, d in zip(
                image, kernel, self.stride, self.padding, self.end, self.dilation, strict=True
            )
        )  # fmt: skip

    def constexprs(self, kernel: Sequence[int]) -> dict[str, int]:
        """The sizes that a Triton kernel for images is compiled for."""
        (r, s), (stride_h, stride_w), (dilation_h, dilation_w) = kernel, self.stride, self.dilation
        return dict(
            R=r, S=s, STRIDE_H=stride_h, STRIDE_W=stride_w, DILATION_H=dilation_h, DILATION_W=dilation_w
        )  # fmt: skip

    @property
    def step(self) -> tuple[int, ...]:
        """Along each dimension, how many taps apart those lie that meet the same pixels of the input."""
        return tuple([s // math.gcd(s, d) for s, d in zip(self.stride, self.dilation, strict=True)])
