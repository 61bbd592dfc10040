"""The machine: runs a kernel on host memory, all lanes of a batch of CTAs side by side.

Lanes that stand at the same block run it together. Of several blocks the first one in reverse post-order runs, for its lanes.
Warps that have to wait at a barrier or an mbarrier are set aside; if nobody can go on, that is a deadlock.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from . import in_flight, native
from .generator import Generator
from .global_memory import Fault, GlobalMemory
from .parser import Block, parse
from .report import Report
from .shared_memory import SharedMemory
from .tensor_cores import TensorCores

LANES = 1024
"""How many lanes run side by side."""
_POISON = {
    "pred": (bool, False), "b16": ("u2", 0x7FC1), "b32": ("u4", 0x7FC0DEAD), "b64": ("u8", 0x7FF8DEADDEADDEAD),
}  # fmt: skip
"""What registers hold before they are written: NaN."""


class Deadlock(Fault):
    """No warp can go on."""


class Machine(TensorCores):
    """Of one kernel.

    Options:
        order: of the CTAs: "forward", "reversed" or "shuffled".
        adversary: copies arrive as early, and products read their operands as late, as they may.
        perturb: approximate functions are up to an ulp off.
        native: memory and products in C, if there is a compiler.
    """

    def __init__(self, text: str):
        self.kernel = parse(text)
        self.generator = Generator(self.kernel)
        self.by_order = {b.order: b for b in self.kernel.blocks if b.order >= 0}
        self.instructions = {x.id: x for b in self.kernel.blocks for x in b.code}
        self.granule = 4
        for x in self.instructions.values():
            if x.parts[0] in ("ld", "st") and any(s.startswith("shared") for s in x.parts):
                bits = int("".join(c for c in x.parts[-1] if c.isdigit()))
                self.granule = min(self.granule, bits // 8)
        self.behind: dict[Any, Any] = {}

    def launch(
        self, grid: int, params: bytes, memory: GlobalMemory, shared: int, threads: int, **options: Any
    ) -> Report:
        begin = time.perf_counter()
        self.options = {"order": "forward", "adversary": False, "perturb": False, "native": True, **options}
        self.native = native.library() if self.options["native"] else None
        self.params, self.memory, self.grid, self.threads = params, memory, grid, threads
        self.report = Report(self.kernel.name, grid, threads, self.kernel.target, shared)
        for block in self.kernel.blocks:
            block.runs = 0
            for x in block.code:
                x.samples = x.extra = x.ideal = x.useful = 0
        ids = np.arange(grid)
        if self.options["order"] == "reversed":
            ids = ids[::-1]
        elif self.options["order"] == "shuffled":
            ids = np.random.default_rng(0).permutation(ids)
        batch = max(1, min(LANES // threads, (1 << 21) // max(shared, 1)))
        with np.errstate(all="ignore"):
            for i in range(0, grid, batch):
                self._run(ids[i : i + batch], shared)
        self.report.count(self.kernel.blocks)
        self.report.seconds = time.perf_counter() - begin
        return self.report

    def race(self, text: str) -> None:
        if len(self.report.races) < 50 and text not in self.report.races:
            self.report.races.append(text)

    def note(self, text: str) -> None:
        self.report.notes[text] += 1

    # --- a batch of CTAs
    def _run(self, ctas: Any, shared: int) -> None:
        threads = self.threads
        n = self.n = len(ctas) * threads
        lanes = np.arange(n)
        self.ctas, self.warps, self.all_warps = ctas, threads // 32, n // 32
        self.lane_cta, self.warp = lanes // threads, lanes // 32
        self.tid, self.laneid = (lanes % threads).astype("u4"), (lanes % 32).astype("u4")
        self.warpid, self.ctaid = (lanes % threads // 32).astype("u4"), np.repeat(ctas.astype("u4"), threads)
        self.nctaid, self.ntid = np.full(n, self.grid, "u4"), np.full(n, threads, "u4")
        self.zero, self.one = np.zeros(n, "u4"), np.ones(n, "u4")
        size = -(-max(shared, 16) // 16) * 16
        self.base = self.lane_cta * size
        self.shared = SharedMemory(self, len(ctas), size, self.warps, self.granule)
        self.constants: dict[Any, Any] = {}
        self.barriers: dict[tuple[int, int], tuple[Any, int | None]] = {}
        self.flying: dict[int, in_flight.State] = {}
        self.begin_copies()
        self.begin_tma()
        self.begin_products()
        poison = {kind: np.full(n, value, dtype) for kind, (dtype, value) in _POISON.items()}
        self.registers = [poison[kind] for kind in self.generator.classes]
        self.alive, self.blocked = np.ones(n, bool), np.zeros(n, bool)
        self.at = np.zeros(n, np.int64)  # the order of the block that each lane stands at; -1: it has ended
        while self.alive.any():
            self._step()
        for barrier in self.mbarriers.values():
            if barrier.queue:
                self.note(f"TMA load never waited for: {barrier.queue[0][0].where()}")
        if any(map(len, (*self.cp_open, *self.cp_groups))):
            self.note("cp.async never waited for")

    def _step(self) -> None:
        """Run one block, or several while all lanes stand at the same one."""
        if not self.blocked.any() and self.alive.all() and (self.at == self.at[0]).all():
            self._together(int(self.at[0]))
            return
        self.flush()
        ready = self.alive & ~self.blocked
        if not ready.any():
            if not self._wake():
                raise Deadlock("deadlock: nobody can go on\n  " + "\n  ".join(self._where_all_stand()[:40]))
            return
        now = int(self.at[ready].min())
        block, m = self.by_order[now], ready & (self.at == now)
        if block.kind == "barrier":
            block.runs += len(np.unique(self.warp[m]))
            self._arrive_at_barrier(block, m)
            return
        if block.kind == "wait":
            done = self.try_wait(block, m)
            self.blocked[m & ~done] = True
            m = m & done
            if not m.any():
                return
        block.runs += len(np.unique(self.warp[m]))
        self._check_flying(block, m)
        everybody = bool(m.all())
        found = self._function(block, not everybody)(self, self.registers, None if everybody else m)
        self.at[m] = np.broadcast_to(np.where(*found) if isinstance(found, tuple) else found, (self.n,))[m]
        if (self.at[m] < 0).any():
            self.alive = self.at >= 0
            self._release_barriers()

    def _together(self, now: int) -> None:
        """Run from the block `now` on until lanes part, wait or end."""
        while True:
            block = self.by_order[now]
            if block.kind == "barrier":
                x = block.code[0]
                if x.guard is not None or (len(x.args) > 1 and int(x.args[1]) != self.threads):
                    self.at[:] = now
                    self._arrive_at_barrier(block, np.ones(self.n, bool))
                    return
                block.runs += self.all_warps
                self._join(None)
                now = self.generator.order(block.after)
                continue
            if block.kind == "wait":
                done = self.try_wait(block, None)
                if not done.all():
                    self.at[:], self.blocked = now, ~done
                    return
            block.runs += self.all_warps
            self._check_flying(block, None)
            found = self._function(block, False)(self, self.registers, None)
            if not isinstance(found, int):
                found = np.where(*found) if isinstance(found, tuple) else found
                if not (found == found[0]).all():
                    self.at = found.astype(np.int64)
                    self.alive = self.at >= 0
                    return
                found = int(found[0])
            now = found
            if now < 0:
                self.alive = np.zeros(self.n, bool)
                return

    def _function(self, block: Block, masked: bool) -> Any:
        name = "masked" if masked else "function"
        if getattr(block, name) is None:
            setattr(block, name, self.generator.function(block, masked))
        return getattr(block, name)

    def _check_flying(self, block: Block, m: Any) -> None:
        if not self.flying and not block.has_wgmma:
            return
        for group in range(self.all_warps // 4) if m is None else np.unique(np.flatnonzero(m) // 128):
            state = self.flying.get(int(group), in_flight.State())
            key = block.index, state
            if key not in self.behind:
                self.behind[key] = in_flight.after(block, state)
            state, wrong = self.behind[key]
            for text in wrong:
                self.race(text)
            if state == in_flight.State():
                self.flying.pop(int(group), None)
            else:
                self.flying[int(group)] = state

    # --- barriers
    def _join(self, warps: Any) -> None:
        """The warps (None: those of each CTA) know what any of them knows."""
        clock, w = self.shared.clock, self.warps
        if warps is None:
            every = clock.reshape(-1, w, clock.shape[1])
            every[:] = every.max(axis=1, keepdims=True)
            every[:, np.arange(w), np.arange(w)] += 1
        else:
            clock[warps] = clock[warps].max(axis=0)
            clock[warps, warps % w] += 1

    def _arrive_at_barrier(self, block: Block, m: Any) -> None:
        x = block.code[0]
        if x.guard is not None or self.generator.is_register(x.args[0]):
            raise Fault(f"a guarded barrier, or one whose number is in a register: {x.where()}")
        number, count = int(x.args[0], 0), int(x.args[1]) if len(x.args) > 1 else None
        self.whole_warps(x, m)
        for cta in np.unique(self.lane_cta[m]):
            key, inside = (int(cta), number), m & (self.lane_cta == cta)
            arrived, expected = self.barriers.setdefault(key, (np.zeros(self.n, bool), count))
            if expected != count:
                raise Fault(f"barrier {number} with {count} threads and with {expected}: {x.where()}")
            arrived |= inside
            self.blocked[inside] = True
            self._release(key)

    def _release(self, key: tuple[int, int]) -> None:
        """Let go on who has arrived at a barrier if nobody is missing."""
        arrived, count = self.barriers[key]
        if arrived.sum() >= (count or int((self.alive & (self.lane_cta == key[0])).sum())):
            self._join(np.unique(self.warp[arrived]))
            for now in np.unique(self.at[arrived]):
                self.at[arrived & (self.at == now)] = self.generator.order(self.by_order[int(now)].after)
            self.blocked[arrived] = False
            del self.barriers[key]

    def _release_barriers(self) -> None:
        for key in [*self.barriers]:
            self._release(key)

    def _wake(self) -> bool:
        """Let go on who waits for an mbarrier whose phase has ended. Whether there is anybody."""
        anybody = False
        for now in np.unique(self.at[self.blocked & self.alive]):
            block = self.by_order[int(now)]
            if block.kind == "wait":
                done = self.try_wait(block, self.blocked & self.alive & (self.at == now))
                self.blocked[done] = False
                anybody = anybody or bool(done.any())
        return anybody

    def _where_all_stand(self) -> list[str]:
        lines = []
        for w in range(self.all_warps):
            lanes = np.flatnonzero((self.warp == w) & self.alive)
            for now in np.unique(self.at[lanes]):
                x = self.by_order[int(now)].code[0]
                barrier = f" [{self.mbarrier_at(x, int(lanes[0]))}]" if x.op.startswith("mbarrier") else ""
                lines.append(f"warp {w % self.warps} of CTA {self.ctas[w // self.warps]} at {x.where()}{barrier}")
        return lines
