"""The sanitizer against planted faults, each next to a correct twin."""

from typing import Any

import pytest
import sanitizer
import torch
import triton
import triton.language as tl
from sanitizer import KernelMemoryError
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlayers.kernels.runtime import launch as _launch

pytestmark = pytest.mark.skipif(not _launch.INTERPRETED, reason="watches the interpreter only")


@pytest.fixture(autouse=True, scope="module")
def _watched():
    sanitizer.install()


@triton.jit
def _copy_kernel(x_ptr, y_ptr, LOADED, STORED, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i * stride, mask=i < LOADED)
    tl.store(y_ptr + i * stride, x, mask=i < STORED)


@triton.jit
def _strided_copy_kernel(x_ptr, y_ptr, SIZE, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i.to(tl.int64) * stride, mask=i < SIZE), mask=i < SIZE)


@triton.jit
def _unmasked_copy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


def _run(kernel: Any, programs, *args, **meta):
    kernel[(programs,)](*args, **meta)


def _tensors(size=21, dtype=torch.float32):
    """Two tensors amid room of their own: whatever lies near one of them is not the other."""
    x, y = torch.zeros(2, 64 + size + 64).to(dtype).unbind()
    x[64:-64] = torch.arange(size).to(dtype)
    return x[64:-64], y[64:-64]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.bool])
def test_correct_masks(dtype):
    x, y = _tensors(dtype=dtype)
    _run(_copy_kernel, 2, x, y, 21, 21, 1, BLOCK=16)
    assert torch.equal(y, x)


def test_correct_without_masks():
    x, y = _tensors(32)
    _run(_unmasked_copy_kernel, 2, x, y, BLOCK=16)
    assert torch.equal(y, x)


def test_wrong_mask_of_load():
    message = r"_copy_kernel, program \(1, 0, 0\): load: out of bounds in 1 of 6 lanes, first 0 bytes past .* x_ptr"
    with pytest.raises(KernelMemoryError, match=message):
        _run(_copy_kernel, 2, *_tensors(), 22, 21, 1, BLOCK=16)


def test_wrong_mask_of_store():
    message = r"_copy_kernel, program \(1, 0, 0\): store: out of bounds in 3 of 8 lanes, first 0 bytes past .* y_ptr"
    with pytest.raises(KernelMemoryError, match=message):
        _run(_copy_kernel, 2, *_tensors(), 21, 24, 1, BLOCK=16)


def test_missing_mask():
    with pytest.raises(KernelMemoryError, match=r"load: out of bounds in 11 of 16 lanes"):
        _run(_unmasked_copy_kernel, 2, *_tensors(), BLOCK=16)


def test_before_the_first_element():
    x, y = _tensors()
    with pytest.raises(KernelMemoryError, match=r"load: out of bounds in 15 of 16 lanes, first 4 bytes before x_ptr"):
        _run(_copy_kernel, 1, x, y, 21, 21, -1, BLOCK=16)


def test_nothing_is_written_past_the_end():
    storage = torch.zeros(64)
    with pytest.raises(KernelMemoryError):
        _run(_unmasked_copy_kernel, 2, torch.ones(64), storage[:21], BLOCK=16)
    assert not storage[16:].any()


def test_end_of_a_view():
    """The storage goes on behind the view; the kernel must not."""
    x, y = _tensors(64)
    _run(_copy_kernel, 2, x[:21], y[:21], 21, 21, 1, BLOCK=16)
    with pytest.raises(KernelMemoryError, match="past the end of x_ptr"):
        _run(_copy_kernel, 2, x[:21], y[:21], 22, 21, 1, BLOCK=16)


def test_start_of_a_view():
    x, y = _tensors(64)
    _run(_copy_kernel, 1, x[8:], y[8:], 16, 16, 1, BLOCK=16)
    with pytest.raises(KernelMemoryError, match="before x_ptr"):
        _run(_copy_kernel, 1, x[8:], y[8:], 16, 16, -1, BLOCK=16)


def test_gaps_of_a_view():
    x, y = _tensors(64)
    _run(_copy_kernel, 2, x[::2], y[::2], 21, 21, 2, BLOCK=16)
    assert torch.equal(y[:42:2], x[:42:2])
    assert not y[1::2].any()
    with pytest.raises(KernelMemoryError, match="4 bytes into x_ptr, not at an element of it"):
        _run(_copy_kernel, 2, x[::2], y[::2], 21, 21, 1, BLOCK=16)


def test_wide_gaps_cost_nothing():
    x, y = torch.empty(2**32 + 1, dtype=torch.int8)[:: 2**31], torch.zeros(3, dtype=torch.int8)
    x.fill_(1)
    _run(_strided_copy_kernel, 1, x, y, 3, x.stride(0), BLOCK=4)
    assert y.all()
    with pytest.raises(KernelMemoryError, match="2147483647 bytes into x_ptr, not at an element of it"):
        _run(_strided_copy_kernel, 1, x, y, 3, x.stride(0) - 1, BLOCK=4)


def test_expanded_argument():
    x, y = torch.ones(1).expand(21), torch.zeros(21)
    with pytest.raises(KernelMemoryError, match="past the end of x_ptr"):
        _run(_copy_kernel, 2, x, y, 21, 21, 1, BLOCK=16)


def test_in_place():
    x = torch.arange(21.0)
    _run(_copy_kernel, 2, x, x, 21, 21, 1, BLOCK=16)
    assert torch.equal(x, torch.arange(21.0))


def test_empty_tensor_and_no_program():
    _run(_copy_kernel, 1, torch.empty(0), torch.empty(0), 0, 0, 1, BLOCK=16)
    with pytest.raises(KernelMemoryError, match="without any tensor to touch"):
        _run(_copy_kernel, 1, torch.empty(0), torch.empty(0), 1, 0, 1, BLOCK=16)


@triton.jit
def _optional_kernel(x_ptr, y_ptr, mask_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if x_ptr is not None:
        inside = tl.load(mask_ptr + i) != 0
        tl.store(y_ptr + i, tl.load(x_ptr + i, mask=inside), mask=inside)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32])
def test_none_and_integer_masks(dtype):
    mask = (torch.arange(16) < 5).to(dtype)
    y = torch.zeros(5)
    _run(_optional_kernel, 1, None, y, None, BLOCK=16)
    _run(_optional_kernel, 1, torch.ones(5), y, mask, BLOCK=16)
    assert y.all()
    with pytest.raises(KernelMemoryError, match="of 5 lanes"):
        _run(_optional_kernel, 1, torch.ones(4), y, mask, BLOCK=16)


@triton.jit
def _stores_kernel(y_ptr, between_programs, between_lanes, BLOCK: tl.constexpr):
    i = tl.program_id(0) * between_programs + tl.arange(0, BLOCK) // between_lanes
    tl.store(y_ptr + i, i)


def test_disjoint_stores():
    y = torch.zeros(32, dtype=torch.int32)
    _run(_stores_kernel, 2, y, 16, 1, BLOCK=16)
    assert torch.equal(y, torch.arange(32, dtype=torch.int32))


def test_overlapping_stores():
    message = r"_stores_kernel, program \(1, 0, 0\): store: overwrites what another program wrote"
    with pytest.raises(KernelMemoryError, match=message):
        _run(_stores_kernel, 2, torch.zeros(32, dtype=torch.int32), 15, 1, BLOCK=16)


def test_lanes_with_one_address():
    with pytest.raises(KernelMemoryError, match="two lanes of one store write to one address"):
        _run(_stores_kernel, 2, torch.zeros(32, dtype=torch.int32), 16, 2, BLOCK=16)


def test_a_program_may_overwrite_itself():
    @triton.jit
    def kernel(y_ptr):
        i = tl.arange(0, 16)
        tl.store(y_ptr + i, i)
        tl.store(y_ptr + i, tl.load(y_ptr + i) + 1)

    y = torch.zeros(16, dtype=torch.int32)
    _run(kernel, 1, y)
    assert torch.equal(y, torch.arange(1, 17, dtype=torch.int32))


@triton.jit
def _shift_kernel(x_ptr, shift):
    """Each program moves one element of x, if `shift` is not 0 to where its neighbour reads."""
    program = tl.program_id(0)
    x = tl.load(x_ptr + program + 1)
    tl.store(x_ptr + program + 1 + shift, x)


@pytest.mark.parametrize(("shift", "fault"), [(1, "load: reads what"), (-1, "store: overwrites what")])
def test_races_between_readers_and_writers(shift, fault):
    _run(_shift_kernel, 4, torch.arange(6.0), 0)
    with pytest.raises(KernelMemoryError, match=rf"program \(1, 0, 0\): {fault} another program"):
        _run(_shift_kernel, 4, torch.arange(6.0), shift)


def test_launches_don_t_race_each_other():
    y = torch.zeros(16, dtype=torch.int32)
    for _ in range(2):
        _run(_stores_kernel, 1, y, 16, 1, BLOCK=16)


@triton.jit
def _misaligned_kernel(x_ptr, y_ptr, OFFSET: tl.constexpr):
    i = tl.arange(0, 4)
    bytes_ptr = x_ptr.to(tl.pointer_type(tl.int8)) + OFFSET
    tl.store(y_ptr + i, tl.load(bytes_ptr.to(tl.pointer_type(tl.float32)) + i))


def test_misaligned():
    x, y = _tensors(8)
    _run(_misaligned_kernel, 1, x, y, OFFSET=4)
    assert torch.equal(y[:4], x[1:5])
    with pytest.raises(KernelMemoryError, match="load: misaligned in 4 of 4 lanes, first 2 bytes into x_ptr"):
        _run(_misaligned_kernel, 1, x, y, OFFSET=2)


def test_wider_than_the_elements():
    """Two elements read as one: aligned, and all of it inside the tensor, but for the last."""
    with pytest.raises(KernelMemoryError, match="load: out of bounds"):
        _run(_misaligned_kernel, 1, torch.zeros(8, dtype=torch.int16), torch.zeros(4), OFFSET=0)


@triton.jit
def _atomics_kernel(x_ptr, LANES: tl.constexpr):
    tl.atomic_add(x_ptr + tl.arange(0, LANES) // 2, 1)
    tl.atomic_cas(x_ptr + LANES // 2 - 1, 0, 0)


def test_atomics():
    x = torch.zeros(8, dtype=torch.int32)
    _run(_atomics_kernel, 3, x, LANES=16)
    assert (x == 6).all()
    with pytest.raises(KernelMemoryError, match="atomic: out of bounds in 2 of 16 lanes"):
        _run(_atomics_kernel, 1, x[:7], LANES=16)


@triton.jit
def _cas_kernel(x_ptr):
    tl.atomic_cas(x_ptr + 1, 0, 1)


def test_compare_and_swap():
    x = torch.zeros(2, dtype=torch.int32)
    _run(_cas_kernel, 1, x)
    assert x.tolist() == [0, 1]
    with pytest.raises(KernelMemoryError, match="atomic: out of bounds in 1 of 1 lanes"):
        _run(_cas_kernel, 1, x[:1])


@triton.jit
def _load_at(x_ptr, i):
    return tl.load(x_ptr + i)


@triton.jit
def _calling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, _load_at(x_ptr, i))


def test_fault_in_a_called_function():
    x, y = _tensors(16)
    _run(_calling_kernel, 1, x, y, BLOCK=16)
    assert torch.equal(y, x)
    with pytest.raises(KernelMemoryError, match="past the end of x_ptr"):
        _run(_calling_kernel, 1, x[:15], y, BLOCK=16)


@triton.jit
def _descriptor_kernel(x, y, row, ROWS: tl.constexpr):
    y.store([0, 0], x.load([row, 0]))


def test_descriptors():
    x, y = torch.randn(6, 16), torch.zeros(4, 16)
    _run(
        _descriptor_kernel,
        1,
        TensorDescriptor.from_tensor(x, [4, 16]),
        TensorDescriptor.from_tensor(y, [4, 16]),
        4,
        ROWS=4,
    )
    assert torch.equal(y[:2], x[4:])
    wrong = TensorDescriptor(x[:4], shape=[6, 16], strides=[16, 1], block_shape=[4, 16])
    with pytest.raises(KernelMemoryError, match="load: out of bounds in 32 of 32 lanes"):
        _run(_descriptor_kernel, 1, wrong, TensorDescriptor.from_tensor(y, [4, 16]), 4, ROWS=4)
