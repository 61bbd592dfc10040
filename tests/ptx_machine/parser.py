"""Reading PTX: from its text to a kernel of basic blocks.

It reads what Triton writes, which is what LLVM's NVPTX back end and Triton's inline assembly print, and no other PTX.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

BARRIERS = ("bar.sync", "barrier.sync", "bar.red")
WAITS = ("mbarrier.try_wait", "mbarrier.test_wait")
"""Where a warp may have to wait: such an instruction begins a block."""

_CLASSES = {
    "pred": "pred", "b8": "b16", "b16": "b16", "b32": "b32", "b64": "b64", "f16": "b16", "f32": "b32", "f64": "b64",
    "u16": "b16", "u32": "b32", "u64": "b64", "s16": "b16", "s32": "b32", "s64": "b64", "u8": "b16", "s8": "b16",
}  # fmt: skip
"""What a register of each type holds."""


@dataclass
class Instruction:
    op: str
    """The whole name, "ld.global.v4.b32"."""
    parts: list[str]
    """The name's parts."""
    args: list[str]
    guard: str | None
    """The predicate that decides for each thread whether the instruction counts."""
    negated: bool
    line: int
    """Of the PTX."""
    source: str
    """Where Triton's source asked for it: "matmul.py:184:28"."""
    text: str
    id: int = -1
    count: int = 0
    """How many warps have executed it."""
    samples: int = 0
    """How many executions by warps the following three were counted in."""
    ideal: int = 0
    """Wavefronts of shared memory without conflicts, or sectors of global memory."""
    extra: int = 0
    """Wavefronts that conflicts add."""
    useful: int = 0
    """Bytes asked of global memory."""

    def where(self) -> str:
        return f"PTX line {self.line} ({self.source}): {self.text}"


@dataclass
class Block:
    """Instructions that a warp executes from the first to the last."""

    code: list[Instruction] = field(default_factory=list)
    index: int = -1
    order: int = -1
    """Its place in reverse post-order; -1: it can't be reached. Of the blocks that threads stand at, the first one runs."""
    after: int = -1
    """The index of the block that follows in the text."""
    runs: int = 0
    """How many warps have run it."""
    kind: str = ""
    """What it begins with: "barrier", "wait", or "" for anything else."""
    function: Any = None
    """The block as a Python function for all lanes (generator.py)."""
    masked: Any = None
    """The same for some of the lanes."""

    @property
    def has_wgmma(self) -> bool:
        return any(x.parts[0] == "wgmma" for x in self.code)


@dataclass
class Kernel:
    name: str
    params: list[tuple[str, int, int]]
    """Of each parameter its name, size and offset in bytes."""
    threads: int
    blocks: list[Block]
    registers: dict[str, str]
    """The class of each register: pred, b16, b32 or b64."""
    labels: dict[str, int]
    """The block that each label stands for."""
    tables: dict[str, list[str]]
    """The labels of each table of branches."""
    target: str


def split_operands(text: str) -> list[str]:
    """The operands between commas, but for commas within brackets."""
    found, depth, now = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            found.append(now.strip())
            now = ""
        else:
            now += c
    return [*found, now.strip()] if now.strip() else found


def parse(text: str) -> Kernel:
    """The one kernel of a PTX file."""
    target = re.search(r"\.target\s+(\S+)", text)
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, re.S)
    assert target and entry, "not PTX"
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3])
    reader = _Reader()
    reader.read(text[entry.end() :], first_line=text[: entry.end()].count("\n") + 1)
    blocks, labels = _blocks(reader.items, reader.tables)
    kernel = Kernel(
        entry[1], _params(entry[2]), int(threads[1]) if threads else 0, blocks, reader.registers, labels, reader.tables,
        target[1].rstrip(","),
    )  # fmt: skip
    _number_in_order(kernel)
    return kernel


def _params(text: str) -> list[tuple[str, int, int]]:
    found: list[tuple[str, int, int]] = []
    offset = 0
    for declaration in filter(None, (p.strip() for p in text.split(","))):
        name = re.search(r"(\w+)(\[(\d+)\])?\s*$", declaration)
        assert name
        if name[3]:  # an array of bytes: a tensor map
            size = int(name[3])
            align = int(re.search(r"\.align\s+(\d+)", declaration)[1])  # type: ignore[index]
        else:
            size = align = int(re.search(r"\.[usbf](\d+)", declaration)[1]) // 8  # type: ignore[index]
        offset = -(-offset // align) * align
        found.append((name[1], size, offset))
        offset += size
    return found


class _Reader:
    """Reads the body of a kernel line by line."""

    def __init__(self) -> None:
        self.registers: dict[str, str] = {}
        self.tables: dict[str, list[str]] = {}
        self.items: list[Instruction | str] = []
        """Instructions, and labels between them."""
        self._scopes: list[dict[str, str]] = []  # names that braces make local, and what they are called here
        self._serial = 0
        self._source = "?"
        self._table = ""  # of branches, if we are within one
        self._buffer, self._line = "", 0  # of the statement that isn't complete, and the line that it began in

    def read(self, body: str, first_line: int) -> None:
        for number, raw in enumerate(body.split("\n"), first_line):
            line = raw.strip()
            if line.startswith(".loc"):
                found = re.search(r"//\s*(.*)", line)
                self._source = found[1].strip() if found else line
                continue
            line = line.split("//")[0].strip()
            if line.startswith((".file", ".section")):
                break
            if line and self._read_line(line, number):
                break

    def _read_line(self, line: str, number: int) -> bool:
        """Whether the kernel ends in it."""
        if not self._buffer.strip() and not self._table:
            line = self._read_labels(line)
        if self._table:
            self.tables[self._table] += [t.strip() for t in line.rstrip(";").split(",") if t.strip()]
            if line.endswith(";"):
                self._table = ""
            return False
        for c in line:
            if c == ";":
                self._statement(self._buffer, self._line)
                self._buffer = ""
            elif c == "}" and not self._buffer.strip():
                if not self._scopes:
                    return True
                self._scopes.pop()
            elif c == "{" and not self._buffer.strip():
                self._open_scope()
            else:
                if not self._buffer.strip():
                    self._line = number
                self._buffer += c
        if self._buffer:
            self._buffer += " "
        return False

    def _read_labels(self, line: str) -> str:
        """What follows the labels at the begin of a line."""
        while match := re.match(r"([$%\w]+)\s*:(?!:)\s*", line):
            label, line = match[1], line[match.end() :]
            if line.startswith(".branchtargets"):
                self.tables[label], self._table = [], label
                return line[len(".branchtargets") :].strip()
            if self._scopes:
                self._scopes[-1][label] = f"{label}${self._serial}"
            self.items.append(self._renamed(label))
        return line

    def _open_scope(self) -> None:
        self._serial += 1
        self._scopes.append({})

    def _renamed(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), name)

    def _statement(self, text: str, line: int) -> None:
        text = text.strip()
        if text.startswith(".reg"):
            self._declare(text)
        if not text or text.startswith((".reg", ".pragma")):
            return
        original, guard, negated = text, None, False
        if match := re.match(r"@(!?)\s*([%\w$]+)\s+", text):
            guard, negated = self._renamed(match[2]), bool(match[1])
            text = text[match.end() :]
        match = re.match(r"([\w.:]+)\s*(.*)", text, re.S)
        assert match, original
        args = split_operands(match[2])
        if self._scopes:
            args = [re.sub(r"[%\w$]+", lambda name: self._renamed(name[0]), a) for a in args]
        text = " ".join(original.split())[:200]
        self.items.append(Instruction(match[1], match[1].split("."), args, guard, negated, line, self._source, text))

    def _declare(self, text: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text)
        assert match, text
        kind = _CLASSES[match[1]]
        for name in (n.strip() for n in match[2].split(",")):
            if many := re.match(r"(%\w+)<(\d+)>", name):
                self.registers |= {f"{many[1]}{i}": kind for i in range(int(many[2]))}
                continue
            if self._scopes:
                self._scopes[-1][name] = f"{name}${self._serial}"
            self.registers[self._renamed(name)] = kind


def _blocks(items: list[Instruction | str], tables: dict[str, list[str]]) -> tuple[list[Block], dict[str, int]]:
    """The basic blocks, and the one that each label which is jumped to stands for."""
    blocks, labels = [Block()], {}
    targets = {target for table in tables.values() for target in table}
    targets |= {i.args[0] for i in items if not isinstance(i, str) and i.parts[0] == "bra"}
    for item in items:
        if isinstance(item, str):
            if item in targets:
                if blocks[-1].code:
                    blocks.append(Block())
                labels[item] = len(blocks) - 1
            continue
        if item.op.startswith((*BARRIERS, *WAITS)) and blocks[-1].code:
            blocks.append(Block())
        blocks[-1].code.append(item)
        if item.parts[0] in ("bra", "ret", "exit", "brx") or item.op.startswith(BARRIERS):
            blocks.append(Block())
    number = 0
    for i, block in enumerate(blocks):
        block.index, block.after = i, i + 1
        first = block.code[0].op if block.code else ""
        block.kind = "barrier" if first.startswith(BARRIERS) else "wait" if first.startswith(WAITS) else ""
        for instruction in block.code:
            instruction.id = number
            number += 1
    return blocks, labels


def successors(kernel: Kernel, block: Block) -> list[int]:
    """The blocks that may run after this one."""
    after = [block.after] if block.after < len(kernel.blocks) else []
    last = block.code[-1] if block.code else None
    if last is None:
        return after
    if last.parts[0] in ("ret", "exit"):
        return after if last.guard else []
    if last.parts[0] == "bra":
        return [kernel.labels[last.args[0]]] + (after if last.guard else [])
    if last.parts[0] == "brx":
        return [kernel.labels[target] for target in kernel.tables[last.args[1]]]
    return after


def _number_in_order(kernel: Kernel) -> None:
    """Number the blocks in reverse post-order, in which a loop's blocks come before what follows the loop."""
    seen, post = {0}, []
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(successors(kernel, kernel.blocks[0])))]
    while stack:
        at, rest = stack[-1]
        following = next((s for s in rest if s not in seen), None)
        if following is None:
            post.append(at)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors(kernel, kernel.blocks[following]))))
    for i, at in enumerate(reversed(post)):
        kernel.blocks[at].order = i
