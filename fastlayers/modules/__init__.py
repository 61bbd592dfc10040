"""What state is there? torch.nn's classes with another `forward`: a file per file of torch.nn.modules."""

import torch.nn.functional as _torch

from .. import _leaf, _originals, functional
from .activation import *
from .batchnorm import *
from .container import *
from .conv import *
from .distance import *
from .dropout import *
from .fold import *
from .instancenorm import *
from .linear import *
from .loss import *
from .normalization import *
from .pooling import *
from .rnn import *
from .sparse import *
from .transformer import *
from .upsampling import *

_functions = [(name, value) for name, value in vars(functional).items() if callable(value) and not name.startswith("_")]
_originals.stand_in({name: f for name, f in _functions if f is not getattr(_torch, name, f)})
_classes = [value for value in list(globals().values()) if isinstance(value, type)]
_originals.watch(*_classes)
_leaf.keep_whole(*_classes)
