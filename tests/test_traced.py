"""torch.compile: the kernels in one graph without a break, forward and backward, with torch's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import fastlayers
from fastlayers import nn
from fastlayers.kernels import _launch

pytestmark = pytest.mark.filterwarnings("ignore")  # Dynamo's and Inductor's own


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with fastlayers.policy("auto"):
        yield
    torch._dynamo.reset()


class Graphs:
    """A backend that keeps what Dynamo captured, and runs it through AOTAutograd."""

    def __init__(self) -> None:
        self.targets: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nodes = [
            node
            for module in graph.modules()
            if isinstance(module, torch.fx.GraphModule)
            for node in module.graph.nodes
        ]
        called = [str(node.target) for node in nodes if node.op == "call_function"]
        self.targets.append([name for name in called if "functorch" not in name])  # whether a transform is active
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    def count(self, name: str) -> int:
        return sum(name in target for targets in self.targets[-1:] for target in targets)


def network(space: Any) -> torch.nn.Module:
    return space.Sequential(
        space.Linear(6, 9), space.ReLU(), space.Linear(9, 7), space.LayerNorm(7), space.Linear(7, 3, bias=False),
        space.ReLU(), space.Softmax(1),
    )  # fmt: skip


@pytest.fixture
def pair(device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    ours, theirs = network(nn).to(device), network(torch.nn).to(device)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def compare(compiled: Callable[..., Any], ours: torch.nn.Module, theirs: torch.nn.Module, x: torch.Tensor) -> None:
    results = []
    for call, model in ((compiled, ours), (theirs, theirs)):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results)


def test_one_graph_with_our_operators(pair: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused as in eager, other sizes without end of compiling, and the kernels are what runs."""
    ours, theirs = pair
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    launched: list[str] = []
    for rows in (5, 8, 11, 12):
        with monkeypatch.context() as patch:
            patch.setattr(_launch, "trace", launched)
            compare(compiled, ours, theirs, torch.randn(rows, 6, device=device))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # one for all sizes after the first
    assert graphs.count("linear_chain") >= 2
    assert graphs.count("built-in function linear") == 0
    assert sum("matmul" in name for name in launched) == 4 * 9  # three forward, dW and dx of three
    with torch.no_grad():
        torch.testing.assert_close(compiled(torch.ones(2, 6, device=device)), theirs(torch.ones(2, 6, device=device)))
    assert graphs.targets[-1].count("fastlayers.linear_chain") == 2, graphs.targets[-1]


def images(space: Any) -> torch.nn.Module:
    return space.Sequential(
        space.Conv2d(2, 4, 3, padding=1), space.ReLU(), space.Conv2d(4, 4, 3, stride=2, bias=False),
        space.BatchNorm2d(4), space.ReLU(), space.Conv2d(4, 2, 1, groups=2), space.Flatten(), space.Linear(8, 3),
    )  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions(memory_format: torch.memory_format, device: torch.device) -> None:
    """Train and eval, fused as in eager, strides as torch's."""
    ours, theirs = images(nn).to(device), images(torch.nn).to(device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 2, 6, 6, device=device).to(memory_format=memory_format)
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    compare(compiled, ours, theirs, x)
    assert graphs.count("fastlayers.conv2d") >= 3
    assert graphs.count("built-in method conv2d") == 0
    for model in (ours, theirs):
        model.eval()
    compare(compiled, ours, theirs, x)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), theirs(x))
        part = torch.compile(ours[:6], backend=graphs, fullgraph=True)(x)
        assert part.stride() == theirs[:6](x).stride()
    assert graphs.targets[-1] == ["fastlayers.conv2d"] * 3  # normalisation and activations inside


def test_inductor(pair: Any, device: torch.device) -> None:
    ours, theirs = pair
    compare(torch.compile(ours, fullgraph=True), ours, theirs, torch.randn(5, 6, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype, pair: Any, device: torch.device) -> None:
    ours, theirs = pair
    x = torch.randn(5, 6, device=device)
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    grads = []
    with torch.autocast(device.type, dtype=dtype):
        for call, model in ((compiled, ours), (theirs, theirs)):
            y = call(x)
            loss = y.float().square().sum()
            grads.append([y, *torch.autograd.grad(loss, list(model.parameters()))])
    assert [g.dtype for g in grads[0]] == [g.dtype for g in grads[1]]
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.05)
    assert graphs.count("linear_chain") >= 2


def test_frozen_layers_are_not_differentiated(pair: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair
    for model in pair:
        model.requires_grad_(False)
        model[2].weight.requires_grad_(True)
    x = torch.randn(4, 6, device=device)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    launched: list[str] = []
    monkeypatch.setattr(_launch, "trace", launched)
    y.square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours[2].weight.grad, theirs[2].weight.grad)
    assert sum("matmul" in name for name in launched) == 2, launched  # dx of the last, dW of the second


def test_hooks_are_seen(pair: Any, device: torch.device) -> None:
    """A layer with a hook is not fused in the graph either. (Of one added later Dynamo takes no notice, torch.nn or not.)"""
    ours, theirs = pair
    for model in pair:
        model[0].register_forward_hook(lambda m, a, y: y + 1)
    compare(torch.compile(ours, backend="aot_eager", fullgraph=True), ours, theirs, torch.randn(4, 6, device=device))


def test_policy_is_looked_at_again(pair: Any, device: torch.device) -> None:
    ours, theirs = pair
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    x = torch.randn(4, 6, device=device)
    compare(compiled, ours, theirs, x)
    with fastlayers.policy("torch"):
        compare(compiled, ours, theirs, x)
        assert graphs.count("linear_chain") == 0
    compare(compiled, ours, theirs, x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_transforms_inside_and_outside(backend: str, pair: Any, device: torch.device) -> None:
    """torch.func around a layer in the graph: torch's functions, so that no derivative is lost."""
    pair = [m[:3] for m in pair]  # torch can't compile a Hessian through LayerNorm
    x = torch.randn(4, 6, device=device)
    results = []
    for model in pair:

        def loss(x: torch.Tensor, model: Any = model) -> torch.Tensor:
            return model(x).square().sum()

        params = {k: v.detach() for k, v in model.named_parameters()}

        def of_params(p: Any, model: Any = model) -> torch.Tensor:
            return torch.func.functional_call(model, p, (x,)).square().sum()

        calls = [
            torch.func.grad(loss), torch.func.hessian(loss), torch.func.vmap(model),
            lambda x, model=model: torch.func.jvp(model, (x,), (x,))[1],
        ]  # fmt: skip
        found = [torch.compile(call, backend=backend)(x) for call in calls]
        found += torch.compile(torch.func.grad(of_params), backend=backend)(params).values()
        compiled = torch.compile(model, backend=backend)
        found.append(torch.func.vmap(compiled)(x))
        results.append(found)
    torch.testing.assert_close(*results)
    assert results[0][0].abs().sum() > 0


def test_second_derivatives_of_a_compiled_model_are_an_error(pair: Any, device: torch.device) -> None:
    """AOTAutograd has none, for torch.nn neither."""
    ours, _ = pair
    x = torch.randn(4, 6, device=device, requires_grad=True)
    compiled = torch.compile(ours, backend="aot_eager")
    (dx,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.square().sum().backward()
    w = torch.randn(3, 6, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="can't be differentiated"):
        torch.ops.fastlayers.linear_chain([x, w, None], [""], False)


def test_what_the_kernels_cannot_take_is_torchs(device: torch.device) -> None:
    layer = nn.Linear(3, 2).to(device, torch.complex64)
    x = torch.randn(4, 3, device=device, dtype=torch.complex64)
    graphs = Graphs()
    torch.testing.assert_close(torch.compile(layer, backend=graphs, fullgraph=True)(x), layer(x))
    assert graphs.count("linear_chain") == 0
    with pytest.raises(Exception, match=r"same reduction dim|Attempted to call function"):
        torch.compile(nn.Linear(3, 2).to(device), backend="eager", fullgraph=True)(torch.randn(4, 5, device=device))


def test_operators_are_well_formed(device: torch.device) -> None:
    """torch's own check: schema, fake kernels against the real ones, tracing with sizes unknown."""
    for shape, bias in (((5, 6), True), ((2, 3, 6), False), ((6,), True)):
        x = torch.randn(shape, device=device)
        first, second = torch.randn(4, 6, device=device), torch.randn(3, 4, device=device)
        tensors = [x, first, torch.randn(4, device=device) if bias else None, second, None]
        checks = ("test_schema", "test_faketensor")
        for keep in (True, False):
            torch.library.opcheck(torch.ops.fastlayers.linear_chain, (tensors, ["relu", ""], keep), test_utils=checks)
        hidden, y = torch.ops.fastlayers.linear_chain(tensors, ["relu", ""], True)
        saved = [torch.randn_like(y), x, first, second, hidden, None]
        for needs in ([True, True, bias, True, False], [False, True, False, False, False]):
            torch.library.opcheck(
                torch.ops.fastlayers.linear_chain_backward,
                (saved, ["relu", ""], list(shape), [4, 3], needs), test_utils=checks,
            )  # fmt: skip


def test_convolution_operators_are_well_formed(device: torch.device) -> None:
    w, b = torch.randn(4, 2, 3, 2, device=device), torch.randn(4, device=device)
    geometry = [2, 1], [1, 0], [1, 0], [1, 2], 2
    for x in (torch.randn(2, 4, 6, 5, device=device), torch.randn(4, 6, 5, device=device)):
        for weight in (w, w.to(memory_format=torch.channels_last)):
            arguments = (x, weight, b, "relu", *geometry, None, [], 0.0, None)
            checks = ("test_schema", "test_faketensor")
            torch.library.opcheck(torch.ops.fastlayers.conv2d, arguments, test_utils=checks)
            y = torch.ops.fastlayers.conv2d(*arguments)
            added = (*arguments[:-1], torch.randn_like(y))
            torch.library.opcheck(torch.ops.fastlayers.conv2d, added, test_utils=checks)
            formats = [False, weight is not w]
            for needs in ([True, True, True], [False, True, False], [True, False, True]):
                backward = (torch.randn_like(y), x, weight, y, "relu", *geometry, x.shape, w.shape, formats, needs)
                torch.library.opcheck(torch.ops.fastlayers.conv2d_backward, backward, test_utils=checks)


def test_flops_are_counted_as_torchs(device: torch.device) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, w, v = (torch.randn(shape, device=device, requires_grad=True) for shape in ((2, 3, 6), (4, 6), (5, 4)))
    totals = []
    for grads in ((x, w, v), (w, v), (v,)):
        with FlopCounterMode(display=False) as counter:
            y = torch.nn.functional.linear(torch.relu(torch.nn.functional.linear(x, w)), v)
            torch.autograd.grad(y.sum(), grads)
        needs = [len(grads) > 2, len(grads) > 1, False, True, False]
        with torch.no_grad(), FlopCounterMode(display=False) as mine:
            hidden, y = torch.ops.fastlayers.linear_chain([x, w, None, v, None], ["relu", ""], True)
            saved = [torch.ones_like(y), x, w, v, hidden, None]
            torch.ops.fastlayers.linear_chain_backward(saved, ["relu", ""], [2, 3, 6], [4, 5], needs)
        totals.append((mine.get_total_flops(), counter.get_total_flops()))
    x, w = (torch.randn(shape, device=device, requires_grad=True) for shape in ((2, 3, 6, 5), (4, 3, 3, 3)))
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(torch.nn.functional.conv2d(x, w, stride=2).sum(), (x, w))
    with torch.no_grad(), FlopCounterMode(display=False) as mine:
        geometry = [2, 2], [0, 0], [0, 0], [1, 1], 1
        y = torch.ops.fastlayers.conv2d(x, w, None, "", *geometry, None, [], 0.0, None)
        dy, options = torch.ones_like(y), (x.shape, w.shape, [False, False], [True, True, False])
        torch.ops.fastlayers.conv2d_backward(dy, x, w, None, "", *geometry, *options)
    totals.append((mine.get_total_flops(), counter.get_total_flops()))
    assert all(a == b for a, b in totals), totals


def test_export_stays_torchs(pair: Any, device: torch.device) -> None:
    """An exported program must run where fastlayers isn't installed."""
    for strict in (False, True):
        exported = torch.export.export(pair[0], (torch.randn(4, 6, device=device),), strict=strict)
        assert not any("fastlayers" in str(node.target) for node in exported.graph.nodes)
