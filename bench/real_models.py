"""Models that people run, at their real sizes, and the ways to run one: torch's, ours, others'.

The models are those of timm and transformers, with random weights (nothing is downloaded), or what torch's tutorials write.
Everything is bfloat16. A training step is one with dropout, as the models' defaults have it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

import fastlayers

from . import networks
from .packages import missing, package

DTYPE = torch.bfloat16
PASSES = ("step", "inference")


class Whole(nn.Module):
    """A model and its loss: called with the classes, it gives the loss, without them the model's result."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: torch.Tensor, classes: torch.Tensor | None = None) -> torch.Tensor:
        result = self.model(x)
        return result if classes is None else self.criterion(result.flatten(0, -2), classes.flatten())


class _OfTransformers(Whole):
    """Their models compute their loss themselves."""

    def forward(self, x: torch.Tensor, classes: torch.Tensor | None = None) -> torch.Tensor:
        found = self.model(x, labels=classes, use_cache=False)
        return found.logits if classes is None else found.loss


class WordModel(nn.Module):
    """The LSTM of torch's word_language_model example, in the size that its README calls medium."""

    def __init__(self, words: int, units: int = 650):
        super().__init__()
        self.drop, self.embedding = nn.Dropout(0.5), nn.Embedding(words, units)
        self.lstm = nn.LSTM(units, units, num_layers=2, dropout=0.5)
        self.head = nn.Linear(units, words)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.lstm(self.drop(self.embedding(x)))[0]))


@dataclass(frozen=True)
class Model:
    """`shape`: the input's. `classes`: how many, or words."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    package: str | None = None
    words: bool = False

    def whole(self, device: torch.device | str) -> Whole:
        with torch.device(device):
            model = self.make()
            whole = _OfTransformers(model) if self.package == "transformers" else Whole(model)
        return whole.to(DTYPE)

    def inputs(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """The input, and the classes that the loss is told: the input's own words where it has words."""
        if self.words:
            x = torch.randint(self.classes, self.shape, device=device)
            return x, x
        x = torch.randn(self.shape, device=device, dtype=DTYPE)
        return x, torch.randint(self.classes, self.shape[:1], device=device)

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Transformers looks at every call whether several sentences are packed into one, waits for the GPU to know, and makes a
        mask where it can't wait, in a CUDA graph. None are packed here."""
        if self.package != "transformers":
            yield
            return
        masks = importlib.import_module("transformers.masking_utils")
        with mock.patch.object(masks, "find_packed_sequence_indices", return_value=None):
            yield


def _timm(name: str) -> nn.Module:
    return package("timm").create_model(name)


def _of_transformers(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = package("transformers")
        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return make


_IMAGES = (64, 3, 224, 224)
_LLAMA = dict(
    vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, max_position_embeddings=131_072,
)  # fmt: skip
"""Of Llama 3.2 1B."""

MODELS: dict[str, Model] = {
    "MLP": Model(lambda: networks.mlp(nn), (1024, 784), 10),
    "LSTM": Model(lambda: WordModel(33_278), (35, 20), 33_278, words=True),
    "ResNet-50": Model(functools.partial(_timm, "resnet50"), _IMAGES, 1000, "timm"),
    "ConvNeXt-T": Model(functools.partial(_timm, "convnext_tiny"), _IMAGES, 1000, "timm"),
    "ViT-B": Model(functools.partial(_timm, "vit_base_patch16_224"), _IMAGES, 1000, "timm"),
    "BERT-base": Model(
        _of_transformers("BertForMaskedLM", "BertConfig"), (16, 512), 30_522, "transformers", words=True
    ),
    "GPT-2": Model(
        _of_transformers("GPT2LMHeadModel", "GPT2Config", loss_type="ForCausalLM"),
        (8, 1024), 50_257, "transformers", words=True,
    ),
    "Llama 1B": Model(
        _of_transformers("LlamaForCausalLM", "LlamaConfig", **_LLAMA),
        (4, 1024), 128_256, "transformers", words=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How a model is run. `change` makes of it what is called, `around` is entered whenever it is made or called; `kind` is
    "torch", "ours" or "other"; `planned`: what it launches can be told without a GPU; `tier` as of `providers.Provider`."""

    kind: str
    change: Callable[[Whole], Callable[..., torch.Tensor]] = lambda whole: whole
    takes: Callable[[str, Model], bool] = lambda name, model: True
    package: str | None = None
    planned: bool = False
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    tier: int = 0

    def why_not(self, name: str, model: Model) -> str | None:
        """Why a model can't be run this way here."""
        if not self.takes(name, model):
            return "doesn't apply"
        return next((why for p in (model.package, self.package) if p and (why := missing(p))), None)

    @contextlib.contextmanager
    def settings(self, model: Model) -> Iterator[None]:
        """To be entered around the making of the model and each call of it."""
        with (
            fastlayers.policy("auto" if self.kind == "ours" else "torch"),
            self.around(),
            model.settings(),
        ):
            yield


def accelerated(whole: Whole) -> Whole:
    """Our layers, and our attention where the model is one of transformers."""
    fastlayers.accelerate(whole)
    if hasattr(whole.model, "set_attn_implementation"):
        transformers = package("transformers")
        masks = transformers.AttentionMaskInterface
        transformers.AttentionInterface.register("fastlayers", fastlayers.integrations.attention_forward)
        masks.register("fastlayers", masks()["sdpa"])
        whole.model.set_attn_implementation("fastlayers")
    return whole


def fused(whole: Whole) -> Whole:
    """Our layers and what `fuse` finds, attention and rotary embedding among it."""
    fastlayers.accelerate(whole, fuse=True)
    return whole


def _compiled(whole: Whole) -> Callable[..., torch.Tensor]:
    return torch.compile(whole, dynamic=False)


@contextlib.contextmanager
def _liger() -> Iterator[None]:
    """Liger-Kernel replaces names in transformers' module of Llama, and the model's forward. At the end all is as it was."""
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    causal = llama.LlamaForCausalLM
    with mock.patch.dict(vars(llama)), mock.patch.object(causal, "forward", causal.forward):
        importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama()
        yield


WAYS: dict[str, Way] = {
    "eager": Way("torch", planned=True),
    "accelerate": Way("ours", accelerated, planned=True),
    "fuse": Way("ours", fused, planned=True),
    "patched": Way("ours", accelerated, planned=True, around=fastlayers.patched),
    "Liger": Way("other", around=_liger, takes=lambda name, model: name == "Llama 1B", package="liger_kernel"),
    "compile": Way("torch", _compiled, tier=1),
    "accelerate, compile": Way("ours", lambda whole: _compiled(accelerated(whole)), tier=1),
}
