"""Operands of PTX as expressions of Python over arrays of lanes.

A register is an array of unsigned integers of its width (of bool, if it is a predicate), with an element for each lane. Types
such as f32 are views of these.
"""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np

from . import arithmetic
from .parser import Instruction, Kernel

UNSIGNED = {"pred": "?", "b16": "u2", "b32": "u4", "b64": "u8"}
SIZE = {"pred": 1, "b16": 2, "b32": 4, "b64": 8}
NUMPY = {
    "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "b32": "u4", "u32": "u4", "s32": "i4",
    "b64": "u8", "u64": "u8", "s64": "i8", "f32": "f4", "f64": "f8", "f16": "f2", "f16x2": "u4", "bf16x2": "u4", "bf16": "u2",
    "s16x2": "u4", "u16x2": "u4", "pred": "?",
}  # fmt: skip
SPECIAL = {
    "%tid.x": "tid", "%ctaid.x": "ctaid", "%nctaid.x": "nctaid", "%ntid.x": "ntid", "%laneid": "laneid", "%warpid": "warpid",
    **dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z", "%cluster_ctarank", "%cluster_ctaid.x"), "zero"),
    **dict.fromkeys(("%nctaid.y", "%nctaid.z", "%cluster_nctarank"), "one"),
    "%clusterid.x": "ctaid", "%nclusterid.x": "nctaid",
}  # fmt: skip
"""Special registers, by the machine's name for them."""


class Unknown(Exception):
    """Something that the machine doesn't emulate."""


def vector(text: str) -> list[str]:
    """The registers of {a, b}, or the only one."""
    return [t.strip() for t in text.strip("{} ").split(",")] if text.startswith("{") else [text]


class Operands:
    """Reads operands as expressions, and writes expressions into registers, line by line of the function of a block."""

    lines: list[str]
    """Of the function that is being written."""
    x: Instruction
    """The instruction that is being written."""
    lanes: str | None
    """The expression for the lanes that execute it; None: all."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.index = {name: i for i, name in enumerate(kernel.registers)}
        self.classes = list(kernel.registers.values())
        self.offsets = {name: offset for name, _, offset in kernel.params}
        self.names: dict[str, Any] = {"np": np, "where": np.where, "I": {}, **vars(arithmetic)}
        """The globals of the functions."""
        self.names["I"] = {x.id: x for block in kernel.blocks for x in block.code}

    def keep(self, value: Any) -> str:
        """A name for a value among the globals."""
        name = f"k{len(self.names)}"
        self.names[name] = value
        return name

    def is_register(self, a: str) -> bool:
        return a in self.index

    def constant(self, a: str, t: str) -> str:
        """The name of a constant of type t."""
        if t == "pred":
            return self.keep(np.bool_(int(a, 0)))
        dtype = np.dtype("f4" if t == "bf16" else NUMPY[t])
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", a):
            value = np.frombuffer(struct.pack("<I", int(a[2:], 16)), "<f4" if dtype.kind == "f" else "<u4")[0]
        elif re.fullmatch(r"0[dD][0-9a-fA-F]{16}", a):
            value = np.frombuffer(struct.pack("<Q", int(a[2:], 16)), "<f8" if dtype.kind == "f" else "<u8")[0]
        else:
            bits = 0 if a == "global_smem" else int(a.rstrip("Uu"), 0)
            bits = bits << 16 if t == "bf16" else bits & ((1 << 8 * dtype.itemsize) - 1)
            value = np.array([bits], f"u{dtype.itemsize}").view(dtype)[0]
        return self.keep(np.array(value).astype(dtype)[()])

    def read(self, a: str, t: str) -> str:
        """An expression for an operand, as an array of type t."""
        if a.startswith("!"):
            return f"~R[{self.index[a[1:]]}]"
        if a in SPECIAL:
            return f"M.{SPECIAL[a]}" + (".astype('u8')" if t.endswith("64") else "")
        if a in self.offsets:  # the address of a parameter
            return f"M.param_address({self.offsets[a]})"
        if not self.is_register(a):
            return self.constant(a, t)
        i = self.index[a]
        held = self.classes[i]
        if t == "pred" or held == "pred":
            return f"R[{i}]"
        if t == "bf16":
            return f"bf16(R[{i}])"
        dtype = np.dtype(NUMPY[t])
        narrowed = f"R[{i}].astype('u{dtype.itemsize}')" if dtype.itemsize < SIZE[held] else f"R[{i}]"
        return narrowed if dtype.kind == "u" else f"{narrowed}.view('{dtype.kind}{dtype.itemsize}')"

    def stored(self, register: str, e: str, t: str) -> str:
        """The expression e, of type t, as what its register holds."""
        held = self.classes[self.index[register]]
        if held == "pred":
            return e
        if t == "bf16":
            e, t = f"to_bf16({e})", "u16"
        dtype = np.dtype(NUMPY[t])
        if dtype.itemsize < SIZE[held]:
            if dtype.kind == "i":
                return f"({e}).astype('i{SIZE[held]}').view('{UNSIGNED[held]}')"
            return f"({e}).astype('u{SIZE[held]}')"
        if dtype.itemsize > SIZE[held]:
            return f"({e}).astype('{UNSIGNED[held]}')"
        return e if dtype.kind == "u" else f"({e}).view('{UNSIGNED[held]}')"

    def put(self, register: str, e: str, t: str) -> None:
        """Write into a register the expression e of type t, which has an element for each lane."""
        if register != "_":
            i, e = self.index[register], self.stored(register, e, t)
            self.lines.append(f"R[{i}] = {e}" if self.lanes is None else f"R[{i}] = where({self.lanes}, {e}, R[{i}])")

    def scatter(self, register: str, e: str, t: str) -> None:
        """As `put`, where e has elements for the lanes that execute the instruction alone."""
        if register != "_":
            i, e = self.index[register], self.stored(register, e, t)
            self.lines.append(f"R[{i}] = {e}" if self.lanes is None else f"R[{i}] = put(R[{i}], {self.lanes}, {e})")

    def call(self, method: str, *args: Any) -> str:
        """An expression that calls a method of the machine with the instruction."""
        return f"M.{method}(I[{self.x.id}], {', '.join(map(str, args))})"

    def address(self, text: str, t: str) -> str:
        """An expression for the address [register + offset]."""
        match = re.match(r"([%\w$]+)\s*(?:\+\s*(-?\w+))?$", text.strip()[1:-1].strip())
        if match is None:
            raise Unknown(f"address {text}")
        base, offset = match[1], int(match[2] or "0", 0)
        if base == "global_smem":
            return f"M.full(np.uint32({offset}))"
        e = self.read(base, t)
        return f"({e} + {self.constant(str(offset), t)})" if offset else e

    def list_of(self, text: str, t: str) -> str:
        """An expression for the list of a vector's registers."""
        return f"[{', '.join(self.read(register, t) for register in vector(text))}]"
