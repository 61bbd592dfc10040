"""What launchers did before, done again without their Python.

A launcher looks at nothing of its tensors but sizes, strides, dtype, device and alignment (kernels/README.md). So what it
allocates and launches for some tensors is what it would for any others that agree in these: `Replayable` writes it down
the second time it sees their like, and from then on recognises them and does what is written.

Recognising is what Dynamo's guards do before they run a compiled graph again, in C++: type, dispatch keys (those of
transforms and autocast among them), dtype, device, sizes, strides and requires_grad of all tensors in a fraction of what
Python takes to read one's shape.

What is not of that kind (see _record.py), two arguments at one address, and empty tensors take the ordinary way for good.
So does every call while somebody wants to see each launch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import triton

from . import _launch, _tiles
from ._record import Addresses, Recorder, Results, Take, Tensors, written

Found = tuple[Take, Addresses, bool]
"""What to do again, with which addresses, and whether one of the tensors requires grad."""

_Guards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)
"""Without it nothing is replayed."""

NOTHING = tuple([torch.empty(0, device="cpu") for _ in range(256)])
"""Stand for None among tensors to be recognised, each in its own place: guards take neither None nor a tensor twice."""

LIMIT = 4096
"""So many kinds of arguments are remembered for one function; then all are forgotten."""

ALIKE = 16
"""So many of them may agree in options and the first tensor's sizes; then the one not seen for longest is forgotten."""

TURN = 8
"""...for one in so many new ones: if a few too many took turns, none would be there when it is seen again."""

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


def something(tensors: Tensors) -> Sequence[torch.Tensor]:
    """The tensors, with NOTHING in the place of None."""
    for tensor in tensors:
        if tensor is None:
            return [NOTHING[i % 256] if t is None else t for i, t in enumerate(tensors)]
    return cast(Sequence[torch.Tensor], tensors)


class _Kind:
    """Tensors that a launcher can't tell apart, and what it does with them: `take` is True until that is known, False if
    it can't be done again."""

    __slots__ = ("addresses", "check", "requires_grad", "take")

    def __init__(self, tensors: Sequence[torch.Tensor]):
        sizes, strides = [[*t.shape] for t in tensors], [[*t.stride()] for t in tensors]
        self.check = _Guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        self.addresses = _reading_addresses(tensors)
        self.requires_grad = any(t.requires_grad for t in tensors)
        self.take: Take | bool = True


def _alignment(tensors: Sequence[torch.Tensor]) -> list[int]:
    """All that Triton specialises for of where tensors lie. Code for AMD differs with what 32 bits can address."""
    found = [t.data_ptr() & 15 for t in tensors]
    return [*found, *[t.untyped_storage().nbytes() < 2**31 for t in tensors]] if _HIP else found


def _reading_addresses(tensors: Sequence[torch.Tensor]) -> Callable[..., Addresses | None]:
    """A function of tensors that returns where they lie, None if aligned otherwise than these."""
    alignment = _alignment(tensors)
    if not (_HIP or any(alignment)):
        return _reading_aligned_addresses(len(tensors))
    return lambda *others: [t.data_ptr() for t in others] if _alignment(others) == alignment else None


@functools.cache
def _reading_aligned_addresses(count: int) -> Callable[..., Addresses | None]:
    names = [f"a{i}" for i in range(count)]
    return written(
        f"def addresses({', '.join(f't{i}' for i in range(count))}):",
        [
            *[f"{name} = t{i}.data_ptr()" for i, name in enumerate(names)],
            f"return None if ({' | '.join(names)}) & 15 else ({', '.join(names)},)",
        ],
        {},
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
        self.count = self.refused = 0

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
                addresses = kind.addresses(*tensors)
                if addresses is None:
                    continue
                take = kind.take
                if kind is not kinds[0]:  # other threads may be going through the list
                    self.kinds[key] = [kind, *[k for k in kinds if k is not kind]]
                return None if take is True or take is False else (take, addresses, kind.requires_grad)
        return None

    def expects(self, first: torch.Tensor, options: tuple[Any, ...]) -> bool:
        """Whether something could be done again for some tensors of which the first has these sizes."""
        try:
            kinds = self.kinds.get(_key((first,), options), ())
        except RuntimeError:  # a nested one has no shape
            return False
        return any(isinstance(kind.take, Take) for kind in kinds)

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
            self.count -= len(self.kinds.pop(_key(present, options), ()))  # the world has changed
            return self.work(tensors, *options)
        if _Guards is None or _launch.here.listener is not None or not _ordinary():
            return self.work(tensors, *options)
        return self._learn(present, tensors, options)

    def _learn(self, present: Sequence[torch.Tensor], tensors: Tensors, options: tuple[Any, ...]) -> Results:
        """Do it the ordinary way, and the second time for tensors of a kind write it down."""
        if not all(is_plain(t) and not t.is_neg() for t in present):
            return self.work(tensors, *options)
        try:
            addresses = [address for t in present if (address := t.data_ptr())]
        except RuntimeError:  # no memory
            return self.work(tensors, *options)
        key = _key(present, options)
        kinds = self.kinds.get(key, [])
        kind = next((k for k in kinds if k.check(*present) and k.addresses(*present) is not None), None)
        # Two tensors at one address can be played but not written down: which of the two was it?
        if kind is not None and kind.take is True and len({*addresses}) == len(addresses):
            return self._record(kind, tensors, options)
        full = len(kinds) >= ALIKE
        self.refused += full
        if kind is None and not (full and self.refused % TURN):
            kind = _Kind(present)
            if kind.check(*present):  # not of one tensor twice
                if self.count >= LIMIT:
                    self.kinds.clear()
                    self.count, kinds = 0, []
                self.kinds[key] = [kind, *kinds[: ALIKE - 1]]
                self.count += not full
        return self.work(tensors, *options)

    def _record(self, kind: _Kind, tensors: Tensors, options: tuple[Any, ...]) -> Results:
        recorder = Recorder(tensors)
        _launch.here.listener = recorder
        # Not `with recorder`: that sets flags of the process, which several threads would leave set.
        torch._C._push_on_torch_dispatch_stack(recorder)
        try:
            results = self.work(tensors, *options)
        finally:
            torch._C._pop_torch_dispatch_stack(None)
            _launch.here.listener = None
        kind.take = recorder.take(results) or False
        return results
