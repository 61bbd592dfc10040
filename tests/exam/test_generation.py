"""Words that fused models generate with a cache: those of the untouched model."""

from __future__ import annotations

import copy

import pytest
import torch
from models import EXAMS, available
from test_exam import _auto, drawn  # noqa: F401

import fastlayers


@pytest.mark.parametrize(
    "name", ["llama", *[pytest.param(n, marks=pytest.mark.exam) for n in ("gpt2", "whisper", "t5")]]
)
def test_the_same_words(name: str, device: torch.device, launched: list[str]) -> None:
    """One sentence after the other, with a mask where the model is given one, in float64: no two words are nearly as likely."""
    if available(EXAMS[name]) is not None:
        pytest.skip("transformers isn't installed")
    model, batch = drawn(EXAMS[name], device)
    model, batch = model.eval().double(), {k: x.double() if x.is_floating_point() else x for k, x in batch.items()}
    batch.pop("labels")
    if name == "llama":
        batch["attention_mask"] = batch["attention_mask"].flip(1)
    ours = copy.deepcopy(model)
    fastlayers.accelerate(ours, fuse=True)
    words = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    for cache in (True, False):
        expected = model.generate(**batch, **words, use_cache=cache)
        assert not launched
        assert torch.equal(ours.generate(**batch, **words, use_cache=cache), expected)
        assert ("attention_kernel" in launched) or name == "t5"
        launched.clear()
