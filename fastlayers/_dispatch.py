"""Which path a call takes, kernel or torch, and why.

A door is a function with torch's signature, decorated with `accelerated`. It asks its `why_not` for a reason against the
kernels; without one it runs its body, otherwise its *torch twin*, which is torch's own function and raises torch's own
errors. `why_not(...) -> str | None` is the one word for capability everywhere.
"""

# pyright: reportPossiblyUnboundVariable=false
# _launch and is_plain are bound wherever MISSING is None, and only looked at there.

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from . import _dtypes
from ._table import columns

P = ParamSpec("P")
R = TypeVar("R")
Path = Literal["auto", "triton", "torch"]

MISSING: str | None = None
"""Why the kernels can't be imported on this machine, if they can't."""
try:
    from .kernels import _launch
    from .kernels._replay import Replayable as replayable
    from .kernels._replay import is_plain
except ImportError as _error:
    MISSING = "triton is not installed" if (_error.name or "").split(".")[0] == "triton" else f"no kernels: {_error}"

    def replayable(work: Callable[..., Any]) -> Any:
        return work


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class NotAccelerated(RuntimeError):
    """Under policy("triton"): a call that the kernels can't take. The message says why."""


class BadInput(str):
    """A reason that torch's own function would put as an error: it is called to raise it, under any policy."""


# --- policy ------------------------------------------------------------------------------------------------------------

_policy: Path = "auto"


class policy:
    """Choose the path for every call from now on, or, as a context manager, until the end of the block.

    - "auto" (the default): the kernels wherever they can take the call, torch otherwise.
    - "triton": the kernels, or `NotAccelerated` with the reason.
    - "torch": torch's own functions.

    The choice is the process's, like torch.backends' switches: threads share it.

    Raises:
        ValueError: for any other word.
    """

    def __init__(self, path: Path):
        global _policy
        if path not in ("auto", "triton", "torch"):
            raise ValueError(f'policy must be "auto", "triton" or "torch", not {path!r}')
        self._path: Path = path
        self._before: Path = _policy
        _policy = path

    def __enter__(self) -> None:
        global _policy
        _policy = self._path

    def __exit__(self, *_: object) -> None:
        global _policy
        _policy = self._before


# --- capability --------------------------------------------------------------------------------------------------------


def why_not(*tensors: Any, autocast: _dtypes.Probe | None = None) -> str | None:
    """What speaks against the kernels whatever the operation, given its tensors; None if nothing does.

    With `autocast`, a function that has torch compute the operation on a tensor, dtypes count as autocast leaves them.

    Nothing of an argument is looked at before it is known to be a plain tensor, so that torch alone judges anything else.
    """
    if _policy == "torch":
        return 'policy is "torch"'
    return MISSING if MISSING is not None else _why_not_tensors(tensors, autocast)


def _why_not_tensors(tensors: Sequence[Any], autocast: _dtypes.Probe | None = None) -> str | None:
    """The same of the tensors, and of who watches, alone."""
    for tensor in tensors:
        if not is_plain(tensor):
            if isinstance(tensor, torch.Tensor):
                return f"{type(tensor).__name__} is a tensor subclass"
            return BadInput(f"{type(tensor).__name__} is not a tensor")
    reason = _observed()
    if reason is not None:
        return reason
    first = tensors[0]
    for tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            return f"layout is {'nested' if tensor.is_nested else tensor.layout}"
        if not torch.compiler.is_compiling() and _has_no_memory_of_its_own(tensor):
            return "a lazily negated view" if tensor.is_neg() else "a tensor without memory of its own"
        if tensor.device != first.device:
            return BadInput(f"tensors on {first.device} and {tensor.device}")
    reason = _why_not_device(first.device)
    if reason is not None:
        return reason
    probe = autocast if torch._C._is_any_autocast_enabled() else None
    dtype = first.dtype if probe is None else _dtypes.after_autocast(probe, first)
    for tensor in tensors:
        if (tensor.dtype if probe is None else _dtypes.after_autocast(probe, tensor)) != dtype:
            return BadInput(f"tensors of {first.dtype} and {tensor.dtype}")
    return why_not_dtype(dtype)


def _has_no_memory_of_its_own(tensor: torch.Tensor) -> bool:
    """Whether torch does something about it before an operator is called: negates it, makes zeros of nothing, unwraps it."""
    is_wrapped = torch._is_functional_tensor(tensor)  # pyright: ignore[reportPrivateImportUsage]
    return tensor.is_neg() or tensor._is_zerotensor() or is_wrapped


def _observed() -> str | None:
    """Who watches or transforms this call in a way that a kernel would escape."""
    # The flag, not is_exporting(), which Dynamo takes for true in torch 2.11.
    if torch.compiler.is_compiling() and (
        not torch.compiler.is_dynamo_compiling() or torch.compiler._is_exporting_flag
    ):
        return "torch.export traces torch's own function"
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode AD is active"
    if torch.compiler.is_compiling():
        return None  # Dynamo sees to what follows, and could not trace it
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces torch's own function"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a TorchDispatchMode is active"
    if torch._C._is_torch_function_mode_enabled() and not _only_default_devices():
        return "a TorchFunctionMode is active"
    return None


def _only_default_devices() -> bool:
    """Whether all modes that see torch's functions are torch.set_default_device's."""
    return all(isinstance(mode, DeviceContext) for mode in torch.overrides._get_current_function_mode_stack())


def _escapes_guards() -> bool:
    """Whether somebody watches or transforms this call whom the guards of kernels/_replay.py don't know, or may not look
    for: torch.jit writes down who reads a size. The rest of `_observed` are dispatch keys, which they compare; a
    TorchDispatchMode's they leave out where it asks not to be compiled."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or (torch._C._is_torch_function_mode_enabled() and not _only_default_devices())
    )


def _why_not_device(device: torch.device) -> str | None:
    if device.type == "cuda":
        return _why_not_gpu(device)
    if device.type == "cpu" and _launch.INTERPRETED:
        return None
    return f"tensors on {device.type}: the kernels run on GPUs"


def why_not_dtype(dtype: torch.dtype) -> str | None:
    """What speaks against computing in this dtype."""
    if dtype not in DTYPES:
        return f"dtype {dtype}"
    if dtype == torch.bfloat16 and not _launch.bfloat16_is_exact:
        return "Triton's interpreter computes bfloat16 wrongly"
    return None


@functools.lru_cache
def _why_not_gpu(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)}: Triton supports compute capability 8.0 and later"
    return None


def backward(work: Any, tensors: Sequence[torch.Tensor | None], options: tuple[Any, ...], dy: torch.Tensor) -> Any:
    """What a replayable backward of the kernels returns for these tensors and options, of which `dy` came from outside; None
    if it has to be made of torch's functions.

    With create_graph, grad mode is on inside a backward, and what it computes must be differentiable. Batched gradients
    (is_grads_batched, vmap) and watching modes can't look into a kernel.
    """
    if torch.is_grad_enabled() or _escapes_guards():
        return None
    results = work.again(tensors, options)
    if results is not None:
        return results
    if torch._C._functorch.is_legacy_batchedtensor(dy):  # pyright: ignore[reportAttributeAccessIssue]
        return None
    # Hooks (torch.autograd.graph.saved_tensors_hooks) may have made anything of what was saved.
    if _why_not_tensors([tensor for tensor in tensors if tensor is not None]) is not None:
        return None
    return work(tensors, *options)


def edges(needed: Sequence[bool], tensors: Sequence[Any]) -> tuple[int, ...]:
    """Of the last arguments of a Function's forward, which of the node's edges each one's gradient leaves by; -1 for one
    that is None or not `needed`. Edges are counted over all that are tensors."""
    return tuple(
        [
            sum(t is not None for t in tensors[:i]) if need and tensor is not None else -1
            for i, (need, tensor) in enumerate(zip(needed, tensors, strict=True))
        ]
    )


def asked_for(ctx: Any, edges: Sequence[int]) -> tuple[bool, ...]:
    """Along which of these edges this very backward must give a gradient: torch.autograd.grad may ask for a few of those
    that require one."""
    nodes = ctx.next_functions
    return tuple([edge >= 0 and _will_run(nodes[edge][0]) for edge in edges])


def _will_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that autograd.grad was asked for, or no engine at work
        return True


def applying(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply without its own Python, which takes half the time: it binds defaults for setup_context, which none of
    ours has, and unwraps what functorch left behind, which no replay takes."""
    return cast(Any, super(torch.autograd.Function, function)).apply


def wants_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a call on these must be recorded by autograd. If not, an autograd.Function would only cost time."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


# --- the door ----------------------------------------------------------------------------------------------------------


def accelerated(
    *,
    twin: Callable[P, R],
    why_not: Callable[P, str | None],
    again: Callable[P, R | None] | None = None,
    traceable: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a door of a function that calls kernels.

    Args:
        twin: torch's function with the same meaning and the same arguments.
        why_not: given the same arguments, the reason against the kernels, or None.
        again: given the same arguments, the result if the kernels took a call like this before, so that `why_not` need
            not be asked; else None. Called only while nobody watches; takes care of autocast.
    """

    def decorate(body: Callable[P, R]) -> Callable[P, R]:
        name = body.__name__.strip("_")
        shortcut = again if MISSING is None else None
        if again is not None:
            again.__qualname__ = name  # what Python calls it in complaints about arguments

        @functools.wraps(body)
        def door(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                return (body if traceable and why_not(*args, **kwargs) is None else twin)(*args, **kwargs)
            if shortcut is not None and _policy != "torch" and _recorder is None and not _escapes_guards():
                result = shortcut(*args, **kwargs)
                if result is not None:
                    return result
            reason = why_not(*args, **kwargs)
            if reason is None:
                if _recorder is None:
                    return body(*args, **kwargs)
                with _recorder.kernels(name):
                    return body(*args, **kwargs)
            for argument in (*args, *kwargs.values()):
                if hasattr(type(argument), "_fastlayers_note"):  # what `fuse` traces with
                    return argument._fastlayers_note(door, args, kwargs)  # type: ignore[attr-defined]
            if _recorder is not None:
                _recorder.note(Decision(_recorder.module, name, "torch", reason))
            if _policy == "triton" and not isinstance(reason, BadInput):
                raise NotAccelerated(f"{name}: {reason}")
            result = twin(*args, **kwargs)
            if _policy == "triton":
                raise NotAccelerated(f"{name}: {reason}")
            return result

        return door

    return decorate


# --- explain -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """One call's path: `reason` says why torch took it, `kernels` what was launched otherwise.

    `module` is the path of the module within the model ("" for a bare function); fused neighbours are joined by " + ".
    """

    module: str
    op: str
    path: Literal["triton", "torch"]
    reason: str | None = None
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """What `explain` saw: the decisions in the order of the calls. Prints as a table."""

    decisions: tuple[Decision, ...]

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def __str__(self) -> str:
        rows = [("layer", "operation", "path", "kernels, or why not")]
        rows += [(d.module or "-", d.op, d.path, d.reason or ", ".join(d.kernels) or "nothing to do") for d in self]
        return columns(*rows)


@dataclass
class _Recorder:
    names: dict[int, str]
    decisions: list[Decision] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)

    @property
    def module(self) -> str:
        return self.stack[-1] if self.stack else ""

    def note(self, decision: Decision) -> None:
        self.decisions.append(decision)

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        self.stack.append(name)
        try:
            yield
        finally:
            self.stack.pop()

    @contextlib.contextmanager
    def kernels(self, op: str) -> Iterator[None]:
        _launch.trace = launched = []
        try:
            yield
        finally:
            _launch.trace = None
        self.note(Decision(self.module, op, "triton", None, tuple(launched)))


_recorder: _Recorder | None = None

module_call: Any = torch.nn.Module._wrapped_call_impl
"""What torch.nn.Module.__call__ is if nobody but `explain` has put something in its place."""


def fused(*modules: torch.nn.Module) -> contextlib.AbstractContextManager[None] | None:
    """Tell `explain`, if it listens, that the next call stands for all of these modules. None if it doesn't."""
    if _recorder is None:
        return None
    return _recorder.inside(" + ".join(_recorder.names.get(id(m), type(m).__name__) for m in modules))


def explain(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Run `target(*args, **kwargs)` once and tell which path every layer took, and why.

    Shape, Dtype: whatever `target` takes.
    Args:
        target: a module, or any function that calls layers or `fastlayers.functional`.
    Raises:
        RuntimeError: when called within itself, and whatever `target` raises.

    Not for several threads at once: it listens to the whole process while it runs.
    """
    global _recorder, module_call
    if _recorder is not None:
        raise RuntimeError("explain can't be called within explain")
    module = target if isinstance(target, torch.nn.Module) else None
    named = module.named_modules(remove_duplicate=True) if module is not None else ()
    recorder = _Recorder({id(m): name or type(m).__name__ for name, m in named})
    call = torch.nn.Module.__call__

    # Not a hook: a layer with hooks isn't fused, and explaining must not change what is explained.
    def recording_call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = len(recorder.decisions)
        with recorder.inside(recorder.names.get(id(self), type(self).__name__)):
            result = call(self, *args, **kwargs)
            if len(recorder.decisions) == before:  # nothing within was one of ours either
                name = type(self).__name__
                torchs = "torch.nn." if type(self).__module__.startswith("torch.nn.") else ""
                recorder.note(Decision(recorder.module, name, "torch", f"{torchs}{name} is not one of our layers"))
        return result

    ordinary = module_call
    if call is ordinary:
        module_call = recording_call
    _recorder = recorder
    torch.nn.Module.__call__ = recording_call  # type: ignore[method-assign]
    try:
        target(*args, **kwargs)
    finally:
        torch.nn.Module.__call__ = call  # type: ignore[method-assign]
        _recorder, module_call = None, ordinary
    return Explanation(tuple(recorder.decisions))
