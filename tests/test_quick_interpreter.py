"""The quick interpreter against Triton's own, function by function."""

import itertools
from typing import Any

import numpy as np
import pytest
import quick_interpreter
import torch
import triton
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from fastlayers.kernels.runtime import launch as _launch

pytestmark = pytest.mark.skipif(not _launch.INTERPRETED, reason="quickens the interpreter only")

TYPES = [
    *(tl.int1, tl.int8, tl.int16, tl.int32, tl.int64, tl.uint8, tl.uint16, tl.uint32, tl.uint64),
    *(tl.float16, tl.bfloat16, tl.float32, tl.float64),
]
POINTERS = [tl.pointer_type(tl.float32), tl.pointer_type(tl.int8), tl.pointer_type(tl.float32, const=True)]


@pytest.fixture(autouse=True, scope="module")
def _quick():
    quick_interpreter.install()


def outcome(function: Any, *args: Any) -> Any:
    """What it returns, or its error."""
    try:
        return function(*args)
    except Exception as error:
        return type(error), str(error)


def test_types_of_elements():
    quick, plain = interpreter._get_np_dtype, interpreter._get_np_dtype.__wrapped__
    for type in (*TYPES, *POINTERS):
        assert quick(type) == plain(type)
        assert quick(core.block_type(type, [4])) == plain(core.block_type(type, [4]))


def test_equality_of_types():
    plain = core.dtype.__eq__.__wrapped__
    for a, b in itertools.product(TYPES, [*TYPES, *POINTERS, core.constexpr(tl.int32), "int32", None]):
        assert (a == b) == plain(a, b)


SHAPES = [[4], [2, 1], (8, 2, 1), [core.constexpr(4)], core.tuple([2, 4]), [3], [], [2.0], [2**30]]


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))  # of a tuple of Triton's pytest makes no name
def test_types_of_blocks(shape: Any):
    plain = core.block_type.__init__.__wrapped__
    core.block_type(tl.float32, [8, 2, 1])  # now these sizes are known
    for _, type in itertools.product(range(2), (tl.float32, tl.bfloat16, *POINTERS)):
        other = core.block_type.__new__(core.block_type)
        expected = outcome(plain, other, type, shape)
        found = outcome(core.block_type, type, shape)
        if expected is not None:
            assert found == expected
            continue
        assert found == other and found.name == other.name and found.numel == other.numel
        assert found.shape.values == other.shape.values and found.element_ty is type


def test_tensors():
    plain = core.tensor.__init__.__wrapped__
    for _, type in itertools.product(range(2), [*TYPES, *POINTERS, core.block_type(tl.int8, [2, 4])]):
        handle, other = object(), core.tensor.__new__(core.tensor)
        plain(other, handle, type)
        tensor = core.tensor(handle, type)
        assert vars(tensor).keys() == vars(other).keys()
        assert tensor.handle is handle and tensor.type is type and tensor.dtype is other.dtype
        assert tensor.numel.value == other.numel.value
        assert [n.value for n in tensor.shape] == [n.value for n in other.shape]


def test_types_of_results():
    quick = TritonSemantic.computation_type_impl
    for a, b in itertools.product(TYPES, TYPES):
        for flags in itertools.product((False, True), repeat=3):
            args = (interpreter.interpreter_semantic, a, flags[0], b, flags[1], flags[2])
            expected = outcome(quick.__wrapped__, *args)
            assert outcome(quick, *args) == expected
            assert outcome(quick, *args) == expected


def test_operands():
    quick, semantic = TritonSemantic.binary_op_type_checking_impl, interpreter.interpreter_semantic

    def made(type: Any) -> Any:
        number = interpreter.TensorHandle(np.ones(1, interpreter._get_np_dtype(type)), type)
        return core.tensor(number, type)

    def described(result: Any) -> Any:
        pair = isinstance(result[0], core.tensor)
        return [(t.type, t.handle.data.dtype, t.handle.data.tolist()) for t in result] if pair else result

    for a, b in itertools.product([*TYPES, *POINTERS], repeat=2):
        for flags in itertools.product((False, True), repeat=4):
            args = (semantic, made(a), made(b), *flags)
            assert described(outcome(quick, *args)) == described(outcome(quick.__wrapped__, *args))


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
@pytest.mark.parametrize("type", [t for t in TYPES if t.is_int()], ids=str)
def test_integers_that_wrap(type: Any, operation: str):
    quick, semantic = TritonSemantic.binary_op_sanitize_overflow_impl, interpreter.interpreter_semantic
    low, high = (0, 1) if type is tl.int1 else (type.get_int_min_value(), type.get_int_max_value())
    numbers = sorted({low, high, low // 2, high // 2, 0, 1, min(max(-1, low), high)})
    raised = 0
    for a, b in itertools.product(numbers, numbers):
        operands = [
            core.tensor(interpreter.TensorHandle(np.full(2, x, interpreter._get_np_dtype(type)), type), block)
            for block in [core.block_type(type, [2])]
            for x in (a, b)
        ]
        expected = outcome(quick.__wrapped__, semantic, *operands, getattr(semantic, operation))
        assert outcome(quick, semantic, *operands, getattr(semantic, operation)) == expected
        raised += expected is not None
    assert raised or type.int_bitwidth in (1, 64)


@triton.jit
def _inner(x):
    return tl.sum(x, 0) + x


@triton.jit
def _nested_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, tl.max(_inner(tl.load(x_ptr + i)), 0) + tl.sigmoid(tl.load(x_ptr + i)))


@triton.jit
def _failing_kernel(x_ptr):
    tl.device_assert(tl.load(x_ptr) > 0, "as planted")


def test_the_language_is_patched_while_kernels_run_only():
    x = torch.arange(8.0)
    _launch.launch(
        _nested_kernel, 1, x, torch.empty(8), SIZE=8
    )  # after which the tensor's class owns what it inherited
    before = {module: dict(vars(module)) for module in (tl, core, core.tensor, core.dtype, tl.math)}
    for _ in range(3):
        y = torch.empty(8)
        _launch.launch(_nested_kernel, 1, x, y, SIZE=8)
        torch.testing.assert_close(y, 28 + 7 + x.sigmoid())
        with pytest.raises(InterpreterError, match="as planted"):
            _launch.launch(_failing_kernel, 1, x)
        assert before == {module: dict(vars(module)) for module in before}


def test_the_language_is_looked_through_once(monkeypatch: pytest.MonkeyPatch):
    patches, found = interpreter._patch_lang.__self__, []
    for _ in range(3):
        _launch.launch(_nested_kernel, 1, torch.arange(8.0), torch.empty(8), SIZE=8)
        monkeypatch.setattr(patches, "patch_lang", found.append)
    assert not found


def test_what_a_test_replaces_is_seen(monkeypatch: pytest.MonkeyPatch):
    x, y = torch.arange(8.0), torch.empty(8)
    _launch.launch(_nested_kernel, 1, x, y, SIZE=8)
    seen: list[tuple[int, int]] = []
    arange = tl.arange

    @core.builtin
    def watched(start, end, _semantic=None):
        seen.append((start, end))
        return arange(start, end, _semantic=_semantic)

    monkeypatch.setattr(tl, "arange", watched)
    _launch.launch(_nested_kernel, 1, x, y, SIZE=8)
    assert seen == [(0, 8)]
