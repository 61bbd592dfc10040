"""fuse: programs that tempt it to join what must not be joined, compared with torch.nn run as it stands."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Between

import fastlayers

pytestmark = [pytest.mark.usefixtures("small_tiles"), pytest.mark.filterwarnings("ignore:fuse found nothing")]


@pytest.fixture(autouse=True)
def _auto() -> Any:
    with fastlayers.policy("auto"):
        yield


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    return torch.randn(2, 2, 5, 6, device=device)


def used_twice(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    return m.relu(y + 0) + y


def returned_as_well(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    return y, F.relu(y)


def input_overwritten(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    x.mul_(2)
    return F.relu(y) + x


def input_overwritten_by_a_module(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    z = m.relu(x)
    return F.relu(y + z)


def input_overwritten_by_an_operator(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    x += 1
    return F.relu(y) + x


def input_overwritten_by_an_index(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    x[0] = 7
    return F.relu(y)


def input_overwritten_as_out(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    torch.mul(x, 3, out=x)
    return F.relu(y) + x


def added_into_the_other(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    z = m.other(x)
    kept = z.view(-1)
    z += y
    return F.relu(z), kept


def added_to_itself(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    return F.relu(y + y)


def added_with_alpha(m: Any, x: torch.Tensor) -> Any:
    return F.relu(torch.add(m.conv(x), x, alpha=3))


def added_number(m: Any, x: torch.Tensor) -> Any:
    return F.relu(m.conv(x) + 1.5)


def added_size(m: Any, x: torch.Tensor) -> Any:
    return F.relu(m.conv(x) + x.size(0))


def added_row(m: Any, x: torch.Tensor) -> Any:
    return F.relu(m.norm(m.conv(x)) + x[:1, :, :1])


def added_float(m: Any, x: torch.Tensor) -> Any:
    return F.relu(m.conv(x) + x.float())


def added_from_the_left(m: Any, x: torch.Tensor) -> Any:
    return F.relu(x + m.norm(m.conv(x)))


def added_twice(m: Any, x: torch.Tensor) -> Any:
    return F.relu(m.norm(m.conv(x)) + x + m.other(x))


def added_after_the_activation(m: Any, x: torch.Tensor) -> Any:
    return m.norm(F.relu(m.conv(x)) + x)


def both_are_convolutions(m: Any, x: torch.Tensor) -> Any:
    return torch.add(m.norm(m.conv(x)), m.other(x)).relu_()


def one_layer_twice(m: Any, x: torch.Tensor) -> Any:
    return m.relu(m.conv(m.relu(m.conv(x)) + x) + x)


def added_in_place(m: Any, x: torch.Tensor) -> Any:
    y = m.norm(m.conv(x))
    y += x
    return F.relu(y)


def added_in_place_in_another_dtype(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    y += torch.ones_like(x, dtype=torch.float32)
    z = m.conv(x).float()
    z += x
    return F.relu(y), F.relu(m.other(x).add_(x.float())), z


def numbers_in_place(m: Any, x: torch.Tensor) -> Any:
    start = end = x.size(3) - 3
    end += 2
    return F.relu(m.conv(x))[..., start:end]


def other_operators_in_place(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    kept = y.view(-1)
    y *= 2
    y -= x
    y /= 3
    y **= 2
    y[:, 0] = 1
    return F.relu(y), kept


def one_norm_for_two(m: Any, x: torch.Tensor) -> Any:
    """Whose running statistics go by the order of calls."""
    y, z = m.conv(x), m.other(x)
    z = m.norm(z)
    return F.relu(m.norm(y)) + z


def formats(m: Any, x: torch.Tensor) -> Any:
    last = x.contiguous(memory_format=torch.channels_last)
    return F.relu(last + m.conv(x)), F.relu(m.conv(x) + last), m.other(F.relu(last + m.conv(x)))


def by_keyword(m: Any, x: torch.Tensor) -> Any:
    return m.relu(input=m.norm(input=m.conv(input=x)))


def normalised_twice(m: Any, x: torch.Tensor) -> Any:
    return m.relu(m.norm(m.norm(m.conv(x))))


PROGRAMS = [
    used_twice, returned_as_well, input_overwritten, input_overwritten_by_a_module, input_overwritten_by_an_operator,
    input_overwritten_by_an_index, input_overwritten_as_out, added_into_the_other, added_to_itself, added_with_alpha,
    added_number, added_size, added_row, added_float, added_from_the_left, added_twice, added_after_the_activation,
    added_in_place, added_in_place_in_another_dtype, numbers_in_place, other_operators_in_place, one_norm_for_two, formats,
    both_are_convolutions, one_layer_twice, by_keyword, normalised_twice,
]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program: Any, x: torch.Tensor) -> None:
    """In eval without gradients, and in training."""
    theirs, x = Between(program).to(x.device).double(), x.double()
    ours = copy.deepcopy(theirs)
    fastlayers.accelerate(ours)
    fused = fastlayers.fuse(ours)
    for training in (False, True):
        for _ in range(3):
            with torch.set_grad_enabled(training):
                expected, found = (model.train(training)(x) for model in (theirs, fused))
            torch.testing.assert_close(found, expected, check_stride=True)
        torch.testing.assert_close(fused.state_dict(), theirs.state_dict())


class Random(torch.nn.Module):
    """A forward drawn by lot: layers, sums and writes, in any order and on anything, most of them on the last result."""

    def __init__(self, seed: int, *layers: torch.nn.Module):
        super().__init__()
        draw = random.Random(seed)
        self.layers = torch.nn.ModuleList(layers)
        self.program = []
        for i in range(14):
            first = i if draw.random() < 0.85 else draw.randrange(i + 1)
            what = draw.choice("LLLLLLLL+++=*rsv")
            self.program.append((what, first, draw.randrange(i + 1), draw.randrange(len(self.layers))))
        self.kept = draw.randrange(len(self.program))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x.clone()]
        for what, first, second, layer in self.program:
            a, b = values[first], values[second]
            if what == "L":
                a = self.layers[layer](a)
            elif what == "+":
                a = a + b
            elif what == "=":
                a += b
            elif what == "*":
                a = a.mul_(0.5)
            elif what == "r":
                a = F.relu(a)
            elif what == "s":
                a = torch.relu_(a)
            else:
                a = a.view(a.shape)
            values.append(a)
        return torch.stack([values[-1], values[self.kept], values[0]])


def drawn(device: torch.device, *layers: torch.nn.Module) -> tuple[Any, torch.nn.Module]:
    """The same forward, fused and by torch, in float64."""
    theirs = Random(int(torch.randint(2**31, ())), *layers).to(device).double().eval()
    ours = copy.deepcopy(theirs)
    fastlayers.accelerate(ours)
    return fastlayers.fuse(ours), theirs


@pytest.mark.parametrize("turn", range(25))
def test_forwards_drawn_by_lot(turn: int, device: torch.device) -> None:
    nn = torch.nn
    layers = (
        nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.ReLU(),
        nn.ReLU(inplace=True),
    )  # fmt: skip
    fused, theirs = drawn(device, *layers)
    x = torch.randn(1, 2, 3, 4, device=device, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), theirs(x), check_stride=True)


@pytest.mark.parametrize("turn", range(25))
def test_forwards_of_tokens_drawn_by_lot(turn: int, device: torch.device) -> None:
    """With gradients, where torch has any: what is written over may be needed."""
    nn = torch.nn
    layers = (
        nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.LayerNorm(4), nn.LayerNorm(4, bias=False), nn.ReLU(),
        nn.GELU(), nn.ReLU(inplace=True),
    )  # fmt: skip
    fused, theirs = drawn(device, *layers)
    x = torch.randn(3, 4, device=device, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), theirs(x), check_stride=True)
    results = []
    for model in (theirs, fused):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        torch.testing.assert_close(y, theirs(leaf))
        parameters = [leaf, *model.parameters()]
        try:
            results.append(torch.autograd.grad(y, parameters, torch.ones_like(y), allow_unused=True))
        except RuntimeError as error:
            if not results and "modified by an inplace operation" in str(error):
                return
            raise
    torch.testing.assert_close([g for g in results[1] if g is not None], [g for g in results[0] if g is not None])
    assert [g is None for g in results[0]] == [g is None for g in results[1]]


class Several(torch.nn.Module):
    """Residuals one after the other, of which no sum has another consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.c(F.relu(self.b(F.relu(self.a(x) + x)) + x)) + x)


def test_several_residuals_in_a_row(x: torch.Tensor) -> None:
    theirs = Several().to(x.device)
    ours = copy.deepcopy(theirs)
    fastlayers.accelerate(ours)
    fused = fastlayers.fuse(ours)
    with torch.no_grad():
        decisions = fastlayers.explain(fused, x)
        assert [(d.module, d.path) for d in decisions] == [(f"{m} + add + relu", "triton") for m in "abc"]
        torch.testing.assert_close(fused(x), theirs(x))
    results = []
    for model in (fused, theirs):
        results.append(torch.autograd.grad(model(x).square().sum(), [*model.parameters()]))
    torch.testing.assert_close(*results)


class Block(torch.nn.Module):
    """A transformer's residual stream: sums that several see, each before a norm."""

    def __init__(self, inplace: bool):
        super().__init__()
        nn = torch.nn
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.up, self.down, self.inplace = nn.Linear(5, 9), nn.Linear(9, 5), inplace
        self.norms = nn.ModuleList([nn.LayerNorm(5) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(self.norms[0](x))
        if self.inplace:
            h += x
            x = h
        else:
            x = h + x
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.second(self.norms[2](x)) + x


def test_a_norm_without_a_gradient(device: torch.device) -> None:
    """Its parameters have none either, rather than one of zeros, with which an optimiser would go on."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(5)

        def forward(self, x: torch.Tensor) -> Any:
            x = x + x.flip(0)
            return self.norm(x), x

    theirs = Model().to(device)
    ours = copy.deepcopy(theirs)
    fastlayers.accelerate(ours)
    fused = fastlayers.fuse(ours)
    x = torch.randn(3, 5, device=device, requires_grad=True)
    for _ in range(4):
        for chosen in ((1,), (0,), (0, 1)):
            for create_graph in (False, True):
                results = []
                for model in (fused, theirs):
                    ys = model(x)
                    loss = sum(ys[i].square().sum() for i in chosen)
                    leaves = [x, *model.parameters()]
                    grads = torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)
                    results.append(grads)
                assert [g is None for g in results[0]] == [g is None for g in results[1]]
                torch.testing.assert_close(*[[g for g in grads if g is not None] for grads in results])


@pytest.mark.parametrize("inplace", [False, True])
def test_a_residual_stream(inplace: bool, device: torch.device, plays: list[None]) -> None:
    """Forward, gradients and second derivatives, ever again; a hook on a norm; the sum is written into by nobody else."""
    theirs = Block(inplace).to(device).double()
    ours = copy.deepcopy(theirs)
    fastlayers.accelerate(ours)
    fused = fastlayers.fuse(ours)
    names = [d.module for d in fastlayers.explain(fused, torch.randn(2, 3, 5, device=device, dtype=torch.float64))]
    assert ("add + norms.1" in names) is not inplace
    assert "add + norms.2" in names
    seen: list[Any] = []
    for turn in range(5):
        if turn == 4:
            theirs.norms[2].register_forward_hook(lambda *_: seen.append(None))
            ours.norms[2].register_forward_hook(lambda *_: seen.append(None))
        x = torch.randn(2, 3, 5, device=device, dtype=torch.float64, requires_grad=True)
        results = []
        for model in (fused, theirs):
            y = model(x)
            first = torch.autograd.grad(y.square().sum(), [x, *model.parameters()], create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *model.parameters()])
            with torch.no_grad():
                results.append([y, *first, *second, model(x)])
        torch.testing.assert_close(*results)
    assert plays
    assert len(seen) == 4
