"""Whether the kernels can take a call: the reasons against them, whatever the operation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .. import _kernels, _torch
from .._kernels import is_plain
from . import autocast, explain, tally
from . import policy as _policy
from .policy import NotAccelerated

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What the kernels compute in."""


class BadInput(str):
    """A reason that torch's own function would put as an error: it is called to raise it, under any policy."""


def wants_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must record a call on these. If not, an autograd.Function would only cost time."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def unsupported(tensors: Sequence[Any], floats: Sequence[Any], probe: autocast.Probe | None) -> str | None:
    """What speaks against the kernels whatever the operation; None if nothing does.

    Args:
        tensors: all of the call, the first not None.
        floats: those of them that must agree in dtype, as autocast leaves them; the operation judges the others.
        probe: how to ask torch for autocast's rule; None: autocast isn't on, or doesn't concern the operation.
    """
    if _policy.current == "torch":
        return 'policy is "torch"'
    reason = _kernels.MISSING or unusable(tensors)
    if reason is not None:
        return reason
    if tensors[0] is None:
        return BadInput("None is not a tensor")
    dtypes = [t.dtype if probe is None else autocast.dtype_after(probe, t) for t in floats if t is not None]
    for dtype in dtypes:
        if dtype != dtypes[0]:
            return BadInput(f"tensors of {dtypes[0]} and {dtype}")
    return unsupported_dtype(dtypes[0])


def unusable(tensors: Iterable[Any]) -> str | None:
    """What speaks against handing these tensors to any kernel, whatever their dtypes.

    Nothing of an argument is looked at before all are known to be plain tensors, so that torch alone judges anything else.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    for tensor in present:
        if not is_plain(tensor):
            name = type(tensor).__name__
            is_tensor = isinstance(tensor, torch.Tensor)
            return f"{name} is a tensor subclass" if is_tensor else BadInput(f"{name} is not a tensor")
    reason = observed()
    if reason is not None or not present:
        return reason
    first = present[0]
    for tensor in present:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            return f"layout is {'nested' if tensor.is_nested else tensor.layout}"
        if not torch.compiler.is_compiling() and not _torch.has_own_memory(tensor):
            return "a lazily negated view" if tensor.is_neg() else "a tensor without memory of its own"
        if tensor.device != first.device:
            return BadInput(f"tensors on {first.device} and {tensor.device}")
    return unsupported_device(first.device)


def of_one_shape(a: Any, b: Any) -> tuple[Any, Any]:
    """Both tensors in the shape to which they broadcast. What torch would raise an error for is returned as it is."""
    if not (is_plain(a) and is_plain(b)) or a.shape == b.shape:
        return a, b
    try:
        return tuple(torch.broadcast_tensors(a, b))
    except RuntimeError:
        return a, b


def observed() -> str | None:
    """Who watches or transforms this call in a way that a kernel would escape."""
    if torch.compiler.is_compiling() and (not torch.compiler.is_dynamo_compiling() or _torch.exporting()):
        return "torch.export traces torch's own function"
    if _torch.transforms_active():
        return "a functorch transform is active"
    if _torch.forward_mode():
        return "forward-mode AD is active"
    if torch.compiler.is_compiling():
        return None  # Dynamo handles the modes itself, and couldn't trace what follows
    if _torch.jit_tracing() is not None:
        return "torch.jit traces torch's own function"
    if _torch.dispatch_modes() > 0:
        return "a TorchDispatchMode is active"
    if _torch.function_mode() and not _torch.only_default_devices():
        return "a TorchFunctionMode is active"
    return None


def unsupported_device(device: torch.device) -> str | None:
    """What speaks against the kernels on this device."""
    if device.type == "cuda":
        return _unsupported_gpu(device)
    if device.type == "cpu" and _kernels.launch.INTERPRETED:
        return None
    return f"tensors on {device.type}: the kernels run on GPUs"


def unsupported_dtype(dtype: torch.dtype) -> str | None:
    """What speaks against computing in this dtype."""
    if dtype not in DTYPES:
        return f"dtype {dtype}"
    if dtype == torch.bfloat16 and not _kernels.launch.bfloat16_is_exact:
        return "Triton's interpreter computes bfloat16 wrongly"
    return None


@functools.lru_cache
def _unsupported_gpu(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)}: Triton supports compute capability 8.0 and later"
    return None


def unwritable(tensor: torch.Tensor) -> str | None:
    """What speaks against kernels writing into this tensor behind autograd's back, by torch's own rules."""
    if not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled():
        return BadInput("writing into an inference tensor")
    if any([stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)]):
        return BadInput("writing into a tensor whose elements share memory")
    if wants_grad(tensor):
        if tensor.is_leaf:
            return BadInput("writing into a leaf that requires grad")
        if _torch.is_view(tensor):
            return "writing into a view that requires grad"
    return None


def out_of_resources(error: Exception) -> str:
    """The reason where a GPU lacks the shared memory or the threads for a kernel, which only the compiled kernel tells."""
    return f"this GPU can't run a kernel of the call: {error}"


def run_reference(name: str, reason: str, call: Callable[[], Any]) -> Any:
    """torch's own function, where the kernels don't take the call.

    Raises:
        NotAccelerated: under policy("triton"), with the reason; but where torch raises, its own error comes first.
    """
    if isinstance(reason, BadInput):
        _note(name, reason)
        result = call()
        if _policy.current == "triton":
            raise NotAccelerated(f"{name}: {reason}")
        return result
    fell_back(name, reason)
    return call()


def fell_back(name: str, reason: str) -> None:
    """Note why torch's functions compute what the kernels don't.

    Raises:
        NotAccelerated: under policy("triton").
    """
    _note(name, reason)
    if _policy.current == "triton":
        raise NotAccelerated(f"{name}: {reason}")


def _note(name: str, reason: str) -> None:
    if explain.recorder is not None:
        explain.recorder.fell_back(name, reason)
    for counted in tally.active:
        counted.left[name, reason] += 1
