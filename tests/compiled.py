"""What the compiler makes of products that once went wrong on sm_90: run by test_host.py in a process of its own, since the
suite's interprets."""

from __future__ import annotations

from typing import Any

import pytest

from bench import audit
from bench.cases import Case, _descriptor_cases, _product_cases
from fastlayers.kernels.runtime import tiles as _tiles

CASES = {case.label: case for case in (*_product_cases("sm_90"), *_descriptor_cases("sm_90"))}


@pytest.mark.parametrize(
    "label",
    [
        # Wanted 262,176 bytes of shared memory, of which an H100 has 232,448.
        "matmul tma unaligned input grad, undo 16 256x128x64 w8s4 persistent bfloat16",
        # Spilled 199 times.
        "matmul tma unaligned forward, added 16 64x256x64 w4s4 persistent bfloat16",
        # Threads read the buffers that a product under way reads.
        "matmul weight grad, bias grad tf32/medium 128x64x32 w4s3 float32",
    ],
)
def test_compiles(label: str) -> None:
    case: Case = CASES[label]
    compiled: list[Any] = []
    with _tiles.force(**case.force), audit._compiling("sm_90", case, compiled):
        case.call()
    row = {"target": "sm_90"} | audit._read("sm_90", compiled[0])
    assert audit._wrong(case, row) is None
    assert audit.assembly.operands_read_twice(compiled[0].asm["ttgir"]) == []
