"""accelerate(model, fuse=True) where no graph can be made: attention that is looked up by a name, with branches on sizes, with
caches and options, and functions for rotary embedding, as models of other packages have them."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fuse_in_place import WIDTH, assert_as_torch, fused, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlayers

pytestmark = pytest.mark.usefixtures("small_tiles")
HEADS, SIZE = 3, 4
ATTENTION, TURNED, PROJECTED = "scaled_dot_product_attention", "rotary_embedding", "rotary_projections"


@pytest.fixture(autouse=True)
def _auto() -> Any:
    with fastlayers.policy("auto"):
        yield


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, device=device)


# --- a model as others write it -------------------------------------------------------------------------------------------


class Config:
    """Looks its attributes up in a way of its own."""

    renamed = {"implementation": "_implementation"}  # noqa: RUF012

    def __init__(self, implementation: str):
        self._implementation = implementation

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(type(self).renamed.get(name, name))


class Registry(dict[str, Any]):
    def look_up(self, name: str, default: Any) -> Any:
        if name != "eager" and name not in self:
            raise KeyError(name)
        return super().get(name, default)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def apply_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


def repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    b, h, l, d = x.shape
    return x[:, :, None].expand(b, h, times, l, d).reshape(b, h * times, l, d)


def by_torch(module: Any, q: Any, k: Any, v: Any, mask: Any, dropout: float = 0.0, **kwargs: Any) -> Any:
    """With branches on sizes."""
    options: dict[str, Any] = {}
    if mask is None and k.shape[-1] == v.shape[-1] <= 256:
        options["enable_gqa"] = True
    else:
        k, v = repeated(k, HEADS), repeated(v, HEADS)
    causal = q.shape[2] > 1 and mask is None and kwargs.get("causal", True)
    if causal and k.shape[2] > q.shape[2]:
        k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    y = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, **options
    )
    return y.transpose(1, 2).contiguous(), None


def written_out(module: Any, q: Any, k: Any, v: Any, mask: Any, dropout: float = 0.0, **kwargs: Any) -> Any:
    weights = q @ repeated(k, HEADS).transpose(-1, -2) * SIZE**-0.5
    weights = weights.masked_fill(torch.ones(weights.shape[-2:], device=q.device).triu(1).bool(), float("-inf"))
    weights = F.softmax(weights, -1)
    return (weights @ repeated(v, HEADS)).transpose(1, 2).contiguous(), weights


REGISTRY = Registry(by_torch=by_torch)


class Cache:
    def __init__(self) -> None:
        self.keys: Any = None
        self.values: Any = None

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 2)
        self.values = values if self.values is None else torch.cat([self.values, values], 2)
        return self.keys, self.values


def renamed(function: Any) -> Any:
    """A decorator: an old name of an argument."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if "past" in kwargs:
            kwargs["cache"] = kwargs.pop("past")
        return function(*args, **kwargs)

    return wrapped


class Attention(nn.Module):
    def __init__(self, implementation: str = "by_torch"):
        super().__init__()
        self.config = Config(implementation)
        self.q_proj, self.k_proj = nn.Linear(WIDTH, HEADS * SIZE), nn.Linear(WIDTH, SIZE, bias=False)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, SIZE), nn.Linear(HEADS * SIZE, WIDTH)
        self.dropout = 0.25

    @renamed
    def forward(self, x: torch.Tensor, mask: Any = None, cache: Any = None, begin: int = 0, **kwargs: Any) -> Any:
        shape = (*x.shape[:-1], -1, SIZE)
        q, k, v = [layer(x).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        angles = torch.arange(begin, begin + x.shape[1], device=x.device)[None, :, None] * 0.4
        angles = torch.cat((angles, angles * 0.3) * 2, -1).to(x.dtype)
        q, k = apply_rotary(q, k, angles.cos(), angles.sin())
        if cache is not None:
            k, v = cache.update(k, v)
        attend: Callable[..., Any] = REGISTRY.look_up(self.config.implementation, written_out)
        y, weights = attend(self, q, k, v, mask, dropout=0.0 if not self.training else self.dropout, **kwargs)
        return self.o_proj(y.reshape(*x.shape[:-1], -1)), weights


class Model(nn.Module):
    def __init__(self, implementation: str = "by_torch"):
        super().__init__()
        self.attention, self.checkpointed = Attention(implementation), False
        self.attention.dropout = 0.0

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.checkpointed:
            return checkpoint(lambda x: self.attention(x, **kwargs)[0], x, use_reentrant=False)
        return self.attention(x, **kwargs)[0]


@pytest.fixture
def model(device: torch.device) -> Model:
    return Model().to(device)


def ops(model: Any, *args: Any, **kwargs: Any) -> list[str]:
    found = [d.op for d in fastlayers.explain(model, *args, **kwargs) if d.path == "triton"]
    return [op for op in found if op != "linear"]


# --- what is found --------------------------------------------------------------------------------------------------------


def test_attention_and_rotary_embedding(model: Model, x: torch.Tensor) -> None:
    ours, paths = fused(model)
    assert paths == ["attention"]
    assert ops(ours, x) == [PROJECTED, ATTENTION]
    assert ops(model, x) == []
    assert_as_torch(ours, model, x)
    mask = torch.rand(2, 1, 5, 5, device=x.device) < 0.6
    mask |= torch.eye(5, dtype=torch.bool, device=x.device)
    assert ops(ours, x, mask=mask) == [PROJECTED, ATTENTION]
    torch.testing.assert_close(ours(x, mask=mask), model(x, mask=mask))


def test_a_cache(model: Model, x: torch.Tensor) -> None:
    """By its new name and the old one: word by word what all words at once give."""
    ours, _ = fused(model)
    kept, theirs = Cache(), Cache()
    with torch.no_grad():
        expected = model(x)
        for begin, end in ((0, 3), (3, 4), (4, 5)):
            part = x[:, begin:end]
            found = ours(part, past=kept, begin=begin)
            torch.testing.assert_close(found, expected[:, begin:end])
            torch.testing.assert_close(found, model(part, cache=theirs, begin=begin))
    assert kept.keys.shape[2] == 5
    assert ops(ours, x[:, :1], cache=kept, begin=5) == [PROJECTED, ATTENTION]


def test_attention_that_is_written_out(x: torch.Tensor) -> None:
    """Gives its weights, as ever; its softmax is ours, as torch.nn.functional's functions are in a graph."""
    theirs = Model("eager").to(x.device)
    ours, _ = fused(theirs)
    assert ops(ours, x) == [PROJECTED, "softmax"]
    torch.testing.assert_close(ours.attention(x)[1], theirs.attention(x)[1])
    ours.attention.config._implementation = "by_torch"
    assert ops(ours, x) == [PROJECTED, ATTENTION]
    ours.attention.config._implementation = "none"
    with pytest.raises(KeyError):
        ours(x)


def test_dropout_in_training_alone(model: Model, x: torch.Tensor) -> None:
    ours, _ = fused(model)
    ours.attention.dropout = 0.9
    torch.testing.assert_close(ours.eval()(x), model.eval()(x))
    assert not torch.allclose(ours.train()(x), model.train()(x))


def test_hooks_and_adapters(model: Model, x: torch.Tensor) -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Module):
            super().__init__()
            self.base, self.extra = base, nn.Linear(WIDTH, HEADS * SIZE, device=x.device)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.extra(x)

    ours, _ = fused(model)
    seen: list[Any] = []
    handle = ours.attention.q_proj.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    ours(x)
    handle.remove()
    assert seen == [(2, 5, HEADS * SIZE)]
    handle = ours.attention.register_forward_hook(lambda module, args, y: (y[0] * 2, y[1]))
    torch.testing.assert_close(ours(x), 2 * model(x))
    handle.remove()
    ours.attention.q_proj = adapted = Adapted(ours.attention.q_proj)
    model.attention.q_proj = copy.deepcopy(adapted)  # type: ignore[assignment]
    assert ops(ours, x) == [TURNED, ATTENTION]
    assert_as_torch(ours, model, x)


def test_checkpointed(model: Model, x: torch.Tensor, launched: list[str]) -> None:
    ours, _ = fused(model)
    ours.checkpointed = True
    assert_as_torch(ours, model, x)
    assert launched.count("attention_kernel") == 2  # once more in the backward


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "restore", "by name"])
def test_copies(way: str, model: Model, x: torch.Tensor) -> None:
    ours, _ = fused(model)
    expected = trained(ours, x)
    if way == "restore":
        fastlayers.restore(ours)
        assert type(ours.attention) is Attention
        assert ops(ours, x) == []
        return
    if way == "by name":
        assert type(ours.attention) is not Attention
        assert type(ours.attention).__qualname__ == "Attention"
        assert Attention.forward.__wrapped__.__code__.co_freevars == ()
        return
    other = copy.deepcopy(ours) if way == "deepcopy" else pickle.loads(pickle.dumps(ours))
    assert ops(other, x) == [PROJECTED, ATTENTION]
    for one, right in zip(trained(other, x), expected, strict=True):
        assert torch.equal(one, right)


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
def test_compiled(model: Model, x: torch.Tensor) -> None:
    ours, _ = fused(model)
    expected = ours(x)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


# --- what is replaced -----------------------------------------------------------------------------------------------------


def test_what_somebody_replaces_is_called(model: Model, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's function, the user's function, what that calls, and its code."""
    ours, _ = fused(model)
    assert ops(ours, x) == [PROJECTED, ATTENTION]
    with monkeypatch.context() as patch:
        theirs = F.scaled_dot_product_attention
        patch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: 2 * theirs(*args, **kwargs))
        assert ops(ours, x) == [PROJECTED]
        torch.testing.assert_close(ours(x), model(x))
    for name, other in (("rotate_half", torch.neg), ("apply_rotary", lambda q, k, *angles: (k.expand_as(q), k))):
        with monkeypatch.context() as patch:
            patch.setitem(globals(), name, other)
            assert ops(ours, x) == [ATTENTION]
            torch.testing.assert_close(ours(x), model(x))
    ours, _ = fused(model)  # where a graph couldn't be made, as of the lambda, none is tried again
    with monkeypatch.context() as patch:
        patch.setattr(by_torch, "__code__", written_out.__code__)
        assert ops(ours, x) == [PROJECTED, "softmax"]
    with monkeypatch.context() as patch:
        patch.setattr(Attention.forward.__wrapped__, "__defaults__", (None, None, 7))
        torch.testing.assert_close(ours(x), model(x))
    with monkeypatch.context() as patch:
        patch.setattr(Attention, "forward", lambda self, x: (x, None))
        assert torch.equal(fused(Model().to(x.device))[0](x), x)
    assert ops(ours, x) == [PROJECTED, ATTENTION]


def several(x: torch.Tensor, times: int) -> torch.Tensor:
    return x if times == 0 or x.sum() > 1e9 else several(F.gelu(x), times - 1)


class Base(nn.Module):
    """Whose methods, and those of its parent, lead to a function; decides by data, so that no graph is made."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self._loss = nn.Linear(WIDTH, WIDTH), self.distance

    @staticmethod
    def distance(x: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(x, torch.zeros_like(x))

    @property
    def loss(self) -> Any:
        return self._loss

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.linear(x)) if x.sum() < 1e9 else x


class Derived(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + next(F.silu(part) for part in (x,) if part.sum() < 1e9)


class WithLoss(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loss(self.linear(x)) if x.sum() < 1e9 else x


class SeesItsVariables(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(x)
        return self.linear(x) * len(locals()) + y if x.sum() < 1e9 else x


class PrivateNames(Base):
    def __own(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.__own(self.linear(x)) if x.sum() < 1e9 else x


class PrivateNamesWithin(Base):
    def __own(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = functools.partial(lambda x: self.__own(x))
        return F.gelu(own(self.linear(x))) if x.sum() < 1e9 else x


class CallsAFunctionThatCallsItself(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return several(self.linear(x), 2)


class ComparesItsClass(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(super().forward(x)) * (2 if type(self) is ComparesItsClass else 1)


class CallsNothingOfOurs(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.linear, abs):
            x = layer(x) if x.sum() < 1e9 else x
        return x


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (Base, ["gelu"]), (Derived, ["gelu", "silu"]), (WithLoss, ["mse_loss"]),
        (CallsAFunctionThatCallsItself, ["gelu", "gelu"]),
        (SeesItsVariables, None), (PrivateNames, None), (PrivateNamesWithin, None), (CallsNothingOfOurs, None),
        (ComparesItsClass, None),
    ],
)  # fmt: skip
def test_methods(kind: type[nn.Module], found: list[str] | None, x: torch.Tensor) -> None:
    theirs = kind().to(x.device)
    ours, paths = fused(theirs)
    assert paths == ([] if found is None else [""])
    torch.testing.assert_close(ours(x), theirs(x))
    assert ops(ours, x) == (found or [])


class Crosses(nn.Module):
    """Calls one of its parts with another argument alone, so that the graph for a plain call doesn't have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.across = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), Base()

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        y = self.second(x + self.first(x))
        return y if other is None else y + self.across(other)


def test_a_part_that_the_plain_call_leaves_out(x: torch.Tensor) -> None:
    ours, paths = fused(Crosses().to(x.device))
    assert paths == ["", "across"]
    assert "gelu" in ops(ours, x, x)


def test_an_error_tells_its_line(model: Model, x: torch.Tensor) -> None:
    ours, _ = fused(model)
    lines = []
    for one in (model, ours):
        with pytest.raises(AttributeError) as caught:
            one(x, cache=3)
        lines.append(caught.traceback[-1].lineno)
    assert lines[0] == lines[1]
