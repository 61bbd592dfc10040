"""accelerate(model, fuse=True) where a model is changed after its first call, is written in ways that a graph can't follow, or
draws random numbers: the results are those of the model as it stands."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forwards import Asserts, AssertsShape
from torch import nn
from torch.fx.proxy import TraceError
from torch.nn.utils import parametrize, prune

import fastlayers

pytestmark = pytest.mark.usefixtures("small_tiles")
Pair = namedtuple("Pair", ["first", "second"])


@pytest.fixture(autouse=True)
def _auto() -> Any:
    with fastlayers.policy("auto"):
        yield


def _fused(model: Any) -> Any:
    fastlayers.accelerate(model, fuse=True)
    return model


class Reads(nn.Module):
    """Computes what a function of the module and relu(fc(x)) says."""

    d: Any
    pair: Any
    gate: Any
    a: Any
    b: Any
    act: Any
    extra: Any

    def __init__(self, **attributes: Any):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        for name, value in attributes.items():
            setattr(self, name, value)


class Ordered(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.fc(x)) * self.d["a"]


class Named(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.fc(x)) * self.pair.second[0]


class Gate(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.fc(x)) * (2 if self.gate is not None else 1)


class Shared(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.fc(x))
        return y if self.a is self.b else self.b(y)


class Bias(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.fc(x))
        if self.b is not None:
            y = y + self.b
        return y


class Act(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        if self.act is not None:
            y = self.act(y)
        return F.relu(y)


class True_(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.fc(x))
        return self.act(y) if self.act else y


class Extra(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.fc(x))
        return y + 1 if hasattr(self, "extra") else y


class Equal(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.fc(x))
        return y if self.act == None else self.act(y)  # noqa: E711


class Default(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, "act", self.fc)(F.relu(self.fc(x)))


class Plus(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def _parameter() -> nn.Parameter:
    return nn.Parameter(torch.randn(4))


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model, name, value)


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "an OrderedDict": (lambda: Ordered(d=OrderedDict(a=2.0)), lambda m: m.d.update(a=3.0)),
    "a named tuple's list": (
        lambda: Named(pair=Pair(1, [2.0])),
        lambda m: m.pair.second.append(m.pair.second.pop() + 1),
    ),
    "a child that becomes None": (lambda: Gate(gate=nn.ReLU()), _set("gate", None)),
    "a shared child": (lambda: _shared(), lambda m: setattr(m, "b", copy.deepcopy(m.c))),
    "a shared child, by its other name": (lambda: _shared(), lambda m: setattr(m, "a", copy.deepcopy(m.c))),
    "a parameter that becomes None": (lambda: Bias(b=_parameter()), _set("b", None)),
    "a layer that becomes None": (lambda: Act(act=nn.Tanh()), _set("act", None)),
    "a layer that becomes empty": (lambda: True_(act=nn.Sequential(nn.Tanh())), lambda m: m.act.__delitem__(0)),
    "a layer of another truth": (lambda: True_(act=nn.Tanh()), _set("act", nn.Sequential())),
    "a parameter that goes": (lambda: Extra(extra=_parameter()), lambda m: delattr(m, "extra")),
    "a child that goes": (lambda: Extra(extra=nn.Tanh()), lambda m: delattr(m, "extra")),
    "a layer that compares": (lambda: Equal(act=nn.Tanh()), _set("act", None)),
    "a layer by default": (lambda: Default(act=nn.Tanh()), lambda m: delattr(m, "act")),
    "a parametrized one": (
        lambda: Bias(b=_parameter()),
        lambda m: parametrize.register_parametrization(m, "b", Plus()),
    ),
    "a pruned one": (lambda: Bias(b=_parameter()), lambda m: prune.random_unstructured(m, "b", 0.5)),
}


def _shared() -> nn.Module:
    layer = nn.Linear(4, 4)
    return Shared(a=layer, b=layer, c=nn.Linear(4, 4))


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_looked_at_again(change: str) -> None:
    make, edit = CHANGES[change]
    theirs = make()
    ours = _fused(copy.deepcopy(theirs))
    assert "_fused_graphs" in vars(ours)
    x = torch.randn(3, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    for model in (ours, theirs):
        torch.manual_seed(1)
        edit(model)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(2 * x), theirs(2 * x))


def test_fuse_looks_again_at_a_child_that_becomes_none() -> None:
    model: Any = Gate(gate=nn.ReLU())
    fastlayers.accelerate(model)
    fused, x = fastlayers.fuse(model), torch.randn(3, 4)
    torch.testing.assert_close(fused(x), 2 * F.relu(model.fc(x)))
    model.gate = None
    torch.testing.assert_close(fused(x), F.relu(model.fc(x)))


class Counts(nn.Module):
    def __init__(self, owner: Any):
        super().__init__()
        self.owner = (owner,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.owner[0].n += 1
        return x


class ReadsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.c, self.n = nn.Linear(4, 4), Counts(self), 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.fc(x)) * self.n
        return self.c(y) * self.n


def test_a_change_within_a_call_of_what_was_read_before_it() -> None:
    model = _fused(ReadsTwice())
    with pytest.raises(RuntimeError, match="n of ReadsTwice is changed by a call"):
        model(torch.randn(3, 4))


# --- random numbers -----------------------------------------------------------------------------------------------------------


class Parallel(nn.Module):
    """Two branches, each with a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.d1, self.d2 = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.d1(self.a(x))
        two = self.d2(self.b(x))
        return self.norm(one + two + x)


class Noise(Parallel):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.d1(self.a(x))
        noise = torch.rand_like(x)
        return self.norm(x + h) + noise


class NoiseInPlace(Parallel):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, noise = self.d1(self.a(x)), torch.empty_like(x)
        noise.normal_()
        return self.norm(x + h) + noise


def _draws(graph: Any) -> list[str]:
    """The dropouts and random functions of a graph, in the order in which they draw."""
    found: list[str] = []
    for node in graph.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        layers = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        calls = layers if name == "run" else [name]
        if node.op != "get_attr":
            found += [call for call in calls if call in ("d1", "d2", "rand_like", "normal_")]
    return found


@pytest.mark.parametrize(
    ("kind", "order"),
    [(Parallel, ["d1", "d2"]), (Noise, ["d1", "rand_like"]), (NoiseInPlace, ["d1", "normal_"])],
)
def test_random_numbers_are_drawn_in_the_models_order(kind: type[nn.Module], order: list[str]) -> None:
    model = kind()
    fastlayers.accelerate(model)
    assert _draws(fastlayers.fuse(model)) == order


# --- names, classes, messages -------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4), "out": nn.Linear(4, 4)})
        self.key = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.layers["out"](F.relu(self.layers[self.key](x))))


@pytest.mark.parametrize("name", ["in", "None", 'a"b', "a\\b"])
def test_names_that_no_source_can_have(name: str) -> None:
    model, x = Branches(name), torch.randn(3, 4)
    expected = model(x)
    torch.testing.assert_close(_fused(model)(x), expected)
    with pytest.raises(TraceError, match="of the name"):
        fastlayers.fuse(model)


class Taken(nn.Module):
    """Has layers of the names of a graph's own attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.graph, self.meta = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.meta(F.relu(self.graph(x))))


def test_names_that_a_graph_has_itself() -> None:
    model, x = Taken(), torch.randn(3, 4)
    expected = model(x)
    torch.testing.assert_close(_fused(model)(x), expected)
    with pytest.raises(TraceError, match="graph of Taken has the name"):
        fastlayers.fuse(model)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.fc(x))
        for value in more.values():
            y = y + value
        return y


def test_keywords_that_are_no_identifiers() -> None:
    model, x = Keywords(), torch.randn(3, 4)
    more = {"a-b": torch.randn(3, 4), "in": torch.randn(3, 4)}
    expected = model(x, **more)
    torch.testing.assert_close(_fused(model)(x, **more), expected)


class Variance(nn.Module):
    """Not RMSNorm's weight, but a part of it, is the second factor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = x.pow(2).mean(-1, keepdim=True)
        return F.relu(x * torch.rsqrt(v + 1e-6) * v)


class Sigmoid(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


def test_an_activation_of_integers() -> None:
    model, x = _fused(Sigmoid()), torch.randint(-5, 5, (3, 4))
    assert "_fused_graphs" in vars(model)
    torch.testing.assert_close(model(x), x * torch.sigmoid(x))


class SumOfIntegers(nn.Module):
    """Integers come to an activation in the middle of a row, behind a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.linear = nn.Dropout(0.5), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = self.dropout(x) + y
        return F.relu(self.linear(z * torch.sigmoid(z)))


class GateOfIntegers(nn.Module):
    """Linear layers of integers, as the CPU has them, around a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        for layer in (self.gate, self.up):
            layer.weight = nn.Parameter(torch.randint(-2, 3, (4, 4)), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.gate(x)
        return self.down(z * torch.sigmoid(z) * self.up(x))


@pytest.mark.parametrize(("kind", "count"), [(SumOfIntegers, 2), (GateOfIntegers, 1)])
def test_a_written_out_activation_of_integers_in_a_row(kind: type[nn.Module], count: int) -> None:
    given = [torch.randint(-5, 5, (3, 4)) for _ in range(count)]
    model = kind().eval()
    expected = model(*given)
    fused = _fused(model)
    assert "_fused_graphs" in vars(fused)
    with fastlayers.policy("auto"):
        torch.testing.assert_close(fused(*given), expected)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("kind", [Variance, Asserts, AssertsShape, Product])
def test_computes_what_the_model_does(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(3, 4)
    expected = model(x)
    torch.testing.assert_close(_fused(model)(x), expected)


def test_an_assert_that_reads_a_shape_is_fused() -> None:
    model = _fused(AssertsShape())
    assert "_fused_graphs" in vars(model)
    with pytest.raises(AssertionError, match="two, not 3"):
        model(torch.randn(2, 3, 4))


@pytest.mark.parametrize("size", [(4,), (2, 3, 4)])
def test_a_product_refuses_what_addmm_refuses(size: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError):
        _fused(Product())(torch.randn(size))


class Made(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.fc(x))


def test_modules_of_a_fused_ones_class() -> None:
    model, x = _fused(Made()), torch.randn(3, 4)
    sub: Any = type("Sub", (type(model),), {})
    for other in (type(model)(), sub()):
        torch.testing.assert_close(other(x), F.relu(F.linear(x, other.fc.weight, other.fc.bias)))


class Holds(Made):
    """Calls a part whose forward can't be read."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(Counts(SimpleNamespace(n=0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.fc(self.part(x)))


@pytest.mark.parametrize("kind", [Made, Holds])
def test_a_module_that_was_called_is_freed_at_once(kind: type[nn.Module]) -> None:
    model = _fused(kind())
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            model(torch.randn(3, 4))
        refs = [weakref.ref(model), weakref.ref(model.fc), weakref.ref(model.fc.weight)]
        del model
        assert [ref() for ref in refs] == [None, None, None]
    finally:
        gc.enable()


class AsksForItsClass(Product):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2 if type(self) is AsksForItsClass else 1)


def test_a_module_that_asks_for_its_class_keeps_it() -> None:
    """In place it would be an instance of a subclass. What is fused around it may still read its forward."""
    model, x = AsksForItsClass(), torch.randn(3, 4)
    expected = model(x)
    fastlayers.accelerate(model, fuse=True)
    assert type(model) is AsksForItsClass
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(fastlayers.fuse(model)(x), expected)


class LooksAtItsClass(Product):
    factor = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * type(self).factor


def test_a_module_that_reads_what_its_class_has_is_fused() -> None:
    model, x = LooksAtItsClass(), torch.randn(3, 4)
    expected = model(x)
    fastlayers.accelerate(model, fuse=True)
    assert type(model) is not LooksAtItsClass
    torch.testing.assert_close(model(x), expected)


class Shifted(Product):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 100


def test_a_class_that_is_given_later() -> None:
    model, x = _fused(Product()), torch.randn(3, 4)
    model(x)
    model.__class__ = Shifted
    expected, keys = Shifted.forward(model, x), [*Product().state_dict()]
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for one in (model, *copies):
        torch.testing.assert_close(one(x), expected)
        assert type(one) is Shifted and [*one.state_dict()] == keys
    assert [row.now.__name__ for row in fastlayers.accelerate(model, fuse=True).changed] == ["Shifted"]
    assert type(model) is not Shifted  # fused anew, as the class that it has now
    torch.testing.assert_close(model(x), expected)
    for one in (model, *copies):
        fastlayers.restore(one)
        assert type(one) is Shifted and vars(one).keys() == vars(Product()).keys()
