"""What the functions of blocks call: parameters, exchange between the lanes of a warp, memory, cp.async."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from . import native
from .arithmetic import put
from .global_memory import Fault

U4, U8 = np.uint32, np.uint64
PARAMETERS = 0xC0 << 56
"""Where the addresses of parameters begin, which no other memory has."""


class Warps:
    """Arrays named q or m say for which lanes something counts; None: for all."""

    n: int
    """The lanes of the batch."""
    constants: dict[Any, Any]
    warps: int
    """Of each CTA."""
    all_warps: int
    """Of the batch."""
    warp: Any
    """Each lane's, in the batch."""
    laneid: Any
    threads: int
    """Of each CTA."""
    ctaid: Any
    """Each lane's CTA in the grid."""
    native: Any
    """The functions of native.c, or None."""
    options: dict[str, Any]
    params: bytes
    memory: Any
    shared: Any
    base: Any
    """Where the shared memory of each lane's CTA begins."""

    def every(self, value: Any) -> Any:
        """The value of each lane."""
        return value if getattr(value, "shape", None) == (self.n,) else np.broadcast_to(value, (self.n,))

    def full(self, value: Any) -> Any:
        """A constant for each lane. Such an array is shared and never written to."""
        key = value.dtype.char, value.tobytes()
        found = self.constants.get(key)
        if found is None:
            found = self.constants[key] = np.full(self.n, value)
        return found

    def param(self, offset: int, dtype: str) -> Any:
        size = np.dtype(dtype).itemsize
        if offset + size > len(self.params):
            raise Fault(f"parameter at {offset} of {len(self.params)} bytes")
        signed = np.dtype(dtype).kind == "i"
        return self.full(np.frombuffer(self.params, f"{'i' if signed else 'u'}{size}", 1, offset)[0])

    def param_address(self, offset: int) -> Any:
        return self.full(U8(PARAMETERS | offset))

    def load_param(self, x: Any, a: Any, q: Any, size: int, n: int) -> Any:
        """As `load_global`, of a parameter that a register points to: one of a tuple's, chosen by a number."""
        a = self.every(a) if q is None else self.every(a)[q]
        places = (a - U8(PARAMETERS)).astype(np.int64) + size * np.arange(n)[:, None]
        if places.size and not 0 <= places.min() <= places.max() <= len(self.params) - size:
            raise Fault(f"parameter outside of {len(self.params)} bytes: {x.where()}")
        found = np.frombuffer(self.params, np.uint8)[places[..., None] + np.arange(size)]
        return list(found.view(f"u{size}")[..., 0])

    def near(self, x: Any) -> Any:
        """A result of approximate arithmetic: the exact one or, with the option `perturb`, one that is up to an ulp off."""
        if not self.options["perturb"]:
            return x
        bits = np.ascontiguousarray(x).view(U4)
        step = (bits * U4(2654435761) >> 30).astype(np.int64) - 1  # -1, 0, 1 or 2
        step = np.where(step > 1, 0, step)
        changeable = np.isfinite(x) & ((bits & U4(0x7F800000)) != 0) & ((bits & U4(0x7FFFFF)) != 0)
        return np.where(changeable, (bits.astype(np.int64) + step).astype(U4), bits).view(np.float32)

    def whole_warps(self, x: Any, m: Any) -> None:
        if m is not None:
            lanes = m.reshape(-1, 32).sum(axis=1)
            if ((lanes != 0) & (lanes != 32)).any():
                raise Fault(f"a part of a warp at an instruction for all of it: {x.where()}")

    def shuffle(self, mode: str, a: Any, b: Any, c: Any) -> tuple[Any, Any]:
        """What each lane gets, and whether it comes from a lane in range."""
        lane = self.laneid.astype(np.int64)
        b, c = np.asarray(b).astype(np.int64), np.asarray(c).astype(np.int64)
        segment, clamp = (c >> 8) & 31, c & 31
        limit = (lane & segment) | (clamp & ~segment & 31)
        source = {
            "bfly": lane ^ b, "idx": (lane & segment) | (b & 31 & ~segment), "up": lane - b, "down": lane + b,
        }[mode]  # fmt: skip
        in_range = source >= limit if mode == "up" else source <= limit
        return self.every(a)[self.warp * 32 + np.where(in_range, source, lane)], in_range

    def elect(self, m: Any) -> tuple[Any, Any]:
        if m is None:
            return self.full(U4(0)), self.laneid == 0
        chosen = np.repeat(m.reshape(-1, 32).argmax(axis=1), 32).astype(U4)
        return chosen, (self.laneid == chosen) & m

    def ballot(self, p: Any, m: Any) -> Any:
        p = self.every(p) if m is None else self.every(p) & m
        bits = (p.reshape(-1, 32).astype(U8) << np.arange(32, dtype=U8)).sum(axis=1)
        return np.repeat(bits.astype(U4), 32)

    def redux(self, how: str, a: Any) -> Any:
        function = {
            "max": np.maximum, "min": np.minimum, "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[how]  # fmt: skip
        a = self.every(a)
        return np.repeat(function.reduce(a.reshape(-1, 32), axis=1).astype(a.dtype), 32)

    # --- memory
    def load_global(self, x: Any, a: Any, q: Any, size: int, n: int) -> Any:
        return self.memory.load(self, x, self.every(a), q, size, n)

    def store_global(self, x: Any, a: Any, q: Any, size: int, values: Any) -> None:
        self.memory.store(self, x, self.every(a), q, size, values)

    def load_shared(self, x: Any, a: Any, q: Any, size: int, n: int) -> Any:
        return self.shared.load(x, self.every(a), q, size, n)

    def store_shared(self, x: Any, a: Any, q: Any, size: int, values: Any) -> None:
        self.shared.store(x, self.every(a), q, size, values)

    def warps_of(self, q: Any) -> Any:
        return np.arange(self.all_warps) if q is None else np.unique(self.warp[q])

    def proxy_fence(self, q: Any) -> None:
        """What these warps know is visible to the async proxy from now on."""
        shared, w = self.shared, self.warps_of(q)
        np.maximum.at(shared.fenced, w // self.warps, shared.clock[w])
        shared.clock[w, w % self.warps] += 1

    # --- cp.async
    def begin_copies(self) -> None:
        self.cp_open: list[list[Any]] = [[] for _ in range(self.all_warps)]
        """Of each warp, the copies that belong to no group yet."""
        self.cp_groups: list[list[Any]] = [[] for _ in range(self.all_warps)]
        """Of each warp, the groups that haven't been waited for."""
        self.cp_count = np.zeros(self.all_warps, np.int64)

    def cp_async(self, x: Any, q: Any, to: Any, of: Any, size: int, given: Any) -> None:
        """Copies of `size` bytes, of which `given` (all or none) are read, the others zeros. They arrive when they are waited
        for; an adversary's at once."""
        if self.native is not None and self._natively(x, q, to, of, size, given):
            return
        lanes = np.arange(self.n) if q is None else np.flatnonzero(q)
        if not len(lanes):
            return
        to, of, given = (self.every(v)[lanes] for v in (to, of, given))
        if not np.isin(given, (0, size)).all():
            raise Fault(f"cp.async of a part of its size: {x.where()}")
        if (to % size).any():
            raise Fault(f"cp.async to a misaligned address: {x.where()}")
        data, some = np.zeros((len(lanes), size), np.uint8), given > 0
        if some.any():
            mask = put(np.zeros(self.n, bool), lanes[some], True)
            addresses = put(np.zeros(self.n, U8), lanes, of)
            got = self.memory.load(self, x, addresses, mask, 4, size // 4)
            data[some] = np.ascontiguousarray(np.stack(got, 1)).view(np.uint8)
        warps, at = self.warp[lanes], to.astype(np.int64) + self.base[lanes]
        self.shared.check_bounds(x, to, size)
        agents = self.warps + warps % self.warps
        self.shared.check_write(x, at, size, warps, agents, self.cp_count[warps] + 1, None)
        if self.options["adversary"]:
            self.shared.bytes[at[:, None] + np.arange(size)] = data
        for w in np.unique(warps):
            self.cp_open[w].append((at[warps == w], data[warps == w]))

    def _natively(self, x: Any, q: Any, to: Any, of: Any, size: int, given: Any) -> bool:
        to, given = (np.ascontiguousarray(self.every(v), U4) for v in (to, given))
        of, counts = np.ascontiguousarray(self.every(of), U8), native.Counts(x, 8 * self.warps, "useful")
        places, data = np.empty(self.n, np.int64), np.empty((self.n, size), np.uint8)
        first = np.empty(self.all_warps + 1, np.int64)
        memory = self.memory.for_native, native.integer(len(self.memory.allocations))
        lanes = native.integer(self.n), native.integer(self.threads), native.pointer(self.ctaid)
        given_ = (*map(native.pointer, (to, of, given, q)), native.integer(size), native.pointer(self.cp_count))
        results = map(native.pointer, (places, data, first, counts.array))
        adversary = int(self.options["adversary"])
        if not self.native.copy_async(self.shared.for_native, x.id, *memory, *lanes, *given_, adversary, *results):
            return False
        counts.add()
        begins = first.tolist()
        for w, (i, end) in enumerate(itertools.pairwise(begins)):
            if end > i:
                self.cp_open[w].append((places[i:end], data[i:end]))
        return True

    def cp_commit(self, q: Any) -> None:
        for w in self.warps_of(q):
            self.cp_groups[w].append(self.cp_open[w])
            self.cp_open[w] = []
            self.cp_count[w] += 1

    def cp_wait(self, q: Any, left: int) -> None:
        """Until no more than `left` groups of each warp are on their way."""
        for w in self.warps_of(q):
            while len(self.cp_groups[w]) > left:
                for at, data in self.cp_groups[w].pop(0):
                    if not self.options["adversary"]:
                        self.shared.put(at, data.shape[1], data)
            clock, column = self.shared.clock, self.warps + w % self.warps
            clock[w, column] = max(clock[w, column], self.cp_count[w] - left)
