"""From basic blocks of PTX to functions of Python over arrays of lanes.

A block becomes one function `(M, R, m)`: M is the machine, R the registers, m the lanes that run it, or None for all of them. It
returns the order of the block that follows (-1: exit), or (predicate, order if true, order if false), or an array of orders.
An instruction that isn't known is an error.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .computing import Computing
from .operands import NUMPY, Unknown, vector
from .parser import Block, Instruction

_NOTHING = ("pragma", "setmaxnreg", "membar", "griddepcontrol", "discard", "prefetch", "nanosleep")
"""Instructions without an effect on what is computed here."""


class Generator(Computing):
    """Writes the functions of a kernel's blocks."""

    block: Block
    """Whose function is being written."""

    def function(self, block: Block, masked: bool) -> Any:
        self.block, self.lines = block, []
        for x in block.code[block.kind == "barrier" :]:  # barriers are the scheduler's
            try:
                self._instruction(x, masked)
            except (Unknown, KeyError, IndexError, ValueError, TypeError) as error:
                raise NotImplementedError(f"{error!r} in {x.where()}") from error
        if not block.code or block.code[-1].parts[0] not in ("bra", "ret", "exit", "brx"):
            self.lines.append(f"return {self.order(block.after)}")
        source = "\n ".join(["def block(M, R, m):", *self.lines])
        exec(compile(source, f"<{self.kernel.name}, block {block.index}>", "exec"), self.names)
        return self.names["block"]

    def order(self, index: int) -> int:
        return self.kernel.blocks[index].order if index < len(self.kernel.blocks) else -1

    def _instruction(self, x: Instruction, masked: bool) -> None:
        self.x, self.lanes = x, "m" if masked else None
        op = x.parts[0]
        if x.guard and op not in ("bra", "ret", "exit"):
            self.lines.append(f"q = {'m & ' if masked else ''}{self._guard()}")
            self.lanes = "q"
        if op in _NOTHING:
            return
        method = getattr(self, f"do_{op}", None)
        if method is None:
            raise Unknown(x.op)
        method()

    def _guard(self) -> str:
        return ("~" if self.x.negated else "") + f"R[{self.index[self.x.guard or '']}]"

    def _whole_warps(self) -> None:
        self.lines.append(self.call("whole_warps", "m"))

    # --- control
    def do_bra(self) -> None:
        to = self.order(self.kernel.labels[self.x.args[0]])
        guarded = f"({self._guard()}, {to}, {self.order(self.block.after)})" if self.x.guard else to
        self.lines.append(f"return {guarded}")

    def _exit(self) -> None:
        guarded = f"({self._guard()}, -1, {self.order(self.block.after)})" if self.x.guard else -1
        self.lines.append(f"return {guarded}")

    do_ret = do_exit = _exit

    def do_brx(self) -> None:
        table = [self.order(self.kernel.labels[label]) for label in self.kernel.tables[self.x.args[1]]]
        self.lines.append(
            f"return {self.keep(np.array(table))}[np.minimum({self.operand(0, 'u32')}, {len(table) - 1})]"
        )

    def do_fence(self) -> None:
        if "proxy" in self.x.parts and any(s.startswith("async") for s in self.x.parts):
            self.lines.append(f"M.proxy_fence({self.lanes})")

    def do_bar(self) -> None:
        if self.x.parts[1] != "warp":  # the others begin a block
            raise Unknown(self.x.op)

    # --- memory
    def _space(self) -> str:
        for part in self.x.parts:
            if part.startswith("shared"):
                return "shared"
            if part in ("global", "param"):
                return part
        raise Unknown("a generic address")

    def do_createpolicy(self) -> None:
        self.result("M.full(np.uint64(0))", "b64")

    def do_ld(self) -> None:
        t, args = self.t, self.x.args
        size, registers = np.dtype(NUMPY[t]).itemsize, vector(args[0])
        match = re.match(r"\[\s*(\w+)\s*(?:\+\s*(\d+))?\s*\]", args[1])
        if "param" in self.x.parts and match:
            offset = self.offsets[match[1]] + int(match[2] or 0)
            for i, register in enumerate(registers):
                self.put(register, f"M.param({offset + i * size}, '{np.dtype(NUMPY[t])}')", t)
            return
        space = self._space()
        address = self.address(args[1], "b32" if space == "shared" else "b64")
        self.lines.append(f"v = {self.call(f'load_{space}', address, self.lanes, size, len(registers))}")
        for i, register in enumerate(registers):
            signed = t[0] == "s"
            e = f"v[{i}].view('i{size}')" if signed else f"v[{i}]"
            self.scatter(register, e, ("s" if signed else "b") + str(8 * size))

    def do_st(self) -> None:
        size, space = np.dtype(NUMPY[self.t]).itemsize, self._space()
        address = self.address(self.x.args[0], "b32" if space == "shared" else "b64")
        values = self.list_of(self.x.args[1], f"b{8 * size}")
        self.lines.append(self.call(f"store_{space}", address, self.lanes, size, values))

    # --- within a warp
    def do_shfl(self) -> None:
        to = self.x.args[0].split("|")
        self._whole_warps()
        args = ", ".join(self.operand(i, "b32") for i in (1, 2, 3))
        self.lines.append(f"v, w = M.shuffle('{self.x.parts[2]}', {args})")
        self.put(to[0], "v", "b32")
        if len(to) > 1:
            self.put(to[1], "w", "pred")

    def do_elect(self) -> None:
        to = self.x.args[0].split("|")
        self.lines.append("v, w = M.elect(m)")
        self.put(to[0], "v", "b32")
        self.put(to[1], "w", "pred")

    def do_activemask(self) -> None:
        self.result("M.ballot(M.full(np.bool_(True)), m)", "b32")

    def do_vote(self) -> None:
        self._whole_warps()
        how, p = self.x.parts[2], self.operand(1, "pred")
        e = {"ballot": f"M.ballot({p}, m)", "any": f"M.ballot({p}, m) != 0", "all": f"M.ballot(~({p}), m) == 0"}[how]
        self.result(e, "b32" if how == "ballot" else "pred")

    def do_redux(self) -> None:
        self._whole_warps()
        self.result(f"M.redux('{self.x.parts[2]}', {self.operand(1)})")

    # --- asynchronous copies
    def do_cp(self) -> None:
        op, args, q = self.x.op, self.x.args, self.lanes
        if op.startswith("cp.async.bulk.tensor"):
            self._tensor_copy()
        elif op.startswith("cp.async.bulk.commit_group"):
            self.lines.append(f"M.bulk_commit({q})")
        elif op.startswith("cp.async.bulk.wait_group"):
            self.lines.append(f"M.bulk_wait({q}, {int(args[0])})")
        elif op.startswith("cp.async.commit_group"):
            self.lines.append(f"M.cp_commit({q})")
        elif op.startswith(("cp.async.wait_group", "cp.async.wait_all")):
            self.lines.append(f"M.cp_wait({q}, {int(args[0]) if args else 0})")
        elif op.startswith(("cp.async.ca.shared", "cp.async.cg.shared")):
            size = int(args[2], 0)
            policy = len(args) > 3 and args[3].startswith("%rd")
            given = self.read(args[3], "b32") if len(args) > 3 and not policy else f"M.full(np.uint32({size}))"
            to, of = self.address(args[0], "b32"), self.address(args[1], "b64")
            self.lines.append(self.call("cp_async", q, to, of, size, given))
        else:
            raise Unknown(op)

    def _tensor_copy(self) -> None:
        parts, args = self.x.parts, self.x.args
        loads = parts[5].startswith("shared") and any(s.startswith("mbarrier") for s in parts)
        if not loads and parts[5] != "global":
            raise Unknown(self.x.op)
        match = re.match(r"\[\s*([%\w]+)\s*,\s*\{(.*)\}\s*\]", args[1 if loads else 0])
        assert match
        coordinates = f"[{', '.join(self.read(c.strip(), 's32') for c in match[2].split(','))}]"
        shared, tensor_map = self.address(args[0 if loads else 1], "b32"), self.read(match[1], "b64")
        if loads:
            barrier = self.address(args[2], "b32")
            self.lines.append(self.call("tma_load", self.lanes, shared, tensor_map, coordinates, barrier))
        else:
            self.lines.append(self.call("tma_store", self.lanes, shared, tensor_map, coordinates))

    def do_mbarrier(self) -> None:
        op, args, q = self.x.op, self.x.args, self.lanes
        if op.startswith("mbarrier.init"):
            self.lines.append(self.call("mbarrier_init", q, self.address(args[0], "b32"), self.operand(1, "b32")))
        elif op.startswith("mbarrier.inval"):
            self.lines.append(self.call("mbarrier_inval", q, self.address(args[0], "b32")))
        elif op.startswith("mbarrier.arrive.expect_tx"):
            arrive = self.call("mbarrier_arrive", q, self.address(args[1], "b32"), 1, self.operand(2, "b32"))
            self.lines.append(arrive)
        elif op.startswith("mbarrier.expect_tx"):
            arrive = self.call("mbarrier_arrive", q, self.address(args[0], "b32"), 0, self.operand(1, "b32"))
            self.lines.append(arrive)
        elif op.startswith("mbarrier.arrive") and "noComplete" not in self.x.parts:
            count = self.operand(2, "b32") if len(args) > 2 else 1
            self.lines.append(self.call("mbarrier_arrive", q, self.address(args[1], "b32"), count, None))
        elif op.startswith(("mbarrier.try_wait.parity", "mbarrier.test_wait.parity")):
            self.result("M.full(np.bool_(True))", "pred")  # the scheduler has waited
        else:
            raise Unknown(op)

    # --- tensor cores
    def _matrices(self) -> tuple[int, bool]:
        if self.t != "b16" or "m8n8" not in self.x.parts:
            raise Unknown(self.x.op)
        self._whole_warps()
        return int(next(p for p in self.x.parts if re.fullmatch(r"x[124]", p))[1]), "trans" in self.x.parts

    def do_ldmatrix(self) -> None:
        count, transposed = self._matrices()
        load = self.call("ldmatrix", self.address(self.x.args[1], "b32"), self.lanes, count, transposed)
        self.lines.append(f"v = {load}")
        for i, register in enumerate(vector(self.x.args[0])):
            self.put(register, f"v[{i}]", "b32")

    def do_stmatrix(self) -> None:
        count, transposed = self._matrices()
        values = self.list_of(self.x.args[1], "b32")
        address = self.address(self.x.args[0], "b32")
        self.lines.append(self.call("stmatrix", address, self.lanes, count, transposed, values))

    def _shape(self) -> str:
        return next(p for p in self.x.parts if re.fullmatch(r"m\d+n\d+k\d+", p))

    def do_mma(self) -> None:
        self._whole_warps()
        d, a, _, c = self.x.parts[-4:]
        operands = [self.list_of(s, "b64" if a == "f64" else "b32") for s in self.x.args[1:3]]
        width = "b64" if d == "f64" else "b32"
        accumulator = self.list_of(self.x.args[3], width)
        self.lines.append(f"v = {self.call('mma', repr(self._shape()), repr(a), repr(c), *operands, accumulator, 'm')}")
        for i, register in enumerate(vector(self.x.args[0])):
            self.put(register, f"v[{i}]", width)

    def do_wgmma(self) -> None:
        self._whole_warps()
        what, args = self.x.parts[1], self.x.args
        if what == "commit_group":
            self.lines.append("M.wgmma_commit(m)")
        elif what == "wait_group":
            self.lines.append(f"M.wgmma_wait(m, {int(args[0])})")
        elif what == "mma_async":
            a = self.list_of(args[1], "b32") if args[1].startswith("{") else self.read(args[1], "b64")
            scale, *rest = args[3:]
            use = self.read(scale, "pred") if self.is_register(scale) else f"M.full(np.bool_({int(scale)}))"
            signs, transposed = [int(s) for s in rest[:2]], [int(s) for s in rest[2:]] or [0, 0]
            if len(transposed) == 1:  # a is in registers
                transposed = [0, *transposed]
            kinds = repr(self.x.parts[-3]), repr(self.x.parts[-1])
            accumulator, b = self.list_of(args[0], "b32"), self.read(args[2], "b64")
            call = self.call("wgmma", repr(self._shape()), *kinds, accumulator, a, b, use, signs, transposed, "m")
            self.lines.append(f"v = {call}")
            for i, register in enumerate(vector(args[0])):
                self.put(register, f"v[{i}]", "b32")
        elif what != "fence":
            raise Unknown(self.x.op)
