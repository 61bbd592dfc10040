"""fastlayers.integrations.attention_forward as transformers' models call it, beside their "sdpa"."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import EXAMS, available, package
from test_exam import TWINS, _auto, drawn, exactly, judge, same_bits, train, twin  # noqa: F401

import fastlayers
from fastlayers.testing import assert_within_budget

ATTENTION = {"attention_kernel", "attention_dq_kernel", "attention_dkdv_kernel"}


@pytest.fixture(autouse=True)
def _registered() -> None:
    reason = available(EXAMS["llama"])
    if reason is not None:
        pytest.skip(reason)
    transformers = package("transformers")
    transformers.AttentionInterface.register("fastlayers", fastlayers.integrations.attention_forward)
    masks = transformers.AttentionMaskInterface
    masks.register("fastlayers", masks()["sdpa"])


def with_sdpa(name: str, device: torch.device) -> tuple[Any, dict[str, torch.Tensor]]:
    model: Any
    model, batch = drawn(EXAMS[name], device)
    model.set_attn_implementation("sdpa")
    return model, batch


def ours(model: Any) -> Any:
    other = copy.deepcopy(model)
    other.set_attn_implementation("fastlayers")
    return other


@pytest.mark.parametrize(
    "name", ["llama", *[pytest.param(name, marks=pytest.mark.exam) for name in ("mistral", "gpt2", "whisper", "t5")]]
)
def test_models_train_and_go_back(name: str, device: torch.device, launched: list[str]) -> None:
    """Grouped heads with padding, a sliding window, an encoder with its decoder, a bias that is learned."""
    exam = EXAMS[name]
    model, batch = with_sdpa(name, device)
    changed = ours(model)
    found = [d for d in fastlayers.explain(changed, **batch) if d.op == "scaled_dot_product_attention"]
    assert found
    assert {d.reason for d in found} == {None}
    launched.clear()
    on_kernels = train(exam, changed, batch)
    assert {*launched} == ATTENTION | ({"attention_mask_grad_kernel"} if name == "t5" else set())
    twins = [twin(model) for _ in range(TWINS)]
    judge(on_kernels, [train(exam, copy.deepcopy(m), batch) for m in (model, *twins)], exactly(exam, model, batch))

    changed.set_attn_implementation("sdpa")
    model.load_state_dict(changed.state_dict())
    launched.clear()
    for one, other in zip(train(exam, changed, batch), train(exam, model, batch), strict=True):
        same_bits(one, other)
    assert not launched


@pytest.mark.exam
@pytest.mark.parametrize("cache", ["DynamicCache", "StaticCache"])
def test_one_word_after_others(cache: str, device: torch.device, launched: list[str]) -> None:
    """Padded on the left, and with room in the cache for more words than there are."""
    model, batch = with_sdpa("llama", device)
    words, mask = batch["input_ids"], batch["attention_mask"].flip(1)

    def logits(model: Any) -> list[torch.Tensor]:
        kwargs = dict(max_cache_len=16) if cache == "StaticCache" else {}
        with torch.no_grad():
            kept = getattr(package("transformers"), cache)(config=model.config, **kwargs)
            first = model(words[:, :-1], attention_mask=mask[:, :-1], past_key_values=kept, use_cache=True)
            return [first.logits[:, -1], model(words[:, -1:], attention_mask=mask, past_key_values=kept).logits[:, 0]]

    theirs = [logits(m) for m in (model, *[twin(model) for _ in range(TWINS)])]
    assert not launched
    found = logits(ours(model))
    assert [*launched] == ["attention_kernel"] * 4  # two layers, twice
    exact = logits(copy.deepcopy(model).double())
    for i, (one, right) in enumerate(zip(found, exact, strict=True)):
        assert_within_budget(one, [each[i] for each in theirs], right, str(i))


@pytest.mark.exam
def test_softcap_raises(device: torch.device) -> None:
    """Gemma 2 has one, for which transformers doesn't let it have "sdpa" either."""
    model, batch = drawn(EXAMS["gemma2"], device)
    with pytest.raises(ValueError, match="softcap"):
        ours(model)(**batch)
