"""Arithmetic that NumPy lacks, on arrays of lanes.

Rounding is as the PTX ISA says. bfloat16 and packed halves are unsigned integers, and computed in float32 or float64.
"""

# The functions are called by code that generator.py writes, with arrays whose dtypes it knows.
from __future__ import annotations

import numpy as np

u4, f4, f8 = np.uint32, np.float32, np.float64
NAN32, NANBF = np.uint32(0x7FFFFFFF), np.uint16(0x7FFF)


def put(old, mask, values):
    """A copy of `old` with `values` where `mask` is true."""
    new = old.copy()
    new[mask] = values
    return new


def bf16(x):
    """bfloat16's bits as float32."""
    return (x.astype(u4) << 16).view(f4)


def to_bf16(x):
    """float32 to the bits of bfloat16, to the nearest even."""
    b = np.ascontiguousarray(x, f4).view(u4)
    r = ((b + (((b >> 16) & 1) + u4(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), NANBF, r)


def f32_to_bf16(x, mode):
    if mode != "rz":
        return to_bf16(x)
    return np.where(np.isnan(x), NANBF, (np.ascontiguousarray(x).view(u4) >> 16).astype(np.uint16))


def odd32(x):
    """float64 to float32, inexact ones to the odd neighbour: rounding that again is as rounding once."""
    y = x.astype(f4)
    back = y.astype(f8)
    bits = y.view(u4).copy()
    away = np.abs(back) > np.abs(x)
    bits = np.where((back != x) & ~np.isnan(x), np.where(away, bits - u4(1), bits) | u4(1), bits)
    return bits.view(f4)


def f64_to_bf16(x):
    return to_bf16(odd32(x))


def ftz(x):
    """Subnormal numbers as zeros of their sign."""
    return np.where(np.abs(x) < f4(1.17549435e-38), np.copysign(f4(0), x), x)


def fma32(a, b, c):
    """With a single rounding."""
    p = a.astype(f8) * b  # exact
    s = p + c
    bits = s.view(np.uint64)
    if ((bits & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)).any():  # halfway: the second rounding would matter
        t = s - p
        err = (p - (s - t)) + (c - t)
        fix = (err != 0) & np.isfinite(s) & ((bits & np.uint64(1)) == 0)
        same = (err > 0) == (s > 0)
        bits = np.where(fix, np.where(same, bits | np.uint64(1), bits - np.uint64(1)), bits)
        s = bits.view(f8)
    return s.astype(f4)


def _exact_product(a, b):
    """a * b in float64, and its rounding error: Dekker's product."""
    p = a * b
    split = f8(134217729.0)
    ah = a * split
    ah = ah - (ah - a)
    bh = b * split
    bh = bh - (bh - b)
    al, bl = a - ah, b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def fma64(a, b, c):
    """To within half a unit and a hair: product and sum are each split into two exact parts."""
    p, e = _exact_product(a, b)
    s = p + c
    t = s - p
    err = (p - (s - t)) + (c - t)
    r = s + (err + e)
    return np.where(np.isfinite(r), r, s)


def fma16(a, b, c):
    return odd32(a.astype(f8) * b.astype(f8) + c.astype(f8)).astype(np.float16)


def fma_bf16(a, b, c):
    return odd32(a.astype(f8) * b.astype(f8) + c.astype(f8))


def halves(kind, x):
    """The two numbers that each element of x packs."""
    lo, hi = x.astype(np.uint16), (x >> 16).astype(np.uint16)
    if kind == "bf16x2":
        return bf16(lo), bf16(hi)
    if kind == "f16x2":
        return lo.view(np.float16).astype(f4), hi.view(np.float16).astype(f4)
    return lo, hi


def joined(kind, lo, hi):
    """Two numbers packed into one element."""
    if kind == "bf16x2":
        lo, hi = to_bf16(lo), to_bf16(hi)
    elif kind == "f16x2":
        lo, hi = lo.astype(np.float16).view(np.uint16), hi.astype(np.float16).view(np.uint16)
    return lo.astype(u4) | (hi.astype(u4) << 16)


def packed(kind, f, x, y):
    """f of packed numbers, half by half."""
    (a, b), (c, d) = halves(kind, x), halves(kind, y)
    return joined(kind, f(a, c), f(b, d))


def packed_exact(kind, op, x):
    a, b = halves(kind, x)
    return joined(kind, exact(op, a), exact(op, b))


def packed_fma(kind, x, y, z, relu=False):
    out = []
    for a, b, c in zip(halves(kind, x), halves(kind, y), halves(kind, z), strict=True):
        v = odd32(a.astype(f8) * b.astype(f8) + c.astype(f8))
        out.append(np.maximum(v, 0) if relu else v)
    return joined(kind, *out)


def converted_pair(kind, mode, upper, lower, relu=False):
    out = []
    for x in (lower, upper):
        if relu:
            x = np.maximum(x, f4(0))
        if kind == "bf16x2":
            out.append(f32_to_bf16(x, mode))
        else:
            out.append((x if mode == "rn" else directed("rz", x, "f2")).astype(np.float16).view(np.uint16))
    return out[0].astype(u4) | (out[1].astype(u4) << 16)


def to_tf32(mode, bits):
    """float32 with 10 bits of fraction, as bits."""
    special = (bits & u4(0x7F800000)) == u4(0x7F800000)
    if mode == "rz":
        return np.where(special, bits, bits & u4(0xFFFFE000))
    if mode == "rna":
        return np.where(special, bits, (bits + u4(0x1000)) & u4(0xFFFFE000))
    return np.where(special, bits, (bits + u4(0xFFF) + ((bits >> 13) & 1)) & u4(0xFFFFE000))  # rn


def directed(mode, x, to):
    """Rounding towards zero, down or up."""
    y = x.astype(to)
    back = y.astype(x.dtype)
    if mode == "rz":
        return np.where(np.abs(back) > np.abs(x), np.nextafter(y, np.array(0, to)), y)
    if mode == "rm":
        return np.where(back > x, np.nextafter(y, np.array(-np.inf, to)), y)
    return np.where(back < x, np.nextafter(y, np.array(np.inf, to)), y)


def to_integer(x, to):
    """An integral number as an integer: NaN is 0, and what doesn't fit is the nearest that does."""
    i = np.iinfo(to)
    x = np.where(np.isnan(x), 0, x).astype(f8)
    out = np.clip(x, float(i.min), float(i.max))
    return np.where(x >= float(i.max), i.max, np.where(x <= float(i.min), i.min, out.astype(to))).astype(to)


def saturated(x, to):
    i = np.iinfo(to)
    return np.clip(x, max(i.min, np.iinfo(x.dtype).min), min(i.max, np.iinfo(x.dtype).max)).astype(to)


def exact(op, x):
    """What GPUs approximate, exact to a rounding."""
    y = x.astype(f8)
    functions = {
        "ex2": np.exp2, "lg2": np.log2, "rcp": lambda v: 1 / v, "rsqrt": lambda v: 1 / np.sqrt(v), "sqrt": np.sqrt,
        "tanh": np.tanh, "sin": np.sin, "cos": np.cos,
    }  # fmt: skip
    return functions[op](y).astype(x.dtype)


def compared(kind, x, y):
    """A comparison of floating numbers; one whose name ends in u is true for NaN."""
    nan = np.isnan(x) | np.isnan(y)
    if kind == "nan":
        return nan
    if kind == "num":
        return ~nan
    base = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    }  # fmt: skip
    if kind == "ne":
        return (x != y) & ~nan
    if kind in base:
        return base[kind](x, y)
    return base[kind[:-1]](x, y) | nan


def compared_pairs(kind, how, x, y):
    (a, b), (c, d) = halves(kind, x), halves(kind, y)
    return compared(how, a, c), compared(how, b, d)


def testp(kind, x):
    functions = {
        "finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan, "number": lambda v: ~np.isnan(v),
    }  # fmt: skip
    return functions[kind](x)


def shl(x, n):
    """Shifted by any amount: by its width or more it is 0."""
    bits = x.dtype.itemsize * 8
    n = np.asarray(n)
    return np.where(n < bits, x << (n & (bits - 1)).astype(x.dtype), x.dtype.type(0))


def shr(x, n):
    bits = x.dtype.itemsize * 8
    n = np.minimum(np.asarray(n), bits - 1) if x.dtype.kind == "i" else np.asarray(n)
    y = x >> (n & (bits - 1)).astype(x.dtype)
    return y if x.dtype.kind == "i" else np.where(n < bits, y, x.dtype.type(0))


def div(x, y):
    """Towards zero; by zero all ones, as GPUs do."""
    x, y = np.broadcast_arrays(x, y)
    zero = y == 0
    safe = np.where(zero, y.dtype.type(1), y)
    q = x // safe
    if x.dtype.kind == "i":
        q = q + ((q < 0) & (q * safe != x)).astype(x.dtype)
    return np.where(zero, x.dtype.type(-1) if x.dtype.kind == "i" else ~x.dtype.type(0), q)


def rem(x, y):
    x, y = np.broadcast_arrays(x, y)
    return np.where(y == 0, x, x - div(x, y) * y)


def mulhi64(x, y):
    """The upper half of a product of 64 bits."""
    if x.dtype.kind == "i" or getattr(y, "dtype", x.dtype).kind == "i":
        ux, uy = np.asarray(x).view(np.uint64), np.asarray(y).view(np.uint64)
        h = mulhi64(ux, uy)
        h = h - np.where(np.asarray(x) < 0, uy, np.uint64(0)) - np.where(np.asarray(y) < 0, ux, np.uint64(0))
        return h.view(np.int64)
    m = np.uint64(0xFFFFFFFF)
    a, b, c, d = x >> 32, x & m, y >> np.uint64(32), y & m
    bd, ad, bc = b * d, a * d, b * c
    mid = (bd >> 32) + (ad & m) + (bc & m)
    return a * c + (ad >> 32) + (bc >> 32) + (mid >> 32)


def bfe(x, pos, length):
    """A field of bits, extended by its sign if x is signed."""
    bits = x.dtype.itemsize * 8
    u = x.view(f"u{x.dtype.itemsize}")
    pos, length = np.asarray(pos) & 0xFF, np.asarray(length) & 0xFF
    one = u.dtype.type(1)
    mask = np.where(length >= bits, ~u.dtype.type(0), (one << np.minimum(length, bits - 1).astype(u.dtype)) - one)
    value = shr(u, pos) & mask
    if x.dtype.kind == "u":
        return value
    top = np.minimum(pos + np.maximum(length, 1) - 1, bits - 1).astype(u.dtype)
    sign = ((u >> top) & one).astype(bool) & (length > 0)
    return np.where(sign, value | ~mask, value).view(x.dtype)


def bfi(a, b, pos, length):
    """b with a field of its bits taken from a."""
    bits = b.dtype.itemsize * 8
    pos, length = np.asarray(pos) & 0xFF, np.asarray(length) & 0xFF
    one = b.dtype.type(1)
    mask = np.where(length >= bits, ~b.dtype.type(0), (one << np.minimum(length, bits - 1).astype(b.dtype)) - one)
    mask = shl(mask, pos)
    return (b & ~mask) | (shl(a, pos) & mask)


def prmt(a, b, selector):
    """Four of the eight bytes of a and b."""
    a, b = np.broadcast_arrays(a, b)
    pool = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros(pool.shape, u4)
    for i in range(4):
        s = (np.asarray(selector) >> u4(4 * i)) & u4(15)
        byte = ((pool >> ((s & u4(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(u4)
        byte = np.where(s & u4(8), np.where(byte & u4(128), u4(255), u4(0)), byte)
        out = out | (byte << u4(8 * i))
    return out


def shf(direction, mode, a, b, c):
    """The 64 bits of b and a shifted, of which the lower half (right) or the upper one (left) is left."""
    n = np.minimum(c, u4(32)) if mode == "clamp" else c & u4(31)
    both = np.asarray(a).astype(np.uint64) | (np.asarray(b).astype(np.uint64) << np.uint64(32))
    n = np.asarray(n).astype(np.uint64)
    return ((both >> n) if direction == "r" else ((both << n) >> np.uint64(32))).astype(u4)


def lop3(a, b, c, table):
    """Any function of three bits, by its table."""
    out = None
    for i in range(8):
        if table >> i & 1:
            term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            out = term if out is None else out | term
    return a & u4(0) if out is None else out


def popc(x):
    """How many bits are set."""
    return np.bitwise_count(x).astype(u4)


def clz(x):
    bits = x.dtype.itemsize * 8
    v = np.zeros(x.shape, np.int64)
    for i in range(bits):
        v = np.where((x >> x.dtype.type(i)) & x.dtype.type(1), i + 1, v)
    return (bits - v).astype(u4)


def brev(x):
    out = np.zeros_like(x)
    for i in range(32):
        out |= ((x >> u4(i)) & u4(1)) << u4(31 - i)
    return out
