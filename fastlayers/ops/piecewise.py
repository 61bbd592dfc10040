"""Activations of straight pieces: each applies to one element at a time."""

from __future__ import annotations

import torch

from .. import _torch_functional as F
from .activation import Activation, _pointwise, applied

__all__ = [
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "relu",
    "relu6",
    "softshrink",
    "threshold",
]

_RELU, _RELU_INPLACE = (_pointwise.options(Activation("relu"), inplace) for inplace in (False, True))
_RELU6, _RELU6_INPLACE = (_pointwise.options(Activation("relu6"), inplace) for inplace in (False, True))
_HARDSIGMOID, _HARDSIGMOID_INPLACE = (
    _pointwise.options(Activation("hardsigmoid"), inplace) for inplace in (False, True)
)
_HARDSWISH, _HARDSWISH_INPLACE = (_pointwise.options(Activation("hardswish"), inplace) for inplace in (False, True))


def relu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """max(input, 0), NaN staying NaN. As torch.nn.functional.relu.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets), and, with `inplace`, is not a view
        that requires grad.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.relu.html
    """
    return _pointwise.run((input,), _RELU_INPLACE if inplace else _RELU)


def relu6(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """input, but at least 0 and at most 6; NaN stays NaN. As torch.nn.functional.relu6.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets), and, with `inplace`, is not a view
        that requires grad.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.relu6.html; Howard et al., "MobileNets",
        arXiv:1704.04861
    """
    return _pointwise.run((input,), _RELU6_INPLACE if inplace else _RELU6)


def leaky_relu(input: torch.Tensor, negative_slope: float = 0.01, inplace: bool = False) -> torch.Tensor:
    """input where it is positive, elsewhere negative_slope * input. As torch.nn.functional.leaky_relu.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets), and, with `inplace`, isn't a view
        that requires grad and the slope isn't negative.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.leaky_relu.html
    """
    return applied("leaky_relu", input, (negative_slope,), inplace)


def hardtanh(input: torch.Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> torch.Tensor:
    """input, but at least min_val and at most max_val; NaN stays NaN. As torch.nn.functional.hardtanh.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets), and, with `inplace`, isn't a view
        that requires grad and 16 bits hold the bounds.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.hardtanh.html
    """
    return applied("hardtanh", input, (min_val, max_val), inplace)


def hardsigmoid(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """(input + 3) / 6, but at least 0 and at most 1. As torch.nn.functional.hardsigmoid.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets), and, with `inplace`, no gradient is
        asked for, since the derivative needs what would be overwritten.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.hardsigmoid.html
    """
    return _pointwise.run((input,), _HARDSIGMOID_INPLACE if inplace else _HARDSIGMOID)


def hardswish(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """input * hardsigmoid(input); -inf gives NaN. As torch.nn.functional.hardswish.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets), and, with `inplace`, no gradient is
        asked for, since the derivative needs what would be overwritten.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.hardswish.html; Howard et al., "Searching
        for MobileNetV3", arXiv:1905.02244
    """
    return _pointwise.run((input,), _HARDSWISH_INPLACE if inplace else _HARDSWISH)


def threshold(input: torch.Tensor, threshold: float, value: float, inplace: bool = False) -> torch.Tensor:
    """input where it is more than the threshold, elsewhere value; NaN stays NaN. As torch.nn.functional.threshold.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets), and, with `inplace`, isn't a view
        that requires grad and value is no more than the threshold.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.threshold.html
    """
    if not torch.is_tensor(input) or not input.is_floating_point():  # torch wants whole numbers for these
        return F.threshold(input, threshold, value, inplace)
    return applied("threshold", input, (threshold, value), inplace)


def hardshrink(input: torch.Tensor, lambd: float = 0.5) -> torch.Tensor:
    """input where it is beyond -lambd and lambd, elsewhere 0; NaN stays NaN. As torch.nn.functional.hardshrink.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.hardshrink.html
    """
    return applied("hardshrink", input, (lambd,))


def softshrink(input: torch.Tensor, lambd: float = 0.5) -> torch.Tensor:
    """input moved by lambd towards 0, and 0 between -lambd and lambd; NaN stays NaN. As torch.nn.functional.softshrink.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.softshrink.html
    """
    return applied("softshrink", input, (lambd,))
