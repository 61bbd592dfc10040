"""Run by tests/test_plain_interpreter.py: every layer in Triton's interpreter as users have it, with warnings as errors.

The interpreter is neither mended nor watched, memory isn't filled with NaN, and nothing is silenced."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch

import fastlayers
from fastlayers import nn
from fastlayers.catalog import ROWS, Floats

SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e38, -1e38, 1e-40])


def run(row: Any, special: bool) -> None:
    case = next(iter(row.cases.values()))
    layer, arguments = case.make(nn), case.arguments(torch.float32)
    for i, given in enumerate(case.inputs):
        if isinstance(given, Floats):
            numbers = SPECIAL[torch.randint(len(SPECIAL), given.shape)] if special else arguments[i]
            arguments[i] = numbers.requires_grad_()
    result = layer(*arguments)
    (result[0] if isinstance(result, tuple) else result).sum().backward()


warnings.simplefilter("error")
failed = []
with fastlayers.policy("triton"):
    for row in ROWS:
        for special in (False, True):
            try:
                run(row, special)
            except Exception as error:
                failed.append(f"{row.name}, {'special' if special else 'ordinary'} numbers: {error}")
print("\n".join(failed))
sys.exit(bool(failed))
