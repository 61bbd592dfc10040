"""Packages that models come from, imported where they are installed. The bench and tests/exam take them from here."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from typing import Any
from unittest import mock

from torch import nn


def package(name: str) -> Any:
    """The package, imported with its warnings unheard: they aren't ours to judge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _timm() if name == "timm" else importlib.import_module(name)


def missing(name: str) -> str | None:
    """Why a package can't be imported here."""
    if importlib.util.find_spec(name) is None:
        return f"{name} isn't installed: pip install -c constraints.txt '.[exam]', or make exam"
    return None


def _timm() -> Any:
    """timm imports torchvision, for images and data sets that no model needs. PyPI's build works with CUDA's torch alone, so that
    where it is missing something stands in for it during the import."""
    if "timm" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("timm")
    within = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".utils")
    names = [f"torchvision{name}" for name in within]
    for name in names:
        sys.modules[name] = mock.MagicMock(FrozenBatchNorm2d=type("FrozenBatchNorm2d", (nn.Module,), {}))
    try:
        return importlib.import_module("timm")
    finally:
        for name in names:
            del sys.modules[name]
