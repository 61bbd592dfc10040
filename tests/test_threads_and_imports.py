"""Several threads, several imports, and a terminal that goes away: what no call may leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlayers
from fastlayers import nn
from fastlayers.dispatch import policy as _policy

ROOT = str(Path(fastlayers.__file__).parent.parent)


def test_policies_may_end_in_any_order() -> None:
    before = _policy.current
    first, second = fastlayers.policy("torch"), fastlayers.policy("triton")
    with first:
        second.__enter__()
    assert _policy.current == "triton"
    second.__exit__()
    assert _policy.current == before
    third, fourth = fastlayers.policy("torch"), fastlayers.policy("auto")
    third.__enter__()
    fourth.__enter__()
    third.__exit__()
    assert _policy.current == "auto"
    fourth.__exit__()
    assert _policy.current == before


def test_policies_without_an_end() -> None:
    code = (
        "import fastlayers\n"
        "from fastlayers.dispatch import policy as p\n"
        "fastlayers.policy('torch')\n"
        "with fastlayers.policy('triton'):\n"
        "    assert p.current == 'triton'\n"
        "    fastlayers.policy('auto')\n"
        "    assert p.current == 'auto'\n"
        "assert p.current == 'torch', 'as before the block'\n"
        "fastlayers.policy('torch')\n"
        "again = fastlayers.policy('auto')\n"
        "for _ in range(2):\n"
        "    with again:\n"
        "        assert p.current == 'auto'\n"
        "    assert p.current == 'torch'\n"
    )
    python(code)


def test_a_policy_is_the_processes() -> None:
    seen: list[str] = []
    with fastlayers.policy("torch"):
        thread = threading.Thread(target=lambda: seen.append(_policy.current))
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_nothing_of_torch_is_patched() -> None:
    """By an import, a conversion, a fused model, a call or its gradients."""
    code = (
        "import sys, torch, torch.nn.functional, torch.fx, torch.utils.checkpoint, torch.utils.flop_counter\n"
        "def look():\n"
        "    spaces = [m for n, m in list(sys.modules.items()) if n == 'torch' or n.startswith(('torch.nn', 'torch.fx'))]\n"
        "    spaces += [v for s in spaces for v in list(vars(s).values()) if isinstance(v, type)]\n"
        "    return {(str(s), k): v for s in spaces for k, v in list(vars(s).items()) if callable(v)}\n"
        "before = look()\n"
        "import fastlayers\n"
        "model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())\n"
        "fastlayers.accelerate(model)\n"
        "fastlayers.fuse(model)(torch.ones(1, 2)).sum().backward()\n"
        "fastlayers.explain(model, torch.ones(1, 2))\n"
        "after = look()\n"
        "changed = [k for k, v in before.items() if after[k] is not v]\n"
        "assert len(before) > 3000 and not changed, changed\n"
    )
    python(code)


def python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done


def test_threads_that_explain(device: torch.device) -> None:
    """Each is told what it does itself; no thread sees another one's."""
    layer, x = nn.Linear(4, 3).to(device), torch.randn(2, 4, device=device)
    call = torch.nn.Module.__call__
    errors: list[BaseException] = []
    stop = threading.Event()

    def work(what: Any) -> None:
        try:
            what()
        except BaseException as error:
            errors.append(error)

    def explain() -> None:
        for _ in range(10):
            (decision,) = fastlayers.explain(layer, x)
            assert (decision.module, decision.path, len(decision.kernels)) == ("Linear", "triton", 1)

    def serve() -> None:
        other = torch.nn.Sequential(torch.nn.Tanh(), nn.Linear(4, 3)).to(device)
        while not stop.is_set():
            other(x)

    explaining = [threading.Thread(target=work, args=(explain,)) for _ in range(3)]
    serving = threading.Thread(target=work, args=(serve,))
    for thread in (serving, *explaining):
        thread.start()
    for thread in explaining:
        thread.join()
    stop.set()
    serving.join()
    assert not errors, errors
    assert torch.nn.Module.__call__ is call


def test_errors_of_arguments() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    for choices in (3, None):
        with pytest.raises(TypeError, match="a path's pattern, a class or a function chooses modules, not"):
            fastlayers.accelerate(model, include=[choices])  # type: ignore[list-item]
    for name in ("include", "exclude"):
        with pytest.raises(TypeError, match="chooses modules, not 3"):
            fastlayers.accelerate(model, **{name: 3})
    with pytest.raises(TypeError, match="explain takes a module or a function, not int"):
        fastlayers.explain(3)  # type: ignore[arg-type]


def test_imported_again() -> None:
    python(
        "import importlib, sys, torch, fastlayers\n"
        "old = fastlayers.nn.Sequential(fastlayers.nn.Linear(2, 2), fastlayers.nn.ReLU())\n"
        "for name in [n for n in sys.modules if n.split('.')[0] == 'fastlayers']:\n"
        "    del sys.modules[name]\n"
        "import fastlayers as again\n"
        "from fastlayers.nn.modules.linear import Linear\n"
        "assert again.nn.Linear is Linear is not type(old[0])\n"
        "x = torch.ones(1, 2)\n"
        "new = again.nn.Sequential(again.nn.Linear(2, 2), again.nn.ReLU())\n"
        "new.load_state_dict(old.state_dict())\n"
        "assert torch.equal(old(x), new(x))\n"
        "for model in (old, new):\n"
        "    assert torch.compile(model, backend='eager', fullgraph=True)(x).shape == (1, 2)\n"
        "model = torch.nn.Sequential(torch.nn.Linear(2, 2))\n"
        "again.accelerate(model)\n"
        "assert type(model[0]) is again.Linear\n"
    )


def test_reloaded() -> None:
    python(
        "import importlib, sys, torch, fastlayers\n"
        "importlib.reload(fastlayers)\n"
        "for name in sorted(n for n in sys.modules if n.split('.')[0] == 'fastlayers' and 'torch' not in n):\n"
        "    if not name.startswith('fastlayers.nn.'):\n"
        "        importlib.reload(sys.modules[name])\n"
        "model = fastlayers.nn.Linear(2, 2)\n"
        "assert model(torch.ones(1, 2)).shape == (1, 2)\n"
    )


def test_import_warns_of_nothing() -> None:
    done = python("import fastlayers", "-W", "error")
    assert (done.stdout, done.stderr) == ("", "")


def command(arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": ROOT, "TRITON_INTERPRET": "0"}  # torch's path: this is about the command
    line = f"{sys.executable} -W error -m fastlayers {arguments}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=environment, **more)


@pytest.mark.parametrize("ending", ["| true", "2>&- >&-"])
def test_a_terminal_that_goes_away(ending: str) -> None:
    done = command(ending)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_commands_that_are_none() -> None:
    done = command("bogus")
    assert done.returncode == 2
    assert "argument command: invalid choice: 'bogus'" in done.stderr


@pytest.mark.parametrize("where", ["/proc/curves.png", "no/such/folder/curves.png", "."])
def test_the_demo_says_at_once_where_it_can_not_write(where: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    done = command(f"demo --plot {where}", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    assert not list(tmp_path.iterdir())
