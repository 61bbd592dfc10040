"""What the audit compiles: a kernel at a tile, and the call that launches it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fastlayers.kernels.conv.geometry import Geometry
from fastlayers.kernels.runtime import tiles as _tiles
from fastlayers.ops.activation import Activation
from fastlayers.reporting.dry_run import ANY, noting, size
from fastlayers.reporting.gpus import Work

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")
RELU, GELU, GELU_TANH = Activation("relu"), Activation("gelu"), Activation("gelu_tanh")


def maker(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    return lambda *shape: torch.empty(shape, dtype=dtype, device="meta")


Call = tuple[str, str, Callable[[], object]]
"""Direction, kernel, and what launches it."""


def geometry_of(stride: int, padding: int, precision: str, groups: int = 1) -> dict[str, Any]:
    pads = padding, padding
    return dict(geometry=Geometry((stride, stride), pads, pads, (1, 1), groups), precision=precision)


@dataclass(frozen=True)
class Case:
    """One kernel at one tile: `call` launches it, and only what `kernel` names is compiled."""

    name: str
    kernel: str
    dtype: torch.dtype
    call: Callable[[], object]
    force: dict[str, Any]
    """The tiles to force."""
    wide: bool = False
    """Compiled for offsets of 64 bits."""
    can_be_wide: bool = True
    """Whether the kernel has a variant for them."""
    before: int = 0
    """How many launches of the same kernel come before this one."""
    cost: Callable[[], Work] | None = None
    """What the whole call computes and moves, where the call's arguments don't say it."""
    alone: bool = True
    """Whether the whole call's work is this kernel's."""

    @property
    def streams(self) -> bool:
        """Whether memory alone decides the speed, so that every load and store must be 128 bits wide. Rows of up to 8
        elements, which aren't aligned, can't be."""
        rows = r"relu|gelu|softmax (grad )?(rows \d\d|blocks)"
        images = r"to channels_last \d|depthwise (input grad )?\S+ stride \d channels_last"
        return re.match(f"{rows}|{images}", self.name) is not None

    @property
    def label(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}{' wide' * self.wide}"

    @property
    def arithmetic(self) -> str:
        """The kind of it, as the tables call it. Strict float32 in several products of tensor cores counts as theirs."""
        if self.dtype != torch.float32:
            return "64" if self.dtype == torch.float64 else "16"
        precisions = [getattr(self.call, "keywords", {}).get("precision")]
        precisions += [getattr(tile, "precision", None) for tile in self.force.values()]
        return "ieee" if {*precisions} <= {"ieee", None} else "tf32"

    @functools.cached_property
    def work(self) -> Work:
        """FLOPs and bytes of the whole call: every tensor that it is given or returns, each once."""
        if self.cost is not None:
            return self.cost()
        call: Any = self.call
        with noting(ANY), _tiles.force(**self.force):
            results = call()
        given = [*call.args, *call.keywords.values()]
        return Work(_flops(call), size(tree_leaves(given)) + size(tree_leaves(results)))


def _flops(call: Any) -> int:
    """Of a product or a convolution, from the launcher's arguments."""
    args, launcher = call.args, call.func.__name__
    if launcher == "matmul":
        return 2 * args[0].numel() * args[1].shape[1]
    if launcher.startswith("conv2d"):
        # conv2d(x, w, bias, y), conv2d_input_grad(dz, w, dx), conv2d_weight_grad(dz, x, dw): each weight meets each pixel of
        # the result once.
        result, weight = {"conv2d": (3, 1), "conv2d_input_grad": (0, 1)}.get(launcher, (0, 2))
        return 2 * args[result].numel() * args[weight][0].numel()
    return 0
