"""accelerate(model, fuse=True): what runs fused in modules that stay where and what they are, and what is found written out."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlayers
from fastlayers.fusion import local
from fastlayers.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("small_tiles")
WIDTH = 12


@pytest.fixture(autouse=True)
def _auto() -> Any:
    with fastlayers.policy("auto"):
        yield


class LlamasNorm(nn.Module):
    def __init__(self, size: int = WIDTH):
        super().__init__()
        self.weight, self.eps = nn.Parameter(1 + torch.randn(size) / 4), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        return self.weight * x.to(dtype)


class GemmasNorm(LlamasNorm):
    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self._norm(x.float()) * (1.0 + self.weight.float())).type_as(x)


class T5sNorm(LlamasNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.to(torch.float32).square().mean((-1,), True)
        x = x * torch.rsqrt(self.eps + variance)
        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            x = x.to(self.weight.dtype)
        return self.weight * x


class BareNorm(LlamasNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Transposed(nn.Module):
    """The Conv1D of GPT-2."""

    def __init__(self, inner: int, out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inner, out) / 4), nn.Parameter(torch.randn(out) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.size()[:-1] + (self.bias.shape[0],)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 20, bias=False), nn.Linear(WIDTH, 20, bias=False)
        self.down = nn.Linear(20, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Takes what decoders take: words by name, some of them None, and more that it hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.mixer, self.after, self.mlp = LlamasNorm(), Unreadable(), LlamasNorm(), Gated()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        residual = x
        x, _ = self.mixer(self.before(x), mask=mask, **kwargs)
        x = residual + x
        return x + self.mlp(self.after(x))


class Unreadable(nn.Module):
    """Decides by data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0) -> Any:
        x = self.linear(x) * scale
        if mask is not None and bool(mask.any()):
            x = x.masked_fill(mask, 0.0)
        return x, None


class Decoder(nn.Module):
    """Whose own forward can't be read."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(count)])
        self.norm, self.calls = LlamasNorm(), 0

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        for block in self.blocks:
            x = block(x, mask=mask, scale=0.5)
        return self.norm(x)


def trained(model: Any, *inputs: Any) -> list[torch.Tensor]:
    """The result and all gradients."""
    model.zero_grad()
    given = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    result = model(*given)
    # Not all features alike: the sum of the squares of what a norm gives is constant, and its gradient rounding alone.
    (result.float() * torch.linspace(0.25, 2.0, result.shape[-1], device=result.device)).square().sum().backward()
    grads = [t.grad for t in (*given, *model.parameters()) if t.grad is not None]
    return [result.detach(), *[g.clone() for g in grads]]


def assert_as_torch(ours: nn.Module, theirs: nn.Module, *inputs: Any) -> None:
    moved = [x.nextafter(x + 1) if x.is_floating_point() else x for x in inputs]
    torchs = [trained(theirs, *each) for each in (inputs, moved)]
    exact = trained(copy.deepcopy(theirs).double(), *[x.double() if x.is_floating_point() else x for x in inputs])
    scale = max(g.abs().max().item() for g in exact)
    for i, (one, right) in enumerate(zip(trained(ours, *inputs), exact, strict=True)):
        assert_within_budget(one, [each[i] for each in torchs], right, f"result or gradient {i}", scale)


def fused(model: nn.Module) -> tuple[Any, list[str]]:
    """A copy that is fused, and the paths of the modules that are, layers apart."""
    ours = copy.deepcopy(model)
    fastlayers.accelerate(ours, fuse=True)
    return ours, [path for path, module in ours.named_modules() if local.is_fused(module)]


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, device=device)


@pytest.fixture
def decoder(device: torch.device) -> Decoder:
    return Decoder().to(device)


# --- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [LlamasNorm, GemmasNorm, T5sNorm, BareNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(norm: Any, dtype: torch.dtype, x: torch.Tensor, launched: list[str]) -> None:
    theirs = norm().to(x.device, dtype)
    ours, found = fused(theirs)
    assert found == [""]
    assert_as_torch(ours, theirs, x.to(dtype))
    assert len(launched) >= 2


def test_rms_norm_of_float64_that_is_narrowed_is_torchs(x: torch.Tensor, launched: list[str]) -> None:
    """Its result has float32, which the kernel's wouldn't have."""

    class Narrowed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.float()
            return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)

    theirs = Narrowed()
    ours = fused(theirs)[0]
    assert ours(x.double()).dtype == theirs(x.double()).dtype
    assert torch.equal(ours(x.double()), theirs(x.double()))
    assert not launched


def test_rms_norm_by_torch(x: torch.Tensor, launched: list[str]) -> None:
    """A weight of another dtype gives another dtype; a weight that is broadcast isn't a row; strides are kept."""
    ours, theirs = fused(LlamasNorm().to(x.device))[0], LlamasNorm().to(x.device)
    theirs.load_state_dict(ours.state_dict())
    for given in (x.bfloat16(), x.transpose(0, 1)):
        assert torch.equal(ours(given), theirs(given)) and ours(given).stride() == theirs(given).stride()
        assert ours(given).dtype == torch.float32
    for module in (ours, theirs):
        module.weight = nn.Parameter(torch.ones(1, device=x.device))
    assert torch.equal(ours(x), theirs(x))
    assert not launched


def test_a_product_with_a_bias(x: torch.Tensor, launched: list[str]) -> None:
    """As many launches as of a Linear: its weight isn't copied."""
    theirs = Transposed(WIDTH, 7).to(x.device)
    ours, found = fused(theirs)
    assert found == [""]
    assert_as_torch(ours, theirs, x)
    times, linear = len(launched), fastlayers.nn.Linear(WIDTH, 7, device=x.device)
    launched.clear()
    trained(linear, x)
    assert len(launched) == times


class OwnNorm(nn.LayerNorm):
    """As timm's: a subclass that calls torch's function."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def test_functions(x: torch.Tensor, launched: list[str]) -> None:
    theirs = OwnNorm(WIDTH).to(x.device)
    ours, found = fused(theirs)
    assert found == [""]
    assert_as_torch(ours, theirs, x)
    assert launched


# --- where it is found ------------------------------------------------------------------------------------------------


def test_parts_of_a_model_that_cant_be_read(decoder: Decoder, x: torch.Tensor) -> None:
    ours, found = fused(decoder)
    assert found == ["blocks.0", "blocks.1", "norm"]
    assert_as_torch(ours, decoder, x)
    mask = torch.rand(x.shape, device=x.device) < 0.5
    assert_as_torch(ours, decoder, x, mask)
    ops = [d.op for d in fastlayers.explain(ours, x)]
    assert ops == ["rms_norm", "linear", "rms_norm", "gated_mlp"] * 2 + ["rms_norm"]


def test_nobody_can_tell(decoder: Decoder, x: torch.Tensor) -> None:
    ours, before = copy.deepcopy(decoder), [*decoder.modules()]
    modules, parameters = [*ours.modules()], [*ours.parameters()]
    report = fastlayers.accelerate(ours, fuse=True)
    assert [*ours.modules()] == modules and all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    assert (
        repr(ours).replace("fastlayers", "torch") == repr(decoder)
        and ours.state_dict().keys() == decoder.state_dict().keys()
    )
    assert all(isinstance(one, type(other)) for one, other in zip(ours.modules(), before, strict=True))
    assert "Block, fused" in str(report)
    assert fastlayers.accelerate(ours, fuse=True).changed == ()

    ours(x)
    fastlayers.restore(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in before]
    assert [vars(m).keys() for m in ours.modules()] == [vars(m).keys() for m in before]
    assert torch.equal(ours(x), decoder(x))
    with fastlayers.accelerate(ours, fuse=True):
        assert local.is_fused(ours.norm)
    assert [type(m) for m in ours.modules()] == [type(m) for m in before]


def test_what_is_excluded_stays(decoder: Decoder) -> None:
    fastlayers.accelerate(decoder, fuse=True, exclude="blocks.0.mlp")
    assert [path for path, m in decoder.named_modules() if local.is_fused(m)] == [
        "blocks.0.before", "blocks.0.after", "blocks.1", "norm",
    ]  # fmt: skip


# --- and stays right --------------------------------------------------------------------------------------------------


def test_hooks_see_what_they_saw(decoder: Decoder, x: torch.Tensor) -> None:
    ours, _ = fused(decoder)
    ours(x)
    seen: list[str] = []
    for name in ("before", "mlp"):
        ours.blocks[0].get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    ours.blocks[0].mlp.up.register_forward_hook(lambda *_: seen.append("up"))
    assert_as_torch(ours, decoder, x)
    assert seen == ["before", "up", "mlp"]
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        ours(x)
    finally:
        handle.remove()
    assert seen.count("LlamasNorm") == 5


class Adapter(nn.Module):
    """As LoRA: beside a layer, whose place it takes."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer, self.a = layer, nn.Linear(layer.in_features, 2, bias=False, device=layer.weight.device)
        self.b = nn.Linear(2, layer.out_features, bias=False, device=layer.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.b(self.a(x))


def test_adapters(decoder: Decoder, x: torch.Tensor) -> None:
    ours, _ = fused(decoder)
    ours(x)
    torch.manual_seed(0)
    decoder.blocks[0].mlp.gate = Adapter(decoder.blocks[0].mlp.gate)  # type: ignore[union-attr, arg-type]
    torch.manual_seed(0)
    ours.blocks[0].mlp.gate = Adapter(ours.blocks[0].mlp.gate)
    assert_as_torch(ours, decoder, x)
    assert "gated_mlp" in [d.op for d in fastlayers.explain(ours, x)]  # of the other block


def test_a_forward_that_is_replaced_later(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = fused(LlamasNorm().to(x.device))
    ours(x)
    monkeypatch.setattr(LlamasNorm, "forward", lambda self, x: x + 1)
    assert torch.equal(ours(x), x + 1)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "copy"])
def test_copies(way: str, decoder: Decoder, x: torch.Tensor) -> None:
    ours, found = fused(decoder)
    ours(x)
    if way == "torch.save":
        torch.save(ours, file := io.BytesIO())
        file.seek(0)
        other: Any = torch.load(file, weights_only=False)
    else:
        ways: dict[str, Any] = dict(
            deepcopy=copy.deepcopy, copy=copy.copy, pickle=lambda m: pickle.loads(pickle.dumps(m, 0))
        )
        other = ways[way](ours)
    assert [path for path, m in other.named_modules() if local.is_fused(m)] == found
    assert torch.equal(other(x), ours(x))
    if way != "copy":
        with torch.no_grad():
            other.norm.weight.mul_(2)
        assert torch.equal(other(x), 2 * ours(x))
        other.load_state_dict(decoder.state_dict())
        assert torch.equal(other(x), ours(x))
    fastlayers.restore(other)
    assert type(other.norm) is LlamasNorm


def test_shallow_copies_have_their_own_parameters(x: torch.Tensor) -> None:
    ours, _ = fused(LlamasNorm().to(x.device))
    ours(x)
    other = copy.copy(ours)
    other._parameters = {"weight": nn.Parameter(torch.zeros_like(ours.weight))}
    assert not other(x).any() and ours(x).any()


def test_checkpointing(decoder: Decoder, x: torch.Tensor) -> None:
    ours, _ = fused(decoder)
    direct = trained(ours, x)
    block, plain = ours.blocks[0], type(ours.blocks[0]).forward
    block.forward = lambda *args, **kwargs: checkpoint(plain, block, *args, use_reentrant=False, **kwargs)
    for one, other in zip(trained(ours, x), direct, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
def test_compiled(x: torch.Tensor) -> None:
    """Dynamo sees the forward as it is written, whole."""
    ours, _ = fused(Gated().to(x.device))
    theirs = copy.deepcopy(ours)
    fastlayers.restore(theirs)
    whole: Any = torch.compile(ours, backend="eager", fullgraph=True)
    assert_within_budget(whole(x), theirs(x), copy.deepcopy(theirs).double()(x.double()))


def test_traced_by_torch(x: torch.Tensor) -> None:
    ours, _ = fused(Gated().to(x.device))
    graph = torch.fx.symbolic_trace(ours)
    assert [str(node.target) for node in graph.graph.nodes if node.op == "call_module"] == ["gate", "up", "down"]


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.step = LlamasNorm(), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) * self.step


def test_what_changes_at_every_call(x: torch.Tensor, launched: list[str]) -> None:
    """After some graphs, the forward runs as it is written."""
    ours, _ = fused(Counting().to(x.device))
    theirs = copy.deepcopy(ours)
    fastlayers.restore(theirs)
    for step in range(12):
        ours.step = theirs.step = step
        launched.clear()
        assert torch.allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert not launched


class Restless(nn.Module):
    """Whose part changes what it reads then."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.part = LlamasNorm(), Stepping()
        self.part.owner = [self.norm]  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.part(x))


class Named(nn.Module):
    """Has a part that goes by the name of what Python calls the module, as BERT's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.self, self.output, self.norm = Unreadable(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.self(x)
        return self.norm(self.output(y) + x)


def test_a_part_named_self(x: torch.Tensor) -> None:
    theirs = Named().to(x.device)
    ours, found = fused(theirs)
    assert found == [""]
    assert_as_torch(ours, theirs, x)


class Final(LlamasNorm):
    def __init_subclass__(cls) -> None:
        raise TypeError("no subclasses")


def test_a_class_without_subclasses(x: torch.Tensor) -> None:
    model = nn.Sequential(Final(), LlamasNorm())
    fastlayers.accelerate(model, fuse=True)
    assert [type(m) for m in model] == [Final, local.class_after(LlamasNorm)]


class Stepping(nn.Module):
    owner: list[Any]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.owner[0].eps = 1.0
        return x


def test_what_changes_within_a_call(x: torch.Tensor) -> None:
    ours, found = fused(Restless().to(x.device))
    assert "" in found
    with pytest.raises(RuntimeError, match="eps of LlamasNorm is changed by a call and read in it"):
        ours(x)
    theirs = copy.deepcopy(ours)
    fastlayers.restore(theirs)
    assert torch.equal(ours(x), theirs(x))
