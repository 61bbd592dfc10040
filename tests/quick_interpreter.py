"""Triton's interpreter, in half the time: the same results, with less Python for each operation of a kernel.

Most of the suite's time is the interpreter's own: what it computes for every operation though it is always the same, such as the
type of a block, or for every launch and every call of a device function, such as the patches of the language. `install`
remembers these. Errors are left to the interpreter: what is unusual, or seems to be wrong, goes the long way round."""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

Semantic: Any = TritonSemantic


@functools.cache
def install() -> None:
    """Make the interpreter quick for the rest of this process."""
    interpreter._patch_lang = _Patches(interpreter._patch_lang).apply
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    core.dtype.__eq__ = _equal(core.dtype.__eq__)
    core.block_type.__init__ = _block_type(core.block_type.__init__)
    core.tensor.__init__ = _tensor(core.tensor.__init__)
    Semantic.binary_op_sanitize_overflow_impl = _overflow(Semantic.binary_op_sanitize_overflow_impl)
    Semantic.computation_type_impl = _computation_type(Semantic.computation_type_impl)
    Semantic.broadcast_impl_value = _broadcast(Semantic.broadcast_impl_value)
    Semantic.binary_op_type_checking_impl = _operands(Semantic.binary_op_type_checking_impl)


_MISSING = object()


class _Patches:
    """What the interpreter puts in the place of the language's functions while kernels run, which it finds out anew for every
    call of a device function, by looking through the language's modules. Here every module is looked through once."""

    def __init__(self, patch_lang: Callable) -> None:
        self.patch_lang = patch_lang
        self.languages: dict[Any, tuple[bool, bool]] = {}
        self.known: dict[Any, list[tuple[Any, str, Any, Any]]] = {}
        self.applied: dict[tuple[bool, bool], list[tuple[Any, str, Any, Any]]] = {}

    def apply(self, function: Any) -> _Patches:
        """For a function that sees these modules, unless that was done since the launch began."""
        which = self.languages.get(function)
        if which is None:
            seen = [value for value in function.__globals__.values() if value is tl or value is core]
            which = self.languages[function] = (any(v is tl for v in seen), any(v is core for v in seen))
        if which not in self.applied:
            order = (*self.applied, which)  # what is patched already isn't found again
            changes = self.known.get(order)
            if changes is None or any([getattr(o, n, _MISSING) is not before for o, n, before, _ in changes]):
                changes = self.known[order] = self._found(function)
            else:
                for owner, name, _, after in changes:
                    setattr(owner, name, after)
            self.applied[which] = changes
        return self

    def _found(self, function: Any) -> list[tuple[Any, str, Any, Any]]:
        scope = self.patch_lang(function)
        missing = interpreter._MISSING
        first: dict[tuple[int, str], tuple[Any, str, Any]] = {}  # some are patched twice
        for owner, name, before in scope._changes:
            first.setdefault((id(owner), name), (owner, name, _MISSING if before is missing else before))
        return [(owner, name, before, getattr(owner, name)) for owner, name, before in first.values()]

    def restore(self) -> None:
        """What the interpreter calls at the end of a launch."""
        for changes in reversed(self.applied.values()):
            for owner, name, before, _ in reversed(changes):
                if before is _MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)
        self.applied.clear()


def _by_name(get_np_dtype: Callable) -> Callable:
    """NumPy's type for one of Triton's, which depends on the name of its elements' type."""
    known: dict[str, np.dtype] = {}

    @functools.wraps(get_np_dtype)
    def get(tt_dtype):
        scalar = tt_dtype.scalar
        found = known.get(scalar.name)
        if found is None:
            found = known[scalar.name] = get_np_dtype(scalar)
        return found

    return get


def _equal(equal: Callable) -> Callable:
    @functools.wraps(equal)
    def __eq__(self, other):
        return self is other or (self.name == other.name if type(other) is core.dtype else equal(self, other))

    return __eq__


def _block_type(init: Callable) -> Callable:
    """The type of a block, where a type of equal sizes is known. All of them have one object for their sizes."""
    sizes: dict[tuple[int, ...], Any] = {}
    names: dict[tuple[tuple[int, ...], str], str] = {}

    @functools.wraps(init)
    def __init__(self, element_ty, shape):
        values = shape.values if type(shape) is core.tuple else shape
        key = builtins.tuple([s.value if type(s) is core.constexpr else s for s in values])
        known = sizes.get(key) if type(shape) in (list, core.tuple) else None  # others may be an error
        if known is None or not all([type(s) is int for s in key]):
            init(self, element_ty, shape)
            if all([type(s) is int for s in key]):
                sizes[key] = self
            return
        self.element_ty, self.shape, self.numel = element_ty, known.shape, known.numel
        name = names.get((key, element_ty.name))
        if name is None:
            name = names[key, element_ty.name] = f"<{self.shape}, {element_ty}>"
        self.name = name

    return __init__


def _tensor(init: Callable) -> Callable:
    """A tensor, where one with the sizes is known. Its sizes and their product are the same objects."""
    known: dict[int, Any] = {}

    @functools.wraps(init)
    def __init__(self, handle, type):
        sizes = type.shape if type.is_block() else None
        like = known.get(id(sizes))
        if like is None or (like.type.shape if sizes is not None else None) is not sizes:
            init(self, handle, type)
            known[id(sizes)] = self.__class__.__new__(self.__class__)
            known[id(sizes)].__dict__.update(self.__dict__, handle=None)
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = like.shape, like.numel

    return __init__


def _overflow(sanitize: Callable) -> Callable:
    """The check that integers of up to 32 bits don't wrap. Where one does, the interpreter itself says so."""
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    @functools.wraps(sanitize)
    def check(self, lhs, rhs, binary_op):
        type, operation = lhs.dtype, operations.get(binary_op.__name__)
        if operation is None or not 8 <= type.int_bitwidth <= 32 or not self.builder.options.sanitize_overflow:
            return sanitize(self, lhs, rhs, binary_op)
        exact = operation(lhs.handle.data, rhs.handle.data, dtype=np.int64)
        if exact.size and (exact.max() > type.get_int_max_value() or exact.min() < type.get_int_min_value()):
            return sanitize(self, lhs, rhs, binary_op)
        return None

    return check


def _computation_type(method: Callable) -> Callable:
    known: dict[Any, Any] = {}

    @functools.wraps(method)
    def computation_type(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod):
        key = (a_ty.name, a_is_scalar, b_ty.name, b_is_scalar, div_or_mod)
        found = known.get(key)
        if found is None:
            found = known[key] = method(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod)
        return found

    return computation_type


def _broadcast(method: Callable) -> Callable:
    """Tensors of equal sizes stay as they are."""

    @functools.wraps(method)
    def broadcast(self, lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else method(self, lhs, rhs)

    return broadcast


def _operands(method: Callable) -> Callable:
    """Two tensors of one element type aren't converted, unless 16 bits are divided, which is done in float32."""

    @functools.wraps(method)
    def operands(self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        if type(lhs) is core.tensor and type(rhs) is core.tensor:
            kind = lhs.dtype
            same = type(kind) is core.dtype and kind.name == rhs.dtype.name
            if same and not (div_or_mod and kind.name in ("fp16", "bf16")):
                return self.broadcast_impl_value(lhs, rhs)
        return method(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    return operands
