"""Replays of launches in use: nothing goes stale when parameters, modes, precision or autocast change, and nobody who watches is
passed by. Looks inside for one thing alone: whether a call was replayed (`plays`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import triton
from changes import CHANGES
from layers import LAYERS, NAMES, pair
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastlayers
import fastlayers.functional as FL
from bench import host
from fastlayers import nn
from fastlayers.dispatch import autocast
from fastlayers.kernels.runtime import replay as _replay
from fastlayers.kernels.runtime.tiles import Tile, force

ROOT = Path(__file__).parent.parent
SPACES = (nn, torch.nn)


def clean(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""} | more


def passes_elsewhere(file: str, **environment: str) -> None:
    """The tests in a file of this folder, in a process that does not interpret."""
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist", str(ROOT / "tests" / file)]
    command, env = [sys.executable, "-m", "pytest", *options], clean(**environment)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]


def test_what_reaches_triton() -> None:
    passes_elsewhere("launched.py")


def test_what_the_compiler_makes_of_products() -> None:
    passes_elsewhere("compiled.py")


@pytest.mark.slow
def test_what_reaches_cuda(tmp_path: Path) -> None:
    """With a libcuda.so of our own for Triton's launcher to call."""
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    if not host._LAUNCHES_FROM_PYTHON or shutil.which("gcc") is None:
        pytest.skip("needs triton 3.7, and a compiler for C")
    options = f"-Wall -Werror -shared -fPIC -I{include} -Wl,-soname,libcuda.so.1".split()
    source = str(ROOT / "tests" / "libcuda.c")
    subprocess.run(["gcc", *options, source, "-o", str(tmp_path / "libcuda.so.1")], check=True)
    here = str(tmp_path)
    passes_elsewhere(
        "launched_in_c.py", TRITON_LIBCUDA_PATH=here, LD_LIBRARY_PATH=here, TRITON_CACHE_DIR=str(tmp_path / "cache")
    )


def models(device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    ours, theirs = (s.Sequential(s.Linear(6, 5), s.ReLU(), s.Linear(5, 4), s.Softmax(1)).to(device) for s in SPACES)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def step(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), (x, *model.parameters()))]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_nothing_goes_stale(change: Callable[[Any], None], plays: list[None], device: torch.device) -> None:
    """Parameters changed between calls in every way there is: the next call, and those after it, are right."""
    ours, theirs = models(device)
    for _ in range(3):
        step(ours, torch.randn(3, 6, device=device))
    assert plays
    for model in (ours, theirs):
        change(model)
    for _ in range(4):
        before = len(plays)
        x = torch.randn(3, 6, device=device, dtype=ours[0].weight.dtype)  # type: ignore[index]
        for a, b in zip(step(ours, x), step(theirs, x), strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x))
    assert len(plays) > before


def test_inputs_of_every_kind_in_turn(plays: list[None], device: torch.device) -> None:
    """One after the other, several times: sizes, strides, alignment, dtype, gradients wanted or not."""

    def inputs() -> Iterator[torch.Tensor]:
        for _ in range(4):
            base = torch.randn(8, 12, device=device)
            yield from (base[:3, :6], base[:, ::2], base[1:4, 1:7], base[:6, :3].T, base[:1, :6].expand(3, 6))
            yield from (base[0, :6], base[None, :3, :6], torch.empty(0, 6, device=device))

    ours, theirs = (s.Linear(6, 5).to(device) for s in SPACES)
    theirs.load_state_dict(ours.state_dict())
    for x in inputs():
        for grad in (False, True):
            a, b = x.detach().clone(memory_format=torch.preserve_format), x.detach()
            a, b = a.requires_grad_(grad), b.clone().requires_grad_(grad)
            y, z = ours(a), theirs(b)
            torch.testing.assert_close(y, z)
            g = torch.randn_like(y)
            y.backward(g)
            z.backward(g)
            if grad:
                torch.testing.assert_close(a.grad, b.grad)
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
    assert len(plays) > 20


def test_the_switches_are_read_at_every_call(plays: list[None], device: torch.device) -> None:
    """policy, explain, forced tiles, torch's precision, autocast: each counts at once, and replays go on afterwards."""
    x, w = torch.randn(4, 6, device=device), torch.randn(5, 6, device=device)
    for _ in range(3):
        FL.linear(x, w)
    before = len(plays)
    FL.linear(x, w)
    assert len(plays) == before + 1
    with fastlayers.policy("torch"):
        FL.linear(x, w)
    (decision,) = fastlayers.explain(FL.linear, x, w)
    assert decision.kernels
    assert len(plays) == before + 1
    with force(product=Tile(16, 16, 16)):
        (decision,) = fastlayers.explain(FL.linear, x, w)
        assert "16x16x16" in decision.kernels[0]
        FL.linear(x, w)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert FL.linear(x, w).dtype == torch.bfloat16
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    exact = F.linear(x.double(), w.double())
    FL.linear(x, w)
    assert len(plays) == before + 1
    for _ in range(3):
        coarse = FL.linear(x, w)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert (coarse - exact).norm() > 10 * (FL.linear(x, w) - exact).norm()
    assert len(plays) > before + 1


@pytest.mark.slow
def test_convolutions_go_stale_no_more_than_others(plays: list[None], device: torch.device) -> None:
    """Images and weights of other formats, sizes and options in turn, geometry given in every way that torch takes."""
    last = torch.channels_last
    w, b = torch.randn(8, 4, 3, 3, device=device), torch.randn(8, device=device)
    for _ in range(4):
        for shape, options in (
            ((2, 4, 6, 7), {}), ((2, 4, 6, 7), dict(padding=1)), ((2, 4, 6, 7), dict(padding="same", dilation=(1, 2))),
            ((2, 4, 6, 7), dict(stride=(2, 1), padding=[1, 0])), ((4, 6, 7), dict(stride=2)),
            ((1, 4, 9, 9), dict(padding=1)),
        ):  # fmt: skip
            for x_format, w_format, bias in ((None, None, b), (last, None, None), (last, last, b)):
                x, weight = torch.randn(shape, device=device), w + torch.randn_like(w)
                x = x.contiguous(memory_format=x_format) if x_format and x.dim() == 4 else x
                weight = weight.contiguous(memory_format=w_format) if w_format else weight
                leaves = [t.requires_grad_() for t in (x, weight)]
                ours, theirs = (f.conv2d(*leaves, bias, **options) for f in (FL, F))  # type: ignore[attr-defined]
                assert ours.stride() == theirs.stride()
                dy = torch.randn_like(theirs)
                both = [[y.detach(), *torch.autograd.grad(y, leaves, dy)] for y in (ours, theirs)]
                for mine, right in zip(*both, strict=True):
                    torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-4)
    assert len(plays) > 60
    with pytest.raises((TypeError, RuntimeError), match="stride"):
        FL.conv2d(torch.randn(2, 4, 6, 7, device=device), w, b, (2.0, 1.0), [1, 0])  # type: ignore[arg-type]


class _Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class _Quiet(_Dispatched):
    """As selective checkpointing's: one whose keys TensorGuards leave out."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class _Overridden(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class _Logged(torch.Tensor):
    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings(
    "ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning"
)  # torch's check of sizes
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap of torch's cells
@pytest.mark.filterwarnings("ignore:Iterating over a tensor:torch.jit.TracerWarning")  # an LSTM cell's two states
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_replay_escapes_nobody(name: str, grad: bool, plays: list[None], device: torch.device) -> None:
    """Once replays go on, whoever begins to watch or to transform a call is noticed at once, and nobody afterwards."""
    fastlayers.policy("auto")
    layer, reference, draw = pair(LAYERS[name], device)
    tensors = draw(requires_grad=grad)
    x, *rest = tensors

    def replays(call: Callable[[], object]) -> int:
        before = len(plays)
        call()
        return len(plays) - before

    for _ in range(3):
        layer(*tensors)
    assert replays(lambda: layer(*tensors)) == 1
    right = reference(*tensors)
    for mode in (_Dispatched(), _Quiet(), _Overridden()):
        with mode:
            assert replays(lambda: layer(*tensors)) == 0
        assert mode.seen
        assert not any("strided" in name for name in mode.seen), "allocations of ours, not torch's own function"
    sub = x.detach().as_subclass(_Logged)
    looked: list[list[str]] = []
    for call in (reference, layer):
        _Logged.seen.clear()
        assert replays(lambda: call(sub, *rest)) == 0  # noqa: B023
        looked.append([*_Logged.seen])
    assert looked[0] == looked[1]  # the operation and what torch's layer looks at, not what we did to find out
    if name != "scaled_dot_product_attention":  # torch's own has no rule for it, on the CPU
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            assert replays(lambda: layer(dual, *rest)) == 0
            assert torch.autograd.forward_ad.unpack_dual(layer(dual, *rest)).tangent is not None
    if name != "LSTMCell":  # torch's own has no rule for vmap
        assert replays(lambda: torch.func.vmap(lambda v: layer(v, *rest))(torch.stack([x, x]))) == 0
    slope = lambda f: torch.func.grad(lambda v: f(v, *rest).square().sum())(x.detach())  # noqa: E731
    assert replays(lambda: slope(layer)) == 0
    torch.testing.assert_close(slope(layer), slope(reference))
    # Tensors that the transform doesn't see, within one.
    assert replays(lambda: torch.func.vmap(lambda v: v + layer(*tensors).sum())(torch.ones(2, device=device))) == 0
    inputs = tuple(t.detach() for t in tensors)
    assert replays(lambda: torch.jit.trace(lambda *ts: layer(*ts), inputs, check_trace=False)) == 0
    if name != "MaxPool1d":  # torch's own takes no notice of a lazy negation, on the CPU
        negative = torch._neg_view(-x.detach())
        assert replays(lambda: torch.testing.assert_close(layer(negative, *rest), right)) == 0
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert layer(*tensors).dtype == reference(*tensors).dtype
    with fastlayers.policy("torch"):
        assert replays(lambda: layer(*tensors)) == 0
    with torch.inference_mode():
        for _ in range(4):
            assert layer(*tensors).is_inference()
    with torch.no_grad():
        for _ in range(4):
            y = layer(*tensors)
        assert not y.requires_grad
    assert replays(lambda: layer(*tensors)) == 1
    assert layer(*tensors).requires_grad is grad
    assert (layer(*tensors).grad_fn is not None) is grad
    if not grad:
        assert layer(x.clone().requires_grad_(), *rest).requires_grad
        return
    for _ in range(3):
        torch.autograd.grad(layer(*tensors), tensors, torch.ones_like(right))
    for order in (1, 2):  # forward and backward replayed; then only what need not be differentiated
        y = layer(*tensors)
        before = len(plays)
        (dx, *_) = torch.autograd.grad(y, tensors, right.detach(), create_graph=order == 2)
        (theirs, *_) = torch.autograd.grad(reference(*tensors), tensors, right.detach(), create_graph=order == 2)
        assert (len(plays) - before, dx.requires_grad) == (2 - order, theirs.requires_grad)
    many = torch.randn(3, *right.shape, device=device)
    before = len(plays)
    batched = torch.autograd.grad(layer(*tensors), tensors, many, is_grads_batched=True)
    assert len(plays) == before + 1
    expected = torch.autograd.grad(reference(*tensors), tensors, many, is_grads_batched=True)
    for a, b in zip(batched, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * max(1.0, float(b.abs().max())))  # sums that cancel


@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_replayed(name: str, plays: list[None], device: torch.device) -> None:
    """Whatever the region's dtype, and whatever the tensors': as outside, once they are converted."""
    layer, reference, draw = pair(LAYERS[name], device)
    for repeat in range(4):
        for region, dtype in (
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float16),
        ):
            if device.type == "cpu" and torch.float16 in (region, dtype) and "Conv" in name:
                continue  # torch's own takes minutes
            leaves = draw(dtype, requires_grad=True)
            before = len(plays)
            with torch.autocast(device.type, dtype=region):
                ours, theirs = layer(*leaves), reference(*leaves)
            assert ours.dtype == theirs.dtype
            dy = torch.randn_like(theirs)
            mine = torch.autograd.grad(ours, leaves, dy)
            assert repeat < 2 or len(plays) == before + 2
            for a, b in zip((ours, *mine), (theirs, *torch.autograd.grad(theirs, leaves, dy)), strict=True):
                assert a.dtype == b.dtype
                atol = max(0.05, 0.01 * b.detach().abs().max().item())
                torch.testing.assert_close(a, b, rtol=0.05, atol=atol)


def test_autocast_keeps_what_it_converted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter is converted once in a region, by the same operator that hands out torch's own copies."""
    weight = torch.nn.Parameter(torch.randn(5, 6, device=device))
    if device.type == "cpu":  # whose autocast leaves einsum alone: as that of CUDA does it
        kept: dict[int, torch.Tensor] = {}

        def einsum(equation: str, tensors: Sequence[torch.Tensor], *, path: Any = None) -> torch.Tensor:
            (tensor,) = tensors
            with torch.autocast("cpu", enabled=False):
                return torch.einsum(equation, kept.setdefault(id(tensor), tensor.to(torch.bfloat16)))

        library = torch.library.Library("aten", "IMPL")
        library.impl("einsum", einsum, "AutocastCPU")
    autocast._keeps.cache_clear()
    try:
        x = torch.randn(4, 6, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            first = FL.linear(x, weight)
            with torch.no_grad():
                weight.data.mul_(2)  # which torch doesn't notice either
            second, total = FL.linear(x, weight), weight.detach().clone()
        assert torch.equal(first, second)
        (first.sum() + second.sum()).backward()
        expected = x.bfloat16().float().sum(0).expand(5, 6) * 2
        torch.testing.assert_close(weight.grad, expected, rtol=0.02, atol=0.1)
        assert torch.equal(total, weight.detach())
    finally:
        if device.type == "cpu":
            library._destroy()
        autocast._keeps.cache_clear()


def test_guards_are_there() -> None:
    """Without them nothing is replayed: a version of torch that lacks them must be noticed."""
    assert _replay._Guards is not None


def test_in_place(plays: list[None], device: torch.device) -> None:
    """The result is the input, and autograd is told, replayed or not."""
    for _ in range(4):
        x = torch.randn(5, 6, device=device)
        expected, version = x.relu(), x._version
        y = FL.relu(x, inplace=True)
        assert y is x
        assert x._version > version
        torch.testing.assert_close(x, expected)
    assert plays


def test_nothing_is_kept_of_a_tensor(device: torch.device) -> None:
    import gc
    import weakref

    kept = []
    for _ in range(4):
        x, w = torch.randn(7, 9, device=device), torch.randn(3, 9, device=device)
        y = FL.relu(FL.linear(x, w))
        kept += [weakref.ref(t) for t in (x, w, y)]
        del x, w, y
    gc.collect()
    assert not any(r() is not None for r in kept)


def doubled(t: torch.Tensor) -> torch.Tensor:
    return t * 2 if t.is_floating_point() else t


def elsewhere(t: torch.Tensor) -> torch.Tensor:
    """The same at an address that 16 doesn't divide."""
    flat = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return flat[1:].view(t.shape).copy_(t)


@pytest.mark.parametrize(
    "unpack", [doubled, elsewhere, lambda t: t.as_subclass(_Logged)], ids=["other", "moved", "logged"]
)
@pytest.mark.parametrize("name", NAMES)
def test_what_hooks_make_of_saved_tensors(
    name: str, unpack: Callable[[torch.Tensor], torch.Tensor], plays: list[None], device: torch.device
) -> None:
    """Backward passes are of what comes out, whatever was replayed before."""
    fastlayers.policy("auto")
    layer, reference, draw = pair(LAYERS[name], device)
    tensors = draw(requires_grad=True)
    dy = torch.randn_like(reference(*tensors))
    for _ in range(3):
        torch.autograd.grad(layer(*tensors), tensors, dy)
    results, saved = [], []
    for function in (layer, reference):
        kept: list[torch.Tensor] = []

        def pack(t: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(t.detach())
            return kept[-1]

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            y = function(*tensors)
        results.append([g.as_subclass(torch.Tensor) for g in torch.autograd.grad(y, tensors, dy)])
        saved.append([t for t in kept if t.is_floating_point()])

    def within(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
        return all(any(a.shape == b.shape and torch.allclose(a, b) for b in others) for a in some)

    alike = within(saved[0], saved[1]) and within(saved[1], saved[0])
    if unpack is not doubled or (alike and name != "BCELoss"):
        # Other numbers have the same effect only where the same is saved, and no probability is beyond 1 then.
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    elif saved[0] and name != "L1Loss":  # whose gradient is a sign
        expected = torch.autograd.grad(reference(*tensors), tensors, dy)
        assert not all(torch.allclose(a, b) for a, b in zip(results[0], expected, strict=True))


@pytest.mark.slow
def test_bench_host(tmp_path: Path) -> None:
    """The figures themselves are nobody's business here; that there are some, and what they are of, is."""
    path = tmp_path / "host.json"
    command = [sys.executable, "-m", "bench.host", "--match", "relu", "--rounds", "2", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=clean(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    timed = [row["case"] for row in figures["cases"]]  # of leaky_relu, too
    assert {"relu forward", "relu forward, graph recorded", "relu forward + backward"} <= {*timed}
    assert all(["relu" in name for name in timed])
    for row in figures["cases"]:
        for side in ("torch", "ours"):
            assert 0 < row[side]["p20"] <= row[side]["median"] <= row[side]["p80"]
        assert row["case"] in done.stdout
    assert figures["parts"]["the whole call"]["median"] > figures["parts"]["recognising the tensors"]["median"]
    done = subprocess.run(
        command, cwd=ROOT, env=clean(TRITON_INTERPRET="1"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr
