"""The plans of timm's and transformers' models in `python -m bench models` are as they are committed."""

from __future__ import annotations

import warnings

import pytest

from bench import models
from bench.packages import missing
from bench.real_models import MODELS


@pytest.mark.exam
@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.package is not None])
def test_plan_is_as_committed(name: str) -> None:
    reason = missing(str(MODELS[name].package))
    if reason is not None:
        pytest.skip(reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these packages' own
        assert models.main(["--plan", "--match", f"^{name} "]) == 0, "python -m bench models --plan --update"
