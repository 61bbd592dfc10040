"""Activations and their derivatives, as functions of a tile in registers.

Each activation is a pair of tile functions, `name(x, A)` and `name_grad(dy, saved, A)`, where `saved` is its input or its
output. Where it may be either, and the formulas differ, there are `name_grad_of_input` and `name_grad_of_output`. The
stand-alone kernels, the epilogues of matrix products and convolutions, and their backward passes all call the same
functions, so that an activation is written once.

A holds the activation's options, as two numbers of the tile's dtype: they are arguments of the kernel, so that another slope
needs no other kernel. A tile comes in its accumulation dtype (float32, or float64), never in 16 bits.

In float32 the formulas take few instructions, since in 16 bits an activation is limited by these and not by memory: an
exponential is a power of two, and erf, tanh, expm1 and log1p are short polynomials, fitted to float64. In float64 nothing is
approximated. Comparisons are written so that NaN takes the branch that it takes in torch.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .runtime import launch

_INTERPRETED = tl.constexpr(launch.INTERPRETED)
# Of x * x, this is log2 of exp(x**2 / 2). In float32, exponentials here are powers of two: tl.exp2 takes three instructions,
# tl.exp seven, because it is exact for subnormal results.
_HALF_LOG2_E = tl.constexpr(0.7213475204444817)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def relu(x, A):
    # Not tl.maximum(x, 0) nor tl.where(x > 0, x, 0): both compile to an instruction that turns NaN into 0.
    return tl.where(x < 0, 0.0, x)


@triton.jit
def relu_grad(dy, y, A):
    # torch's rule: a NaN output passes the gradient on.
    return tl.where(y <= 0, 0.0, dy)


@triton.jit
def _reciprocal(x):
    """1 / x in float32 for x >= 1, with an error of 2 ulp; 0 for x >= 2**126. It takes three instructions, `/` takes ten.
    Triton's interpreter has no libdevice."""
    return 1 / x if _INTERPRETED else libdevice.fast_dividef(1.0, x)


@triton.jit
def _normal_cdf(x):
    """The probability that a standard normal variable is less than x: erfc(-x / sqrt(2)) / 2.

    In float32 erfc(z) is t exp(p(t) - z**2) with t = 1 / (1 + z/2), for z >= 0, after W. H. Press et al., Numerical Recipes,
    section 6.2, with the polynomial fitted anew for powers of two. Its relative error is 5e-8, also in the tail, where
    1 + erf has no digits left, and GELU takes 24 instructions with it, where tl.erf alone takes 30.
    """
    if x.dtype == tl.float64:
        p = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    else:
        t = _reciprocal(1 + tl.abs(x) * 0.35355338)
        p = 2.9291582 + t * (-1.1752001 + t * 0.18791196)
        p = -0.64459544 + t * (1.91377497 + t * (-3.52214527 + t * p))
        p = -1.8245493 + t * (1.4206152 + t * (0.71502984 + t * p))
        half = 0.5 * t * tl.exp2(p - x * x * _HALF_LOG2_E)
        p = tl.where(x < 0, half, 1 - half)
    return p


@triton.jit
def gelu(x, A):
    # As in torch, -inf gives -inf * 0 = NaN.
    return x * _normal_cdf(x)


@triton.jit
def gelu_grad(dy, x, A):
    if x.dtype == tl.float64:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        density = 0.3989423 * tl.exp2(-(x * x * _HALF_LOG2_E))
    return dy * (_normal_cdf(x) + x * density)


@triton.jit
def _sigmoids(x):
    """sigmoid(2u) and sigmoid(-2u), where u = sqrt(2/pi) (x + 0.044715 x**3) is the argument of the tanh in GELU's approximation.

    Both are computed from exp(-2 abs(u)), which can't overflow, so that they are exact also where they are nearly 0.
    """
    if x.dtype == tl.float64:
        e = tl.exp(-tl.abs(x) * (1.5957691216057308 + 0.07135481627260025 * x * x))
        smaller = e / (1 + e)
    else:
        e = tl.exp2(-tl.abs(x) * (2.302208198 + 0.10294324 * x * x))
        smaller = e * _reciprocal(1 + e)
    larger = 1 - smaller
    return tl.where(x < 0, smaller, larger), tl.where(x < 0, larger, smaller)


@triton.jit
def gelu_tanh(x, A):
    # (1 + tanh u) / 2 = sigmoid(2u).
    s, _ = _sigmoids(x)
    return x * s


@triton.jit
def gelu_tanh_grad(dy, x, A):
    s, rest = _sigmoids(x)
    # The sigmoids are multiplied first, because their product is 0 where the derivative of 2u overflows.
    return dy * (s + x * (s * rest) * (1.5957691216057308 + 0.21406444881780076 * x * x))


# --- pieces ------------------------------------------------------------------------------------------------------------------


@triton.jit
def _exp(x):
    """exp(x), in float32 0 where it would be subnormal."""
    return tl.exp(x) if x.dtype == tl.float64 else tl.exp2(x * _LOG2_E)


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, with all its digits also near 0."""
    if x.dtype == tl.float64:
        # W. Kahan: the error of u = exp(x), rounded, is the same in u - 1 and in log(u), and cancels.
        u = tl.exp(x)
        scale = tl.where(u == 1, 1.0, (u - 1) / tl.log(tl.where(u == 1, 2.0, u)))
        y = tl.where(u < 0.5, u - 1, x * scale)
    else:
        p = 0.041629087 + x * (0.008187385 + x * 0.0011216346)
        p = x * (1 + x * (0.49999982 + x * (0.16666225 + x * p)))
        y = tl.where(x > -0.5, p, tl.exp2(x * _LOG2_E) - 1)
    return y


@triton.jit
def _log1p_exp(x):
    """log(1 + exp(x)) for x <= 0, with all its digits also where it is nearly 0."""
    e = _exp(x)
    if x.dtype == tl.float64:
        u = 1 + e
        y = e * tl.where(u == 1, 1.0, tl.log(u) / tl.where(u == 1, 1.0, u - 1))  # as in _expm1
    else:
        p = -0.13663207 + e * (0.07822549 + e * (-0.029504957 + e * 0.0052326238))
        p = 0.33319095 + e * (-0.24842978 + e * (0.19105989 + e * p))
        y = e * (1 + e * (-0.49999493 + e * p))
    return y


@triton.jit
def _logistic(x):
    """1 / (1 + exp(-x))."""
    if x.dtype == tl.float64:
        y = 1 / (1 + tl.exp(-x))
    else:
        e = _exp(-tl.abs(x))
        smaller = e * _reciprocal(1 + e)
        y = tl.where(x < 0, smaller, 1 - smaller)
    return y


@triton.jit
def _clamp(x, least, most):
    return tl.where(x < least, least, tl.where(x > most, most, x))


# --- smooth ones -------------------------------------------------------------------------------------------------------------


@triton.jit
def sigmoid(x, A):
    return _logistic(x)


@triton.jit
def sigmoid_grad(dy, y, A):
    return dy * (1 - y) * y


@triton.jit
def sigmoid_grad_of_input(dy, x, A):
    return sigmoid_grad(dy, sigmoid(x, A), A)


@triton.jit
def tanh(x, A):
    if x.dtype == tl.float64:
        m = _expm1(-2 * tl.abs(x))
        y = m / (2 + m)
        y = tl.where(x < 0, y, -y)
    else:
        e = _exp(-2 * tl.abs(x))
        far = 1 - 2 * e * _reciprocal(
            1 + e
        )  # the error of the reciprocal vanishes where y is nearly 1, and 1 - y * y small
        t = x * x
        near = x + x * t * (-0.33332795 + t * (0.13318877 + t * (-0.052589316 + t * 0.016315436)))
        y = tl.where(tl.abs(x) < 0.55, near, tl.where(x < 0, -far, far))
    return y


@triton.jit
def tanh_grad(dy, y, A):
    return dy * (1 - y * y)


@triton.jit
def tanh_grad_of_input(dy, x, A):
    return tanh_grad(dy, tanh(x, A), A)


@triton.jit
def tanhshrink(x, A):
    return x - tanh(x, A)


@triton.jit
def tanhshrink_grad(dy, x, A):
    y = tanh(x, A)
    return dy * (y * y)


@triton.jit
def silu(x, A):
    # As in torch, -inf gives -inf * 0 = NaN.
    return x * _logistic(x)


@triton.jit
def silu_grad(dy, x, A):
    s = _logistic(x)
    return dy * (s * (1 + x * (1 - s)))


@triton.jit
def swish(x, A):
    return x * _logistic(x * A[0])


@triton.jit
def swish_grad(dy, x, A):
    s = _logistic(x * A[0])
    # The sigmoids are multiplied first, because their product is 0 where x times the factor overflows.
    return dy * (s + A[0] * (x * (s * (1 - s))))


@triton.jit
def _mish_parts(x):
    """e = exp(x), and n = e (e + 2) with 1 / (n + 2): tanh(log(1 + e)) = n / (n + 2). Beyond the bound it is 1 without e, whose
    square might overflow."""
    MOST: tl.constexpr = 350.0 if x.dtype == tl.float64 else 40.0
    e = _exp(tl.where(x > MOST, MOST, x))
    n = e * (e + 2)
    return e, n, 1 / (n + 2) if x.dtype == tl.float64 else _reciprocal(n + 2)


@triton.jit
def mish(x, A):
    _, n, r = _mish_parts(x)
    return x * (n * r)


@triton.jit
def mish_grad(dy, x, A):
    e, n, r = _mish_parts(x)
    # Far from 0, r * r is 0, so that infinities give inf * 0 = NaN, as in torch.
    return dy * (n * r + x * ((4 * e * (e + 1)) * (r * r)))


@triton.jit
def softplus(x, A):
    u = x * A[0]
    return tl.where(u > A[1], x, (tl.where(u < 0, 0.0, u) + _log1p_exp(-tl.abs(u))) * (1 / A[0]))


@triton.jit
def softplus_grad_of_output(dy, y, A):
    u = y * A[0]
    return tl.where(u > A[1], dy, dy * -_expm1(-u))


@triton.jit
def softplus_grad_of_input(dy, x, A):
    u = x * A[0]
    return tl.where(u > A[1], dy, dy * _logistic(u))


@triton.jit
def logsigmoid(x, A):
    return tl.where(x > 0, 0.0, x) - _log1p_exp(-tl.abs(x))


@triton.jit
def logsigmoid_grad_of_output(dy, y, A):
    return dy * -_expm1(y)


@triton.jit
def logsigmoid_grad_of_input(dy, x, A):
    return dy * _logistic(-x)


@triton.jit
def softsign(x, A):
    return x / (1 + tl.abs(x))


@triton.jit
def softsign_grad_of_output(dy, y, A):
    rest = 1 - tl.abs(y)
    return dy * (rest * rest)


@triton.jit
def softsign_grad_of_input(dy, x, A):
    r = 1 / (1 + tl.abs(x))
    return dy * (r * r + x * 0)  # as in torch, infinities give NaN


# --- exponential below 0, linear above ---------------------------------------------------------------------------------------


@triton.jit
def elu(x, A):
    return tl.where(x > 0, x, A[0] * _expm1(x))


@triton.jit
def elu_grad_of_output(dy, y, A):
    return tl.where(y <= 0, dy * (y + A[0]), dy)


@triton.jit
def elu_grad_of_input(dy, x, A):
    return tl.where(x <= 0, dy * (A[0] * _exp(x)), dy)


@triton.jit
def celu(x, A):
    return tl.where(x > 0, x, A[0] * _expm1(x * (1 / A[0])))


@triton.jit
def celu_grad_of_output(dy, y, A):
    return tl.where(y <= 0, dy * (y * (1 / A[0]) + 1), dy)


@triton.jit
def celu_grad_of_input(dy, x, A):
    return tl.where(x <= 0, dy * _exp(x * (1 / A[0])), dy)


_SELU_SCALE = tl.constexpr(1.0507009873554804934193349852946)
_SELU_BELOW = tl.constexpr(1.0507009873554804934193349852946 * 1.6732632423543772848170429916717)


@triton.jit
def selu(x, A):
    return tl.where(x > 0, x * _SELU_SCALE, _SELU_BELOW * _expm1(x))


@triton.jit
def selu_grad_of_output(dy, y, A):
    return tl.where(y <= 0, dy * (y + _SELU_BELOW), dy * _SELU_SCALE)


@triton.jit
def selu_grad_of_input(dy, x, A):
    return tl.where(x <= 0, dy * (_SELU_BELOW * _exp(x)), dy * _SELU_SCALE)


# --- piecewise linear --------------------------------------------------------------------------------------------------------


@triton.jit
def leaky_relu(x, A):
    return tl.where(x > 0, x, x * A[0])


@triton.jit
def leaky_relu_grad(dy, saved, A):
    # The output has the input's sign, unless the slope is negative.
    return tl.where(saved > 0, dy, dy * A[0])


@triton.jit
def relu6(x, A):
    return _clamp(x, 0.0, 6.0)


@triton.jit
def relu6_grad(dy, y, A):
    return tl.where((y <= 0) | (y >= 6), 0.0, dy)


@triton.jit
def hardtanh(x, A):
    return _clamp(x, A[0], A[1])


@triton.jit
def hardtanh_grad(dy, saved, A):
    return tl.where((saved <= A[0]) | (saved >= A[1]), 0.0, dy)


@triton.jit
def hardsigmoid(x, A):
    return _clamp(x + 3, 0.0, 6.0) * 0.16666666666666666


@triton.jit
def hardsigmoid_grad(dy, x, A):
    # torch's own constant, which is rounded to float32 in float64 as well.
    return tl.where((x > -3) & (x < 3), dy * 0.1666666716337204, 0.0)


@triton.jit
def hardswish(x, A):
    return x * _clamp(x + 3, 0.0, 6.0) * 0.16666666666666666


@triton.jit
def hardswish_grad(dy, x, A):
    return tl.where(x <= -3, 0.0, tl.where(x < 3, dy * (x * 0.3333333333333333 + 0.5), dy))


@triton.jit
def threshold(x, A):
    return tl.where(x <= A[0], A[1], x)


@triton.jit
def threshold_grad(dy, saved, A):
    return tl.where(saved <= A[0], 0.0, dy)


@triton.jit
def hardshrink(x, A):
    return tl.where((x >= -A[0]) & (x <= A[0]), 0.0, x)


@triton.jit
def hardshrink_grad(dy, saved, A):
    # An output of 0 lies between the bounds, as the input did; any other output is the input.
    return tl.where((saved >= -A[0]) & (saved <= A[0]), 0.0, dy)


@triton.jit
def softshrink(x, A):
    return tl.where(x > A[0], x - A[0], tl.where(x < -A[0], x + A[0], x * 0))


@triton.jit
def softshrink_grad_of_output(dy, y, A):
    return tl.where(y == 0, 0.0, dy)


@triton.jit
def softshrink_grad_of_input(dy, x, A):
    return tl.where((x >= -A[0]) & (x <= A[0]), 0.0, dy)
