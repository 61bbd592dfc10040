"""Programs that import torch.nn, on our layers with no line changed: `fastlayers.patched` and `python -m fastlayers run`."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn import Linear
from torch.nn.functional import relu

import fastlayers
import fastlayers.functional as FL
from fastlayers import _originals

PROGRAMS = Path(__file__).parent / "programs"
ROOT = str(Path(fastlayers.__file__).parent.parent)


def look() -> dict[Any, Any]:
    """What could be left behind. Dynamo adds names of its own to modules, and keeps torch.nn.Module.__init__ wrapped."""
    spaces = (F, torch.nn.Module, Linear, torch.nn.TransformerEncoderLayer)
    found = {(space, name): value for space in spaces for name, value in vars(space).items() if "__" not in name[1:]}
    inits = {cls: cls.__init__ for cls in spaces[2:]}
    return {**found, **inits, "defaults": inits[torch.nn.TransformerEncoderLayer].__defaults__}


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    """As users have it; and nothing is left behind."""
    before = look()
    with fastlayers.policy("auto"):
        yield
    after = look()
    assert [key for key, value in before.items() if after[key] != value] == []


class Own(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 4))
        self.own, self.lazy = Own(4, 4), torch.nn.LazyLinear(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(self.lazy(self.own(relu(self.body(x)))), -1)


@pytest.mark.parametrize("name", sorted(path.stem for path in PROGRAMS.glob("*.py")))
def test_programs(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They print the same, and everything that we have runs on the kernels."""
    monkeypatch.setattr(sys, "argv", [name])
    printed = []
    for ran in (None, fastlayers.patched()):
        with ran or fastlayers.policy("torch") as counted, contextlib.suppress(SystemExit):
            runpy.run_path(str(PROGRAMS / f"{name}.py"), run_name="__main__")
        printed.append([float(number) for number in re.findall(r"\d+\.\d+|\d+", capsys.readouterr().out)])
    torch.testing.assert_close(*printed, rtol=1e-3, atol=2e-3)
    assert counted is not None
    assert not counted.left
    assert sum(counted.layers.values()) >= 3
    assert sum(counted.kernels.values()) > 20
    assert {reason for _, reason in counted.torchs} <= {f"fastlayers has no {n}" for n, _ in counted.torchs}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_what_is_built_within(device: torch.device) -> None:
    with fastlayers.patched() as ran:
        model = Net().to(device)
        x = torch.randn(5, 3, device=device)
        y = model(x)
    kinds = [type(m) for m in model.modules()][1:]
    ours = fastlayers.nn
    assert kinds == [ours.Sequential, ours.Linear, ours.GELU, ours.Linear, Own, ours.Linear]
    assert all(isinstance(m, Linear) for m in (model.body[0], model.own, model.lazy))
    torch.testing.assert_close(model(x), y)
    assert ran.layers == {"Linear": 2, "GELU": 1, "Sequential": 1, "LazyLinear": 1}
    assert ran.torchs == {("Own", "a subclass of Linear"): 1}
    assert ran.kernels["matmul_kernel"] == 4, (
        "one each, the subclass's by the function that it calls; the GELU's in the first"
    )
    assert not ran.left
    fastlayers.restore(model)
    assert not any(type(m).__module__.startswith("fastlayers") for m in model.modules())
    torch.testing.assert_close(model(x), y)


def test_counts(device: torch.device) -> None:
    """Of replays as of launches, and of calls that torch's functions took, with the reason."""
    with fastlayers.patched() as ran:
        layer, x = torch.nn.Linear(3, 3).to(device), torch.randn(4, 3, device=device)
        for _ in range(5):
            layer(x)
        F.relu(x.int())
        with fastlayers.policy("torch"):
            layer(x)
    layer(x)
    F.relu(x.int())
    assert ran.kernels == {"matmul_kernel": 5}
    assert ran.left == {("relu", "dtype torch.int32"): 1, ("linear", 'policy is "torch"'): 1}
    lines = str(ran).split("\n")
    assert lines[0] == "layers accelerated    1  Linear"
    assert lines[1] == "layers left to torch  0"
    assert lines[-1] == '                      1  linear         policy is "torch"'


def test_layers_are_fused_as_ever(device: torch.device) -> None:
    """Our functions in torch.nn.functional aren't a replacement that layers step aside for."""
    with fastlayers.patched():
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).to(device)
        (decision,) = fastlayers.explain(model, torch.randn(2, 3, device=device))
        assert decision.module == "0 + 1 + 2"
        assert fastlayers.accelerate(torch.nn.Sequential()).rows[0].reason == "accelerated already"


@pytest.mark.filterwarnings("ignore:.*(deprecated|size_average):UserWarning")  # torch's own
@pytest.mark.parametrize("name", sorted(_originals.stand_ins))
def test_functions(name: str) -> None:
    """torch's name, ours within; and ours hand over to torch's own, not to themselves."""
    theirs = getattr(F, name)
    with fastlayers.patched():
        assert getattr(F, name) is getattr(FL, name) is not theirs
        with fastlayers.patched():
            pass
        assert getattr(F, name) is getattr(FL, name)
        with pytest.raises((TypeError, AttributeError)):
            getattr(F, name)(*["no tensor"] * 3)
    assert getattr(F, name) is theirs


def test_torchs_layers_call_our_functions(device: torch.device) -> None:
    """And torch's own tests of what a function is hold."""
    torch.manual_seed(0)
    with fastlayers.patched() as ran:
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).to(device)
        x = torch.randn(2, 3, 8, device=device)
        y = layer(x)
        given = [torch.nn.TransformerEncoderLayer(8, 2, activation=f) for f in ("relu", F.relu, "gelu", F.gelu)]
        assert [layer.activation_relu_or_gelu, *[g.activation_relu_or_gelu for g in given]] == [1, 1, 1, 2, 2]
    assert ran.kernels["matmul_kernel"] >= 2
    fastlayers.restore(layer)
    with fastlayers.policy("torch"):
        torch.testing.assert_close(layer(x), y)


def test_what_the_program_replaces_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the block, and within it."""

    def before(x: Any) -> Any:
        return x + 1

    def within(x: Any) -> Any:
        return x + 2

    with monkeypatch.context() as patch:
        patch.setattr(F, "silu", before)
        patch.setattr(F, "gelu", F.gelu)  # so that it is put back at the end
        patch.setattr(torch.nn.Module, "__init__", torch.nn.Module.__init__)
        with fastlayers.patched():
            assert F.silu is before
            F.gelu = within  # type: ignore[assignment]
            init = torch.nn.Module.__init__
            torch.nn.Module.__init__ = lambda self, *a, **k: init(self, *a, **k)  # type: ignore[method-assign]
            assert type(torch.nn.Linear(2, 2)) is fastlayers.Linear
        assert (F.silu, F.gelu) == (before, within)
        assert type(torch.nn.Linear(2, 2)) is torch.nn.Linear, "though the program still calls our function"
        with fastlayers.patched() as ran:
            assert type(torch.nn.Linear(2, 2)) is fastlayers.Linear
        assert ran.layers == {"Linear": 1}


class Stop(BaseException):
    pass


def test_it_ends_whatever_happens() -> None:
    theirs, init = F.relu, torch.nn.Module.__init__
    with pytest.raises(Stop), fastlayers.patched():
        raise Stop

    @fastlayers.patched()
    def fails() -> None:
        assert F.relu is FL.relu
        assert torch.nn.Module.__init__ is not init
        raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            fails()
        assert (F.relu, torch.nn.Module.__init__) == (theirs, init)


def test_blocks_of_threads_overlap() -> None:
    """The last one that ends puts back what was there."""
    theirs, errors = F.relu, []
    inside, leave = threading.Barrier(3), threading.Event()

    def block(wait: bool) -> None:
        try:
            with fastlayers.patched() as ran:
                inside.wait(30)
                torch.nn.ReLU()
                if wait:
                    leave.wait(30)
                assert ran.layers["ReLU"] >= 1
        except BaseException as error:
            errors.append(error)

    first, second = (threading.Thread(target=block, args=(wait,)) for wait in (False, True))
    first.start()
    second.start()
    inside.wait(30)
    first.join()
    assert F.relu is FL.relu
    assert type(torch.nn.Linear(2, 2)) is fastlayers.Linear
    leave.set()
    second.join()
    assert not errors, errors
    assert F.relu is theirs


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
def test_compiled(device: torch.device) -> None:
    """As without the block, and what a graph hands to torch's function goes there."""

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.relu(F.linear(x, w)).sum() + F.softmax(x, -1).sum()

    x, w = torch.randn(2, 3, device=device), torch.randn(4, 3, device=device)
    expected = call(x, w)
    torch._dynamo.reset()
    with fastlayers.patched():
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, w), expected)
    torch.testing.assert_close(compiled(x, w), expected)
    torch._dynamo.reset()


def command(*args: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([ROOT, str(PROGRAMS.parent)])
    line = [sys.executable, "-m", "fastlayers", "run", *args]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment)


def test_run(tmp_path: Path) -> None:
    """Arguments, the folder of its own, what it prints and how it ends; without a GPU, everything and why it stayed torch's."""
    (tmp_path / "beside.py").write_text("from torch import nn\nlayer = nn.Linear(2, 3)\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, torch.nn.functional as F\n"
        "from beside import layer\n"
        "print(__name__, __file__, sys.argv, type(layer).__module__)\n"
        "F.relu(layer(torch.ones(1, 2))).sum().backward()\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    done = command(str(script), "-m", "7", "--help")
    assert done.stdout == f"__main__ {script} {[str(script), '-m', '7', '--help']} fastlayers.modules.linear\n"
    assert done.returncode == 7
    assert "layers accelerated    1  Linear" in done.stderr
    assert "1  linear  tensors on cpu: the kernels run on GPUs" in done.stderr


def test_run_a_module_that_fails() -> None:
    done = command("-m", "programs.mnist_mlp", "--epochs", "none")
    assert done.returncode == 2
    assert "invalid int value: 'none'" in done.stderr
    assert "what ran where in programs.mnist_mlp" in done.stderr


def test_run_nothing() -> None:
    for args, message in (((), "which program?"), (("no_such_file.py",), "there is no file no_such_file.py"),
                          (("-m", "no_such_module"), "there is no module no_such_module")):  # fmt: skip
        done = command(*args)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
