"""What every layer promises, by its row of the catalog: the same as torch.nn in everything but speed."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import (
    BY_VECTOR,
    CASES,
    DTYPES,
    FIRST,
    OF_EVERY_LAYER,
    by_formula,
    check,
    exactly_same,
    floats,
    memory,
    one_by_one,
    output_gradients,
    pair,
    replaced,
    results,
    same,
    tensors,
    total,
    values,
)
from torch.utils._pytree import tree_map_only

import fastlayers
from fastlayers.catalog import Case

# torch makes a padded copy for "same" and says so; we don't. It warns of hooks on a layer whose inputs have no gradients.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

IMAGES = [p for p in CASES if any(len(getattr(i, "shape", ())) == 4 for i in p.values[0].inputs)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", OF_EVERY_LAYER)
@pytest.mark.usefixtures("small_tiles")
def test_forward_and_gradients(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    check(case, case.arguments(dtype, device), dtype=dtype)


def gaps(t: torch.Tensor) -> torch.Tensor:
    """A slice out of the middle of a larger tensor."""
    around = t.new_zeros([n + 3 for n in t.shape])
    around[tuple(slice(1, 1 + n) for n in t.shape)] = t
    return around[tuple(slice(1, 1 + n) for n in t.shape)]


def reversed_order(t: torch.Tensor) -> torch.Tensor:
    """With its dimensions in memory from last to first."""
    order = list(range(t.dim() - 1, -1, -1))
    return t.permute(order).contiguous().permute(order)


def shifted(t: torch.Tensor) -> torch.Tensor:
    """The second half of a tensor."""
    return torch.stack([t, t])[1]


def expanded(t: torch.Tensor) -> torch.Tensor:
    """Its first row or element, everywhere."""
    return t[(0,) * (t.dim() - 1)].expand(t.shape) if t.dim() else t


@pytest.mark.parametrize("case", CASES)
def test_any_strides(case: Case, device: torch.device) -> None:
    """Inputs and gradients with gaps, in another order of dimensions, expanded, and behind other tensors."""
    arguments = case.arguments(torch.float32, device)
    dys = output_gradients(case.make(torch.nn).to(device), arguments)
    for of_input, of_gradient in ((gaps, gaps), (reversed_order, expanded), (shifted, reversed_order)):
        check(case, tree_map_only(torch.Tensor, of_input, arguments), [of_gradient(dy) for dy in dys])


@pytest.mark.parametrize("case", IMAGES)
@pytest.mark.usefixtures("small_tiles")
def test_channels_last(case: Case, device: torch.device) -> None:
    """Images, and the weights of a layer."""

    def last(t: torch.Tensor) -> torch.Tensor:
        return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t

    make: Any = case.make
    if any(p.dim() == 5 for p in make(fastlayers.nn).parameters()):
        pytest.skip("a single volume, for which torch's format depends on the library that computes it")
    arguments = case.arguments(torch.float32, device)
    check(case, tree_map_only(torch.Tensor, last, arguments))
    check(case._replace(make=lambda nn: make(nn).to(memory_format=torch.channels_last)), arguments)


@pytest.mark.parametrize("case", CASES)
def test_empty_batch(case: Case, device: torch.device) -> None:
    """On the kernels, or torch's error where the first dimension is no batch."""
    ours, theirs = pair(case, torch.float32, device)
    arguments = tree_map_only(torch.Tensor, lambda t: t[:0] if t.dim() else t, case.arguments(torch.float32, device))
    try:
        expected = values(theirs, arguments)
    except Exception as error:
        with fastlayers.policy("auto"), pytest.raises(type(error)):
            values(ours, arguments)
    else:
        exactly_same(values(ours, arguments), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -0.0])
@pytest.mark.parametrize("case", FIRST)
def test_special_values(case: Case, value: float, device: torch.device) -> None:
    """NaN and infinities appear where torch's do, in the result and in every gradient."""
    ours, theirs = pair(case, torch.float32, device)
    if device.type == "cuda" and isinstance(theirs, torch.nn.BCELoss) and value != 0:
        pytest.skip("torch stops the process")
    # oneDNN, which torch uses in float32 alone, leaves out products with what is beyond the edge of an image. Torch's own kernels
    # have zeros there, times which a NaN is one in the gradient of the weight.
    dtype = torch.float64 if type(theirs).__name__.startswith("ConvTranspose") else torch.float32
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    if type(theirs).__name__ in BY_VECTOR:
        theirs.forward = one_by_one(theirs.forward)
    for i in range(len(floats(case.arguments(dtype, device)))):
        arguments = case.arguments(dtype, device)
        x = floats(arguments)[i].view(-1)
        x[3 % len(x)] = value
        x[-1] = value
        try:
            dys = output_gradients(theirs, arguments)
        except RuntimeError:  # torch looks at the values
            assert "between 0 and 1" in str(sys.exc_info()[1])
            continue
        with by_formula():
            expected = values(theirs, arguments, dys)
        same(values(ours, arguments, dys), expected)


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives(case: Case, device: torch.device) -> None:
    """Those of every gradient, with respect to everything that it depends on, the result's gradient among them."""
    pairs = pair(case, torch.float64, device)
    if device.type == "cpu" and any([isinstance(m, torch.nn.MultiheadAttention) for m in pairs[1].modules()]):
        pytest.skip("torch's attention has no second derivative on a CPU")
    arguments = case.arguments(torch.float64, device)
    dys = output_gradients(pairs[1], arguments)
    directions = [torch.randn_like(t) for t in (*floats(arguments), *pairs[0].parameters())]

    def derivatives(module: torch.nn.Module) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in (*floats(arguments), *dys)]
        inputs, outer = leaves[: -len(dys)], leaves[-len(dys) :]
        everything = [*inputs, *module.parameters()]
        ys = floats(results(module, replaced(arguments, inputs)))
        first = torch.autograd.grad(ys, everything, outer, create_graph=True)
        along = [g for g in first if g.requires_grad]
        weights = [v for g, v in zip(first, directions, strict=True) if g.requires_grad]
        second = torch.autograd.grad(along, [*everything, *outer], weights, allow_unused=True, materialize_grads=True)
        return [*first, *second]

    ours, theirs = pairs
    try:
        with by_formula():
            expected = derivatives(theirs)
    except RuntimeError:  # torch has no second derivative of Hardsigmoid
        with pytest.raises(RuntimeError):
            derivatives(ours)
    else:
        torch.testing.assert_close(derivatives(ours), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_those_of_the_function(case: Case, device: torch.device) -> None:
    """gradcheck and gradgradcheck, which don't take torch's word for it."""
    ours, _ = pair(case, torch.float64, device)
    arguments = case.arguments(torch.float64, device)
    inputs = [t.requires_grad_() for t in floats(arguments)]
    names = [name for name, _ in ours.named_parameters()]

    def call(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # No functorch transform: functional_call only swaps the parameters, so the kernels run.
        parameters = dict(zip(names, leaves[len(inputs) :], strict=True))
        found = torch.func.functional_call(ours, parameters, tuple(replaced(arguments, leaves[: len(inputs)])))
        return tuple([y.pow(2) for y in floats(found)])

    leaves = (*inputs, *ours.parameters())
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    if not isinstance(ours, torch.nn.EmbeddingBag):  # torch has no second derivative of it, and neither have we
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def choices(count: int) -> list[tuple[bool, ...]]:
    """All there are of a few; of more, none, all, each alone and all but each."""
    if count <= 3:
        return list(itertools.product((False, True), repeat=count))
    return [tuple((i == j) == alone for j in range(count)) for i in range(count + 1) for alone in (False, True)]


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_asked_for(case: Case, device: torch.device) -> None:
    """For every choice of what requires a gradient: the right ones, and no more bytes saved than torch.nn saves."""
    pairs = pair(case, torch.float32, device)
    arguments = case.arguments(torch.float32, device)
    inputs = floats(arguments)
    for choice in choices(len(inputs) + len(list(pairs[0].parameters()))):
        found: list[Any] = []
        for module in pairs:
            leaves = [t.clone() for t in inputs]
            given = replaced(arguments, leaves)
            everything = [*leaves, *module.parameters()]
            for t, wanted in zip(everything, choice, strict=True):
                t.requires_grad_(wanted)
            saved: list[torch.Tensor] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
                ys = results(module, given)
            assert any(y.requires_grad for y in ys) == any(choice)
            wanted = [t for t in everything if t.requires_grad]
            gradients = torch.autograd.grad(total(ys), wanted) if wanted else ()
            kept = memory(saved, [*tensors(given), *module.parameters(), *module.buffers()])
            found.append((gradients, kept))
        (mine, (bytes_mine, storages_mine, added_mine)), (other, (bytes_other, storages_other, added_other)) = found
        same(mine, other)
        if getattr(pairs[0], "bidirectional", False) and not any(choice[: len(inputs)]):
            continue  # torch keeps nothing of a direction without gradients, on a CPU; cuDNN keeps everything
        assert added_mine <= added_other
        # Keeping what is there anyway is no loss where torch.nn would have kept a result as large beside it.
        assert added_mine < added_other or (bytes_mine <= bytes_other and storages_mine <= storages_other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", FIRST)
def test_autocast(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """dtypes and gradients as the installed torch has them."""
    for own in (torch.float32, dtype, torch.float64):
        pairs = pair(case, own, device)
        arguments = case.arguments(own, device)
        found = []
        for module in pairs:
            leaves = [t.detach().requires_grad_() for t in floats(arguments)]
            try:
                with torch.autocast(device.type, dtype=dtype):
                    ys = results(module, replaced(arguments, leaves))
            except RuntimeError as error:
                if module is pairs[0] or "could not create a primitive" not in str(error):
                    raise
                pytest.skip("oneDNN has no LSTM in this dtype")
            summed = torch.stack([y.float().sum() for y in floats(ys)]).sum()
            found.append([*ys, *torch.autograd.grad(summed, [*leaves, *module.parameters()])])
        assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]
        torch.testing.assert_close(*found, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("case", CASES)
def test_the_module_is_torchs(case: Case, device: torch.device) -> None:
    """repr, class, state_dict both ways, pickle, deepcopy, torch.save."""
    ours, theirs = pair(case, torch.float32, device, as_it_is=True)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs))
    assert ours.extra_repr() == theirs.extra_repr()
    assert vars(ours).keys() == vars(theirs).keys()
    arguments = case.arguments(torch.float32, device)
    expected = results(ours, arguments)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    ours.load_state_dict(torch.load(file, weights_only=True))
    for copied in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is type(ours)
        exactly_same(results(copied, arguments), expected)


@pytest.mark.parametrize("case", FIRST)
def test_meta_device_and_dtype(case: Case, device: torch.device) -> None:
    with torch.device("meta"):
        ours = case.make(fastlayers.nn)
    state = [*ours.parameters(), *ours.buffers()]
    assert all(t.is_meta for t in state)
    with fastlayers.policy("auto"):
        ys = results(ours, case.arguments(torch.float32, "meta"))
    assert all(y.is_meta for y in ys)
    moved = ours.to_empty(device=device).double()
    assert all(p.dtype == torch.float64 and p.device == device for p in moved.parameters())


@pytest.mark.parametrize("case", CASES)
def test_hooks(case: Case, device: torch.device) -> None:
    """Every kind of hook sees what it sees on torch.nn's module, in the same order, fused or not."""
    logs = []
    arguments = case.arguments(torch.float32, device)

    def copies(tree: Any) -> list[torch.Tensor]:
        return [t.detach().clone() for t in tensors(tree)]

    for module in pair(case, torch.float32, device):
        log: list[tuple[str, Any]] = []
        inplace = "inplace" in str(module)
        for name, m in module.named_modules():
            m.register_forward_pre_hook(lambda m, a, n=name, log=log: log.append((f"pre {n}", copies(a))))
            m.register_forward_hook(lambda m, a, y, n=name, log=log: log.append((f"post {n}", copies(y))))
            if not inplace:  # torch forbids a full backward hook beside an in-place module
                m.register_full_backward_hook(lambda m, dx, dy, n=name, log=log: log.append((f"back {n}", copies(dy))))
        leaves = [t.clone().requires_grad_() for t in floats(arguments)]
        ys = results(module, replaced(arguments, [t * 1 for t in leaves] if inplace else leaves))
        if not inplace:
            torch.stack([y.square().sum() for y in floats(ys)]).sum().backward()
        logs.append(log)
    assert [n for n, _ in logs[0]] == [n for n, _ in logs[1]]
    for (_, a), (_, b) in zip(*logs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", FIRST)
def test_no_grad_and_inference_mode(case: Case, device: torch.device) -> None:
    ours, theirs = pair(case, torch.float32, device)
    arguments = case.arguments(torch.float32, device)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            mine, others = results(ours, arguments), results(theirs, arguments)
        assert not any(y.requires_grad for y in mine)
        assert [y.is_inference() for y in mine] == [y.is_inference() for y in others]
        torch.testing.assert_close(mine, others)


@pytest.mark.parametrize("case", FIRST)
def test_deterministic(case: Case, device: torch.device) -> None:
    ours, theirs = pair(case, torch.float32, device)
    arguments = case.arguments(torch.float32, device)
    dys = output_gradients(theirs, arguments)
    exactly_same(values(ours, arguments, dys), values(ours, arguments, dys))


@pytest.mark.parametrize("case", FIRST)
def test_saved_tensors_are_guarded(case: Case, device: torch.device) -> None:
    """Backward twice without retain_graph is an error; with it, the same again."""
    ours, _ = pair(case, torch.float32, device)
    arguments = case.arguments(torch.float32, device)
    inputs = [*[t.requires_grad_() for t in floats(arguments)], *ours.parameters()]
    y = total(results(ours, arguments))
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    exactly_same(torch.autograd.grad(y, inputs), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, inputs)


@pytest.mark.parametrize("case", FIRST)
def test_batched_gradients(case: Case, device: torch.device) -> None:
    """is_grads_batched and jacobian(vectorize=True), of the inputs; of a layer that has only integers, of its parameters."""
    arguments = case.arguments(torch.float64, device)

    def jacobian(module: torch.nn.Module) -> Any:
        names = [name for name, _ in module.named_parameters()]

        def call(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if floats(arguments):
                return tuple(floats(results(module, replaced(arguments, inputs))))
            parameters = dict(zip(names, inputs, strict=True))
            return tuple(floats(torch.func.functional_call(module, parameters, tuple(arguments))))

        return torch.autograd.functional.jacobian(
            call, tuple(floats(arguments)) or tuple(module.parameters()), vectorize=True
        )

    torch.testing.assert_close(*map(jacobian, pair(case, torch.float64, device)))


class Dead(torch.autograd.Function):
    """Gives no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize("case", FIRST)
def test_an_undefined_gradient_stays_undefined(case: Case, device: torch.device) -> None:
    """None, not zeros: an optimizer with momentum tells them apart."""
    ours, _ = pair(case, torch.float32, device)
    arguments = case.arguments(torch.float32, device)
    inputs = [t.requires_grad_() for t in floats(arguments)]
    dead: Callable[..., torch.Tensor] = Dead.apply
    torch.stack([dead(y).sum() for y in floats(results(ours, arguments))]).sum().backward()
    assert all(t.grad is None for t in (*inputs, *ours.parameters()))


@pytest.mark.parametrize("case", FIRST)
def test_saved_tensors_in_another_layout(case: Case, device: torch.device) -> None:
    """saved_tensors_hooks may give back the same values with other strides. (torch's group_norm is wrong then, on a CPU.)"""
    arguments = case.arguments(torch.float32, device)
    ours, theirs = pair(case, torch.float32, device)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.mT.contiguous() if t.dim() > 1 else t, lambda t: t.mT if t.dim() > 1 else t
    ):
        mine = values(ours, arguments)
    same(mine, values(theirs, arguments))
