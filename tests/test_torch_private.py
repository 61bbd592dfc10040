"""Private names of torch: each may be missing in another version, or take other arguments. Then its fallback serves.

Looks inside: this is the one test of fastlayers/_torch.py.
"""

from __future__ import annotations

import importlib.util
import operator
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "fastlayers" / "_torch.py"
NAMES = re.findall(r'_private\(\s*"([\w.]+)"', SOURCE.read_text())


def load() -> Any:
    """A copy of the module, imported anew."""
    spec: Any = importlib.util.spec_from_file_location("fastlayers_torch_copy", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def owner(path: str) -> tuple[Any, str]:
    parent, _, name = path.rpartition(".")
    return (operator.attrgetter(parent)(torch) if parent else torch), name


def uses_its_fallbacks(module: Any) -> None:
    """Every function answers, and none of them claims that nobody watches where it can't know."""
    x = torch.zeros(3)
    for answer in (module.forward_mode(), module.exporting(), module.only_default_devices(), module.unseen()):
        assert type(answer) is bool
    assert module.any_autocast() in (True, False)
    assert type(module.has_own_memory(x)) is bool
    assert module.will_run(torch.zeros(1, requires_grad=True).clone().grad_fn) is True
    assert module.fp32_precision("cuda", "matmul") in ("ieee", "tf32", "none")
    assert module.fp32_precision("cuda", "conv") in ("ieee", "tf32", "none")
    assert type(module.autocast_keeps_casts("cpu")) is bool
    assert module.softmax_dim("softmax", 2, 3) == 1
    assert not module.is_watched_module(torch.nn.Linear(1, 1))
    module.has_global_hook()
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with module.dispatch_mode(Mode()):
        x + 1
    assert seen
    for allocate in module.empty_strided.values():
        assert allocate((2,), (1,), torch.float32).shape == (2,)
        break


def test_the_names_are_found() -> None:
    assert len(NAMES) > 20
    assert load().MISSING == []


def test_no_other_file_has_private_names() -> None:
    for path in [*ROOT.glob("fastlayers/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        if path.name != "_torch.py":
            found = re.findall(r"\b(?:torch|nn)(?:\.\w+)*\._[A-Za-z]\w*", path.read_text())
            assert not found, (path, found)


@pytest.mark.parametrize("path", [path for path in NAMES if not path.startswith("Tensor.")])
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_without_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(*owner(path))
    module = load()
    assert [path] == module.MISSING
    monkeypatch.undo()  # torch itself needs it
    uses_its_fallbacks(module)


@pytest.mark.parametrize("path", [path for path in NAMES if not path.endswith("cuda")])  # not tried without a GPU
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_with_another_signature(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*owner(path), lambda one, two, *, three: None)
    module = load()
    assert [path] == module.MISSING
    monkeypatch.undo()
    uses_its_fallbacks(module)


PROGRAM = """
import importlib.util, sys, operator, torch
import torch.utils._device, torch.overrides
import torch._dynamo
names, kept = sys.argv[2].split(","), []
for path in names:
    parent, _, name = path.rpartition(".")
    where = operator.attrgetter(parent)(torch) if parent else torch
    if hasattr(where, name) and not path.startswith("Tensor."):
        kept.append((where, name, getattr(where, name)))
        delattr(where, name)
spec = importlib.util.spec_from_file_location("fastlayers._torch", "fastlayers/_torch.py")
sys.modules[spec.name] = _torch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_torch)
for where, name, value in kept:  # torch itself needs them, whatever else of it is imported
    setattr(where, name, value)
import fastlayers
assert fastlayers.dispatch.support._torch is _torch
from fastlayers import nn
tried = {n for n in names if not n.startswith(("Tensor.", "_C._push")) and not n.endswith("cuda")}  # nor one of a pair alone
assert tried <= set(_torch.MISSING), _torch.MISSING
fastlayers.policy(sys.argv[1])
make = lambda nn: nn.Sequential(
    nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3), nn.Softmax(1))
ours, theirs = make(nn), make(torch.nn)
theirs.load_state_dict(ours.state_dict())
for _ in range(3):
    x = torch.randn(2, 2, 4, 4, requires_grad=True)
    results = []
    for model in (ours, theirs):
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    torch.testing.assert_close(*results)
(first,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
(other,) = torch.autograd.grad(theirs(x).square().sum(), x, create_graph=True)
torch.testing.assert_close(torch.autograd.grad(first.sum(), x), torch.autograd.grad(other.sum(), x))
fastlayers.policy("auto")
a = torch.autograd.functional.jacobian(ours, x, vectorize=True)
torch.testing.assert_close(a, torch.autograd.functional.jacobian(theirs, x, vectorize=True))
with torch.autocast("cpu", dtype=torch.float16):
    assert ours(x).dtype == theirs(x).dtype
torch.testing.assert_close(torch.compile(ours, backend="aot_eager")(x), theirs(x))
torch.testing.assert_close(torch.func.vmap(ours)(x[None]), theirs(x)[None])
with torch.no_grad():
    torch.testing.assert_close(fastlayers.fuse(ours.eval())(x), theirs.eval()(x))
print("fine")
"""

WATCHING = [
    n for n in NAMES if n.startswith(("_C._is", "_C._are", "_C._len", "_C._functorch", "overrides", "_is", "nn."))
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "names"),
    [("auto", NAMES), ("triton", [n for n in NAMES if n not in WATCHING])],
    ids=["none of them", "only those that say who watches"],
)
def test_everything_works(policy: str, names: list[str]) -> None:
    """Networks trained, differentiated twice, compiled, fused and mapped, with the fallbacks of many names at once."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, policy, ",".join(names)],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr[-3000:]
