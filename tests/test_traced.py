"""torch.compile: the kernels in one graph without a break, forward and backward, with torch's numbers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fastlayers
from fastlayers import nn
from fastlayers.catalog import ROWS, Floats, Row
from fastlayers.kernels.runtime import launch as _launch
from fastlayers.operation import Operation

# Dynamo's and Inductor's own are ignored, but not those that our code's way of writing causes.
pytestmark = pytest.mark.filterwarnings("ignore", "error:Dynamo detected")


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


LINEAR = "('tuple', ('tuple', ('tuple', None, ), ), None, )"
"""One linear layer without an activation, as an operator's text."""


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
    assert graphs.count("fastlayers.linear.") >= 2
    assert graphs.count("built-in function linear") == 0
    assert sum("matmul" in name for name in launched) == 4 * 9  # three forward, dW and dx of three
    with torch.no_grad():
        torch.testing.assert_close(compiled(torch.ones(2, 6, device=device)), theirs(torch.ones(2, 6, device=device)))
    assert graphs.targets[-1].count("fastlayers.linear.default") == 2, graphs.targets[-1]


def test_one_tensor_in_several_places(device: torch.device) -> None:
    """Dynamo takes no tensor twice into an autograd.Function."""
    x = torch.randn(2, 2, 9, 16, device=device)

    def call(space: Any) -> Callable[..., Any]:
        return lambda x: space.scaled_dot_product_attention(x, x, x) + space.mse_loss(x, x)

    graphs, results = Graphs(), []
    compiled = torch.compile(call(fastlayers.functional), backend=graphs, fullgraph=True)
    for function in (compiled, call(torch.nn.functional)):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaf)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert graphs.count("fastlayers.") == 2, graphs.targets


def images(space: Any) -> torch.nn.Module:
    return space.Sequential(
        space.Conv2d(2, 4, 3, padding=1), space.ReLU(), space.Conv2d(4, 4, 3, stride=2, bias=False),
        space.BatchNorm2d(4), space.ReLU(), space.Conv2d(4, 2, 1, groups=2), space.Flatten(), space.Linear(8, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, pytest.param(torch.channels_last, marks=pytest.mark.slow)]
)
def test_convolutions(memory_format: torch.memory_format, device: torch.device) -> None:
    """Train and eval, fused as in eager, strides as torch's."""
    ours, theirs = images(nn).to(device), images(torch.nn).to(device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 2, 6, 6, device=device).to(memory_format=memory_format)
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    compare(compiled, ours, theirs, x)
    assert graphs.count("fastlayers.conv2d.") >= 3
    assert graphs.count("built-in method conv2d") == 0
    for model in (ours, theirs):
        model.eval()
    compare(compiled, ours, theirs, x)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), theirs(x))
        part = torch.compile(ours[:6], backend=graphs, fullgraph=True)(x)
        assert part.stride() == theirs[:6](x).stride()
    called = [name for name in graphs.targets[-1] if "getitem" not in name]
    names = ["conv2d", "conv2d_inference", "conv2d"]  # normalisation and activations inside
    assert called == [f"fastlayers.{name}.default" for name in names]


@pytest.mark.slow
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
    assert graphs.count("fastlayers.linear.") >= 2


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
        assert graphs.count("fastlayers.linear.") == 0
    compare(compiled, ours, theirs, x)


@pytest.mark.slow
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
        torch.ops.fastlayers.linear([x, w, None], [], [], LINEAR)


def test_what_the_kernels_cannot_take_is_torchs(device: torch.device) -> None:
    layer = nn.Linear(3, 2).to(device, torch.complex64)
    x = torch.randn(4, 3, device=device, dtype=torch.complex64)
    graphs = Graphs()
    torch.testing.assert_close(torch.compile(layer, backend=graphs, fullgraph=True)(x), layer(x))
    assert graphs.count("fastlayers.linear.") == 0
    with pytest.raises(Exception, match=r"same reduction dim|Attempted to call function"):
        torch.compile(nn.Linear(3, 2).to(device), backend="eager", fullgraph=True)(torch.randn(4, 5, device=device))


Call = tuple[Any, tuple[Any, ...]]
"""An operator and its arguments."""


class _Noting(torch.fx.Interpreter):
    """Runs a graph and notes the calls of our operators."""

    def __init__(self, graph: torch.fx.GraphModule, calls: list[Call]):
        super().__init__(graph)
        self.calls = calls

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if "fastlayers" in str(target):
            (tensors, *call) = args
            self.calls.append((target, ([t if t is None else t.detach() for t in tensors], *call)))
        return super().call_function(target, args, kwargs)


def noting(model: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], list[Call]]:
    """The compiled model, and the calls of our operators that it makes."""
    calls: list[Call] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return make_boxed_func(_Noting(graph, calls).run)

    return torch.compile(model, backend=aot_autograd(fw_compiler=compiler), fullgraph=True, **options), calls


def check(calls: list[Call]) -> None:
    """torch's own checks of operators: the schema, and fake kernels against the real ones."""
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


CASES = [
    pytest.param(row, name, wanted, marks=[] if name == next(iter(row.cases)) and wanted == "all" else pytest.mark.slow,
                 id=f"{row.name}-{name}-{wanted}")
    for row in ROWS for name in row.cases for wanted in ("all", "first", "last")
]  # fmt: skip


@pytest.mark.parametrize(("row", "name", "wanted"), CASES)
def test_every_layer(row: Row, name: str, wanted: str, device: torch.device) -> None:
    """In one graph, whose operators are well formed and count the same FLOPs as torch's: all gradients, the first input's alone,
    the last parameter's alone."""
    case = row.cases[name]
    ours, theirs = (case.make(space).to(device) for space in (nn, torch.nn))
    if isinstance(ours, torch.nn.RNNBase):
        pytest.skip("Dynamo leaves recurrent layers alone")
    if row.random:
        pytest.skip("torch's own function is compiled, and two calls of it draw other numbers")
    theirs.load_state_dict(ours.state_dict())
    arguments = case.arguments(torch.float32, device)
    floats = [t for given, t in zip(case.inputs, arguments, strict=True) if isinstance(given, Floats)]
    places = range(len(floats) + len([*ours.parameters()]))
    needed = [wanted == "all" or i == (0 if wanted == "first" else places[-1]) for i in places]
    compiled, calls = noting(ours)
    # Where each result has a gradient of its own, some inputs have none of the first.
    several = row.operation is not None and type(row.operation).reached is not Operation.reached
    results = []
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    nobody = contextlib.nullcontext(), contextlib.nullcontext()
    for call, model, watching in ((compiled, ours, nobody), (theirs, theirs, (forward, backward))):
        leaves = [*floats, *model.parameters()]
        for leaf, need in zip(leaves, needed, strict=True):
            leaf.requires_grad_(need).grad = None
        with watching[0]:
            found = tree_leaves(call(*arguments))
            y = torch.cat([t.flatten() for t in found]) if several else found[0]  # not the indices beside it
        dy = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)
        with watching[1]:
            y.backward(dy)  # torch.autograd.grad and the counter don't get along
        assert [leaf.grad is not None for leaf in leaves] == needed
        results.append([y.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert [t.stride() for t in results[0]] == [t.stride() for t in results[1]]
    assert calls or row.operation is None or not row.operation.compiled
    check(calls)
    with FlopCounterMode(display=False) as counted:
        for operator, args in calls:
            operator(*args)
    once, more = forward.get_total_flops(), backward.get_total_flops()
    if getattr(ours, "groups", 1) > 1:  # torch counts a weight gradient as if there were no groups
        more = once * sum(needed[:2])
    if not any(
        "attention" in str(operator) for operator, _ in calls
    ):  # torch doesn't count those of its kernel for the CPU
        assert counted.get_total_flops() == (once + more if calls else 0)


@pytest.mark.slow
def test_operators_of_a_residual_block_are_well_formed(device: torch.device) -> None:
    """In eval, in both memory formats: a normalisation and a sum in the convolution's operator."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.norm(self.conv(x)) + x)

    model = Block().to(device).eval()
    x = torch.randn(2, 4, 6, 5, device=device)
    for weight_format in (torch.contiguous_format, torch.channels_last):
        model.conv.to(memory_format=weight_format)
        for image in (x.to(memory_format=weight_format), x):
            compiled, calls = noting(fastlayers.fuse(model))
            with torch.no_grad():
                torch.testing.assert_close(compiled(image), model(image))
            assert ["conv2d" in str(operator) for operator, _ in calls] == [True]
            check(calls)


def test_export_stays_torchs(pair: Any, device: torch.device) -> None:
    """An exported program must run where fastlayers isn't installed."""
    for strict in (False, True):
        exported = torch.export.export(pair[0], (torch.randn(4, 6, device=device),), strict=strict)
        assert not any("fastlayers" in str(node.target) for node in exported.graph.nodes)


def test_compiled_autograd_of_eager_calls(device: torch.device) -> None:
    """The forward ran eagerly, and the backward is traced: of activations and softmax too, which have no operator."""
    theirs = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.LayerNorm(6), torch.nn.ReLU(), torch.nn.Softmax(-1)
    )
    theirs = theirs.to(device)
    ours = copy.deepcopy(theirs)
    fastlayers.accelerate(ours)
    with fastlayers.policy("auto"), compiled_autograd._enable(torch.compile(backend="eager")):
        compare(ours, ours, theirs, torch.randn(3, 4, device=device))
