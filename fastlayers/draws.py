"""What random operations draw, from torch's own generators, so that `manual_seed`, `fork_rng` and activation checkpointing work
on ours as on torch's.

A draw is a small tensor that an operation takes as its last argument, saves for its backward, and makes all its random numbers
from. There are two kinds. `seed` is a number in the tensors' own memory, for operations that choose their numbers themselves.
`philox` is where torch's own function would begin to read Philox's stream: an operation that goes through it in torch's order
has torch's very numbers. It lies in host memory, because torch's generator does: its numbers become arguments of kernels, and
nothing is copied to the GPU. While a CUDA graph is captured the numbers of its replays aren't known yet; then it lies in the
GPU's memory, where the graph writes it anew at each replay.
"""

from __future__ import annotations

import functools

import torch

from . import _torch


def seed(device: torch.device) -> torch.Tensor:
    """A random number (1,) on this device. Within a CUDA graph, torch's own operator draws anew at each replay."""
    return torch.randint(2**62, (1,), device=device)


def philox(device: torch.device, advance: int) -> torch.Tensor:
    """Seed and offset (2,) from which torch's function would draw, and torch's generator moved as far as that moves it. CUDA's
    generator has a seed and an offset. Torch's function reads no such stream on a CPU, so there a seed is drawn.

    Args:
        advance: by how much the offset grows, a multiple of 4.
    """
    if device.type != "cuda":
        return torch.tensor([int(torch.randint(2**62, (), device="cpu")), 0], device="cpu")
    generator = torch.cuda.default_generators[_index(device)]
    if _capturing(device):
        key, offset, further = _torch.reserve_in_graph(generator, advance)
        more = further.item() if further.device != offset.device else further.reshape(())
        return torch.stack([key.reshape(()), offset.reshape(()) + more])
    key, start = _torch.reserve(generator, advance)
    return torch.tensor([key - 2**64 if key >= 2**63 else key, start], device="cpu")


def like(device: torch.device, stream: bool) -> torch.Tensor:
    """A tensor like those that are drawn, by which a call is recognised before anything is drawn. Its values are never read.

    Args:
        stream: whether it stands for `philox` rather than `seed`.
    """
    in_memory = not stream or _capturing(device)
    return _like(device if in_memory else torch.device("cpu"), 2 if stream else 1, torch.is_inference_mode_enabled())


@functools.cache
def _like(device: torch.device, count: int, inference: bool) -> torch.Tensor:
    return torch.empty(count, dtype=torch.int64, device=device)


def unavailable(device: torch.device) -> str | None:
    """What speaks against drawing by `philox` now."""
    if _torch.reserve_in_graph is None and _capturing(device):
        return "a CUDA graph is captured, and this torch doesn't say what will be drawn in it"
    return None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
