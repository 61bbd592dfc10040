"""What Triton's interpreter gets wrong with the NumPy that is installed, mended in this process. Imported only where it is on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter as _interpreter

np: Any = _interpreter.np  # pyright: ignore[reportAttributeAccessIssue]


def _with_index(patch: Callable[..., None]) -> Callable[..., None]:
    """A number in a kernel that bounds a range is an array of one element in Triton 3.6, which NumPy 2.4 takes for no number."""

    @functools.wraps(patch)
    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch_with_index


def _without_warnings(method: Callable[..., Any]) -> Callable[..., Any]:
    """tl.max and tl.min ignore NaN, by functions of NumPy's that warn where there is nothing else. These give the same."""
    silent = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}

    @functools.wraps(method)
    def min_max(self: Any, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        return method(self, input, silent.get(val_reduce_op, val_reduce_op), idx_reduce_op)

    return min_max


def _mend(owner: Any, name: str, mended: Callable[[Any], Any]) -> None:
    method = getattr(owner, name, None)
    if method is not None and not hasattr(method, "__wrapped__"):  # not once more at a second import
        setattr(owner, name, mended(method))


_mend(_interpreter, "_patch_lang_tensor", _with_index)
_mend(getattr(_interpreter, "ReduceOps", None), "min_max", _without_warnings)
