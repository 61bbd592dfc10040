"""Every private name of torch that fastlayers uses, each with what is done without it. No other file touches `torch._C`.

Each name is tried once when this file is imported: if it is missing, or doesn't take the arguments that we pass, its fallback
stands in its place and its path is listed in `MISSING`, which `python -m fastlayers` prints. A fallback is either slower and
right, or the cautious answer ("somebody may be watching", so torch's own function runs). A new torch therefore makes fastlayers
slower, never wrong and never impossible to import. tests/test_torch_private.py runs the suite's essentials on every fallback.
"""

from __future__ import annotations

import contextlib
import importlib
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

MISSING: list[str] = []
"""Paths below `torch` of the names that this version doesn't have, or has with another signature."""


def _private(path: str, fallback: Any, works: Callable[[Any], Any]) -> Any:
    """torch.<path>, if it is there and `works(it)` neither raises nor returns False; else the fallback."""
    module, _, _name = path.rpartition(".")
    with contextlib.suppress(ImportError):  # a class's or a C module's attributes aren't imported
        importlib.import_module(f"torch.{module}")
    try:
        found = operator.attrgetter(path)(torch)
        if works(found) is not False:
            return found
    except Exception:
        pass
    MISSING.append(path)
    return fallback


def _is_bool(function: Any) -> bool:
    return type(function()) is bool


def _returns(kind: type | tuple[type, ...], *args: Any) -> Callable[[Any], bool]:
    return lambda function: isinstance(function(*args), kind)


def _always(*_: Any) -> bool:
    return True


_probe = torch.zeros(2, device="cpu")

# --- who watches or transforms a call ------------------------------------------------------------------------------------

any_autocast = _private("_C._is_any_autocast_enabled", _always, _is_bool)
"""Whether autocast is on for any device. True leads to torch.is_autocast_enabled(device), which is public and slower."""
transforms_active = _private("_C._are_functorch_transforms_active", _always, _is_bool)
"""Whether torch.func is at work: vmap, grad, functionalize."""
dispatch_modes = _private("_C._len_torch_dispatch_stack", _always, _returns(int))
"""The number of active TorchDispatchModes."""
function_mode = _private("_C._is_torch_function_mode_enabled", _always, _is_bool)
"""Whether a TorchFunctionMode may be active."""
function_modes = _private("overrides._get_current_function_mode_stack", lambda: [object()], _returns((list, tuple)))
"""The active TorchFunctionModes."""


def _is_jit_tracing() -> Any:
    return torch.jit.is_tracing() or None  # pyright: ignore[reportPrivateImportUsage]


jit_tracing = _private("_C._get_tracing_state", _is_jit_tracing, lambda function: function() is None)
"""torch.jit.trace's state, None where it isn't at work."""
is_batched = _private("_C._functorch.is_legacy_batchedtensor", _always, _returns(bool, _probe))
"""Whether this is a batched gradient of torch.autograd.grad(is_grads_batched=True), which no kernel can look into."""
_has_exporting_flag = hasattr(torch.compiler, "_is_exporting_flag")
DeviceContext: Any = _private("utils._device.DeviceContext", (), lambda cls: isinstance(cls, type))
"""The TorchFunctionMode of torch.set_default_device, which changes nothing for tensors that are there already."""
TorchDispatchMode: Any = _private("utils._python_dispatch.TorchDispatchMode", object, lambda cls: isinstance(cls, type))
"""What sees every operator of a thread. Without it no call is replayed, since none can be recorded."""
_functional_tensor = _private("_is_functional_tensor", _always, _returns(bool, _probe))
_zero_tensor = _private("Tensor._is_zerotensor", _always, _returns(bool, _probe))
is_view = _private("Tensor._is_view", _always, _returns(bool, _probe))
"""Whether a tensor is a view in autograd's sense."""
_forward_ad = forward_ad if isinstance(getattr(forward_ad, "_current_level", None), int) else None
if _forward_ad is None:
    MISSING.append("autograd.forward_ad._current_level")


def forward_mode() -> bool:
    """Whether forward-mode differentiation is active."""
    return _forward_ad is None or _forward_ad._current_level >= 0


def exporting() -> bool:
    """Whether torch.export is tracing. Read from the flag: Dynamo takes is_exporting() for true in torch 2.11."""
    return torch.compiler._is_exporting_flag if _has_exporting_flag else torch.compiler.is_exporting()


def only_default_devices() -> bool:
    """Whether all active TorchFunctionModes are torch.set_default_device's."""
    return all(isinstance(mode, DeviceContext) for mode in function_modes())


def unseen() -> bool:
    """Whether no mode or transform is active that the guards of a replay don't know. The rest are dispatch keys, which the
    guards compare; a TorchDispatchMode's key they leave out where the mode asks not to be compiled."""
    return (
        not dispatch_modes()
        and _forward_ad is not None
        and _forward_ad._current_level < 0
        and jit_tracing() is None
        and (not function_mode() or only_default_devices())
    )


def has_own_memory(tensor: torch.Tensor) -> bool:
    """Whether an operator may read the tensor's memory as it is: torch first negates a lazily negated view, writes the zeros of
    a ZeroTensor, and unwraps what functionalization wraps."""
    return not (tensor.is_neg() or _zero_tensor(tensor) or _functional_tensor(tensor))


# --- containers of tensors -------------------------------------------------------------------------------------------------


def _tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _tree_map(function, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([_tree_map(function, value) for value in tree])
    return function(tree)


def _tree_leaves(tree: Any) -> list[Any]:
    leaves: list[Any] = []
    _tree_map(leaves.append, tree)
    return leaves


tree_map = _private("utils._pytree.tree_map", _tree_map, lambda function: function(abs, [(-1,)]) == [(1,)])
"""A tree of lists, tuples and dicts with a function of each leaf. The fallback knows no named tuples."""
tree_leaves = _private("utils._pytree.tree_leaves", _tree_leaves, lambda function: function([(1,), {"a": 2}]) == [1, 2])

# --- autograd ------------------------------------------------------------------------------------------------------------


def _takes_a_node(function: Any) -> bool:
    node = torch.zeros((), device="cpu", requires_grad=True).clone().grad_fn
    try:
        function(node)
    except RuntimeError:  # it may only be called while the engine runs
        return True
    return True


_will_run = _private("_C._will_engine_execute_node", None, _takes_a_node)


def will_run(node: Any) -> bool:
    """Whether the running backward goes on to `node`. True where torch can't tell: then a gradient is computed in vain."""
    if _will_run is None:
        return True
    try:
        return _will_run(node)
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for, or no engine at work
        return True


def applying(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply without its own Python, which takes half the time: it binds defaults for setup_context, which ours
    doesn't have, and unwraps what functorch left behind, which no replay takes."""
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


def _enters(kind: Any) -> None:
    with kind():
        pass


below_autograd = _private("_C._AutoDispatchBelowAutograd", None, _enters)
"""Context manager under which an operator's kernel for autograd is skipped. Without it no operators are registered, and
torch.compile gets torch's own functions."""


# --- precision and autocast ------------------------------------------------------------------------------------------------


def _fp32_precision_public(backend: str, operation: str) -> str:
    if operation == "matmul":
        return str(torch.backends.cuda.matmul.fp32_precision)
    if operation == "rnn":
        return torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]


fp32_precision = _private(
    "_C._get_fp32_precision_getter", _fp32_precision_public, _returns(str, "cuda", "matmul")
)  # fmt: skip
"""What torch.backends.cuda.matmul.fp32_precision ("cuda", "matmul") and torch.backends.cudnn.conv.fp32_precision ("cuda",
"conv", and so "rnn") say, 0.7 us sooner."""
_has_kernel = _private(
    "_C._dispatch_has_kernel_for_dispatch_key", None, _returns(bool, "aten::einsum", "AutocastCUDA")
)  # fmt: skip


def autocast_keeps_casts(kind: str) -> bool:
    """Whether einsum takes part in autocast on such devices, so that torch's own cache keeps what it converts."""
    return _has_kernel is not None and _has_kernel("aten::einsum", f"Autocast{kind.upper()}")


# --- replays ---------------------------------------------------------------------------------------------------------------


def _guards(kind: Any) -> bool:
    sizes, strides = [[*_probe.shape]], [[*_probe.stride()]]
    return kind(_probe, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check(_probe)


TensorGuards: Any = _private("_C._dynamo.guards.TensorGuards", None, _guards)
"""Dynamo's guards in C++. Without them no call is replayed."""
if TorchDispatchMode is object:
    TensorGuards = None


def _allocates(function: Any) -> bool:
    return function((2, 3), (3, 1), torch.float32).stride() == (3, 1)


_allocate_cpu = _private("_C._dynamo.guards._empty_strided_cpu", None, _allocates)
empty_strided: dict[str, Callable[..., torch.Tensor]] = {}
"""By device type, an allocator on the current device: (sizes, strides, dtype) -> an uninitialised tensor. Inductor's generated
code calls these functions, which save 0.9 us of argument parsing."""
if _allocate_cpu is not None:
    empty_strided["cpu"] = _allocate_cpu
    # CUDA's function has the same signature. It can't be tried without a GPU, so only its existence is checked.
    _allocate_cuda = _private("_C._dynamo.guards._empty_strided_cuda", None, callable)
    if _allocate_cuda is not None:
        empty_strided["cuda"] = _allocate_cuda


def _pops(function: Any) -> bool:
    if dispatch_modes():  # fastlayers is imported within a mode, which must stay on the stack
        return True
    try:
        function(None)
    except TypeError:
        return False
    except Exception:  # there is nothing to pop
        pass
    return True


def _pushes(function: Any) -> bool:
    if TorchDispatchMode is object:  # nothing is ever pushed
        return True
    mode = TorchDispatchMode()
    function(mode)
    return _pop_mode(None) is mode


_pop_mode = _private("_C._pop_torch_dispatch_stack", None, _pops)
_push_mode = None if _pop_mode is None else _private("_C._push_on_torch_dispatch_stack", None, _pushes)


@contextlib.contextmanager
def dispatch_mode(mode: Any) -> Iterator[None]:
    """Within, the TorchDispatchMode sees this thread's operators. `with mode` would also set flags of the whole process, which
    several threads at once may leave set."""
    if _push_mode is None:
        with mode:
            yield
        return
    _push_mode(mode)
    try:
        yield
    finally:
        _pop_mode(None)


# --- random numbers --------------------------------------------------------------------------------------------------------

_has_offset = hasattr(torch.Generator, "get_offset") and hasattr(torch.Generator, "set_offset")


def reserve(generator: Any, advance: int) -> tuple[int, int]:
    """The seed of a CUDA generator and its offset, from which it would draw next. The offset then grows by `advance`. Nothing
    runs on the GPU. Without get_offset the two numbers are read from the generator's state, as bytes, which takes longer."""
    if _has_offset:
        offset = generator.get_offset()
        generator.set_offset(offset + advance)
        return generator.initial_seed(), offset
    state = generator.get_state()
    numbers = state.view(torch.int64)
    seed, offset = numbers.tolist()
    numbers[1] += advance
    generator.set_state(state)
    return seed % 2**64, offset


reserve_in_graph: Any = getattr(torch.ops.inductor_prims, "inductor_reserve_rng_state", None)
"""The same while a CUDA graph is captured: seed, offset, and how much further within the graph, as tensors to which each replay
of the graph writes its own. Without it torch's own function draws there."""


# --- Dynamo ----------------------------------------------------------------------------------------------------------------


def _strategy(callees: bool) -> Any:
    frames = operator.attrgetter("_C._dynamo.eval_frame")(torch)
    skip, default = frames._FrameAction.SKIP, frames._FrameAction.DEFAULT
    return frames._FrameExecStrategy(skip, skip if callees else default)


def _takes_a_strategy(function: Any) -> bool:
    function((lambda: None).__code__, _strategy(True))
    return True


_set_strategy = _private("_C._dynamo.eval_frame.set_code_exec_strategy", None, _takes_a_strategy)


def not_compiled(callees: bool) -> Callable[[Any], Any]:
    """A decorator: Dynamo leaves the function's own frames alone, and those of what it calls if `callees`. It does what
    torch.compiler.disable does, without an import of Dynamo, which takes seconds."""

    def decorate(function: Any) -> Any:
        if _set_strategy is not None:
            _set_strategy(function.__code__, _strategy(callees))
        return function

    return decorate


def constant_in_graphs(function: Any) -> Any:
    """What torch.compiler.assume_constant_result returns, without its import of Dynamo. Where Dynamo doesn't know the mark, it
    traces the function itself."""
    function._dynamo_marked_constant = True
    return function


# --- torch.nn --------------------------------------------------------------------------------------------------------------

has_global_hook = _private("nn.modules.module._has_any_global_hook", _always, lambda function: [function()])
"""Whether a hook for all modules is registered."""
module_call: Any = getattr(torch.nn.Module, "_wrapped_call_impl", torch.nn.Module.__call__)
"""What torch.nn.Module.__call__ is while nobody has put anything in its place."""


def _chooses(function: Any) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function("softmax", 2, 3) == 1


_softmax_dim = _private("nn.functional._get_softmax_dim", None, _chooses)


def softmax_dim(name: str, ndim: int, stacklevel: int) -> int:
    """torch's choice for dim=None, with its warning."""
    if _softmax_dim is None:
        return 0 if ndim in (0, 1, 3) else 1
    return _softmax_dim(name, ndim, stacklevel + 1)


def reduction(size_average: bool | None, reduce: bool | None) -> str:
    """The `reduction` that a loss's two deprecated arguments mean, with torch's warning."""
    legacy = getattr(getattr(torch.nn, "_reduction", None), "legacy_get_string", None)
    if legacy is not None:
        return legacy(size_average, reduce)
    size_average, reduce = (True if flag is None else flag for flag in (size_average, reduce))
    return "none" if not reduce else "mean" if size_average else "sum"


variable_functions: Any = _private("_VF", torch, lambda space: callable(space.lstm))
"""The namespace from which torch.nn's recurrent layers call torch.lstm, torch.gru_cell and their like."""


def is_operator(function: Any) -> bool:
    """Whether it is one of torch.ops, which anyone may have registered."""
    return (getattr(function, "__module__", None) or "").startswith("torch._ops")


def is_watched_module(module: Any) -> bool:
    """Whether a hook of a module's own, or a compiled call, would see its __call__. Attributes are named one by one because this
    is asked of every layer at every call."""
    try:
        return bool(
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or module._compiled_call_impl is not None
        )
    except AttributeError:
        return True


asserts: Any = _private("_assert", object(), lambda function: function(True, "") is None)
"""What models that torch.fx is to trace call in the place of an assert statement."""
