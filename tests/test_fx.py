"""torch.fx keeps our layers whole wherever it keeps torch.nn's whole."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import fx

import fastlayers
import fastlayers.functional as FL
from fastlayers import nn
from fastlayers.catalog import CLASSES, ROWS, Row

FUNCTIONS = sorted(
    {name for row in ROWS for name in (row.function, *row.functions) if hasattr(torch.nn.functional, str(name))}
)
"""Those of torch.nn.functional. Recurrent layers call functions of torch that have no other name."""
LAYERS = {
    row.name: row
    for row in ROWS
    if row.name != "Sequential" and isinstance(next(iter(row.cases.values())).make(nn), getattr(torch.nn, row.name, ()))
}


@pytest.fixture(autouse=True)
def _auto() -> Any:
    with fastlayers.policy("auto"):
        yield


def targets(graph: fx.Graph) -> list[tuple[str, Any]]:
    return [(node.op, node.target) for node in graph.nodes]


class Around(torch.nn.Module):
    """A model with one layer, called with so many inputs."""

    def __init__(self, layer: Any, count: int):
        super().__init__()
        self.layer, self.count = layer, count

    def forward(self, *xs: Any) -> Any:
        return self.layer(*[xs[i] for i in range(self.count)])


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_a_leaf(name: str) -> None:
    """Whatever it is given. Nothing of its forward runs, and none of its hooks."""
    row: Row = LAYERS[name]
    case = next(iter(row.cases.values()))
    graphs = []
    for space in (nn, torch.nn):
        layer: Any = case.make(space)
        layer.register_forward_hook(lambda *a: 1 / 0)
        graphs.append(targets(fx.Tracer().trace(Around(layer, len(case.inputs)))))
    assert graphs[0] == graphs[1]
    assert ("call_module", "layer") in graphs[0]


def test_every_class_of_ours() -> None:
    for theirs, ours in CLASSES.items():
        layer = ours.__new__(ours)
        assert fx.Tracer().is_leaf_module(layer, "") == fx.Tracer().is_leaf_module(theirs.__new__(theirs), "")
        assert ours.__module__.startswith("fastlayers.modules."), "by which pickles find it"
        assert inspect.getsource(ours).lstrip().startswith(f"class {ours.__name__}(")


class Net(torch.nn.Module):
    def __init__(self, space: Any):
        super().__init__()
        self.body = space.Sequential(space.Conv2d(1, 2, 3), space.BatchNorm2d(2), space.ReLU(), space.Flatten())
        self.head = space.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)) * 2


@pytest.mark.parametrize("way", ["built", "accelerated"])
def test_a_users_trace(way: str, device: torch.device) -> None:
    """The same graph as of torch.nn's, which runs on the kernels, and so do its copies and pickles."""
    ours, theirs = Net(nn if way == "built" else torch.nn).to(device), Net(torch.nn).to(device)
    theirs.load_state_dict(ours.state_dict())
    if way == "accelerated":
        fastlayers.accelerate(ours)
    traced, expected = fx.symbolic_trace(ours), fx.symbolic_trace(theirs)
    assert targets(traced.graph) == targets(expected.graph)
    x = torch.randn(2, 1, 4, 4, device=device)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(traced, protocol))
        assert targets(again.graph) == targets(expected.graph)
        assert [type(m) for m in again.modules()][2:] == [type(m) for m in traced.modules()][2:]
    for model in (traced, copy.deepcopy(traced), again):
        torch.testing.assert_close(model(x), expected(x))
        paths = {d.op: d.path for d in fastlayers.explain(model, x) if d.op != "Flatten"}
        assert len(paths) >= 3
        assert set(paths.values()) == {"triton"}


def test_what_torch_traces_into_is_traced_into() -> None:
    """A Sequential, a subclass that a user wrote, and whatever a tracer of the user's own wants."""

    class Own(nn.Linear):
        pass

    class TheirOwn(torch.nn.Linear):
        pass

    class Into(fx.Tracer):
        def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
            return False

    for kind, tracer in ((Own, fx.Tracer), (TheirOwn, fx.Tracer), (nn.Linear, Into), (torch.nn.Linear, Into)):
        graph = tracer().trace(torch.nn.Sequential(kind(2, 3)))
        assert [op for op, _ in targets(graph)] == ["placeholder", "get_attr", "get_attr", "call_function", "output"]


@pytest.mark.filterwarnings("ignore:.*deprecated.*:UserWarning")  # torch's own
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_torchs_in_a_graph(name: str) -> None:
    """Whatever they are given, ours hand to torch's before they look at it."""
    function = getattr(FL, name)
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    tracer = fx.Tracer()
    tracer.root, tracer.graph = torch.nn.Module(), fx.Graph()
    function(*[tracer.create_proxy("placeholder", f"x{i}", (), {}) for i in range(len(needed))])
    (node,) = [node for node in tracer.graph.nodes if node.op != "placeholder"]
    assert node.op == "call_function"
    assert not (node.target.__module__ or "").startswith("fastlayers")
