"""What every layer promises, from its Spec: the same as torch.nn in everything but speed."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastlayers
from fastlayers.kernels import _launch
from fastlayers.testing import SPECS, Variant, assert_within_budget, neighbours

# torch makes a padded copy for "same" and says so; we don't.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

VARIANTS = [pytest.param(v, id=f"{spec.name}-{name}") for spec in SPECS for name, v in spec.variants.items()]
FIRST = [pytest.param(next(iter(spec.variants.values())), id=spec.name) for spec in SPECS]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def twins(variant: Variant, dtype: torch.dtype, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch's, initialised under one seed."""
    seed = torch.initial_seed()
    torch.manual_seed(seed)
    ours = variant.make(fastlayers.nn).to(device, dtype)
    torch.manual_seed(seed)
    theirs = variant.make(torch.nn).to(device, dtype)
    for mine, other in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert mine[0] == other[0]
        assert torch.equal(mine[1], other[1])
    return ours, theirs


def torchs(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with fastlayers.policy("torch"):
        return module(x)


def gradients(
    call: Callable[[torch.Tensor], torch.Tensor], module: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor
) -> list[torch.Tensor]:
    """y, then dx and every parameter's gradient."""
    x = x.detach().requires_grad_()
    y = call(x)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], dy)]


def check(variant: Variant, x: torch.Tensor, dy: torch.Tensor | None = None) -> None:
    """Forward and every gradient within the budget; inputs untouched."""
    ours, theirs = twins(variant, x.dtype, x.device)
    exact = copy.deepcopy(theirs).double()
    before = x.clone(), [p.clone() for p in ours.parameters()]
    if dy is None:
        dy = torch.randn_like(theirs(x))
    mine = gradients(ours, ours, x, dy)
    others = [gradients(theirs, theirs, *moved) for moved in neighbours(x, dy)]
    right = gradients(exact, exact, x.double(), dy.double())
    assert mine[0].stride() == others[0][0].stride()
    names = ["y", "dx", *(f"d{name}" for name, _ in ours.named_parameters())]
    for name, a, c, *b in zip(names, mine, right, *others, strict=True):
        assert_within_budget(a, b, c, name)
    torch.testing.assert_close(x, before[0], rtol=0, atol=0, equal_nan=True)
    for p, old in zip(ours.parameters(), before[1], strict=True):
        assert torch.equal(p, old)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("small_tiles")
def test_forward_and_gradients(variant: Variant, dtype: torch.dtype, device: torch.device) -> None:
    check(variant, torch.randn(variant.shape, dtype=dtype, device=device))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("small_tiles")
def test_64_bit_offsets(variant: Variant, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for tensors of more than 2**31 elements, on small ones."""
    monkeypatch.setattr(_launch, "wide", lambda *tensors: True)
    check(variant, torch.randn(variant.shape, device=device))


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_strides(variant: Variant, device: torch.device) -> None:
    """Input a slice with gaps, dimensions in reverse order, gradient expanded from its last dimension."""
    shape = variant.shape
    gaps = torch.randn([n + 3 for n in shape], device=device)[tuple(slice(1, 1 + n) for n in shape)]
    reverse = torch.randn(shape[::-1], device=device).permute(list(range(len(shape) - 1, -1, -1)))
    for x in (gaps, reverse, torch.randn(2, *shape, device=device)[1]):
        check(variant, x)
    y = torchs(variant.make(fastlayers.nn).to(device), gaps)
    check(variant, gaps, torch.randn(y.shape[-1:], device=device).expand(y.shape))
    check(variant, gaps, torch.randn([n + 2 for n in y.shape], device=device)[tuple(slice(0, n) for n in y.shape)])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("small_tiles")
def test_channels_last(variant: Variant, device: torch.device) -> None:
    if len(variant.shape) != 4:
        pytest.skip("images only")
    x = torch.randn(variant.shape, device=device).to(memory_format=torch.channels_last)
    check(variant, x)
    make = variant.make
    check(Variant(lambda nn: make(nn).to(memory_format=torch.channels_last), variant.shape), x.contiguous())  # type: ignore[call-overload]


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_batch(variant: Variant, device: torch.device) -> None:
    if len(variant.shape) < 2 or (len(variant.shape) == 3 and "Conv" in str(variant.make(torch.nn))):
        pytest.skip("no batch")
    x = torch.randn((0, *variant.shape[1:]), device=device)
    ours, theirs = twins(variant, x.dtype, device)
    dy = torch.empty_like(theirs(x))
    for a, b in zip(gradients(ours, ours, x, dy), gradients(theirs, theirs, x, dy), strict=True):
        assert torch.equal(a, b)
        assert a.shape == b.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -0.0])
@pytest.mark.parametrize("variant", FIRST)
def test_special_values(variant: Variant, value: float, device: torch.device) -> None:
    """NaN and infinities appear where torch's do, in the result and in every gradient."""
    ours, theirs = twins(variant, torch.float32, device)
    x = torch.randn(variant.shape, device=device)
    x.view(-1)[3] = value
    x.view(-1)[-1] = value
    dy = torch.randn_like(theirs(x))
    for a, b in zip(gradients(ours, ours, x, dy), gradients(theirs, theirs, x, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_second_derivatives(variant: Variant, device: torch.device) -> None:
    ours, _ = twins(variant, torch.float64, device)
    x = torch.randn(variant.shape, dtype=torch.float64, device=device, requires_grad=True)
    names = [name for name, _ in ours.named_parameters()]

    def call(x: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        # No functorch transform: functional_call only swaps the parameters, so the kernels run.
        return torch.func.functional_call(ours, dict(zip(names, params, strict=True)), (x,)).pow(2)

    assert torch.autograd.gradcheck(call, (x, *ours.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *ours.parameters()), fast_mode=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_what_is_asked_for(variant: Variant, device: torch.device) -> None:
    """For every choice of what requires a gradient: the right ones, and no more bytes saved than torch.nn saves."""
    ours, theirs = twins(variant, torch.float32, device)
    count = len(list(ours.parameters()))
    choices = list(itertools.product((False, True), repeat=count + 1)) if count < 5 else []
    for choice in choices or [tuple(i == j for j in range(count + 1)) for i in range(count + 1)]:
        x = torch.randn(variant.shape, device=device)
        results = []
        for module in (ours, theirs):
            for p, wanted in zip(module.parameters(), choice[1:], strict=True):
                p.requires_grad_(wanted)
            saved: list[torch.Tensor] = []
            leaf = x.clone().requires_grad_(choice[0])
            with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
                y = module(leaf)
            assert y.requires_grad == any(choice)
            wanted = [t for t in (leaf, *module.parameters()) if t.requires_grad]
            grads = torch.autograd.grad(y.sum() + y.square().sum(), wanted) if wanted else ()
            results.append(
                (
                    grads,
                    sum(t.nbytes for t in saved),
                    {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved},
                )
            )
        (mine, bytes_mine, storages_mine), (other, bytes_other, storages_other) = results
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert bytes_mine <= bytes_other
        assert sum(storages_mine.values()) <= sum(storages_other.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", FIRST)
def test_autocast(variant: Variant, dtype: torch.dtype, device: torch.device) -> None:
    """dtypes and gradients as the installed torch has them."""
    for own in (torch.float32, dtype, torch.float64):
        ours, theirs = twins(variant, own, device)
        x = torch.randn(variant.shape, device=device, dtype=own)
        with torch.autocast(device.type, dtype=dtype):
            a, b = ours(x), theirs(x)
        assert a.dtype == b.dtype
        params = [list(m.parameters()) for m in (ours, theirs)]
        if params[0]:
            for p, q in zip(
                *(torch.autograd.grad(y.float().sum(), ps) for y, ps in zip((a, b), params, strict=True)), strict=True
            ):
                assert p.dtype == q.dtype
                torch.testing.assert_close(p, q, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_module_is_torchs(variant: Variant, device: torch.device) -> None:
    """repr, class, state_dict both ways, pickle, deepcopy, torch.save."""
    ours, theirs = twins(variant, torch.float32, device)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs))
    assert ours.extra_repr() == theirs.extra_repr()
    assert vars(ours).keys() == vars(theirs).keys()
    x = torch.randn(variant.shape, device=device)
    y = ours(x)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    ours.load_state_dict(torch.load(file, weights_only=True))
    for copied in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is type(ours)
        assert torch.equal(copied(x), y)


@pytest.mark.parametrize("variant", FIRST)
def test_meta_device_and_dtype(variant: Variant, device: torch.device) -> None:
    with torch.device("meta"):
        ours = variant.make(fastlayers.nn)
    assert all(p.is_meta for p in ours.parameters())
    with fastlayers.policy("auto"):
        y = ours(torch.empty(variant.shape, device="meta"))
    assert y.is_meta
    moved = ours.to_empty(device=device).double()
    assert all(p.dtype == torch.float64 and p.device == device for p in moved.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_hooks(variant: Variant, device: torch.device) -> None:
    """Every kind of hook sees what it sees on torch.nn's module, in the same order, fused or not."""
    records = []
    x = torch.randn(variant.shape, device=device)
    for module in twins(variant, torch.float32, device):
        seen: list[tuple[str, Any]] = []
        for name, m in module.named_modules():
            m.register_forward_pre_hook(
                lambda m, a, n=name, seen=seen: seen.append((f"pre {n}", a[0].detach().clone()))
            )
            m.register_forward_hook(lambda m, a, y, n=name, seen=seen: seen.append((f"post {n}", y.detach().clone())))
            if "inplace" not in str(module):  # torch forbids a full backward hook beside an in-place module
                m.register_full_backward_hook(
                    lambda m, dx, dy, n=name, seen=seen: seen.append((f"back {n}", dy[0].clone()))
                )
        leaf = x.clone().requires_grad_()
        if "inplace" in str(module):
            leaf = leaf * 1
        y = module(leaf)
        if "inplace" not in str(module):
            y.square().sum().backward()
        records.append(seen)
    assert [n for n, _ in records[0]] == [n for n, _ in records[1]]
    for (_, a), (_, b) in zip(*records, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("variant", FIRST)
def test_no_grad_and_inference_mode(variant: Variant, device: torch.device) -> None:
    ours, theirs = twins(variant, torch.float32, device)
    x = torch.randn(variant.shape, device=device)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            a, b = ours(x), theirs(x)
        assert not a.requires_grad
        assert a.is_inference() == b.is_inference()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("variant", FIRST)
def test_deterministic(variant: Variant, device: torch.device) -> None:
    ours, _ = twins(variant, torch.float32, device)
    x = torch.randn(variant.shape, device=device)
    dy = torch.randn_like(ours(x))
    for a, b in zip(gradients(ours, ours, x, dy), gradients(ours, ours, x, dy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", FIRST)
def test_saved_tensors_are_guarded(variant: Variant, device: torch.device) -> None:
    """Backward twice without retain_graph is an error; with it, the same again."""
    ours, _ = twins(variant, torch.float32, device)
    x = torch.randn(variant.shape, device=device, requires_grad=True)
    y = ours(x).square().sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x)


@pytest.mark.parametrize("variant", FIRST)
def test_batched_gradients(variant: Variant, device: torch.device) -> None:
    """is_grads_batched and jacobian(vectorize=True)."""
    ours, theirs = twins(variant, torch.float64, device)
    x = torch.randn(variant.shape, dtype=torch.float64, device=device)
    a, b = (torch.autograd.functional.jacobian(m, x, vectorize=True) for m in (ours, theirs))
    torch.testing.assert_close(a, b)


class Dead(torch.autograd.Function):
    """Gives no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize("variant", FIRST)
def test_an_undefined_gradient_stays_undefined(variant: Variant, device: torch.device) -> None:
    """None, not zeros: an optimizer with momentum tells them apart."""
    ours, _ = twins(variant, torch.float32, device)
    x = torch.randn(variant.shape, device=device, requires_grad=True)
    Dead.apply(ours(x)).sum().backward()
    assert x.grad is None
    assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize("variant", FIRST)
def test_saved_tensors_in_another_layout(variant: Variant, device: torch.device) -> None:
    """saved_tensors_hooks may give back the same values with other strides."""
    ours, theirs = twins(variant, torch.float32, device)
    x = torch.randn(variant.shape, device=device)
    grads = []
    for module in (ours, theirs):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.mT.contiguous() if t.dim() > 1 else t, lambda t: t.mT if t.dim() > 1 else t
        ):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
        grads.append(torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "wanted", "launches"),
    [
        (SPECS[4].variants["chain"], "x", 4),  # the last activation, then dx through every layer
        (SPECS[4].variants["chain"], "last weight", 2),
        (SPECS[0].variants["matrix"], "x", 1),
        (SPECS[0].variants["matrix"], "last weight", 1),
        (SPECS[1].variants["three"], "x", 1),
        (SPECS[1].variants["three"], "last weight", 1),
    ],
)
def test_backward_computes_what_autograd_grad_asks_for(
    variant: Variant, wanted: str, launches: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything requires a gradient, one is asked for: nothing else is computed."""
    ours, theirs = twins(variant, torch.float32, device)
    x = torch.randn(variant.shape, device=device, requires_grad=True)
    y, z = ours(x), theirs(x)
    launched: list[str] = []
    monkeypatch.setattr(_launch, "trace", launched)
    pick = {"x": lambda m: x, "last weight": lambda m: [p for p in m.parameters() if p.dim() > 1][-1]}[wanted]
    (a,) = torch.autograd.grad(y.sum(), pick(ours))
    assert len(launched) == launches, launched
    torch.testing.assert_close(a, torch.autograd.grad(z.sum(), pick(theirs))[0], rtol=1e-4, atol=1e-4)


def test_bias_alone_saves_nothing(device: torch.device) -> None:
    """So the graph may be gone through twice, as torch's."""
    for space in (fastlayers.nn, torch.nn):
        layer = space.Linear(3, 2).to(device)
        layer.weight.requires_grad_(False)
        y = layer(torch.randn(4, 3, device=device)).sum()
        y.backward()
        y.backward()
        assert layer.bias.grad.tolist() == [8, 8]


def test_softmax_with_create_graph_in_16_bits(device: torch.device) -> None:
    x = torch.tensor([3.0, 0.0], device=device, dtype=torch.float16, requires_grad=True)
    dy = torch.tensor([6e4, -6e4], device=device, dtype=torch.float16)
    a, b = (
        torch.autograd.grad(f(x, 0), x, dy, create_graph=True)[0]
        for f in (fastlayers.functional.softmax, torch.softmax)
    )
    torch.testing.assert_close(a, b, rtol=0.01, atol=0)
