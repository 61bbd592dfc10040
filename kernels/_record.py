"""Writing down what launchers allocate and launch, and doing it again.

A `Recorder` listens to one call and writes a function that does the same without the launchers' Python, line by line: it
allocates, and calls Triton's compiled launchers with the new addresses. Of a tensor nothing is kept, neither address nor
reference.

What can't be done again is found out on the way: a torch function that computes or copies, a view that begins elsewhere
than its tensor, kernels that need scratch memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _launch

Tensors = Sequence[torch.Tensor | None]
Results = tuple[Any, ...]
"""Tensors or None."""
Addresses = Sequence[int]
"""Each tensor's."""

MAPS = 64
"""So many addresses are remembered for each descriptor."""


def written(head: str, body: Sequence[str], constants: dict[str, Any]) -> Callable[..., Any]:
    """The function of this source, as dataclasses write theirs: it goes straight on, where a loop over what there is to do
    takes half as long again."""
    exec(compile("\n    ".join([head, *body]), "<replay>", "exec"), constants)
    return constants.pop(head[len("def ") : head.index("(")])  # or it would hold itself


class Take:
    """What was written down of one call."""

    memo: Any = None
    """What whoever does it again finds worth working out only once."""

    def __init__(self, recorder: "Recorder", script: Callable[..., Results | None]):
        self.index, self.device, self.kind = recorder.index, recorder.device, recorder.device.type
        self.kernels = [*recorder.kernels.values()]
        self.driver = None if _launch.INTERPRETED else driver.active
        self.script = script

    def play(self, tensors: Tensors, addresses: Addresses) -> Results | None:
        """Do it again with these tensors. None if that can't be after all: nothing was done then that matters."""
        if _launch.INTERPRETED:
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
        allocate = _launch.allocate_quickly.get(self.kind) or self._allocate
        return self.script(allocate, active.get_current_stream(index), tensors, addresses)

    def _allocate(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return _launch.allocate(size, stride, dtype=dtype, device=self.device)


class Recorder(TorchDispatchMode):
    """Listens to one call and writes it down. In what it writes, t0, t1, ... are the tensors that the call is given and
    then those that it allocates, a0, a1, ... their addresses, and c0, c1, ... whatever is the same each time."""

    def __init__(self, tensors: Tensors):
        super().__init__()
        some = next(t for t in tensors if t is not None)
        self.index, self.device = some.get_device(), some.device
        self.held = [*tensors]  # to the end, so that no address comes twice
        self.inputs = len(self.held)
        self.steps: list[tuple[list[str], set[int]]] = []  # each launch, and the tensors it is given
        self.lines: list[str] = []  # of the step that is under way
        self.constants: dict[str, Any] = {}
        self.kernels: dict[int, Any] = {}
        self.quiet = False
        self.fits = all(t is None or t.numel() > 0 for t in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.quiet:
            self.fits = self.fits and not func._schema.is_mutable and _is_about_metadata(result, args)
        return result

    def allocate(
        self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        self.quiet = True
        tensor = _launch.allocate(size, stride, dtype=dtype, device=device)
        self.quiet = False
        address = tensor.data_ptr()
        self.fits = self.fits and device == self.device and address != 0 and (_launch.INTERPRETED or address % 16 == 0)
        i = len(self.held)
        self.held.append(tensor)
        self.lines += [f"t{i} = allocate({(*size,)}, {(*stride,)}, {self._name(dtype)})", f"a{i} = t{i}.data_ptr()"]
        if not _launch.INTERPRETED:
            self.lines.append(f"if a{i} & 15: return None")  # the kernels were compiled for what is aligned
        return tensor

    def launched(self, kernel: Any, programs: int, args: tuple[Any, ...], meta: dict[str, Any], compiled: Any) -> None:
        tensors = [a for a in args if isinstance(a, (torch.Tensor, TensorDescriptor))]
        places = [self._place(t) for t in tensors]
        self.fits = self.fits and -1 not in places and (_launch.INTERPRETED or _is_simple(kernel, compiled))
        if not self.fits:
            return
        write = self._interpreted if _launch.INTERPRETED else self._compiled
        self.lines.append(write(kernel, programs, args, iter(places), meta, compiled))
        self.steps.append((self.lines, {*places}))
        self.lines = []

    def _compiled(
        self, kernel: Any, programs: int, args: Sequence[Any], places: Any, meta: dict[str, Any], compiled: Any
    ) -> str:
        run, function, fixed, packs, describing = _entry(compiled)

        def argument(value: Any) -> str:
            if isinstance(value, torch.Tensor):
                return f"a{next(places)}"
            if type(value) is TensorDescriptor:
                i = next(places)
                return f"*{self._name(describing(value))}(t{i}, a{i})"
            return self._name(value)

        self.kernels[id(kernel)] = kernel
        named = [meta.get(p.name, p.default) for p in kernel.params[len(args) :]]
        arguments = ", ".join(map(argument, (*args, *named)))
        before = ", ".join(map(self._name, (function, *fixed)))
        return f"{self._name(run)}({programs}, 1, 1, stream, {before}, {f'({arguments},)' if packs else arguments})"

    def _interpreted(
        self, kernel: Any, programs: int, args: Sequence[Any], places: Any, meta: dict[str, Any], compiled: Any
    ) -> str:
        """The interpreter wants tensors, of the sizes that the launcher gave it."""

        def argument(value: Any) -> str:
            if isinstance(value, torch.Tensor):
                return f"t{next(places)}.detach().as_strided({(*value.shape,)}, {value.stride()})"
            if type(value) is TensorDescriptor:
                i, base = next(places), value.base
                viewed = f"t{i}.detach().as_strided({(*base.shape,)}, {base.stride()})"
                return f"*{self._name(_describing(value))}({viewed}, None)"
            return self._name(value)

        arguments = ", ".join(map(argument, args))
        return f"{self._name(_launch.launch)}({self._name(kernel)}, {programs}, {arguments}, **{self._name(meta)})"

    def _name(self, value: Any) -> str:
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def _place(self, argument: Any) -> int:
        """Which of the tensors a launch was given, by its address; -1 for what can't be told."""
        base = argument.base if isinstance(argument, TensorDescriptor) else argument
        if not isinstance(base, torch.Tensor):
            return -1
        address = base.data_ptr()
        found = [i for i, t in enumerate(self.held) if t is not None and t.data_ptr() == address]
        return found[0] if len(found) == 1 else -1

    def take(self, results: Results) -> Take | None:
        """All of it, if it can be done again."""
        places = [next((i for i, t in enumerate(self.held) if t is r), -1) if r is not None else None for r in results]
        if not self.fits or self.lines or -1 in places or not self.steps:
            return None
        inputs = range(self.inputs)
        body = [f"{''.join(f't{i}, ' for i in inputs)} = tensors", f"{''.join(f'a{i}, ' for i in inputs)} = addresses"]
        for i, (lines, used) in enumerate(self.steps):
            needed = {*inputs, *places}.union(*[later for _, later in self.steps[i + 1 :]])
            body += [*lines, *[f"del t{place}" for place in sorted(used - needed)]]
        body.append(f"return ({''.join('None, ' if place is None else f't{place}, ' for place in places)})")
        return Take(self, written("def script(allocate, stream, tensors, addresses):", body, self.constants))


def _is_simple(kernel: Any, compiled: Any) -> bool:
    """Whether a kernel was launched by Triton's ordinary launcher, without scratch memory."""
    return (
        type(kernel) is triton.JITFunction
        and type(compiled) is triton.compiler.CompiledKernel
        and not getattr(compiled.metadata, "global_scratch_size", 0)
        and not getattr(compiled.metadata, "profile_scratch_size", 0)
    )


def _is_about_metadata(result: Any, args: Sequence[Any]) -> bool:
    """Whether a torch function took and made no tensors, or one without data, or a view of its first one that begins where
    that does."""
    if not isinstance(result, torch.Tensor):
        return not any(isinstance(a, torch.Tensor) for a in args)
    if result.device.type == "meta":
        return True
    tensor = args[0] if args else None
    return (
        isinstance(tensor, torch.Tensor)
        and result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        and result.data_ptr() == tensor.data_ptr()
    )


Describe = Callable[[torch.Tensor, Any], list[Any]]
"""Of a tensor and its address, the arguments that stand for a descriptor of it."""


def _describing(descriptor: TensorDescriptor) -> Describe:
    """As TensorDescriptor does, without its __init__, which would check again what it checked then."""
    fields = {name: value for name, value in vars(descriptor).items() if name != "base"}

    def describe(base: torch.Tensor, address: Any) -> list[Any]:
        again: Any = object.__new__(TensorDescriptor)
        vars(again).update(fields, base=base)
        return [again]

    return describe


def _describing_maps(descriptor: TensorDescriptor, meta: Any) -> Describe:
    """As Triton's launcher (3.7) does with a TensorDescriptor: CUDA's tensor map, sizes and strides. A map says nothing of
    a tensor but its address: those of addresses that come back, of weights and from the allocator, are kept."""
    describe, maps = _describing(descriptor), {}
    _, *rest = nvidia.make_tensordesc_arg(descriptor, meta)

    def described(base: torch.Tensor, address: int) -> list[Any]:
        found = maps.get(address)
        if found is None:
            if len(maps) >= MAPS:
                maps.clear()
            maps[address] = found = nvidia.make_tensordesc_arg(*describe(base, address), meta)[0]
        return [found, *rest]

    return described


def _entry(compiled: Any) -> tuple[Any, ...]:
    """What launches a compiled kernel: a function of (x, y, z, stream, function, *fixed, *arguments), whether it takes the
    arguments as one tuple, and what makes a `Describe` of a descriptor. No hooks, no scratch memory."""
    run, metadata = compiled.run, compiled.packed_metadata
    if type(run) is not nvidia.CudaLauncher or not hasattr(run, "arg_annotations"):
        return run, compiled.function, (metadata, None, None, None), False, _describing
    # As its __call__ (triton 3.7) does, 0.5 us sooner, and 3 us for each descriptor.
    fixed = (
        run.launch_cooperative_grid, run.launch_pdl, metadata, None, None, None, None, None,
        run.arg_annotations, run.kernel_signature,
    )  # fmt: skip
    metas = getattr(compiled.metadata, "tensordesc_meta", None)
    if not metas:
        return run.launch, compiled.function, fixed, True, _describing
    each = iter(metas)
    return driver.active.utils.launch, compiled.function, fixed, True, lambda d: _describing_maps(d, next(each))
