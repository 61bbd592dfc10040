"""What launchers did before, done again without their Python.

A launcher looks at nothing of its tensors but sizes, strides, dtype, device and alignment (kernels/README.md). So what it
allocates and launches for some tensors is what it would for any others that agree in these: `Replayable` writes it down
the second time it sees their like, and from then on looks it up under one key, allocates, and calls Triton's compiled
launchers with the new addresses. Of a tensor nothing is kept, neither address nor reference.

What is not of that kind is found out while it is written down, and takes the ordinary way for good: a torch function that
computes or copies, a view that begins elsewhere than its tensor, two arguments at one address, empty tensors, kernels
that need scratch memory. So does every call while somebody wants to see each launch.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _launch, _tiles

Tensors = Sequence[torch.Tensor | None]
Results = tuple[Any, ...]
"""Tensors or None."""
Addresses = list[Any]
"""None, and then for each tensor its address, or None."""
Kind = tuple[list[Any], Addresses, bool]
Found = tuple["_Take", Addresses]

LIMIT = 4096
"""So many kinds of arguments are remembered for one function; then all are forgotten."""

_HIP = torch.version.hip is not None
_launcher = _launch.launch
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
_runtime, _compilation = triton.knobs.runtime, triton.knobs.compilation


def _ordinary() -> bool:
    """Whether launches are made as always, and nobody wants to see them made: no explain, no profiler's hooks, nothing
    in the place of `launch`, no debugging."""
    try:
        hooks = _runtime.launch_enter_hook.calls or _runtime.launch_exit_hook.calls
    except AttributeError:  # something in the place of Triton's chain of hooks
        return False
    return not (
        hooks
        or _launch.trace is not None
        or _launch.launch is not _launcher
        or _runtime.debug
        or _compilation.instrumentation_mode
        or getattr(_runtime, "add_stages_inspection_hook", None) is not None  # not in triton 3.6
    )


def kind(tensors: Tensors) -> Kind | None:
    """What a launcher may see of these, their addresses, and whether one requires grad. None unless they are plain
    tensors (or None), of which there is nothing else to see."""
    key: list[Any] = []
    addresses: Addresses = [None]
    requires_grad = False
    for tensor in tensors:
        if tensor is None:
            key.append(None)
            addresses.append(None)
            continue
        exact = type(tensor)
        if (exact is not _Parameter and exact is not _Tensor) or tensor.is_neg():
            return None
        try:
            address = tensor.data_ptr()
            key += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, address & 15)
        except RuntimeError:  # no memory, or no strides
            return None
        addresses.append(address)
        if not requires_grad and tensor.requires_grad:
            requires_grad = True
    if _HIP:  # Triton's code for AMD differs with what 32 bits can address
        key += [tensor is not None and tensor.untyped_storage().nbytes() < 2**31 for tensor in tensors]
    return key, addresses, requires_grad


class _Take:
    """What was written down of one call."""

    def __init__(self, recorder: "_Recorder", result: Callable[[list[Any]], Results]):
        self.index, self.device, self.device_type = recorder.index, recorder.device, recorder.device.type
        self.result = result
        self.steps = recorder.steps
        kernels = {id(kernel): kernel for kernel in recorder.kernels}
        self.hooks = [kernel.pre_run_hooks for kernel in kernels.values()]
        self.driver = driver.active

    def play(self, tensors: Tensors, addresses: Addresses) -> Results | None:
        """Do it again with these tensors. None if that can't be after all: nothing was done then that matters."""
        for hooks in self.hooks:
            if hooks:
                return None
        active = driver.active
        if active is not self.driver:
            return None
        if self.index == active.get_current_device():
            return self._launch(tensors, addresses, active)
        with torch.cuda.device(self.index):
            return self._launch(tensors, addresses, active)

    def _launch(self, tensors: Tensors, addresses: Addresses, active: Any) -> Results | None:
        allocate = _launch.allocate_quickly.get(self.device_type) or self._allocate
        stream = active.get_current_stream(self.index)
        held = [None, *tensors]
        for fresh, described, programs, run, function, fixed, pointers, rest, packs, dead in self.steps:
            for size, stride, dtype in fresh:
                tensor = allocate(size, stride, dtype)
                address = tensor.data_ptr()
                if address & 15:
                    return None  # compiled for what is aligned
                held.append(tensor)
                addresses.append(address)
            for slot, _, fields in described:
                # Without its __init__, which would check again what it checked then.
                descriptor: Any = object.__new__(TensorDescriptor)
                vars(descriptor).update(fields, base=held[slot])
                held.append(None)
                addresses.append(descriptor)
            if packs:
                run(programs, 1, 1, stream, function, *fixed, (*pointers(addresses), *rest))
            else:
                run(programs, 1, 1, stream, function, *fixed, *pointers(addresses), *rest)
            for slot in dead:
                held[slot] = None
        return self.result(held)

    def _allocate(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return _launch.allocate(size, stride, dtype=dtype, device=self.device)


class _InterpretedTake(_Take):
    """The same, with the interpreter instead of a GPU: it wants tensors, of the sizes that the launcher gave it."""

    def __init__(self, recorder: "_Recorder", result: Callable[[list[Any]], Results]):
        self.device, self.result, self.steps = recorder.device, result, recorder.steps

    def play(self, tensors: Tensors, addresses: Addresses) -> Results | None:
        held: list[Any] = [None, *tensors]
        for fresh, described, programs, kernel, views, rest, meta, dead in self.steps:
            for size, stride, dtype in fresh:
                held.append(self._allocate(size, stride, dtype))
            for slot, view, fields in described:
                held.append(TensorDescriptor(held[slot].detach().as_strided(*view), **fields))
            args = [held[slot] if view is None else held[slot].detach().as_strided(*view) for slot, view in views]
            _launch.launch(kernel, programs, *args, *rest, **meta)
            for slot in dead:
                held[slot] = None
        return self.result(held)


class _Recorder(TorchDispatchMode):
    """Listens to one call: slot 0 stands for None, then come its tensors, then what it allocates."""

    def __init__(self, tensors: Tensors):
        super().__init__()
        some = next(t for t in tensors if t is not None)
        self.index, self.device = some.get_device(), some.device
        self.held: list[torch.Tensor | None] = [None, *tensors]  # held to the end, so that no address comes twice
        self.inputs = len(self.held)
        self.steps: list[tuple[Any, ...]] = []
        self.kernels: list[Any] = []
        self.used: list[set[int]] = []
        self.fresh: list[tuple[Any, ...]] = []
        self.quiet = False
        self.fits = all(t is None or t.numel() > 0 for t in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.quiet:
            self.fits = self.fits and not func._schema.is_mutable and _is_about_metadata(result, args)
        return result

    def allocate(self, size: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self.quiet = True
        tensor = _launch.allocate(size, stride, dtype=dtype, device=device)
        self.quiet = False
        address = tensor.data_ptr()
        self.fits = self.fits and device == self.device and address != 0 and (_launch.INTERPRETED or address % 16 == 0)
        self.held.append(tensor)
        self.fresh.append((tuple(size), tuple(stride), dtype))
        return tensor

    def launched(self, kernel: Any, programs: int, args: tuple[Any, ...], meta: dict[str, Any], compiled: Any) -> None:
        count = max((i for i, a in enumerate(args) if isinstance(a, (torch.Tensor, TensorDescriptor))), default=0) + 1
        fresh, self.fresh = tuple(self.fresh), []
        described: list[tuple[int, Any, dict[str, Any]]] = []
        slots: list[int] = []
        for a in args[:count]:
            if type(a) is TensorDescriptor:
                fields = {name: value for name, value in vars(a).items() if name != "base"}
                described.append((self._slot(a.base), (a.base.shape, a.base.stride()), fields))
                slots.append(len(self.held))
                self.held.append(None)
            else:
                slots.append(self._slot(a))
        used = {*slots, *[slot for slot, *_ in described]}
        self.fits = self.fits and -1 not in used and count > 1
        if not _launch.INTERPRETED:
            self.fits = (
                self.fits
                and type(kernel) is triton.JITFunction
                and type(compiled) is triton.compiler.CompiledKernel
                and not getattr(compiled.metadata, "global_scratch_size", 0)
                and not getattr(compiled.metadata, "profile_scratch_size", 0)
            )
        if not self.fits:
            return
        if _launch.INTERPRETED:
            views = [(a.shape, a.stride()) if isinstance(a, torch.Tensor) else None for a in args[:count]]
            how = (kernel, list(zip(slots, views, strict=True)), args[count:], meta)
        else:
            named = [meta.get(p.name, p.default) for p in kernel.params[len(args) :]]
            how = _entry(compiled, operator.itemgetter(*slots), (*args[count:], *named))
            self.kernels.append(kernel)
        self.used.append(used)
        self.steps.append((fresh, tuple(described), programs, *how))

    def _slot(self, argument: Any) -> int:
        """Which of the tensors a launch was given, by its address; -1 for what can't be told or is no tensor."""
        if argument is None:
            return 0
        if not isinstance(argument, torch.Tensor):
            return -1
        address = argument.data_ptr()
        found = [i for i, t in enumerate(self.held) if t is not None and t.data_ptr() == address]
        return found[0] if len(found) == 1 else -1

    def take(self, results: Results) -> _Take | None:
        """All of it, if it can be done again."""
        slots = [next((i for i, t in enumerate(self.held) if t is r), -1) for r in results]
        if not self.fits or self.fresh or -1 in slots or not self.steps:
            return None
        for i, step in enumerate(self.steps):
            later = set(slots).union(*self.used[i + 1 :])
            dead = tuple(slot for slot in self.used[i] if slot >= self.inputs and slot not in later)
            self.steps[i] = (*step, dead)
        if len(slots) == 1:
            (slot,) = slots
            result = lambda held: (held[slot],)  # noqa: E731
        else:
            result = operator.itemgetter(*slots)
        return (_InterpretedTake if _launch.INTERPRETED else _Take)(self, result)


def _entry(compiled: Any, pointers: Any, rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """What launches a compiled kernel: a function of (x, y, z, stream, function, *fixed, *arguments), and whether it
    takes the arguments as one tuple. No hooks, no scratch memory."""
    run, metadata = compiled.run, compiled.packed_metadata
    if type(run) is nvidia.CudaLauncher and hasattr(run, "arg_annotations"):
        # As its __call__ (triton 3.7) does, 0.5 us sooner.
        fixed = (
            run.launch_cooperative_grid, run.launch_pdl, metadata, None, None, None, None, None,
            run.arg_annotations, run.kernel_signature,
        )  # fmt: skip
        return run.launch, compiled.function, fixed, pointers, rest, True
    return run, compiled.function, (metadata, None, None, None), pointers, rest, False


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


class Replayable:
    """Decorates a function `work(tensors, *options) -> tensors` that only allocates and launches.

    Args:
        work: of a sequence of tensors or None, all on one device, and of hashable options; returns a tuple of some that
            it allocated, of some that it was given, and of None. Whatever else it depends on must be among the options.
    """

    def __init__(self, work: Callable[..., Results]):
        self.work = work
        self.takes: dict[tuple[Any, ...], _Take | bool] = {}

    def _complete(self, key: list[Any], options: tuple[Any, ...]) -> tuple[Any, ...]:
        """The key, with everything else that picks depend on."""
        key.append(options)
        if _tiles.forced:
            key += _tiles.forced.items()
        return tuple(key)

    def find(self, key: list[Any], *options: Any) -> _Take | None:
        """The take for tensors of a `kind`, if there is one and nobody would miss the launches."""
        if not self.takes or not _ordinary():
            return None
        take = self.takes.get(self._complete(key, options))
        return take if isinstance(take, _Take) else None

    def __call__(self, tensors: Tensors, *options: Any) -> Results:
        """What `work` returns, in the quickest way there is."""
        seen = kind(tensors) if _ordinary() and _launch.here.listener is None else None
        if seen is None:
            return self.work(tensors, *options)
        key = self._complete(seen[0], options)
        take = self.takes.get(key)
        if isinstance(take, _Take):
            results = take.play(tensors, seen[1])
            if results is not None:
                return results
            self.takes.pop(key, None)  # the world has changed
        elif take is True:  # seen once before
            addresses = [address for address in seen[1] if address is not None]
            # One tensor in two places, as a tied weight, can be played but not written down: which of the two was it?
            if len(set(addresses)) == len(addresses):
                return self._record(key, tensors, options)
        elif take is None:
            if len(self.takes) >= LIMIT:
                self.takes.clear()
            self.takes[key] = True
        return self.work(tensors, *options)

    def _record(self, key: tuple[Any, ...], tensors: Tensors, options: tuple[Any, ...]) -> Results:
        recorder = _Recorder(tensors)
        _launch.here.listener = recorder
        try:
            with recorder:
                results = self.work(tensors, *options)
        finally:
            _launch.here.listener = None
        self.takes[key] = recorder.take(results) or False
        return results
