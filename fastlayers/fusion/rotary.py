"""Functions of somebody's own that compute rotary embedding of query and key, found by what they compute."""

from __future__ import annotations

import functools
import inspect
import math
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.compiler import is_dynamo_compiling
from torch.fx.proxy import TraceError

from .. import _torch
from ..dispatch import support
from ..ops.rotary import _rotary_embedding, rotary_embedding
from .state import ATOMS, MISSING
from .tracer import Tracer
from .values import bound

__all__ = [
    "Angles", "Rotary", "apply", "apply_rotary_pos_emb", "called_by", "found", "is_unseen", "may_be", "ours", "stands_for",
]  # fmt: skip


def apply_rotary_pos_emb(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fastlayers.functional.rotary_embedding` with the signature of transformers' functions of this name.

    Rounded once, where theirs round three times in 16 bits. The results have q's and k's dtype also where cos and sin have
    another one; some of theirs return float32 then, which attention under autocast rounds to the same numbers.

    Shape: q (B, H, L, D) and k (B, G, L, D) or, with unsqueeze_dim=2, (B, L, H, D) and (B, L, G, D); cos and sin (B, L, R), where
        B may be 1 and R at most D -> as q, as k.
    Dtype: as rotary_embedding.

    Args:
        unsqueeze_dim: where q and k have their heads.
        interleaved: as rotary_embedding's.
    """
    if unsqueeze_dim == 1:
        return rotary_embedding(q, k, cos, sin, interleaved=interleaved)
    q, k = (x.movedim(unsqueeze_dim, 1) for x in (q, k))
    q, k = rotary_embedding(q, k, cos, sin, interleaved=interleaved)
    return q.movedim(1, unsqueeze_dim), k.movedim(1, unsqueeze_dim)


class _Read(NamedTuple):
    """A function as its graph computes it, for calls with one unsqueeze_dim, and what was looked at."""

    forward: Callable[..., Any]
    looked: Any


def ours(function: types.FunctionType) -> Callable[..., Any] | None:
    """Ours for one of q, k, cos, sin and, maybe, unsqueeze_dim; None if it isn't one that computes rotary embedding.

    The function isn't run: what is compared is what its graph gives for small tensors, which also shows which features it
    pairs, and the gradients of that. Calls that the kernel doesn't take, and all calls when something that its graph was made
    of has changed, go to the function.
    """
    rotary = _rotary(function)
    return None if rotary is None else rotary.call


_found: weakref.WeakKeyDictionary[types.FunctionType, tuple[Any, Any, Any, Any]] = weakref.WeakKeyDictionary()
"""Of functions that may be for rotary embedding: code, defaults, and a Rotary or None."""


def may_be(function: types.FunctionType) -> bool:
    """Whether a function may compute rotary embedding, as its arguments are called."""
    code = function.__code__
    return code.co_varnames[2:4] == ("cos", "sin") and not code.co_freevars


def found(function: types.FunctionType) -> Rotary | None:
    """What takes the place of a function that `may_be` one, which is kept. It holds the function, and so isn't made of one that
    holds anything but plain values."""
    now = function.__code__, function.__defaults__, function.__kwdefaults__
    known = _found.get(function)
    if known is not None and all([a is b for a, b in zip(known, now, strict=False)]):
        return known[3]
    if not is_unseen():
        return None
    held = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    rotary = _rotary(function) if all([type(value) in ATOMS for value in held]) else None
    _found[function] = (*now, rotary)
    return rotary


def apply(function: types.FunctionType, *args: Any, **kwargs: Any) -> Any:
    """What a graph calls in the place of such a function."""
    rotary = None if is_dynamo_compiling() else found(function)
    return (function if rotary is None else rotary.call)(*args, **kwargs)


def stands_for(function: types.FunctionType, in_place: bool) -> Any:
    """What a graph calls in the place of a function; None if it doesn't compute rotary embedding.

    Args:
        in_place: whether the graph is never pickled, as one that isn't in place may be: a pickle finds a function by its name.
    """
    global_one = function.__globals__.get(function.__qualname__) is function
    return bound(apply, function) if (in_place or global_one) and may_be(function) and found(function) else None


def called_by(node: fx.Node) -> types.FunctionType | None:
    """The function for rotary embedding that a node of a graph calls; None if it calls another one."""
    made = node.target
    return made.args[0] if isinstance(made, functools.partial) and made.func is apply else None


def _rotary(function: types.FunctionType) -> Rotary | None:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # somebody gave it a signature that is none
        return None
    if [*parameters][2:4] != ["cos", "sin"]:
        return None
    words = [{}, *([{"unsqueeze_dim": dim} for dim in (1, 2)] if "unsqueeze_dim" in parameters else [])]
    read = {w.get("unsqueeze_dim", MISSING): _read(function, **w) for w in words}
    for interleaved, repeated in ((False, False), (True, False), (True, True)):
        known = {dim: one for dim, one in read.items() if one and _computes(one.forward, dim, interleaved, repeated)}
        if MISSING in known:
            return Rotary(function, [*parameters][:4], known, interleaved, repeated)
    return None


def _read(function: types.FunctionType, **kwargs: Any) -> _Read | None:
    tracer = Tracer(nn.Module(), False)
    try:
        tracer.trace_function(function, 4, kwargs)
    except (TraceError, SyntaxError):
        return None
    read = fx.GraphModule(nn.Module(), tracer.graph)
    return _Read(functools.partial(type(read).forward, read), tracer.looked)


# --- what it computes -----------------------------------------------------------------------------------------------------


class _Case(NamedTuple):
    batch: int
    heads: int
    groups: int
    length: int
    size: int
    turned: int
    """How many of the features are turned."""
    scale: float
    """How large the numbers are."""


_CASES = (
    _Case(2, 3, 1, 5, 8, 8, 1.0), _Case(2, 2, 2, 1, 12, 12, 1e6), _Case(1, 4, 2, 3, 24, 24, 1.0), _Case(2, 3, 1, 5, 8, 4, 1.0)
)  # fmt: skip
"""Several sizes, 1 among them, since a function's constants may fit one of them, and large numbers, since it may limit them."""


def _computes(function: Callable[..., Any], dim: Any, interleaved: bool, repeated: bool) -> bool:
    """Whether it gives what ours does, with the same gradients, and writes into nothing that it is given."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        return all([_computes_case(function, dim, interleaved, repeated, case) for case in _CASES])


def _computes_case(function: Callable[..., Any], dim: Any, interleaved: bool, repeated: bool, case: _Case) -> bool:
    """The same for tensors of one size. Where not all features are turned, it may raise an error."""
    batch, length, heads = case.batch, case.length, 2 if dim == 2 else 1
    shapes = [(batch, h, length, case.size) for h in (case.heads, case.groups)] + [(batch, length, case.turned)] * 2
    samples = [_sample(shape, i) * case.scale for i, shape in enumerate(shapes)]
    samples[0].view(-1)[0] = samples[2].view(-1)[-1] = math.nan
    (q, k, *angles), right = [[t.clone().requires_grad_() for t in samples] for _ in range(2)]
    try:
        results = function(q.transpose(1, heads), k.transpose(1, heads), *angles)
    except Exception:
        return case.turned < case.size
    if type(results) is not tuple or len(results) != 2:
        return False
    if not all([isinstance(y, torch.Tensor) and y.dim() == 4 and y.requires_grad for y in results]):
        return False
    turning = [_repeated(t) if repeated else t for t in right[2:]]
    expected = _rotary_embedding.reference(*right[:2], *turning, interleaved=interleaved)
    found = [y.transpose(1, heads) for y in results]
    if [y.shape for y in found] != [y.shape for y in expected]:
        return False
    dys = [_sample(tuple(y.shape), i + 4) * case.scale for i, y in enumerate(expected)]
    given = [q, k, *angles]
    found += torch.autograd.grad(found, given, dys, allow_unused=True)
    wanted = [*expected, *torch.autograd.grad(expected, right, dys, allow_unused=True)]
    same = all([_alike(a, b, case.scale**2) for a, b in zip(found, wanted, strict=True)])
    return same and all([_alike(a, b, 0.0) for a, b in zip(given, samples, strict=True)])


def _alike(a: torch.Tensor | None, b: torch.Tensor | None, size: float) -> bool:
    """Whether they are the same for numbers of this size, and no number in the same places."""
    if a is None or b is None:
        return a is b
    return torch.allclose(a, b, rtol=0.0, atol=1e-5 * size, equal_nan=True)


def _sample(shape: tuple[int, ...], which: int) -> torch.Tensor:
    """Numbers without a pattern, of no generator: its numbers would be missing from somebody's sequence, and vmap refuses it."""
    numbers = torch.arange(math.prod(shape), dtype=torch.float32, device="cpu")
    return (numbers.square() * 0.7 + which).sin().view(shape)


def _repeated(angles: torch.Tensor) -> torch.Tensor:
    """The first half of the angles, each twice, as models with interleaved pairs make them of those of halves."""
    return angles[..., : angles.shape[-1] // 2].repeat_interleave(2, -1)


# --- its calls ------------------------------------------------------------------------------------------------------------


class _Results(NamedTuple):
    dtype: torch.dtype
    contiguous: bool
    """Whether they are contiguous where query and key aren't, as after torch.cat."""


def _results(forward: Callable[..., Any], dtypes: tuple[torch.dtype, ...], turned: int) -> _Results | None:
    """What the results are for tensors of these dtypes, of which so many of 8 features are turned. None if ours would have
    others."""
    q, k, cos, sin = [torch.ones(1, 1, 1, 8, dtype=dtype, device="cpu") for dtype in dtypes]
    shapes = [t.expand(2, 3, 3, 8).contiguous().transpose(1, 2) for t in (q, k)]
    angles = [t.expand(1, 2, 3, 8)[0, ..., :turned].contiguous() for t in (cos, sin)]
    try:
        with torch.no_grad():
            y, z = forward(*shapes, *angles)
    except Exception:
        return None
    dtype, contiguous = y.dtype, y.is_contiguous()
    fits = z.dtype is dtype and all(
        [d.is_floating_point and torch.promote_types(d, dtype) is dtype for d in dtypes[:2]]
    )
    as_given = y.stride() == z.stride() == shapes[0].stride()
    return _Results(dtype, contiguous) if fits and (as_given or (contiguous and z.is_contiguous())) else None


class Angles(NamedTuple):
    """What the kernel is given for a call, and what its results have to be."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool
    dtype: torch.dtype
    contiguous: bool


class Rotary:
    """In the place of a function that computes rotary embedding.

    Args:
        names: of its first arguments.
        known: its graphs that were found to compute it, by unsqueeze_dim.
        interleaved: as rotary_embedding's.
        repeated: whether it takes the first half of the angles, each twice.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        names: Sequence[str],
        known: dict[Any, _Read],
        interleaved: bool,
        repeated: bool,
    ):
        self._function, self._names, self._known = function, names, known
        self._interleaved, self._repeated = interleaved, repeated
        self._nobody, self._seen = nn.Module(), dict[Any, _Results | None]()

        @functools.wraps(function)
        def rotated(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs) if is_dynamo_compiling() else self._call(args, kwargs)

        self.call = rotated

    def given(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Sequence[Any], Any] | None:
        """Query, key, cos and sin, and unsqueeze_dim, which is MISSING where a call doesn't have it. None for a call with other
        arguments."""
        words = dict(kwargs)
        if len(args) < 4:
            args = (*args, *[words.pop(name) for name in self._names[len(args) :] if name in words])
        dim = words.pop("unsqueeze_dim", MISSING)
        return None if len(args) != 4 or words else (args, dim)

    def angles(
        self, dtypes: tuple[torch.dtype, torch.dtype], features: int, cos: torch.Tensor, sin: torch.Tensor, dim: Any
    ) -> Angles | None:
        """What the kernel is given for query and key of these dtypes and so many features; None where the function is to run."""
        read = self._known.get(dim) if dim is MISSING or type(dim) is int else None
        if read is None or read.looked.changed(self._nobody) is not None:
            return None
        if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[-1] % 2:
            return None
        like = self._results(dim, read.forward, (*dtypes, cos.dtype, sin.dtype), cos.shape[-1] < features)
        if like is None:
            return None
        if self._repeated:
            cos, sin = _repeated(cos), _repeated(sin)
        return Angles(cos, sin, self._interleaved, like.dtype, like.contiguous)

    def _results(self, dim: Any, forward: Any, dtypes: tuple[torch.dtype, ...], partly: bool) -> _Results | None:
        key = dim, *dtypes, partly
        if key not in self._seen:
            if not is_unseen():
                return None
            self._seen[key] = _results(forward, dtypes, 4 if partly else 8)
        return self._seen[key]

    def _call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = self.given(args, kwargs)
        if given is None or not all([isinstance(t, torch.Tensor) for t in given[0]]):
            return self._function(*args, **kwargs)
        (q, k, cos, sin), dim = given
        angles = self.angles((q.dtype, k.dtype), q.shape[-1], cos, sin, dim) if q.dim() == k.dim() == 4 else None
        if angles is None:
            return self._function(*args, **kwargs)
        if q.dtype is not angles.dtype or k.dtype is not angles.dtype:
            q, k = q.to(angles.dtype), k.to(angles.dtype)
        if dim == 2:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        tensors = q, k, angles.cos, angles.sin
        turned = _rotary_embedding(tensors, angles.interleaved, joined=True)
        if turned is None:
            reason = _rotary_embedding.reason_against(tensors, _rotary_embedding.options(angles.interleaved))
            call = functools.partial(self._function, *args, **kwargs)
            return support.run_reference(_rotary_embedding.name, reason or "too large for this GPU", call)
        if dim == 2:
            turned = turned[0].transpose(1, 2), turned[1].transpose(1, 2)
        return (turned[0].contiguous(), turned[1].contiguous()) if angles.contiguous else turned


def is_unseen() -> bool:
    """Whether nothing sees or transforms what runs now, so that a function's graph may be run to see what it gives."""
    return _torch.unseen() and not _torch.transforms_active()
