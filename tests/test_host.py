"""The host path: replays of what launchers did, that nothing in them goes stale, and CUDA graphs' rules."""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

import fastlayers
import fastlayers.functional as FL
from bench import host
from fastlayers import _capture, _dtypes, nn
from fastlayers.kernels import _launch, _replay
from fastlayers.kernels import pointwise as kernels
from fastlayers.kernels._tiles import Tile, force

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


def replace(model: Any) -> None:
    model[0].weight = torch.nn.Parameter(model[0].weight.detach() * 2 + 1)


def swap_data(model: Any) -> None:
    model[0].weight.data = model[0].weight.data.clone() - 1


def edit_in_place(model: Any) -> None:
    with torch.no_grad():
        model[0].bias.add_(3)
        model[2].weight.data.mul_(-2)


def load(model: Any) -> None:
    model.load_state_dict({k: v.flip(0) for k, v in model.state_dict().items()})


def assign(model: Any) -> None:
    model.load_state_dict({k: v.flip(0).clone() for k, v in model.state_dict().items()}, assign=True)


def restride(model: Any) -> None:
    model[0].weight.data = model[0].weight.data.T.contiguous().T


def unalign(model: Any) -> None:
    w = model[0].weight.data
    flat = torch.empty(w.numel() + 1, device=w.device, dtype=w.dtype)
    model[0].weight.data = flat[1:].view(w.shape).copy_(w)


def widen(model: Any) -> None:
    extra = torch.linspace(-1, 1, 7 * 6, device=model[0].weight.device).view(7, 6)
    model[0].weight.data, model[0].bias.data = extra, extra[:, 0].clone()
    model[2].weight.data = extra.flatten()[:28].view(4, 7).clone()


def drop_bias(model: Any) -> None:
    model[0].bias = None


def to_double(model: Any) -> None:
    model.double()


def freeze(model: Any) -> None:
    model[0].weight.requires_grad_(False).neg_()
    model[0].weight.requires_grad_()


def resize(model: Any) -> None:
    weight, bias = model[2].weight.requires_grad_(False), model[2].bias.requires_grad_(False)
    values = weight.repeat(2, 1) - 0.5
    weight.resize_(8, 5).copy_(values)
    bias.resize_(8).copy_(values[:, 0])
    model.requires_grad_()


CHANGES = [
    replace, swap_data, edit_in_place, load, assign, restride, unalign, widen, drop_bias, to_double, freeze, resize,
]  # fmt: skip


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


Layer = Callable[..., torch.Tensor]
LAYERS: dict[str, tuple[Layer, Layer, tuple[tuple[int, ...], ...]]] = {
    "linear": (FL.linear, F.linear, ((4, 6), (5, 6), (5,))),
    "conv2d": (FL.conv2d, F.conv2d, ((2, 3, 5, 5), (4, 3, 2, 2), (4,))),
    "relu": (FL.relu, F.relu, ((4, 6),)),
    "softmax": (lambda x: FL.softmax(x, -1), lambda x: F.softmax(x, -1), ((4, 6),)),
}
"""Ours, torch's, and the sizes of their tensors."""


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_replay_escapes_nobody(name: str, grad: bool, plays: list[None], device: torch.device) -> None:
    """Once replays go on, whoever begins to watch or to transform a call is noticed at once, and nobody afterwards."""
    fastlayers.policy("auto")
    layer, twin, shapes = LAYERS[name]
    tensors = [torch.randn(shape, device=device, requires_grad=grad) for shape in shapes]
    x, *rest = tensors

    def replays(call: Callable[[], object]) -> int:
        before = len(plays)
        call()
        return len(plays) - before

    for _ in range(3):
        layer(*tensors)
    assert replays(lambda: layer(*tensors)) == 1
    right = twin(*tensors)
    for mode in (_Dispatched(), _Quiet(), _Overridden()):
        with mode:
            assert replays(lambda: layer(*tensors)) == 0
        assert mode.seen
        assert not any("strided" in name for name in mode.seen), "allocations of ours, not torch's own function"
    sub = x.detach().as_subclass(_Logged)
    _Logged.seen.clear()
    assert replays(lambda: layer(sub, *rest)) == 0
    assert len(_Logged.seen) == 1  # the operation, and not what we looked at to find out
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert replays(lambda: layer(dual, *rest)) == 0
        assert torch.autograd.forward_ad.unpack_dual(layer(dual, *rest)).tangent is not None
    assert replays(lambda: torch.func.vmap(lambda v: layer(v, *rest))(torch.stack([x, x]))) == 0
    slope = lambda f: torch.func.grad(lambda v: f(v, *rest).square().sum())(x.detach())  # noqa: E731
    assert replays(lambda: slope(layer)) == 0
    torch.testing.assert_close(slope(layer), slope(twin))
    # Tensors that the transform doesn't see, within one.
    assert replays(lambda: torch.func.vmap(lambda v: v + layer(*tensors).sum())(torch.ones(2, device=device))) == 0
    inputs = tuple(t.detach() for t in tensors)
    assert replays(lambda: torch.jit.trace(lambda *ts: layer(*ts), inputs, check_trace=False)) == 0
    negative = torch._neg_view(-x.detach())
    assert replays(lambda: torch.testing.assert_close(layer(negative, *rest), right)) == 0
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert layer(*tensors).dtype == twin(*tensors).dtype
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
        assert (len(plays) - before, dx.requires_grad) == ((1, False) if order == 1 else (0, True))
    many = torch.randn(3, *right.shape, device=device)
    before = len(plays)
    batched = torch.autograd.grad(layer(*tensors), tensors, many, is_grads_batched=True)
    assert len(plays) == before + 1
    expected = torch.autograd.grad(twin(*tensors), tensors, many, is_grads_batched=True)
    for a, b in zip(batched, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["linear", "conv2d", "softmax"])
def test_autocast_is_replayed(name: str, plays: list[None], device: torch.device) -> None:
    """Whatever the region's dtype, and whatever the tensors': as outside, once they are converted."""
    layer, twin, shapes = LAYERS[name]
    for repeat in range(4):
        for region, dtype in (
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float16),
        ):
            if device.type == "cpu" and torch.float16 in (region, dtype) and name == "conv2d":
                continue  # torch's own takes minutes
            leaves = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
            before = len(plays)
            with torch.autocast(device.type, dtype=region):
                ours, theirs = layer(*leaves), twin(*leaves)
            assert ours.dtype == theirs.dtype
            dy = torch.randn_like(theirs)
            mine = torch.autograd.grad(ours, leaves, dy)
            assert repeat < 2 or len(plays) == before + 2
            for a, b in zip((ours, *mine), (theirs, *torch.autograd.grad(theirs, leaves, dy)), strict=True):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


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
    _dtypes._keeps.cache_clear()
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
        _dtypes._keeps.cache_clear()


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


Work = Callable[[Any], tuple[torch.Tensor, ...]]


def double(x: torch.Tensor) -> torch.Tensor:
    return kernels.pointwise(x, "relu")


@pytest.mark.parametrize(
    "work",
    [
        lambda ts: (double(ts[0].clone()),),
        lambda ts: (double(ts[0]).mul_(2),),
        lambda ts: (double(ts[0]) + 1,),
        lambda ts: (double(ts[0][1:]),),
        lambda ts: (double(ts[0]) if ts[0].sum() > 0 else double(-ts[0]),),
        lambda ts: (double(ts[0]).fill_(ts[0].max().item()),),
        lambda ts: (double(ts[0])[:2],),
        lambda ts: (torch.empty_like(ts[0]).copy_(double(ts[0])),),
        lambda ts: (ts[0],),
    ],
    ids=["copies", "edits", "computes", "begins elsewhere", "looks", "fills", "returns a view", "allocates", "idles"],
)
def test_what_else_than_launching_is_not_replayed(work: Work, plays: list[None], device: torch.device) -> None:
    """Found out while it is written down; from then on the ordinary way."""
    replayable = _replay.Replayable(work)
    for _ in range(5):
        x = torch.randn(4, 5, device=device)
        for a, b in zip(replayable((x,)), work((x,)), strict=True):
            assert torch.equal(a, b)
    assert not plays
    assert [kind.take for kinds in replayable.kinds.values() for kind in kinds] == [False]


def test_results_and_options_are_told_apart(plays: list[None], device: torch.device) -> None:
    """Inputs, allocations and None among the results; options that change what is done."""

    def work(tensors: Any, swapped: bool) -> tuple[torch.Tensor | None, ...]:
        x, y, none = tensors
        first, second = kernels.pointwise(x, "relu"), kernels.pointwise(y, "relu")
        return (second, none, x, first) if swapped else (first, second, y, none)

    replayable = _replay.Replayable(work)
    for _ in range(4):
        x, y = torch.randn(4, 5, device=device), torch.randn(3, device=device)
        for swapped in (False, True):
            got = replayable((x, y, None), swapped)
            want = (y.relu(), None, x, x.relu()) if swapped else (x.relu(), y.relu(), y, None)
            assert len(got) == 4
            for a, b in zip(got, want, strict=True):
                assert a is b if b is None or b is x or b is y else torch.equal(a, b)  # type: ignore[arg-type]
    assert len(plays) == 4
    assert len(replayable.kinds) == 2


@triton.jit
def _copy_kernel(target_ptr, source, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(target_ptr + (i[:, None] * N + i[None, :]), source.load([0, 0]))


def test_descriptors(plays: list[None], device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a tensor memory accelerator")

    def work(tensors: Any) -> tuple[torch.Tensor, ...]:
        y = _launch.empty_like(tensors[0])
        _launch.launch(_copy_kernel, 1, y, TensorDescriptor.from_tensor(tensors[0], [16, 16]), N=16)
        return (y,)

    replayable = _replay.Replayable(work)
    for _ in range(4):
        x = torch.randn(16, 16, device=device)
        assert torch.equal(replayable((x,))[0], x)
    assert len(plays) == 2


def test_forgets_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(_replay, "LIMIT", 5)
    replayable = _replay.Replayable(lambda ts: (kernels.pointwise(ts[0], "relu"),))
    for n in range(1, 20):
        x = torch.randn(n, device=device)
        for _ in range(3):
            assert torch.equal(replayable((x,))[0], x.relu())
        assert len(replayable.kinds) <= 5


def test_more_kinds_than_are_remembered_take_turns(device: torch.device, plays: list[None]) -> None:
    """A few too many must not drive out each other; and what was driven out is not counted."""
    replayable = _replay.Replayable(lambda ts: (kernels.pointwise(ts[1], "relu"),))
    first = torch.randn(3, device=device)
    others = [torch.randn(n, device=device) for n in range(1, _replay.ALIKE + 4)]
    for _ in range(10):
        plays.clear()
        for other in others:
            assert torch.equal(replayable((first, other))[0], other.relu())
    assert len(plays) > _replay.ALIKE / 2
    assert replayable.count == sum(map(len, replayable.kinds.values())) == _replay.ALIKE


def test_forgotten_scripts_are_gone(device: torch.device) -> None:
    replayable = _replay.Replayable(lambda ts: (kernels.pointwise(ts[0], "relu"),))
    x = torch.randn(3, device=device)
    for _ in range(3):
        replayable((x,))
    (((kind,),)) = replayable.kinds.values()
    script = weakref.ref(kind.take.script)  # type: ignore[union-attr]
    gc.disable()
    try:
        del kind
        replayable.kinds.clear()
        assert script() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", LAYERS)
def test_what_hooks_make_of_saved_tensors(name: str, plays: list[None], device: torch.device) -> None:
    """Backward passes are of what comes out, whatever was replayed before."""
    fastlayers.policy("auto")
    layer, twin, shapes = LAYERS[name]
    tensors = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    dy = torch.randn_like(twin(*tensors))
    for _ in range(3):
        torch.autograd.grad(layer(*tensors), tensors, dy)
    for unpack in (lambda t: t * 2, lambda t: t.as_subclass(_Logged)):
        results = []
        for function in (layer, twin):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
                y = function(*tensors)
            results.append([g.as_subclass(torch.Tensor) for g in torch.autograd.grad(y, tensors, dy)])
        torch.testing.assert_close(*results)


def test_recording_is_the_threads_own_affair(device: torch.device) -> None:
    """torch keeps in globals whether a mode is on: threads that record at the same time would leave them set."""
    modes: list[bool] = []

    def work(tensors: Any) -> tuple[torch.Tensor, ...]:
        modes.append(torch.utils._python_dispatch.is_in_torch_dispatch_mode())
        return (kernels.pointwise(tensors[0], "relu"),)

    replayable = _replay.Replayable(work)
    x = torch.randn(4, device=device)
    for _ in range(3):
        replayable((x,))
    assert modes == [False, False], "played the third time"
    assert torch._C._len_torch_dispatch_stack() == 0


def test_an_error_leaves_no_recording_behind(device: torch.device) -> None:
    x, calls = torch.randn(4, device=device), []

    def work(tensors: Any) -> tuple[torch.Tensor, ...]:
        calls.append(None)
        if len(calls) == 2:
            raise ZeroDivisionError
        return (kernels.pointwise(tensors[0], "relu"),)

    replayable = _replay.Replayable(work)
    replayable((x,))
    with pytest.raises(ZeroDivisionError):
        replayable((x,))
    assert _launch.here.listener is None
    assert torch._C._len_torch_dispatch_stack() == 0
    for _ in range(3):
        assert torch.equal(replayable((x,))[0], x.relu())


def test_bench_host(tmp_path: Path) -> None:
    """The figures themselves are nobody's business here; that there are some, and what they are of, is."""
    path = tmp_path / "host.json"
    command = [sys.executable, "-m", "bench.host", "--match", "relu", "--rounds", "2", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=clean(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    assert [row["case"] for row in figures["cases"]] == [
        "relu forward", "relu forward, graph recorded", "relu forward + backward",
    ]  # fmt: skip
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


# --- capture -----------------------------------------------------------------------------------------------------------


def test_capture_says_what_it_can_not_take(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(TypeError, match="takes a module, not function"):
        fastlayers.capture(lambda x: x, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes tensors as inputs, not list"):
        fastlayers.capture(net, [x])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the inputs of a call"):
        fastlayers.capture(net)
    hooked = nn.Sequential(nn.Linear(3, 2))
    hooked[0].register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="0 has a hook"):
        fastlayers.capture(hooked, x)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="capture needs a GPU"):
            fastlayers.capture(net, x)
    monkeypatch.setattr(_capture, "_has_gpu", lambda: True)
    with pytest.raises(ValueError, match="everything on one GPU, not on cpu"):
        fastlayers.capture(net, x)
    with pytest.raises(ValueError, match="everything on one GPU, not on cpu, meta"):
        fastlayers.capture(net, x.to("meta"))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands for torch's own capture, on the CPU: warms up, and then calls the module."""
    made: list[Any] = []

    def make(module: torch.nn.Module, samples: tuple[torch.Tensor, ...]) -> Any:
        made.append((module, samples))
        for _ in range(3):
            module(*samples)
        return module

    monkeypatch.setattr(_capture, "_has_gpu", lambda: True)
    monkeypatch.setattr(_capture, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    return made


def test_capture_keeps_the_rules_of_graphs(graphs: list[Any]) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(4, 3)
    captured = fastlayers.capture(net, x)
    module, (sample,) = graphs[0]
    assert module is not net
    assert "forward" not in vars(net)
    assert sample.data_ptr() != x.data_ptr()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    y = captured(x)
    assert y.requires_grad
    y.sum().backward()
    assert net[0].weight.grad is not None
    with torch.no_grad():
        net[0].weight.add_(1)  # an optimiser
    captured(x)
    for wrong in (x[:2], x.double(), x.clone().requires_grad_()):
        with pytest.raises(ValueError, match=r"captured for torch.float32 \[4, 3\] on cpu, called with torch"):
            captured(wrong)
    with pytest.raises(ValueError, match="called with nothing"):
        captured()
    net.eval()
    with pytest.raises(RuntimeError, match=r"train\(\) or eval\(\)"):
        captured(x)
    net.train()
    captured(x)


@pytest.mark.parametrize("change", [replace, swap_data, drop_bias, to_double], ids=lambda c: c.__name__)
def test_capture_notices_what_moved(change: Callable[[Any], None], graphs: list[Any]) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
    captured = fastlayers.capture(net, torch.randn(2, 6))
    change(net)
    with pytest.raises(RuntimeError, match="replaced, moved or frozen"):
        captured(torch.randn(2, 6))


def test_capture_notices_another_module(graphs: list[Any]) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU())
    captured = fastlayers.capture(net, torch.randn(2, 6))
    net[1] = torch.nn.Tanh()
    with pytest.raises(RuntimeError, match="replaced, moved or frozen"):
        captured(torch.randn(2, 6))


def test_capture_for_inference(graphs: list[Any]) -> None:
    net, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    with torch.no_grad():
        captured = fastlayers.capture(net, x)
    assert not captured(x).requires_grad  # grad mode is on, but there is no graph for backward
    frozen = torch.nn.Linear(3, 2).requires_grad_(False)
    assert not fastlayers.capture(frozen, x)(x).requires_grad
    torch.testing.assert_close(captured(x), net(x))
