"""Whole programs, converted by `accelerate`, beside themselves untouched: outputs, every gradient, every step."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlayers


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    with fastlayers.policy("auto"):
        yield


def both(model: nn.Module, device: torch.device, *converted: str) -> tuple[nn.Module, nn.Module]:
    """The model converted, and as it was. `converted` are the paths whose class must have changed."""
    theirs = model.to(device)
    ours = copy.deepcopy(theirs)
    # On a CPU torch drops other elements than our kernels, which follow its order on CUDA.
    exclude = () if device.type == "cuda" else nn.Dropout
    changed = {row.path for row in fastlayers.accelerate(ours, exclude=exclude).changed}
    assert changed >= set(converted), changed
    return ours, theirs


def paths_taken(model: nn.Module, *inputs: Any) -> dict[str, str]:
    """For every layer that ran: "triton", or why not."""
    return {d.module: d.reason or "triton" for d in fastlayers.explain(model, *inputs)}


def same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    named = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    for (name, p), (_, q) in named:
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def run(models: tuple[nn.Module, nn.Module], *inputs: torch.Tensor, **kwargs: Any) -> None:
    """Forward and backward of both, on inputs that require a gradient, dropout under one seed."""
    results = []
    for model in models:
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
        torch.manual_seed(1)
        y = model(*leaves, **kwargs)
        y.square().mean().backward()
        results.append([y, *(t.grad for t in leaves if t.requires_grad)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    same_gradients(*models)


@pytest.mark.filterwarnings("ignore")  # nested tensors are a prototype, says torch
def test_transformer(device: torch.device) -> None:
    """In training; in eval, where torch's encoder makes nested tensors of padded sequences; with masks and without."""
    model = nn.Transformer(16, 2, 2, 1, 24, dropout=0.1, batch_first=True)
    for m in model.modules():
        if isinstance(m, nn.MultiheadAttention):
            m.dropout = 0.0  # attention drops other weights than torch's
    models = both(model, device, "encoder.layers.0.linear1", "decoder.layers.0.linear2", "encoder.layers.0.self_attn")
    source, target = torch.randn(2, 5, 16, device=device), torch.randn(2, 4, 16, device=device)
    mask = nn.Transformer.generate_square_subsequent_mask(4, device=device)
    run(models, source, target)
    run(models, source, target, tgt_mask=mask)
    taken = paths_taken(models[0], source, target)
    assert taken["encoder.layers.0.linear1 + relu"] == taken["decoder.layers.0.linear2"] == "triton"
    assert taken["encoder.layers.0.self_attn"] == taken["decoder.layers.0.multihead_attn"] == "triton"
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2], device=device)
    for model in models:
        model.eval()
    with torch.no_grad():
        ours, theirs = (m(source, target, src_key_padding_mask=padding, tgt_mask=mask) for m in models)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Residual(nn.Module):
    """As in ResNet-18: two convolutions with BatchNorm, and a projection where the size changes."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + skip)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_resnet(memory_format: torch.memory_format, device: torch.device) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        Residual(4, 4, 1), Residual(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).to(memory_format=memory_format)  # fmt: skip
    models = both(model, device, "", "0", "2", "4.conv1", "4.relu", "5.downsample", "5.downsample.0", "8")
    x = torch.randn(3, 3, 20, 20, device=device).to(memory_format=memory_format)
    run(models, x)
    ours, theirs = (list(m.buffers()) for m in models)
    torch.testing.assert_close(ours, theirs)
    for model in models:
        model.eval()
    torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-4, atol=1e-5)
    taken = paths_taken(models[0], x)
    assert taken["5.conv2"] == taken["8"] == "triton"


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def block(channels: int, out: int) -> nn.Sequential:
            layers = nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(), nn.Conv2d(out, out, 3, padding=1), nn.ReLU()
            return nn.Sequential(*layers)

        self.down1, self.down2, self.up1 = block(1, 4), block(4, 6), block(8, 4)
        self.pool, self.up = nn.MaxPool2d(2), nn.ConvTranspose2d(6, 4, 2, 2)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.down1(x)
        up = self.up(self.down2(self.pool(skip)))
        return self.head(self.up1(torch.cat([skip, up], 1)))


def test_unet(device: torch.device) -> None:
    models = both(UNet(), device, "down1", "down1.0", "up1.3", "head")
    x = torch.randn(2, 1, 8, 8, device=device)
    run(models, x)
    taken = paths_taken(models[0], x)
    assert taken["up"] == "triton"
    assert taken["down2.0 + down2.1"] == taken["head"] == "triton"


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.lstm = nn.LSTM(6, 5, 2, batch_first=True, dropout=0.2, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, 3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        _, (hidden, _) = self.lstm(self.embedding(tokens))
        return self.head(torch.cat([hidden[-2], hidden[-1]], 1))


def test_lstm_classifier(device: torch.device) -> None:
    models = both(Classifier(), device, "head", "head.0", "head.3")
    run(models, torch.randint(13, (4, 6), device=device))
    assert type(models[0].lstm) is fastlayers.LSTM


def test_gan_with_gradient_penalty(device: torch.device) -> None:
    """Three steps of WGAN-GP: discriminator with a second derivative, generator through the discriminator."""
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 36), nn.Unflatten(1, (1, 6, 6)))
    critic = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 1)
    )
    pairs = both(nn.ModuleDict(dict(g=generator, c=critic)), device, "g.0", "c.0", "c.5")
    noise, real = torch.randn(3, 5, 4, device=device), torch.randn(3, 5, 1, 6, 6, device=device)
    mix = torch.rand(3, 5, 1, 1, 1, device=device)
    for model in pairs:
        g, c = model["g"], model["c"]
        steps = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (g, c)]
        for i in range(3):
            model.zero_grad()
            fake = g(noise[i]).detach()
            between = (mix[i] * real[i] + (1 - mix[i]) * fake).requires_grad_()
            (slope,) = torch.autograd.grad(c(between).sum(), between, create_graph=True)
            penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
            (c(fake).mean() - c(real[i]).mean() + 10 * penalty).backward()
            steps[1].step()
            g.zero_grad()
            (-c(g(noise[i])).mean()).backward()
            steps[0].step()
    for (name, p), (_, q) in zip(*(m.named_parameters() for m in pairs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


class Trainer:
    """A script that validates after every epoch, keeps the best checkpoint, and stops when nothing improves."""

    def __init__(self, model: nn.Module, data: list[torch.Tensor]):
        self.model, (self.x, self.y, self.val_x, self.val_y) = model, data
        self.optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.5)
        self.epoch, self.best, self.waited, self.history = 0, float("inf"), 0, []
        self.checkpoint = b""

    def save(self) -> bytes:
        file = io.BytesIO()
        parts = dict(model=self.model, optimizer=self.optimizer, schedule=self.schedule)
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save(state | dict(epoch=self.epoch, best=self.best, waited=self.waited), file)
        return file.getvalue()

    def resume(self, checkpoint: bytes) -> Trainer:
        state = torch.load(io.BytesIO(checkpoint), weights_only=True)
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.epoch, self.best, self.waited = state["epoch"], state["best"], state["waited"]
        return self

    def train(self, epochs: int, patience: int) -> Trainer:
        while self.epoch < epochs and self.waited < patience:
            self.model.train()
            for x, y in zip(self.x.split(8), self.y.split(8), strict=True):
                self.optimizer.zero_grad()
                F.cross_entropy(self.model(x), y).backward()
                self.optimizer.step()
            self.schedule.step()
            self.model.eval()
            with torch.no_grad():
                loss = F.cross_entropy(self.model(self.val_x), self.val_y).item()
            self.history.append(loss)
            self.epoch += 1
            self.waited = 0 if loss < self.best else self.waited + 1
            if loss < self.best:
                self.best = loss
                self.checkpoint = self.save()
        return self


def test_early_stopping_and_checkpoints_across(device: torch.device) -> None:
    """Stops in the same epoch with the same losses; interrupted and resumed by the other, as if nothing had happened."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 3)).to(device)

    def ours() -> nn.Module:
        converted = model()
        fastlayers.accelerate(converted)
        return converted

    torch.manual_seed(0)  # the same noise always, so that it does stop early
    x, y = torch.randn(24, 6, device=device), torch.randint(3, (24,), device=device)
    data = [x, y, torch.randn(9, 6, device=device), torch.randint(3, (9,), device=device)]
    start = Trainer(model(), data).save()
    through = Trainer(model(), data).resume(start).train(12, patience=2)
    assert through.waited == 2, "noise for labels: it must have stopped early"
    torch.testing.assert_close(
        Trainer(ours(), data).resume(start).train(12, patience=2).history, through.history, rtol=1e-3, atol=1e-4
    )
    for first, second in ((model, ours), (ours, model)):
        half = Trainer(first(), data).resume(start).train(1, patience=2)
        rest = Trainer(second(), data).resume(half.save()).train(12, patience=2)
        torch.testing.assert_close(half.history + rest.history, through.history, rtol=1e-3, atol=1e-4)
        best = Trainer(second(), data).resume(rest.checkpoint or half.checkpoint)
        assert best.best == rest.best
