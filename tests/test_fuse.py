"""fuse: what runs together in models that aren't Sequentials, and that nobody can tell."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Between
from torch._dynamo.backends.debugging import aot_eager

import fastlayers
import fastlayers.functional as FL
from fastlayers import nn
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
      for i in (0, 1) for j, add in ((1, ""), (2, ""), (3, " + add"))],
    "fc",
]  # fmt: skip


def test_a_residual_network_in_eval(pair: Any, x: torch.Tensor, plays: list[None]) -> None:
    ours, theirs = pair[0].eval(), pair[1].eval()
    exact, near = copy.deepcopy(theirs).double()(x.double()), [theirs(t) for (t,) in neighbours(x)]
    with torch.no_grad():
        assert together(ours, x) == IN_EVAL
        for _ in range(3):
            assert_within_budget(ours(x), near, exact)
        plays.clear()
        assert_within_budget(ours(x), near, exact)
        assert len(plays) == len(IN_EVAL), "all of it replayed"
    # With gradients, a normalisation and what is behind it.
    norms = [f"layers.{i}.bn{j} + layers.{i}.relu" for i in (0, 1) for j in (1, 2)]
    assert [name for name in together(ours, x) if "+" in name] == norms
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
        assert list(again.state_dict()) == list(theirs.state_dict())


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
        assert "layers.1.conv3 + layers.1.bn3 + add + layers.1.relu" in together(fused, x)


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
    assert sum(name.startswith("fastlayers.conv2d") for name in called) == len(IN_EVAL) - 1
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


def depends_on_data(m: Any, x: torch.Tensor) -> Any:
    return m.conv(x) if x.sum() > 0 else x


def without_grad(m: Any, x: torch.Tensor) -> Any:
    with torch.no_grad():
        return m.conv(x)


def with_grad(m: Any, x: torch.Tensor) -> Any:
    torch.set_grad_enabled(True)
    return m.conv(x)


def without_autocast(m: Any, x: torch.Tensor) -> Any:
    with torch.autocast("cpu", enabled=False):
        return m.conv(x)


def keeps_features(m: Any, x: torch.Tensor) -> Any:
    m.features = m.conv(x)
    return m.features


def counts(m: Any, x: torch.Tensor) -> Any:
    m.calls = getattr(m, "calls", 0) + 1
    return m.conv(x)


def counts_in_a_buffer(m: Any, x: torch.Tensor) -> Any:
    m.count += 1
    return m.conv(x)


@pytest.mark.parametrize(
    "forward",
    [depends_on_data, without_grad, with_grad, without_autocast, keeps_features, counts, counts_in_a_buffer],
)
def test_what_a_graph_would_leave_out_is_refused(forward: Any) -> None:
    model = Between(forward)
    model.register_buffer("count", torch.zeros(()))
    before = {**vars(model)}, {**model._buffers}
    enter = torch.no_grad.__enter__, torch.autocast.__enter__, torch.set_grad_enabled.__init__
    with pytest.raises(torch.fx.proxy.TraceError):
        fastlayers.fuse(model)
    assert (vars(model), model._buffers) == before
    assert float(model.count) == 0
    assert (torch.no_grad.__enter__, torch.autocast.__enter__, torch.set_grad_enabled.__init__) == enter


def test_what_can_not_be_fused(device: torch.device) -> None:
    with pytest.raises(TypeError, match="fuse takes a module"):
        fastlayers.fuse(F.relu)  # type: ignore[arg-type]
    model = Between(lambda m, x: m.conv(x))
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="forward was replaced"):
        fastlayers.fuse(model)
    with pytest.warns(UserWarning, match="fuse found nothing"):
        fastlayers.fuse(Between(lambda m, x: F.relu(m.norm(m.conv(x)) + x[:1, :, :1])))


class Constants(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.register_buffer("mean", torch.randn(2))
        self.register_buffer("position", torch.randn(2, 1, 1), persistent=False)
        self.scale = torch.randn(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv((x - self.mean[:, None, None]) * self.scale))
        return x * torch.tensor(2.0) + self.position


def test_buffers_and_constants(x: torch.Tensor) -> None:
    model = Constants().to(x.device)
    model.scale = model.scale.to(x.device)
    own = {**vars(model)}, {**model._buffers}
    fused = fastlayers.fuse(model)
    assert (vars(model), model._buffers) == own
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    averaged = torch.optim.swa_utils.AveragedModel(fused)
    for again in (fused, copy.deepcopy(fused), averaged, torch.load(file, weights_only=False)):
        torch.testing.assert_close(again(x), model(x))
        model.load_state_dict(getattr(again, "module", again).state_dict())
    model.conv = nn.Conv2d(2, 3, 1).to(x.device).double()
    model.double().mean = torch.ones(1, dtype=torch.double, device=x.device)
    model.position = model.position[:1]
    torch.testing.assert_close(fused(x.double()), model(x.double()))


class Defaults(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: torch.Tensor, mask: Any = None, flag: bool = True, *, scale: float = 1.0) -> torch.Tensor:
        x = self.conv(x) * scale
        if mask is not None:
            x = x * mask
        return F.relu(x) if flag else x


def test_arguments_with_defaults(x: torch.Tensor) -> None:
    model = Defaults().to(x.device)
    fused = fastlayers.fuse(model)
    for args, kwargs in (((), {}), ((None,), {}), ((None, True), {"scale": 2.5}), ((), {"flag": True, "mask": None})):
        torch.testing.assert_close(fused(x, *args, **kwargs), model(x, *args, **kwargs))
    for kwargs in ({"mask": x}, {"flag": False}, {"flag": 1}):
        with pytest.raises(ValueError, match="fused for"):
            fused(x, **kwargs)


def test_modules_of_the_users_own_are_called_as_ever(x: torch.Tensor) -> None:
    class Noise(torch.nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return F.dropout(x, 0.5, training=self.training)

    class Block(nn.Sequential):
        pass

    model = torch.nn.Sequential(Block(nn.Conv2d(2, 2, 1), nn.ReLU()), Noise(), nn.Conv2d(2, 1, 1)).to(x.device).eval()
    fused = fastlayers.fuse(model)
    assert together(fused, x) == ["0.0 + 0.1", "2"]
    seen: list[Any] = []
    model[1].register_forward_hook(lambda *_: seen.append(None))
    torch.testing.assert_close(fused(x), model(x))
    assert (model[1].calls, len(seen)) == (3, 2)
    assert not torch.equal(fused.train()(x), fused(x)), "dropout"
    model[1] = torch.nn.Identity()
    torch.testing.assert_close(fused(x), model(x))


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
def test_compiled_with_functions(x: torch.Tensor) -> None:
    model = Between(lambda m, x: F.relu(m.norm(m.conv(x)) + x)).to(x.device).eval()
    fastlayers.accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(fastlayers.fuse(model), backend="aot_eager", fullgraph=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_autocast_keeps_what_adding_in_place_keeps(pair: Any, x: torch.Tensor) -> None:
    ours, theirs = (model.layers[1].eval() for model in pair)
    fused = fastlayers.fuse(ours)
    x = torch.randn(2, 6, 3, 3, device=x.device)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast(x.device.type, torch.bfloat16):
            for _ in range(3):
                assert fused(x).dtype == theirs(x).dtype == torch.bfloat16


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
