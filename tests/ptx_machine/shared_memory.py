"""Shared memory of a batch of CTAs: bytes, and a vector clock that tells whether an access was ordered after the others.

Agents are what reads and writes: of a CTA with W warps the warps are agents 0 to W - 1, their groups of cp.async W to 2 W - 1,
of wgmma 2 W to 3 W - 1, their TMA stores 3 W to 4 W - 1, and the TMA loads of each mbarrier one agent more. Every warp has a
clock with a column for each agent: up to which of its times the warp knows what the agent did. Barriers, mbarriers and waits
pass that on.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import native
from .global_memory import Fault, differ

MBARRIERS = 64
"""The most that a CTA may have here."""


class SharedMemory:
    def __init__(self, m: Any, ctas: int, size: int, warps: int, granule: int):
        """Args:
        granule: the bytes that accesses are followed by; none is smaller.
        """
        self.m, self.size, self.warps, self.granule = m, size, warps, granule
        self.bytes = np.full(ctas * size + 16, 0xFF, np.uint8)
        self.views = {w: self.bytes[: ctas * size].view(f"u{w}") for w in (1, 2, 4, 8)}
        self.agents = 4 * warps + MBARRIERS
        every = np.arange(ctas * warps)
        self.clock = np.zeros((ctas * warps, self.agents), np.int64)
        self.clock[every, every % warps] = 1
        self.fenced = np.zeros((ctas, self.agents), np.int64)
        """Up to when the writes of each agent are visible to the async proxy."""
        granules = ctas * size // granule
        self.writer, self.written = np.full(granules, -1, np.int16), np.zeros(granules, np.int32)
        self.written_by = np.full(granules, -1, np.int32)  # the instruction
        self.read, self.read_by = np.zeros((granules, 4 * warps), np.int32), np.full(granules, -1, np.int32)
        self.for_native = native.shared(self)

    def get(self, at: Any, size: int) -> Any:
        """The `size` bytes at each place, one after the other."""
        if self.m.native is None:
            return self.bytes[at.ravel()[:, None] + np.arange(size)].ravel()
        at, data = native.wide(at), np.empty(at.size * size, np.uint8)
        sizes = native.integer(at.size), native.pointer(at), native.integer(size)
        self.m.native.get_rows(native.pointer(self.bytes), *sizes, native.pointer(data))
        return data

    def put(self, at: Any, size: int, data: Any) -> None:
        """Write what `get` yields."""
        data = np.ascontiguousarray(data).view(np.uint8)
        if self.m.native is None:
            self.bytes[at.ravel()[:, None] + np.arange(size)] = data.reshape(-1, size)
            return
        at = native.wide(at)
        sizes = native.integer(at.size), native.pointer(at), native.integer(size)
        self.m.native.put_rows(native.pointer(self.bytes), *sizes, native.pointer(data))

    def _natively(self, check: Any, x: Any, at: Any, size: int, each: tuple[Any, ...], last: Any) -> bool:
        """Whether native.c found nothing wrong with accesses, and has noted them."""
        many = any(np.ndim(v) for v in each)
        at, each = native.wide(at), tuple(native.wide(np.broadcast_to(v, at.shape) if many else v) for v in each)
        ends = native.pointer(at), native.integer(size), *map(native.pointer, each), native.integer(many), last
        return check(self.for_native, x.id, native.integer(len(at)), *ends)

    def _granules(self, at: Any, size: int, *each: Any) -> tuple[Any, ...]:
        """The granules of accesses of `size` bytes, and what belongs to each access repeated for each of its granules."""
        k = size // self.granule
        if k <= 1:
            return at // self.granule, 1, *each
        granules = (at[:, None] // self.granule + np.arange(k)).ravel()
        return granules, k, *[np.repeat(v, k) if np.ndim(v) else v for v in each]

    def _instruction(self, id: int) -> str:
        return self.m.instructions[id].where() if id >= 0 else "?"

    def _agent(self, id: int) -> str:
        kinds = ("warp", "cp.async of warp", "wgmma of warp", "TMA store of warp")
        w = self.warps
        return f"{kinds[id // w]} {id % w}" if id < 4 * w else f"TMA load {id - 4 * w}"

    def check_read(
        self, x: Any, at: Any, size: int, warps: Any, agents: Any, times: Any, async_proxy: bool = False
    ) -> None:
        """Whether whoever reads knows of the writers. Args:
        warps: those whose knowledge counts.
        agents, times: who reads, and as which of its times.
        """
        lib = self.m.native
        if lib is not None and self._natively(lib.check_read, x, at, size, (warps, agents, times), int(async_proxy)):
            return
        g, _, warps, agents, times = self._granules(at, size, warps, agents, times)
        writer, written = self.writer[g], self.written[g]
        never = writer < 0
        if never.any():
            self.m.note(f"reads shared memory that nobody wrote: {x.where()}")
        unknown = ~never & (self.clock[warps, writer] < written) & (writer != np.asarray(warps) % self.warps)
        if unknown.any():
            i = int(np.flatnonzero(unknown)[0])
            whose = f"{self._agent(int(writer[i]))}, {self._instruction(int(self.written_by[g[i]]))}"
            self.m.race(f"read of shared byte {self._byte(g[i])} without waiting for its writer ({whose}): {x.where()}")
        if async_proxy:
            generic = ~never & (writer < 2 * self.warps)
            unseen = generic & (self.fenced[g * self.granule // self.size, writer] < written)
            if unseen.any():
                i = int(np.flatnonzero(unseen)[0])
                whose = self._instruction(int(self.written_by[g[i]]))
                byte = self._byte(g[i])
                self.m.race(
                    f"async proxy reads shared byte {byte} with no fence since its write ({whose}): {x.where()}"
                )
        self.read[g, agents] = times
        self.read_by[g] = x.id

    def check_write(self, x: Any, at: Any, size: int, warps: Any, agents: Any, times: Any, values: Any) -> None:
        """Whether whoever writes knows of the writers and readers before. Args:
        values: the bytes that are written, because to write what is there already is allowed; None: it isn't.
        """
        lib, data = self.m.native, None if values is None else np.ascontiguousarray(values)
        if lib is not None and self._natively(
            lib.check_write, x, at, size, (warps, agents, times), native.pointer(data)
        ):
            return
        g, k, warps, agents, times = self._granules(at, size, warps, agents, times)
        local, known = np.asarray(warps) % self.warps, self.clock[warps]
        writer = self.writer[g]
        unknown = (writer >= 0) & (writer != local) & (self.clock[warps, writer] < self.written[g])
        late = self.read[g] > (known[:, : 4 * self.warps] if known.ndim == 2 else known[: 4 * self.warps])
        if np.ndim(local):
            late[np.arange(len(g)), local] = False
        else:
            late[:, local] = False
        if unknown.any() or late.any():
            differs = np.ones(len(g), bool)
            if values is not None:
                differs = np.repeat((self.bytes[at[:, None] + np.arange(size)] != values).any(axis=1), k)
            for i in np.flatnonzero(unknown & differs)[:1]:
                whose = f"{self._agent(int(writer[i]))}, {self._instruction(int(self.written_by[g[i]]))}"
                byte = self._byte(g[i])
                self.m.race(f"write of shared byte {byte} without waiting for its writer ({whose}): {x.where()}")
            for i in np.flatnonzero(late.any(axis=1) & differs)[:1]:
                reader = int(np.flatnonzero(late[i])[0])
                whose = f"{self._agent(reader)}, {self._instruction(int(self.read_by[g[i]]))}"
                self.m.race(f"write of shared byte {self._byte(g[i])} that may still be read ({whose}): {x.where()}")
        self.writer[g], self.written[g], self.written_by[g] = agents, times, x.id

    def _byte(self, granule: Any) -> int:
        return int(granule) * self.granule % self.size

    def check_bounds(self, x: Any, addresses: Any, size: int) -> None:
        if len(addresses) and int(addresses.max()) + size > self.size:
            raise Fault(f"shared memory of {self.size} bytes, {size} bytes at {int(addresses.max())}: {x.where()}")

    def _accesses(self, x: Any, a: Any, q: Any, total: int) -> tuple[Any, Any, Any]:
        """The lanes that access, where, and with which warps."""
        m = self.m
        lanes = np.arange(m.n) if q is None else np.flatnonzero(q)
        at, warps = a[lanes].astype(np.int64), m.warp[lanes]
        if (at & (total - 1)).any():
            raise Fault(f"misaligned access of {total} bytes to shared memory: {x.where()}")
        self.check_bounds(x, at, total)
        if len(lanes):
            self.count(x, at, total, warps, lanes % 32)
        return lanes, at + m.base[lanes], warps

    def load(self, x: Any, a: Any, q: Any, size: int, n: int) -> list[Any]:
        """Vectors of n elements of `size` bytes at the addresses a, for the lanes q."""
        m = self.m
        if m.native is not None:
            out, a = np.empty((n, m.n), f"u{size}"), np.ascontiguousarray(a, np.uint32)
            counts = native.Counts(x, 4 * self.warps, "extra")
            sizes = native.integer(size), native.integer(n)
            if m.native.shared_load(
                *self._for_native(x, a, q), *sizes, native.pointer(out), native.pointer(counts.array)
            ):
                counts.add()
                return list(out if q is None else out[:, : np.count_nonzero(q)])
        _, at, warps = self._accesses(x, a, q, size * n)
        local = warps % self.warps
        self.check_read(x, at, size * n, warps, local, self.clock[warps, local])
        return list(self.views[size][at // size + np.arange(n)[:, None]])

    def _for_native(self, x: Any, a: Any, q: Any) -> tuple[Any, ...]:
        m = self.m
        return self.for_native, x.id, native.integer(m.n), native.integer(m.threads), *map(native.pointer, (a, q))

    def store(self, x: Any, a: Any, q: Any, size: int, values: list[Any]) -> None:
        n, m = len(values), self.m
        if m.native is not None:
            a, values = np.ascontiguousarray(a, np.uint32), [np.ascontiguousarray(m.every(v)) for v in values]
            counts = native.Counts(x, 4 * self.warps, "extra")
            sizes = native.integer(size), native.integer(n)
            every = (*self._for_native(x, a, q), *sizes, native.pointers(values), native.pointer(counts.array))
            if m.native.shared_store(*every):
                counts.add()
                return
        lanes, at, warps = self._accesses(x, a, q, size * n)
        if not len(lanes):
            return
        v = np.stack([np.broadcast_to(value, (self.m.n,))[lanes] for value in values], 1)
        data, local = np.ascontiguousarray(v).view(np.uint8).reshape(len(at), size * n), warps % self.warps
        self.check_write(x, at, size * n, warps, local, self.clock[warps, local], data)
        i, view = (at // size)[:, None] + np.arange(n), self.views[size]
        view[i] = v
        if differ(view[i], v).any():
            self.m.race(f"two threads write different values to the same shared address: {x.where()}")

    def count(self, x: Any, at: Any, total: int, warps: Any, lanes: Any) -> None:
        """Wavefronts, of which accesses of up to 4 bytes take one a warp, of 8 two, of 16 four, and more where they conflict."""
        if x.samples >= 4 * self.warps:
            return
        part, words = {8: 16, 16: 8}.get(total, 32), max(1, total // 4)
        group = np.repeat(warps * 8 + lanes // part, words).astype(np.int64)
        pairs = np.unique(group << 32 | (at[:, None] // 4 + np.arange(words)).ravel())
        banks, conflicts = np.unique(pairs >> 32 << 5 | (pairs & 31), return_counts=True)
        groups, start = np.unique(banks >> 5, return_index=True)
        x.ideal += len(groups)
        x.extra += int((np.maximum.reduceat(conflicts, start) - 1).sum())
        x.samples += len(np.unique(warps))
