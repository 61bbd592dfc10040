"""torch.nn's layers on Triton kernels, forward and backward: the same classes to a program, only faster on a GPU.

from fastlayers import nn                # instead of torch.nn: ours where we have it, torch's otherwise
import fastlayers.functional as F        # instead of torch.nn.functional
fastlayers.accelerate(model)             # or: change torch.nn's layers in a model, in place; restore(model) undoes it
fastlayers.fuse(model)                   # layers that follow one another in any model's forward, run as in a Sequential
fastlayers.explain(model, x)             # which path did every layer take, and why?
fastlayers.capture(model, x)             # the same model as a CUDA graph, for training or inference
fastlayers.policy("torch")               # "auto" | "triton" | "torch"
"""

from . import functional, nn
from ._capture import capture
from ._convert import Conversion, Conversions, accelerate, restore
from ._dispatch import Decision, Explanation, NotAccelerated, explain, policy
from ._fuse import fuse
from ._version import __version__
from .modules import Conv2d, LazyConv2d, LazyLinear, Linear, ReLU, Sequential, Softmax

__all__ = [
    "Conv2d",
    "Conversion",
    "Conversions",
    "Decision",
    "Explanation",
    "LazyConv2d",
    "LazyLinear",
    "Linear",
    "NotAccelerated",
    "ReLU",
    "Sequential",
    "Softmax",
    "__version__",
    "accelerate",
    "capture",
    "explain",
    "functional",
    "fuse",
    "nn",
    "policy",
    "restore",
]
