"""Query, key and value of an attention layer with rotary embedding as one call, found in models' graphs, and in the first
statements of forwards that no graph can hold."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from test_fuse_calls import _auto, apply_rotary, ops, renamed  # noqa: F401
from test_fuse_in_place import WIDTH, assert_as_torch, fused, trained
from test_fuse_rotary import partly, with_pairs
from torch import nn

import fastlayers

pytestmark = pytest.mark.usefixtures("small_tiles")
HEADS, GROUPS, SIZE = 3, 1, 4
JOINED, PACKED, TURNED = "rotary_projections", "packed_rotary_projections", "rotary_embedding"


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, device=device)


def angles_of(x: torch.Tensor, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(x.shape[1] * size, device=x.device).view(1, x.shape[1], size) * 0.37
    return angles.cos(), angles.sin()


class Layer(nn.Module):
    """What attention is given. The flag that it looks up by a name of its own stands for all that no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, HEADS * SIZE), nn.Linear(WIDTH, GROUPS * SIZE, bias=False)
        self.v_proj = nn.Linear(WIDTH, GROUPS * SIZE)
        self.table = {"scale": 2.0}

    def whole(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
            return torch.cat([q, k * self.table["scale"], v], -1).float()


class Plain(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, SIZE)
        q = self.q_proj(x).view(shape).transpose(1, 2)
        k = self.k_proj(x).view(shape).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        cos, sin = angles_of(x)
        q, k = apply_rotary(q, k, cos, sin)
        return self.whole(q, k, v)


class Sizes(Layer):
    """In another order, with sizes that are all written."""

    def forward(self, x: torch.Tensor, begin: bool = False) -> torch.Tensor:
        b, l, _ = x.shape
        v = torch.transpose(self.v_proj(x).reshape(b, l, GROUPS, SIZE), 1, 2)
        k, q = self.k_proj(x), self.q_proj(x)
        k = k.view(b, l, GROUPS, -1).transpose(2, 1)
        q = q.view((b, -1, HEADS, SIZE)).transpose(1, 2)
        q, k = apply_rotary(q, k, *angles_of(x), unsqueeze_dim=1)
        return self.whole(q, k, v)


class Interleaved(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, SIZE)
        q, k, v = [layer(x).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        cos, sin = angles_of(x)
        q, k = with_pairs(q, k, cos=cos, sin=sin)
        return self.whole(q, k, v)


class Partly(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, SIZE)
        q, k, v = [layer(x).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        q, k = partly(q, k, *angles_of(x, 2))
        return self.whole(q, k, v)


class Packed(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(WIDTH, (HEADS + 2 * GROUPS) * SIZE)
        del self.q_proj, self.k_proj, self.v_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape, end = (*x.shape[:-1], -1, SIZE), HEADS * SIZE
        qkv = self.qkv_proj(x)
        q, k, v = qkv[..., :end], qkv[..., end : end + GROUPS * SIZE], qkv[..., end + GROUPS * SIZE :]
        q, k, v = [t.view(shape).transpose(1, 2) for t in (q, k, v)]
        q, k = apply_rotary(q, k, *angles_of(x))
        return self.whole(q, k, v)


@pytest.mark.parametrize("model", [Plain, Sizes, Interleaved, Partly, Packed])
def test_found(model: type[Layer], x: torch.Tensor, device: torch.device) -> None:
    theirs = model().to(device)
    ours, paths = fused(theirs)
    assert paths == [""]
    assert ops(ours, x) == [PACKED if model is Packed else JOINED]
    assert_as_torch(ours, theirs, x)
    with torch.no_grad():
        torch.testing.assert_close(ours(x[:, :1]), theirs(x[:, :1]))
    with torch.autocast(device.type, torch.bfloat16):
        torch.testing.assert_close(ours(x), theirs(x), atol=5e-2, rtol=5e-2)
    half = x.bfloat16()
    torch.testing.assert_close(ours.bfloat16()(half), theirs.bfloat16()(half), atol=5e-2, rtol=5e-2)


# --- what only resembles it -----------------------------------------------------------------------------------------------


class ValueFirst(Layer):
    """Something is computed of the value before query and key are turned."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, SIZE)
        q, k, v = [layer(x).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        v = v.exp()
        q, k = apply_rotary(q, k, *angles_of(x))
        return self.whole(q, k, v)


class QueryTwice(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, SIZE)
        before, k, v = [layer(x).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        q, k = apply_rotary(before, k, *angles_of(x))
        return self.whole(q, k, v) + self.whole(before, k, v)


class OfAnother(Layer):
    """The value is of another tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, SIZE)
        q, k = [layer(x).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj)]
        v = self.v_proj(x * 2).view(shape).transpose(1, 2)
        q, k = apply_rotary(q, k, *angles_of(x))
        return self.whole(q, k, v)


class Between(Layer):
    """The projection's result is written into."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, SIZE)
        q = self.q_proj(x).view(shape).transpose(1, 2)
        x = x + 1
        x *= 2
        k, v = [layer(x).view(shape).transpose(1, 2) for layer in (self.k_proj, self.v_proj)]
        q, k = apply_rotary(q, k, *angles_of(x))
        return self.whole(q, k, v)


class OtherShapes(Layer):
    """Heads of several sizes; a view that isn't one of batch and positions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, l, _ = x.shape
        q = self.q_proj(x).view(b, l, HEADS, SIZE).transpose(1, 2)
        k = self.k_proj(x).view(b, l, 1, SIZE).transpose(1, 2)
        v = self.v_proj(x).view(l, b, 1, SIZE).transpose(1, 2)
        q, k = apply_rotary(q, k, *angles_of(x))
        return self.whole(q, k, v.transpose(0, 2).reshape(k.shape))


@pytest.mark.parametrize("model", [ValueFirst, QueryTwice, OfAnother, Between, OtherShapes])
def test_not_joined(model: type[Layer], x: torch.Tensor, device: torch.device) -> None:
    theirs = model().to(device)
    ours, paths = fused(theirs)
    assert paths == [""]
    assert ops(ours, x) == [TURNED]
    assert_as_torch(ours, theirs, x)


class Swapped(Packed):
    """The value stands before the key in memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape, end = (*x.shape[:-1], -1, SIZE), HEADS * SIZE
        qkv = self.qkv_proj(x)
        q, v, k = qkv[..., :end], qkv[..., end : end + GROUPS * SIZE], qkv[..., end + GROUPS * SIZE :]
        q, k, v = [t.view(shape).transpose(1, 2) for t in (q, k, v)]
        q, k = apply_rotary(q, k, *angles_of(x))
        return self.whole(q, k, v)


def test_parts_in_another_order(x: torch.Tensor, device: torch.device) -> None:
    theirs = Swapped().to(device)
    ours, _ = fused(theirs)
    assert ops(ours, x) == [TURNED]
    assert_as_torch(ours, theirs, x)


@pytest.mark.parametrize("model", [Plain, Packed])
def test_calls_that_the_kernel_does_not_take(model: type[Layer], x: torch.Tensor, device: torch.device) -> None:
    theirs = model().to(device)
    ours, _ = fused(theirs)
    for shape in ((5, WIDTH), (2, 5, WIDTH + 1)):
        for one in (theirs, ours):
            with pytest.raises((RuntimeError, IndexError)):
                one(torch.randn(shape, device=device))
    with fastlayers.policy("torch"):
        assert torch.equal(ours(x), theirs(x))
    vectorised = [torch.vmap(one)(x[:, None]) for one in (ours, theirs)]
    torch.testing.assert_close(*vectorised)


# --- layers that are watched or changed -----------------------------------------------------------------------------------


def test_hooks_see_the_calls_in_their_order(x: torch.Tensor, device: torch.device) -> None:
    theirs = Sizes().to(device)
    ours, _ = fused(theirs)
    seen: list[str] = []
    handles = [
        layer.register_forward_hook(lambda module, args, y, name=name: seen.append(name))
        for name, layer in ours.named_children()
    ]
    torch.testing.assert_close(ours(x), theirs(x))
    assert seen == ["v_proj", "k_proj", "q_proj"]
    for handle in handles[1:]:
        handle.remove()
    assert ops(ours, x) == [TURNED]
    assert seen[3:] == ["q_proj"]
    handles[0].remove()
    assert ops(ours, x) == [JOINED]


def test_a_weight_that_is_shared_or_frozen(x: torch.Tensor, device: torch.device) -> None:
    theirs = Plain().to(device)
    theirs.v_proj.weight = theirs.k_proj.weight
    theirs.q_proj.weight.requires_grad_(False)
    ours, _ = fused(theirs)
    assert ops(ours, x) == [JOINED]
    assert_as_torch(ours, theirs, x)


# --- forwards that no graph can hold --------------------------------------------------------------------------------------


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
    ours.q_proj = theirs.q_proj = nn.Identity()  # type: ignore[assignment]
    assert ops(ours, x) == [TURNED]
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
    ours.q_proj = nn.Linear(WIDTH, SIZE + 1, device=device)
    with pytest.raises(RuntimeError):
        ours(x)


class Reaching(Layer):
    """Whose first statements take what only the call has, or leave less than a graph gives."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

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
    for theirs in (Reaching("").to(device), Deleting().to(device)):
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


def test_frozen_at_the_first_call(x: torch.Tensor, device: torch.device) -> None:
    """Under a mode that sees all calls, nothing is recognised, and nothing is given up."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    ours, _ = fused(Untraced().to(device))
    with Seeing():
        ours(x)
    assert ops(ours, x) == [JOINED]


# --- fastlayers.fuse ------------------------------------------------------------------------------------------------------


class Whole(Plain):
    def whole(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q.sum() + k.sum() * 2 + v


class WholePacked(Packed):
    def whole(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q.sum() + k.sum() * 2 + v


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
@pytest.mark.parametrize("way", ["", "deepcopy", "pickle", "traced again", "compiled"])
@pytest.mark.parametrize("model", [Whole, WholePacked])
def test_a_graph_of_the_whole_model(model: type[Layer], way: str, x: torch.Tensor, device: torch.device) -> None:
    theirs = model().to(device)
    changed = copy.deepcopy(theirs)
    fastlayers.accelerate(changed)
    ours: Any = fastlayers.fuse(changed)
    if way == "deepcopy":
        ours = copy.deepcopy(ours)
    if way == "pickle":
        ours = pickle.loads(pickle.dumps(ours))
    if way == "traced again":
        ours = torch.fx.symbolic_trace(ours)
    if way == "compiled":
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(ours, backend="aot_eager", fullgraph=True)(x), theirs(x))
    else:
        assert ops(ours, x) == [PACKED if model is WholePacked else JOINED]
        assert_as_torch(ours, theirs, x)
