"""Tiny configurations of models that other people wrote, with random weights: nothing is downloaded.

They are as small as they can be and still be themselves: the interpreter is slow. Dropout is 0, since torch's CPU generator and
our kernels, which follow its order on CUDA, draw other numbers.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bench.packages import missing, package


class Exam(NamedTuple):
    """`model` makes the model, `batch` what it is called with, `loss` gives what is minimised and what is also compared."""

    package: str
    model: Callable[[], nn.Module]
    batch: Callable[[], dict[str, torch.Tensor]]
    loss: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]


EXAMS: dict[str, Exam] = {}


# --- transformers -----------------------------------------------------------------------------------------------------

WORDS, LENGTH = 40, 9


def _words(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, WORDS, (2, length))


def _labelled() -> dict[str, torch.Tensor]:
    words = _words()
    return dict(input_ids=words, labels=words)


def _padded() -> dict[str, torch.Tensor]:
    """The second sentence ends early, and what is behind its end has no loss."""
    words = _words()
    mask = torch.ones_like(words)
    mask[1, LENGTH - 3 :] = 0
    return dict(input_ids=words, attention_mask=mask, labels=words.masked_fill(mask == 0, -100))


def _own_loss(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return output.loss, output.logits


def _transformers(
    name: str,
    model: str,
    config: str,
    batch: Callable[[], dict[str, torch.Tensor]] = _labelled,
    loss: Callable[[Any], tuple[torch.Tensor, torch.Tensor]] = _own_loss,
    **settings: Any,
) -> None:
    def make() -> nn.Module:
        transformers = package("transformers")
        return getattr(transformers, model)(getattr(transformers, config)(**settings)).train()

    EXAMS[name] = Exam("transformers", make, batch, loss)


_DECODER: dict[str, Any] = dict(
    vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip

_transformers(
    "gpt2", "GPT2LMHeadModel", "GPT2Config",
    vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_transformers("llama", "LlamaForCausalLM", "LlamaConfig", _padded, **_DECODER)
_transformers("qwen3", "Qwen3ForCausalLM", "Qwen3Config", head_dim=8, **_DECODER)
_transformers("mistral", "MistralForCausalLM", "MistralConfig", sliding_window=4, **_DECODER)
_transformers("gemma", "GemmaForCausalLM", "GemmaConfig", head_dim=8, **_DECODER)
_transformers("gemma2", "Gemma2ForCausalLM", "Gemma2Config", head_dim=8, sliding_window=4, **_DECODER)
_transformers("phi", "PhiForCausalLM", "PhiConfig", resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0, **_DECODER)
_transformers(
    "mixtral", "MixtralForCausalLM", "MixtralConfig", num_local_experts=3, num_experts_per_tok=2,
    **{**_DECODER, "num_hidden_layers": 1},
)  # fmt: skip
_transformers(
    "bert", "BertForMaskedLM", "BertConfig", _padded,
    vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
_transformers(
    "t5", "T5ForConditionalGeneration", "T5Config", _padded,
    vocab_size=WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0,
)  # fmt: skip


def _pictures() -> dict[str, torch.Tensor]:
    return dict(pixel_values=torch.randn(2, 3, 16, 16), labels=torch.randint(5, (2,)))


_transformers(
    "vit", "ViTForImageClassification", "ViTConfig", _pictures,
    image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=5,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def _captioned() -> dict[str, torch.Tensor]:
    words = _words()
    words[:, -1] = 2
    return dict(input_ids=words, pixel_values=torch.randn(2, 3, 16, 16))


def _similar(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's loss: each caption belongs to its own picture."""
    logits, own = output.logits_per_text, torch.arange(2, device=output.logits_per_text.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2, logits


_TOWER = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, attention_dropout=0.0)
_transformers(
    "clip", "CLIPModel", "CLIPConfig", _captioned, _similar, projection_dim=8,
    text_config=dict(_TOWER, vocab_size=WORDS, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0),
    vision_config=dict(_TOWER, image_size=16, patch_size=8),
)  # fmt: skip


def _spoken() -> dict[str, torch.Tensor]:
    return dict(input_features=torch.randn(2, 8, 24), labels=_words(6))


_transformers(
    "whisper", "WhisperForConditionalGeneration", "WhisperConfig", _spoken,
    vocab_size=WORDS, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=12, max_target_positions=12,
    dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip


# --- timm -------------------------------------------------------------------------------------------------------------


def _classes(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first half of the batch is of class 1, the other of class 2."""
    of = torch.arange(len(output), device=output.device) * 2 // len(output) + 1
    return F.cross_entropy(output, of), output


def _in_timm(name: str, module: str, make: Callable[[Any], nn.Module], size: int, count: int = 2) -> None:
    def model() -> nn.Module:
        package("timm")
        return make(importlib.import_module(f"timm.models.{module}")).train()

    EXAMS[f"timm_{name}"] = Exam("timm", model, lambda: dict(x=torch.randn(count, 3, size, size)), _classes)


def _inverted(m: Any, *stages: str) -> list[Any]:
    """The arguments of timm's EfficientNet and MobileNet: what a stage repeats, in timm's own words."""
    return m.decode_arch_def([[stage] for stage in stages])


_in_timm(
    "resnet",
    "resnet",
    lambda m: m.ResNet(m.Bottleneck, (1, 1, 1, 1), num_classes=5, output_stride=8, channels=(4, 4, 4, 8)),
    size=16,
    count=3,
)
_in_timm(
    "convnext",
    "convnext",
    lambda m: m.ConvNeXt(num_classes=5, patch_size=2, output_stride=8, depths=(1, 1, 1, 1), dims=(8, 8, 12, 12)),
    size=16,
)
_in_timm(
    "efficientnet",
    "efficientnet",
    lambda m: m.EfficientNet(
        _inverted(m, "ds_r1_k3_s1_e1_c8_se0.25", "ir_r1_k5_s2_e2_c8_se0.25"),
        num_classes=5,
        num_features=16,
        stem_size=8,
        act_layer=nn.SiLU,
    ),
    size=8,
    count=4,
)
_in_timm(
    "mobilenet",
    "mobilenetv3",
    lambda m: m.MobileNetV3(
        _inverted(m, "ds_r1_k3_s1_e1_c8_se0.25_nre", "ir_r1_k5_s2_e2_c8_se0.25"),
        num_classes=5,
        num_features=16,
        stem_size=8,
        act_layer=nn.Hardswish,
    ),
    size=8,
    count=4,
)
_in_timm(
    "swin",
    "swin_transformer",
    lambda m: m.SwinTransformer(
        img_size=16,
        patch_size=2,
        num_classes=5,
        embed_dim=16,
        depths=(2, 1),
        num_heads=(2, 2),
        window_size=4,
        drop_path_rate=0.0,
    ),
    size=16,
)
_in_timm(
    "vit",
    "vision_transformer",
    lambda m: m.VisionTransformer(
        img_size=16, patch_size=8, num_classes=5, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2
    ),
    size=16,
)


# --- what every tutorial has ------------------------------------------------------------------------------------------


class Double(nn.Sequential):
    """Two convolutions, each with its norm and ReLU."""

    def __init__(self, channels: int, out: int):
        def layers(before: int) -> tuple[nn.Module, ...]:
            return nn.Conv2d(before, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)

        super().__init__(*layers(channels), *layers(out))


class UNet(nn.Module):
    """Down, across, and up again beside what was on the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Double(3, 4), Double(4, 8)
        self.pool = nn.MaxPool2d(2)
        self.up, self.last = nn.ConvTranspose2d(8, 4, 2, stride=2), Double(8, 4)
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        across = self.first(x)
        below = self.second(self.pool(across))
        return self.head(self.last(torch.cat([across, self.up(below)], dim=1)))


def _pixels(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return F.cross_entropy(output, output.detach().argmin(1)), output


class Tagger(nn.Module):
    """Words to an LSTM in both directions to tags."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 12, padding_idx=0)
        self.lstm = nn.LSTM(12, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 5)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(words))[0])


def _tags(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return F.cross_entropy(
        output.flatten(0, 1), torch.arange(len(output.flatten(0, 1)), device=output.device) % 5
    ), output


def _square(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return output.square().mean(), output


EXAMS["unet"] = Exam("torch", UNet, lambda: dict(x=torch.randn(2, 3, 8, 8)), _pixels)
EXAMS["lstm_tagger"] = Exam("torch", Tagger, lambda: dict(words=_words(7)), _tags)
EXAMS["transformer"] = Exam(
    "torch",
    functools.partial(nn.Transformer, 16, 2, 1, 1, 24, dropout=0.0, batch_first=True),
    lambda: dict(src=torch.randn(2, 6, 16), tgt=torch.randn(2, 5, 16)),
    _square,
)


def available(exam: Exam) -> str | None:
    """Why an exam can't be held here."""
    return missing(exam.package)
