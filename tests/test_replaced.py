"""What the user replaced stays replaced: on an instance, on a class, on torch's class or in torch.nn.functional, before and after
a conversion, alone and in a row of layers."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import LAYERS

import fastlayers
from fastlayers import nn
from fastlayers.catalog import CLASSES, Row

pytestmark = pytest.mark.filterwarnings("ignore:fuse found nothing")
FORWARDS = [(theirs, ours) for theirs, ours in CLASSES.items() if not theirs.__name__.startswith("Lazy")]


@pytest.fixture(autouse=True)
def _auto() -> Any:
    with fastlayers.policy("auto"):
        yield


def zeros(self: Any, *inputs: Any) -> torch.Tensor:
    return torch.zeros(3)


def chain() -> Any:
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))


@pytest.mark.parametrize(("theirs", "ours"), FORWARDS, ids=lambda c: f"{c.__module__.split('.')[0]}.{c.__name__}")
def test_forward_of_torchs_class(theirs: Any, ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is replaced, ours does what it does, and is given back later."""
    layer = ours.__new__(ours)
    torch.nn.Module.__init__(layer)
    with monkeypatch.context() as patch:
        patch.setattr(theirs, "forward", zeros)
        needed = [p for p in inspect.signature(ours.forward).parameters.values() if p.default is p.empty]
        assert layer(*[torch.ones(2)] * (len(needed) - 1)).shape == (3,)
        fresh = torch.nn.ModuleList([theirs.__new__(theirs)])
        torch.nn.Module.__init__(fresh[0])
        assert [row.reason for row in fastlayers.accelerate(fresh)] == ["its forward was replaced"]
    assert [row.reason for row in fastlayers.accelerate(fresh)] == [None]


@pytest.mark.parametrize(
    "row", [row for row in LAYERS.values() if hasattr(torch.nn, row.name)], ids=lambda row: row.name
)
def test_function_of_torchs(row: Row, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.nn's layer calls the function that it finds in torch.nn.functional, and so does ours."""
    case = next(iter(row.cases.values()))
    layer, args = case.make(nn), case.arguments(torch.float32, device)
    layer.to(device)  # type: ignore[attr-defined]
    theirs, names = type(layer).__bases__[0], set[str]()
    for method in ("forward", "_conv_forward", "_apply_instance_norm"):
        names.update(getattr(theirs, method, zeros).__code__.co_names)
    space: Any = torch.nn.functional if "F" in names else torch._VF if "_VF" in names else torch
    called = "hardtanh" if row.name == "ReLU6" else row.function or ""
    assert called in names
    original, seen = getattr(space, called), []
    with monkeypatch.context() as patch:
        patch.setattr(space, called, lambda *a, **k: (seen.append(None), original(*a, **k))[1])
        layer(*args)
    assert len(seen) == 1
    with fastlayers.policy("triton"):
        layer(*args)


def on_the_instance(model: Any, patch: Any, new: Any) -> None:
    model[0].forward = new


def on_the_class(model: Any, patch: Any, new: Any) -> None:
    patch.setattr(type(model[0]), "forward", lambda self, x: new(x))


def on_torchs_class(model: Any, patch: Any, new: Any) -> None:
    patch.setattr(torch.nn.Linear, "forward", lambda self, x: new(x))


def in_functional(model: Any, patch: Any, new: Any) -> None:
    patch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: new(x)[..., :1].expand(*x.shape[:-1], len(w)))


def activation_in_functional(model: Any, patch: Any, new: Any) -> None:
    patch.setattr(torch.nn.functional, "relu", lambda x, inplace=False: new(x))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "where", [on_the_instance, on_the_class, on_torchs_class, in_functional, activation_in_functional]
)
def test_in_a_row(where: Callable[..., None], before: bool, fused: bool, device: torch.device) -> None:
    model, x = chain().to(device), torch.randn(2, 4, device=device)
    plain = chain().to(device)
    plain.load_state_dict(model.state_dict())
    seen: list[None] = []

    def new(x: torch.Tensor) -> torch.Tensor:
        seen.append(None)
        return x * 3

    patch = pytest.MonkeyPatch()
    try:
        if before:
            where(model, patch, new)
        fastlayers.accelerate(model)
        called = fastlayers.fuse(model) if fused else model
        if not before:
            called(x)
            where(model, patch, new)
        if where is not on_the_class:
            where(plain, patch, new)
        found, calls = called(x), len(seen)
        assert calls > 0
        if where is not on_the_class:
            seen.clear()
            torch.testing.assert_close(found, plain(x))
            assert len(seen) == calls
    finally:
        patch.undo()


def test_a_wrapper_around_torchs_forward_still_runs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    layer, x = nn.Linear(4, 3).to(device), torch.randn(2, 4, device=device)
    expected, original = layer(x), torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: original(self, x) + 1)
    torch.testing.assert_close(layer(x), expected + 1)


def test_replaced_before_the_import() -> None:
    code = (
        "import torch\n"
        "torch.nn.Linear.forward = lambda self, x: x * 3\n"
        "torch.nn.functional.relu = lambda x, inplace=False: x + 1\n"
        "import fastlayers\n"
        "x = torch.ones(1, 2)\n"
        "assert fastlayers.nn.Linear(2, 2)(x).tolist() == [[3, 3]]\n"
        "assert fastlayers.nn.Sequential(fastlayers.nn.Linear(2, 2), fastlayers.nn.ReLU())(x).tolist() == [[4, 4]]\n"
        "model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.GELU())\n"
        "reasons = [row.reason for row in fastlayers.accelerate(model)][1:]\n"
        "assert reasons == ['its forward was replaced'] * 2 + [None], reasons\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
def test_compiled(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    model, x = chain().to(device), torch.randn(2, 4, device=device)
    fastlayers.accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x)
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: x[..., :3] * 3)
    torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()
