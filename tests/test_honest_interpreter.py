"""The mended interpreter against torch, and against planted faults, each next to a correct twin."""

import warnings
from typing import Any

import honest_interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from fastlayers.kernels.runtime import launch as _launch

pytestmark = pytest.mark.skipif(not _launch.INTERPRETED, reason="mends the interpreter only")

BFLOAT16 = torch.bfloat16


@pytest.fixture(autouse=True, scope="module")
def _honest():
    honest_interpreter.install()


def _run(kernel: Any, programs, *args, **meta):
    _launch.launch(kernel, programs, *args, **meta)


def _every_kind_of_float32(size=2**16):
    """Random bits: every exponent, subnormals and NaN among them; then the special cases."""
    bits = torch.randint(-(2**31), 2**31, (size,), dtype=torch.int64).to(torch.int32)
    bits[::16] &= ~0x7F800000  # subnormal
    bits[1::16] |= 0x7F800000  # NaN
    bits[2::16] = bits[2::16] & ~0xFFFF | 0x8000  # halfway between two bfloat16
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), torch.finfo(torch.float32).max])
    bits[-len(special) :] = special.view(torch.int32)
    return bits.view(torch.float32)


def _every_bfloat16():
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BFLOAT16)


def _assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~expected.isnan()
    assert torch.equal(actual.signbit()[numbers], expected.signbit()[numbers])


@triton.jit
def _cast_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def _implicit_cast_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@pytest.mark.parametrize("kernel", [_cast_kernel, _implicit_cast_kernel])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_casts_to_bfloat16(kernel, dtype):
    x = _every_kind_of_float32().to(dtype)
    y = torch.empty_like(x, dtype=BFLOAT16)
    _run(kernel, 1, x, y, SIZE=len(x))
    _assert_same(y, x.to(BFLOAT16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_casts_from_bfloat16(dtype):
    x = _every_bfloat16()
    y = torch.empty_like(x, dtype=dtype)
    _run(_cast_kernel, 1, x, y, SIZE=len(x))
    _assert_same(y, x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.bool])
def test_casts_between_bfloat16_and_integers(dtype):
    x = torch.randint(-100, 100, (1024,))
    _run(_cast_kernel, 1, x.to(dtype), y := torch.empty(1024, dtype=BFLOAT16), SIZE=1024)
    _assert_same(y, x.to(dtype).to(BFLOAT16))
    _run(_cast_kernel, 1, x.to(BFLOAT16), z := torch.empty(1024, dtype=dtype), SIZE=1024)
    assert torch.equal(z, x.to(dtype))


@triton.jit
def _compute_kernel(x_ptr, y_ptr, z_ptr, results_ptr, comparisons_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x, y, z = tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)
    tl.store(results_ptr + i, x + y)
    tl.store(results_ptr + 1 * SIZE + i, x - y)
    tl.store(results_ptr + 2 * SIZE + i, x * y)
    tl.store(results_ptr + 3 * SIZE + i, x / y)
    tl.store(results_ptr + 4 * SIZE + i, -x)
    tl.store(results_ptr + 5 * SIZE + i, tl.abs(x))
    tl.store(results_ptr + 6 * SIZE + i, tl.where(x < y, x, z))
    tl.store(results_ptr + 7 * SIZE + i, tl.fma(x, y, z))
    tl.store(results_ptr + 8 * SIZE + i, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(results_ptr + 9 * SIZE + i, 0.7 * x + 1.1)
    tl.store(results_ptr + 10 * SIZE + i, tl.full((SIZE,), 3.14159, tl.bfloat16))
    tl.store(comparisons_ptr + i, x < y)
    tl.store(comparisons_ptr + SIZE + i, x == y)
    tl.store(comparisons_ptr + 2 * SIZE + i, (x != z) & (x >= y))


def test_bfloat16_arithmetic():
    x, y, z = (_every_bfloat16()[torch.randperm(2**16)] for _ in range(3))
    results = torch.empty(11, 2**16, dtype=BFLOAT16)
    comparisons = torch.empty(3, 2**16, dtype=torch.bool)
    _run(_compute_kernel, 1, x, y, z, results, comparisons, SIZE=2**16)
    scaled = (x * torch.tensor(0.7, dtype=BFLOAT16)) + torch.tensor(1.1, dtype=BFLOAT16)
    fma = (x.float() * y.float() + z.float()).to(BFLOAT16)
    pi = torch.full_like(x, 3.14159)
    expected = [x + y, x - y, x * y, x / y, -x, x.abs(), torch.where(x < y, x, z), fma, x.maximum(y), scaled, pi]
    for actual, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(comparisons, torch.stack([x < y, x == y, (x != z) & (x >= y)]))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, K: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, 16)
    k = tl.arange(0, K)
    a = tl.load(a_ptr + i[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * 16 + i[None, :])
    c = tl.dot(a, b, input_precision=PRECISION)
    tl.store(c_ptr + i[:, None] * 16 + i[None, :], c.to(c_ptr.dtype.element_ty))


def _dot(a, b, precision="ieee", dtype=torch.float32):
    c = torch.empty(16, 16, dtype=dtype)
    _run(_dot_kernel, 1, a, b, c, K=a.shape[1], PRECISION=precision)
    return c


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_bfloat16_dot(precision):
    a, b = torch.randn(16, 32, dtype=BFLOAT16), torch.randn(32, 16, dtype=BFLOAT16)
    torch.testing.assert_close(_dot(a, b, precision), a.float() @ b.float())
    _assert_same(_dot(a, b, precision, dtype=BFLOAT16), _dot(a, b, precision).to(BFLOAT16))


def test_tf32_dot_truncates_its_operands():
    """Small integers plus something that tf32 has no bits for: products and sums are exact in float32."""
    a, b = torch.randint(-9, 10, (16, 32)).float(), torch.randint(-9, 10, (32, 16)).float()
    fine = a + a.sign() * 2.0**-11 * a.abs().clamp(min=1).log2().floor().exp2()
    assert not torch.equal(fine, a)
    assert torch.equal(_dot(fine, b, "tf32"), a @ b)
    for precision in ("ieee", "tf32x3"):
        torch.testing.assert_close(_dot(fine, b, precision), fine @ b, rtol=1e-6, atol=1e-6)
        assert not torch.equal(_dot(fine, b, precision), a @ b)


def test_tf32_concerns_float32_only():
    for dtype in (torch.float16, BFLOAT16):
        a, b = torch.randn(16, 32).to(dtype), torch.randn(32, 16).to(dtype)
        assert torch.equal(_dot(a, b, "tf32"), _dot(a, b, "ieee"))


def test_dot_needs_16_products():
    a, b = torch.randn(16, 8), torch.randn(8, 16)
    with pytest.raises(InterpreterError, match="K >= 16"):
        _dot(a, b)


@triton.jit
def _sum_kernel(x_ptr, y_ptr, ACC: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 64))
    tl.store(y_ptr, tl.sum(x.to(ACC)).to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize(("dtype", "narrow"), [(BFLOAT16, tl.bfloat16), (torch.float16, tl.float16)])
def test_sum_in_16_bits(dtype, narrow):
    x, y = torch.randn(64).to(dtype), torch.empty(1)
    _run(_sum_kernel, 1, x, y, ACC=tl.float32)
    torch.testing.assert_close(y[0], x.float().sum())
    with pytest.raises(InterpreterError, match="convert to float32 first"):
        _run(_sum_kernel, 1, x, y, ACC=narrow)


@triton.jit
def _nan_kernel(x_ptr, y_ptr, PROPAGATE: tl.constexpr):
    i = tl.arange(0, 4)
    x = tl.load(x_ptr + i)
    propagate: tl.constexpr = tl.PropagateNan.ALL if PROPAGATE else tl.PropagateNan.NONE
    tl.store(y_ptr + i, tl.maximum(x, 0.0, propagate_nan=propagate))
    tl.store(y_ptr + 4 + i, tl.minimum(0.0, x, propagate_nan=propagate))
    tl.store(y_ptr + 8 + i, tl.clamp(x, -1.0, 1.0, propagate_nan=propagate))


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16, torch.float32, torch.float64])
def test_maximum_loses_nan_as_on_a_gpu(dtype):
    x = torch.tensor([float("nan"), -2.0, 3.0, float("inf")], dtype=dtype)
    y = torch.empty(3, 4, dtype=dtype)
    _run(_nan_kernel, 1, x, y, PROPAGATE=False)
    assert y.tolist() == [[0, 0, 3, float("inf")], [0, -2, 0, 0], [-1, -1, 1, 1]]
    _run(_nan_kernel, 1, x, y, PROPAGATE=True)
    assert y[:, 0].isnan().all()
    assert y[:, 1:].tolist() == [[0, 3, float("inf")], [-2, 0, 0], [-1, 1, 1]]


@triton.jit
def _extrema_kernel(x_ptr, y_ptr):
    x = tl.load(x_ptr + tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4)[None, :])
    tl.store(y_ptr + tl.arange(0, 4), tl.max(x, axis=1))
    tl.store(y_ptr + 4 + tl.arange(0, 4), tl.min(x, axis=1))
    tl.store(y_ptr + 8, tl.max(x))
    tl.store(y_ptr + 9 + tl.arange(0, 1)[None, :], tl.max(x, keep_dims=True))


def test_extrema_lose_nan_as_on_a_gpu():
    nan = float("nan")
    x = torch.tensor([[1.0, 2, 3, 4], [nan, 2, 3, 4], [1, nan, nan, nan], [nan, nan, nan, nan]])
    _run(_extrema_kernel, 1, x, y := torch.empty(10))
    torch.testing.assert_close(y, torch.tensor([4, 4, 1, nan, 1, 2, 1, nan, 4, 4]), equal_nan=True)


def test_arithmetic_without_a_number_is_silent():
    """As on a GPU; the suite makes an error of every warning."""

    @triton.jit
    def kernel(x_ptr, y_ptr):
        i = tl.arange(0, 16)
        x = tl.load(x_ptr + i)
        tl.store(y_ptr + i, (x - x) / 0.0 + tl.exp(-x) * tl.log(x) + x.to(tl.float16).to(tl.int32))

    with warnings.catch_warnings(), np.errstate(all="warn"):
        warnings.simplefilter("error")
        _run(kernel, 1, torch.full((16,), float("-inf")), y := torch.zeros(16))
    assert y.isnan().all()


@triton.jit
def _assert_kernel(x_ptr, LIMIT):
    i = tl.arange(0, 16)
    x = tl.load(x_ptr + i)
    tl.device_assert(x < LIMIT, "too large", mask=i < 12)


def test_device_assert():
    x = torch.arange(16)
    _run(_assert_kernel, 1, x, 12)
    with pytest.raises(InterpreterError, match="too large"):
        _run(_assert_kernel, 1, x, 11)


@triton.jit
def _product_kernel(y_ptr, a, b, WIDE: tl.constexpr):
    i = tl.program_id(0) * a
    if WIDE:
        i = i.to(tl.int64)
    tl.store(y_ptr + tl.program_id(0), i * b)


def test_integer_overflow():
    y = torch.zeros(3, dtype=torch.int64)
    _run(_product_kernel, 3, y, 2**15, 2**15 - 1, WIDE=False)
    assert y.tolist() == [0, 2**30 - 2**15, 2**31 - 2**16]
    _run(_product_kernel, 3, y, 2**15, 2**15, WIDE=True)
    assert y.tolist() == [0, 2**30, 2**31]
    with pytest.raises(InterpreterError, match="int32 overflow detected"):
        _run(_product_kernel, 3, y, 2**15, 2**15, WIDE=False)


@triton.jit
def _range_kernel(y_ptr, END, STEP: tl.constexpr):
    total = 0
    for start in range(0, END, STEP):
        total += start
    tl.store(y_ptr, total)


def test_range_to_a_runtime_end():
    """Fails on triton 3.6 with numpy 2.4, unmended."""
    _run(_range_kernel, 1, y := torch.zeros(1, dtype=torch.int32), 40, STEP=16)
    assert y.item() == 0 + 16 + 32


def test_installs_once():
    cast = honest_interpreter.Builder.cast_impl
    honest_interpreter.install()
    assert honest_interpreter.Builder.cast_impl is cast
    assert _launch.bfloat16_is_exact
