"""Query, key and value of an attention layer with rotary embedding as one call, found in models' graphs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fuse_calls import _auto, apply_rotary, ops, renamed  # noqa: F401
from test_fuse_in_place import WIDTH, assert_as_torch, fused
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


class UsedLater(Packed):
    """The layer's result has another part, or is asked for what it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape, end = (*x.shape[:-1], -1, SIZE), HEADS * SIZE
        qkv = self.qkv_proj(x)
        q, k, v = qkv[..., :end], qkv[..., end : end + GROUPS * SIZE], qkv[..., end + GROUPS * SIZE :]
        q, k, v = [t.view(shape).transpose(1, 2) for t in (q, k, v)]
        q, k = apply_rotary(q, k, *[t.to(qkv.dtype) for t in angles_of(x)])
        return self.whole(q, k, v) + qkv.sigmoid().mean()


class Unflattened(Layer):
    """By a layer that has the name of a tensor's method."""

    def __init__(self) -> None:
        super().__init__()
        self.view = nn.Unflatten(-1, (-1, SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = [self.view(layer(x)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        q, k = apply_rotary(q, k, *angles_of(x))
        return self.whole(q, k, v)


class Reshaped(Layer):
    """Where `view` can't."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, l, _ = x.shape
        q = self.q_proj(x).reshape(b, l, HEADS, SIZE).transpose(1, 2)
        k = self.k_proj(x).expand(b, l, SIZE).reshape(b, l, 1, SIZE).transpose(1, 2)
        v = self.v_proj(x).reshape(b, l, 1, SIZE).transpose(1, 2)
        q, k = apply_rotary(q, k, *angles_of(x))
        return self.whole(q, k, v)


@pytest.mark.parametrize(
    "model", [ValueFirst, QueryTwice, OfAnother, Between, OtherShapes, UsedLater, Unflattened, Reshaped]
)
def test_not_joined(model: type[Layer], x: torch.Tensor, device: torch.device) -> None:
    theirs = model().to(device)
    ours, paths = fused(theirs)
    assert paths == [""]
    assert ops(ours, x) == [TURNED]
    assert_as_torch(ours, theirs, x)


class Twice(Layer):
    """Two functions for rotary embedding, and one value."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList([nn.Linear(WIDTH, n * SIZE) for n in (HEADS, GROUPS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, SIZE)
        layers = *self.others, self.q_proj, self.k_proj, self.v_proj
        other_q, other_k, q, k, v = [layer(x).view(shape).transpose(1, 2) for layer in layers]
        q, k = apply_rotary(q, k, *angles_of(x))
        other_q, other_k = apply_rotary(other_q, other_k, *angles_of(x))
        return self.whole(q, k, v) - self.whole(other_q, other_k, v)


def test_two_of_one_input(x: torch.Tensor, device: torch.device) -> None:
    theirs = Twice().to(device)
    ours, _ = fused(theirs)
    assert ops(ours, x) == [JOINED, TURNED]
    assert_as_torch(ours, theirs, x)


class Writes(Layer):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0
        shape = (*x.shape[:-1], -1, SIZE)
        q = self.q_proj(x).view(shape).transpose(1, 2)
        if self.how == "relu":
            F.relu(x, True)
        elif self.how == "hardtanh":
            F.hardtanh(x, -0.1, 0.1, True)
        elif self.how == "normalize":
            F.normalize(x, 2.0, -1, 1e-3, x)
        else:
            F.embedding(torch.zeros(1, dtype=torch.long, device=x.device), x[0], None, 0.1)
        k, v = [layer(x).view(shape).transpose(1, 2) for layer in (self.k_proj, self.v_proj)]
        q, k = apply_rotary(q, k, *angles_of(x))
        return self.whole(q, k, v)


@pytest.mark.parametrize("how", ["relu", "hardtanh", "normalize", "embedding"])
def test_functions_that_write_where_their_arguments_say_so(how: str, x: torch.Tensor, device: torch.device) -> None:
    theirs = Writes(how).to(device)
    ours, _ = fused(theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


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
    for shape in ((0, 5, WIDTH), (2, 0, WIDTH)):  # of which -1 in a view says nothing
        for one in (theirs, ours):
            with pytest.raises(RuntimeError, match="ambiguous"):
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


class Gated(Layer):
    """With another layer in between, and the input's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, shape = x + 0, (*x.shape[:-1], -1, SIZE)
        q = self.q_proj(x).view(shape).transpose(1, 2)
        gate, mean = self.gate(x), x.mean()
        k, v = [layer(x).view(shape).transpose(1, 2) for layer in (self.k_proj, self.v_proj)]
        q, k = apply_rotary(q, k, *angles_of(x))
        return self.whole(q, k, v) * gate.sum() + mean


class GatedWhole(Gated):
    """Whose forward a graph can hold."""

    def whole(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q.sum() + k.sum() * 2 + v


@pytest.mark.parametrize("layer", ["gate", "q_proj", "k_proj"])
@pytest.mark.parametrize("model", [Gated, GatedWhole])
def test_a_hook_may_write(model: type[Gated], layer: str, x: torch.Tensor, device: torch.device) -> None:
    theirs = model().to(device)
    ours, _ = fused(theirs)
    assert ops(ours, x) == [JOINED if model is Gated else TURNED]

    def doubles(module: Any, args: Any) -> None:
        args[0].mul_(2)

    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        for one in (theirs, ours):
            getattr(one, layer).register_forward_pre_hook(doubles)
        torch.testing.assert_close(ours(x), theirs(x))
    del ours.k_proj
    with pytest.raises(AttributeError):
        ours(x)


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
