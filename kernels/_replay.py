"""What launchers did before, done again without their Python.

A launcher looks at nothing of its tensors but sizes, strides, dtype, device and alignment (kernels/README.md). So what it
allocates and launches for some tensors is what it would for any others that agree in these: `Replayable` writes it down
the second time it sees their like, and from then on recognises them, allocates, and calls Triton's compiled launchers with
the new addresses. Of a tensor nothing is kept, neither address nor reference.

Recognising is what Dynamo's guards do before they run a compiled graph again, in C++: type, dispatch keys (those of modes,
transforms and autocast among them), dtype, device, sizes, strides and requires_grad of all tensors in a fraction of what
Python takes to read one's shape.

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
"""None, and then each tensor's address."""
Found = tuple["_Take", Addresses, bool]
"""What to do again, with which addresses, and whether one of the tensors requires grad."""

_Guards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)
"""Without it nothing is replayed."""

NOTHING = tuple([torch.empty(0) for _ in range(256)])
"""Stand for None among tensors to be recognised, each in its own place: guards take neither None nor a tensor twice."""

LIMIT = 4096
"""So many kinds of arguments are remembered for one function; then all are forgotten."""

MAPS = 64
"""So many addresses are remembered for each descriptor."""

ALIKE = 16
"""So many of them may agree in options and the first tensor's sizes; then the one not seen for longest is forgotten."""

_HIP = torch.version.hip is not None
_launcher = _launch.launch
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


def is_plain(tensor: Any) -> bool:
    """Whether it is a torch.Tensor or a Parameter and of no subclass, so that looking at it has no side effects."""
    exact = type(tensor)
    return exact is torch.Tensor or exact is torch.nn.Parameter


def something(tensors: Tensors) -> list[torch.Tensor]:
    """The tensors, with NOTHING in the place of None."""
    return [NOTHING[i % 256] if t is None else t for i, t in enumerate(tensors)]


class _Kind:
    """Tensors that a launcher can't tell apart, and what it does with them: `take` is True until that is known, False if
    it can't be done again."""

    __slots__ = ("alignment", "check", "requires_grad", "take")

    def __init__(self, tensors: Sequence[torch.Tensor], alignment: int):
        sizes, strides = [[*t.shape] for t in tensors], [[*t.stride()] for t in tensors]
        self.check = _Guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        self.alignment = alignment
        self.requires_grad = any(t.requires_grad for t in tensors)
        self.take: _Take | bool = True


def _addresses(tensors: Sequence[torch.Tensor]) -> tuple[Addresses, int]:
    """Where they lie, and all of that which Triton specialises for, as one number."""
    addresses: Addresses = [None]
    alignment = 0
    for tensor in tensors:
        address = tensor.data_ptr()
        addresses.append(address)
        alignment = alignment << 4 | address & 15
        if _HIP:  # code for AMD differs with what 32 bits can address
            alignment = alignment << 1 | (tensor.untyped_storage().nbytes() < 2**31)
    return addresses, alignment


class _Take:
    """What was written down of one call."""

    memo: Any = None
    """What whoever does it again finds worth working out only once."""

    def __init__(self, recorder: "_Recorder", slots: Sequence[int]):
        self.index, self.device, self.device_type = recorder.index, recorder.device, recorder.device.type
        self.steps = recorder.steps
        kernels = {id(kernel): kernel for kernel in recorder.kernels}
        self.hooks = [kernel.pre_run_hooks for kernel in kernels.values()]
        self.driver = driver.active
        self.results = _results(slots)

    def play(self, tensors: Tensors, addresses: Addresses) -> Results | None:
        """Do it again with these tensors. None if that can't be after all: nothing was done then that matters."""
        active = driver.active
        if active is not self.driver or any(self.hooks):
            return None
        index = self.index
        if index != active.get_current_device():
            with torch.cuda.device(index):
                return self.play(tensors, addresses)
        allocate = _launch.allocate_quickly.get(self.device_type) or self._allocate
        stream = active.get_current_stream(index)
        held = [None, *tensors]
        for fresh, described, programs, run, function, fixed, pointers, rest, packs, dead in self.steps:
            for size, stride, dtype in fresh:
                tensor = allocate(size, stride, dtype)
                address = tensor.data_ptr()
                if address & 15:
                    return None  # compiled for what is aligned
                held.append(tensor)
                addresses.append(address)
            for slot, describe in described:
                arguments = describe(held[slot], addresses[slot])
                addresses += arguments
                held += [None] * len(arguments)
            if packs:
                run(programs, 1, 1, stream, function, *fixed, (*pointers(addresses), *rest))
            else:
                run(programs, 1, 1, stream, function, *fixed, *pointers(addresses), *rest)
            for slot in dead:
                held[slot] = None
        return self.results(held)

    def _allocate(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return _launch.allocate(size, stride, dtype=dtype, device=self.device)


def _results(slots: Sequence[int]) -> Callable[[list[Any]], Results]:
    if len(slots) > 1:
        return operator.itemgetter(*slots)
    (slot,) = slots
    return lambda held: (held[slot],)


Describe = Callable[[torch.Tensor, int], list[Any]]
"""Of a tensor and its address, the arguments that stand for a descriptor of it."""


def _describing(descriptor: TensorDescriptor) -> tuple[Describe, int]:
    """As TensorDescriptor does, without its __init__, which would check again what it checked then."""
    fields = _fields(descriptor)

    def describe(base: torch.Tensor, address: int) -> list[Any]:
        again: Any = object.__new__(TensorDescriptor)
        vars(again).update(fields, base=base)
        return [again]

    return describe, 1


def _describing_maps(descriptor: TensorDescriptor, meta: Any) -> tuple[Describe, int]:
    """As Triton's launcher (3.7) does with a TensorDescriptor: CUDA's tensor map, sizes and strides. A map says nothing of
    a tensor but its address: those of addresses that come back, of weights and from the allocator, are kept."""
    (describe, _), maps = _describing(descriptor), {}
    _, *rest = nvidia.make_tensordesc_arg(descriptor, meta)

    def described(base: torch.Tensor, address: int) -> list[Any]:
        found = maps.get(address)
        if found is None:
            if len(maps) >= MAPS:
                maps.clear()
            maps[address] = found = nvidia.make_tensordesc_arg(*describe(base, address), meta)[0]
        return [found, *rest]

    return described, 1 + len(rest)


class _InterpretedTake(_Take):
    """The same, with the interpreter instead of a GPU: it wants tensors, of the sizes that the launcher gave it."""

    def __init__(self, recorder: "_Recorder", slots: Sequence[int]):
        self.device, self.results, self.steps = recorder.device, _results(slots), recorder.steps

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
        return self.results(held)


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
        self._hold(tensor)
        self.fresh.append((tuple(size), tuple(stride), dtype))
        return tensor

    def launched(self, kernel: Any, programs: int, args: tuple[Any, ...], meta: dict[str, Any], compiled: Any) -> None:
        count = max((i for i, a in enumerate(args) if isinstance(a, (torch.Tensor, TensorDescriptor))), default=0) + 1
        pointers, rest = args[:count], args[count:]
        fresh, self.fresh = tuple(self.fresh), []
        bases = [self._slot(a.base if type(a) is TensorDescriptor else a) for a in pointers]
        self.fits = self.fits and -1 not in bases and count > 1
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
        described: list[tuple[Any, ...]] = []
        slots: list[int] = []
        if _launch.INTERPRETED:
            for a, base in zip(pointers, bases, strict=True):
                if type(a) is TensorDescriptor:
                    described.append((base, (a.base.shape, a.base.stride()), _fields(a)))
                    base = self._hold(None)
                slots.append(base)
            views = [(a.shape, a.stride()) if isinstance(a, torch.Tensor) else None for a in pointers]
            how = (kernel, list(zip(slots, views, strict=True)), rest, meta)
        else:
            run, function, fixed, packs, describing = _entry(compiled)
            for a, base in zip(pointers, bases, strict=True):
                if type(a) is TensorDescriptor:
                    describe, arguments = describing(a)
                    described.append((base, describe))
                    slots += [self._hold(None) for _ in range(arguments)]
                else:
                    slots.append(base)
            named = [meta.get(p.name, p.default) for p in kernel.params[len(args) :]]
            how = (run, function, fixed, operator.itemgetter(*slots), (*rest, *named), packs)
            self.kernels.append(kernel)
        self.used.append({*bases})
        self.steps.append((fresh, tuple(described), programs, *how))

    def _hold(self, tensor: torch.Tensor | None) -> int:
        self.held.append(tensor)
        return len(self.held) - 1

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
        return (_InterpretedTake if _launch.INTERPRETED else _Take)(self, slots)


def _fields(descriptor: TensorDescriptor) -> dict[str, Any]:
    """All but its tensor."""
    return {name: value for name, value in vars(descriptor).items() if name != "base"}


def _entry(compiled: Any) -> tuple[Any, ...]:
    """What launches a compiled kernel: a function of (x, y, z, stream, function, *fixed, *arguments), whether it takes the
    arguments as one tuple, and what makes its arguments of a descriptor: a function of one that returns a `Describe` and
    how many they are. No hooks, no scratch memory."""
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
    describing = lambda descriptor: _describing_maps(descriptor, next(each))  # noqa: E731
    return driver.active.utils.launch, compiled.function, fixed, True, describing


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


def _key(tensors: Sequence[torch.Tensor], options: tuple[Any, ...]) -> tuple[Any, ...]:
    """By what kinds are looked up: forced tiles are options too."""
    forced = _tiles.forced
    return (tensors[0].shape, options, *forced.items()) if forced else (tensors[0].shape, options)


class Replayable:
    """Decorates a function `work(tensors, *options) -> tensors` that only allocates and launches.

    Args:
        work: of a sequence of tensors or None, all on one device and the first not None, and of hashable options; returns a
            tuple of some that it allocated, of some that it was given, and of None. Whatever else it depends on must be
            among the options.
    """

    def __init__(self, work: Callable[..., Results]):
        self.work = work
        self.kinds: dict[tuple[Any, ...], list[_Kind]] = {}
        """By the first tensor's sizes and the options."""
        self.count = 0

    def find(self, tensors: Sequence[torch.Tensor], options: tuple[Any, ...]) -> Found | None:
        """What was done for such tensors (of NOTHING in the place of None, the first a plain one), if nobody would miss the
        launches."""
        try:
            key = _key(tensors, options)
            kinds = self.kinds.get(key)
        except RuntimeError:  # a nested one has no shape
            return None
        if kinds is None or not _ordinary():
            return None
        for kind in kinds:
            if kind.check(*tensors):
                addresses, alignment = _addresses(tensors)
                if alignment != kind.alignment:
                    continue
                take = kind.take
                if kind is not kinds[0]:  # other threads may be going through the list
                    self.kinds[key] = [kind, *[k for k in kinds if k is not kind]]
                return None if take is True or take is False else (take, addresses, kind.requires_grad)
        return None

    def expects(self, first: torch.Tensor, options: tuple[Any, ...]) -> bool:
        """Whether something could be done again for some tensors of which the first has these sizes."""
        return any(isinstance(kind.take, _Take) for kind in self.kinds.get(_key((first,), options), ()))

    def again(self, tensors: Tensors, options: tuple[Any, ...]) -> Results | None:
        """What `work` returns, if it was done for such tensors before and can be again."""
        present = something(tensors)
        found = self.find(present, options)
        return None if found is None else found[0].play(present, found[1])

    def __call__(self, tensors: Tensors, *options: Any) -> Results:
        """What `work` returns, in the quickest way there is."""
        present = something(tensors)
        found = self.find(present, options)
        if found is not None:
            take, addresses, _ = found
            results = take.play(present, addresses)
            if results is not None:
                return results
            self.kinds.pop(_key(present, options), None)  # the world has changed
            return self.work(tensors, *options)
        if _Guards is None or _launch.here.listener is not None or not _ordinary():
            return self.work(tensors, *options)
        return self._learn(present, tensors, options)

    def _learn(self, present: list[torch.Tensor], tensors: Tensors, options: tuple[Any, ...]) -> Results:
        """Do it the ordinary way, and the second time for tensors of a kind write it down."""
        if not all(is_plain(t) and not t.is_neg() for t in present):
            return self.work(tensors, *options)
        try:
            addresses, alignment = _addresses(present)
        except RuntimeError:  # no memory
            return self.work(tensors, *options)
        key = _key(present, options)
        kinds = self.kinds.get(key, [])
        kind = next((k for k in kinds if k.alignment == alignment and k.check(*present)), None)
        if kind is not None and kind.take is True:
            # Two tensors at one address can be played but not written down: which of the two was it?
            somewhere = [address for address in addresses if address]
            if len({*somewhere}) == len(somewhere):
                return self._record(kind, tensors, options)
        if kind is None:
            kind = _Kind(present, alignment)
            if kind.check(*present):  # not of one tensor twice
                if self.count >= LIMIT:
                    self.kinds.clear()
                    self.count, kinds = 0, []
                self.kinds[key] = [kind, *kinds[: ALIKE - 1]]
                self.count += 1
        return self.work(tensors, *options)

    def _record(self, kind: _Kind, tensors: Tensors, options: tuple[Any, ...]) -> Results:
        recorder = _Recorder(tensors)
        _launch.here.listener = recorder
        try:
            with recorder:
                results = self.work(tensors, *options)
        finally:
            _launch.here.listener = None
        kind.take = recorder.take(results) or False
        return results
