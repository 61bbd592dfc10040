"""Under torch's own distributed engines: two processes on the CPU over gloo, ours beside torch.nn in each."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastlayers

PROCESSES = 2


def network(space: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return space.Sequential(
        space.Conv2d(1, 4, 3), space.ReLU(), space.Flatten(),
        space.Linear(16, 8), space.ReLU(), space.Linear(8, 6), space.ReLU(), space.Linear(6, 2),
    )  # fmt: skip


def train(model: torch.nn.Module, rank: int) -> list[torch.Tensor]:
    """Three steps on this process's share of the data: the losses, then every parameter, whole."""
    data = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        x = torch.randn(PROCESSES * 3, 1, 4, 4, generator=data).chunk(PROCESSES)[rank]
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return losses + [p.detach() for p in parameters]


def kernels_run(model: torch.nn.Module, *modules: str) -> None:
    decisions = list(fastlayers.explain(model, torch.ones(3, 1, 4, 4)))
    assert [d.path for d in decisions if "Flatten" not in d.op] == ["triton"] * (len(decisions) - 1), decisions
    assert {d.module for d in decisions} >= set(modules), decisions


def data_parallel(rank: int) -> None:
    """DDP, converted before wrapping, with buckets small enough that several are reduced while backward runs."""
    results = []
    for space in (fastlayers.nn, torch.nn):
        model = DistributedDataParallel(network(space), bucket_cap_mb=0.0001)
        results.append(train(model, rank))
        if space is fastlayers.nn:
            kernels_run(model, "module.0 + module.1", "module.3 + module.4 + module.5 + module.6 + module.7")
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)

    late = DistributedDataParallel(network(torch.nn))
    fastlayers.accelerate(late)
    torch.testing.assert_close(train(late, rank), results[1], rtol=1e-4, atol=1e-5)
    kernels_run(late)


def fully_sharded(rank: int) -> None:
    """FSDP2 with every Linear a group of its own; it makes subclasses of our classes, which run, unfused."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    results = []
    for space in (fastlayers.nn, torch.nn):
        model = network(space)
        for layer in model:
            if isinstance(layer, torch.nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        results.append(train(model, rank))
        if space is fastlayers.nn:
            kernels_run(model, "0 + 1", "3", "5", "7")
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


class Block(torch.nn.Module):
    """A module whose forward `accelerate(fuse=True)` reads: a gated layer, a residual with its norm, and an RMSNorm that is
    written out with a weight of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (torch.nn.Linear(16, 16, bias=False) for _ in range(3))
        self.norm, self.weight = torch.nn.LayerNorm(16), torch.nn.Parameter(torch.randn(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        return self.norm(x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y)))


class Blocks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.last = torch.nn.ModuleList([Block(), Block()]), torch.nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def blocks() -> Blocks:
    torch.manual_seed(0)
    return Blocks()


def blocks_run_fused(model: torch.nn.Module) -> None:
    operations = [d.op for d in fastlayers.explain(model, torch.ones(3, 1, 4, 4)) if d.path == "triton"]
    assert operations == ["rms_norm", "gated_mlp", "layer_norm"] * 2 + ["linear"], operations


def fused_data_parallel(rank: int) -> None:
    """DDP around a model that was fused in place, and a model fused within DDP."""
    whole = train(DistributedDataParallel(blocks()), rank)
    before = blocks()
    fastlayers.accelerate(before, fuse=True)
    after = DistributedDataParallel(blocks(), bucket_cap_mb=0.0001)
    fastlayers.accelerate(after, fuse=True)
    for model in (DistributedDataParallel(before, bucket_cap_mb=0.0001), after):
        torch.testing.assert_close(train(model, rank), whole, rtol=1e-4, atol=1e-5)
        blocks_run_fused(model)


def fused_fully_sharded(rank: int) -> None:
    """FSDP2 makes a subclass of the generated class, too, shards a fused module's own weight, and hooks what it shards: each
    block is fused by itself."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    results = []
    for fuse in (True, False):
        model = blocks()
        if fuse:
            fastlayers.accelerate(model.blocks, fuse=True)
            fastlayers.accelerate(model)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        results.append(train(model, rank))
        if fuse:
            blocks_run_fused(model)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def tensor_parallel(rank: int) -> None:
    """DTensor weights: torch's functions, for that reason, and its numbers."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    results = []
    for space in (fastlayers.nn, torch.nn):
        torch.manual_seed(0)
        model = space.Sequential(space.Linear(16, 8), space.ReLU(), space.Linear(8, 6))
        whole = model(x)
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        y = model(x)
        y.square().sum().backward()
        torch.testing.assert_close(y, whole)
        results.append([y, *(p.grad.full_tensor() for p in model.parameters())])
        if space is fastlayers.nn:
            reasons = [d.reason for d in fastlayers.explain(model, x)]
            assert reasons[0] == reasons[2] == "DTensor is a tensor subclass", reasons
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def worker(rank: int, run: Callable[[int], None], rendezvous: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    try:
        run(rank)
    finally:
        dist.destroy_process_group()
    # gloo's threads outlive the group, and one that lets go of a tensor while the interpreter is being torn down aborts the
    # process, now and then (pytorch/pytorch#179291).
    os._exit(0)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize(
    "run", [data_parallel, fused_data_parallel, fully_sharded, fused_fully_sharded, tensor_parallel]
)
def test_distributed(run: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # on a machine with a GPU too
    torch.multiprocessing.spawn(worker, (run, str(tmp_path / "rendezvous")), nprocs=PROCESSES)
