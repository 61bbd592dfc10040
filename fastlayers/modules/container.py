"""torch.nn.modules.container."""

from typing import Any

import torch
from torch import nn

from .._state import mark
from ..fusion import plan

__all__ = ["Sequential"]


class Sequential(nn.Sequential):
    """Modules one after the other. As torch.nn.Sequential, but a Linear or a convolution and the activation that follows
    it run as one kernel, and consecutive Linear layers as one function for autograd, wherever nobody could tell.

    A neighbour keeps to itself if it has a hook (its own or a global one), is a subclass of our class, or has a
    `forward` of its own: a hook must see the value in between. That is looked up at every call, when its turn comes.
    Sums and products are Sequentials of ours too.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Sequential.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return plan.run(self, input)

    # torch's own build a torch.nn.Sequential, whose forward fuses nothing.
    def __add__(self, other: nn.Sequential) -> "Sequential":
        return mark(Sequential(*super().__add__(other)), self, other)

    def __mul__(self, other: int) -> "Sequential":
        return mark(Sequential(*super().__mul__(other)), self)

    def __getitem__(self, idx: Any) -> Any:
        found = super().__getitem__(idx)
        return mark(found, self) if isinstance(idx, slice) else found
