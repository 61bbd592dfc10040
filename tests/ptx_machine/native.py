"""native.c, compiled when it is first wanted, and how arrays are passed to it.

Where there is no compiler, and with the machine's option native=False, NumPy does everything: what is said here and there is the
same (own_tests.py).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

_OPTIONS = ["-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC"]
_ARRAYS = ["bytes", "clock", "fenced", "writer", "written", "written_by", "read", "read_by"]
_SIZES = ["size", "warps", "agents", "granule"]
KINDS = {"bf16": 0, "f16": 1, "tf32": 2}


@cache
def library() -> Any:
    """The functions, or None if they can't be compiled. The file is kept among those of a user's that are temporary."""
    compiler, source = shutil.which("gcc"), Path(__file__).with_name("native.c")
    if compiler is None:
        return None
    folder = Path(tempfile.gettempdir()) / f"ptx_machine-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    compiled = folder / f"{hashlib.sha256(source.read_bytes()).hexdigest()[:24]}.so"
    if not compiled.exists():
        made = f"{compiled}.{os.getpid()}"
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        done = subprocess.run([compiler, *_OPTIONS, "-o", made, str(source), "-lm"], env=environment, check=False)
        if done.returncode:
            return None
        os.replace(made, compiled)
    return ctypes.CDLL(str(compiled))


def pointer(a: Any) -> ctypes.c_void_p | None:
    """To a contiguous array's elements; the caller keeps the array. None is NULL."""
    return None if a is None else ctypes.c_void_p(a.__array_interface__["data"][0])


def integer(n: Any) -> ctypes.c_int64:
    return ctypes.c_int64(int(n))


def pointers(arrays: Iterable[Any]) -> Any:
    """An array of pointers to arrays."""
    found = [a.__array_interface__["data"][0] for a in arrays]
    return (ctypes.c_void_p * len(found))(*found)


def wide(a: Any) -> Any:
    """As int64 and contiguous."""
    return np.ascontiguousarray(a, np.int64)


class Shared(ctypes.Structure):
    """See native.c."""

    _fields_: Sequence[tuple[str, Any]] = [
        *((name, ctypes.c_void_p) for name in _ARRAYS), *((name, ctypes.c_int64) for name in _SIZES),
    ]  # fmt: skip


class Allocation(ctypes.Structure):
    _fields_: Sequence[tuple[str, Any]] = [
        ("begin", ctypes.c_int64), ("size", ctypes.c_int64), ("writer", ctypes.c_void_p), ("reader", ctypes.c_void_p),
    ]  # fmt: skip


def shared(memory: Any) -> Any:
    """Of a SharedMemory."""
    addresses = [getattr(memory, name).__array_interface__["data"][0] for name in _ARRAYS]
    return ctypes.byref(Shared(*addresses, *(getattr(memory, name) for name in _SIZES)))


def allocations(all_: Sequence[Any]) -> Any:
    rows = [
        Allocation(a.begin, a.size, *(v.__array_interface__["data"][0] for v in (a.writer, a.reader))) for a in all_
    ]
    return (Allocation * len(rows))(*rows)


class Counts:
    """What native.c counts at an instruction, if that wasn't counted often enough yet."""

    def __init__(self, x: Any, enough: int, second: str):
        self.x, self.second = x, second
        self.array = np.zeros(3, np.int64) if x.samples < enough else None

    def add(self) -> None:
        if self.array is not None:
            ideal, second, samples = self.array.tolist()
            self.x.ideal += ideal
            setattr(self.x, self.second, getattr(self.x, self.second) + second)
            self.x.samples += samples
