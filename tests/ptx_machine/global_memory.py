"""Global memory: the host's own, bounded by the allocations that a launch is given."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np

from . import native


class Fault(Exception):
    """What a GPU would trap on, or what a kernel may not do."""


def differ(a: Any, b: Any) -> Any:
    """Where bits differ, but for two NaNs of float32: a GPU's arithmetic yields a single NaN, NumPy's keeps an operand's."""
    found = a != b
    if a.dtype.itemsize == 4 and found.any():
        found &= ((a & np.uint32(0x7FFFFFFF)) <= 0x7F800000) | ((b & np.uint32(0x7FFFFFFF)) <= 0x7F800000)
    return found


class Allocation:
    """A range of the host's memory. Of each byte it keeps which CTA of the launch has written and read it."""

    def __init__(self, begin: int, size: int):
        self.begin, self.size = begin, size
        padded = -(-size // 16) * 16  # the guards behind every allocation are larger
        self.bytes: Any = np.frombuffer((ctypes.c_char * padded).from_address(begin), np.uint8)
        widths = [w for w in (1, 2, 4, 8) if begin % w == 0]
        self.views = {w: self.bytes.view(f"u{w}") for w in widths}
        self.writer = np.zeros(size, np.int32)
        """0: nobody, otherwise a CTA's number and 1."""
        self.reader = np.zeros(size, np.int32)
        """The same; -1: several."""


class GlobalMemory:
    def __init__(self, allocations: Iterable[tuple[int, int]]):
        """Args:
        allocations: begin and size of each.
        """
        self.allocations = [Allocation(begin, size) for begin, size in sorted(set(allocations)) if size > 0]
        self.begins = np.array([a.begin for a in self.allocations], np.int64)
        self._last: Allocation | None = None  # the one that was accessed last is often the next one
        self.for_native = native.allocations(self.allocations)

    def find(self, address: int) -> Allocation | None:
        """The last allocation that begins at or before an address."""
        i = int(np.searchsorted(self.begins, address, "right")) - 1
        return self.allocations[i] if i >= 0 else None

    def _parts(self, m: Any, x: Any, a: Any, size: int, doing: str, lanes: Any) -> list[tuple[Allocation, Any, Any]]:
        """The allocations that these addresses lie in, each with the places of its addresses among them and the offsets."""
        a = a.astype(np.int64)
        last = self._last
        if last is not None and int(a.min()) >= last.begin and int(a.max()) + size <= last.begin + last.size:
            return [(last, slice(None), a - last.begin)]
        which = np.searchsorted(self.begins, a, "right") - 1
        parts: list[tuple[Allocation, Any, Any]] = []
        for w in np.unique(which):
            place = np.flatnonzero(which == w)
            allocation = self.allocations[w] if w >= 0 else None
            offsets = a[place] - (allocation.begin if allocation else 0)
            if allocation is None or int(offsets.max()) + size > allocation.size:
                bad = place[0] if allocation is None else place[int(offsets.argmax())]
                lane = int(lanes[bad])
                after = "" if allocation is None else f" ({int(offsets.max())} bytes into {allocation.size})"
                thread = f"thread {lane % m.threads} of CTA {m.ctaid[lane]}"
                raise Fault(f"{doing} out of bounds, {size} bytes at {int(a[bad]):#x}{after} by {thread}: {x.where()}")
            parts.append((allocation, place, offsets))
        if len(parts) == 1:
            self._last = parts[0][0]
        return parts

    def load(self, m: Any, x: Any, a: Any, q: Any, size: int, n: int) -> list[Any]:
        """Vectors of n elements of `size` bytes at the addresses a, for the lanes q."""
        if m.native is not None:
            out, a = np.empty((n, m.n), f"u{size}"), np.ascontiguousarray(a, np.uint64)
            counts = native.Counts(x, 8 * m.warps, "useful")
            every = (
                *self._for_native(m),
                *map(native.pointer, (m.ctaid, a, q)),
                native.integer(size),
                native.integer(n),
            )
            if m.native.global_load(*every, native.pointer(out), native.pointer(counts.array)):
                counts.add()
                return list(out if q is None else out[:, : np.count_nonzero(q)])
        lanes = np.arange(m.n) if q is None else np.flatnonzero(q)
        a, total = a[lanes], size * n
        out = np.zeros((n, len(lanes)), f"u{size}")
        if not len(lanes):
            return list(out)
        self._check_alignment(x, a, total, "load")
        for allocation, place, offsets in self._parts(m, x, a, total, "load", lanes):
            mine = m.ctaid[lanes[place]].astype(np.int32) + 1
            before, writer = allocation.reader[offsets], allocation.writer[offsets]
            allocation.reader[offsets] = np.where((before == 0) | (before == mine), mine, -1)
            if ((writer != 0) & (writer != mine)).any():
                m.race(f"global memory written by another CTA of the same launch: {x.where()}")
            out[:, place] = allocation.views[size][offsets // size + np.arange(n)[:, None]]
        self._count(m, x, a, total, lanes)
        return list(out)

    def _for_native(self, m: Any) -> tuple[Any, ...]:
        return self.for_native, native.integer(len(self.allocations)), native.integer(m.n)

    def store(self, m: Any, x: Any, a: Any, q: Any, size: int, values: list[Any]) -> None:
        if m.native is not None:
            a, values = np.ascontiguousarray(a, np.uint64), [np.ascontiguousarray(m.every(v)) for v in values]
            counts = native.Counts(x, 8 * m.warps, "useful")
            every = (*self._for_native(m), *map(native.pointer, (m.ctaid, a, q)), native.integer(size))
            n = native.integer(len(values))
            if m.native.global_store(*every, native.pointers(values), n, native.pointer(counts.array)):
                counts.add()
                return
        lanes = np.arange(m.n) if q is None else np.flatnonzero(q)
        a, n = a[lanes], len(values)
        if not len(lanes):
            return
        self._check_alignment(x, a, size * n, "store")
        v = np.stack([np.broadcast_to(value, (m.n,))[lanes] for value in values])
        for allocation, place, offsets in self._parts(m, x, a, size * n, "store", lanes):
            self._store(m, x, allocation, offsets, size, v[:, place], m.ctaid[lanes[place]].astype(np.int32) + 1)
        self._count(m, x, a, size * n, lanes)

    def _store(self, m: Any, x: Any, allocation: Allocation, offsets: Any, size: int, v: Any, mine: Any) -> None:
        writer, reader = allocation.writer, allocation.reader[offsets]
        view, i = allocation.views[size], offsets // size + np.arange(len(v))[:, None]
        others = (writer[offsets] != 0) & (writer[offsets] != mine)
        if others.any():
            if differ(view[i], v)[:, others].any():
                m.race(f"global memory written by two CTAs: {x.where()}")
            else:
                m.note(f"the same value written to global memory by two CTAs: {x.where()}")
        if ((reader != 0) & (reader != mine)).any():
            m.race(f"global memory written that another CTA of the same launch has read: {x.where()}")
        for j in range(size * len(v)):
            writer[offsets + j] = mine
        view[i] = v
        if differ(view[i], v).any():
            m.race(f"two threads write different values to the same global address: {x.where()}")

    def box(self, x: Any, begin: int, offsets: Any, size: int, doing: str) -> tuple[Allocation, Any]:
        """The allocation of a tensor that TMA copies from or to, and offsets in it."""
        allocation = self.find(begin)
        if allocation is not None:
            offsets = offsets + (begin - allocation.begin)
            if int(offsets.min()) >= 0 and int(offsets.max()) + size <= allocation.size:
                return allocation, offsets
        raise Fault(f"{doing} beyond its allocation: {x.where()}")

    @staticmethod
    def _check_alignment(x: Any, a: Any, total: int, doing: str) -> None:
        misaligned = (a & np.uint64(total - 1)) != 0
        if misaligned.any():
            raise Fault(f"misaligned {doing} of {total} bytes at {int(a[misaligned][0]):#x}: {x.where()}")

    @staticmethod
    def _count(m: Any, x: Any, a: Any, total: int, lanes: Any) -> None:
        """Sectors of 32 bytes that warps ask for, and bytes that they use."""
        if x.samples < 8 * m.warps:
            warps = m.warp[lanes]
            x.ideal += len(np.unique((warps.astype(np.int64) << 44) ^ (a.astype(np.int64) >> 5)))
            x.useful += len(a) * total
            x.samples += len(np.unique(warps))
