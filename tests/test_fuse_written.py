"""What a model writes out in torch's functions and operators, found by what it computes; and what only looks like it."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fuse_in_place import WIDTH, GemmasNorm, LlamasNorm, T5sNorm, Transposed, assert_as_torch, fused
from torch import nn
from torch.fx.proxy import TraceError

import fastlayers
from fastlayers.fusion import local

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.fixture(autouse=True)
def _auto() -> Any:
    with fastlayers.policy("auto"):
        yield


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, device=device)


def ops(model: nn.Module, *args: Any) -> list[str]:
    return [d.op for d in fastlayers.explain(model, *args)]


# --- activations ------------------------------------------------------------------------------------------------------

SCALE = math.sqrt(2.0 / math.pi)
WRITTEN: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str | None]] = {
    "new": (lambda x: 0.5 * x * (1.0 + torch.tanh(SCALE * (x + 0.044715 * torch.pow(x, 3.0)))), "gelu_tanh"),
    "fast": (lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))), "gelu_tanh"),
    "erf": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "gelu"),
    "silu": (lambda x: x * torch.sigmoid(x), "silu"),
    "mish": (lambda x: x * F.softplus(x).tanh(), "mish"),
    "hardswish": (lambda x: x * F.relu6(x + 3.0) / 6.0, "hardswish"),
    "another constant": (lambda x: 0.5 * x * (1.0 + torch.tanh(0.79 * (x + 0.044715 * x**3))), None),
    "quick": (lambda x: x * torch.sigmoid(1.702 * x), "swish"),
    "quick, divided": (lambda x: torch.sigmoid(x / -0.6123456789) * x, "swish"),
    "a shifted sigmoid": (lambda x: x * torch.sigmoid(1.702 * x + 0.01), None),
    "a scaled product": (lambda x: 2 * x * torch.sigmoid(1.702 * x), None),
    "a factor that is a tensor": (lambda x: x * torch.sigmoid(x.mean() * x), None),
}


class Written(nn.Module):
    def __init__(self, function: Any):
        super().__init__()
        self.linear, self.function = nn.Linear(WIDTH, 7), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.linear(x) - 0.25)


@pytest.mark.parametrize("name", WRITTEN)
def test_activations(name: str, x: torch.Tensor) -> None:
    function, found = WRITTEN[name]
    theirs = Written(function).to(x.device)
    ours, paths = fused(theirs)
    assert paths == ([""] if found else [])
    assert_as_torch(ours, theirs, x)
    assert ops(ours, x) == (["linear", found] if found else ["linear"])


class QuickGELU(nn.Module):
    """The activation of CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.702

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.factor * x)


class ClipsMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = nn.Linear(WIDTH, 20), QuickGELU(), nn.Linear(20, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


def test_an_activation_that_is_written_out_joins_its_linear(x: torch.Tensor, launched: list[str]) -> None:
    """In one function for autograd, with as many launches as of a SiLU; another factor is seen at the next call."""
    theirs = ClipsMlp().to(x.device)
    ours, found = fused(theirs)
    assert found == [""]
    assert_as_torch(ours, theirs, x)
    assert ops(ours, x) == ["linear"]
    ours.activation_fn.factor = theirs.activation_fn.factor = -0.3  # type: ignore[assignment]
    assert_as_torch(ours, theirs, x)
    assert ops(ours, x) == ["linear"]

    same = fastlayers.nn.Sequential(nn.Linear(WIDTH, 20), nn.SiLU(), nn.Linear(20, WIDTH)).to(x.device)
    fastlayers.accelerate(same)
    times = []
    for model in (ours, same):
        launched.clear()
        model(x).sum().backward()
        times.append(len(launched))
    assert times[0] == times[1] > 0


def test_an_activation_with_a_hook_or_of_a_subclass_stays_by_itself(x: torch.Tensor) -> None:
    class Shifted(QuickGELU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    theirs = ClipsMlp().to(x.device)
    ours, _ = fused(theirs)
    ours(x)
    seen: list[int] = []
    ours.activation_fn.register_forward_hook(lambda m, args, y: seen.append(y.shape[-1]))
    assert_as_torch(ours, theirs, x)
    assert {*seen} == {20} and ops(ours, x) == ["linear", "QuickGELU", "linear"]
    ours.activation_fn, theirs.activation_fn = Shifted(), Shifted()
    assert_as_torch(ours, theirs, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_an_activation_of_other_dtypes(dtype: torch.dtype, x: torch.Tensor) -> None:
    class Alone(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(1.702 * x)

    ours, given = fused(Alone())[0], (4 * x).to(dtype)
    y, exact = ours(given), Alone()(given.double())
    assert y.dtype == Alone()(given).dtype
    torch.testing.assert_close(y.double(), exact, rtol=32 * torch.finfo(y.dtype).eps, atol=torch.finfo(y.dtype).eps)


def test_copies_of_what_was_written_out(x: torch.Tensor) -> None:
    ours, _ = fused(ClipsMlp().to(x.device))
    y = ours(x)
    for way in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        assert torch.equal(way(ours)(x), y)
        graph = way(fastlayers.fuse(ours))
        assert torch.equal(graph(x), y) and ops(graph, x) == ["linear"]
    fastlayers.restore(ours)
    assert not local.is_fused(ours) and ours.state_dict().keys() == ClipsMlp().state_dict().keys()


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
def test_a_compiled_graph_of_what_was_written_out(x: torch.Tensor) -> None:
    theirs = ClipsMlp().to(x.device)
    ours = copy.deepcopy(theirs)
    fastlayers.accelerate(ours)
    whole: Any = torch.compile(fastlayers.fuse(ours), backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x), theirs(x), rtol=1e-5, atol=1e-5)


# --- a residual and a norm that is written out ------------------------------------------------------------------------


class Layer(nn.Module):
    """The end of Llama's: the sum is normalised and goes on as the residual."""

    def __init__(self, norm: Callable[[], nn.Module] = LlamasNorm) -> None:
        super().__init__()
        self.mixer, self.norm, self.mlp = nn.Linear(WIDTH, WIDTH, bias=False), norm(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x
        x = residual + self.mixer(x)
        residual = x
        return residual + self.mlp(self.norm(x))


@pytest.mark.parametrize("norm", [LlamasNorm, GemmasNorm, T5sNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_and_its_norm(norm: Any, dtype: torch.dtype, x: torch.Tensor, launched: list[str]) -> None:
    theirs = Layer(norm).to(x.device, dtype)
    ours, found = fused(theirs)
    assert found == [""]
    assert_as_torch(ours, theirs, x.to(dtype))
    decisions = fastlayers.explain(ours, x.to(dtype))
    assert [(d.module, d.op) for d in decisions] == [
        ("mixer", "linear"), ("add + rms_norm", "rms_norm"), ("mlp", "linear"),
    ]  # fmt: skip
    with torch.no_grad():
        launched.clear()
        ours(x.to(dtype))
    assert launched.count("_layer_norm_rows_kernel") == 1


def test_a_sum_that_is_the_result_of_a_norm_alone(x: torch.Tensor) -> None:
    class Last(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x + self.mixer(x))

    theirs = Last().to(x.device)
    ours, _ = fused(theirs)
    assert_as_torch(ours, theirs, x)
    assert "add + rms_norm" in [d.module for d in fastlayers.explain(ours, x)]


class Looks(Layer):
    """Uses the sum before its norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(x)
        y = self.mlp(x)
        return y + self.norm(x)


class Writes(Layer):
    """Writes into the residual between the sum and the norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = 1 * x
        x = residual + self.mixer(x)
        residual += 1
        return residual * self.norm(x)


class Broadcast(Layer):
    """The residual has fewer dimensions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mean(0) + self.mixer(x)
        return x + self.norm(x)


class Narrower(Layer):
    """The residual has another dtype than the branch, and so has the sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.bfloat16() + self.mixer(x)
        return x + self.norm(x)


@pytest.mark.parametrize("layer", [Looks, Writes, Broadcast, Narrower])
def test_a_sum_that_is_not_joined_with_its_norm(layer: Any, x: torch.Tensor) -> None:
    theirs = layer().to(x.device)
    ours, _ = fused(theirs)
    expected = theirs(x)
    assert ours(x).dtype == expected.dtype
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
    assert_as_torch(ours, theirs, x)


def test_a_hook_on_a_norm_that_is_written_out(x: torch.Tensor) -> None:
    theirs = Layer().to(x.device)
    ours, _ = fused(theirs)
    ours(x)
    seen: list[torch.Tensor] = []
    ours.norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    assert_as_torch(ours, theirs, x)
    torch.testing.assert_close(seen[0], (x + theirs.mixer(x)).detach(), rtol=1e-5, atol=1e-5)  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
def test_a_sum_and_its_norm_elsewhere(x: torch.Tensor) -> None:
    """In copies, within autocast and in a compiled graph."""
    theirs = Layer().to(x.device)
    ours, _ = fused(theirs)
    y = ours(x)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), y)
    ours.norm.eps = theirs.norm.eps = 0.5  # type: ignore[assignment]
    assert_as_torch(ours, theirs, x)
    with torch.autocast(x.device.type, torch.bfloat16):
        a, b = ours(x), theirs(x)
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    graph = fastlayers.fuse(ours)
    assert torch.equal(pickle.loads(pickle.dumps(graph))(x), ours(x))
    whole: Any = torch.compile(graph, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_second_derivatives_of_a_sum_and_its_norm(x: torch.Tensor) -> None:
    theirs = Layer().to(x.device)
    ours, _ = fused(theirs)
    found = []
    for model in (ours, theirs):
        given = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(given).square().sum(), given, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [given, *model.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


# --- GPT-2's Conv1D ---------------------------------------------------------------------------------------------------


class Gpt2sMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.dropout = Transposed(WIDTH, 20), Transposed(20, WIDTH), nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c_fc(x)
        x = 0.5 * x * (1.0 + torch.tanh(SCALE * (x + 0.044715 * torch.pow(x, 3.0))))
        return self.dropout(self.c_proj(x))


def test_transposed_linears_and_their_activation(x: torch.Tensor, launched: list[str]) -> None:
    """One function for autograd, with as many launches as of two Linear: no weight is copied."""
    theirs = Gpt2sMlp().to(x.device)
    ours, found = fused(theirs)
    assert found == [""]
    assert_as_torch(ours, theirs, x)
    decision = fastlayers.explain(ours, x).decisions[0]
    assert (decision.module, decision.op) == ("addmm + gelu_tanh + addmm", "linear")
    same = fastlayers.nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU("tanh"), nn.Linear(20, WIDTH)).to(x.device)
    fastlayers.accelerate(same)
    times = []
    for model in (ours, same):
        launched.clear()
        model(x).sum().backward()
        times.append(len(launched))
    assert times[0] == times[1] > 0
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))
    graph = fastlayers.fuse(ours)
    assert torch.equal(pickle.loads(pickle.dumps(graph))(x), ours(x))


def test_transposed_linears_as_the_model_has_them(x: torch.Tensor) -> None:
    """An input that can't be viewed as a matrix is refused as ever, and a weight of another size; hooks see what they saw."""
    theirs = Gpt2sMlp().to(x.device)
    ours, _ = fused(theirs)
    ours(x)
    for given in (x[:, :0], x[0, 0], x[:1, :1]):
        assert ours(given).shape == theirs(given).shape
    for model in (theirs, ours):
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            model(x.transpose(0, 1))
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            model(x[..., :5].contiguous())
    seen: list[int] = []
    ours.c_fc.register_forward_hook(lambda m, args, y: seen.append(y.shape[-1]))
    assert_as_torch(ours, theirs, x)
    assert {*seen} == {20}
    for model in (theirs, ours):
        model.c_proj.weight = nn.Parameter(torch.ones(20, 4, device=x.device))
        with pytest.raises(RuntimeError):
            model(x)


def test_gradients_of_transposed_weights_are_contiguous(x: torch.Tensor) -> None:
    """As torch's, so that autograd keeps them without a copy."""
    ours, _ = fused(Gpt2sMlp().to(x.device))
    for _ in range(3):
        weights = [ours.c_fc.weight, ours.c_proj.weight]
        assert all([g.is_contiguous() for g in torch.autograd.grad(ours(x).sum(), weights)])


class Reused(Gpt2sMlp):
    """Needs what lies between."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.c_fc(x)
        return self.c_proj(F.gelu(y)) + y.mean(-1, keepdim=True)


def test_a_transposed_linear_whose_result_is_needed(x: torch.Tensor) -> None:
    theirs = Reused().to(x.device)
    ours, _ = fused(theirs)
    assert_as_torch(ours, theirs, x)


class Swapped(nn.Module):
    """What a layer gives is another one's weight, and a sum its norm's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH) / 4)
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.first(x[0, 0].expand(WIDTH, -1))
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), w).view(x.size()[:-1] + (WIDTH,))
        scale = x[0, 0] + self.bias
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps) * scale


def test_what_follows_as_a_weight(x: torch.Tensor) -> None:
    theirs = Swapped().to(x.device)
    ours, _ = fused(theirs)
    assert_as_torch(ours, theirs, x)


# --- shapes that are unpacked -----------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Views in heads and back, as Llama's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.size = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape[:-1]
        heads = (*shape, -1, self.size)
        y = F.silu(self.first(x)).view(heads).transpose(1, 2)
        return self.last(y.transpose(1, 2).reshape(*shape, -1))


def test_shapes_that_are_unpacked(x: torch.Tensor) -> None:
    """Of any number of dimensions, though the graph was made for another one."""
    theirs = Heads().to(x.device)
    ours, found = fused(theirs)
    assert found == [""]
    for given in (x, x[:1], x[:, None]):
        assert_as_torch(ours, theirs, given)
    assert fastlayers.explain(ours, x).decisions[0].module == "first + silu"
    ours.size = theirs.size = 3
    assert_as_torch(ours, theirs, x)
    graph = fastlayers.fuse(ours)
    assert torch.equal(pickle.loads(pickle.dumps(graph))(x), ours(x))


class Edited(Heads):
    """A list that is edited after it was put into a tuple."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = [self.size]
        both = (*x.shape[:-1], sizes)
        sizes.append(2)
        return self.last(F.silu(self.first(x))) * len(both[-1])


class Named(Heads):
    """Arguments that are unpacked into a function, which isn't known to take any number of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.silu(self.first(x))) * torch.add(*x.shape[:2])


class Emptied(nn.Module):
    """Unpacks a list before a part of it empties that."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.first = Emptying(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, sizes: Any) -> torch.Tensor:
        both = (*sizes, self.part(sizes))
        return F.silu(self.first(x)).reshape(*both)


class Emptying(nn.Module):
    def forward(self, sizes: Any) -> int:
        while sizes:
            sizes.pop()
        return -1


def test_what_is_unpacked_and_edited(x: torch.Tensor) -> None:
    for layer in (Edited, Named):
        theirs = layer().to(x.device)
        ours, _ = fused(theirs)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        with pytest.raises(TraceError, match=r"may be edited|how many there are"):
            fastlayers.fuse(theirs)
    theirs = Emptied().to(x.device)
    ours, _ = fused(theirs)
    assert ours(x, [5, 2]).shape == theirs(x, [5, 2]).shape == (5, 2, WIDTH)
