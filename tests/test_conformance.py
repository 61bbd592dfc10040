"""torch's own test databases: `module_db` on our classes, `op_db` on our functions, and every torch.nn module, accelerated.

Everything in them runs under policy("triton"), where torch's own functions are an error, except what ON_TORCH names: then
under "auto", and the reason must be the one that stands there.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_map

import fastlayers
import fastlayers.functional as FL
from fastlayers.testing import assert_within_budget, neighbours

pytest.importorskip("expecttest", reason="torch.testing._internal imports it")
# The import would forbid everyone to set torch.backends' switches, and warns that optional packages are missing.
with mock.patch.object(torch.backends, "disable_global_flags"), warnings.catch_warnings(action="ignore"):
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db
    from torch.testing._internal.common_utils import noncontiguous_like

# torch makes a padded copy for "same" and says so; we don't. A lazy module says that it is new, forward
# mode uses torch.jit.script, and complex numbers are cast.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning"),
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OURS = {"Linear": "linear", "Conv2d": "conv2d", "ReLU": "relu", "Softmax": "softmax", "LazyConv2d": "conv2d"}
MODULES = [info for info in module_db if info.module_cls.__name__ in OURS]
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "nn.functional.linear": FL.linear,
    "nn.functional.conv2d": FL.conv2d,
    "nn.functional.relu": FL.relu,
    "softmax": FL.softmax,
}
OPS = [info for info in op_db if info.name in FUNCTIONS]

# What of the databases runs on torch's functions, and why. All other samples run on the kernels.
ON_TORCH = {("softmax", "a tensor without dimensions")}


def of_dtypes(infos: list[Any], dtypes: Callable[[Any], Any]) -> list[Any]:
    return [
        pytest.param(info, dtype, id=f"{getattr(info, 'full_name', None) or info.name}-{str(dtype)[6:]}")
        for info in infos
        for dtype in sorted(dtypes(info), key=str)
    ]


def test_the_databases_have_us() -> None:
    assert {info.module_cls.__name__ for info in MODULES} == OURS.keys()
    assert {info.name for info in OPS} == FUNCTIONS.keys()
    assert not any(info.module_error_inputs_func for info in MODULES)  # nothing there to test


def on_kernels(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of the call, having seen that kernels computed it unless ON_TORCH says otherwise."""
    results: list[Any] = []
    with fastlayers.policy("auto"):
        for decision in fastlayers.explain(lambda: results.append(call(*args, **kwargs))):
            allowed = [why for op, why in ON_TORCH if op == decision.op]
            reason = decision.reason
            assert reason is None or reason.startswith(tuple(allowed)), f"{decision.op} on torch: {reason}"
    return results[0]


def leaves(tree: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def to(dtype: torch.dtype, tree: Any) -> Any:
    return tree_map(
        lambda t: t.detach().to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, tree
    )


def gradients(call: Callable[[], torch.Tensor], *wanted: torch.Tensor, dy: torch.Tensor | None = None) -> list[Any]:
    """y, and the gradients of what requires one."""
    y = call()
    wanted = tuple(t for t in wanted if t.requires_grad)
    if not wanted or not y.requires_grad:
        return [y]
    return [y, *torch.autograd.grad(y, wanted, torch.ones_like(y) if dy is None else dy)]


# --- module_db ---------------------------------------------------------------------------------------------------------


class Sample:
    """A row of module_db: our module and torch's with the same parameters, and an input."""

    def __init__(self, info: Any, row: Any, device: torch.device, dtype: torch.dtype, training: bool):
        name = info.module_cls.__name__
        args, kwargs = row.constructor_input.args, row.constructor_input.kwargs
        self.make = lambda space, **more: getattr(space, name)(*args, **{**kwargs, **more})
        self.ours = self.make(fastlayers.nn, **self.factory(info, device, dtype)).train(training)
        self.theirs = self.make(torch.nn, **self.factory(info, device, dtype)).train(training)
        forward = row.forward_input
        self.inputs = (*forward.args, *forward.kwargs.values())
        self.reference = None
        if row.reference_fn is not None:
            self.reference = lambda: row.reference_fn(self.ours, *forward.args, **forward.kwargs)
        if info.is_lazy:
            with torch.no_grad():
                on_kernels(self.ours, *self.inputs)
                self.theirs(*self.inputs)
        self.theirs.load_state_dict(self.ours.state_dict())

    @staticmethod
    def factory(info: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {} if info.module_cls.__name__ in ("ReLU", "Softmax") else dict(device=device, dtype=dtype)


def samples(info: Any, device: torch.device, dtype: torch.dtype, requires_grad: bool = True) -> Iterator[Sample]:
    for training in (True, False):
        rows = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=requires_grad, training=training)
        assert rows
        yield from (Sample(info, row, device, dtype, training) for row in rows)


by_module = pytest.mark.parametrize(("info", "dtype"), of_dtypes(MODULES, lambda info: info.dtypes))
by_module_once = pytest.mark.parametrize("info", MODULES, ids=lambda info: info.module_cls.__name__)


@by_module
def test_module(info: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Forward, every gradient, the database's reference, inputs and parameters with gaps, and copies."""
    for sample in samples(info, device, dtype):
        ours, theirs = sample.ours, sample.theirs
        exact = copy.deepcopy(theirs).double()
        gapped = copy.deepcopy(ours)
        for parameter in gapped.parameters():
            parameter.data = noncontiguous_like(parameter.data)
        x = sample.inputs
        dy = torch.randn_like(theirs(*x))
        near_by = neighbours(*x, dy)
        others = [
            gradients(lambda: theirs(*moved), *moved, *theirs.parameters(), dy=moved_dy)  # noqa: B023
            for *moved, moved_dy in ([*(t.detach().requires_grad_() for t in near[:-1]), near[-1]] for near in near_by)
        ]
        wide = [t.detach().double().requires_grad_() for t in x]
        right = gradients(lambda: exact(*wide), *wide, *exact.parameters(), dy=dy.double())  # noqa: B023
        apart = [noncontiguous_like(t).detach().requires_grad_() for t in x]
        pickled = pickle.loads(pickle.dumps(ours))
        for module, inputs, dy_ in (
            (ours, x, dy), (ours, apart, noncontiguous_like(dy)), (gapped, x, dy), (gapped, apart, dy),
            (copy.deepcopy(ours), x, dy), (pickled, x, dy),
        ):  # fmt: skip
            mine = on_kernels(gradients, lambda: module(*inputs), *inputs, *module.parameters(), dy=dy_)  # noqa: B023
            for a, c, *b in zip(mine, right, *others, strict=True):
                assert_within_budget(a, b, c, str(ours))
        if sample.reference is not None:
            torch.testing.assert_close(on_kernels(ours, *x), sample.reference())


@by_module_once
def test_module_derivatives(info: Any, device: torch.device) -> None:
    """gradcheck and gradgradcheck, of inputs and parameters, in train and eval."""
    assert info.supports_gradgrad
    for sample in samples(info, device, torch.float64):
        names = [name for name, _ in sample.ours.named_parameters()]

        def call(*tensors: torch.Tensor, sample: Sample = sample, names: list[str] = names) -> torch.Tensor:
            count = len(sample.inputs)
            swapped = dict(zip(names, tensors[count:], strict=True))
            return on_kernels(torch.func.functional_call, sample.ours, swapped, tensors[:count])

        tensors = (*sample.inputs, *sample.ours.parameters())
        assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@by_module_once
def test_module_construction(info: Any, device: torch.device) -> None:
    """factory kwargs, device contexts, skip_init, to_empty, to: parameters where and as torch's are."""
    rows = info.module_inputs_func(info, device=device, dtype=torch.float32, requires_grad=False, training=True)
    for row in rows:
        args, kwargs = row.constructor_input.args, row.constructor_input.kwargs
        described = []
        for space in (fastlayers.nn, torch.nn):
            cls = getattr(space, info.module_cls.__name__)
            torch.manual_seed(0)
            made = [cls(*args, **kwargs)]
            with torch.device("meta"):
                made.append(cls(*args, **kwargs))
            if Sample.factory(info, device, torch.float16):
                made.append(cls(*args, **kwargs, device=device, dtype=torch.float16))
            if Sample.factory(info, device, torch.float16) and not info.is_lazy:
                made.append(torch.nn.utils.skip_init(cls, *args, **kwargs, device=device))
            if not info.is_lazy:
                made.append(made[1].to_empty(device=device))
                made.append(cls(*args, **kwargs).to(device=device, dtype=torch.float64))
                made.append(cls(*args, **kwargs).half().float())
            described.append(
                [
                    (repr(m), [(n, type(t), t.dtype, t.device) for n, t in m.state_dict(keep_vars=True).items()])
                    for m in made
                ]
            )
            if not info.is_lazy:
                described[-1].append([t.tolist() for t in made[0].state_dict().values()])
        assert described[0] == described[1]


@by_module_once
def test_module_memory_format(info: Any, device: torch.device) -> None:
    """Strides of result and gradients as torch's, for input and module in either format."""
    for sample in samples(info, device, torch.float32, requires_grad=False):
        if not sample.inputs or sample.inputs[0].dim() != 4:
            continue
        formats = (torch.contiguous_format, torch.channels_last)
        for of_input in formats:
            for of_module in formats:
                x = sample.inputs[0].to(memory_format=of_input)
                results = []
                for module, watch in ((sample.ours, on_kernels), (sample.theirs, lambda f, *args: f(*args))):
                    leaf = x.detach().clone().requires_grad_()
                    module.to(memory_format=of_module)
                    results.append(watch(gradients, lambda: module(leaf), leaf, *module.parameters()))  # noqa: B023
                for a, b in zip(*results, strict=True):
                    torch.testing.assert_close(a, b)
                assert [t.stride() for t in results[0][:2]] == [t.stride() for t in results[1][:2]]


@by_module_once
def test_module_in_place(info: Any, device: torch.device) -> None:
    """check_inplace: the input is the result, counted as changed, with the gradients of the other way."""
    if info.module_cls.__name__ != "ReLU":
        assert "inplace" not in info.module_cls.__init__.__code__.co_varnames
        return
    for sample in samples(info, device, torch.float32):
        (x,) = sample.inputs
        before = x.detach().clone().requires_grad_()
        clone = before.clone()
        version = clone._version
        y = on_kernels(fastlayers.ReLU(inplace=True), clone)
        assert y is clone
        assert y._version == version + 1
        assert torch.equal(y, sample.ours(x))
        y.square().sum().backward()
        torch.testing.assert_close(before.grad, torch.autograd.grad(sample.theirs(x).square().sum(), x)[0])


# --- every torch.nn module, accelerated ----------------------------------------------------------------------------------


def _called(module: torch.nn.Module, row: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs, and gradients of inputs and parameters, under one seed."""

    def fresh(t: Any) -> Any:
        return t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t

    args, kwargs = tree_map(fresh, (row.forward_input.args, row.forward_input.kwargs))
    torch.manual_seed(0)
    outputs = leaves(module(*args, **kwargs))
    wanted = [t for t in (*leaves((args, kwargs)), *module.parameters()) if t.requires_grad]
    flowing = [y.sum() for y in outputs if y.requires_grad and not y.is_complex()]
    if not wanted or not flowing:
        return outputs, []
    return outputs, [g for g in torch.autograd.grad(sum(flowing), wanted, allow_unused=True) if g is not None]


@pytest.mark.filterwarnings("ignore")  # torch's own modules'
@pytest.mark.parametrize("info", module_db, ids=lambda info: info.name)
def test_every_torch_module_accelerated(info: Any, device: torch.device) -> None:
    """Converted, it computes the same; restored, it is what it was."""
    called = 0
    dtype = torch.float64 if "Fractional" in info.name else torch.float32  # those inputs hold float64 samples
    for training in (True, False):
        torch.manual_seed(0)
        for row in info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=training):
            if row.forward_input is None:
                continue
            args, kwargs = row.constructor_input.args, row.constructor_input.kwargs
            theirs = info.module_cls(*args, **kwargs).train(training)
            if not info.is_lazy:
                theirs.to(device)
            ours = copy.deepcopy(theirs)
            classes = [type(m) for m in ours.modules()]
            tensors = [id(t) for t in (*ours.parameters(), *ours.buffers())]
            fastlayers.accelerate(ours)
            assert tensors == [id(t) for t in (*ours.parameters(), *ours.buffers())]
            with fastlayers.policy("auto"):
                mine, other = _called(ours, row), _called(theirs, row)
            torch.testing.assert_close(mine, other, equal_nan=True)
            called += 1
            fastlayers.restore(ours)
            if not info.is_lazy:
                assert classes == [type(m) for m in ours.modules()]
            assert not any(type(m).__module__.startswith("fastlayers") for m in ours.modules())
    assert called


# --- op_db -------------------------------------------------------------------------------------------------------------

by_function = pytest.mark.parametrize(
    ("info", "dtype"), of_dtypes(OPS, lambda info: info.dtypes if not torch.cuda.is_available() else info.dtypesIfCUDA)
)
by_function_once = pytest.mark.parametrize("info", OPS, ids=lambda info: info.full_name)


def calls(info: Any, sample: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Ours and torch's function on a sample's arguments, given its tensors."""
    ours, theirs = FUNCTIONS[info.name], info.op
    if info.name == "softmax":  # op_db calls torch.softmax, which has no `_stacklevel`
        theirs = torch.nn.functional.softmax
    return ours, theirs


def tensors_of(sample: Any) -> list[torch.Tensor]:
    return leaves((sample.input, sample.args, sample.kwargs))


def apply(function: Callable[..., Any], sample: Any) -> Any:
    return function(sample.input, *sample.args, **sample.kwargs)


def expanded(tree: Any) -> Any:
    """Every tensor with dimensions as one of its slices, expanded."""
    return tree_map(
        lambda t: (
            t.detach()[:1].expand(t.shape).requires_grad_(t.requires_grad)
            if isinstance(t, torch.Tensor) and t.dim() and len(t)
            else t
        ),
        tree,
    )


@by_function
def test_function(info: Any, dtype: torch.dtype, device: torch.device) -> None:
    """reference_inputs: as they are, with gaps, expanded; forward and every gradient."""
    floating = dtype in FLOATS
    count = Counter()
    every = list(info.reference_inputs(device, dtype, requires_grad=floating))  # the sample_inputs among them
    assert len(every) >= len(list(info.sample_inputs(device, dtype)))
    for sample in every:
        ours, theirs = calls(info, sample)
        for kind in ("as it is", "gaps", "expanded"):
            row = sample
            if kind != "as it is" and sample.input.numel() > 2**16:
                continue  # the interpreter takes long over them
            if kind == "gaps":
                row = sample.noncontiguous()
            elif kind == "expanded":
                row = sample.transform(expanded)
            count[kind] += 1
            if not floating:
                with fastlayers.policy("auto"):
                    mine, other = (apply(f, row) for f in (ours, theirs))
                torch.testing.assert_close(mine, other, rtol=0, atol=0)
                continue

            # Some of the database's leaves are views that gradients don't reach.
            row = row.transform(lambda t: t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t)
            y = apply(theirs, row)
            dy = torch.randn_like(y)
            tensors = tensors_of(row)
            assert all(t.requires_grad for t in tensors)
            mine = on_kernels(gradients, lambda: apply(ours, row), *tensors, dy=dy)  # noqa: B023
            others = []
            for *moved, moved_dy in neighbours(*tensors, dy):
                for t in moved:
                    t.requires_grad_()
                swap = dict(zip(map(id, tensors), moved, strict=True))
                near = row.transform(lambda t: swap.get(id(t), t))  # noqa: B023
                others.append(gradients(lambda: apply(theirs, near), *moved, dy=moved_dy))  # noqa: B023
            exact = row.transform(
                lambda t: t.detach().double().requires_grad_()
                if isinstance(t, torch.Tensor)
                else torch.float64 if isinstance(t, torch.dtype) and t.is_floating_point else t
            )  # fmt: skip
            right = gradients(lambda: apply(theirs, exact), *tensors_of(exact), dy=dy.double())  # noqa: B023
            for a, c, *b in zip(mine, right, *others, strict=True):
                assert_within_budget(a, b, c, f"{info.full_name} {kind} {row}")
            assert mine[0].stride() == y.stride()
    assert min(count.values()) > 0.8 * len(every)


@by_function_once
def test_function_errors(info: Any, device: torch.device) -> None:
    """error_inputs: torch's exception with torch's message, under every policy."""
    if info.error_inputs_func is None:
        assert info.name != "nn.functional.conv2d"
        return
    seen = 0
    for path in ("auto", "triton", "torch"):
        for error in info.error_inputs(device):
            with fastlayers.policy(path), pytest.raises(error.error_type, match=error.error_regex):
                apply(FUNCTIONS[info.name], error.sample_input)
            seen += 1
    assert seen >= 30


@by_function_once
def test_function_derivatives(info: Any, device: torch.device) -> None:
    """gradcheck with batched gradients and forward mode, gradgradcheck."""
    assert info.supports_autograd
    assert info.supports_gradgrad
    seen = 0
    for sample in info.sample_inputs(device, torch.float64, requires_grad=True):
        tensors = tensors_of(sample)
        if any(t.numel() == 0 for t in tensors):
            continue  # no derivative to check; test_function compares them with torch's

        def call(*swapped: torch.Tensor, sample: Any = sample, tensors: Any = tensors) -> torch.Tensor:
            swap = dict(zip(map(id, tensors), swapped, strict=True))
            return apply(FUNCTIONS[info.name], sample.transform(lambda t: swap.get(id(t), t)))  # noqa: B023

        with fastlayers.policy("auto"):  # forward mode is torch's own
            assert torch.autograd.gradcheck(
                call, tensors, fast_mode=True, check_batched_grad=True, check_forward_ad=info.supports_forward_ad
            )
        assert torch.autograd.gradgradcheck(lambda *t, call=call: on_kernels(call, *t), tensors, fast_mode=True)
        seen += 1
    assert seen
