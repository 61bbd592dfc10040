"""The same workloads through pytest-benchmark: `pytest bench -k "Softmax and bf16"`, with its options to save and compare.

Wall time of calls with a short queue, which is what pytest-benchmark can see; `python -m bench` has the GPU's own time and
everything else. Every family's first shapes; `python -m bench --list` names them all.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.providers import PROVIDERS, Provider
from bench.subject import Reference, Subject
from bench.workloads import Workload, workloads

FIRST = [workload for workload in workloads() if workload.rank <= 3]


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("workload", FIRST, ids=lambda workload: workload.key)
def test_speed(workload: Workload, provider: Provider, benchmark: Any) -> None:
    if not provider.applies(workload):
        pytest.skip("not for this workload")
    if reason := provider.absent():
        pytest.skip(reason)
    device = torch.device("cuda", torch.cuda.current_device())
    subject = Subject(provider, workload, device, 0, Reference(workload, device, 0))
    benchmark.group = workload.key
    benchmark.extra_info |= subject.row
    benchmark.pedantic(subject.calls, rounds=20, warmup_rounds=1)
    assert subject.row["void"] is None
