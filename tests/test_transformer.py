"""Transformers beside torch's: state, training, hooks on children, padding in eval, torch.compile, and what runs as one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastlayers
from fastlayers import nn as ours

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


def sizes(**options: Any) -> dict[str, Any]:
    return dict(d_model=8, nhead=2, dim_feedforward=12, dropout=0.0) | options


def encoder(nn: Any, **options: Any) -> torch.nn.Module:
    layer = nn.TransformerEncoderLayer(**sizes(batch_first=True, **options))
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(8))


def whole(nn: Any, **options: Any) -> torch.nn.Module:
    return nn.Transformer(**sizes(num_encoder_layers=1, num_decoder_layers=1, **options))


def pair(make: Any, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch's, initialised under one seed."""
    found = []
    for nn in (ours, torch.nn):
        torch.manual_seed(7)
        found.append(make(nn, **options))
    return found[0], found[1]


def test_state() -> None:
    """Under one seed the same numbers by the same names; every child is ours, and one of torch's."""
    for make in (encoder, whole):
        a, b = pair(make)
        assert list(a.state_dict()) == list(b.state_dict())
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
        children = dict(a.named_modules())
        for name, module in b.named_modules():
            assert isinstance(children[name], type(module))
            expected = getattr(ours, type(module).__name__, None)
            assert expected is None or type(children[name]) is expected, name
        fastlayers.accelerate(b)
        assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()]
        assert {*vars(a)} >= {*vars(b)} - {"_accelerated"}


@pytest.mark.parametrize(
    "options",
    [{}, {"norm_first": True, "activation": "gelu"}, {"activation": torch.tanh}],
    ids=["plain", "norm_first", "tanh"],
)
@pytest.mark.parametrize("make", [encoder, whole])
def test_training(make: Any, options: dict[str, Any], device: torch.device) -> None:
    """Losses and all gradients of three steps, dropout 0."""
    models = [model.to(device) for model in pair(make, **options)]
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    for _ in range(3):
        x, y = torch.randn(2, 4, 3, 8, device=device)
        results = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(x, *((y,) if make is whole else ())).square().sub(y).square().mean()
            loss.backward()
            results.append([loss.detach(), *[p.grad.clone() for p in model.parameters()]])
            optimizer.step()
        torch.testing.assert_close(*results, rtol=2e-4, atol=2e-5)


def test_runs_as_one(device: torch.device) -> None:
    """Dropout, residual and norm in one call; Linear and activation; in eval without the dropouts."""
    layer: Any = ours.TransformerEncoderLayer(**sizes(dropout=0.1)).to(device)
    x = torch.randn(4, 3, 8, device=device)
    found = [d.module for d in fastlayers.explain(layer, x).decisions]
    assert {"dropout1 + add + norm1", "linear1 + relu", "dropout2 + add + norm2"} <= {*found}, found
    layer.norm_first = True
    found = [d.module for d in fastlayers.explain(layer, x).decisions]
    assert {"dropout1 + add + norm2", "dropout2 + add"} <= {*found}, found
    layer.eval().norm_first = False
    found = [d.module for d in fastlayers.explain(layer, x).decisions]
    assert {"add + norm1", "linear1 + relu + linear2", "add + norm2"} <= {*found}, found


def test_hooks_and_methods(device: torch.device) -> None:
    """Each child's hook sees what it sees of torch's, also in eval without gradients, and a method of one's own is called."""
    calls: list[list[Any]] = []
    models = pair(lambda nn: nn.TransformerDecoderLayer(**sizes()))
    x, memory = torch.randn(2, 4, 3, 8, device=device)
    for model in models:
        seen: list[Any] = []
        for name, child in model.to(device).eval().named_children():
            child.register_forward_hook(lambda module, args, result, name=name, seen=seen: seen.append((name, result)))
        with torch.no_grad():
            seen.append(("result", model(x, memory)))
        calls.append(seen)
    assert [name for name, _ in calls[0]] == [name for name, _ in calls[1]]
    assert len(calls[0]) == len([*models[0].children()]) + 1
    for (name, a), (_, b) in zip(*calls, strict=True):
        a, b = (t[0] if isinstance(t, tuple) else t for t in (a, b))
        torch.testing.assert_close(a, b, msg=name, rtol=1e-4, atol=1e-5)

    class Own(ours.TransformerEncoderLayer):
        def _ff_block(self, x: torch.Tensor) -> torch.Tensor:
            return x * 0

    layer = Own(**sizes()).to(device)
    y = layer(x)
    torch.testing.assert_close(layer.norm2(layer.norm1(x + layer.self_attn(x, x, x)[0])), y)


def test_padding(device: torch.device) -> None:
    """Masks in training and in eval, with and without gradients: where torch makes nested tensors, padded rows are 0."""
    a, b = (model.to(device) for model in pair(encoder))
    x = torch.randn(3, 5, 8, device=device)
    padding = torch.arange(5, device=device) >= torch.tensor([[5], [3], [2]], device=device)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(5, device=device)
    for training in (True, False):
        for model in (a, b):
            model.train(training)
        for grad in (True, False):
            with torch.set_grad_enabled(grad), fastlayers.policy("auto"):
                for masks in ({"src_key_padding_mask": padding}, {"mask": causal}, {"mask": causal, "is_causal": True}):
                    torch.testing.assert_close(a(x, **masks), b(x, **masks), rtol=1e-4, atol=1e-5)
    with torch.no_grad(), fastlayers.policy("auto"):
        zero = F.layer_norm(torch.zeros(8, device=device), (8,), a.norm.weight, a.norm.bias)
        torch.testing.assert_close(a(x, src_key_padding_mask=padding)[padding], zero.expand(5, 8))
        found = fastlayers.explain(a, x, src_key_padding_mask=padding).decisions
    assert "nested tensors" in [d.reason for d in found]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
def test_compiled(device: torch.device) -> None:
    torch._dynamo.reset()
    a, b = (model.to(device) for model in pair(whole))
    x, y = torch.randn(2, 4, 3, 8, device=device)
    compiled = torch.compile(a, backend="aot_eager", fullgraph=True)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(4, device=device)
    args = dict(tgt_mask=mask, tgt_is_causal=True)
    torch.testing.assert_close(compiled(x, y, **args), b(x, y, **args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [2, 4])
def test_a_layer_alone_in_eval(padded: int, device: torch.device) -> None:
    """As torch's without its fast path, also where all of a sequence is padding."""
    a, b = (model.to(device).eval() for model in pair(lambda nn: nn.TransformerEncoderLayer(**sizes(batch_first=True))))
    x, mask = torch.randn(2, 4, 8, device=device), torch.zeros(2, 4, dtype=torch.bool, device=device)
    mask[1, :padded] = True
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            want = b(x, src_key_padding_mask=mask)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    with torch.no_grad():
        torch.testing.assert_close(a(x, src_key_padding_mask=mask), want, rtol=1e-4, atol=1e-5)
    assert want.isfinite().all()


def test_a_norm_that_was_exchanged_for_a_dropout(device: torch.device) -> None:
    """Which passes on the sum that goes in, and not what was there before the sum."""
    a, b = pair(lambda nn: nn.TransformerEncoderLayer(**sizes(norm_first=True)))
    a.norm2, b.norm2 = ours.Dropout(0.0), torch.nn.Dropout(0.0)
    x = torch.randn(4, 2, 8, device=device)
    torch.testing.assert_close(a.to(device)(x), b.to(device)(x), rtol=1e-4, atol=1e-5)
