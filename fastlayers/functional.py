"""torch.nn.functional's names and signatures, on Triton kernels where we have them and torch's own otherwise.

import fastlayers.functional as F
"""

from typing import Any

import torch.nn.functional as _torch
from torch.nn.functional import *  # pyright: ignore[reportWildcardImportFromLibrary]

from .ops.activation import *
from .ops.attention import *
from .ops.averaging import *
from .ops.batch_norm import *
from .ops.conv import *
from .ops.conv_transpose import *
from .ops.distance import *
from .ops.dropout import *
from .ops.elementwise_loss import *
from .ops.embedding import *
from .ops.fold import *
from .ops.gated import *
from .ops.gated_mlp import *
from .ops.linear import *
from .ops.linear_cross_entropy import *
from .ops.loss import *
from .ops.multi_head_attention import *
from .ops.norm import *
from .ops.piecewise import *
from .ops.pooling import *
from .ops.rotary import *
from .ops.rotary_projections import *
from .ops.smooth import *
from .ops.softmax import *
from .ops.upsampling import *

__all__ = sorted(n for n in dir(_torch) if not n.startswith("_"))  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch)})
