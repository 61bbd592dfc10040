"""mbarriers, tensor maps, and the copies of the tensor memory accelerator.

A load arrives when its mbarrier is waited for; until then the place holds NaN, for an adversary what arrives.
Source: NVIDIA PTX ISA, mbarrier, tensor copies and swizzling modes.
"""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np

from .arithmetic import to_tf32
from .global_memory import Fault
from .warps import PARAMETERS, Warps

MAGIC = 0x70A85EED
"""What tensor maps made by libcuda.c begin with."""
SPAN = {0: 16, 1: 32, 2: 64, 3: 128}
"""Bytes of a swizzled row, by CUDA's mode."""
_ELEMENT = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2, 10: 4, 11: 4, 12: 4}
"""Bytes of an element, by CUtensorMapDataType; the last two are TF32."""


def swizzled(a: Any, span: int) -> Any:
    """Byte addresses, whose bits from 4 on are exchanged with those from 7 on."""
    bits = {16: 0, 32: 1, 64: 3, 128: 7}[span]
    return a ^ (((a >> 7) & bits) << 4)


class TensorMap:
    def __init__(self, raw: bytes):
        magic, _, self.address = struct.unpack_from("<QQQ", raw, 0)
        if magic != MAGIC:
            raise Fault("not a tensor map")
        self.rank, self.type, self.swizzle, self.fill = struct.unpack_from("<4B", raw, 95)
        r, self.element = self.rank, _ELEMENT[self.type]
        self.sizes = [size + 1 for size in struct.unpack_from("<5I", raw, 24)[:r]]
        self.strides = [self.element, *struct.unpack_from("<4Q", raw, 48)[: r - 1]]
        self.box, self.steps = struct.unpack_from("<5H", raw, 80)[:r], struct.unpack_from("<5B", raw, 90)[:r]
        self.bytes = int(np.prod(self.box)) * self.element

    def __str__(self) -> str:
        box = f"box {[*self.box]}, swizzle {SPAN[self.swizzle]}"
        return f"{self.sizes} of {self.element} bytes, strides {self.strides[1:]}, {box}"

    def elements(self, coordinates: list[int]) -> tuple[Any, Any]:
        """Of the box at these coordinates, the offsets of its elements in bytes, and which of them exist: (rows, inner)."""
        if len(coordinates) != self.rank:
            raise Fault(f"{len(coordinates)} coordinates for a tensor map of rank {self.rank}")
        offset, inside = np.zeros(1, np.int64), np.ones(1, bool)
        for i in reversed(range(self.rank)):
            p = int(coordinates[i]) + np.arange(self.box[i], dtype=np.int64) * self.steps[i]
            offset = (offset[:, None] + (p * self.strides[i])[None, :]).ravel()
            inside = (inside[:, None] & ((p >= 0) & (p < self.sizes[i]))[None, :]).ravel()
        return offset.reshape(-1, self.box[0]), inside.reshape(-1, self.box[0])

    def pieces(self, address: int) -> Any:
        """Where the box's pieces of 16 bytes lie in shared memory: (rows, pieces)."""
        row = self.box[0] * self.element
        at = address + np.arange(self.bytes // row)[:, None] * row + np.arange(row // 16)[None, :] * 16
        return swizzled(at, SPAN[self.swizzle])


class Mbarrier:
    def __init__(self, count: int, agents: int, agent: int, maker: int, made: int, serial: int):
        self.count = self.pending = count
        self.bytes = 0  # that are expected in this phase
        self.phase = 0
        self.queue: list[
            tuple[Any, TensorMap, list[int], int, int]
        ] = []  # instruction, map, coordinates, address, base
        self.agent = agent  # of its loads
        self.maker, self.made = maker, made
        self.serial = serial
        self.now = np.zeros(agents, np.int64)  # what those that arrived in this phase know
        self.done = np.zeros(agents, np.int64)  # what whoever waits for the last phase gets to know

    @property
    def queued(self) -> int:
        return sum(copy[1].bytes for copy in self.queue)

    def __str__(self) -> str:
        missing = f"{self.pending} of {self.count} arrivals and {self.bytes - self.queued} bytes"
        return f"mbarrier in phase {self.phase}: {missing} missing"


class Tma(Warps):
    lane_cta: Any
    """Each lane's CTA in the batch."""
    generator: Any

    def begin_tma(self) -> None:
        self.mbarriers: dict[tuple[int, int], Mbarrier] = {}
        """By CTA and address."""
        self.maps: dict[bytes, TensorMap] = {}
        self.bulk_count = np.zeros(self.all_warps, np.int64)

    def lanes_of(self, q: Any) -> Any:
        return np.arange(self.n) if q is None else np.flatnonzero(q)

    # --- mbarriers
    def mbarrier_init(self, x: Any, q: Any, a: Any, count: Any) -> None:
        for lane in self.lanes_of(q):
            key = int(self.lane_cta[lane]), int(self.every(a)[lane])
            if key[1] % 8 or key[1] + 8 > self.shared.size:
                raise Fault(f"mbarrier at shared byte {key[1]}: {x.where()}")
            old, w = self.mbarriers.get(key), int(self.warp[lane])
            if old is not None and old.queue:
                self.race(f"mbarrier initialised while a copy is on its way: {x.where()}")
            agent = old.agent if old else 4 * self.warps + sum(k[0] == key[0] for k in self.mbarriers)
            if agent >= self.shared.agents:
                raise Fault("too many mbarriers")
            serial = old.serial + old.phase + 1 if old else 0
            made = int(self.shared.clock[w, w % self.warps])
            self.mbarriers[key] = Mbarrier(int(self.every(count)[lane]), self.shared.agents, agent, w, made, serial)

    def mbarrier_inval(self, x: Any, q: Any, a: Any) -> None:
        for lane in self.lanes_of(q):
            b = self.mbarriers.get((int(self.lane_cta[lane]), int(self.every(a)[lane])))
            if b is not None and b.queue:
                self.race(f"mbarrier invalidated while a copy is on its way: {x.where()}")

    def _mbarrier(self, x: Any, lane: int, address: int) -> Mbarrier:
        b = self.mbarriers.get((int(self.lane_cta[lane]), int(address)))
        if b is None:
            raise Fault(f"no mbarrier at shared byte {int(address)}: {x.where()}")
        w = int(self.warp[lane])
        if self.shared.clock[w, b.maker % self.warps] < b.made and w != b.maker:
            self.race(f"mbarrier used with no barrier since it was initialised: {x.where()}")
        return b

    def mbarrier_arrive(self, x: Any, q: Any, a: Any, count: Any, expected: Any) -> None:
        for lane in self.lanes_of(q):
            b, n = self._mbarrier(x, lane, self.every(a)[lane]), int(self.every(count)[lane])
            if n and b.pending == 0:
                self._complete(b)
            b.bytes += 0 if expected is None else int(self.every(expected)[lane])
            b.pending -= n
            if b.pending < 0:
                raise Fault(f"more arrivals at an mbarrier than it counts [{b}]: {x.where()}")
            w = int(self.warp[lane])
            np.maximum(b.now, self.shared.clock[w], out=b.now)
            self.shared.clock[w, w % self.warps] += 1

    def _complete(self, b: Mbarrier) -> bool:
        """End the phase if nothing is missing but copies that are on their way, which are made now."""
        if b.pending or b.bytes != b.queued:
            return False
        for copy in b.queue:
            self._arrive(*copy)
        b.queue, b.bytes = [], 0
        b.now[b.agent] = b.serial + b.phase + 1
        b.done = b.now.copy()
        b.phase += 1
        b.pending = b.count
        return True

    def mbarrier_at(self, x: Any, lane: int) -> Mbarrier | None:
        """The one that a wait names."""
        return self.mbarriers.get((int(self.lane_cta[lane]), self._wait_address(x, lane)))

    def _wait_address(self, x: Any, lane: int) -> int:
        match = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", x.args[1])
        assert match
        base = 0 if match[1] == "global_smem" else int(self.registers[self.generator.index[match[1]]][lane])
        return (base + int(match[2] or "0", 0)) & 0xFFFFFFFF

    def try_wait(self, block: Any, m: Any) -> Any:
        """The lanes whose mbarrier has ended the phase that they wait for."""
        x, lanes = block.code[0], self.lanes_of(m)
        register, done = self.generator.index.get(x.args[2]), np.zeros(self.n, bool)
        for w in np.unique(self.warp[lanes]):
            mine = lanes[self.warp[lanes] == w]
            lane = int(mine[0])
            b = self._mbarrier(x, lane, self._wait_address(x, lane))
            parity = int(x.args[2], 0) if register is None else int(self.registers[register][lane])
            if (b.phase & 1) != (parity & 1) or self._complete(b):
                done[mine] = True
                np.maximum(self.shared.clock[w], b.done, out=self.shared.clock[w])
        return done

    # --- copies
    def _map(self, address: Any) -> TensorMap:
        address = int(address)
        if address >> 56 == PARAMETERS >> 56:
            raw = self.params[address & 0xFFFFFFFF :][:128]
        else:
            allocation = self.memory.find(address)
            if allocation is None or address + 128 > allocation.begin + allocation.size:
                raise Fault("tensor map out of bounds")
            raw = allocation.bytes[address - allocation.begin :][:128].tobytes()
        if raw not in self.maps:
            self.maps[raw] = TensorMap(raw)
        return self.maps[raw]

    def _place(self, x: Any, t: TensorMap, a: int, lane: int) -> Any:
        if a % 128 or a + t.bytes > self.shared.size:
            raise Fault(f"TMA copy of {t.bytes} bytes at shared byte {a}: {x.where()}")
        return t.pieces(a) + int(self.base[lane])

    def tma_load(self, x: Any, q: Any, to: Any, tensor_map: Any, coordinates: Any, barrier: Any) -> None:
        for lane in self.lanes_of(q):
            b = self._mbarrier(x, lane, self.every(barrier)[lane])
            t, a, w = self._map(self.every(tensor_map)[lane]), int(self.every(to)[lane]), int(self.warp[lane])
            at = self._place(x, t, a, lane)
            self.shared.check_write(x, at.ravel(), 16, w, b.agent, b.serial + b.phase + 1, None)
            corner, base = [int(self.every(c)[lane]) for c in coordinates], int(self.base[lane])
            b.queue.append((x, t, corner, a, base))
            if self.options["adversary"]:
                self._arrive(*b.queue[-1])
            else:
                self.shared.bytes[at[..., None] + np.arange(16)] = 0xFF
            self.report.tma_bytes += t.bytes

    def _arrive(self, x: Any, t: TensorMap, corner: list[int], a: int, base: int) -> None:
        offsets, inside = t.elements(corner)
        data = np.full(offsets.shape, -1 if t.fill else 0, f"i{t.element}").view(f"u{t.element}")
        if inside.any():
            allocation, at = self.memory.box(x, t.address, offsets[inside], t.element, f"TMA load of {corner} from {t}")
            if allocation.writer[at].any():
                self.note(f"TMA load of what this launch has written: {x.where()}")
            data[inside] = allocation.views[t.element][at // t.element]
        if t.type in (11, 12):
            data = to_tf32("rna", data)
        self.shared.put(t.pieces(a) + base, 16, data)

    def tma_store(self, x: Any, q: Any, of: Any, tensor_map: Any, coordinates: Any) -> None:
        for lane in self.lanes_of(q):
            t, w = self._map(self.every(tensor_map)[lane]), int(self.warp[lane])
            at = self._place(x, t, int(self.every(of)[lane]), lane)
            agent, time = 3 * self.warps + w % self.warps, self.bulk_count[w] + 1
            self.shared.check_read(x, at.ravel(), 16, w, agent, time, async_proxy=True)
            data = self.shared.get(at, 16).reshape(at.shape[0], -1).view(f"u{t.element}")
            offsets, inside = t.elements([int(self.every(c)[lane]) for c in coordinates])
            if inside.any():
                allocation, places = self.memory.box(x, t.address, offsets[inside], t.element, f"TMA store to {t}")
                allocation.views[t.element][places // t.element] = data[inside]
            self.report.tma_bytes += t.bytes

    def bulk_commit(self, q: Any) -> None:
        self.bulk_count[self.warps_of(q)] += 1

    def bulk_wait(self, q: Any, left: int) -> None:
        for w in self.warps_of(q):
            clock, column = self.shared.clock, 3 * self.warps + w % self.warps
            clock[w, column] = max(clock[w, column], self.bulk_count[w] - left)

    # --- what Machine adds
    registers: list[Any]
    report: Any

    def race(self, text: str) -> None:
        raise NotImplementedError

    def note(self, text: str) -> None:
        raise NotImplementedError
