"""A few kernels through the compiler, which rejects what the interpreter accepts. `make compile` does more."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# One of every kernel; small tiles compile fastest.
QUICK = (
    r"^((matmul|conv) .*16/(small|large).* bfloat16|conv (stem|grouped) .*16/.* bfloat16"
    r"|box .*16/(small|weight grad, narrow).* bfloat16|depthwise .*3x3 stride 2.* float16|to channels_last (256|8) float16"
    r"|relu.* float16|activation grad.* bfloat16( wide)?|sum partials.* float32|softmax.*(rows 1024|blocks).* float16)$"
)


@pytest.mark.parametrize("target", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_every_kernel_compiles_without_spills(target: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "audit", "--arch", target, "--full", "--match", QUICK, "--jobs", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = int(done.stdout.splitlines()[-1].split()[0])
    assert passed >= 45
