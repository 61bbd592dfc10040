"""Small networks, trained for two steps in the machine: everything that a step launches, one launch after the other, against
torch.nn's step in float64. Layers by themselves are in kernels.py.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

import fastlayers
import fastlayers.functional as FL
from fastlayers.kernels.conv import tiles as conv_tiles
from fastlayers.testing import assert_within_budget

STEPS = 2
TRAININGS = 5


class Network(NamedTuple):
    make: Callable[[Any], torch.nn.Module]
    """From a module like torch.nn."""
    shape: tuple[int, ...]
    """Of a batch, samples first."""
    large: bool = False
    """Whether its convolutions are computed as if they were large: on sm_90 in 16 bits by boxes."""


def _of_demo(i: int) -> Callable[[Any], torch.nn.Module]:
    def make(nn: Any) -> torch.nn.Module:
        from fastlayers import demo  # not earlier: it imports much

        return demo.NETWORKS[i].make(nn).to(memory_format=torch.channels_last)

    return make


class _Residual(torch.nn.Module):
    """ResNet's basic block with half as many pixels and twice as many channels, and a classifier of its mean."""

    def __init__(self, nn: Any, channels: int):
        super().__init__()
        wide = 2 * channels
        self.branch = nn.Sequential(
            nn.Conv2d(channels, wide, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide),
        )  # fmt: skip
        self.shortcut = nn.Sequential(nn.Conv2d(channels, wide, 1, stride=2, bias=False), nn.BatchNorm2d(wide))
        self.relu = nn.ReLU()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 10))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.relu(self.branch(x) + self.shortcut(x)))


class _Encoder(torch.nn.Module):
    """A transformer's encoder layer with dropout everywhere, and a classifier of the positions' mean."""

    def __init__(self, nn: Any):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 2, 48, dropout=0.2, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x).mean(1))


class _Recurrent(torch.nn.Module):
    """An LSTM of two layers, and a classifier of its last step."""

    def __init__(self, nn: Any):
        super().__init__()
        self.lstm = nn.LSTM(12, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


NETWORKS = {
    "MLP": Network(lambda nn: nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)), (48, 64)),
    "demo's conv network": Network(_of_demo(1), (6, 1, 8, 8)),
    "demo's patch network": Network(_of_demo(2), (6, 1, 8, 8)),
    "ResNet block": Network(lambda nn: _Residual(nn, 16), (4, 16, 8, 8), large=True),
    "transformer layer": Network(_Encoder, (3, 20, 32)),
    "LSTM": Network(_Recurrent, (5, 6, 12)),
}


@contextlib.contextmanager
def _same_dropout(dtype: torch.dtype) -> Iterator[None]:
    """Within, torch drops what the kernels drop in this dtype under the same seed: on a CPU torch draws other numbers."""

    def dropout(x: torch.Tensor, p: float, training: bool, inplace: bool) -> torch.Tensor:
        ones = torch.ones_like(x, dtype=dtype, requires_grad=False)  # which are dropped depends on the dtype
        return x * (FL.dropout(ones, p) > 0).to(x.dtype) / (1 - p)

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, p: float, is_causal: bool
    ) -> torch.Tensor:
        """torch's formula. Of equal scores the weights are equal, and times 1 they are the result, but for those dropped."""
        wide, length = torch.promote_types(q.dtype, torch.float32), k.shape[-2]
        equal, ones = (torch.zeros(x.shape) for x in (q, k)), torch.eye(length).expand(*k.shape[:-1], length)
        kept = FL.scaled_dot_product_attention(*equal, ones, dropout_p=p) > 0
        weights = (q.to(wide) @ k.to(wide).mT / q.shape[-1] ** 0.5).softmax(-1) * kept
        return (weights / (round((1 - p) * 65536) / 65536) @ v.to(wide)).to(q.dtype)

    with mock.patch.multiple(F, dropout=dropout, scaled_dot_product_attention=attention):
        yield


def _train(model: torch.nn.Module, cross_entropy: Any, batches: list[Any]) -> dict[str, torch.Tensor]:
    """Outputs, losses and all gradients of the steps, and the state after them."""
    torch.manual_seed(1)  # for dropout
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = {}
    for i, (x, labels) in enumerate(batches):
        optimizer.zero_grad()
        leaf = x.to(next(model.parameters()).dtype, copy=True).requires_grad_()
        output = model(leaf)
        loss = cross_entropy(output, labels)
        loss.backward()
        step = {"output": output, "loss": loss, "gradient of the input": leaf.grad}
        step |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
        found |= {f"step {i}, {name}": x.detach().clone() for name, x in step.items()}
        optimizer.step()
    return found | {f"{name} at the end": x for name, x in model.state_dict().items()}


def check(network: Network, dtype: torch.dtype) -> None:
    """Each number within the budget of other tests. Rounding, in 16 bits above all, turns the sign that some ReLU sees, or none,
    as luck has it; so torch's error is the largest of several trainings, each with batches of its own."""
    torch.manual_seed(0)
    theirs, ours = (network.make(nn).to(dtype) for nn in (torch.nn, fastlayers.nn))
    ours.load_state_dict(theirs.state_dict())
    trainings = [
        [(torch.randn(network.shape).to(dtype), torch.randint(10, network.shape[:1])) for _ in range(STEPS)]
        for _ in range(TRAININGS)
    ]
    with mock.patch.object(conv_tiles, "BOX_FLOPS", 0 if network.large else conv_tiles.BOX_FLOPS):
        found = _train(ours, FL.cross_entropy, trainings[0])
    with _same_dropout(dtype):
        torchs = [_train(copy.deepcopy(theirs), F.cross_entropy, batches) for batches in trainings]
        exacts = [_train(copy.deepcopy(theirs).double(), F.cross_entropy, batches) for batches in trainings]
    # As in tests/exam: a gradient that cancels keeps the rounding of its terms, which are as large as other gradients.
    scale = max(x.abs().max().item() for name, x in exacts[0].items() if "gradient" in name)
    for name, exact in exacts[0].items():
        if not exact.is_floating_point():
            assert torch.equal(found[name], exact), name
            continue
        others = [exact + (x[name] - right[name]) for x, right in zip(torchs[1:], exacts[1:], strict=True)]
        torchs_ = [torchs[0][name], *others]
        assert_within_budget(found[name], torchs_, exact, name, scale if "gradient" in name else 0.0)
