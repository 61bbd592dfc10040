"""What state is there? torch.nn's classes with another `forward`: a file per file of torch.nn.modules."""

from .. import _fusion
from .activation import ReLU, Softmax
from .container import Sequential
from .conv import Conv2d, LazyConv2d
from .linear import LazyLinear, Linear

# What they declare now, before anyone can patch them.
for _kind in (Conv2d, Linear, ReLU):
    _fusion.declarations(_kind)

__all__ = ["Conv2d", "LazyConv2d", "LazyLinear", "Linear", "ReLU", "Sequential", "Softmax"]
