"""accelerate(model, fuse=True) where no graph can be made: a function of somebody's stays what it is, and nothing keeps it."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fuse_calls import _auto, ops  # noqa: F401
from test_fuse_in_place import WIDTH, fused
from torch import nn

import fastlayers

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, device=device)


def twice(function: Any) -> Any:
    return function


@twice
@twice
def tells_its_place(x: torch.Tensor) -> Any:
    code = sys._getframe().f_code
    return F.gelu(x), code.co_name, code.co_firstlineno


def made_anew() -> Any:
    def inner(x: torch.Tensor) -> torch.Tensor:
        return F.softplus(x)

    return inner


class Defines(nn.Module):
    """A function within, which somebody else may be given, and others that have the model around them or as a default."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(WIDTH, WIDTH), 2.0
        self.seen: Any = None

        def around(x: torch.Tensor) -> torch.Tensor:
            return F.gelu(x) * self.scale

        def by_default(x: torch.Tensor, module: Any = self) -> torch.Tensor:
            return F.gelu(x) * module.scale

        def without_signature(x: torch.Tensor) -> torch.Tensor:
            return F.gelu(x)

        without_signature.__signature__ = "none"  # type: ignore[attr-defined]
        self.function: Any = {"default": by_default, "signature": without_signature}.get(way, around)

    def forward(self, x: torch.Tensor) -> Any:
        def inner(x: torch.Tensor) -> torch.Tensor:
            return F.silu(x)

        if x.sum() > 1e9:
            return x
        self.seen, last = inner, made_anew()
        return last(self.function(inner(self.linear(x)))), tells_its_place(x)[1:]


FOUND = ["silu", "gelu", "softplus", "gelu"]


def test_functions_stay_what_they_are(x: torch.Tensor) -> None:
    """The place in the file at which a profiler shows a function, and the code and name of one that is defined within another."""
    theirs = Defines().to(x.device)
    ours, _ = fused(theirs)
    assert ops(ours, x) == FOUND
    expected, found = theirs(x), ours(x)
    assert found[1] == expected[1]
    torch.testing.assert_close(found[0], expected[0])
    assert theirs.seen.__qualname__ == ours.seen.__qualname__
    assert theirs.seen.__code__ is ours.seen.__code__


def test_a_function_whose_signature_is_none(x: torch.Tensor) -> None:
    assert ops(fused(Defines("signature").to(x.device))[0], x) == FOUND


def test_a_function_is_looked_at_once(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often its definition runs, since what is known is known of its code."""
    ours, _ = fused(Defines().to(x.device))
    ours(x)
    count, original = [], compile
    with monkeypatch.context() as patch:
        patch.setattr("builtins.compile", lambda *args, **kwargs: (count.append(args[1]), original(*args, **kwargs))[1])
        ours(x)
    assert __file__ not in count


@pytest.mark.parametrize("way", ["variable", "default"])
def test_nothing_keeps_a_model(way: str, x: torch.Tensor) -> None:
    """That a function of its own has around it, or as a default."""
    model = Defines(way).to(x.device)
    fastlayers.accelerate(model, fuse=True)
    assert ops(model, x) == FOUND
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
