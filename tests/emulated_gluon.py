"""What experimental/specialized.py uses of Gluon, in NumPy and threads: its own Python functions run here, a thread for
each job, with barriers that count phases as PTX's do, and with everything asynchronous done as early or as late as may be.

From the moment that a fetch is issued its place in shared memory is NaN until it arrives. A product reads its operands
either when it is issued or when it is waited for. A tile is written to memory when it is issued, or when it is waited for.
So what is used too early or overwritten too soon shows in the result; what waits for ever, as a thread that doesn't end.
"""

from __future__ import annotations

import random
import threading
import time
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastlayers.kernels.matmul.experimental import specialized as kernels

SECONDS = 60


class Array(np.ndarray):
    """With Gluon's method of converting."""

    def to(self, dtype: Any) -> Array:
        return self.astype(dtype).view(Array)


class Barrier:
    """Source: PTX ISA, mbarrier: a phase ends when nobody is missing and no bytes are; waiting for a parity is waiting for
    the end of the phase with that parity, which of a new barrier the one before its first has."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.count = self.missing = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def change(self, arrivals: int = 0, expected: int = 0, arrived: int = 0) -> None:
        with self.condition:
            self.missing -= arrivals
            self.bytes += expected - arrived
            assert self.missing >= 0, "more arrivals than the barrier counts"
            if self.missing == self.bytes == 0:
                self.missing = self.count
                self.phase += 1
                self.condition.notify_all()

    def wait(self, parity: int) -> None:
        with self.condition:
            if not self.condition.wait_for(lambda: self.phase % 2 != parity, SECONDS):
                raise TimeoutError("a barrier that nobody opens")


class Shared:
    """A block of shared memory, or a view of one."""

    def __init__(self, array: np.ndarray):
        self.array, self.fenced = array, True

    def index(self, i: int) -> Shared:
        return Shared(self.array[i])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.array.transpose(order))

    def store(self, value: np.ndarray) -> None:
        self.array[...], self.fenced = value, False


class Accumulator(Array):
    """Sums so far, and the products that are on their way."""

    pending: list[Callable[[], np.ndarray]]


class Pointer:
    def __init__(self, array: np.ndarray, offset: Any = 0):
        self.array, self.offset = array, offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.array, self.offset + offset)


def descriptor(array: np.ndarray, block: list[int]) -> Any:
    return SimpleNamespace(array=array, dtype=array.dtype, layout=None, block_type=SimpleNamespace(shape=block))


def box(array: np.ndarray, corner: list[int], shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a box and the array overlap: in the array, and in the box."""
    ends = [max(0, min(c + s, n) - c) for c, s, n in zip(corner, shape, array.shape, strict=True)]
    return tuple(slice(c, c + e) for c, e in zip(corner, ends, strict=True)), tuple(slice(0, e) for e in ends)


class Machine:
    """One multiprocessor. `free_count`, `stores_wait`: for tests of the test, how often a stage must be given back before it
    is fetched into again, and whether a write is waited for."""

    def __init__(self, program: int, programs: int, seed: int, *, free_count: int = 2, stores_wait: bool = True):
        self.random, self.here = random.Random(seed), threading.local()
        self.fetches: list[threading.Thread] = []
        self.errors: list[BaseException] = []

        def fetch(d: Any, corner: list[int], barrier: Barrier, target: Shared) -> None:
            target.array[...] = np.nan
            delay = self.random.choice((0, 0, 0.001, 0.003))

            def arrive() -> None:
                time.sleep(delay)
                inside, part = box(d.array, corner, target.array.shape)
                tile = np.zeros(target.array.shape, d.array.dtype)
                tile[part] = d.array[inside]
                target.array[...] = tile
                barrier.change(arrived=tile.size * 2)

            self.fetches.append(self.start(arrive))

        def write(d: Any, corner: list[int], source: Shared) -> None:
            assert source.fenced, "written by threads, read by TMA, and no fence between"

            def store() -> None:
                inside, part = box(d.array, corner, source.array.shape)
                d.array[inside] = source.array[part]

            self.here.stores = [*getattr(self.here, "stores", []), store]
            if self.random.random() < 0.3:
                self.here.stores.pop()()

        def store_wait(pendings: int) -> None:
            if stores_wait:
                self.finish_stores(pendings)

        def multiply(a: Shared, b: Shared, accumulator: Any, is_async: bool) -> Accumulator:
            result = np.asarray(accumulator).copy().view(Accumulator)
            result.pending = list(getattr(accumulator, "pending", []))
            early = (a.array @ b.array) if self.random.random() < 0.5 else None
            result.pending.append(lambda: a.array @ b.array if early is None else early)
            return result

        def wait(outstanding: int, deps: tuple[Accumulator]) -> Accumulator:
            (accumulator,) = deps
            result = np.asarray(accumulator).copy().view(Accumulator)
            late = len(accumulator.pending) - outstanding
            for product in accumulator.pending[: max(late, 0)]:
                result += product()
            result.pending = accumulator.pending[max(late, 0) :]
            return result

        def fence() -> None:
            for block in self.blocks:
                block.fenced = True

        def allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
            if dtype == "barriers":
                barriers = [Barrier() for _ in range(shape[0])]
                return SimpleNamespace(index=lambda i: barriers[i])
            self.blocks.append(Shared(np.full(shape, np.nan, dtype)))
            return self.blocks[-1]

        def load(pointer: Pointer, mask: np.ndarray, other: float) -> Array:
            at = np.where(mask, pointer.offset, 0)
            return np.where(mask, pointer.array[at], other).view(Array)

        def init(barrier: Barrier, count: int) -> None:
            barrier.init(free_count if count == 2 else count)

        self.blocks: list[Shared] = []
        self.names: dict[str, Any] = {
            "gl": SimpleNamespace(
                cdiv=lambda a, b: -(-a // b), program_id=lambda axis: program, num_programs=lambda axis: programs,
                static_range=range, constexpr=lambda value: value, float32=np.float32, int64="barriers",
                zeros=lambda shape, dtype, layout: np.zeros(shape, dtype).view(Array),
                arange=lambda begin, end, layout: np.arange(begin, end), load=load, expand_dims=np.expand_dims,
                NVMMADistributedLayout=lambda **_: None, SliceLayout=lambda *_: None,
                allocate_shared_memory=allocate, warp_specialize=self.run_jobs,
            ),
            "mbarrier": SimpleNamespace(
                init=init, MBarrierLayout=lambda: None, wait=lambda barrier, parity: barrier.wait(parity),
                expect=lambda barrier, size: barrier.change(arrivals=1, expected=size),
                arrive=lambda barrier, pred=True: barrier.change(arrivals=1) if pred else None,
            ),
            "tma": SimpleNamespace(store_wait=store_wait),
            "hopper": SimpleNamespace(warpgroup_mma=multiply, warpgroup_mma_wait=wait, fence_async_shared=fence),
            "_fetch": fetch,
            "_write": write,
        }  # fmt: skip
        for name in ("_place", "_produce", "_consume", "_matmul_specialized_kernel"):
            self.names[name] = types.FunctionType(getattr(kernels, name).fn.__code__, self.names, name)

    def finish_stores(self, pendings: int = 0) -> None:
        stores = getattr(self.here, "stores", [])
        while len(stores) > pendings:
            stores.pop(0)()

    def start(self, work: Callable[..., None], *args: Any) -> threading.Thread:
        """A thread that does this, and leaves its error to be raised by `run_jobs`."""

        def guarded() -> None:
            try:
                work(*args)
            except BaseException as error:
                self.errors.append(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread

    def run_jobs(self, jobs: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
        assert len(jobs) == 1 + len(warps) == 1 + len(registers)

        def work(job: Any, args: tuple[Any, ...]) -> None:
            job(*args)
            self.finish_stores()  # what nobody waited for happens at last

        threads = [self.start(work, *job) for job in jobs]
        for thread in threads + self.fetches:
            thread.join(2 * SECONDS)
            if thread.is_alive():
                raise TimeoutError("a job that doesn't end")
        if self.errors:
            raise self.errors[0]


def matmul(
    a: np.ndarray,
    b: np.ndarray,
    bias: np.ndarray | None,
    then: Callable[[Any, tuple[float, ...]], Any] | None,
    tile: tuple[int, int, int],
    *,
    stages: int,
    programs: int,
    transposed: tuple[bool, bool],
    seed: int,
    **broken: Any,
) -> np.ndarray:
    """then(a @ b + bias) by the kernel's own functions, with NaN where nothing was written."""
    (m, k), n = a.shape, b.shape[1]
    tile_m, tile_n, tile_k = tile
    half, c = tile_m // 2, np.full((m, n), np.nan)
    a_tiles = descriptor(a.T, [tile_k, half]) if transposed[0] else descriptor(a, [half, tile_k])
    b_tiles = descriptor(b.T, [tile_n, tile_k]) if transposed[1] else descriptor(b, [tile_k, tile_n])
    for program in range(programs):
        machine = Machine(program, programs, seed + program, **broken)
        machine.names["_matmul_specialized_kernel"](
            None, descriptor(c, [half, tile_n]), a_tiles, b_tiles, None if bias is None else Pointer(bias), m, n, k,
            then, (), *transposed, 2, stages, tile_m, tile_n, tile_k,
        )  # fmt: skip
    return c
