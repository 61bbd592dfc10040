"""y = f(x), one element at a time. An activation is a value: the name of a function and its options.

The functions themselves are in piecewise.py and smooth.py.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from .. import _kernels
from .. import _torch_functional as F
from .._torch import any_autocast
from ..dispatch.support import BadInput, run_reference, wants_grad
from ..operation import Operation
from ..values import Named, Out, Tensors, value

if TYPE_CHECKING or _kernels.MISSING is None:
    from ..kernels import pointwise as kernels

__all__: list[str] = []


class Rule(NamedTuple):
    """What is known of an activation's function. Its tile functions, `name` and `name_grad`, are in kernels/activations.py."""

    torch: Callable[..., torch.Tensor]
    """torch's function of x and the options."""
    gradient: Callable[..., torch.Tensor] | None = None
    """dx of (dy, y, *options) by differentiable functions of torch, where the output y is enough for it."""
    output_is_enough: Callable[..., bool] = lambda *args: True
    """Whether it is, for these options."""
    inplace: bool = False
    """Whether torch's function takes `inplace`."""
    keeps: str = "input"
    """What torch saves, "input" or "output", and so does a call that is by itself."""
    contiguous: bool = False
    """Whether torch's result is contiguous on a CPU, whatever the input's strides."""
    rounds: tuple[str, ...] = ()
    """In which of "value" and "gradient" torch rounds the options to the input's dtype."""
    widens: bool = False
    """Whether autocast may have torch compute it in float32. Then it isn't joined with what comes before it under autocast."""


def _between(dy: torch.Tensor, y: torch.Tensor, least: float, most: float) -> torch.Tensor:
    return torch.where((y <= least) | (y >= most), 0.0, dy)


def _is_exact(number: float) -> bool:
    """Whether 16 bits hold this number. If a bound was rounded, an output that is equal to it doesn't say whether the input was
    beyond it."""
    if torch.finfo(torch.float16).max < abs(number) < math.inf:
        return False
    return all([_rounded(number, d) == number for d in (torch.float16, torch.bfloat16)])


def _rounded(number: float, dtype: torch.dtype) -> float:
    """The number in this dtype, by no operator of torch's, which would be seen while a launch is recorded."""
    if dtype not in (torch.float16, torch.bfloat16):
        return number
    (bits,) = struct.unpack("I", struct.pack("f", number))
    if dtype == torch.float16:
        return struct.unpack("e", struct.pack("e", *struct.unpack("f", struct.pack("I", bits))))[0]
    to_even = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return struct.unpack("f", struct.pack("I", to_even))[0] if math.isfinite(number) else number


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946

RULES: dict[str, Rule] = {
    "celu": Rule(F.celu, lambda dy, y, alpha: torch.where(y <= 0, dy * (y / alpha + 1), dy), inplace=True),
    "elu": Rule(
        F.elu,
        lambda dy, y, alpha: torch.where(y <= 0, dy * (y + alpha), dy),
        lambda alpha: alpha >= 0,
        inplace=True,
    ),
    "gelu": Rule(F.gelu),
    "gelu_tanh": Rule(functools.partial(F.gelu, approximate="tanh")),
    "hardshrink": Rule(
        F.hardshrink,
        lambda dy, y, lambd: torch.where(y == 0, 0.0, dy),
        lambda lambd: lambd >= 0,
        rounds=("value", "gradient"),
    ),
    "hardsigmoid": Rule(F.hardsigmoid, inplace=True),
    "hardswish": Rule(F.hardswish, inplace=True),
    "hardtanh": Rule(F.hardtanh, _between, lambda *bounds: all(map(_is_exact, bounds)), inplace=True),
    "leaky_relu": Rule(
        F.leaky_relu, lambda dy, y, slope: torch.where(y > 0, dy, dy * slope), lambda slope: slope >= 0, inplace=True
    ),
    "logsigmoid": Rule(F.logsigmoid, lambda dy, y: dy * -torch.expm1(y), contiguous=True),
    "mish": Rule(F.mish, inplace=True),
    "relu": Rule(F.relu, lambda dy, y: torch.ops.aten.threshold_backward(dy, y, 0), inplace=True, keeps="output"),
    "relu6": Rule(F.relu6, lambda dy, y: _between(dy, y, 0, 6), inplace=True),
    "selu": Rule(
        F.selu,
        lambda dy, y: torch.where(y <= 0, dy * (y + _SELU_SCALE * _SELU_ALPHA), dy * _SELU_SCALE),
        inplace=True,
    ),
    "sigmoid": Rule(torch.sigmoid, lambda dy, y: dy * (1 - y) * y, keeps="output"),
    "silu": Rule(F.silu, inplace=True),
    "softplus": Rule(
        F.softplus,
        lambda dy, y, beta, most: torch.where(y * beta > most, dy, dy * -torch.expm1(-y * beta)),
        lambda beta, most: most >= 20,  # where the sum of both branches is the same number
        widens=True,
    ),
    "softshrink": Rule(
        F.softshrink, lambda dy, y, lambd: torch.where(y == 0, 0.0, dy), _is_exact, rounds=("gradient",)
    ),
    "softsign": Rule(F.softsign, lambda dy, y: dy * (1 - y.abs()).square()),
    "swish": Rule(lambda x, factor: x * torch.sigmoid(factor * x)),
    "tanh": Rule(torch.tanh, lambda dy, y: dy * (1 - y * y), keeps="output"),
    "tanhshrink": Rule(F.tanhshrink),
    "threshold": Rule(
        F.threshold,
        lambda dy, y, most, value: torch.where(y <= most, 0.0, dy),
        lambda most, value: value <= most and _is_exact(value),
        inplace=True,
    ),
}
"""Every activation by its name."""


@value
class Activation(NamedTuple):
    """An activation, compared, hashed and passed to kernels by value: LeakyReLU(0.1) is not LeakyReLU(0.2)."""

    function: str
    args: tuple[float, ...] = ()

    @property
    def saves(self) -> str:
        """What its derivative is computed from where it is part of another kernel: "output" wherever that is enough, which the
        next layer saves as well."""
        rule = RULES[self.function]
        return "output" if rule.gradient is not None and rule.output_is_enough(*self.args) else "input"

    @property
    def joins(self) -> bool:
        """Whether it may be part of another kernel now, which computes with the options as they are."""
        rule = RULES[self.function]
        return not (rule.widens and any_autocast()) and not (rule.rounds and not all(map(_is_exact, self.args)))

    def rounded(self, of: str, dtype: torch.dtype) -> Activation:
        """With the options from which torch computes the "value" or the "gradient" in this dtype."""
        if of not in RULES[self.function].rounds:
            return self
        return self._replace(args=tuple([_rounded(number, dtype) for number in self.args]))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """By torch's function."""
        return RULES[self.function].torch(x, *self.args)

    def differentiate(self, dy: torch.Tensor, saved: torch.Tensor, of: str | None = None) -> torch.Tensor:
        """dx from dy and what is saved, in differentiable functions of torch.

        Args:
            of: whether that is the "input" or the "output", where it isn't what `saves` says.
        """
        rule = RULES[self.function]
        if rule.gradient is not None and (of or self.saves) == "output":
            return rule.gradient(dy, saved, *self.args)
        with torch.enable_grad():
            x = saved.view_as(saved) if saved.requires_grad else saved.detach().requires_grad_()
            return torch.autograd.grad(self(x), x, dy, create_graph=True)[0]


# --- what a call of torch's function stands for --------------------------------------------------------------------------------


class Refused(ValueError):
    """The kernels don't take these options; its argument is the reason."""


def _numbers(*args: Any) -> tuple[float, ...]:
    for arg in args:
        if not isinstance(arg, (int, float)):
            raise Refused(BadInput(f"{type(arg).__name__} is not a number"))
    return tuple([float(arg) for arg in args])


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise Refused(reason)


def _celu(alpha: Any = 1.0, inplace: bool = False) -> Activation:
    (alpha,) = _numbers(alpha)
    _require(alpha != 0, BadInput("alpha is 0"))
    _require(alpha > 0, "an alpha that isn't positive")
    return Activation("celu", (alpha,))


def _gelu(approximate: Any = "none") -> Activation:
    _require(approximate in ("none", "tanh"), BadInput(f"approximate {approximate!r}"))
    return Activation("gelu" if approximate == "none" else "gelu_tanh")


def _hardtanh(min_val: Any = -1.0, max_val: Any = 1.0, inplace: bool = False) -> Activation:
    bounds = _numbers(min_val, max_val)
    _require(bounds[0] <= bounds[1], BadInput(f"bounds {bounds}"))
    return Activation("hardtanh", bounds)


def _softplus(beta: Any = 1.0, threshold: Any = 20.0) -> Activation:
    args = _numbers(beta, threshold)
    _require(args[0] > 0, "a beta that isn't positive")
    return Activation("softplus", args)


def _softshrink(lambd: Any = 0.5) -> Activation:
    (lambd,) = _numbers(lambd)
    _require(0 <= lambd < math.inf, BadInput(f"lambd {lambd}"))
    return Activation("softshrink", (lambd,))


CALLS: dict[str, Callable[..., Activation]] = {
    "celu": _celu,
    "elu": lambda alpha=1.0, inplace=False: Activation("elu", _numbers(alpha)),
    "gelu": _gelu,
    "hardshrink": lambda lambd=0.5: Activation("hardshrink", _numbers(lambd)),
    "hardsigmoid": lambda inplace=False: Activation("hardsigmoid"),
    "hardswish": lambda inplace=False: Activation("hardswish"),
    "hardtanh": _hardtanh,
    "leaky_relu": lambda negative_slope=0.01, inplace=False: Activation("leaky_relu", _numbers(negative_slope)),
    "logsigmoid": lambda: Activation("logsigmoid"),
    "mish": lambda inplace=False: Activation("mish"),
    "relu": lambda inplace=False: Activation("relu"),
    "relu6": lambda inplace=False: Activation("relu6"),
    "selu": lambda inplace=False: Activation("selu"),
    "sigmoid": lambda: Activation("sigmoid"),
    "silu": lambda inplace=False: Activation("silu"),
    "softplus": _softplus,
    "softshrink": _softshrink,
    "softsign": lambda: Activation("softsign"),
    "swish": lambda factor: Activation("swish", _numbers(factor)),
    "tanh": lambda: Activation("tanh"),
    "tanhshrink": lambda: Activation("tanhshrink"),
    "threshold": lambda threshold, value, inplace=False: Activation("threshold", _numbers(threshold, value)),
}
"""By the name of torch's function, the value that a call of it stands for, given the arguments after the first. Arguments that it
doesn't have are a TypeError; what the kernels don't take is `Refused`."""


def joined(function: str, *args: Any) -> Activation | None:
    """The value that a layer stands for which calls torch's function with these arguments; None if it can't be part of another
    kernel now."""
    try:
        activation = CALLS[function](*args)
    except (TypeError, ValueError):
        return None
    return activation if activation.joins else None


class Pointwise(Operation):
    """One operation for all activations."""

    tensors = ("input",)
    compiled = False  # Inductor fuses them with whatever stands around them

    class Options(NamedTuple):
        activation: Activation
        inplace: bool

    def reference(self, input: Any, activation: Activation, inplace: bool) -> Any:
        rule = RULES[activation.function]
        return rule.torch(input, *activation.args, inplace=True) if inplace and rule.inplace else activation(input)

    def label(self, options: Options) -> str:
        return options.activation.function

    def probe(self, options: Options) -> Any:
        return options.activation

    def unsupported(self, t: Any, options: Options) -> str | None:
        if options.inplace and options.activation.saves == "input" and wants_grad(t.input):
            return "writing into what the derivative needs"
        most = torch.finfo(t.input.dtype).max
        if RULES[options.activation.function].rounds and any(most < abs(a) < math.inf for a in options.activation.args):
            return BadInput(f"options {options.activation.args} in {t.input.dtype}")
        return None

    def mutates(self, options: Options) -> tuple[str, ...]:
        return ("input",) if options.inplace else ()

    def outputs(self, t: Any, options: Options, needs: Any) -> dict[str, Out | str]:
        if options.inplace:
            return {"output": "input"}
        x = t.input
        contiguous = RULES[options.activation.function].contiguous and x.device.type == "cpu"
        return {"output": Out(tuple(x.shape), x.dtype) if contiguous else Out.pointwise(x)}

    def forward(self, t: Any, out: Named, options: Options, precision: str) -> None:
        kernels.pointwise(t.input, out.output, options.activation.rounded("value", t.input.dtype))

    def _kept(self, options: Options) -> str:
        return options.activation.saves if options.inplace else RULES[options.activation.function].keeps

    def saves(self, t: Any, options: Options, needs: Any) -> tuple[str, ...]:
        return (self._kept(options),)

    def gradients(self, like: Any, options: Options, needs: Any) -> tuple[Out | int | str | None, ...]:
        return (Out.pointwise(like.input),)

    def backward(self, grads: Any, dy: Named, saved: Named, options: Options, precision: str) -> None:
        of = self._kept(options)
        activation = options.activation.rounded("gradient", saved[of].dtype)
        kernels.pointwise_grad(dy.output, saved[of], grads.input, activation, of)

    def differentiate(self, dy: Named, saved: Named, like: Any, options: Options, needs: Any) -> Tensors:
        of = self._kept(options)
        return (options.activation.differentiate(dy.output, saved[of], of),)


_pointwise = Pointwise()


@functools.lru_cache(maxsize=4096, typed=True)
def _options(function: str, args: tuple[Any, ...], inplace: bool) -> Any:
    """Always the same object for the same arguments."""
    return _pointwise.options(CALLS[function](*args), inplace)


def applied(function: str, input: torch.Tensor, args: Sequence[Any] = (), inplace: bool = False) -> torch.Tensor:
    """torch.nn.functional's function of this name."""

    def reference() -> torch.Tensor:
        more: Any = {"inplace": inplace} if inplace else {}
        return getattr(F, function)(input, *args, **more)

    if is_dynamo_compiling():
        return reference()
    try:
        options = _options(function, tuple(args), bool(inplace))
    except Refused as refused:
        return run_reference(function, refused.args[0], reference)
    except TypeError:  # a number that can't be hashed
        return run_reference(function, BadInput(f"options {args}"), reference)
    return _pointwise.run((input,), options)
