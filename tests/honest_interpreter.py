"""Triton's interpreter, computing what a GPU computes.

Left alone, the interpreter (triton 3.6, 3.7) truncates casts to bfloat16, computes with bfloat16's bits as integers,
multiplies tf32 operands, and those split for tf32x3, in full float32, keeps a NaN that the GPU's maximum drops, ignores
device_assert and integer overflow, and accepts products that the compiler rejects. Tests that pass there would prove
little. `install` mends it in place; the kernels know nothing of it.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.runtime import interpreter

from fastlayers.kernels.runtime import launch as _launch

Builder: Any = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


@functools.cache
def install() -> None:
    """Mend the interpreter for the rest of this process; from then on bfloat16 is exact."""
    for name in ("unary_op", "binary_op", "ternary_op", "create_fma", "create_erf", "create_rsqrt"):
        setattr(Builder, name, _through_float32(getattr(Builder, name)))
    Builder.get_bf16 = lambda self, value: Handle(round_to_bfloat16(np.array([value])), tl.bfloat16)
    Builder.cast_impl = _cast(Builder.cast_impl)
    Builder.create_dot = _dot(Builder.create_dot)

    # maxnum, what tl.maximum asks for unless told to propagate NaN, drops it; so do clamp and the reductions.
    Builder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    Builder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
    Builder.create_clampf = _clamp(Builder.create_clampf)
    interpreter.ReduceOps.sum = _sum(interpreter.ReduceOps.sum)

    # device_assert, and with it the check that integers don't wrap.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = min_dot_size(GPUTarget("cuda", 90, 32))

    _launch.bfloat16_is_exact = True


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of x rounded to bfloat16, to nearest, ties to even; NaN becomes torch's NaN."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    # Half a unit, less one bit if the last kept bit is even: a tie then carries only into an odd number.
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 whose upper half is `bits`."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def truncate_to_tf32(x: np.ndarray) -> np.ndarray:
    """x without its 13 last bits: tensor cores don't look at them, and Triton doesn't round before."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """x rounded to tf32, to nearest, ties away from zero: cvt.rna.tf32. What lies above its greatest becomes infinite."""
    rounded = (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(x), x, rounded.view(np.float32))


def multiply_tf32x3(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b as Triton compiles it for input_precision="tf32x3": each factor is a tf32 number and what is left of it, and
    of the four products the least is left out. Where infinite factors make the corrections NaN, these are dropped.

    Sums are numpy's in float32; those of a tensor core are coarser.
    """
    (a_big, a_small), (b_big, b_small) = (
        (big, truncate_to_tf32(x - big)) for x in (a, b) for big in [round_to_tf32(x)]
    )
    small = np.matmul(a_big, b_small) + np.matmul(a_small, b_big)
    return np.matmul(a_big, b_big) + np.where(np.isnan(small), np.float32(0), small)


def _is_bfloat16(x: object) -> bool:
    return isinstance(x, Handle) and x.dtype.scalar == tl.bfloat16


def _widened(x: Any) -> Any:
    return Handle(widen_bfloat16(x.data), tl.float32) if _is_bfloat16(x) else x


def _through_float32(method: Callable) -> Callable:
    """`method`, with bfloat16 operands widened to float32 and a float32 result rounded back."""

    @functools.wraps(method)
    def compute(self, *args):
        if not any(map(_is_bfloat16, args)):
            return method(self, *args)
        result = method(self, *map(_widened, args))
        if result.data.dtype != np.float32:  # a comparison
            return result
        return Handle(round_to_bfloat16(result.data), tl.bfloat16)

    return compute


def _cast(method: Callable) -> Callable:
    @functools.wraps(method)
    def cast(self, source, dtype):
        if dtype.scalar != tl.bfloat16:
            return method(self, _widened(source), dtype)
        return source if _is_bfloat16(source) else Handle(round_to_bfloat16(source.data), tl.bfloat16)

    return cast


def _dot(method: Callable) -> Callable:
    @functools.wraps(method)
    def dot(self, a, b, accumulator, precision, *rest):
        if precision == interpreter._ir.INPUT_PRECISION.TF32 and a.dtype.scalar == tl.float32:
            a, b = (Handle(truncate_to_tf32(x.data), tl.float32) for x in (a, b))
        if precision == interpreter._ir.INPUT_PRECISION.TF32x3 and a.dtype.scalar == tl.float32:
            return Handle(multiply_tf32x3(a.data, b.data) + accumulator.data, tl.float32)
        return method(self, _widened(a), _widened(b), accumulator, precision, *rest)

    return dot


def _clamp(method: Callable) -> Callable:
    @functools.wraps(method)
    def clamp(self, x, low, high, propagate_nan):
        if propagate_nan == tl.PropagateNan.ALL:
            return method(self, x, low, high, propagate_nan)
        return self.create_minnumf(self.create_maxnumf(x, low), high)

    return clamp


def _sum(method: Callable) -> Callable:
    @functools.wraps(method)
    def sum(self, input):
        if input.dtype in (tl.bfloat16, tl.float16):
            raise TypeError(f"tl.sum of {input.dtype} adds up in {input.dtype} on a GPU: convert to float32 first")
        return method(self, input)

    return sum
