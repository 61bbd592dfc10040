"""Small kernels like those of Triton's tutorials, for the machine's own tests: each with a function that calls it and says
whether the result is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

Sample = Callable[[], bool]


@triton.jit
def _add(x_ptr, y_ptr, z_ptr, n, BLOCK: tl.constexpr, BEYOND: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n + BEYOND
    tl.store(z_ptr + i, tl.load(x_ptr + i, mask=inside) + tl.load(y_ptr + i, mask=inside), mask=inside)


@triton.jit
def _softmax(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr, HINT: tl.constexpr):
    row = tl.program_id(0)
    begin = row * stride
    if HINT:
        begin = tl.multiple_of(begin, 16)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + begin + i, mask=i < n, other=float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * stride + i, e / tl.sum(e, 0), mask=i < n)


@triton.jit
def _greatest(x_ptr, y_ptr, z_ptr, n, BLOCK: tl.constexpr, NAN: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i, mask=i < n), tl.load(y_ptr + i, mask=i < n)
    propagate: tl.constexpr = tl.PropagateNan.ALL if NAN else tl.PropagateNan.NONE
    tl.store(z_ptr + i, tl.maximum(x, y, propagate_nan=propagate), mask=i < n)


@triton.jit
def _matmul(
    a_ptr, b_ptr, c_ptr, M, N, K, a_m, b_k, c_m,
    PRECISION: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, TILE_N)
    m = tl.program_id(0) // tiles * TILE_M + tl.arange(0, TILE_M)
    n = tl.program_id(0) % tiles * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    for start in range(0, K, TILE_K):
        inside = start + k < K
        a_inside, b_inside = (m < M)[:, None] & inside[None, :], (n < N)[None, :] & inside[:, None]
        a = tl.load(a_ptr + m[:, None] * a_m + (start + k)[None, :], mask=a_inside, other=0.0)
        b = tl.load(b_ptr + (start + k)[:, None] * b_k + n[None, :], mask=b_inside, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(c_ptr + m[:, None] * c_m + n[None, :], acc.to(c_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _matmul_tma(a, b, c, M, N, K, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr):
    tiles = tl.cdiv(N, TILE_N)
    m, n = tl.program_id(0) // tiles * TILE_M, tl.program_id(0) % tiles * TILE_N
    acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    for k in range(0, K, TILE_K):
        acc = tl.dot(a.load([m, k]), b.load([k, n]), acc)
    c.store([m, n], acc.to(tl.bfloat16))


@triton.jit
def _chain(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    pid = tl.program_id(0)
    x = tl.load(x_ptr + pid * BLOCK + i)
    tl.store(x_ptr + (pid + 1) * BLOCK + i, x + 1)


@triton.jit
def _equal(t_ptr, y_ptr, number, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, (tl.load(t_ptr + i) == number).to(tl.int32))


@triton.jit
def _sums(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    tl.store(y_ptr + m, tl.sum(tl.load(x_ptr + m[:, None] * N + n[None, :]), axis=1))


@triton.jit
def _copies_in_a_loop(out_ptr, n):
    stage = n * 0
    before = stage
    for i in range(n):
        tl.store(out_ptr + i, before)
        before = stage
        stage += 1


def _close(got: torch.Tensor, want: torch.Tensor, tolerance: float, size: torch.Tensor | None = None) -> bool:
    """`size`: that of the terms whose sum `want` is, against which a sum that cancels is judged."""
    size = 1 + want.double().abs() if size is None else size
    return bool(((got.double() - want.double()).abs() <= tolerance * size).all())


def add(n: int = 1000, beyond: int = 0) -> bool:
    x, y, z = torch.randn(n), torch.randn(n), torch.empty(n)
    _add[(-(-n // 256),)](x, y, z, n, BLOCK=256, BEYOND=beyond)
    return torch.equal(z, x + y)


def softmax(n: int = 500, stride: int = 512, hint: bool = False) -> bool:
    x, y = torch.randn(5, stride), torch.full((5, stride), 7.0)
    _softmax[(5,)](x, y, n, stride, BLOCK=1024, HINT=hint)
    return _close(y[:, :n], x[:, :n].softmax(1), 1e-6) and bool((y[:, n:] == 7).all())


def greatest(nan: bool) -> bool:
    x, y, z = torch.randn(300), torch.randn(300), torch.empty(300)
    x[3], y[5] = float("nan"), float("nan")
    _greatest[(2,)](x, y, z, 300, BLOCK=256, NAN=nan)
    want = torch.maximum(x, y) if nan else torch.fmax(x, y)
    return torch.equal(z.nan_to_num(99), want.nan_to_num(99))


def product(
    dtype: torch.dtype = torch.bfloat16,
    precision: str = "ieee",
    tile: tuple[int, int, int] = (64, 64, 32),
    warps: int = 4,
    m: int = 100,
    n: int = 136,
    k: int = 176,
) -> bool:
    a, b, c = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.empty(m, n, dtype=dtype)
    sizes: Any = dict(zip(("TILE_M", "TILE_N", "TILE_K"), tile, strict=True))
    count = -(-m // tile[0]) * -(-n // tile[1])
    _matmul[(count,)](a, b, c, m, n, k, k, n, n, PRECISION=precision, **sizes, num_warps=warps, num_stages=3)
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-9 if precision == "tf32" else 2**-20}
    a, b = a.double(), b.double()
    return _close(c, a @ b, tolerance[dtype], a.abs() @ b.abs())


def product_tma(m: int = 100, n: int = 136, k: int = 176, tile: tuple[int, int, int] = (64, 128, 64)) -> bool:
    a, b, c = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16(), torch.zeros(m, n).bfloat16()
    blocks = (a, tile[0], tile[2]), (b, tile[2], tile[1]), (c, tile[0], tile[1])
    described = [TensorDescriptor(t, [*t.shape], [*t.stride()], [rows, columns]) for t, rows, columns in blocks]
    count = -(-m // tile[0]) * -(-n // tile[1])
    _matmul_tma[(count,)](*described, m, n, k, TILE_M=tile[0], TILE_N=tile[1], TILE_K=tile[2])
    return _close(c, a.double() @ b.double(), 2**-8)


def chain() -> bool:
    """Each program reads what the one before wrote."""
    _chain[(5,)](torch.zeros(6, 128), BLOCK=128)
    return True


def negative() -> bool:
    """A parameter of 32 bits that is compared with numbers of 64."""
    t, y = torch.tensor([-100, 100, 2**32 - 100, -100] * 32), torch.empty(128, dtype=torch.int32)
    _equal[(1,)](t, y, -100, BLOCK=128)
    return torch.equal(y, (t == -100).int())


def sums_of_nans() -> bool:
    """Several warps write each sum, of NaNs with different bits too."""
    x, y = torch.randn(8, 256), torch.empty(8)
    x.view(torch.int32)[3, ::3] = torch.arange(86, dtype=torch.int32) + 0x7FC00000
    _sums[(1,)](x, y, M=8, N=256)
    return bool(y[3].isnan()) and _close(y[4:], x[4:].double().sum(1), 2**-20, x[4:].abs().double().sum(1))


def carried() -> list[int]:
    """What Triton makes of a variable that a loop begins with another one's value: Python says 0 0 1 2 3 4."""
    out = torch.zeros(6, dtype=torch.int32)
    _copies_in_a_loop[(1,)](out, 6)
    return out.tolist()
