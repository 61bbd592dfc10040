"""fuse: what runs together in models that aren't Sequentials, and that nobody can tell."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager

import fastlayers
import fastlayers.functional as FL
from fastlayers import nn
from fastlayers.kernels import _record
from fastlayers.testing import assert_within_budget, neighbours

pytestmark = [pytest.mark.usefixtures("small_tiles"), pytest.mark.filterwarnings("ignore:fuse found nothing")]


@pytest.fixture(autouse=True)
def _auto() -> Any:
    with fastlayers.policy("auto"):
        yield


class Bottleneck(torch.nn.Module):
    """Written as torchvision's is."""

    def __init__(self, c: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = torch.nn.Conv2d(c, width, 1, bias=False), torch.nn.BatchNorm2d(width)
        self.conv2, self.bn2 = torch.nn.Conv2d(width, width, 3, stride, 1, bias=False), torch.nn.BatchNorm2d(width)
        self.conv3, self.bn3 = torch.nn.Conv2d(width, 2 * width, 1, bias=False), torch.nn.BatchNorm2d(2 * width)
        self.relu = torch.nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            match = torch.nn.Conv2d(c, 2 * width, 1, stride, bias=False)
            self.downsample = torch.nn.Sequential(match, torch.nn.BatchNorm2d(2 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Linear(2, 2)
        self.fc = torch.nn.Linear(6, 3)  # called last
        self.stem = torch.nn.Conv2d(2, 4, 3, padding=1)
        self.layers = torch.nn.Sequential(Bottleneck(4, 3, stride=2), Bottleneck(6, 3))
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x) * self.scale)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.layers(x), 1), 1))


@pytest.fixture
def pair(device: torch.device) -> tuple[Any, Any]:
    """A fused model and torch's."""
    theirs = ResNet().to(device)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight)
    ours = copy.deepcopy(theirs)
    fastlayers.accelerate(ours)
    return fastlayers.fuse(ours), theirs


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    return torch.randn(2, 2, 5, 6, device=device)


def together(model: torch.nn.Module, x: torch.Tensor) -> list[str]:
    """What runs on our kernels, in order."""
    return [decision.module for decision in fastlayers.explain(model, x) if decision.path == "triton"]


IN_EVAL = [
    "stem",
    "layers.0.downsample.0 + layers.0.downsample.1",
    *[f"layers.{i}.conv{j} + layers.{i}.bn{j}{add} + layers.{i}.relu"
      for i in (0, 1) for j, add in ((1, ""), (2, ""), (3, " + Add"))],
    "fc",
]  # fmt: skip


def test_a_residual_network_in_eval(pair: Any, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair[0].eval(), pair[1].eval()
    exact, near = copy.deepcopy(theirs).double()(x.double()), [theirs(t) for (t,) in neighbours(x)]
    plays: list[None] = []
    play = _record.Take.play
    with torch.no_grad():
        assert together(ours, x) == IN_EVAL
        for _ in range(3):
            assert_within_budget(ours(x), near, exact)
        monkeypatch.setattr(_record.Take, "play", lambda *a: (plays.append(None), play(*a))[1])
        assert_within_budget(ours(x), near, exact)
        assert len(plays) == len(IN_EVAL), "all of it replayed"
    assert [name for name in together(ours, x) if "+" in name] == []
    assert_within_budget(ours(x), near, exact)


def test_training(pair: Any, x: torch.Tensor) -> None:
    """Three steps: gradients, statistics, weights."""
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in pair]
    for _ in range(3):
        for model, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(pair[0].state_dict(), pair[1].state_dict(), rtol=1e-4, atol=1e-5)


def test_the_modules_are_the_models(device: torch.device, x: torch.Tensor) -> None:
    """In its order, with what isn't called: an optimizer's state and a checkpoint fit both."""
    model = ResNet().to(device).eval()
    fastlayers.accelerate(model)
    fused = fastlayers.fuse(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert [id(p) for p in fused.parameters()] == [id(p) for p in model.parameters()]
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in model.named_modules()]
    assert not fused.training
    with torch.no_grad():
        expected = fused(x)
        model.layers[0].conv1.weight.mul_(2)
        torch.testing.assert_close(fused(x), model(x))
        assert not torch.equal(fused(x), expected)
        assert fused.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "fused again", "traced again"])
def test_copies(way: str, pair: Any, x: torch.Tensor) -> None:
    ours, theirs = pair[0].eval(), pair[1].eval()
    if way == "deepcopy":
        again = copy.deepcopy(ours)
    elif way == "pickle":
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    else:
        again = fastlayers.fuse(ours) if way == "fused again" else torch.fx.symbolic_trace(ours)
    with torch.no_grad():
        assert len(together(again, x)) >= len(IN_EVAL) - (way == "traced again") * 2
        torch.testing.assert_close(again(x), theirs(x))
    if way != "traced again":
        kept = [name for name in again.state_dict() if name != "scale"]  # persistent in torch.fx's copies
        assert kept == list(theirs.state_dict())


def test_hooks_come_and_go(pair: Any, x: torch.Tensor) -> None:
    ours = pair[0].eval()
    seen: list[Any] = []
    with torch.no_grad():
        handle = ours.layers[1].bn3.register_forward_hook(lambda m, i, y: seen.append(y))
        parts = together(ours, x)
        assert "layers.1.conv3" in parts
        assert len(seen) == 1
        torch.testing.assert_close(ours(x), pair[1].eval()(x))
        handle.remove()
        assert together(ours, x) == IN_EVAL


def test_a_container_with_a_hook_stays_whole(device: torch.device, x: torch.Tensor) -> None:
    model = ResNet().to(device).eval()
    fastlayers.accelerate(model)
    seen: list[Any] = []
    model.layers[0].register_forward_hook(lambda m, i, y: seen.append(y.shape))
    fused = fastlayers.fuse(model)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
        assert len(seen) == 2
        assert "layers.0.conv1" in together(fused, x)
        assert "layers.1.conv3 + layers.1.bn3 + Add + layers.1.relu" in together(fused, x)


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
def test_compiled(pair: Any, x: torch.Tensor) -> None:
    ours, theirs = pair[0].eval(), pair[1].eval()
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), theirs(x))
    torch._dynamo.reset()
    assert called.count("fastlayers.conv2d") == len(IN_EVAL) - 1
    assert not any("add" in name or "norm" in name for name in called), called


class Functional(torch.nn.Module):
    """As most people write it."""

    def __init__(self, *ways: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.ways = ways
        self.first, self.second, self.third = torch.nn.Linear(6, 8), torch.nn.Linear(8, 7), torch.nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.ways[1](self.second(self.ways[0](self.first(x)))))


@pytest.mark.parametrize(
    "ways",
    [
        (F.relu, torch.relu),
        (lambda x: x.relu(), lambda x: F.relu(x, inplace=True)),
        (torch.relu_, lambda x: x.relu_()),
    ],
)
def test_linear_layers_are_one_function(ways: Any, device: torch.device) -> None:
    theirs = Functional(*ways).to(device)
    ours = copy.deepcopy(theirs)
    fastlayers.accelerate(ours)
    fused = fastlayers.fuse(ours)
    x = torch.randn(5, 6, device=device, requires_grad=True)
    (decision,) = fastlayers.explain(fused, x)
    assert decision.module.startswith("first + ")
    assert decision.module.endswith(" + third")
    results = []
    for model in (fused, theirs):
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    torch.testing.assert_close(*results)


class Between(torch.nn.Module):
    """A convolution, something, and a ReLU or an addition."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any]):
        super().__init__()
        self.conv, self.other = torch.nn.Conv2d(2, 2, 3, padding=1), torch.nn.Conv2d(2, 2, 1)
        self.norm, self.relu, self.through = torch.nn.BatchNorm2d(2), torch.nn.ReLU(inplace=True), forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.through(self, x.clone())


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


def by_keyword(m: Any, x: torch.Tensor) -> Any:
    return m.relu(input=m.norm(input=m.conv(input=x)))


def normalised_twice(m: Any, x: torch.Tensor) -> Any:
    return m.relu(m.norm(m.norm(m.conv(x))))


PROGRAMS = [
    used_twice, returned_as_well, input_overwritten, input_overwritten_by_a_module, input_overwritten_by_an_operator,
    input_overwritten_by_an_index, input_overwritten_as_out, added_into_the_other, added_to_itself, added_with_alpha,
    added_number, added_size, added_row, added_float, added_from_the_left, added_twice, added_after_the_activation,
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
            torch.testing.assert_close(found, expected)


class Random(torch.nn.Module):
    """A forward drawn by lot: layers, sums and writes, in any order and on anything."""

    def __init__(self, seed: int):
        super().__init__()
        draw = random.Random(seed)
        self.layers = torch.nn.ModuleList(
            draw.choice([
                lambda: torch.nn.Conv2d(2, 2, 3, padding=1), lambda: torch.nn.Conv2d(2, 2, 1, bias=False),
                lambda: torch.nn.BatchNorm2d(2), torch.nn.ReLU, lambda: torch.nn.ReLU(inplace=True),
            ])() for _ in range(6)
        )  # fmt: skip
        self.program = []
        for i in range(14):
            last = i if draw.random() < 0.7 else draw.randrange(i + 1)
            self.program.append((draw.choice("LLLLLL++=*rsv"), last, draw.randrange(i + 1), draw.randrange(6)))

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
        return torch.stack([values[-1], sum(values[1:], values[0])])


@pytest.mark.parametrize("turn", range(25))
def test_forwards_drawn_by_lot(turn: int, device: torch.device) -> None:
    theirs = Random(int(torch.randint(2**31, ()))).to(device).eval()
    ours = copy.deepcopy(theirs)
    fastlayers.accelerate(ours)
    fused = fastlayers.fuse(ours)
    x = torch.randn(1, 2, 3, 4, device=device)
    with torch.no_grad():
        torch.testing.assert_close(fused.double()(x.double()), theirs.double()(x.double()))


def test_a_forward_that_depends_on_data(device: torch.device) -> None:
    model = Between(lambda m, x: m.conv(x) if x.sum() > 0 else x)
    with pytest.raises(torch.fx.proxy.TraceError):
        fastlayers.fuse(model)


def test_a_sequential_itself(device: torch.device) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(nn.ReLU()), nn.Flatten(), nn.Linear(8, 3)).to(device)
    x = torch.randn(2, 1, 2, 2, device=device)
    fused = fastlayers.fuse(model)
    assert together(fused, x) == ["0 + 1.0", "3"]
    torch.testing.assert_close(fused(x), model(x))
    assert list(fused.state_dict()) == list(model.state_dict())


def test_our_functions_stay_ours(device: torch.device) -> None:
    class Mine(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mine = nn.Conv2d(1, 2, 1), Mine(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = FL.relu(self.conv(x)).flatten(1)
            return FL.softmax(self.mine(FL.linear(x, weight=x[:1].expand(8, 8))), dim=1)

    x = torch.randn(2, 1, 2, 2, device=device)
    for model in (Model().to(device), nn.Linear(2, 3).to(device)):
        fused = fastlayers.fuse(model)
        assert [d.path for d in fastlayers.explain(fused, x)] == ["triton"] * len(fastlayers.explain(fused, x))
        torch.testing.assert_close(fused(x), model(x))
        torch.testing.assert_close(copy.deepcopy(fused)(x), model(x))
    assert together(fastlayers.fuse(Model().to(device)), x)[0] == "conv + relu"
