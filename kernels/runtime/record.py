"""Records what launchers allocate and launch, as a function that repeats it.

A `Recorder` listens to one call of launchers and writes the source of a function that does the same without their Python: it
allocates tensors, and calls Triton's compiled launchers with the addresses of the new tensors. Nothing is kept of a tensor,
neither its address nor a reference to it.

Some calls can't be repeated, which the recorder finds out while it listens: those in which a torch function computes or copies,
and those with kernels that need scratch memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import _torch
from . import launch

Tensors = Sequence[torch.Tensor | None]
Results = tuple[Any, ...]
"""Tensors or None."""
Addresses = Sequence[int]
"""The address of each tensor."""

MAPS = 64
"""For how many addresses CUDA's tensor map of one descriptor is kept."""


def compile_function(head: str, body: Sequence[str], constants: dict[str, Any]) -> Callable[..., Any]:
    """A function compiled from source, whose globals are `constants`.

    It is compiled as straight-line source: interpreting a list of steps took 1.5 times as long.
    """
    exec(compile("\n    ".join([head, *body]), "<replay>", "exec"), constants)
    # A function among its own globals would be a reference cycle.
    return constants.pop(head[len("def ") : head.index("(")])


class Number(int):
    """One of a tensor's integers, which a replay reads from its own tensor: `source` says so in the script."""

    source: str


class Recording:
    """What one call allocated and launched."""

    memo: Any = None
    """For the caller: whatever it works out once for all replays of this recording."""
    writes: bool | None = None
    """For the caller: whether such calls write into tensors that they are given; None until that has been asked."""

    def __init__(self, recorder: "Recorder", script: Callable[..., Results | None]):
        self.index, self.device, self.device_type = recorder.index, recorder.device, recorder.device.type
        self.kernels = [*recorder.kernels.values()]
        self.launches = recorder.launches
        self.driver = None if launch.INTERPRETED else driver.active
        self.script = script

    def play(self, tensors: Tensors, addresses: Addresses) -> Results | None:
        """Repeat the call with these tensors. None if it can't be repeated now; then no result has been computed."""
        if launch.INTERPRETED:
            return self.script(self._allocate, 0, tensors, addresses)
        active = driver.active
        if active is not self.driver:
            return None
        for kernel in self.kernels:
            if kernel.pre_run_hooks:
                return None
        index = self.index
        if index != active.get_current_device():
            with torch.cuda.device(index):
                return self.play(tensors, addresses)
        for counter in launch.counters:
            counter.update(self.launches)
        allocate = launch.allocate_quickly.get(self.device_type) or self._allocate
        return self.script(allocate, active.get_current_stream(index), tensors, addresses)

    def _allocate(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return launch.allocate(size, stride, dtype=dtype, device=self.device)


class Recorder(_torch.TorchDispatchMode):
    """Listens to one call and writes its script.

    In the script t0, t1, ... are the tensors that the call is given, followed by those that it allocates, a0, a1, ... are their
    addresses, and c0, c1, ... are values that are the same in every replay.
    """

    def __init__(self, tensors: Tensors):
        super().__init__()
        first = next(t for t in tensors if t is not None)
        self.index, self.device = first.get_device(), first.device
        self.tensors = [*tensors]  # all are kept until the end, so that no address is used twice
        self.inputs = len(self.tensors)
        self.steps: list[tuple[list[str], set[int]]] = []  # the lines of each launch, and the tensors that it uses
        self.lines: list[str] = []  # of the step that isn't complete yet
        self.constants: dict[str, Any] = {}
        self.kernels: dict[int, Any] = {}
        self.launches: list[str] = []  # the kernels' names
        self.moved: set[int] = set()  # where views that launchers made begin, unless it is where their tensor does
        self.paused = False
        self.repeatable = all(t is None or t.numel() > 0 for t in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.paused:
            self.repeatable = self.repeatable and not func._schema.is_mutable and _only_metadata(result, args)
            first = args[0] if args else None
            views = (
                isinstance(result, torch.Tensor) and isinstance(first, torch.Tensor) and result.device == self.device
            )
            if views and result.data_ptr() != first.data_ptr():
                self.moved.add(result.data_ptr())
        return result

    def allocate(
        self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        self.paused = True
        tensor = launch.allocate(size, stride, dtype=dtype, device=device)
        self.paused = False
        address = tensor.data_ptr()
        aligned = launch.INTERPRETED or address % 16 == 0
        self.repeatable = self.repeatable and device == self.device and address != 0 and aligned
        i = len(self.tensors)
        self.tensors.append(tensor)
        self.lines += [f"t{i} = allocate({(*size,)}, {(*stride,)}, {self._name(dtype)})", f"a{i} = t{i}.data_ptr()"]
        if not launch.INTERPRETED:
            self.lines.append(f"if a{i} & 15: return None")  # the kernels were compiled for aligned addresses
        return tensor

    def numbers(self, tensor: torch.Tensor) -> list[int]:
        i, offset = self._place(tensor) or (-1, 0)
        self.repeatable = self.repeatable and 0 <= i < self.inputs and offset == 0
        self.paused = True
        found = [Number(n) for n in tensor.tolist()]
        self.paused = False
        for place, number in enumerate(found):
            number.source = f"n{i}[{place}]"
        self.lines.append(f"n{i} = t{i}.tolist()")
        return [*found]

    def launched(self, kernel: Any, programs: int, args: tuple[Any, ...], meta: dict[str, Any], compiled: Any) -> None:
        given = [a for a in args if isinstance(a, (torch.Tensor, TensorDescriptor))]
        places = [self._place(tensor) for tensor in given]
        found = [place for place in places if place is not None]
        simple = launch.INTERPRETED or _is_simple(kernel, compiled)
        self.repeatable = self.repeatable and len(found) == len(places) and simple
        if not self.repeatable:
            return
        write = self._interpreted if launch.INTERPRETED else self._compiled
        self.lines.append(write(kernel, programs, args, iter(found), meta, compiled))
        self.steps.append((self.lines, {i for i, _ in found}))
        self.lines = []

    def _compiled(
        self, kernel: Any, programs: int, args: Sequence[Any], places: Any, meta: dict[str, Any], compiled: Any
    ) -> str:
        """The line that launches a compiled kernel."""
        run, function, fixed, packs, describing = _entry(compiled)

        def address(i: int, offset: int) -> str:
            return f"a{i} + {offset}" if offset else f"a{i}"

        def argument(value: Any) -> str:
            if isinstance(value, torch.Tensor):
                return address(*next(places))
            if type(value) is TensorDescriptor:
                i, offset = next(places)
                return f"*{self._name(describing(value))}(t{i}, {address(i, offset)})"
            return self._name(value)

        self.kernels[id(kernel)] = kernel
        self.launches.append(launch.name_of(kernel))
        named = [meta.get(p.name, p.default) for p in kernel.params[len(args) :]]
        arguments = ", ".join(map(argument, (*args, *named)))
        before = ", ".join(map(self._name, (function, *fixed)))
        return f"{self._name(run)}({programs}, 1, 1, stream, {before}, {f'({arguments},)' if packs else arguments})"

    def _interpreted(
        self, kernel: Any, programs: int, args: Sequence[Any], places: Any, meta: dict[str, Any], compiled: Any
    ) -> str:
        """The line that runs a kernel in the interpreter, which takes tensors with the sizes that the launcher gave them."""

        def viewed(tensor: torch.Tensor, i: int, offset: int) -> str:
            begin = f", t{i}.storage_offset() + {offset // tensor.itemsize}" if offset else ""
            return f"t{i}.detach().as_strided({(*tensor.shape,)}, {tensor.stride()}{begin})"

        def argument(value: Any) -> str:
            if isinstance(value, torch.Tensor):
                return viewed(value, *next(places))
            if type(value) is TensorDescriptor:
                return f"*{self._name(_descriptor_arguments(value))}({viewed(value.base, *next(places))}, None)"
            return self._name(value)

        arguments = ", ".join(map(argument, args))
        return f"{self._name(launch.launch)}({self._name(kernel)}, {programs}, {arguments}, **{self._name(meta)})"

    def _name(self, value: Any) -> str:
        """How a constant, or a number that is read anew, is written in the script."""
        if type(value) is Number:
            return value.source
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def _place(self, argument: Any) -> tuple[int, int] | None:
        """Which of the tensors a launch was given, told by its address, and how many bytes behind that one's beginning it begins.
        None if it is none of them or several, or if no replay would know whether it is aligned as this one is."""
        base = argument.base if isinstance(argument, TensorDescriptor) else argument
        if not isinstance(base, torch.Tensor):
            return None
        begins = {i: t.data_ptr() for i, t in enumerate(self.tensors) if t is not None}
        address = base.data_ptr()
        found = [i for i, begin in begins.items() if begin == address]
        if found and address in self.moved:
            return None  # one of the tensors, or a view into another one that ends where it begins
        if not found:
            found = [i for i, begin in begins.items() if begin < address < begin + _extent(self.tensors[i])]
        if len(found) != 1:
            return None
        offset = address - begins[found[0]]
        unknown = offset > 0 and not launch.INTERPRETED and begins[found[0]] % 16 != 0
        return None if unknown else (found[0], offset)

    def finish(self, results: Results) -> Recording | None:
        """The recording of the whole call, which returned `results`; None if it can't be repeated."""
        indices = [
            None if r is None else next((i for i, t in enumerate(self.tensors) if t is r), -1) for r in results
        ]  # fmt: skip
        if not self.repeatable or self.lines or -1 in indices or not self.steps:
            return None
        inputs = range(self.inputs)
        body = [f"{''.join(f't{i}, ' for i in inputs)} = tensors", f"{''.join(f'a{i}, ' for i in inputs)} = addresses"]
        for i, (lines, used) in enumerate(self.steps):
            needed = {*inputs, *indices}.union(*[later for _, later in self.steps[i + 1 :]])
            body += [*lines, *[f"del t{index}" for index in sorted(used - needed)]]
        body.append(f"return ({''.join('None, ' if index is None else f't{index}, ' for index in indices)})")
        head = "def script(allocate, stream, tensors, addresses):"
        return Recording(self, compile_function(head, body, self.constants))


def _extent(tensor: Any) -> int:
    """The bytes from a tensor's first element to its last one."""
    return (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.itemsize


def _is_simple(kernel: Any, compiled: Any) -> bool:
    """Whether a kernel was launched by Triton's ordinary launcher, without scratch memory."""
    return (
        type(kernel) is triton.JITFunction
        and type(compiled) is triton.compiler.CompiledKernel
        and not getattr(compiled.metadata, "global_scratch_size", 0)
        and not getattr(compiled.metadata, "profile_scratch_size", 0)
    )


def _only_metadata(result: Any, args: Sequence[Any]) -> bool:
    """Whether a torch function has read or written no data: it involves no tensor, or returns a tensor without data, or a view
    of its first argument."""
    if not isinstance(result, torch.Tensor):
        return not any(isinstance(a, torch.Tensor) for a in args)
    if result.device.type == "meta":
        return True
    tensor = args[0] if args else None
    return (
        isinstance(tensor, torch.Tensor) and result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    )


Describe = Callable[[torch.Tensor, Any], list[Any]]
"""From a tensor and its address, the arguments that a kernel takes for a descriptor of it."""


def _descriptor_arguments(descriptor: TensorDescriptor) -> Describe:
    """Copies of a descriptor with another tensor, made without `TensorDescriptor.__init__`, whose checks have passed before."""
    fields = {name: value for name, value in vars(descriptor).items() if name != "base"}
    sizes, strides = descriptor.base.shape, descriptor.base.stride()

    def describe(base: torch.Tensor, address: Any) -> list[Any]:
        if address is not None and address != base.data_ptr():  # of a view that begins elsewhere than its tensor
            begin = base.storage_offset() + (address - base.data_ptr()) // base.itemsize
            base = base.as_strided(sizes, strides, begin)
        copy: Any = object.__new__(TensorDescriptor)
        vars(copy).update(fields, base=base)
        return [copy]

    return describe


def _tensor_map_arguments(descriptor: TensorDescriptor, meta: Any) -> Describe:
    """CUDA's tensor map, sizes and strides, as Triton's launcher (3.7) makes them from a TensorDescriptor.

    A map depends on nothing of a tensor but its address. The maps of recent addresses are kept, because weights keep theirs and
    the allocator reuses addresses.
    """
    describe, maps = _descriptor_arguments(descriptor), {}
    _, *rest = nvidia.make_tensordesc_arg(descriptor, meta)

    def describe_map(base: torch.Tensor, address: int) -> list[Any]:
        found = maps.get(address)
        if found is None:
            if len(maps) >= MAPS:
                maps.clear()
            maps[address] = found = nvidia.make_tensordesc_arg(*describe(base, address), meta)[0]
        return [found, *rest]

    return describe_map


def _entry(compiled: Any) -> tuple[Any, ...]:
    """How to launch a compiled kernel without hooks and scratch memory: a function of (x, y, z, stream, function, *fixed,
    *arguments), that function, `fixed`, whether the arguments are passed as one tuple, and what makes a `Describe` of a
    descriptor."""
    run, metadata = compiled.run, compiled.packed_metadata
    if type(run) is not nvidia.CudaLauncher or not hasattr(run, "arg_annotations"):
        return run, compiled.function, (metadata, None, None, None), False, _descriptor_arguments
    # What CudaLauncher.__call__ (triton 3.7) does, which saves 0.5 us, and 3 us for each descriptor.
    fixed = (
        run.launch_cooperative_grid, run.launch_pdl, metadata, None, None, None, None, None,
        run.arg_annotations, run.kernel_signature,
    )  # fmt: skip
    metas = getattr(compiled.metadata, "tensordesc_meta", None)
    if not metas:
        return run.launch, compiled.function, fixed, True, _descriptor_arguments
    each = iter(metas)
    launcher = driver.active.utils.launch
    return launcher, compiled.function, fixed, True, lambda d: _tensor_map_arguments(d, next(each))
