"""Recurrent layers: what rows of the catalog can't say. Packed sequences, single steps in one launch each, states in pairs,
dropout between layers, and weights that are exchanged."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastlayers
from fastlayers import nn
from fastlayers.dispatch.precision import without_cudnn
from fastlayers.kernels.runtime import tiles
from fastlayers.kernels.runtime.tiles import Tile
from fastlayers.testing import assert_within_budget

LAYERS = ["LSTM", "GRU", "RNN"]
LENGTHS = [4, 3, 1]


def pair(name: str, *sizes: int, dtype: torch.dtype = torch.float64, device: Any = None, **options: Any) -> list[Any]:
    """Ours and torch's, with the same weights."""
    ours, theirs = (getattr(space, name)(*sizes, **options, device=device, dtype=dtype) for space in (nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    return [ours, theirs]


def values(module: Any, *arguments: Any, twice: bool = False) -> list[torch.Tensor]:
    """Results, and the gradients of everything that asks for one; `twice`: and theirs."""
    ys = [t for t in tree_leaves(module(*arguments)) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    given = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor) and t.requires_grad]
    everything = [*given, *module.parameters()]
    first = torch.autograd.grad(sum(y.square().sum() + y.sum() for y in ys), everything, create_graph=twice)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), everything) if twice else ()
    return [*ys, *first, *second]


def states(name: str, *shape: int, device: Any, dtype: torch.dtype = torch.float64) -> Any:
    h, c = torch.randn(2, *shape, device=device, dtype=dtype).unbind()
    return (h.clone().requires_grad_(), c.clone().requires_grad_()) if "LSTM" in name else h.clone().requires_grad_()


def packed(device: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Sequences that aren't sorted by their lengths."""
    sequences = pack_padded_sequence(
        torch.randn(4, 3, 5, device=device, dtype=dtype), LENGTHS[::-1], enforce_sorted=False
    )
    sequences.data.requires_grad_()
    return sequences


@pytest.fixture(params=["one launch", "steps"])
def way(request: pytest.FixtureRequest) -> Any:
    """All steps in one launch, and one launch for each, in tiles that the sizes cross."""
    with tiles.force(**({} if request.param == "one launch" else dict(recurrent_steps=Tile(16, 16, 16, stages=1)))):
        yield


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_packed(name: str, bidirectional: bool, device: torch.device) -> None:
    """Results, gradients and second derivatives of sequences of different lengths."""
    both = pair(name, 5, 7, bidirectional=bidirectional, device=device)
    sequences, hx = packed(device), states(name, 1 + bidirectional, 3, 7, device=device)
    found = [values(module, sequences, hx, twice=True) for module in both]
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(("name", "dtype"), [*itertools.product(LAYERS, (torch.float32, torch.bfloat16))])
def test_steps(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """One launch for each step, as large layers take it: within the budget, in both directions, by batch."""
    options = dict(bidirectional=True, batch_first=True, device=device)
    ours, theirs = pair(name, 5, 18, dtype=dtype, **options)
    exact = getattr(torch.nn, name)(5, 18, dtype=torch.float64, **options)
    exact.load_state_dict(theirs.state_dict())
    x, hx = torch.randn(3, 4, 5, device=device, dtype=dtype), states(name, 2, 3, 18, device=device, dtype=dtype)
    with tiles.force(recurrent_steps=Tile(16, 16, 16, stages=1)):
        mine = values(ours, x, hx)
    doubled = torch.utils._pytree.tree_map(lambda t: t.detach().double().requires_grad_(), hx)
    right = values(exact, x.double(), doubled)
    for a, b, c in zip(mine, values(theirs, x, hx), right, strict=True):
        assert_within_budget(a, b, c, scale=4)


@pytest.mark.parametrize("name", LAYERS)
def test_which_way(name: str, device: torch.device, launched: list[str]) -> None:
    """Weights that fit on the chip stay there; without a gradient of the first states, the last launch is left out."""
    for units, count in ((8, 1), (40, 3)):
        launched.clear()
        layer = getattr(nn, name)(4, units, device=device)
        layer(torch.randn(3, 2, 4, device=device))[0].sum().backward()
        steps = [kernel for kernel in launched if "step" in kernel or "resident" in kernel]
        assert len(steps) == 2 * count
        assert all(("resident" in kernel) == (count == 1) for kernel in steps)


@pytest.mark.parametrize("name", [f"{name}Cell" for name in LAYERS])
def test_cells_with_a_batch_and_states(name: str, device: torch.device) -> None:
    both = pair(name, 5, 7, device=device)
    x, hx = torch.randn(3, 5, device=device, dtype=torch.float64), states(name, 3, 7, device=device)
    for mine, other in zip(*[values(module, x, hx, twice=True) for module in both], strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_between_layers(name: str, device: torch.device) -> None:
    """In training alone, between layers alone: with everything dropped, the last layer's input is 0."""
    ours, theirs = pair(name, 3, 4, num_layers=2, dropout=1.0, device=device)
    x = torch.randn(2, 3, 3, device=device, dtype=torch.float64)
    for training in (True, False):
        found = [values(module.train(training), x) for module in (ours, theirs)]
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", LAYERS)
def test_exchanged_weights(name: str, device: torch.device) -> None:
    """functional_call, an attribute set anew, and a conversion: torch keeps the list of weights in step."""
    ours, theirs = pair(name, 3, 4, device=device)
    x = torch.randn(2, 3, 3, device=device, dtype=torch.float64)
    others = {key: torch.randn_like(value) for key, value in ours.named_parameters()}
    results = [torch.func.functional_call(module, others, x)[0] for module in (ours, theirs)]
    torch.testing.assert_close(*results)
    for module in (ours, theirs):
        module.weight_hh_l0 = torch.nn.Parameter(others["weight_hh_l0"])
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    expected = theirs(x)[0]
    fastlayers.accelerate(theirs)
    assert type(theirs) is type(ours)
    torch.testing.assert_close(theirs(x)[0], expected)
    ours.flatten_parameters()


@pytest.mark.parametrize("name", LAYERS)
def test_errors(name: str, device: torch.device) -> None:
    """torch's, in torch's words."""
    x = torch.randn(2, 3, 4, device=device)
    for arguments in ((x[..., :3],), (x[:0],), (x[None],), (x, states(name, 1, 2, 5, device=device, dtype=x.dtype))):
        messages = []
        for module in pair(name, 4, 5, dtype=torch.float32, device=device):
            with pytest.raises((ValueError, RuntimeError)) as raised:
                module(*arguments)
            messages.append((raised.type, str(raised.value)))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("name", LAYERS)
def test_batch_sizes_that_increase(name: str, device: torch.device) -> None:
    """Of which a kernel would write beyond the states."""
    rows = torch.nn.utils.rnn.PackedSequence(torch.randn(5, 4, device=device), torch.tensor([2, 3]))
    for module in pair(name, 4, 5, dtype=torch.float32, device=device):
        with pytest.raises(RuntimeError):
            module(rows)


def test_second_derivatives_at_once_leave_cudnn_as_it_was() -> None:
    """Each GPU's backward has a thread of its own, the flag is the process's."""
    first, second = without_cudnn(), without_cudnn()
    first.__enter__()
    second.__enter__()
    assert not torch.backends.cudnn.enabled
    first.__exit__(None, None, None)
    assert not torch.backends.cudnn.enabled
    second.__exit__(None, None, None)
    assert torch.backends.cudnn.enabled


def test_proj_size_is_torchs(device: torch.device) -> None:
    ours, theirs = pair("LSTM", 3, 5, num_layers=2, proj_size=2, device=device)
    x = torch.randn(2, 3, 3, device=device, dtype=torch.float64)
    with fastlayers.policy("auto"):
        assert [row.reason for row in fastlayers.explain(ours, x)] == ["proj_size"]
        for mine, other in zip(values(ours, x), values(theirs, x), strict=True):
            torch.testing.assert_close(mine, other)
    with pytest.raises(fastlayers.NotAccelerated, match="proj_size"):
        ours(x)
