"""Dropping elements or whole feature maps at random."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from .. import _kernels
from .. import _torch_functional as F
from ..dispatch import explain
from ..dispatch.support import BadInput
from ..operation import Operation
from ..values import Named, Needs, Out, Tensors

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels import dropout as kernels

__all__ = ["alpha_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"]

_BATCHED = {"dropout1d": 3, "dropout2d": 4, "dropout3d": 5}
"""Dimensions of a batch of feature maps."""
_ALPHA = 1.7580993408473766
"""What SELU tends to for small x, negated."""


class Dropout(Operation):
    """One operation for all six functions. Saves what was drawn, two numbers, and draws the rest again in the backward, which is
    the same function of dy."""

    tensors = ("input", "seed")
    floats = ("input",)
    compiled = False  # Inductor fuses it with whatever stands around it, and keeps no mask either

    class Options(NamedTuple):
        function: str
        p: float
        inplace: bool
        vector: int
        """How many adjacent elements each of torch's threads takes, on which the order of its draw depends; 0 where it draws by
        `bernoulli_`."""

    def reference(self, input: Any, function: str, p: float, inplace: bool, vector: int) -> Any:
        return getattr(F, function)(input, p, True, inplace)

    def label(self, options: Options) -> str:
        return options.function

    def unsupported(self, t: Any, options: Options) -> str | None:
        if options.p == 1:
            return "p = 1"
        name, ndim = options.function, t.input.dim()
        if name == "feature_alpha_dropout":
            return BadInput(f"{ndim} dimensions") if ndim < 2 else None
        batched = _BATCHED.get(name, ndim)
        if ndim == batched:
            return None
        if name == "dropout2d" or ndim + 1 != batched:
            return (
                BadInput(f"{ndim} dimensions") if name == "dropout1d" else "a number of dimensions of which torch warns"
            )
        return "unbatched input in place" if options.inplace else None

    def mutates(self, options: Options) -> tuple[str, ...]:
        return ("input",) if options.inplace else ()

    def random(self, options: Options) -> bool:
        return True

    def advance(self, t: Any, options: Options) -> int:
        x, features = t.input, _features(t.input, options)
        size = math.prod(x.shape if features is None else features)
        return kernels.advance(size, _lanes(x, options), x.device)

    def outputs(self, t: Any, options: Options, needs: Needs | None) -> dict[str, Out | str]:
        return {"output": "input" if options.inplace else Out.pointwise(t.input)}

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        _launch(t.input, out.output, t.seed, options, *_numbers(options))

    def saves(self, t: Any, options: Options, needs: Needs) -> tuple[str, ...]:
        return ("seed",)

    def gradients(self, like: Any, options: Options, needs: Needs) -> tuple[Out | int | str | None, ...]:
        return (Out.pointwise(like.input), None)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        _launch(dy.output, grads.input, saved.seed, options, _numbers(options)[0], 0.0, 0.0)

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Options, needs: Needs) -> Tensors:
        """dy times what each element is multiplied by, for which the kernels are given ones."""
        x, wide = like[0], torch.promote_types(like[0].dtype, torch.float32)
        ones = Out.pointwise(x).empty(dy.output.device).fill_(1)
        kept = torch.empty_like(ones)
        _launch(ones, kept, saved.seed, options, 1.0, 0.0, 0.0)
        return (dy.output.to(wide) * (kept.to(wide) * _numbers(options)[0])).to(x.dtype), None


_dropout = Dropout()


def _lanes(x: Any, options: Any) -> int:
    """How many elements torch draws by one call of Philox, where it draws for single elements."""
    return 4 if options.vector else kernels.lanes(x.dtype)


def _features(x: Any, options: Any) -> tuple[int, ...] | None:
    """The number of samples and of feature maps of each; None where single elements are dropped."""
    if options.function in ("dropout", "alpha_dropout"):
        return None
    return (1, x.shape[0]) if len(x.shape) < _BATCHED.get(options.function, 0) else tuple(x.shape[:2])


def _numbers(options: Any) -> tuple[float, float, float]:
    """What is kept is multiplied by the first and the second is added; to what is dropped, the third is."""
    p = options.p
    if "alpha" not in options.function:
        return 1 / (1 - p), 0.0, 0.0
    a = 1 / math.sqrt((_ALPHA * _ALPHA * p + 1) * (1 - p))
    return a, _ALPHA * a * p, _ALPHA * a * (p - 1)


def _launch(
    x: Any, out: Any, draw: Any, options: Any, scale: float, kept: float, dropped: float, residual: Any = None
) -> None:
    """out = x * scale + kept, or x * 0 + dropped. A residual is added to what `dropout` gives."""
    p, features = options.p, _features(x, options)
    if features is not None:
        factor = kernels.launch.empty(features, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        kernels.dropout_lanes(None, factor, draw, p, (scale, 0.0, 0.0), _lanes(x, options))
        if features != tuple(x.shape[:2]):
            x, out = x.unsqueeze(0), out.unsqueeze(0)
        kernels.dropout_features(x, out, factor, (kept, dropped))
    elif options.vector > 1:
        kernels.dropout_chunks(x, out, draw, p, scale, options.vector, residual=residual)
    else:
        kernels.dropout_lanes(
            x, out, draw, p, (scale, kept, dropped), _lanes(x, options), logical=options.vector == 1, residual=residual
        )  # fmt: skip


# --- torch's functions -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096, typed=True)
def _options(function: str, p: float, inplace: bool, vector: int) -> Any:
    """Always the same object for the same arguments."""
    return _dropout.options(function, float(p), inplace, vector)


def _vector(input: torch.Tensor) -> int:
    """How many adjacent elements each of torch's threads takes; 1 also for what the kernels won't take."""
    if _kernels.MISSING is not None or not _kernels.is_plain(input):
        return 1
    try:
        address = input.data_ptr()
        return kernels.vector(input, input.dtype, 16 if address % 16 == 0 else address & -address)
    except RuntimeError:  # no memory, or none in one piece
        return 1


def _applied(function: str, input: torch.Tensor, p: float, training: bool, inplace: bool) -> torch.Tensor:
    """torch.nn.functional's function of this name."""

    def reference() -> torch.Tensor:
        return getattr(F, function)(input, p, training, inplace)

    if is_dynamo_compiling():
        return reference()
    if (
        training is True
        and (type(p) is float or type(p) is int)
        and 0 < p <= 1
        and type(inplace) is bool
        and isinstance(input, torch.Tensor)
        and input.numel() > 0
    ):
        plain = function == "dropout" and not inplace
        return _dropout.run((input,), _options(function, p, inplace, _vector(input) if plain else 0))
    # torch's function returns the input itself, or objects.
    return reference() if explain.recorder is None else explain.recorder.launching(function, reference)


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Single elements set to 0 with probability p, the others divided by 1 - p. As torch.nn.functional.dropout, on CUDA with the
    same elements under the same seed; saves two numbers instead of a mask.

    Shape: any, any strides; the result has the strides that torch gives it. Without training, the input itself.
    Dtype: float16, bfloat16, float32 or float64.
    Runs on Triton when: the input is a plain tensor on a GPU (or Triton interprets) and p < 1.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.dropout.html
    """
    return _applied("dropout", input, p, training, inplace)


def dropout1d(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Whole channels of signals set to 0 with probability p, the others divided by 1 - p. As torch.nn.functional.dropout1d; saves
    two numbers instead of a mask.

    Shape: (N, C, L), or (C, L) unless in place, any strides.
    Dtype: float16, bfloat16, float32 or float64.
    Runs on Triton when: the input is a plain tensor on a GPU (or Triton interprets) and p < 1.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.dropout1d.html
    """
    return _applied("dropout1d", input, p, training, inplace)


def dropout2d(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Whole channels of images set to 0 with probability p, the others divided by 1 - p. As torch.nn.functional.dropout2d; saves
    two numbers instead of a mask.

    Shape: (N, C, H, W), any strides; other numbers of dimensions, of which torch warns, are left to it.
    Dtype: float16, bfloat16, float32 or float64.
    Runs on Triton when: the input is a plain tensor on a GPU (or Triton interprets) and p < 1.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.dropout2d.html
    """
    return _applied("dropout2d", input, p, training, inplace)


def dropout3d(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Whole channels of volumes set to 0 with probability p, the others divided by 1 - p. As torch.nn.functional.dropout3d; saves
    two numbers instead of a mask.

    Shape: (N, C, D, H, W), or (C, D, H, W) unless in place, any strides; others, of which torch warns, are left to it.
    Dtype: float16, bfloat16, float32 or float64.
    Runs on Triton when: the input is a plain tensor on a GPU (or Triton interprets) and p < 1.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.dropout3d.html
    """
    return _applied("dropout3d", input, p, training, inplace)


def alpha_dropout(input: torch.Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> torch.Tensor:
    """Single elements set to what SELU tends to, and all scaled and shifted so that mean and variance stay. As
    torch.nn.functional.alpha_dropout, in one pass where torch takes seven; saves two numbers instead of a mask.

    Shape: any, any strides.
    Dtype: float16, bfloat16, float32 or float64.
    Runs on Triton when: the input is a plain tensor on a GPU (or Triton interprets) and p < 1.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.alpha_dropout.html
    """
    return _applied("alpha_dropout", input, p, training, inplace)


def feature_alpha_dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> torch.Tensor:
    """Whole feature maps set to what SELU tends to, and all scaled and shifted so that mean and variance stay. As
    torch.nn.functional.feature_alpha_dropout; saves two numbers instead of a mask.

    Shape: (N, C, *), any strides.
    Dtype: float16, bfloat16, float32 or float64.
    Runs on Triton when: the input is a plain tensor on a GPU (or Triton interprets) and p < 1.
    Raises: what torch raises.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.feature_alpha_dropout.html
    """
    return _applied("feature_alpha_dropout", input, p, training, inplace)
