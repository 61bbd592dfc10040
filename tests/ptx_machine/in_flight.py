"""Registers of asynchronous products (wgmma) that are under way: they may be moved, but neither read nor written."""

from __future__ import annotations

import re
from typing import NamedTuple

from .parser import Block


class State(NamedTuple):
    open: frozenset[str] = frozenset()
    """The accumulators of products that belong to no group yet."""
    groups: tuple[frozenset[str], ...] = ()
    """Those of the groups that haven't been waited for."""


def _registers(text: str) -> set[str]:
    return set(re.findall(r"%[a-z]+\d+", text))


def after(block: Block, state: State) -> tuple[State, list[str]]:
    """What is under way behind a block, and what is wrong in it."""
    opened, groups, wrong = set(state.open), [set(g) for g in state.groups], []
    for x in block.code:
        flying = opened.union(*groups)
        if x.parts[0] == "wgmma":
            if x.parts[1] == "mma_async":
                if x.args[1].startswith("{") and _registers(x.args[1]) & flying:
                    wrong.append(f"operand registers of a wgmma that is under way: {x.where()}")
                opened |= _registers(x.args[0])
            elif x.parts[1] == "commit_group":
                groups, opened = [*groups, opened], set()
            elif x.parts[1] == "wait_group":
                left = int(x.args[0])
                groups = groups[len(groups) - left :] if left else []
            continue
        if not flying or not x.args:
            continue
        writes_none = x.parts[0] in ("st", "stmatrix", "bra", "cp", "mbarrier")
        reads = set().union(*map(_registers, x.args if writes_none else x.args[1:]))
        writes = set() if writes_none else _registers(x.args[0])
        if x.parts[0] == "mov" and reads & flying:
            for group in [opened, *groups]:
                group |= writes if reads & group else set()
            continue
        for what, those in (("reads", reads & flying), ("writes", writes & flying)):
            if those:
                wrong.append(f"{what} {min(those)} of a wgmma not waited for: {x.where()}")
    return State(frozenset(opened), tuple(map(frozenset, groups))), wrong
