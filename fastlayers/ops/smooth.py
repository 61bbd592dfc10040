"""Activations with exponentials: each applies to one element at a time."""

from __future__ import annotations

import torch

from .. import _torch_functional as F
from ..dispatch.support import run_reference
from .activation import CALLS, Activation, Refused, _pointwise, applied

__all__ = [
    "celu",
    "elu",
    "gelu",
    "logsigmoid",
    "mish",
    "selu",
    "sigmoid",
    "silu",
    "softplus",
    "softsign",
    "swish",
    "tanh",
    "tanhshrink",
]

_SIGMOID = _pointwise.options(Activation("sigmoid"), False)
_TANH = _pointwise.options(Activation("tanh"), False)
_TANHSHRINK = _pointwise.options(Activation("tanhshrink"), False)
_SILU, _SILU_INPLACE = (_pointwise.options(Activation("silu"), inplace) for inplace in (False, True))
_MISH, _MISH_INPLACE = (_pointwise.options(Activation("mish"), inplace) for inplace in (False, True))
_LOGSIGMOID = _pointwise.options(Activation("logsigmoid"), False)
_SOFTSIGN = _pointwise.options(Activation("softsign"), False)
_SELU, _SELU_INPLACE = (_pointwise.options(Activation("selu"), inplace) for inplace in (False, True))
_GELU_OPTIONS = {word: _pointwise.options(CALLS["gelu"](word), False) for word in ("none", "tanh")}


def gelu(input: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """x times the probability that a standard normal variable is less than x, or with approximate="tanh"
    x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). As torch.nn.functional.gelu.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64; computed in float32 (float64).
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.gelu.html; Hendrycks and Gimpel, "Gaussian
        Error Linear Units", arXiv:1606.08415.
    """
    if approximate not in ("none", "tanh"):
        return F.gelu(input, approximate=approximate)
    return _pointwise.run((input,), _GELU_OPTIONS[approximate])


def sigmoid(input: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-input)). As torch.nn.functional.sigmoid.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.sigmoid.html
    """
    return _pointwise.run((input,), _SIGMOID)


def tanh(input: torch.Tensor) -> torch.Tensor:
    """The hyperbolic tangent. As torch.nn.functional.tanh.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.tanh.html
    """
    return _pointwise.run((input,), _TANH)


def tanhshrink(input: torch.Tensor) -> torch.Tensor:
    """input - tanh(input). As torch.nn.functional.tanhshrink.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.tanhshrink.html
    """
    return _pointwise.run((input,), _TANHSHRINK)


def silu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """input * sigmoid(input), also called swish; -inf gives NaN. As torch.nn.functional.silu.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets), and, with `inplace`, no gradient is
        asked for, since the derivative needs what would be overwritten.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.silu.html; Elfwing, Uchibe and Doya,
        "Sigmoid-weighted linear units", arXiv:1702.03118
    """
    return _pointwise.run((input,), _SILU_INPLACE if inplace else _SILU)


def swish(input: torch.Tensor, factor: float) -> torch.Tensor:
    """input * sigmoid(factor * input), which torch has no function for: QuickGELU with a factor of 1.702, SiLU with 1; -inf gives
    NaN.

    Shape: any; the result has the strides that torch's operators give it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64) and rounded once; others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets).
    Raises: what torch's operators raise.
    Source: Ramachandran, Zoph and Le, "Searching for Activation Functions", arXiv:1710.05941; Hendrycks and Gimpel,
        "Gaussian Error Linear Units", arXiv:1606.08415, for the factor of 1.702.
    """
    try:
        activation = CALLS["swish"](factor)
    except Refused as refused:
        return run_reference("swish", refused.args[0], lambda: input * torch.sigmoid(factor * input))
    return _pointwise((input,), activation, False)


def mish(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """input * tanh(softplus(input)), which is input * n / (n + 2) with n = e (e + 2) and e = exp(input); -inf gives
    NaN. As torch.nn.functional.mish.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets), and, with `inplace`, no gradient is
        asked for, since the derivative needs what would be overwritten.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.mish.html; Misra, "Mish",
        arXiv:1908.08681
    """
    return _pointwise.run((input,), _MISH_INPLACE if inplace else _MISH)


def softplus(input: torch.Tensor, beta: float = 1.0, threshold: float = 20.0) -> torch.Tensor:
    """log(1 + exp(beta * input)) / beta, and input itself where beta * input is more than the threshold. As
    torch.nn.functional.softplus.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets), and beta is positive.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.softplus.html
    """
    return applied("softplus", input, (beta, threshold))


def logsigmoid(input: torch.Tensor) -> torch.Tensor:
    """log(1 / (1 + exp(-input))), exact also where it is large or nearly 0. As torch.nn.functional.logsigmoid.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.logsigmoid.html
    """
    return _pointwise.run((input,), _LOGSIGMOID)


def softsign(input: torch.Tensor) -> torch.Tensor:
    """input / (1 + abs(input)); infinities give NaN. As torch.nn.functional.softsign.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets).
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.softsign.html
    """
    return _pointwise.run((input,), _SOFTSIGN)


def elu(input: torch.Tensor, alpha: float = 1.0, inplace: bool = False) -> torch.Tensor:
    """input where it is positive, elsewhere alpha * (exp(input) - 1). As torch.nn.functional.elu.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets), and, with `inplace`, isn't a view
        that requires grad and alpha isn't negative.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.elu.html; Clevert, Unterthiner and
        Hochreiter, "Exponential Linear Units", arXiv:1511.07289
    """
    return applied("elu", input, (alpha,), inplace)


def selu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """1.0507 * elu(input, 1.6733), with more digits. As torch.nn.functional.selu.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets), and, with `inplace`, is not a view
        that requires grad.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.selu.html; Klambauer et al.,
        "Self-Normalizing Neural Networks", arXiv:1706.02515
    """
    return _pointwise.run((input,), _SELU_INPLACE if inplace else _SELU)


def celu(input: torch.Tensor, alpha: float = 1.0, inplace: bool = False) -> torch.Tensor:
    """input where it is positive, elsewhere alpha * (exp(input / alpha) - 1). As torch.nn.functional.celu.

    Shape: any; the result has the strides that torch gives it.
    Dtype: float16, bfloat16, float32, float64, computed in float32 (float64); others by torch.
    Runs on Triton when: the tensor is a plain one on a GPU (or Triton interprets), alpha is positive, and, with
        `inplace`, isn't a view that requires grad.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.celu.html; Barron, "Continuously
        Differentiable Exponential Linear Units", arXiv:1704.07483
    """
    return applied("celu", input, (alpha,), inplace)
