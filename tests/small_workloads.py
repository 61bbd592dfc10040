"""Workloads of bench small enough for Triton's interpreter, and a GPU in name only, for the tests of bench."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import clock, networks, run
from bench.providers import PROVIDERS
from bench.workloads import Workload
from fastlayers.catalog import Classes
from fastlayers.catalog.row import case
from fastlayers.kernels.runtime import launch as _launch

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
BY_NAME = {provider.name: provider for provider in PROVIDERS}


def small(
    family: str, make: Callable[[Any], Any], *inputs: Any, direction: Any = "both", name: str | None = None
) -> Workload:
    return Workload(family, name or f"small {family}", case(make, *inputs), "fp32", direction, 0.0)


LINEAR = small("Linear", lambda nn: nn.Linear(17, 9), (5, 17))
CONV = small("Conv2d", lambda nn: nn.Conv2d(3, 4, 3, padding=1), (1, 3, 4, 5))
SOFTMAX = small("Softmax", lambda nn: nn.Softmax(-1), (4, 33))
LOSS = small("CrossEntropyLoss", lambda nn: nn.CrossEntropyLoss(), (5, 7), Classes((5,), 7))
FUSED = small(
    "Sequential", lambda nn: nn.Sequential(nn.Linear(9, 7), nn.ReLU()), (5, 9), name="Linear+ReLU small"
)  # fmt: skip
STEP = small(
    "training", lambda nn: nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), (5, 8),
    direction="step",
)  # fmt: skip
EVAL = small(
    "inference", networks.evaluated(lambda nn: networks.bottleneck(nn, 4, 3, 2)), (1, 4, 4, 5), direction="forward"
)
SMALL = (LINEAR, CONV, SOFTMAX, LOSS, FUSED, STEP, EVAL)


def bench(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments in a process of its own, without a GPU and outside the interpreter."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""} | env
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=clean, capture_output=True, text=True, check=False)


class _Event:
    times = itertools.count()

    def __init__(self, enable_timing: bool):
        self.time = 0.0

    def record(self) -> None:
        self.time = float(next(_Event.times))

    def elapsed_time(self, end: _Event) -> float:
        return end.time - self.time


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda in name only: what is asked of it works on the CPU, and a graph replays nothing."""
    if not _launch.INTERPRETED:
        pytest.skip("there is a GPU, which needs no stand-in")
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1100)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**8, 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "NVIDIA H200")
    properties = types.SimpleNamespace(name="NVIDIA H200", multi_processor_count=132, L2_cache_size=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(run, "why_not", lambda: None)
    monkeypatch.setattr(clock, "LEAST_ROUNDS", 2)  # the interpreter's patience
    device = torch.device
    monkeypatch.setattr(torch, "device", _DeviceMeta("device", (), {"real": device}))


class _DeviceMeta(type):
    """torch.device, but for CUDA's, which is the CPU."""

    real: Any

    def __call__(cls, *args: Any) -> Any:
        return cls.real("cpu") if args[0] == "cuda" else cls.real(*args)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.real)
