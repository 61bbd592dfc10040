"""Matrices: ldmatrix and stmatrix, mma and wgmma.

Products are exact, their sum is taken in float64 and rounded once an instruction to the type of the accumulator. Of TF32
operands the low 13 bits are dropped, as the hardware does.
Source: NVIDIA PTX ISA, fragments of mma and wgmma, matrix descriptors and canonical layouts of wgmma.
"""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any

import numpy as np

from . import native
from .global_memory import Fault
from .tma import Tma, swizzled

U4 = np.uint32
Places = tuple[Any, Any]
"""Rows and columns of the elements that each lane holds: two arrays (elements, 32)."""


def _sizes(shape: str) -> tuple[int, int, int]:
    match = re.match(r"m(\d+)n(\d+)k(\d+)", shape)
    assert match
    m, n, k = map(int, match.groups())
    return m, n, k


@functools.cache
def fragments(kind: str, shape: str) -> tuple[Places, Places, Places]:
    """Where the elements of a, b and c lie in the lanes of a warp."""
    m, _, k = _sizes(shape)
    lane = np.arange(32)
    group, within = lane >> 2, lane & 3
    rows = (0, 8) if m == 16 else (0,)
    if kind in ("f16", "bf16") and m == 16:  # eight of k at a time, two neighbours in a register
        steps, pair = range(0, k, 8), (0, 1)
        a = [(group + row, within * 2 + e + step) for step in steps for row in rows for e in pair]
        b = [(within * 2 + e + step, group) for step in steps for e in pair]
    elif kind in ("tf32", "f64") and (m == 16 or shape == "m8n8k4"):  # four of k at a time
        a = [(group + row, within + step) for step in range(0, k, 4) for row in rows]
        b = [(within + step, group) for step in range(0, k, 4)]
    else:
        raise Fault(f"mma {shape} of {kind}")
    c = [(group + row, within * 2 + e) for row in rows for e in (0, 1)]

    def stacked(places: list[tuple[Any, Any]]) -> Places:
        rows, columns = zip(*places, strict=True)
        return np.stack(rows), np.stack(columns)

    return stacked(a), stacked(b), stacked(c)


@functools.cache
def _tables(kind: str, shape: str) -> tuple[Any, Any, Any]:
    """The same as indices into the matrices, row by row."""
    _, n, k = _sizes(shape)
    places = zip(fragments(kind, shape), (k, n, n), strict=True)
    a, b, c = (np.ascontiguousarray(rows * width + columns) for (rows, columns), width in places)
    return a, b, c


@functools.cache
def operand_pieces(mn: int, k: int, size: int, transposed: bool, span: int, leading: int, stride: int) -> Any:
    """Where the pieces of 16 bytes of an operand of wgmma lie, before swizzling: (mn, pieces) if k is contiguous, else
    (k, pieces). Args:
    size: of an element, in bytes.
    span: of the swizzle; 16 is none.
    leading, stride: the descriptor's two distances.
    """
    if not transposed:
        row, piece = np.arange(mn)[:, None], np.arange(k * size // 16)[None]
        return row // 8 * stride + row % 8 * span + (piece * 16 if span > 16 else piece * leading)
    row, piece = np.arange(k)[:, None], np.arange(mn * size // 16)[None]
    if span == 16:
        return piece * stride + row // 8 * leading + row % 8 * 16
    return piece // (span // 16) * leading + piece % (span // 16) * 16 + row // 8 * stride + row % 8 * span


def _numbers(kind: str, bits: Any) -> Any:
    """Unsigned integers of the size of an element as float64."""
    if kind == "f64":
        return bits.view(np.float64)
    if kind == "tf32":
        return (bits & U4(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind == "bf16":
        return (bits.astype(U4) << U4(16)).view(np.float32).astype(np.float64)
    return bits.view(np.float16).astype(np.float64)


def _elements(kind: str, registers: list[Any]) -> Any:
    """The numbers in registers: (elements, lanes)."""
    r = np.stack(registers)
    if kind in ("f16", "bf16"):
        r = np.stack([r.astype(np.uint16), (r >> U4(16)).astype(np.uint16)], 1).reshape(-1, r.shape[1])
    return _numbers(kind, r)


class TensorCores(Tma):
    # --- matrices of 8 x 8 between shared memory and registers
    def _rows(self, x: Any, a: Any, q: Any, count: int) -> tuple[Any, Any, Any]:
        """The rows of `count` matrices: the warps that access them, those repeated for each row, and the rows' addresses."""
        active = np.arange(self.all_warps) if q is None else np.flatnonzero(q.reshape(-1, 32).any(axis=1))
        rows = self.every(a).reshape(-1, 32)[active, : 8 * count].astype(np.int64)
        if (rows % 16).any():
            raise Fault(f"misaligned row of {x.where()}")
        self.shared.check_bounds(x, rows.ravel(), 16)
        warps = np.repeat(active, 8 * count)
        self.shared.count(x, rows.ravel(), 16, warps, np.tile(np.arange(8 * count), len(active)))
        return active, warps, (rows + (active // self.warps * self.shared.size)[:, None]).ravel()

    def ldmatrix(self, x: Any, a: Any, q: Any, count: int, transposed: bool) -> list[Any]:
        active, warps, at = self._rows(x, a, q, count)
        local = warps % self.warps
        self.shared.check_read(x, at, 16, warps, local, self.shared.clock[warps, local])
        data = self.shared.get(at, 16).view(np.uint16).reshape(len(active), count, 8, 8)
        data = np.ascontiguousarray(data.swapaxes(2, 3)) if transposed else data
        out = np.full((count, self.all_warps, 32), 0x7FC0BAD1, U4)
        out[:, active] = data.view(U4).reshape(len(active), count, 32).transpose(1, 0, 2)
        return list(out.reshape(count, self.n))

    def stmatrix(self, x: Any, a: Any, q: Any, count: int, transposed: bool, values: list[Any]) -> None:
        active, warps, at = self._rows(x, a, q, count)
        data = np.stack([self.every(v).reshape(-1, 32)[active] for v in values], 1)
        data = np.ascontiguousarray(data).view(np.uint16).reshape(len(active), count, 8, 8)
        data = np.ascontiguousarray(data.swapaxes(2, 3) if transposed else data).view(np.uint8).reshape(-1, 16)
        local = warps % self.warps
        self.shared.check_write(x, at, 16, warps, local, self.shared.clock[warps, local], data)
        self.shared.put(at, 16, data)
        if (self.shared.get(at, 16) != data.ravel()).any():
            self.race(f"two rows of different values to the same shared address: {x.where()}")

    # --- products of warps
    def mma(self, x: Any, shape: str, kind: str, to: str, a: Any, b: Any, c: Any, m: Any) -> list[Any]:
        (rows_a, columns_a), (rows_b, columns_b), (rows_c, columns_c) = fragments(kind, shape)
        (M, N, K), w = _sizes(shape), self.all_warps
        a, b = (_elements(kind, [self.every(v) for v in registers]) for registers in (a, b))
        if self.native is not None:
            product = self._mma(kind, shape, a, b)
        else:
            A, B = np.empty((w, M, K)), np.empty((w, K, N))
            each = (v.reshape(-1, w, 32).transpose(1, 0, 2) for v in (a, b))
            A[:, rows_a, columns_a], B[:, rows_b, columns_b] = each
            product = (A @ B)[:, rows_c, columns_c].transpose(1, 0, 2).reshape(-1, self.n)
        self.report.flops += 2 * M * N * K * (w if m is None else int(m.sum()) // 32)
        dtype = {"f64": np.float64, "f32": np.float32}.get(to)
        if dtype is None:
            raise Fault(f"accumulator {to}: {x.where()}")
        c = np.stack([self.every(v) for v in c]).view(dtype)
        return list((c + product).astype(dtype).view(f"u{c.itemsize}"))

    def _mma(self, kind: str, shape: str, a: Any, b: Any) -> Any:
        _, N, K = _sizes(shape)
        tables, a, b = _tables(kind, shape), np.ascontiguousarray(a), np.ascontiguousarray(b)
        product = np.empty((len(tables[2]), self.n))
        sizes = map(native.integer, (self.all_warps, N, K, *map(len, tables)))
        self.native.mma(*sizes, *map(native.pointer, (*tables, a, b, product)))
        return product

    # --- asynchronous products of warpgroups
    def begin_products(self) -> None:
        self.wgmma_count = np.zeros(self.all_warps, np.int64)
        self.late_open: list[Any] = []
        """For an adversary: products that haven't been computed and belong to no group yet, as (result, arguments)."""
        self.late_groups: list[list[Any]] = []

    def wgmma_commit(self, m: Any) -> None:
        self.wgmma_count[self.warps_of(m)] += 1
        if m is None:
            self.late_groups.append(self.late_open)
            self.late_open = []

    def wgmma_wait(self, m: Any, left: int) -> None:
        """Until no more than `left` groups are under way."""
        while m is None and len(self.late_groups) > left:
            self._compute(self.late_groups.pop(0))
        w, clock = self.warps_of(m), self.shared.clock
        column = 2 * self.warps + w % self.warps
        clock[w, column] = np.maximum(clock[w, column], self.wgmma_count[w] - left)

    def _compute(self, group: list[Any]) -> None:
        for result, arguments in group:
            result[:] = self._multiply(*arguments)  # in place: the registers of the result are rows of it

    def flush(self) -> None:
        """Compute all late products. Where lanes part, registers are copied, so that no product may be late."""
        for group in [*self.late_groups, self.late_open]:
            self._compute(group)
        self.late_groups, self.late_open = [[] for _ in self.late_groups], []

    def wgmma(self, *arguments: Any) -> list[Any]:
        """The accumulators: now or, for an adversary, when they are waited for."""
        _, _, _, _, accumulators, *_, m = arguments
        if not self.options["adversary"] or m is not None:
            return list(self._multiply(*arguments))
        self._multiply(*arguments, only_look=True)
        result = np.full((len(accumulators), self.n), 0x7FC0F11E, U4)
        self.late_open.append((result, arguments))
        return list(result)

    def _multiply(
        self, x: Any, shape: str, to: str, kind: str, accumulators: Any, a: Any, b: Any, use: Any, signs: Any,
        transposed: Any, m: Any, only_look: bool = False,
    ) -> Any:  # fmt: skip
        """Args:
        use: whether the accumulators are added to.
        only_look: note who reads what, and compute nothing.
        """
        M, N, K = _sizes(shape)
        if to != "f32":
            raise Fault(f"wgmma to {to}: {x.where()}")
        out = None if only_look else np.stack([self.every(v) for v in accumulators])
        lane, i = np.arange(128), np.arange(N // 2)[:, None]
        rows, columns = lane // 32 * 16 + lane % 32 // 4 + 8 * (i // 2 % 2), lane % 4 * 2 + i % 2 + 8 * (i // 4)
        groups = np.arange(self.all_warps // 4) if m is None else np.flatnonzero(m.reshape(-1, 128).all(axis=1))
        if m is not None and len(groups) * 128 != m.sum():
            raise Fault(f"a part of a warpgroup: {x.where()}")
        looks = only_look or m is not None or not self.options["adversary"]
        for group in groups:
            lanes = slice(int(group) * 128, int(group) * 128 + 128)
            if isinstance(a, list):
                (rows_a, columns_a), _, _ = fragments(kind, f"m16n8k{K}")
                elements = _elements(kind, [self.every(v)[lanes] for v in a])
                A = np.empty((4, 16, K))
                A[:, rows_a, columns_a] = elements.reshape(-1, 4, 32).transpose(1, 0, 2)
                A = A.reshape(M, K)
            else:
                A = self._operand(x, self.every(a)[lanes], M, K, kind, transposed[0], int(group), looks, only_look)
            B = self._operand(x, self.every(b)[lanes], N, K, kind, transposed[1], int(group), looks, only_look)
            if only_look:
                continue
            self.report.flops += 2 * M * N * K
            add = bool(self.every(use)[lanes][0])
            if self.native is not None:
                a_, b_ = np.ascontiguousarray(A), np.ascontiguousarray(B.T)
                numbers = native.pointer(a_), native.pointer(b_), int(add), ctypes.c_double(signs[0] * signs[1])
                self.native.wgmma(
                    native.integer(N),
                    native.integer(K),
                    *numbers,
                    native.integer(self.n),
                    native.pointer(out[:, lanes]),
                )
                continue
            result = (A @ B.T)[rows, columns] * (signs[0] * signs[1])
            if add:
                result = result + out[:, lanes].view(np.float32)
            out[:, lanes] = result.astype(np.float32).view(U4)
        return out

    def _operand(
        self, x: Any, descriptors: Any, mn: int, k: int, kind: str, transposed: int, group: int, looks: bool,
        only_look: bool,
    ) -> Any:  # fmt: skip
        """An operand in shared memory: (mn, k)."""
        descriptor = int(descriptors[0])
        if (descriptors != descriptors[0]).any():
            raise Fault(f"descriptors differ within a warpgroup: {x.where()}")
        if descriptor >> 49 & 7:
            raise Fault(f"a descriptor with a base offset: {x.where()}")
        start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        span, size = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62 & 3], 4 if kind == "tf32" else 2
        at = swizzled(start + operand_pieces(mn, k, size, bool(transposed), span, leading, stride), span)
        self.shared.check_bounds(x, at.ravel(), 16)
        at = at + int(self.base[group * 128])
        if looks:
            self._look(x, at, 4 * group)
        if only_look:
            return None
        if self.native is None:
            numbers = _numbers(kind, self.shared.get(at, 16).reshape(at.shape[0], -1).view(f"u{size}"))
            return numbers.T if transposed else numbers
        at, numbers = native.wide(at), np.empty((mn, k))
        sizes = native.integer(at.shape[0]), native.integer(at.shape[1]), native.pointer(at), native.KINDS[kind]
        self.native.operand(native.pointer(self.shared.bytes), *sizes, transposed, native.pointer(numbers))
        return numbers

    def _look(self, x: Any, at: Any, first: int) -> None:
        """The four warps from `first` on read these pieces."""
        if self.native is not None:
            at = native.wide(at)
            ends = native.integer(at.size), native.pointer(at), native.integer(first), native.pointer(self.wgmma_count)
            if self.native.group_reads(self.shared.for_native, x.id, *ends):
                return
        for w in range(first, first + 4):
            agent, time = 2 * self.warps + w % self.warps, int(self.wgmma_count[w]) + 1
            self.shared.check_read(x, at.ravel(), 16, w, agent, time, async_proxy=True)
