"""Replays what launchers did before, without their Python.

A launcher depends on nothing of its tensors but sizes, strides, dtype, device and alignment (kernels/README.md). These are the
tensors' signature: for other tensors with the same signature, a launcher allocates and launches the same. `Replayable` records
that when it sees a signature for the second time, and replays the recording from then on.

Signatures are compared by Dynamo's guards, in C++: type, dispatch keys (among them those of transforms and autocast), dtype,
device, sizes, strides and requires_grad of all tensors, in a fraction of the time that Python takes to read one shape.

Calls that can't be recorded (see record.py), calls with two arguments at one address, and calls with empty tensors always run
the launchers. So do all calls while somebody, for example `explain` or a profiler, wants to see each launch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import triton

from ... import _torch
from . import launch, tiles
from .record import Addresses, Recorder, Recording, Results, Tensors, compile_function

Match = tuple[Recording, Addresses, bool]
"""What to replay, the addresses of the tensors, and whether one of them requires grad."""

_Guards: Any = _torch.TensorGuards
"""Without it nothing is replayed."""


class _Absent(torch.nn.Parameter):
    """The class of placeholders for None. Guards compare classes, so that no caller's empty tensor is taken for None."""


_PLACEHOLDERS = tuple([_Absent(torch.empty(0, device="cpu"), requires_grad=False) for _ in range(256)])
"""What guards are given for None, a tensor for each position, because they take neither None nor the same tensor twice."""

LIMIT = 4096
"""For one function. When there are more, all are forgotten."""

PER_BUCKET = 16
"""How many signatures are kept that agree in the options and in the sizes of the first tensor. The one that was not seen for
longest makes room for a new one."""

ADMITTED = 8
"""When a bucket is full, only every 8th new signature is admitted, so that a few alternating ones don't evict each other."""

_HIP = torch.version.hip is not None
_launcher = launch.launch
_runtime, _compilation = triton.knobs.runtime, triton.knobs.compilation


def _unobserved() -> bool:
    """Whether nobody wants to see launches: no `explain`, no profiler's hooks, no function in the place of `launch.launch`, no
    debugging."""
    try:
        hooks = _runtime.launch_enter_hook.calls or _runtime.launch_exit_hook.calls
    except AttributeError:  # somebody has replaced Triton's chain of hooks
        return False
    return not (
        hooks
        or launch.trace is not None
        or launch.launch is not _launcher
        or _runtime.debug
        or _compilation.instrumentation_mode
        or getattr(_runtime, "add_stages_inspection_hook", None) is not None  # not in triton 3.6
    )


def is_plain(tensor: Any) -> bool:
    """Whether this is a torch.Tensor or a Parameter and of no subclass, so that reading its attributes has no side effects."""
    exact = type(tensor)
    return exact is torch.Tensor or exact is torch.nn.Parameter


def without_none(tensors: Tensors) -> Sequence[torch.Tensor]:
    """The tensors, with placeholders for None."""
    for tensor in tensors:
        if tensor is None:
            return [_PLACEHOLDERS[i % 256] if t is None else t for i, t in enumerate(tensors)]
    return cast(Sequence[torch.Tensor], tensors)


class _Signature:
    """Everything of some tensors that a launcher can depend on, and what launchers did for such tensors: None until that has
    been recorded, False if it can't be."""

    __slots__ = ("addresses", "check", "recording", "requires_grad")

    def __init__(self, tensors: Sequence[torch.Tensor]):
        sizes, strides = [[*t.shape] for t in tensors], [[*t.stride()] for t in tensors]
        self.check = _Guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        self.addresses = _address_reader(tensors)
        self.requires_grad = any(t.requires_grad for t in tensors)
        self.recording: Recording | Literal[False] | None = None


def _alignment(tensors: Sequence[torch.Tensor]) -> list[int]:
    """All that Triton specialises kernels for of addresses, and for AMD of what 32 bits can address."""
    found = [t.data_ptr() & 15 for t in tensors]
    return [*found, *[t.untyped_storage().nbytes() < 2**31 for t in tensors]] if _HIP else found


def _address_reader(tensors: Sequence[torch.Tensor]) -> Callable[..., Addresses | None]:
    """A function that returns the addresses of other tensors, or None if their alignment differs from that of these."""
    alignment = _alignment(tensors)
    if not (_HIP or any(alignment)):
        return _aligned_address_reader(len(tensors))
    return lambda *others: [t.data_ptr() for t in others] if _alignment(others) == alignment else None


@functools.cache
def _aligned_address_reader(count: int) -> Callable[..., Addresses | None]:
    names = [f"a{i}" for i in range(count)]
    return compile_function(
        f"def addresses({', '.join(f't{i}' for i in range(count))}):",
        [
            *[f"{name} = t{i}.data_ptr()" for i, name in enumerate(names)],
            f"return None if ({' | '.join(names)}) & 15 else ({', '.join(names)},)",
        ],
        {},
    )


def _key(tensors: Sequence[torch.Tensor], options: tuple[Any, ...]) -> tuple[Any, ...]:
    """The key of a bucket of signatures. Forced tiles count as options."""
    forced = tiles.forced
    return (tensors[0].shape, options, *forced.items()) if forced else (tensors[0].shape, options)


class Replayable:
    """Decorates a function `work(tensors, *options) -> results` that only allocates and launches.

    Args:
        work: a function of a sequence of tensors or None, all on one device and the first not None, and of hashable options.
            It returns a tuple of tensors that it allocated or was given, and of None. It may depend on nothing else.
    """

    def __init__(self, work: Callable[..., Results]):
        self.work = work
        self.signatures: dict[tuple[Any, ...], list[_Signature]] = {}
        """Signatures by the sizes of the first tensor and the options."""
        self.count = self.refused = 0

    def find(self, tensors: Sequence[torch.Tensor], options: tuple[Any, ...]) -> Match | None:
        """The recording for tensors with this signature, if there is one and nobody wants to see launches.

        Args:
            tensors: `without_none`, the first a plain one.
        """
        try:
            key = _key(tensors, options)
            bucket = self.signatures.get(key)
        except RuntimeError:  # a nested tensor has no shape
            return None
        if bucket is None or not _unobserved():
            return None
        for signature in bucket:
            if signature.check(*tensors):
                addresses = signature.addresses(*tensors)
                if addresses is None:
                    continue
                if signature is not bucket[0]:  # a new list, because other threads may be iterating over this one
                    self.signatures[key] = [signature, *[s for s in bucket if s is not signature]]
                recording = signature.recording
                return (recording, addresses, signature.requires_grad) if recording else None
        return None

    def replay(self, tensors: Tensors, options: tuple[Any, ...]) -> Results | None:
        """What `work` returns, if there is a recording for these tensors and it can be replayed."""
        given = without_none(tensors)
        found = self.find(given, options)
        return None if found is None else found[0].play(given, found[1])

    def __call__(self, tensors: Tensors, *options: Any) -> Results:
        """What `work` returns: by a replay, or by calling it."""
        given = without_none(tensors)
        found = self.find(given, options)
        if found is not None:
            recording, addresses, _ = found
            results = recording.play(given, addresses)
            if results is not None:
                return results
            # The driver or a hook has changed since, so that the whole bucket is out of date.
            self.count -= len(self.signatures.pop(_key(given, options), ()))
            return self.work(tensors, *options)
        if _Guards is None or launch.thread.listener is not None or not _unobserved():
            return self.work(tensors, *options)
        return self._learn(given, tensors, options)

    def _learn(self, given: Sequence[torch.Tensor], tensors: Tensors, options: tuple[Any, ...]) -> Results:
        """Call `work`, and record it if the signature was seen before."""
        if not all(t is None or (is_plain(t) and not t.is_neg()) for t in tensors):
            return self.work(tensors, *options)
        try:
            addresses = [address for t in given if (address := t.data_ptr())]
        except RuntimeError:  # a tensor without memory
            return self.work(tensors, *options)
        key = _key(given, options)
        bucket = self.signatures.get(key, [])
        signature = next((s for s in bucket if s.check(*given) and s.addresses(*given) is not None), None)
        # A recording tells tensors by their addresses, so two at one address can be replayed but not recorded.
        if signature is not None and signature.recording is None and len({*addresses}) == len(addresses):
            return self._record(signature, tensors, options)
        full = len(bucket) >= PER_BUCKET
        self.refused += full
        if signature is None and not (full and self.refused % ADMITTED):
            signature = _Signature(given)
            if signature.check(*given):  # guards never accept a tensor that comes twice
                if self.count >= LIMIT:
                    self.signatures.clear()
                    self.count, bucket = 0, []
                self.signatures[key] = [signature, *bucket[: PER_BUCKET - 1]]
                self.count += not full
        return self.work(tensors, *options)

    def _record(self, signature: _Signature, tensors: Tensors, options: tuple[Any, ...]) -> Results:
        recorder = Recorder(tensors)
        launch.thread.listener = recorder
        try:
            with _torch.dispatch_mode(recorder):
                results = self.work(tensors, *options)
        finally:
            launch.thread.listener = None
        signature.recording = recorder.finish(results) or False
        return results
