"""fastlayers.nn and fastlayers.functional are torch's namespaces in every way that a program can use them."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

import fastlayers
from fastlayers import nn
from fastlayers.catalog import CLASSES, ROWS

FUNCTIONS = {name for row in ROWS for name in (row.function, *row.functions) if hasattr(torch.nn.functional, str(name))}


def ours(theirs: Any) -> Any:
    """What fastlayers.nn is to have for an object of torch.nn's."""
    if theirs is torch.nn.functional:
        return fastlayers.functional
    if isinstance(theirs, type) and theirs in CLASSES:
        return CLASSES[theirs]
    for name in FUNCTIONS:
        if theirs is getattr(torch.nn.functional, name):
            return getattr(fastlayers.functional, name)
    return theirs


def walk(mine: Any, theirs: Any, seen: set[str]) -> int:
    """The number of attributes compared."""
    count = 0
    for name in dir(theirs):
        b = getattr(theirs, name)
        if name.startswith("__") or (name.startswith("_") and isinstance(b, types.ModuleType)):
            continue
        a = getattr(mine, name)
        if isinstance(b, types.ModuleType) and b.__name__.startswith("torch.nn."):
            assert a.__name__.startswith("fastlayers.") or theirs is torch.nn.functional, name
            if b.__name__ not in seen:
                seen.add(b.__name__)
                count += walk(a, b, seen)
        else:
            # torch keeps private second names of some of its functions.
            assert a is ours(b) or (name.startswith("_") and a is b), (theirs.__name__, name)
            count += 1
    return count


def test_every_attribute() -> None:
    assert walk(nn, torch.nn, set()) > 1000


def test_every_submodule_can_be_imported() -> None:
    count = 0
    for found in pkgutil.walk_packages(torch.nn.__path__, "torch.nn."):
        try:
            theirs = importlib.import_module(found.name)
        except ImportError:
            continue  # needs what isn't installed
        if found.name.startswith("torch.nn.functional"):
            continue
        mine = importlib.import_module("fastlayers" + found.name.removeprefix("torch"))
        assert sys.modules[found.name] is theirs, "torch's own module was imported a second time"
        assert walk(mine, theirs, {found.name}) >= 0
        count += 1
    assert count > 60


def test_what_torch_does_not_have() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fastlayers.nn.nothing_of_this_name")
    with pytest.raises(AttributeError):
        nn.nothing_of_this_name  # noqa: B018


def test_in_a_cold_process() -> None:
    """Submodules first, before the package itself was imported."""
    code = (
        "import fastlayers.nn.utils.rnn as rnn\n"
        "from fastlayers.nn.modules.linear import Linear\n"
        "from fastlayers.nn.utils import clip_grad_norm_\n"
        "from fastlayers.nn.modules import *\n"
        "import torch, fastlayers\n"
        "assert Linear is fastlayers.nn.Linear and rnn.pad_sequence is torch.nn.utils.rnn.pad_sequence\n"
        "assert clip_grad_norm_ is torch.nn.utils.clip_grad_norm_ and Conv2d is fastlayers.Conv2d\n"
        "layer = fastlayers.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2))\n"
        "assert len(list(layer.parameters())) == 3 and isinstance(layer, torch.nn.Module)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_later_changes_of_torch_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attributes are looked up, not copied."""
    marker = object()
    monkeypatch.setattr(torch.nn.utils.rnn, "pad_sequence", marker)
    assert nn.utils.rnn.pad_sequence is marker
