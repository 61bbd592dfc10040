"""`fastlayers.report` and its command: what a model will do on a GPU, found without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastlayers
from fastlayers.reporting.gpus import GPUS


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 8)
        self.other = nn.Bilinear(8, 8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(self.body(x).mean((2, 3)))
        return self.other(y, y)


def test_lines() -> None:
    model, x = Net(), torch.randn(2, 3, 6, 6)
    found = fastlayers.report(model, x)
    by_module = {line.module: line for line in found if line.ours}
    assert [*by_module] == ["body.0", "body.1 + body.2", "head"]
    assert "conv" in by_module["body.0"].why
    torchs = {line.module: line for line in found if not line.ours}
    assert "Bilinear is not one of our layers" in torchs["other"].why
    assert "mean" in torchs["Net"].operation
    assert torchs["(backward)"].backward.bytes > 0
    assert 0 < found.bytes < 1
    # The model is as it was.
    assert type(model.head) is nn.Linear
    assert "Nothing was measured" in str(found)


@pytest.mark.parametrize("accelerate", [True, False])
def test_flops_are_those_that_torch_counts(accelerate: bool) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(3, 6)
    found = fastlayers.report(model, x, accelerate=accelerate)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert sum(line.work.flops for line in found) == counter.get_total_flops()
    assert found.flops == float(accelerate)


@pytest.mark.parametrize("conv", [nn.Conv2d, nn.ConvTranspose2d])
def test_flops_of_groups(conv: type[nn.Conv2d]) -> None:
    """Torch's own count of the gradients takes no account of them."""
    x, flops = torch.randn(2, 4, 9, 9, requires_grad=True), {}
    for groups in (1, 2):
        ours, theirs = (fastlayers.report(conv(4, 6, 3, groups=groups), x, accelerate=a) for a in (True, False))
        flops[groups] = sum(line.work.flops for line in theirs)
        assert flops[groups] == sum(line.work.flops for line in ours)
    assert flops[1] == 2 * flops[2]


class Attends(nn.Module):
    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(*tensors)


def test_torchs_attention_is_one_kernel() -> None:
    """As on CUDA: the weights stay within it, and are computed again in the backward."""
    q, k, v = (torch.randn(2, 3, rows, 8, requires_grad=True) for rows in (5, 7, 7))
    found = fastlayers.report(Attends(), q, k, v)
    assert found.operators == {"scaled_dot_product_attention": 1, "scaled_dot_product_attention_backward": 1}
    product = 2 * 2 * 3 * 5 * 7 * 8
    assert [line.work.flops for line in found] == [2 * product, 5 * product]
    output, lse = 4 * q.numel(), 4 * 2 * 3 * 5
    assert found.saved == output + lse
    assert found.lines[0].work.bytes == 4 * (q.numel() + 2 * k.numel()) + output + lse


def test_attention_that_torch_has_no_kernel_for() -> None:
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    learned = torch.randn(2, 3, 5, 5, requires_grad=True)
    for tensors in ((q, q, q, learned), (q.double(), q.double(), q.double())):
        assert "bmm" in fastlayers.report(Attends(), *tensors).operators


class Looks(nn.Module):
    """As transformers' models look at positions and masks."""

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(mask.shape[1], device=mask.device)
        steps[0] += 1
        gap = (torch.diff(steps) != 1).any()
        return mask.float() if mask.bool().all() and gap else mask.float().exp()


def test_integers_have_values() -> None:
    mask = torch.ones(2, 4, dtype=torch.int64)
    assert "exp" not in fastlayers.report(Looks(), mask).operators
    mask[1, 3] = 0
    assert "exp" in fastlayers.report(Looks(), mask).operators
    assert mask.sum() == 7  # the report works on a copy


class Decides(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = torch.zeros(3, dtype=torch.int64, device=x.device)
        chosen.copy_(x)
        return x if chosen.sum().item() else -x


def test_what_follows_from_floating_point_numbers_is_not_known() -> None:
    with pytest.raises(RuntimeError, match="without the values of its tensors"):
        fastlayers.report(Decides(), torch.ones(3))


def test_bytes_of_a_linear_layer() -> None:
    """Forward: input, weight, bias and result. Backward: the result's gradient, input and weight, and two gradients, since the
    input needs none."""
    x, w, b, y = 4 * 3 * 6, 4 * 6 * 8, 4 * 8, 4 * 3 * 8
    (line,) = fastlayers.report(nn.Linear(6, 8), torch.randn(3, 6))
    assert line.forward == (2 * 3 * 6 * 8, x + w + b + y)
    assert line.backward.bytes in (y + x + w + b, y + x + w + w + b)  # whether the weight is saved


def test_saved_bytes_are_fewer_than_torchs() -> None:
    x = torch.randn(64, 32)
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    ours, theirs = (fastlayers.report(model, x, accelerate=a) for a in (True, False))
    assert 0 < ours.saved <= theirs.saved
    assert (ours.launches > 0, theirs.launches) == (True, 0)


def test_inference_has_no_backward() -> None:
    with torch.no_grad():
        found = fastlayers.report(Net().eval(), torch.randn(2, 3, 6, 6))
    assert found.saved == 0
    assert all(line.backward == (0, 0) for line in found)


def test_a_model_that_fits_no_machine() -> None:
    """2 TB of weights, on the meta device. The copy takes no memory either."""
    with torch.device("meta"):
        model = nn.Linear(2**19, 2**20)
    found = fastlayers.report(model, torch.empty(1, 2**19, device="meta"), dtype=torch.bfloat16, gpu="H200")
    assert found.milliseconds(found.lines[0].forward) == pytest.approx(2**40 / 4.8e9, rel=1e-3)


def test_errors() -> None:
    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.sum().item()

    with pytest.raises(RuntimeError, match="without the values of its tensors"):
        fastlayers.report(Looks(), torch.randn(3))
    with pytest.raises(ValueError, match="gpu must be one of A100"):
        fastlayers.report(nn.Linear(2, 2), torch.randn(3, 2), gpu="abacus")
    with pytest.raises(fastlayers.NotAccelerated, match="meta"):  # as before
        fastlayers.Linear(2, 2, device="meta")(torch.empty(1, 2, device="meta"))


MODEL = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.randn(3, 4)

def nothing():
    return 3
"""


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fastlayers", "report", *arguments], capture_output=True, text=True)


def test_command(tmp_path: Path) -> None:
    file, picture = tmp_path / "model.py", tmp_path / "model.png"
    file.write_text(MODEL)
    done = command(f"{file}:make", "--gpu", "H200", "--dtype", "bfloat16", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert "linear" in done.stdout
    assert GPUS["H200"].source in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    for wrong, message in (
        ("missing", "no attribute 'missing'"),
        ("nothing", "must return a module and its inputs, not int"),
    ):
        done = command(f"{file}:{wrong}")
        assert done.returncode == 2
        assert message in done.stderr
    done = command(f"{file}:make", "--plot", str(tmp_path / "model.words"))
    assert (done.returncode, done.stderr.startswith("no picture: Format 'words'")) == (1, True), done.stderr


def test_what_the_function_raises_keeps_its_traceback(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text("def make():\n    raise ValueError('not today')\n")
    done = command(f"{file}:make")
    assert done.returncode == 1
    assert f'File "{file}", line 2, in make' in done.stderr
