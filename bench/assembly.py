"""Reading machine code: what a kernel's instructions are, and which of them make up its main loop.

Understands what `nvdisasm -c` prints for NVIDIA and the assembly in which Triton hands over an AMD kernel. Loops are
found as compilers find them, in the graph of branches: a jump backwards alone is none, for the waits on a barrier are
moved behind the kernel's end and jump back into the middle of the loop that they belong to.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """`name` with all its suffixes; `target`: the label or address that it may jump to; `falls`: may go on to the next."""

    name: str
    address: str
    target: str | None = None
    falls: bool = True


_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);|^(\.L\w+):", re.MULTILINE)
_SASS_TARGET = re.compile(r"(?:0x([0-9a-f]+)|`\((\.L\w+)\))\s*$")


def sass(text: str) -> list[Instruction]:
    """The instructions of one kernel; branches go to a label (nvdisasm) or an address (cuobjdump)."""
    found: list[Instruction] = []
    labels: dict[str, str] = {}
    waiting: list[str] = []
    for address, guard, name, operands, label in _SASS.findall(text):
        if label:
            waiting.append(label)
            continue
        address = address.lstrip("0") or "0"
        labels |= dict.fromkeys(waiting, address)
        waiting = []
        base = name.split(".")[0]
        jump = _SASS_TARGET.search(operands.strip()) if base in ("BRA", "JMP") else None
        # `BRA.U UP0, 0x290` and `BRA P1, 0x290` are conditional without a guard.
        conditional = bool(guard) or (jump is not None and "," in operands)
        ends = base in ("BRA", "JMP", "BRX", "JMX", "EXIT", "RET")
        target = None if jump is None else jump[2] or jump[1].lstrip("0") or "0"
        found.append(Instruction(name, address, target, conditional or not ends))
    return [dataclasses.replace(x, target=labels[x.target]) if x.target in labels else x for x in found]


def amdgcn(text: str) -> list[Instruction]:
    """The instructions of an AMD assembly listing of one kernel; a label is the address of what follows it."""
    found: list[Instruction] = []
    label = ""
    for line in text.splitlines():
        line = line.split(";")[0]
        if match := re.match(r"(\.L\w+):", line):
            label = match[1]
        elif match := re.match(r"\t([a-z]\w+)\s*(.*)", line):
            name, operands = match[1], match[2].strip()
            target = operands if name.startswith(("s_cbranch", "s_branch")) else None
            found.append(Instruction(name, label, target, name not in ("s_branch", "s_endpgm", "s_setpc_b64")))
            label = ""
            if name == "s_endpgm":
                break
    return found


def loops(code: list[Instruction]) -> list[frozenset[int]]:
    """The natural loops, as sets of positions in `code`: what can reach a jump back to a block that dominates it."""
    position = {instruction.address: i for i, instruction in enumerate(code) if instruction.address}
    jumps = {i: position[x.target] for i, x in enumerate(code) if x.target in position}
    starts = sorted(
        {0, *jumps.values(), *(i + 1 for i, x in enumerate(code) if i in jumps or not x.falls)} - {len(code)}
    )
    if not code:
        return []

    def block(i: int) -> int:
        return bisect.bisect_right(starts, i) - 1

    ends = [*starts[1:], len(code)]
    after: list[set[int]] = []
    for last in (end - 1 for end in ends):
        after.append({block(jumps[last])} if last in jumps else set())
        if code[last].falls and last + 1 < len(code):
            after[-1].add(block(last + 1))
    before: list[set[int]] = [set() for _ in starts]
    for a, following in enumerate(after):
        for b in following:
            before[b].add(a)

    everything = set(range(len(starts)))
    dominators = [{0}] + [everything] * (len(starts) - 1)
    changed = True
    while changed:
        changed = False
        for b in range(1, len(starts)):
            new = {b} | (set.intersection(*(dominators[a] for a in before[b])) if before[b] else set())
            if new != dominators[b]:
                dominators[b], changed = new, True

    bodies: dict[int, set[int]] = {}
    for a, following in enumerate(after):
        for head in following & dominators[a]:
            body = bodies.setdefault(head, {head})
            waiting = [a]
            while waiting:
                b = waiting.pop()
                if b not in body:
                    body.add(b)
                    waiting += before[b]
    return [frozenset(i for b in body for i in range(starts[b], ends[b])) for body in bodies.values()]


_KINDS = (
    ("matrix", r"HGMMA|HMMA|IMMA|DMMA|QGMMA|IGMMA|BGMMA|UTC\w*MMA|v_s?mfma"),
    ("tma", r"UTMA|UBLKCP"),
    ("async copy", r"LDGSTS|global_load_lds|buffer_load_\w+_lds"),
    ("global load", r"LDG\b|LD\b|(?:global|buffer|flat)_load"),
    ("global store", r"STG\b|ST\b|(?:global|buffer|flat)_store"),
    ("local", r"LDL|STL|scratch_"),
    ("shared", r"LDS|STS|LDSM|STSM|ATOMS|ds_(?:read|write|load|store)|LDTM|STTM|UTCCP"),
    ("shuffle", r"SHFL|REDUX|ds_bpermute|ds_permute|ds_swizzle|v_mov_b32_dpp|v_permlane|v_readlane|v_readfirstlane"),
    ("sync", r"BAR|SYNCS|WARPGROUP|WARPSYNC|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|ELECT|NANOSLEEP|YIELD|UTCBAR|ARRIVES|ERRBAR"
             r"|CCTL|WARPGROUPSET|s_barrier|s_waitcnt|s_nop|s_setprio|s_sleep"),
    ("special", r"MUFU|v_exp_|v_rcp_|v_log_|v_rsq_|v_sqrt_"),
    ("control", r"BRA|EXIT|BSSY|BSYNC|BREAK|CALL|RET|NOP|BRX|JMP|PREEXIT|ACQBULK|s_branch|s_cbranch|s_endpgm|s_setpc"),
    ("convert", r"F2F|F2I|I2F|FRND|v_cvt"),
    ("float", r"F(?:FMA|ADD|MUL|MNMX|SEL|SET|SETP|CHK)\w*\b|H(?:FMA|ADD|MUL|MNMX|SET|SETP)2|D(?:FMA|ADD|MUL|MNMX|SETP)"
              r"|v_\w*(?:f16|f32|f64|bf16)"),
)  # fmt: skip
_KIND_PATTERNS = [(kind, re.compile(pattern)) for kind, pattern in _KINDS]


def kind(name: str) -> str:
    """What an instruction does; everything that isn't listed computes addresses, masks and the like: "integer"."""
    return next((kind for kind, pattern in _KIND_PATTERNS if pattern.match(name)), "integer")


def main_loop_body(code: list[Instruction]) -> list[Instruction]:
    """The main loop: the innermost loop with the most matrix instructions, of several the first, after which others are for
    the rare case; or, where none has any, the longest innermost loop. Empty for a kernel without loops."""
    found = [body for body in loops(code) if len(body) > 1]
    matrix = {i for i, instruction in enumerate(code) if kind(instruction.name) == "matrix"}
    candidates = [body for body in found if body & matrix] or found
    innermost = [body for body in candidates if not any(other < body for other in candidates)]
    if not innermost:
        return []
    body = max(innermost, key=lambda body: (len(body & matrix), -min(body) if body & matrix else len(body)))
    return [code[i] for i in sorted(body)]


def main_loop(code: list[Instruction]) -> dict[str, int]:
    """The instructions of the main loop by kind."""
    return dict(sorted(collections.Counter(kind(instruction.name) for instruction in main_loop_body(code)).items()))


def width(name: str) -> int:
    """Bits that a global load, store or asynchronous copy moves at a time for each thread."""
    if match := re.search(r"_(?:load|store)_(?:lds_)?([a-z]*?)(?:x(\d))?(?:_d16\w*)?$", name):
        bits = {"dword": 32, "short": 16, "ushort": 16, "sshort": 16, "byte": 8, "ubyte": 8, "sbyte": 8}.get(
            match[1], 32
        )
        return bits * int(match[2] or 1)
    for part in name.split(".")[1:]:
        if part in ("64", "128", "256"):
            return int(part)
        if part in ("U8", "S8"):
            return 8
        if part in ("U16", "S16"):
            return 16
    return 32


def widths(code: list[Instruction], which: str) -> dict[str, int]:
    """How many instructions of a kind there are of each width in bits, the narrowest first."""
    found = collections.Counter(width(instruction.name) for instruction in code if kind(instruction.name) == which)
    return {str(bits): found[bits] for bits in sorted(found)}


def matrix(code: list[Instruction]) -> dict[str, int]:
    """How many matrix instructions there are of each shape and dtype."""
    found = collections.Counter(instruction.name for instruction in code if kind(instruction.name) == "matrix")
    return dict(sorted(found.items()))


def operands_read_twice(ttgir: str) -> list[str]:
    """In Triton's GPU dialect, the buffers that an asynchronous product of sm_90 reads and from which threads load in the same
    loop, too. The pipeliner (Triton 3.6, 3.7) makes one buffer too few for these, and the next fetch overwrites what the product
    is still reading."""
    found: list[str] = []
    loops: list[
        tuple[int, set[str], set[str]]
    ] = []  # of each loop around a line: indentation, operands, buffers loaded

    def close(indentation: int) -> None:
        while loops and loops[-1][0] >= indentation:
            _, operands, loaded = loops.pop()
            found.extend(sorted(operands & loaded))

    for line in ttgir.splitlines():
        if not line.strip():
            continue
        indentation = len(line) - len(line.lstrip())
        close(indentation)
        if re.search(r"= scf\.for ", line):
            loops.append((indentation, set(), set()))
        elif loops and (match := re.search(r"ttng\.warp_group_dot (%[\w#]+), (%[\w#]+), .*isAsync = true", line)):
            loops[-1][1].update(match.groups())
        elif loops and (match := re.search(r"ttg\.local_load (%[\w#]+)", line)):
            loops[-1][2].add(match[1])
    close(0)
    return found
