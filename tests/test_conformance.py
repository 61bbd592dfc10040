"""torch's own test databases: `module_db` on our classes, `op_db` on our functions, and every torch.nn module, accelerated.

Which classes and functions are ours, the catalog says. Every sample must run on the kernels, except for what a row of the
catalog says that torch's own function takes: then the reason must be found there, in the README's words.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from databases import (
    FLOATS,
    MARKS,
    MODULES,
    OPS,
    ROW,
    Call,
    few,
    first,
    function_of,
    gradients,
    leaves,
    of_dtypes,
    on_kernels,
    scale_for,
    tolerance,
)
from samples_table import table
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.testing._internal.common_utils import noncontiguous_like
from torch.utils._pytree import tree_map

import fastlayers
from fastlayers.catalog import ROWS
from fastlayers.testing import assert_within_budget, neighbours

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")]  # of TransformerEncoder


def test_the_databases_have_us() -> None:
    known = {info.module_cls.__name__ for info in module_db}  # Upsample and Hardsigmoid aren't
    assert {info.module_cls.__name__ for info in MODULES} >= {r.name for r in ROWS if r.operation is not None} & known
    # op_db has no fold.
    assert {function_of(info) for info in OPS} == {name for name, row in ROW.items() if not row.random} - {"fold"}
    assert any(info.is_lazy for info in MODULES)
    assert any(info.module_error_inputs_func for info in MODULES)
    assert any(info.error_inputs_func for info in OPS)


def test_the_table_of_samples() -> None:
    """A row for each layer, of two files' figures."""
    lines = [
        dict(row="Linear", dtype=dtype, passed=3, share=share, ours=10, theirs=12, reasons={"p = 1": 2})
        for dtype, share in (("float32", 40), ("float16", 50), ("float32", 30))
    ]
    kernel = dict(target="sm_90", registers=99, loop={"ffma": 7}, loads={"128": 2}, stores={"32": 1})
    kernel["estimated ms"] = {"H200": (0.1, "memory")}
    rows = table(
        lines, [dict(kernel, kernel="matmul forward"), dict(kernel, kernel="GLU gate", target="sm_80")]
    ).splitlines()
    assert len(rows) == 2 + len(ROWS)
    assert "| Linear | 3 float16, 6 float32 | 50 | 30 | 36 | 99 | 7 | 32 | memory (1) | p = 1 (6) |" in rows
    assert "| GLU | none | - | - | - | - | - | - | - |  |" in rows


def accepts(cls: type, *names: str) -> bool:
    return set(names) <= inspect.signature(cls.__init__).parameters.keys()


class Sample:
    """A row of module_db: our module and torch's with the same parameters, and a call."""

    def __init__(self, info: Any, row: Any, device: torch.device, dtype: torch.dtype, training: bool):
        name = info.module_cls.__name__
        args, kwargs = row.constructor_input.args, row.constructor_input.kwargs
        factory = dict(device=device, dtype=dtype) if accepts(info.module_cls, "device", "dtype") else {}
        self.make = lambda space, **more: getattr(space, name)(*args, **{**kwargs, **more})
        self.arguments = repr((args, kwargs))
        self.ours = self.make(fastlayers.nn, **factory).train(training)
        self.theirs = self.make(torch.nn, **factory).train(training)
        if not factory:  # recurrent layers don't name theirs
            self.ours.to(device, dtype)
            self.theirs.to(device, dtype)
        # Leaves, each of its own: some of the database's rows give one tensor twice.
        self.call = Call(row.forward_input.args, row.forward_input.kwargs).map(torch.clone)
        self.reference = None
        if row.reference_fn is not None:
            detached = tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, self.call.tree)
            self.reference = lambda: row.reference_fn(self.ours, *detached[0], **detached[1])
        if info.is_lazy:
            with torch.no_grad():
                on_kernels(self.call.of, self.ours)
                self.call.of(self.theirs)
        self.theirs.load_state_dict(self.ours.state_dict())


def samples(
    info: Any, device: torch.device, dtype: torch.dtype, requires_grad: bool = True, pick: Callable[[Any], Any] = few
) -> Iterator[Sample]:
    """In training and in eval; once, if the module isn't told them apart."""
    for training in (True, False) if info.train_and_eval_differ else (True,):
        rows = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=requires_grad, training=training)
        assert rows
        yield from (Sample(info, row, device, dtype, training) for row in pick(rows))


by_module = pytest.mark.parametrize(  # in complex dtypes, which transposed convolutions have, too, torch computes
    ("info", "dtype"), of_dtypes(MODULES, lambda info: [dtype for dtype in info.dtypes if dtype in FLOATS])
)
by_module_once = pytest.mark.parametrize("info", MODULES, ids=lambda info: info.module_cls.__name__)


@by_module
def test_module(info: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Forward, every gradient, the database's reference, inputs and parameters with gaps, and copies."""
    copied: set[str] = set()
    for sample in samples(info, device, dtype):
        ours, theirs, call = sample.ours, sample.theirs, sample.call
        exact = copy.deepcopy(theirs).double()
        gapped = copy.deepcopy(ours)
        for parameter in gapped.parameters():
            parameter.data = noncontiguous_like(parameter.data)
        dy = torch.randn_like(first(call.of(theirs)))

        def run(module: torch.nn.Module, call: Call, dy: torch.Tensor) -> list[Any]:
            return gradients(lambda: call.of(module), *call.floats, *module.parameters(), dy=dy)

        others = []
        for *moved, moved_dy in neighbours(*call.floats, dy):
            moved = [t.detach().requires_grad_(u.requires_grad) for t, u in zip(moved, call.floats, strict=True)]
            others.append(run(theirs, call.having(moved), moved_dy))
        right = run(exact, call.map(torch.Tensor.double), dy.double())
        apart = call.map(noncontiguous_like)
        runs = [(ours, call, dy), (ours, apart, noncontiguous_like(dy))]
        if [*ours.parameters()]:
            runs += [(gapped, call, dy), (gapped, apart, dy)]
        if sample.arguments not in copied:  # the same layer in another shape has the same copies
            copied.add(sample.arguments)
            runs += [(copy.deepcopy(ours), call, dy), (pickle.loads(pickle.dumps(ours)), call, dy)]
        scale = scale_for(theirs, *call.floats)
        for module, given, dy_ in runs:
            mine = on_kernels(run, module, given, dy_)
            for a, c, *b in zip(mine, right, *others, strict=True):
                assert_within_budget(a, b, c, str(ours), scale)
        # The database's reference rounds as well, in 16 bits more than torch does. The errors were judged by float64 above.
        if sample.reference is not None and dtype.itemsize > 2:
            torch.testing.assert_close(
                first(on_kernels(call.of, ours)), first(on_kernels(sample.reference)), equal_nan=True, **tolerance(ours)
            )


@pytest.mark.slow
@by_module_once
def test_module_derivatives(info: Any, device: torch.device) -> None:
    """gradcheck and gradgradcheck, of inputs and parameters, in train and eval."""
    assert info.supports_gradgrad
    for sample in samples(info, device, torch.float64):
        names = [name for name, _ in sample.ours.named_parameters()]
        wanted = [t for t in sample.call.floats if t.requires_grad]

        def call(*tensors: torch.Tensor, sample: Sample = sample, names: Any = names, wanted: Any = wanted) -> Any:
            swap = dict(zip(map(id, wanted), tensors, strict=False))
            args, kwargs = sample.call.having([swap.get(id(t), t) for t in sample.call.floats]).tree
            parameters = dict(zip(names, tensors[len(wanted) :], strict=True))
            return on_kernels(torch.func.functional_call, sample.ours, parameters, args, kwargs)

        tensors = (*wanted, *sample.ours.parameters())
        assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize(
    "info", [info for info in MODULES if info.module_error_inputs_func], ids=lambda info: info.module_cls.__name__
)
def test_module_errors(info: Any, device: torch.device) -> None:
    """module_error_inputs: torch's exception with torch's message, under every policy."""
    for path, training in itertools.product(("auto", "triton", "torch"), (True, False)):
        errors = info.module_error_inputs_func(
            info, device=device, dtype=torch.float32, requires_grad=False, training=training
        )
        assert errors
        for error in errors:
            made, given = error.module_error_input.constructor_input, error.module_error_input.forward_input

            def build(made: Any = made) -> torch.nn.Module:
                return getattr(fastlayers.nn, info.module_cls.__name__)(*made.args, **made.kwargs)

            if error.error_type is IndexError and (path != "torch" or device.type != "cpu"):
                continue  # torch looks at the indices on a CPU alone, and stops the process on a GPU
            of_forward = error.error_on is ModuleErrorEnum.FORWARD_ERROR
            module = build() if of_forward else None
            with fastlayers.policy(path), pytest.raises(error.error_type, match=error.error_regex):
                build() if module is None else module(*given.args, **given.kwargs)


@by_module_once
def test_module_construction(info: Any, device: torch.device) -> None:
    """factory kwargs, device contexts, skip_init, to_empty, to: parameters where and as torch's are."""
    rows = info.module_inputs_func(info, device=device, dtype=torch.float32, requires_grad=False, training=True)
    for row in rows:
        args, kwargs = row.constructor_input.args, row.constructor_input.kwargs
        described = []
        for space in (fastlayers.nn, torch.nn):
            cls = getattr(space, info.module_cls.__name__)
            kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "dtype")}
            torch.manual_seed(0)
            made = [cls(*args, **kwargs)]
            with torch.device("meta"):
                made.append(cls(*args, **kwargs))
            if accepts(info.module_cls, "device", "dtype"):
                made.append(cls(*args, **kwargs, device=device, dtype=torch.float16))
            if accepts(info.module_cls, "device", "dtype") and not info.is_lazy:
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
    for sample in samples(info, device, torch.float32):
        dims = 5 if any(p.dim() == 5 for p in sample.ours.parameters()) else 4
        if not sample.call.floats or sample.call.floats[0].dim() != dims:
            continue
        formats = (torch.contiguous_format, torch.channels_last if dims == 4 else torch.channels_last_3d)
        for of_input, of_module in itertools.product(formats, formats):
            results = []
            for module, watch in ((sample.ours, on_kernels), (sample.theirs, lambda f, *args: f(*args))):
                call = sample.call.map(lambda t: t.clone().to(memory_format=of_input) if t.dim() == dims else t)  # noqa: B023
                module.to(memory_format=of_module)
                try:
                    results.append(watch(gradients, lambda: call.of(module), *call.floats, *module.parameters()))  # noqa: B023
                except RuntimeError as error:  # nll_loss of torch on a CPU has no such gradient
                    if watch is on_kernels or "must be contiguous" not in str(error):
                        raise
            if len(results) < 2:
                continue
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # the numbers are judged elsewhere
            # The README's known differences: the gradient of logits lies as they do.
            compared = 1 if info.module_cls is torch.nn.CrossEntropyLoss else 2
            assert [t.stride() for t in results[0][:compared]] == [t.stride() for t in results[1][:compared]]


@pytest.mark.parametrize(
    "info", [info for info in MODULES if accepts(info.module_cls, "inplace")], ids=lambda info: info.module_cls.__name__
)
def test_module_in_place(info: Any, device: torch.device) -> None:
    """check_inplace: the input is the result, counted as changed, with the gradients of the other way."""
    for sample in samples(info, device, torch.float32):
        (x,) = sample.call.floats
        before = x.detach().clone().requires_grad_()
        clone = before.clone()
        version = clone._version
        y = on_kernels(sample.make(fastlayers.nn, inplace=True), clone)
        assert y is clone
        assert y._version == version + 1
        torch.testing.assert_close(y, sample.ours(x), rtol=1e-6, atol=1e-6)  # torch may have computed one of the two
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
        for row in few(
            info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=training)
        ):
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
            torch.testing.assert_close(mine, other, equal_nan=True, **tolerance(ours))
            called += 1
            fastlayers.restore(ours)
            if not info.is_lazy:
                assert classes == [type(m) for m in ours.modules()]
            assert not any(type(m).__module__.startswith("fastlayers") for m in ours.modules())
    assert called
