"""The project's launches, all the way through Triton's compiler and its launcher in C, into the machine.

A process that is to run kernels in the machine is started with `environment()`: then the stub of CUDA's driver (libcuda.c) is
what Triton's launcher loads, and every tensor that the process allocates lies between guards. It must not interpret kernels
(TRITON_INTERPRET). Within `machine(...)` kernels take tensors on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

from fastlayers.dispatch import support
from fastlayers.kernels.runtime import tiles

from .global_memory import GlobalMemory
from .machine import Machine
from .report import Report
from .tma import MAGIC

SHARED_MEMORY = {80: 166_912, 90: 232_448}
"""Bytes that one CTA may have, by target."""


def environment(folder: Path) -> dict[str, str]:
    """The environment variables of a process that can run kernels in the machine. Builds the stub into a folder."""
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source, library = Path(__file__).parent / "libcuda.c", folder / "libcuda.so.1"
    options = f"-shared -fPIC -O1 -w -I{include} -Wl,-soname,libcuda.so.1".split()
    subprocess.run(["gcc", *options, "-o", str(library), str(source), "-ldl", "-lpthread"], check=True)
    (folder / "libcuda.so").symlink_to(library)  # Triton 3.6 links launchers with it
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    paths = {"LD_PRELOAD": str(library), "TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}
    marks = {"PTX_MACHINE": "1", "TRITON_STORE_BINARY_ONLY": "1"}  # of eight files for each kernel three are left
    # Triton 3.6 doesn't ask `_keep_ptx` for a part of its keys, and would find machine code in the cache of everybody else.
    marks["TRITON_CACHE_DIR"] = str(Path(knobs.cache.dir) / "ptx_machine")
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | threads | paths | marks


def _keep_ptx(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str] | None:
    """Triton's hook into the stages of a compilation: nothing is assembled, since the machine runs PTX, and what stands for the
    machine code is the PTX itself. Without arguments it says what to add to the keys of Triton's caches."""
    if stages is None:
        return "ptx_machine", "ptx_machine"
    stages["cubin"] = lambda text, metadata: text.encode()
    return None


class _Device(int):
    """-1, which is what a CPU tensor's get_device() says, but another key for each target in Triton's caches: without that,
    the second target of a process would be given the first one's kernels."""

    def __new__(cls, architecture: int) -> _Device:
        device = super().__new__(cls, -1)
        device.architecture = architecture
        return device

    def __hash__(self) -> int:
        return self.architecture


class _Driver:
    """Triton's driver for the stub."""

    def __init__(self, architecture: int):
        self.target, self.device = GPUTarget("cuda", architecture, 32), _Device(architecture)
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: Any = None) -> int:
        return 0


class Bridge:
    """Between the stub and the machines of the kernels that were loaded."""

    def __init__(self) -> None:
        if not os.environ.get("PTX_MACHINE"):
            raise RuntimeError("this process has not the environment that ptx_machine.bridge.environment makes")
        self.library = ctypes.CDLL("libcuda.so.1")
        types = (ctypes.c_ulonglong, *[ctypes.c_uint] * 3, ctypes.POINTER(ctypes.c_void_p))
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, *types)(self._launched)
        self.library.machine_set_callback(self._callback)
        self.library.machine_watch(1)
        self.sources: dict[int, Path] = {}
        """The PTX of each function that was loaded."""
        self.machines: dict[int, Machine] = {}
        self.options: dict[str, Any] = {}
        self.edit: Callable[[str], str] | None = None
        """What is done to each PTX before it runs: how tests plant faults."""
        self.reports: list[Report] = []
        self.error: BaseException | None = None

    def loaded(self, *args: Any, **kwargs: Any) -> None:
        """Triton's hook: it has loaded a kernel."""
        function, group = (kwargs["function"], kwargs["metadata_group"]) if kwargs else (args[1], args[3])
        self.sources[function] = Path(next(path for name, path in group.items() if name.endswith(".cubin")))

    def _machine(self, function: int) -> Machine:
        if self.edit is not None:
            return Machine(self.edit(self.sources[function].read_text()))
        if function not in self.machines:
            self.machines[function] = Machine(self.sources[function].read_text())
        return self.machines[function]

    def _launched(self, function: int, grid: int, threads: int, shared: int, pointers: Any) -> int:
        try:
            machine = self._machine(function)
            _, size, offset = machine.kernel.params[-1]
            params = bytearray(offset + size)
            for i, (_, size, offset) in enumerate(machine.kernel.params):
                params[offset : offset + size] = ctypes.string_at(pointers[i], size)
            memory = GlobalMemory(self._allocations(machine, bytes(params)))
            self.reports.append(machine.launch(grid, bytes(params), memory, shared, threads, **self.options))
            return 0
        except BaseException as error:  # it can't pass through C, so `machine` raises it
            self.error = error
            return 1

    def _allocations(self, machine: Machine, params: bytes) -> Iterator[tuple[int, int]]:
        """Begin and size of the tensors that parameters and tensor maps point into."""
        begin, bytes_ = ctypes.c_ulonglong(), ctypes.c_ulonglong()
        for _, size, offset in machine.kernel.params:
            address = 0
            if size == 8:
                (address,) = struct.unpack_from("<Q", params, offset)
            elif size == 128:
                magic, _, address = struct.unpack_from("<QQQ", params, offset)
                address = address if magic == MAGIC else 0
            found = ctypes.byref(begin), ctypes.byref(bytes_)
            if address and self.library.machine_allocation(ctypes.c_ulonglong(address), *found):
                yield begin.value, bytes_.value


_bridge: Bridge | None = None


@contextlib.contextmanager
def machine(target: str = "sm_90", edit: Callable[[str], str] | None = None, **options: Any) -> Iterator[list[Report]]:
    """Within, kernels take CPU tensors, are compiled for the target, and run in the machine. Yields the reports of launches.

    Args:
        edit: what to do to each PTX before it runs.
        options: the machine's.
    """
    global _bridge
    bridge = _bridge = _bridge or Bridge()
    architecture = int(target[3:])
    bridge.library.machine_set_shared_memory(SHARED_MEMORY[architecture])
    before = support.unsupported_device, tiles.device, driver._active
    knobs.runtime.add_stages_inspection_hook = _keep_ptx  # type: ignore[assignment]
    support.unsupported_device = lambda device: None
    tiles.device = lambda device: tiles.Device(target, 132)  # type: ignore[assignment]
    driver.set_active(_Driver(architecture))  # type: ignore[arg-type]
    knobs.runtime.kernel_load_end_hook.add(bridge.loaded)
    bridge.options, bridge.edit, bridge.reports, bridge.error = options, edit, [], None
    try:
        yield bridge.reports
        if bridge.error is not None:
            raise bridge.error
    except RuntimeError as error:
        if bridge.error is not None and error is not bridge.error:
            raise bridge.error from None
        raise
    finally:
        knobs.runtime.kernel_load_end_hook.remove(bridge.loaded)
        knobs.runtime.add_stages_inspection_hook = None
        support.unsupported_device, tiles.device, driver._active = before


def races(reports: list[Report]) -> list[str]:
    """What was wrong in these launches, each once."""
    return [*dict.fromkeys(race for report in reports for race in report.races if not _by_triton_3_6(race))]


def _by_triton_3_6(race: str) -> bool:
    """Whether it is one that Triton 3.6 is known for: it leaves out the fence between copies by threads and products, which 3.7
    puts in."""
    if not triton.__version__.startswith("3.6.") or "async proxy reads" not in race:
        return False
    writer = race.rsplit("): PTX line", 1)[0]  # what stands behind it is the reader
    return "cp.async." in writer and "cp.async.bulk" not in writer


def tensor_is_watched(tensor: torch.Tensor) -> bool:
    """Whether the machine would let a kernel access this tensor's memory."""
    assert _bridge is not None
    found = ctypes.byref(ctypes.c_ulonglong()), ctypes.byref(ctypes.c_ulonglong())
    return bool(_bridge.library.machine_allocation(ctypes.c_ulonglong(tensor.data_ptr()), *found))
