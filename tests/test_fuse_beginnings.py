"""Query, key and value of an attention layer with rotary embedding as one call, found in the first statements of forwards that no
graph can hold."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fuse_calls import _auto, apply_rotary, ops, renamed  # noqa: F401
from test_fuse_in_place import WIDTH, assert_as_torch, fused, trained
from test_fuse_projections import JOINED, SIZE, TURNED, Layer, angles_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlayers

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, device=device)


class Untraced(Layer):
    """Options, a branch on a size, and a variable that is kept by nobody."""

    @renamed
    def forward(self, x: torch.Tensor, *, scale: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        """A text."""
        shape = (*x.shape[:-1], -1, SIZE)
        if scale is not None:
            x = x * scale
        q, k, v = [layer(x).view(*shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        q, k = apply_rotary(q, k, *angles_of(x))
        kept = weakref.ref(q)
        q = q * 1
        if kept() is not None and not torch.is_grad_enabled():
            raise MemoryError  # not by `assert`, which pytest rewrites: then the source isn't what runs
        if x.sum() > 1e9 or kwargs.get("twice"):
            x = 2 * x
        return self.whole(q, k, v).sum() + x


def test_first_statements(x: torch.Tensor, device: torch.device) -> None:
    theirs = Untraced().to(device)
    ours, paths = fused(theirs)
    assert paths == [""]
    assert ops(ours, x) == [JOINED]
    assert_as_torch(ours, theirs, x)
    for words in ({"scale": 2}, {"scale": torch.tensor(3.0, device=device)}, {"twice": True}, {"past": "x"}):
        assert ops(ours, x, **words) == [JOINED]
        torch.testing.assert_close(ours(x, **words), theirs(x, **words), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
    ours.table["scale"] = theirs.table["scale"] = 5.0
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
    for other in (nn.Identity(), nn.ReLU(), nn.LayerNorm(WIDTH, device=device)):
        ours.q_proj = theirs.q_proj = other  # type: ignore[assignment]
        assert JOINED not in ops(ours, x)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
    ours.q_proj = nn.Linear(WIDTH, SIZE + 1, device=device)
    with pytest.raises(RuntimeError):
        ours(x)


class Reaching(Layer):
    """Whose first statements take what only the call has."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        other, found = args[0] if args else None, []
        shape = (*x.shape[:-1], -1, SIZE)
        q, k, v = [layer(x).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        q, k = apply_rotary(q, k, *angles_of(x))
        found.append(other)
        return self.whole(q, k, v) if x.sum() < 1e9 else x


class Deleting(Layer):
    def forward(self, x: torch.Tensor, often: int = 1) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, SIZE)
        q, k, v = [layer(x).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        if self.table["scale"] > 100:
            del shape
        q, k = apply_rotary(q, k, *angles_of(x))
        y = self.whole(q, k, v)
        return y if y.sum() < 1e9 and shape else x


def test_variables_that_a_graph_cannot_give(x: torch.Tensor, device: torch.device) -> None:
    for theirs in (Reaching().to(device), Deleting().to(device)):
        ours, _ = fused(theirs)
        assert ops(ours, x) == [JOINED if isinstance(theirs, Deleting) else TURNED]
        assert_as_torch(ours, theirs, x)
    for one in (theirs, ours):
        one.table["scale"] = 1000.0
        with pytest.raises(UnboundLocalError):
            one(x)


class Methods(Layer):
    """Whose projections stand in a method, called with what a branch on data has chosen."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projected(x) if x.sum() < 1e9 else x

    def projected(here, x: torch.Tensor) -> torch.Tensor:
        """With another name for self, and a comprehension's variable of the name of one that is used later."""
        k = 7
        shape = (*x.shape[:-1], *[-k for k in (1,)], SIZE)
        q, kk, v = [layer(x).view(shape).transpose(1, 2) for layer in (here.q_proj, here.k_proj, here.v_proj)]
        q, kk = apply_rotary(q, kk, *angles_of(x))
        return here.whole(q, kk, v) * k if x.sum() < 1e9 else x


def test_a_method(x: torch.Tensor, device: torch.device) -> None:
    theirs = Methods().to(device)
    ours, _ = fused(theirs)
    assert ops(ours, x) == [JOINED]
    assert_as_torch(ours, theirs, x)


class Handing(Layer):
    """Whose later statements take what a graph would hand on as something else."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.pair = how, torch.Size((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, SIZE)
        found: Any = {"size": self.pair, "range": range(3)}.get(self.how)
        if self.how == "generator":
            found = (n for n in (1, 2, 3))
        elif self.how == "zip":
            found = zip((1, 2), (3, 4), strict=True)
        elif self.how == "twice":
            one = (x, x)
            found = (one, one)
        q, k, v = [layer(x).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        q, k = apply_rotary(q, k, *angles_of(x))
        counted = found[0] is found[1] if self.how == "twice" else len([*found]) + len([*found])
        return self.whole(q, k, v) * (counted + (self.how == "size" and found.numel())) if x.sum() < 1e9 else x


@pytest.mark.parametrize("how", ["size", "range", "generator", "zip", "twice"])
def test_values_that_a_graph_cannot_hand_on(how: str, x: torch.Tensor, device: torch.device) -> None:
    theirs = Handing(how).to(device)
    ours, _ = fused(theirs)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ops(ours, x) == [TURNED]


class Within(Layer):
    """Whose first statements stand in a function of every call, which has the input around it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner(self: Any) -> torch.Tensor:
            shape = (*x.shape[:-1], -1, SIZE)
            q, k, v = [layer(x).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)]
            q, k = apply_rotary(q, k, *angles_of(x))
            return self.whole(q, k, v)

        return inner(self) + F.gelu(x).sum()


def test_nothing_of_a_call_is_kept(x: torch.Tensor, device: torch.device) -> None:
    theirs = Within().to(device)
    ours, _ = fused(theirs)
    assert_as_torch(ours, theirs, x)
    given = x.clone()
    kept = weakref.ref(given)
    with torch.no_grad():
        ours(given)
    del given
    assert kept() is None


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "restore"])
def test_copies(way: str, x: torch.Tensor, device: torch.device) -> None:
    ours, _ = fused(Untraced().to(device))
    expected = trained(ours, x)
    if way == "restore":
        fastlayers.restore(ours)
        assert type(ours) is Untraced
        assert ops(ours, x) == []
        return
    other = copy.deepcopy(ours) if way == "deepcopy" else pickle.loads(pickle.dumps(ours))
    assert ops(other, x) == [JOINED]
    for one, right in zip(trained(other, x), expected, strict=True):
        assert torch.equal(one, right)


def test_a_first_call_that_somebody_sees(x: torch.Tensor, device: torch.device) -> None:
    """Under a mode that sees all calls, nothing is recognised, and nothing is given up."""

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    ours, _ = fused(Untraced().to(device))
    with Seeing():
        ours(x)
    assert ops(ours, x) == [JOINED]
