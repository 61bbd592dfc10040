"""torch.nn's layers on Triton GPU kernels, forward and backward: the same classes to a program.

from fastlayers import nn                # instead of torch.nn: ours where we have it, torch's otherwise
import fastlayers.functional as F        # instead of torch.nn.functional
fastlayers.accelerate(model)             # or: change torch.nn's layers in a model, in place; restore(model) undoes it
fastlayers.accelerate(model, fuse=True)  # the same, and fuse the modules around the layers
with fastlayers.patched(): ...           # or: whatever is built and called within, by code that imports torch.nn
fastlayers.fuse(model)                   # layers that follow one another in any model's forward, run as in a Sequential
fastlayers.explain(model, x)             # which path did every layer take, and why?
fastlayers.report(model, x)              # what will run on kernels on a GPU, without one; FLOPs, bytes, roofline
fastlayers.capture(model, x)             # the same model as a CUDA graph, for training or inference
fastlayers.policy("torch")               # "auto" | "triton" | "torch"
"""

from . import functional, integrations, modules, nn
from ._version import __version__
from .capture import capture
from .convert import Conversion, Conversions, accelerate, restore
from .dispatch.explain import Decision, Explanation, explain
from .dispatch.policy import NotAccelerated, policy
from .fusion.trace import fuse
from .modules import *
from .patch import patched
from .reporting import report

__all__ = [
    "Conversion",
    "Conversions",
    "Decision",
    "Explanation",
    "NotAccelerated",
    "__version__",
    "accelerate",
    "capture",
    "explain",
    "functional",
    "fuse",
    "integrations",
    "nn",
    "patched",
    "policy",
    "report",
    "restore",
]
__all__ += [name for name in dir(modules) if isinstance(getattr(modules, name), type)]
