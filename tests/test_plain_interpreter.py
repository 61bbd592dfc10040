"""Triton's interpreter as users have it: the suite's own is mended, watched and silent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GPU


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="the interpreter is for machines without a GPU")
def test_no_layer_warns() -> None:
    """For numbers that a kernel computes and masks out, say, which would be an error under -W error."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    script = str(Path(__file__).with_name("plain_interpreter.py"))
    done = subprocess.run(
        [sys.executable, "-W", "error", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
