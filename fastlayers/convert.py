"""Convert a model in place, and back: a change of class, since all state is torch.nn's own."""

from __future__ import annotations

import fnmatch
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from weakref import ReferenceType, ref

from torch import nn
from torch.nn.utils import parametrize

from . import _originals
from ._state import MARK, class_before
from .catalog import CLASSES
from .dispatch.table import columns
from .fusion import local

Choice = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""Of modules and all that is in them: a pattern for paths ("encoder", "*.head", as in fnmatch), a class, or a function of
path and module."""
Choices = Choice | Iterable[Choice]

_TORCH = {ours: theirs for theirs, ours in CLASSES.items()}
"""torch.nn's class for each of ours."""


@dataclass(frozen=True)
class Conversion:
    """What became of one module: its `path` in the model ("" for the model itself), its class before (`was`) and after
    (`now`), and the `reason` why it is as it was, or None where it was changed."""

    path: str
    was: type[nn.Module]
    now: type[nn.Module]
    reason: str | None

    @property
    def changed(self) -> bool:
        return self.was is not self.now


@dataclass(frozen=True, eq=False)
class Conversions:
    """What `accelerate` or `restore` did, in the order of model.named_modules(): every layer, and every container that
    was changed or could have been. Prints as a table.

    The result of `accelerate` is also a context manager, for one use, which at its end restores what that call changed.
    """

    rows: tuple[Conversion, ...]
    _changed: tuple[ReferenceType[nn.Module], ...] = field(repr=False)

    def __iter__(self) -> Iterator[Conversion]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def changed(self) -> tuple[Conversion, ...]:
        """The rows of the modules whose class was changed."""
        return tuple(row for row in self.rows if row.changed)

    def __str__(self) -> str:
        return columns(
            ("module", "was", "is now, or why not"),
            *((r.path or "(the model)", _name_of(r.was), r.reason or _name_of(r.now)) for r in self.rows),
        )

    def __enter__(self) -> Conversions:
        return self

    def __exit__(self, *_: object) -> None:
        for module in self._changed:
            if (alive := module()) is not None:
                local.drop_unused(alive)
                if _why_not_back(alive) is None:
                    _back(alive)


def accelerate(
    model: nn.Module, include: Choices | None = None, exclude: Choices | None = None, *, fuse: bool = False
) -> Conversions:
    """Make torch.nn's layers in a model ours, in place, by changing their class and nothing else.

    Parameters, buffers, hooks, state_dict, optimizers' references and the modules' identities stay. Calling it again
    changes nothing more. Only exact classes of torch.nn are changed: a subclass, a parametrized module or one whose
    `forward` was replaced has a reason to differ, which the report quotes.

        report = fastlayers.accelerate(model)
        print(report)

        with fastlayers.accelerate(model):  # for a while
            ...

    With `fuse=True`, modules that contain or surround such layers run fused as well, in place: consecutive layers, an RMSNorm or
    an activation written out in torch's functions, `torch.addmm`, and functions of torch.nn.functional. The model's own
    forward is used if it can be analysed, otherwise those of its submodules. A fused module becomes an instance of a
    generated subclass with the same name. A graph is made for each combination of argument names and of arguments that are
    None, a bool or a str, and made anew when something that it depends on changes (a flag, a hook, a child). Where no graph
    can be made, a copy of the forward runs, and of the functions that it calls, which call ours in the place of
    torch.nn.functional's and of functions for rotary embedding: attention that is looked up in a registry by a name, say. The
    original forward runs under torch.compile, and while hooks for all modules are registered.

    Args:
        model: any module, with the layers somewhere in it.
        include: only these modules and what is in them: patterns for paths ("encoder", "*.head"), classes, or functions
            of path and module; one or several. All by default.
        exclude: not these, nor what is in them.
        fuse: also fuse the modules around the layers, as described above.
    Returns:
        The report, a row for every layer.
    Raises:
        TypeError: for a model that is no module, or a choice that is none.
        ValueError: for a pattern that no path matches. In both cases nothing was changed.
        RuntimeError: when a fused module is called, if one of its submodules changes, during that call, something that the
            forward reads afterwards.
    """
    paths = _paths(model)
    within = None if include is None else _chosen(paths, include)
    without = set() if exclude is None else _chosen(paths, exclude)

    def why_not(module: nn.Module) -> str | None:
        reason = why_not_ours(module)
        if reason is None and id(module) in without:
            return "excluded"
        return "not included" if reason is None and within is not None and id(module) not in within else reason

    layers = _convert(paths, why_not, to_ours)
    if not fuse:
        return layers
    allowed = {id(m) for m in paths.values() if id(m) not in without and (within is None or id(m) in within)}
    found = {id(module) for module in local.candidates(model, allowed)}
    fused = _convert(paths, lambda module: None if id(module) in found else why_not(module), local.fuse_in_place)
    rows = {row.path: row for row in (*layers, *[row for row in fused if row.changed])}
    return Conversions(tuple([rows[path] for path in paths if path in rows]), (*layers._changed, *fused._changed))


def restore(model: nn.Module, to: types.ModuleType | None = None) -> Conversions:
    """Undo `accelerate`: every module that it changed gets its class back, and so do copies and parts of such modules.

    Args:
        model: any module, with the layers somewhere in it.
        to: torch.nn, to have layers that were built as ours become torch.nn's as well: for what goes by exact class, as
            quantisation, FLOP counters and attribution do. By default they stay.
    Raises:
        TypeError: for a model that is no module.
        ValueError: for another `to`.
    """
    if to is not None and to is not nn:
        raise ValueError(f"layers are restored to torch.nn, not to {getattr(to, '__name__', repr(to))}")
    paths = _paths(model)
    for module in paths.values():
        local.drop_unused(module)
    return _convert(paths, _why_not_back if to is None else _why_not_torch, _back)


def _paths(model: nn.Module) -> dict[str, nn.Module]:
    """Every module, in the order of named_modules, under every name that its parents have for it. What is in it is named
    once, after the first: there may be exponentially many ways through a model, or endless ones."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is converted, not {type(model).__name__}")
    paths: dict[str, nn.Module] = {}
    _walk("", model, paths, set())
    return paths


def _walk(path: str, module: nn.Module, paths: dict[str, nn.Module], seen: set[int]) -> None:
    """`seen`: the modules' identities, since they may compare as they like, or not be hashable."""
    paths[path] = module
    if id(module) not in seen:
        seen.add(id(module))
        for name, child in module._modules.items():
            if child is not None:
                _walk(f"{path}.{name}" if path else name, child, paths, seen)


def _convert(
    paths: dict[str, nn.Module], why_not: Callable[[nn.Module], str | None], change: Callable[[nn.Module], None]
) -> Conversions:
    modules = {id(module): module for module in paths.values()}
    before = {key: (type(module), why_not(module)) for key, module in modules.items()}
    changed = [modules[key] for key, (_, reason) in before.items() if reason is None]
    for module in changed:
        change(module)
    rows = (Conversion(path, before[id(m)][0], type(m), before[id(m)][1]) for path, m in paths.items())
    layers = [row for row in rows if row.changed or issubclass(row.was, tuple(CLASSES)) or not paths[row.path]._modules]
    return Conversions(tuple(layers), tuple(ref(module) for module in changed))


def to_ours(module: nn.Module) -> None:
    """Change a layer's class to ours, if there is nothing against it."""
    module.__class__ = CLASSES[type(module)]
    vars(module)[MARK] = True


def _back(module: nn.Module) -> None:
    if local.is_fused(module):
        local.undo(module)
        return
    module.__class__ = _TORCH[type(module)]  # type: ignore[assignment]
    vars(module).pop(MARK, None)


def why_not_ours(module: nn.Module) -> str | None:
    """What speaks against making a module ours."""
    if local.is_fused(module):
        return "fused already"
    if type(module) in _TORCH:
        return "accelerated already" if MARK in vars(module) else "ours already"
    if type(module) not in CLASSES:
        return _why_not_class(module)
    own = not vars(module).keys().isdisjoint(("forward", "_conv_forward"))
    if own or _originals.of(type(module)).replaced():
        return "its forward was replaced"
    return None


def _why_not_class(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its parent reads its weight and never calls it"
    if parametrize.is_parametrized(module):
        return "parametrized"
    for cls in CLASSES:
        if isinstance(module, cls):
            return f"a subclass of {cls.__name__}"
    return f"fastlayers has no {name}"


def _why_not_back(module: nn.Module) -> str | None:
    fused = local.is_fused(module)
    if MARK not in vars(module) and not fused:
        return "not accelerated"
    if parametrize.is_parametrized(module):
        return "parametrized since: remove the parametrizations first"
    unchanged = class_before(type(module)) is not type(module) if fused else type(module) in _TORCH
    return None if unchanged else "made a subclass since"


def _why_not_torch(module: nn.Module) -> str | None:
    if type(module) in _TORCH or local.is_fused(module):
        return _why_not_back(module) if local.is_fused(module) else None
    if not isinstance(module, tuple(_TORCH)):
        return "not one of ours"
    if parametrize.is_parametrized(module):
        return "parametrized since: remove the parametrizations first"
    return f"a subclass of {next(ours.__name__ for ours in _TORCH if isinstance(module, ours))}"


def _chosen(paths: dict[str, nn.Module], choices: Choices) -> set[int]:
    """The modules that one of the choices means, and all that is in them, by identity."""
    chosen: set[int] = set()
    if isinstance(choices, str | type) or not isinstance(choices, Iterable):
        choices = [choices]
    for choice in list(choices):
        meant = [module for path, module in paths.items() if _matches(path, module, choice)]
        if not meant and isinstance(choice, str):
            raise ValueError(f"no module's path matches {choice!r}")
        chosen.update(id(inner) for module in meant if id(module) not in chosen for inner in _paths(module).values())
    return chosen


def _matches(path: str, module: nn.Module, choice: Choice) -> bool:
    if isinstance(choice, str):
        return fnmatch.fnmatchcase(path, choice)
    if isinstance(choice, type):
        return isinstance(module, choice)
    if callable(choice):
        return bool(choice(path, module))
    raise TypeError(f"a path's pattern, a class or a function chooses modules, not {choice!r}")


def _name_of(kind: type[nn.Module]) -> str:
    if class_before(kind) is not kind:
        return f"{kind.__name__}, fused"
    package = kind.__module__.split(".")[0]
    if package == "torch":
        return f"torch.nn.{kind.__name__}"
    return f"{package}.{kind.__name__}" if package == "fastlayers" else kind.__name__
