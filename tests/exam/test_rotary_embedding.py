"""fastlayers.integrations.replace_rotary in models of transformers, beside their own function."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from models import EXAMS, available, package
from test_exam import TWINS, _auto, drawn, exactly, judge, same_bits, train, twin  # noqa: F401

from fastlayers import integrations
from fastlayers.fusion import rotary


@pytest.mark.parametrize("name", ["llama", *[pytest.param(name, marks=pytest.mark.exam) for name in ("phi", "gemma")]])
def test_models_train_and_go_back(name: str, device: torch.device, launched: list[str]) -> None:
    """With all features turned, and with half of them."""
    exam = EXAMS[name]
    reason = available(exam)
    if reason is not None:
        pytest.skip(reason)
    model, batch = drawn(exam, device)
    twins = [twin(model) for _ in range(TWINS)]
    theirs = [train(exam, copy.deepcopy(m), batch) for m in (model, *twins)]
    exact = exactly(exam, model, batch)
    assert not launched
    changed = copy.deepcopy(model)
    with integrations.replace_rotary(changed) as replaced:
        assert replaced.names == (f"transformers.models.{name}.modeling_{name}.apply_rotary_pos_emb",)
        assert integrations.replace_rotary(changed).names == ()
        on_kernels = train(exam, changed, batch)
    assert {*launched} == {"_rotary_kernel"}
    judge(on_kernels, theirs, exact)

    model.load_state_dict(changed.state_dict())
    launched.clear()
    for one, other in zip(train(exam, changed, batch), train(exam, model, batch), strict=True):
        same_bits(one, other)
    assert not launched


@pytest.mark.exam
@pytest.mark.parametrize(
    ("name", "turned"), [("qwen3", 8), ("phi3", 6), ("nemotron", 4), ("glm", 4), ("helium", 8), ("cohere", 8)]
)
def test_functions_of_other_models(name: str, turned: int, device: torch.device, launched: list[str]) -> None:
    """Halves, some of the features, interleaved with the angles of halves, and interleaved; heads before and after positions."""
    if available(EXAMS["llama"]) is not None:
        pytest.skip("transformers isn't installed")
    package("transformers")
    theirs = importlib.import_module(f"transformers.models.{name}.modeling_{name}").apply_rotary_pos_emb
    ours = rotary.ours(theirs)
    assert ours is not None
    angles = torch.randn(2, 5, turned, device=device)
    for heads in (1, 2):
        shapes = [(2, h, 5, 8) if heads == 1 else (2, 5, h, 8) for h in (4, 2)]
        q, k = (torch.randn(shape, device=device) for shape in shapes)
        args = q, k, angles.cos(), angles.sin()
        torch.testing.assert_close(ours(*args, unsqueeze_dim=heads), theirs(*args, unsqueeze_dim=heads))
    assert launched == ["_rotary_kernel"] * 2
